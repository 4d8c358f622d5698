//! Names of resources: the kinds, the ids and the rules ids obey.
//!
//! A [`ResourceKey`] is the address of one object everywhere: in stores, in the graph, in error reports and
//! in the paths of the Admin API. Ids are shared (`Arc<str>`), so a key costs no allocation to pass around.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{ConfigError, ErrorKind};
use crate::fields::StrVisitor;

/// Longest id of a resource, in bytes.
pub const MAX_ID: usize = 64;
/// Longest consumer name, in bytes.
pub const MAX_USERNAME: usize = 256;

/// The kinds of resource, in the order in which a store is listed: whatever is referred to comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Match conditions, plugins and where to send the request.
    Route,
    /// Plugins and upstream shared by routes.
    Service,
    /// Nodes, balancing and health checks.
    Upstream,
    /// Somebody who calls, known by name.
    Consumer,
    /// One set of credentials of a consumer.
    Credential,
    /// Plugins shared by consumers.
    ConsumerGroup,
    /// Plugins shared by routes.
    PluginConfig,
    /// Plugins of every request.
    GlobalRule,
    /// Settings of one plugin that hold for the whole gateway.
    PluginMetadata,
    /// Certificates by server name, and client certificates for upstreams.
    Ssl,
    /// A protobuf definition.
    Proto,
    /// Where `$secret://` references are looked up.
    Secret,
    /// Match conditions of a TCP or UDP connection.
    StreamRoute,
    /// Where requests go by a key. An extension.
    LookupTable,
    /// One entry of a lookup table.
    LookupEntry,
}

impl Kind {
    /// Every kind once.
    pub const ALL: [Kind; 15] = [
        Kind::Route,
        Kind::Service,
        Kind::Upstream,
        Kind::Consumer,
        Kind::Credential,
        Kind::ConsumerGroup,
        Kind::PluginConfig,
        Kind::GlobalRule,
        Kind::PluginMetadata,
        Kind::Ssl,
        Kind::Proto,
        Kind::Secret,
        Kind::StreamRoute,
        Kind::LookupTable,
        Kind::LookupEntry,
    ];

    /// The kinds a configuration file has a list of, in the order of the docs; credentials are among the consumers, and
    /// entries in their lookup tables.
    pub const LISTED: [Kind; 13] = [
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
        Kind::LookupTable,
    ];

    /// The name in paths of the Admin API, in store keys and in `apisix.yaml`: `routes`, `ssls`.
    #[must_use]
    pub const fn segment(self) -> &'static str {
        match self {
            Kind::Route => "routes",
            Kind::Service => "services",
            Kind::Upstream => "upstreams",
            Kind::Consumer => "consumers",
            Kind::Credential => "credentials",
            Kind::ConsumerGroup => "consumer_groups",
            Kind::PluginConfig => "plugin_configs",
            Kind::GlobalRule => "global_rules",
            Kind::PluginMetadata => "plugin_metadata",
            Kind::Ssl => "ssls",
            Kind::Proto => "protos",
            Kind::Secret => "secrets",
            Kind::StreamRoute => "stream_routes",
            Kind::LookupTable => "lookup_tables",
            Kind::LookupEntry => "lookup_entries",
        }
    }

    /// The name of one object in messages and schemas: `route`, `ssl`.
    #[must_use]
    pub const fn singular(self) -> &'static str {
        match self {
            Kind::Route => "route",
            Kind::Service => "service",
            Kind::Upstream => "upstream",
            Kind::Consumer => "consumer",
            Kind::Credential => "credential",
            Kind::ConsumerGroup => "consumer_group",
            Kind::PluginConfig => "plugin_config",
            Kind::GlobalRule => "global_rule",
            Kind::PluginMetadata => "plugin_metadata",
            Kind::Ssl => "ssl",
            Kind::Proto => "proto",
            Kind::Secret => "secret",
            Kind::StreamRoute => "stream_route",
            Kind::LookupTable => "lookup_table",
            Kind::LookupEntry => "lookup_entry",
        }
    }

    /// The kind of a path segment.
    #[must_use]
    pub fn from_segment(segment: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.segment() == segment)
    }

    /// The kind of a singular name.
    #[must_use]
    pub fn from_singular(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.singular() == name)
    }

    /// The kind among whose objects those of this one stand in stores and paths: a credential among the consumers.
    #[must_use]
    pub const fn folder(self) -> Kind {
        match self {
            Kind::Credential => Kind::Consumer,
            Kind::LookupEntry => Kind::LookupTable,
            kind => kind,
        }
    }

    /// What stands inside the objects of this kind, and the word between their id and its own.
    #[must_use]
    pub const fn children(self) -> Option<(Kind, &'static str)> {
        match self {
            Kind::Consumer => Some((Kind::Credential, "credentials")),
            Kind::LookupTable => Some((Kind::LookupEntry, "entries")),
            _ => None,
        }
    }

    /// Position in [`Kind::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.singular())
    }
}

/// The address of one object: `routes/1`, `consumers/jack`, `secrets/vault/1`, `consumers/jack/credentials/a`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceKey {
    /// What it is.
    pub kind: Kind,
    /// Its id within the kind. A credential's id is `USERNAME/credentials/ID`, a secret manager's is
    /// `MANAGER/ID`, a consumer's is its name and that of a plugin's metadata is the name of the plugin.
    pub id: Arc<str>,
}

impl ResourceKey {
    /// A key from parts that are known to be right. [`ResourceKey::parse`] checks them.
    pub fn new(kind: Kind, id: impl Into<Arc<str>>) -> ResourceKey {
        ResourceKey { kind, id: id.into() }
    }

    /// A key from an id that somebody wrote.
    ///
    /// # Errors
    /// If the id breaks the rules of its kind. The pointer is `/id`.
    pub fn parse(kind: Kind, id: &str) -> Result<ResourceKey, ConfigError> {
        let valid = match kind {
            Kind::Consumer => is_username(id),
            Kind::Credential => {
                id.split_once("/credentials/").is_some_and(|(user, id)| is_username(user) && is_id(id))
            }
            Kind::Secret => {
                id.split_once('/').is_some_and(|(manager, id)| MANAGERS.contains(&manager) && is_id(id))
            }
            Kind::LookupEntry => {
                id.split_once("/entries/").is_some_and(|(table, key)| is_id(table) && is_entry_key(key))
            }
            _ => is_id(id),
        };
        if valid {
            return Ok(ResourceKey::new(kind, id));
        }
        Err(ConfigError::new("/id", ErrorKind::BadId { found: id.to_owned(), rule: id_rule(kind) }))
    }

    /// The key of a path below the store's prefix, as [`ResourceKey`] prints it.
    #[must_use]
    pub fn from_path(path: &str) -> Option<ResourceKey> {
        let (segment, id) = path.split_once('/')?;
        let kind = match Kind::from_segment(segment)? {
            Kind::Credential | Kind::LookupEntry => return None,
            Kind::Consumer if id.contains("/credentials/") => Kind::Credential,
            Kind::LookupTable if id.contains("/entries/") => Kind::LookupEntry,
            kind => kind,
        };
        if id.strip_prefix(segment).and_then(|rest| rest.strip_prefix('#')).is_some_and(is_number) {
            return Some(ResourceKey::new(kind, id));
        }
        ResourceKey::parse(kind, id).ok()
    }

    /// The key of an object in a file that has no id: its place, from 0. Nobody can write such an id.
    #[must_use]
    pub fn by_place(kind: Kind, index: usize) -> ResourceKey {
        ResourceKey::new(kind, format!("{}#{}", kind.segment(), index + 1))
    }

    /// Whether it is that of an object without an id of its own.
    #[must_use]
    pub fn is_by_place(&self) -> bool {
        self.id.strip_prefix(self.kind.segment()).is_some_and(|rest| rest.starts_with('#'))
    }

    /// The key of a credential.
    #[must_use]
    pub fn credential(username: &str, id: &str) -> ResourceKey {
        ResourceKey::new(Kind::Credential, format!("{username}/credentials/{id}"))
    }

    /// The key of an entry of a lookup table.
    #[must_use]
    pub fn lookup_entry(table: &str, key: &str) -> ResourceKey {
        ResourceKey::new(Kind::LookupEntry, format!("{table}/entries/{key}"))
    }

    /// The object in which this one stands, if it does in one.
    #[must_use]
    pub fn owner(&self) -> Option<ResourceKey> {
        self.consumer().or_else(|| self.lookup_table())
    }

    /// The lookup table an entry belongs to; nothing for other kinds.
    #[must_use]
    pub fn lookup_table(&self) -> Option<ResourceKey> {
        if self.kind != Kind::LookupEntry {
            return None;
        }
        let (table, _) = self.id.split_once("/entries/")?;
        Some(ResourceKey::new(Kind::LookupTable, table))
    }

    /// The consumer a credential belongs to; nothing for other kinds.
    #[must_use]
    pub fn consumer(&self) -> Option<ResourceKey> {
        if self.kind != Kind::Credential {
            return None;
        }
        let (username, _) = self.id.split_once("/credentials/")?;
        Some(ResourceKey::new(Kind::Consumer, username))
    }

    /// The id as the object itself carries it: the last part of the id.
    #[must_use]
    pub fn own_id(&self) -> &str {
        match self.kind {
            Kind::Credential => self.id.split_once("/credentials/").map_or(&*self.id, |(_, id)| id),
            Kind::Secret => self.id.split_once('/').map_or(&*self.id, |(_, id)| id),
            Kind::LookupEntry => self.id.split_once("/entries/").map_or(&*self.id, |(_, key)| key),
            _ => &self.id,
        }
    }
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.folder().segment(), self.id)
    }
}

impl fmt::Debug for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a key of a lookup table looks like, in words.
pub(crate) const ENTRY_KEY_RULE: &str = "1 to 256 visible characters of ASCII without /";

/// Whether text can be a key of a lookup table.
pub(crate) fn is_entry_key(key: &str) -> bool {
    (1..=256).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

const MANAGERS: [&str; 3] = ["vault", "aws", "gcp"];

/// A reference to another object: 1 to 64 of `a-z A-Z 0-9 - _ .`, or an integer from 1, which is read as text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(Arc<str>);

impl Id {
    /// # Errors
    /// If `id` is not 1 to 64 of the allowed characters. The pointer is empty.
    pub fn parse(id: &str) -> Result<Id, ConfigError> {
        if is_id(id) {
            return Ok(Id(id.into()));
        }
        Err(ConfigError::new("", ErrorKind::BadId { found: id.to_owned(), rule: ID_RULE }))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of the object of `kind` with this id.
    #[must_use]
    pub fn key(&self, kind: Kind) -> ResourceKey {
        ResourceKey::new(kind, Arc::clone(&self.0))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Borrow<str> for Id {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Id, D::Error> {
        struct IdVisitor;

        impl Visitor<'_> for IdVisitor {
            type Value = Id;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(ID_RULE)
            }

            fn visit_str<E: de::Error>(self, id: &str) -> Result<Id, E> {
                Id::parse(id).map_err(|error| E::custom(error.kind))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Id, E> {
                if id == 0 {
                    return Err(E::invalid_value(de::Unexpected::Unsigned(id), &self));
                }
                Ok(Id(id.to_string().into()))
            }
        }

        deserializer.deserialize_any(IdVisitor)
    }
}

impl JsonSchema for Id {
    fn schema_name() -> Cow<'static, str> {
        "Id".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_ID, "pattern": "^[a-zA-Z0-9_.-]+$", "x-expected": ID_RULE},
                {"type": "integer", "minimum": 1},
            ],
        })
    }
}

/// The name of a consumer: 1 to 256 of `a-z A-Z 0-9 - _`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Username(Box<str>);

impl Username {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Username {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Username {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for Username {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Username, D::Error> {
        let parse = |name: &str| is_username(name).then(|| Username(name.into()));
        deserializer.deserialize_str(StrVisitor { expected: USERNAME_RULE, parse })
    }
}

impl JsonSchema for Username {
    fn schema_name() -> Cow<'static, str> {
        "Username".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 1, "maxLength": MAX_USERNAME,
            "pattern": "^[a-zA-Z0-9_-]+$", "x-expected": USERNAME_RULE,
        })
    }
}

const USERNAME_RULE: &str = "a name of 1 to 256 of a-z A-Z 0-9 - _";
const ID_RULE: &str = "1 to 64 of a-z A-Z 0-9 - _ . or an integer from 1";

fn id_rule(kind: Kind) -> &'static str {
    match kind {
        Kind::Consumer => USERNAME_RULE,
        Kind::Credential => "USERNAME/credentials/ID, the ID being 1 to 64 of a-z A-Z 0-9 - _ .",
        Kind::LookupEntry => {
            "TABLE/entries/KEY, the KEY being 1 to 256 visible characters of ASCII without /"
        }
        Kind::Secret => "vault/ID, aws/ID or gcp/ID, the ID being 1 to 64 of a-z A-Z 0-9 - _ .",
        _ => ID_RULE,
    }
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_username(name: &str) -> bool {
    (1..=MAX_USERNAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn ids_obey_the_rule_of_their_kind() {
        let long = "a".repeat(64);
        let too_long = "a".repeat(65);
        for (kind, id, valid) in [
            (Kind::Route, "1", true),
            (Kind::Route, "a-b_c.d", true),
            (Kind::Route, long.as_str(), true),
            (Kind::Route, too_long.as_str(), false),
            (Kind::Route, "", false),
            (Kind::Route, "a b", false),
            (Kind::Route, "a/b", false),
            (Kind::Route, "é", false),
            (Kind::Consumer, "jack_1-x", true),
            (Kind::Consumer, "jack.x", false),
            (Kind::Consumer, too_long.as_str(), true),
            (Kind::Credential, "jack/credentials/one", true),
            (Kind::Credential, "jack/one", false),
            (Kind::Secret, "vault/1", true),
            (Kind::Secret, "redis/1", false),
            (Kind::PluginMetadata, "http-logger", true),
        ] {
            assert_eq!(ResourceKey::parse(kind, id).is_ok(), valid, "{kind} {id:?}");
        }
    }

    #[test]
    fn a_key_reads_back_from_what_it_prints() {
        for (kind, id, path) in [
            (Kind::Route, "1", "routes/1"),
            (Kind::Ssl, "a", "ssls/a"),
            (Kind::Consumer, "jack", "consumers/jack"),
            (Kind::Credential, "jack/credentials/a", "consumers/jack/credentials/a"),
            (Kind::Secret, "vault/1", "secrets/vault/1"),
        ] {
            let key = ResourceKey::parse(kind, id).unwrap();
            assert_eq!(key.to_string(), path);
            assert_eq!(ResourceKey::from_path(path), Some(key));
        }
        let unnamed = ResourceKey::by_place(Kind::Route, 0);
        assert_eq!(unnamed.to_string(), "routes/routes#1");
        assert_eq!(ResourceKey::from_path("routes/routes#1"), Some(unnamed));
        for path in ["routes/routes#", "routes/routes#x", "routes/services#1", "routes/#1"] {
            assert_eq!(ResourceKey::from_path(path), None);
        }
        assert_eq!(ResourceKey::from_path("nothing/1"), None);
        assert_eq!(ResourceKey::from_path("routes"), None);
    }

    #[test]
    fn every_kind_is_found_by_both_its_names() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_segment(kind.segment()), Some(kind));
            assert_eq!(Kind::from_singular(kind.singular()), Some(kind));
            assert_eq!(Kind::ALL.get(kind.index()), Some(&kind));
        }
    }

    #[test]
    fn a_number_is_an_id_and_becomes_text() {
        assert_eq!(serde_json::from_value::<Id>(json!(7)).unwrap().as_str(), "7");
        for bad in [json!(0), json!(-1), json!(1.5), json!(""), json!("a b"), json!(null), json!([])] {
            assert!(serde_json::from_value::<Id>(bad.clone()).is_err(), "{bad}");
        }
    }
}
