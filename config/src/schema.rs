//! JSON Schema of every resource, made from the types, and errors in words when a value does not fit one.
//!
//! The types are the source: doc comments become descriptions, defaults defaults, `rules.rs` conditions.
//! A schema is made and compiled once for each type; it is asked only after the typed reading has failed,
//! because it finds every error instead of the first.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::{JsonType, ValidationError, Validator};
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use crate::consumer::Consumer;
use crate::consumer_group::ConsumerGroup;
use crate::credential::Credential;
use crate::error::{ConfigError, ErrorKind, escape, nearest};
use crate::global_rule::GlobalRule;
use crate::id::Kind;
use crate::lookup_table::{LookupEntry, LookupTable};
use crate::meta::{META, Meta};
use crate::plugin_catalog::{PluginCatalog, PluginSchema};
use crate::plugin_config::PluginConfig;
use crate::plugin_metadata::PluginMetadata;
use crate::proto::Proto;
use crate::route::Route;
use crate::secret::{Aws, Gcp, Manager, Vault};
use crate::service::Service;
use crate::ssl::Ssl;
use crate::stream_route::StreamRoute;
use crate::upstream::Upstream;

/// Words for an error where a pattern would say nothing; not part of the published schema.
const EXPECTED: &str = "x-expected";

/// The JSON Schema of a kind of resource, with the settings of every plugin in its place.
#[must_use]
pub fn schema_for(kind: Kind, catalog: &dyn PluginCatalog) -> Value {
    let mut schema = match kind {
        Kind::Route => of::<Route>(),
        Kind::Service => of::<Service>(),
        Kind::Upstream => of::<Upstream>(),
        Kind::Consumer => of::<Consumer>(),
        Kind::Credential => of::<Credential>(),
        Kind::ConsumerGroup => of::<ConsumerGroup>(),
        Kind::PluginConfig => of::<PluginConfig>(),
        Kind::GlobalRule => of::<GlobalRule>(),
        Kind::PluginMetadata => of::<PluginMetadata>(),
        Kind::Ssl => of::<Ssl>(),
        Kind::Proto => of::<Proto>(),
        Kind::Secret => json!({
            "title": "Secret",
            "description": "A secret manager.",
            "oneOf": Manager::ALL.map(schema_for_manager),
        }),
        Kind::StreamRoute => of::<StreamRoute>(),
        Kind::LookupTable => of::<LookupTable>(),
        Kind::LookupEntry => of::<LookupEntry>(),
    };
    if let Some(Value::Object(plugins)) = schema.pointer_mut("/properties/plugins") {
        let members = plugin_schemas(kind, catalog);
        plugins.insert("properties".to_owned(), Value::Object(members));
        plugins.insert("additionalProperties".to_owned(), Value::Bool(false));
    }
    schema
}

/// The JSON Schema of one secret manager.
#[must_use]
pub fn schema_for_manager(manager: Manager) -> Value {
    match manager {
        Manager::Vault => of::<Vault>(),
        Manager::Aws => of::<Aws>(),
        Manager::Gcp => of::<Gcp>(),
    }
}

/// The JSON Schema of one plugin's settings with `_meta`; nothing if there are no such settings.
#[must_use]
pub fn schema_for_plugin(name: &str, which: PluginSchema, catalog: &dyn PluginCatalog) -> Option<Value> {
    let mut schema = catalog.schema(name, which)?;
    if which != PluginSchema::Metadata
        && let Some(object) = schema.as_object_mut()
        && let Value::Object(properties) =
            object.entry("properties").or_insert_with(|| Value::Object(Map::new()))
    {
        properties.insert(META.to_owned(), of::<Meta>());
    }
    Some(schema)
}

fn plugin_schemas(kind: Kind, catalog: &dyn PluginCatalog) -> Map<String, Value> {
    let person = matches!(kind, Kind::Consumer | Kind::Credential);
    let names = catalog.names().into_iter().filter(|name| kind != Kind::Credential || catalog.is_auth(name));
    names
        .filter_map(|name| {
            let which =
                if person && catalog.is_auth(name) { PluginSchema::Consumer } else { PluginSchema::Config };
            Some((name.to_owned(), schema_for_plugin(name, which, catalog)?))
        })
        .collect()
}

/// The JSON Schema of a type.
#[must_use]
pub fn of<T: JsonSchema>() -> Value {
    let mut schema = annotated::<T>();
    without_annotations(&mut schema);
    schema
}

/// Everything in `value` that does not fit the schema of `T`.
#[must_use]
pub fn errors<T: JsonSchema + 'static>(value: &Value) -> Vec<ConfigError> {
    let Some(check) = check_of::<T>() else { return Vec::new() };
    let mut found = Vec::new();
    for error in check.validator.iter_errors(value) {
        explain(&error, &check.schema, &mut found);
    }
    found
}

/// A schema and what it compiles to.
struct Check {
    schema: Value,
    validator: Validator,
}

/// Made on first use and kept: making one takes milliseconds, and a broken store asks for thousands.
fn check_of<T: JsonSchema + 'static>() -> Option<Arc<Check>> {
    static CHECKS: OnceLock<RwLock<HashMap<TypeId, Arc<Check>>>> = OnceLock::new();
    let checks = CHECKS.get_or_init(RwLock::default);
    let id = TypeId::of::<T>();
    if let Some(check) = checks.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
        return Some(Arc::clone(check));
    }
    let schema = annotated::<T>();
    // The schema comes from a type, so that it does not compile is a defect that the tests would show.
    let validator = jsonschema::options().should_validate_formats(true).build(&schema).ok()?;
    let check = Arc::new(Check { schema, validator });
    checks.write().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::clone(&check));
    Some(check)
}

fn annotated<T: JsonSchema>() -> Value {
    SchemaSettings::draft2020_12()
        .with(|settings| settings.inline_subschemas = true)
        .with_transform(RecursiveTransform(tidy))
        .into_generator()
        .into_root_schema_for::<T>()
        .to_value()
}

/// As people would write it: no `null` for absent, plain enums, no machine formats.
fn tidy(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    if object.get("default").is_some_and(Value::is_null) {
        object.remove("default");
    }
    let numeric = ["int", "uint", "float", "double"];
    if object
        .get("format")
        .and_then(Value::as_str)
        .is_some_and(|format| numeric.iter().any(|prefix| format.starts_with(prefix)))
    {
        object.remove("format");
    }
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(options)) = object.get_mut("enum") {
        options.retain(|option| !option.is_null());
    }
    if let Some(Value::Array(forms)) = object.get_mut("anyOf") {
        forms.retain(|form| form.get("type").is_none_or(|name| name != "null"));
        if let [Value::Object(only)] = forms.as_mut_slice() {
            let only = std::mem::take(only);
            object.remove("anyOf");
            for (key, value) in only {
                object.entry(key).or_insert(value);
            }
        }
    }
    enumerate(object);
}

/// `oneOf` of described constants becomes `enum`, the descriptions one text.
fn enumerate(object: &mut Map<String, Value>) {
    let Some(Value::Array(forms)) = object.get("oneOf") else { return };
    let mut options = Vec::new();
    let mut text = object.get("description").and_then(Value::as_str).unwrap_or_default().to_owned();
    for form in forms {
        let description = form.get("description").and_then(Value::as_str);
        let constants = match (form.get("const"), form.get("enum")) {
            (Some(constant), _) => std::slice::from_ref(constant),
            (None, Some(Value::Array(constants))) => constants.as_slice(),
            _ => return,
        };
        options.extend(constants.iter().cloned());
        if let (Some(description), [Value::String(constant)]) = (description, constants) {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&format!("- `{constant}`: {description}"));
        }
    }
    object.remove("oneOf");
    object.insert("type".to_owned(), json!("string"));
    object.insert("enum".to_owned(), Value::Array(options));
    if !text.is_empty() {
        object.insert("description".to_owned(), Value::String(text));
    }
}

fn without_annotations(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.remove(EXPECTED);
            object.values_mut().for_each(without_annotations);
        }
        Value::Array(list) => list.iter_mut().for_each(without_annotations),
        _ => {}
    }
}

/// What an error of the schema says, in the words of [`ErrorKind`].
fn explain(error: &ValidationError<'_>, schema: &Value, found: &mut Vec<ConfigError>) {
    let path = error.schema_path().as_str();
    // Rules between fields are checked and told by `crate::rules`.
    if path.contains("/allOf/") {
        return;
    }
    let place = error.instance_path().as_str();
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let node = schema.pointer(parent).unwrap_or(&Value::Null);
    let instance: &Value = error.instance();
    let expected = node.get(EXPECTED).and_then(Value::as_str);
    let mut push = |kind| found.push(ConfigError::new(place, kind));
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected }
        | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
            let known = || node.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::keys);
            for field in unexpected {
                let nearest = nearest(field, known().map(String::as_str)).map(str::to_owned);
                let kind = ErrorKind::UnknownField { field: field.clone(), nearest };
                found.push(ConfigError::new(format!("{place}/{}", escape(field)), kind));
            }
        }
        ValidationErrorKind::Required { property } => {
            push(ErrorKind::MissingField { field: property.as_str().unwrap_or_default().to_owned() });
        }
        ValidationErrorKind::Type { .. } if instance.is_null() => push(ErrorKind::Null),
        ValidationErrorKind::Type { kind } => {
            let expected = expected.map_or_else(|| type_names(kind), str::to_owned);
            push(ErrorKind::WrongType { found: type_of(instance), expected });
        }
        ValidationErrorKind::Enum { options } => push(none_of(instance, options)),
        ValidationErrorKind::Constant { expected_value } => {
            push(none_of(instance, &Value::Array(vec![(**expected_value).clone()])));
        }
        ValidationErrorKind::Minimum { .. }
        | ValidationErrorKind::Maximum { .. }
        | ValidationErrorKind::ExclusiveMinimum { .. }
        | ValidationErrorKind::ExclusiveMaximum { .. } => push(ErrorKind::OutOfRange {
            what: "the value",
            found: instance.to_string(),
            allowed: number_range(node),
        }),
        ValidationErrorKind::MinLength { .. } | ValidationErrorKind::MaxLength { .. } => {
            push(ErrorKind::OutOfRange {
                what: "the length",
                found: instance.as_str().map_or(0, |text| text.chars().count()).to_string(),
                allowed: range(node, "minLength", "maxLength", "characters"),
            });
        }
        ValidationErrorKind::MinItems { .. } | ValidationErrorKind::MaxItems { .. } => {
            push(ErrorKind::OutOfRange {
                what: "the number of elements",
                found: instance.as_array().map_or(0, Vec::len).to_string(),
                allowed: range(node, "minItems", "maxItems", "elements"),
            });
        }
        ValidationErrorKind::MinProperties { .. } | ValidationErrorKind::MaxProperties { .. } => {
            push(ErrorKind::OutOfRange {
                what: "the number of fields",
                found: instance.as_object().map_or(0, Map::len).to_string(),
                allowed: range(node, "minProperties", "maxProperties", "fields"),
            });
        }
        ValidationErrorKind::UniqueItems => push(ErrorKind::Duplicate),
        ValidationErrorKind::Pattern { pattern } => push(ErrorKind::BadFormat {
            found: quote(instance),
            expected: expected.map_or_else(|| format!("text that matches `{pattern}`"), str::to_owned),
        }),
        ValidationErrorKind::Format { format } => push(ErrorKind::BadFormat {
            found: quote(instance),
            expected: expected.map_or_else(|| format!("of the format `{format}`"), str::to_owned),
        }),
        ValidationErrorKind::PropertyNames { error } => {
            // The path is already that of the rule inside `propertyNames`.
            let name = error.instance().as_str().unwrap_or_default();
            let expected = expected.unwrap_or("a name that is allowed here").to_owned();
            let kind = ErrorKind::BadFormat { found: quote(error.instance()), expected };
            found.push(ConfigError::new(format!("{place}/{}", escape(name)), kind));
        }
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            explain_forms(error, context, node, schema, found);
        }
        _ => push(ErrorKind::Invalid { problem: error.masked().to_string() }),
    }
}

/// A value that fits none of several forms: the form that was meant is the one whose type it has.
fn explain_forms(
    error: &ValidationError<'_>,
    context: &[Vec<ValidationError<'static>>],
    node: &Value,
    schema: &Value,
    found: &mut Vec<ConfigError>,
) {
    let place = error.instance_path();
    let instance: &Value = error.instance();
    if let Some(expected) = node.get(EXPECTED).and_then(Value::as_str) {
        let expected = expected.to_owned();
        let kind = match instance {
            Value::String(_) => ErrorKind::BadFormat { found: quote(instance), expected },
            _ => ErrorKind::WrongType { found: type_of(instance), expected },
        };
        found.push(ConfigError::new(place.as_str(), kind));
        return;
    }
    let wrong_type = |error: &ValidationError<'_>| {
        matches!(error.kind(), ValidationErrorKind::Type { .. }) && error.instance_path() == place
    };
    let mut meant = context.iter().filter(|errors| !errors.iter().any(wrong_type));
    if let (Some(errors), None) = (meant.next(), meant.next()) {
        for error in errors {
            explain(error, schema, found);
        }
        return;
    }
    let mut types: Vec<String> = Vec::new();
    for error in context.iter().flatten().filter(|error| wrong_type(error)) {
        if let ValidationErrorKind::Type { kind } = error.kind() {
            let names = type_names(kind);
            if !types.contains(&names) {
                types.push(names);
            }
        }
    }
    let kind = if instance.is_null() {
        ErrorKind::Null
    } else if types.is_empty() {
        ErrorKind::Invalid { problem: "the value has none of the forms that are allowed here".to_owned() }
    } else {
        ErrorKind::WrongType { found: type_of(instance), expected: types.join(" or ") }
    };
    found.push(ConfigError::new(place.as_str(), kind));
}

fn none_of(instance: &Value, options: &Value) -> ErrorKind {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let allowed: Vec<String> = options.as_array().into_iter().flatten().map(word).collect();
    let found = quote(instance);
    let nearest = nearest(&found, allowed.iter().map(String::as_str)).map(str::to_owned);
    ErrorKind::NotOneOf { found, allowed, nearest }
}

/// A value for a message: text without quotes, everything cut short.
fn quote(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

pub(crate) fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn type_names(kind: &TypeKind) -> String {
    let name = |name: JsonType| match name {
        JsonType::Array => "a list",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Null => "null",
        JsonType::Number => "a number",
        JsonType::Object => "an object",
        JsonType::String => "text",
    };
    match kind {
        TypeKind::Single(only) => name(*only).to_owned(),
        TypeKind::Multiple(set) => set.iter().map(name).collect::<Vec<_>>().join(" or "),
    }
}

fn number_range(node: &Value) -> String {
    let limit = |key| node.get(key).map(Value::to_string);
    match (limit("minimum"), limit("exclusiveMinimum"), limit("maximum")) {
        (Some(min), _, Some(max)) => format!("{min} to {max}"),
        (Some(min), _, None) => format!("{min} or more"),
        (None, Some(min), Some(max)) => format!("more than {min}, up to {max}"),
        (None, Some(min), None) => format!("more than {min}"),
        (None, None, Some(max)) => format!("{max} or less"),
        (None, None, None) => "another number".to_owned(),
    }
}

fn range(node: &Value, min: &str, max: &str, unit: &str) -> String {
    let limit = |key| node.get(key).and_then(Value::as_u64);
    match (limit(min), limit(max)) {
        (Some(min), Some(max)) if min == max => format!("exactly {min} {unit}"),
        (Some(min), Some(max)) => format!("{min} to {max} {unit}"),
        (Some(min), None) => format!("at least {min} {unit}"),
        (None, Some(max)) => format!("up to {max} {unit}"),
        (None, None) => unit.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCatalog;

    #[test]
    fn schemas_of_every_kind_are_for_people() {
        fn walk(schema: &Value, at: &str) {
            match schema {
                Value::Object(object) => {
                    for (key, value) in object {
                        assert!(!["$ref", "$defs", "x-expected"].contains(&key.as_str()), "{at}/{key}");
                        assert!(
                            key != "type" || value.is_string() || value.is_object(),
                            "{at}/{key}: {value}"
                        );
                        walk(value, &format!("{at}/{key}"));
                    }
                    if let Some(Value::Object(properties)) = object.get("properties") {
                        // Conditions name fields too; they are described where the fields are.
                        let conditions = ["/allOf/", "/not"].iter().any(|part| at.contains(part));
                        // Settings of plugins are described by the plugins.
                        let plugins = at.ends_with("/plugins");
                        for (name, property) in properties {
                            let described = property.get("description").is_some();
                            assert!(
                                described || conditions || plugins,
                                "{at}/properties/{name} says nothing"
                            );
                        }
                    }
                }
                Value::Array(list) => {
                    list.iter().enumerate().for_each(|(i, item)| walk(item, &format!("{at}/{i}")))
                }
                Value::Null => panic!("{at} is null"),
                _ => {}
            }
        }
        for kind in Kind::ALL {
            let schema = schema_for(kind, &TestCatalog);
            assert!(jsonschema::meta::is_valid(&schema), "{kind}");
            walk(&schema, kind.singular());
        }
    }

    #[test]
    fn limits_defaults_and_choices_are_in_the_schema() {
        let upstream = schema_for(Kind::Upstream, &TestCatalog);
        for (pointer, expected) in [
            ("/properties/type/enum", json!(["roundrobin", "chash", "ewma", "least_conn", "random"])),
            ("/properties/type/default", json!("roundrobin")),
            ("/properties/keepalive_pool/properties/size/default", json!(320)),
            ("/properties/keepalive_pool/properties/size/minimum", json!(1)),
            ("/properties/keepalive_pool/properties/idle_timeout/default", json!(60)),
            (
                "/properties/checks/properties/active/properties/healthy/properties/http_statuses/default",
                json!([200, 302]),
            ),
            ("/properties/timeout/required", json!(["connect", "send", "read"])),
            ("/properties/timeout/properties/read/exclusiveMinimum", json!(0)),
            ("/additionalProperties", json!(false)),
            ("/properties/desc/maxLength", json!(256)),
        ] {
            assert_eq!(upstream.pointer(pointer), Some(&expected), "{pointer}");
        }
        let route = schema_for(Kind::Route, &TestCatalog);
        assert_eq!(route.pointer("/allOf/0/oneOf/1/required"), Some(&json!(["uris"])));
        assert_eq!(route.pointer("/properties/status/enum"), Some(&json!([1, 0])));
    }

    #[test]
    fn schemas_hold_those_of_the_plugins_that_belong_there() {
        for (kind, name, present) in [
            (Kind::Route, "limit-count", true),
            (Kind::Consumer, "limit-count", true),
            (Kind::Credential, "limit-count", false),
            (Kind::Credential, "key-auth", true),
        ] {
            let schema = schema_for(kind, &TestCatalog);
            let plugin = schema.pointer(&format!("/properties/plugins/properties/{name}"));
            assert_eq!(plugin.is_some(), present, "{kind} {name}");
            if let Some(plugin) = plugin {
                assert!(plugin.pointer("/properties/_meta/properties/disable").is_some());
            }
        }
        assert!(schema_for_plugin("http-logger", PluginSchema::Metadata, &TestCatalog).is_some());
        assert!(schema_for_plugin("key-auth", PluginSchema::Metadata, &TestCatalog).is_none());
    }
}
