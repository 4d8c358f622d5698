//! `apisix.yaml` and `apisix.json`: all resources in one file, and the body of `PUT /apisix/admin/configs`.
//!
//! Each kind is an array under its name. The file is read as a whole: what cannot be read is told with its place, and
//! what can be read is handed on, unchecked, as changes to the graph. YAML must end with `#END`, so that a file that is
//! being written is not taken for a short one.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value};

use crate::document::{Document, LocatedError};
use crate::env::{self, Env, Typing};
use crate::error::{ConfigError, ErrorKind, escape, nearest};
use crate::graph::Change;
use crate::id::{Kind, ResourceKey};

/// What a file holds.
#[derive(Debug)]
pub struct ApisixYaml {
    document: Document,
    items: Vec<FileItem>,
    places: HashMap<ResourceKey, usize>,
    /// `plugins`, if the file has it: it replaces the list of `config.yaml`.
    pub plugins: Option<Vec<ListedPlugin>>,
    /// `KIND_conf_version`, for those kinds that have one.
    pub conf_versions: BTreeMap<Kind, u64>,
    /// What could not be read. The rest could.
    pub errors: Vec<LocatedError>,
}

/// One resource of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileItem {
    pub key: ResourceKey,
    /// As it is written, without `modifiedIndex`.
    pub value: Value,
    /// Where it stands in the file.
    pub pointer: String,
    /// `modifiedIndex`, if the item has one.
    pub modified_index: Option<u64>,
}

/// An element of `plugins`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedPlugin {
    pub name: String,
    /// For stream routes.
    pub stream: bool,
}

/// Kinds that have an array of their own, in the order of the docs.
const KINDS: [Kind; 12] = [
    Kind::Route,
    Kind::Service,
    Kind::Upstream,
    Kind::Consumer,
    Kind::ConsumerGroup,
    Kind::PluginConfig,
    Kind::GlobalRule,
    Kind::PluginMetadata,
    Kind::Ssl,
    Kind::Proto,
    Kind::Secret,
    Kind::StreamRoute,
];

/// Name of `ssls` before APISIX 3.
const OLD_SSLS: &str = "ssl";
const PLUGINS: &str = "plugins";
const CONF_VERSION: &str = "_conf_version";
/// What APISIX adds to a configuration it is asked for.
const METADATA: [&str; 2] = ["X-Digest", "X-Last-Modified"];

impl ApisixYaml {
    /// Read a file: the end mark, the text, the environment, the resources.
    ///
    /// # Errors
    /// If nothing can be used: the file is not finished, not well-formed, or asks for variables that are not set.
    pub fn parse(name: &str, text: &str, env: &dyn Env) -> Result<ApisixYaml, Vec<LocatedError>> {
        if !name.ends_with(".json") && !is_finished(text) {
            let problem = "the end mark is missing: write #END as the last line, when the file is complete";
            let line = u32::try_from(text.lines().count()).unwrap_or(u32::MAX).max(1);
            let error = ConfigError::invalid("", problem);
            return Err(vec![LocatedError { file: name.into(), line, column: 1, error }]);
        }
        let mut document = Document::parse(name, text).map_err(|error| vec![error.into()])?;
        env::substitute(&mut document, env, Typing::Quotes)?;
        ApisixYaml::read(document)
    }

    /// As [`ApisixYaml::parse`], from bytes.
    ///
    /// # Errors
    /// As [`ApisixYaml::parse`], and if the bytes are not UTF-8.
    pub fn parse_bytes(name: &str, bytes: &[u8], env: &dyn Env) -> Result<ApisixYaml, Vec<LocatedError>> {
        match std::str::from_utf8(bytes) {
            Ok(text) => ApisixYaml::parse(name, text, env),
            Err(_) => Err(Document::parse_bytes(name, bytes).err().into_iter().map(Into::into).collect()),
        }
    }

    /// Read a document, as it came over the Admin API: no end mark, no environment.
    ///
    /// # Errors
    /// If it is not an object.
    pub fn read(document: Document) -> Result<ApisixYaml, Vec<LocatedError>> {
        let members = match document.value() {
            Value::Null => Map::new(),
            Value::Object(members) => members.clone(),
            _ => {
                let problem = "write an object with `routes`, `services`, `upstreams` and so on";
                return Err(vec![document.error(ConfigError::invalid("", problem))]);
            }
        };
        let mut reader = Reader::default();
        for (name, value) in members {
            reader.member(&name, value);
        }
        let errors = reader.errors.into_iter().map(|error| document.error(error)).collect();
        let places = reader.items.iter().enumerate().map(|(place, item)| (item.key.clone(), place)).collect();
        Ok(ApisixYaml {
            document,
            items: reader.items,
            places,
            plugins: reader.plugins,
            conf_versions: reader.conf_versions,
            errors,
        })
    }

    /// The resources, in the order of the file.
    pub fn items(&self) -> &[FileItem] {
        &self.items
    }

    /// The resources as changes; those without a `modifiedIndex` get `revision`.
    pub fn changes(&self, revision: u64) -> Vec<Change> {
        let change = |item: &FileItem| {
            let modified_index = item.modified_index.unwrap_or(revision);
            let (key, value) = (item.key.clone(), item.value.clone());
            Change::Put { key, value, created_index: modified_index, modified_index }
        };
        self.items.iter().map(change).collect()
    }

    /// An error inside a resource, with its place in the file.
    pub fn locate(&self, key: &ResourceKey, error: ConfigError) -> LocatedError {
        let item = self.places.get(key).and_then(|place| self.items.get(*place));
        let prefix = item.map_or("", |item| item.pointer.as_str());
        self.document.error(error.under(prefix))
    }

    /// The file itself.
    pub fn document(&self) -> &Document {
        &self.document
    }
}

/// Whether nothing but blanks follows `#END`. APISIX looks at the last ten bytes.
fn is_finished(text: &str) -> bool {
    text.trim_end().ends_with("#END")
}

#[derive(Default)]
struct Reader {
    items: Vec<FileItem>,
    pointers: HashMap<ResourceKey, String>,
    plugins: Option<Vec<ListedPlugin>>,
    conf_versions: BTreeMap<Kind, u64>,
    errors: Vec<ConfigError>,
}

impl Reader {
    fn invalid(&mut self, pointer: &str, problem: impl Into<String>) {
        self.errors.push(ConfigError::invalid(pointer, problem));
    }

    fn member(&mut self, name: &str, value: Value) {
        let pointer = format!("/{}", escape(name));
        if name == PLUGINS {
            self.plugin_list(&pointer, value);
        } else if let Some(kind) = kind_of(name) {
            for (index, item) in self.elements(&pointer, value).into_iter().enumerate() {
                self.item(kind, &format!("{pointer}/{index}"), index, item);
            }
        } else if let Some(kind) = name.strip_suffix(CONF_VERSION) {
            match (kind_of(kind), value.as_u64()) {
                (Some(kind), Some(version)) => {
                    self.conf_versions.insert(kind, version);
                }
                (None, Some(_)) if kind == PLUGINS => {}
                (Some(_), None) => self.invalid(&pointer, format!("{name} must be a number")),
                (None, _) => self.unknown(name, &pointer),
            }
        } else if !METADATA.contains(&name) {
            self.unknown(name, &pointer);
        }
    }

    fn unknown(&mut self, name: &str, pointer: &str) {
        let known = KINDS.iter().map(|kind| kind.segment()).chain([PLUGINS]);
        let kind = match name {
            "credentials" => ErrorKind::Unsupported {
                what: "`credentials` beside `consumers`".into(),
                instead: "write them into `consumers`, with `id: USERNAME/credentials/ID`".into(),
            },
            _ => ErrorKind::UnknownField {
                field: name.into(),
                nearest: nearest(name, known).map(str::to_owned),
            },
        };
        self.errors.push(ConfigError::new(pointer, kind));
    }

    fn elements(&mut self, pointer: &str, value: Value) -> Vec<Value> {
        match value {
            Value::Array(items) => items,
            Value::Null => Vec::new(),
            // Lua does not tell an empty object from an empty array.
            Value::Object(members) if members.is_empty() => Vec::new(),
            _ => {
                self.invalid(pointer, "write an array: each element begins with `- `");
                Vec::new()
            }
        }
    }

    fn plugin_list(&mut self, pointer: &str, value: Value) {
        let mut plugins = Vec::new();
        for (index, item) in self.elements(pointer, value).into_iter().enumerate() {
            let name = item.get("name").and_then(Value::as_str);
            let stream = item.get("stream").map_or(Some(false), Value::as_bool);
            match (name, stream) {
                (Some(name), Some(stream)) => plugins.push(ListedPlugin { name: name.to_owned(), stream }),
                (None, _) => self.invalid(&format!("{pointer}/{index}"), "write `name: PLUGIN`"),
                (_, None) => self.invalid(&format!("{pointer}/{index}/stream"), "write true or false"),
            }
        }
        self.plugins = Some(plugins);
    }

    fn item(&mut self, kind: Kind, pointer: &str, index: usize, item: Value) {
        let Value::Object(mut members) = item else {
            self.invalid(pointer, "write an object");
            return;
        };
        let modified_index = match members.remove("modifiedIndex") {
            None => None,
            Some(value) => {
                if !value.is_u64() {
                    self.invalid(&format!("{pointer}/modifiedIndex"), "modifiedIndex must be a number");
                }
                value.as_u64()
            }
        };
        // `key-auth:` without a value is `key-auth: {}`.
        if let Some(Value::Object(plugins)) = members.get_mut(PLUGINS) {
            plugins
                .values_mut()
                .filter(|value| value.is_null())
                .for_each(|value| *value = Value::Object(Map::new()));
        }
        let nested = if kind == Kind::Consumer { members.remove("credentials") } else { None };
        let Some(key) = self.key(kind, pointer, index, &mut members) else { return };
        if let Some(nested) = nested {
            self.credentials(&key, &format!("{pointer}/credentials"), nested);
        }
        self.push(key, pointer.to_owned(), Value::Object(members), modified_index);
    }

    /// Credentials written inside their consumer.
    fn credentials(&mut self, consumer: &ResourceKey, pointer: &str, value: Value) {
        for (index, item) in self.elements(pointer, value).into_iter().enumerate() {
            let pointer = format!("{pointer}/{index}");
            let Some(id) = text_of(item.get("id")).filter(|_| item.is_object()) else {
                self.invalid(&pointer, "a credential needs `id`");
                continue;
            };
            match ResourceKey::parse(Kind::Credential, &format!("{}/credentials/{id}", consumer.id)) {
                Ok(key) => self.push(key, pointer, item, None),
                Err(error) => self.errors.push(error.under(&pointer)),
            }
        }
    }

    fn push(&mut self, key: ResourceKey, pointer: String, value: Value, modified_index: Option<u64>) {
        if let Some(first) = self.pointers.get(&key) {
            let problem =
                format!("found duplicate id {} in {}: it is at {first} too", key.id, key.kind.segment());
            self.invalid(&pointer, problem);
            return;
        }
        self.pointers.insert(key.clone(), pointer.clone());
        self.items.push(FileItem { key, value, pointer, modified_index });
    }

    /// The key of an item: its id, its name, or its place.
    fn key(
        &mut self,
        kind: Kind,
        pointer: &str,
        index: usize,
        members: &mut Map<String, Value>,
    ) -> Option<ResourceKey> {
        let id = text_of(members.get("id"));
        if id.is_none() && members.get("id").is_some_and(|id| !id.is_null()) {
            self.invalid(&format!("{pointer}/id"), "write the id as text or as a number");
            return None;
        }
        let username = text_of(members.get("username"));
        let is_credential = |id: &Option<String>| id.as_ref().is_some_and(|id| id.contains("/credentials/"));
        let (kind, at, id) = match kind {
            Kind::Consumer if is_credential(&id) => (Kind::Credential, "id", id),
            Kind::Consumer if is_credential(&username) => {
                members.remove("username");
                (Kind::Credential, "username", username)
            }
            Kind::Consumer if username.is_some() => (kind, "username", username),
            kind => (kind, "id", id),
        };
        let Some(id) = id else {
            let missing = match kind {
                Kind::Consumer => "username",
                Kind::PluginMetadata | Kind::Secret => "id",
                // As APISIX numbers them.
                _ => return Some(ResourceKey::by_place(kind, index)),
            };
            self.errors.push(ConfigError::new(pointer, ErrorKind::MissingField { field: missing.into() }));
            return None;
        };
        match ResourceKey::parse(kind, &id) {
            Ok(key) => Some(key),
            Err(ConfigError { kind, .. }) => {
                self.errors.push(ConfigError::new(format!("{pointer}/{at}"), kind));
                None
            }
        }
    }
}

fn kind_of(name: &str) -> Option<Kind> {
    if name == OLD_SSLS {
        return Some(Kind::Ssl);
    }
    KINDS.into_iter().find(|kind| kind.segment() == name)
}

/// An id as text: numbers are as good.
fn text_of(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) if number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn env() -> BTreeMap<String, String> {
        BTreeMap::from([("PORT".to_owned(), "1980".to_owned())])
    }

    fn parse(text: &str) -> ApisixYaml {
        ApisixYaml::parse("apisix.yaml", text, &env()).unwrap_or_else(|errors| panic!("{errors:?}"))
    }

    fn keys(file: &ApisixYaml) -> Vec<String> {
        file.items().iter().map(|item| item.key.to_string()).collect()
    }

    #[test]
    fn every_kind_has_its_array() {
        let file = parse(
            "routes: [{id: 1, uri: /a}, {id: a-b, uri: /b}, {uri: /c}]
services: [{id: 1}]
upstreams: [{id: 1}]
consumers: [{username: jack}]
consumer_groups: [{id: 1}]
plugin_configs: [{id: 1}]
global_rules: [{id: 1}]
plugin_metadata: [{id: http-logger}]
ssls: [{id: 1}]
ssl: [{id: 2}]
protos: [{id: 1}]
secrets: [{id: vault/1}]
stream_routes: [{}]
plugins: [{name: key-auth}, {name: mqtt-proxy, stream: true}]
#END
",
        );
        assert_eq!(file.errors, []);
        assert_eq!(
            keys(&file),
            [
                "routes/1",
                "routes/a-b",
                "routes/routes#3",
                "services/1",
                "upstreams/1",
                "consumers/jack",
                "consumer_groups/1",
                "plugin_configs/1",
                "global_rules/1",
                "plugin_metadata/http-logger",
                "ssls/1",
                "ssls/2",
                "protos/1",
                "secrets/vault/1",
                "stream_routes/stream_routes#1",
            ]
        );
        let plugins = file.plugins.unwrap();
        assert_eq!(plugins[0], ListedPlugin { name: "key-auth".into(), stream: false });
        assert!(plugins[1].stream);
    }

    #[test]
    fn credentials_are_found_however_they_are_written() {
        let file = parse(
            "consumers:
  - username: rose
    id: rose
    plugins: {key-auth: }
  - id: rose/credentials/one
    plugins: {key-auth: {key: a}}
  - username: rose/credentials/two
    plugins: {key-auth: {key: b}}
  - username: jack
    credentials:
      - {id: three, plugins: {key-auth: {key: c}}}
#END",
        );
        assert_eq!(file.errors, []);
        assert_eq!(
            keys(&file),
            [
                "consumers/rose",
                "consumers/rose/credentials/one",
                "consumers/rose/credentials/two",
                "consumers/jack/credentials/three",
                "consumers/jack",
            ]
        );
        assert_eq!(file.items()[0].value["plugins"]["key-auth"], json!({}));
        assert_eq!(file.items()[2].value, json!({"plugins": {"key-auth": {"key": "b"}}}));
        assert_eq!(file.items()[4].value, json!({"username": "jack"}));
        let error = file.locate(&file.items()[3].key, ConfigError::invalid("/plugins/key-auth/key", "no"));
        assert_eq!(
            error.to_string(),
            "apisix.yaml:11:42: /consumers/3/credentials/0/plugins/key-auth/key: no"
        );
    }

    #[test]
    fn versions_and_indices_are_taken_out() {
        let text = r#"{
            "routes_conf_version": 5, "plugins_conf_version": 1, "ssls_conf_version": 7,
            "X-Digest": "x", "X-Last-Modified": 1,
            "routes": [{"id": "1", "uri": "/", "modifiedIndex": 3}, {"id": 2, "uri": "/"}]
        }"#;
        let file = ApisixYaml::parse("apisix.json", text, &env()).unwrap();
        assert_eq!(file.errors, []);
        assert_eq!(file.conf_versions, BTreeMap::from([(Kind::Route, 5), (Kind::Ssl, 7)]));
        let indices: Vec<u64> = file.changes(9).iter().map(Change::modified_index).collect();
        assert_eq!(indices, [3, 9]);
        assert_eq!(file.items()[0].value, json!({"id": "1", "uri": "/"}));
    }

    #[test]
    fn an_unfinished_file_is_not_read() {
        for text in ["", "routes: []\n", "#END\nroutes: []\n", "routes:\n  - id: 1\n    uri: /EN"] {
            let errors = ApisixYaml::parse("apisix.yaml", text, &env()).unwrap_err();
            assert!(errors[0].error.to_string().contains("#END"), "{text}");
        }
        for text in ["#END", "routes: []\n#END\n", "routes: []\n#END  \n\n", "a: b\n  #END"] {
            assert!(ApisixYaml::parse("apisix.yaml", text, &env()).is_ok(), "{text}");
        }
        let errors = ApisixYaml::parse("apisix.yaml", "routes: []\nservices: []\n", &env()).unwrap_err();
        assert_eq!(
            errors[0].to_string(),
            "apisix.yaml:2:1: the end mark is missing: write #END as the last line, when the file is complete"
        );
        assert!(ApisixYaml::parse("apisix.json", "{}", &env()).is_ok());
        assert!(ApisixYaml::parse("apisix.json", "", &env()).unwrap().items().is_empty());
    }

    #[test]
    fn what_cannot_be_read_leaves_the_rest() {
        let file = parse(
            "route: []
routes:
  - {id: 1, uri: /a}
  - {id: 1, uri: /b}
  - text
  - {id: a b}
  - {id: [1]}
  - {id: 2, modifiedIndex: x}
upstreams: {id: 1}
plugin_metadata: [{log_format: {}}]
consumers: [{plugins: {}}, {username: a b}, {username: ann, credentials: [{plugins: {}}]}]
secrets: [{id: redis/1}]
credentials: []
plugins: [key-auth, {name: a, stream: b}]
routes_conf_version: x
foo_conf_version: 1
#END",
        );
        assert_eq!(keys(&file), ["routes/1", "routes/2", "consumers/ann"]);
        let errors: Vec<String> = file.errors.iter().map(ToString::to_string).collect();
        let expected = [
            "apisix.yaml:1:1: /route: unknown field `route` (did you mean `routes`?)",
            "apisix.yaml:4:5: /routes/1: found duplicate id 1 in routes: it is at /routes/0 too",
            "apisix.yaml:5:5: /routes/2: write an object",
            "apisix.yaml:6:6: /routes/3/id: `a b` is not an id",
            "apisix.yaml:7:6: /routes/4/id: write the id as text or as a number",
            "apisix.yaml:8:13: /routes/5/modifiedIndex: modifiedIndex must be a number",
            "apisix.yaml:9:1: /upstreams: write an array",
            "apisix.yaml:10:19: /plugin_metadata/0: `id` is missing",
            "apisix.yaml:11:13: /consumers/0: `username` is missing",
            "apisix.yaml:11:29: /consumers/1/username: `a b` is not an id",
            "apisix.yaml:11:75: /consumers/2/credentials/0: a credential needs `id`",
            "apisix.yaml:12:12: /secrets/0/id: `redis/1` is not an id",
            "apisix.yaml:13:1: /credentials: `credentials` beside `consumers` is not supported",
            "apisix.yaml:14:11: /plugins/0: write `name: PLUGIN`",
            "apisix.yaml:14:31: /plugins/1/stream: write true or false",
            "apisix.yaml:15:1: /routes_conf_version: routes_conf_version must be a number",
            "apisix.yaml:16:1: /foo_conf_version: unknown field `foo_conf_version`",
        ];
        for (error, expected) in errors.iter().zip(expected) {
            assert!(error.starts_with(expected), "{error}\n{expected}");
        }
        assert_eq!(errors.len(), expected.len(), "{}", errors.join("\n"));
    }

    #[test]
    fn variables_are_put_in_and_quotes_decide() {
        let file =
            parse("upstreams: [{id: 1, nodes: {\"a:${{PORT}}\": ${{PORT}}}, desc: \"${{PORT}}\"}]\n#END");
        assert_eq!(file.items()[0].value, json!({"id": 1, "nodes": {"a:1980": 1980}, "desc": "1980"}));
        let errors = ApisixYaml::parse("apisix.yaml", "routes: [{id: ${{NONE}}}]\n#END", &env()).unwrap_err();
        assert!(errors[0].to_string().contains("NONE is not set"));
    }
}
