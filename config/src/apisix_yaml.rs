//! `apisix.yaml` and `apisix.json`: all resources in one file, and the body of `PUT /apisix/admin/configs`.
//!
//! Each kind is an array under its name. The file is read as a whole: what cannot be read is told with its place, and
//! what can be read is handed on, unchecked, as changes to the graph. YAML must end with `#END`, so that a file that is
//! being written is not taken for a short one.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::document::{Document, LocatedError};
use crate::env::{self, Env, Typing};
use crate::error::{ConfigError, ErrorKind, escape, nearest};
use crate::graph::Change;
use crate::id::{Kind, ResourceKey};

/// What a file holds.
#[derive(Debug)]
pub struct ApisixYaml {
    /// Its content is in `items`.
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
    /// Where it stands in the file.
    pub pointer: String,
    /// `modifiedIndex`, if the item has one.
    pub modified_index: Option<u64>,
    /// As it is written.
    written: Value,
    /// Its number among the nodes of the file.
    node: usize,
}

impl FileItem {
    /// The resource, without what belongs to the file alone.
    pub fn value(&self) -> Value {
        let mut value = self.written.clone();
        if let Value::Object(members) = &mut value {
            members.shift_remove(MODIFIED_INDEX);
            match self.key.kind {
                Kind::Consumer => {
                    members.shift_remove(CREDENTIALS);
                }
                // Where the id is written as the name of the consumer.
                Kind::Credential => {
                    members.shift_remove("username");
                }
                _ => {}
            }
            // `key-auth:` without a value is `key-auth: {}`.
            if let Some(Value::Object(plugins)) = members.get_mut(PLUGINS) {
                let empty = plugins.values_mut().filter(|value| value.is_null());
                empty.for_each(|value| *value = Value::Object(Map::new()));
            }
        }
        value
    }
}

/// An element of `plugins`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedPlugin {
    pub name: String,
    /// For stream routes.
    pub stream: bool,
}

/// Name of `ssls` before APISIX 3.
const OLD_SSLS: &str = "ssl";
const PLUGINS: &str = "plugins";
const CREDENTIALS: &str = "credentials";
const MODIFIED_INDEX: &str = "modifiedIndex";
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

    /// As [`ApisixYaml::parse`], from a file.
    ///
    /// # Errors
    /// As [`ApisixYaml::parse`], and if the file cannot be read.
    pub fn load(path: &Path, env: &dyn Env) -> Result<ApisixYaml, Vec<LocatedError>> {
        let name = path.display().to_string();
        match std::fs::read(path) {
            Ok(bytes) => ApisixYaml::parse_bytes(&name, &bytes, env),
            Err(error) => {
                let error = ConfigError::invalid("", format!("cannot be read: {error}"));
                Err(vec![LocatedError { file: name.into(), line: 0, column: 0, error }])
            }
        }
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
    pub fn read(mut document: Document) -> Result<ApisixYaml, Vec<LocatedError>> {
        if !matches!(document.value(), Value::Null | Value::Object(_)) {
            let problem = "write an object with `routes`, `services`, `upstreams` and so on";
            return Err(vec![document.error(ConfigError::invalid("", problem))]);
        }
        let content = document.take();
        let mut reader = Reader::new(&document);
        // Node 0 is the object itself; its members follow.
        let mut node = 1;
        if let Value::Object(members) = content {
            for (name, value) in members {
                reader.member(&name, value, node);
                node += document.nodes(node);
            }
        }
        let Reader { items, places, plugins, conf_versions, errors, .. } = reader;
        Ok(ApisixYaml { items, places, plugins, conf_versions, errors, document })
    }

    /// The resources, in the order of the file.
    pub fn items(&self) -> &[FileItem] {
        &self.items
    }

    /// The resources as changes; those without a `modifiedIndex` get `revision`.
    pub fn changes(&self, revision: u64) -> Vec<Change> {
        let change = |item: &FileItem| {
            let modified_index = item.modified_index.unwrap_or(revision);
            Change::Put {
                key: item.key.clone(),
                value: item.value(),
                created_index: modified_index,
                modified_index,
            }
        };
        self.items.iter().map(change).collect()
    }

    /// An error inside a resource, with its place in the file.
    pub fn locate(&self, key: &ResourceKey, error: ConfigError) -> LocatedError {
        let Some(item) = self.places.get(key).and_then(|place| self.items.get(*place)) else {
            return LocatedError { file: Arc::clone(self.document.name()), line: 0, column: 0, error };
        };
        let (line, column) = self.document.locate_in(item.node, &item.written, &error.pointer);
        LocatedError {
            file: Arc::clone(self.document.name()),
            line,
            column,
            error: error.under(&item.pointer),
        }
    }
}

/// The files of resources a directory may have.
pub const FILES: [&str; 2] = ["apisix.yaml", "apisix.json"];

/// The resources of a directory, from whichever of [`FILES`] it has, and what of them cannot be read.
pub fn read_directory(dir: &Path, env: &dyn Env) -> (Vec<Change>, Vec<LocatedError>) {
    let (mut changes, mut errors) = (Vec::new(), Vec::new());
    for path in FILES.map(|name| dir.join(name)).into_iter().filter(|path| path.exists()) {
        match ApisixYaml::load(&path, env) {
            Ok(mut file) => {
                changes.append(&mut file.changes(1));
                errors.append(&mut file.errors);
            }
            Err(mut found) => errors.append(&mut found),
        }
    }
    (changes, errors)
}

/// Whether nothing but blanks follows `#END`. APISIX looks at the last ten bytes.
fn is_finished(text: &str) -> bool {
    text.trim_end().ends_with("#END")
}

struct Reader<'a> {
    document: &'a Document,
    items: Vec<FileItem>,
    places: HashMap<ResourceKey, usize>,
    plugins: Option<Vec<ListedPlugin>>,
    conf_versions: BTreeMap<Kind, u64>,
    errors: Vec<LocatedError>,
}

/// Where a value stands: its number among the nodes of the file, and its pointer.
struct Place {
    node: usize,
    pointer: String,
}

impl Place {
    /// The same node, for an error about one of its members.
    fn member(&self, name: &str) -> String {
        format!("{}/{}", self.pointer, escape(name))
    }
}

impl<'a> Reader<'a> {
    fn new(document: &'a Document) -> Self {
        Reader {
            document,
            items: Vec::new(),
            places: HashMap::new(),
            plugins: None,
            conf_versions: BTreeMap::new(),
            errors: Vec::new(),
        }
    }

    /// An error about a value, or about the member of it that `inside` names.
    fn error(&mut self, place: &Place, value: &Value, inside: &str, kind: ErrorKind) {
        let (line, column) = self.document.locate_in(place.node, value, inside);
        let error = ConfigError::new(format!("{}{inside}", place.pointer), kind);
        self.errors.push(LocatedError { file: Arc::clone(self.document.name()), line, column, error });
    }

    fn invalid(&mut self, place: &Place, value: &Value, inside: &str, problem: impl Into<String>) {
        self.error(place, value, inside, ErrorKind::Invalid { problem: problem.into() });
    }

    fn member(&mut self, name: &str, value: Value, node: usize) {
        let place = Place { node, pointer: format!("/{}", escape(name)) };
        if name == PLUGINS {
            self.plugin_list(&place, value);
        } else if let Some(kind) = kind_of(name) {
            for (index, (place, item)) in self.elements(&place, value).into_iter().enumerate() {
                self.item(kind, place, index, item);
            }
        } else if let Some(kind) = name.strip_suffix(CONF_VERSION) {
            match (kind_of(kind), value.as_u64()) {
                (Some(kind), Some(version)) => {
                    self.conf_versions.insert(kind, version);
                }
                (None, Some(_)) if kind == PLUGINS => {}
                (Some(_), None) => self.invalid(&place, &value, "", format!("{name} must be a number")),
                (None, _) => self.unknown(name, &place),
            }
        } else if !METADATA.contains(&name) {
            self.unknown(name, &place);
        }
    }

    fn unknown(&mut self, name: &str, place: &Place) {
        let known = Kind::LISTED.iter().map(|kind| kind.segment()).chain([PLUGINS]);
        let kind = match name {
            CREDENTIALS => ErrorKind::Unsupported {
                what: "`credentials` beside `consumers`".into(),
                instead: "write them into `consumers`, with `id: USERNAME/credentials/ID`".into(),
            },
            _ => ErrorKind::UnknownField {
                field: name.into(),
                nearest: nearest(name, known).map(str::to_owned),
            },
        };
        self.error(place, &Value::Null, "", kind);
    }

    fn elements(&mut self, place: &Place, value: Value) -> Vec<(Place, Value)> {
        match value {
            Value::Array(items) => {
                let mut node = place.node + 1;
                let mut elements = Vec::with_capacity(items.len());
                for (index, item) in items.into_iter().enumerate() {
                    elements.push((Place { node, pointer: format!("{}/{index}", place.pointer) }, item));
                    node += self.document.nodes(node);
                }
                elements
            }
            Value::Null => Vec::new(),
            // Lua does not tell an empty object from an empty array.
            Value::Object(members) if members.is_empty() => Vec::new(),
            _ => {
                self.invalid(place, &value, "", "write an array: each element begins with `- `");
                Vec::new()
            }
        }
    }

    fn plugin_list(&mut self, place: &Place, value: Value) {
        let mut plugins = Vec::new();
        for (place, item) in self.elements(place, value) {
            let name = item.get("name").and_then(Value::as_str);
            let stream = item.get("stream").map_or(Some(false), Value::as_bool);
            match (name, stream) {
                (Some(name), Some(stream)) => plugins.push(ListedPlugin { name: name.to_owned(), stream }),
                (None, _) => self.invalid(&place, &item, "", "write `name: PLUGIN`"),
                (_, None) => self.invalid(&place, &item, "/stream", "write true or false"),
            }
        }
        self.plugins = Some(plugins);
    }

    fn item(&mut self, kind: Kind, place: Place, index: usize, item: Value) {
        if !item.is_object() {
            self.invalid(&place, &item, "", "write an object");
            return;
        }
        let modified_index = item.get(MODIFIED_INDEX);
        if modified_index.is_some_and(|value| !value.is_u64()) {
            self.invalid(&place, &item, "/modifiedIndex", "modifiedIndex must be a number");
        }
        let modified_index = modified_index.and_then(Value::as_u64);
        // Under a name that is wrong nobody finds it, but it may be what keeps requests from something else: it gets a key
        // that nobody can write, to be set aside there.
        let aside = has_place(kind).then(|| ResourceKey::by_place(kind, index));
        let Some(key) = self.key(kind, &place, index, &item).or_else(|| aside.clone()) else { return };
        if key.kind == Kind::Consumer {
            self.credentials(&key, &place, &item);
        }
        self.push(key, aside, place, item, modified_index);
    }

    /// Credentials written inside their consumer.
    fn credentials(&mut self, consumer: &ResourceKey, place: &Place, item: &Value) {
        let Some(members) = item.as_object() else { return };
        let mut node = place.node + 1;
        let found = members.iter().find(|(name, _)| {
            let found = *name == CREDENTIALS;
            if !found {
                node += self.document.nodes(node);
            }
            found
        });
        let Some((name, value)) = found else { return };
        let place = Place { node, pointer: place.member(name) };
        for (place, item) in self.elements(&place, value.clone()) {
            let Some(id) = text_of(item.get("id")) else {
                self.invalid(&place, &item, "", "a credential needs `id`");
                continue;
            };
            match ResourceKey::parse(Kind::Credential, &format!("{}/credentials/{id}", consumer.id)) {
                Ok(key) => self.push(key, None, place, item, None),
                Err(error) => self.error(&place, &item, "/id", error.kind),
            }
        }
    }

    /// Where its key is taken it goes `aside`, or is left out.
    fn push(
        &mut self,
        mut key: ResourceKey,
        aside: Option<ResourceKey>,
        place: Place,
        written: Value,
        modified_index: Option<u64>,
    ) {
        if let Some(first) = self.places.get(&key).and_then(|first| self.items.get(*first)) {
            let (id, segment) = (&key.id, key.kind.segment());
            let problem = format!("found duplicate id {id} in {segment}: it is at {} too", first.pointer);
            self.invalid(&place, &written, "", problem);
            match aside.filter(|aside| !self.places.contains_key(aside)) {
                Some(aside) => key = aside,
                None => return,
            }
        }
        self.places.insert(key.clone(), self.items.len());
        let Place { node, pointer } = place;
        self.items.push(FileItem { key, pointer, modified_index, written, node });
    }

    /// The key of an item: its id, its name, or its place.
    fn key(&mut self, kind: Kind, place: &Place, index: usize, item: &Value) -> Option<ResourceKey> {
        let id = text_of(item.get("id"));
        if id.is_none() && item.get("id").is_some_and(|id| !id.is_null()) {
            self.invalid(place, item, "/id", "write the id as text or as a number");
            return None;
        }
        let username = text_of(item.get("username"));
        let is_credential = |id: &Option<String>| id.as_ref().is_some_and(|id| id.contains("/credentials/"));
        let (kind, at, id) = match kind {
            Kind::Consumer if is_credential(&id) => (Kind::Credential, "/id", id),
            Kind::Consumer if is_credential(&username) => (Kind::Credential, "/username", username),
            Kind::Consumer if username.is_some() => (kind, "/username", username),
            kind => (kind, "/id", id),
        };
        let Some(id) = id else {
            let missing = match kind {
                Kind::Consumer => "username",
                // As APISIX numbers them.
                _ if has_place(kind) => return Some(ResourceKey::by_place(kind, index)),
                _ => "id",
            };
            self.error(place, item, "", ErrorKind::MissingField { field: missing.into() });
            return None;
        };
        match ResourceKey::parse(kind, &id) {
            Ok(key) => Some(key),
            Err(error) => {
                self.error(place, item, at, error.kind);
                None
            }
        }
    }
}

/// Whether an object of this kind is one without an id too.
fn has_place(kind: Kind) -> bool {
    !matches!(kind, Kind::Consumer | Kind::Credential | Kind::PluginMetadata | Kind::Secret)
}

fn kind_of(name: &str) -> Option<Kind> {
    if name == OLD_SSLS {
        return Some(Kind::Ssl);
    }
    Kind::LISTED.into_iter().find(|kind| kind.segment() == name)
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
        assert_eq!(file.items()[0].value()["plugins"]["key-auth"], json!({}));
        assert_eq!(file.items()[2].value(), json!({"plugins": {"key-auth": {"key": "b"}}}));
        assert_eq!(file.items()[4].value(), json!({"username": "jack"}));
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
        assert_eq!(file.items()[0].value(), json!({"id": "1", "uri": "/"}));
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
        // Routes under wrong names are there to be set aside.
        let named = [
            "routes/1",
            "routes/routes#2",
            "routes/routes#4",
            "routes/routes#5",
            "routes/2",
            "consumers/ann",
        ];
        assert_eq!(keys(&file), named);
        let mut graph = crate::graph::Graph::default();
        graph.replace_all(file.changes(1), &crate::plugin_catalog::NoPlugins);
        for key in named.iter().filter(|name| name.contains('#')) {
            let told = |rejected: &crate::graph::Rejected| rejected.key.to_string();
            assert!(graph.rejected().map(told).any(|told| told == *key), "{key}");
        }
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
        assert_eq!(file.items()[0].value(), json!({"id": 1, "nodes": {"a:1980": 1980}, "desc": "1980"}));
        let errors = ApisixYaml::parse("apisix.yaml", "routes: [{id: ${{NONE}}}]\n#END", &env()).unwrap_err();
        assert!(errors[0].to_string().contains("NONE is not set"));
    }
}
