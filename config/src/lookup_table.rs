//! Lookup tables: where requests go by a key of the request, out of thousands of entries that change by themselves.
//!
//! A table has entries of its own, entries that are objects beside it (`lookup_tables/ID/entries/KEY`), and entries of
//! a list that is fetched by HTTP. Of two entries with one key the object wins over the table's, and that over the
//! list's. APISIX has no such kind.

use std::ops::Deref;
use std::sync::Arc;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{ConfigError, ErrorKind, escape};
use crate::fields::{Desc, Int, Labels, Name, OwnId, Seconds, Timestamp, Url, WideText};
use crate::id::{ENTRY_KEY_RULE, Id, is_entry_key};
use crate::rules::{self, Rule, Rules};
use crate::secret_ref::Literals;
use crate::upstream::{self, Upstream};

/// Entries by a key of the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LookupTable {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// A description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<Desc>,
    /// Attributes by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Box<Labels>>,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// Entries by their keys.
    #[serde(default, skip_serializing_if = "Entries::is_empty")]
    pub entries: Entries,
    /// A list of entries that is fetched by HTTP again and again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Box<Source>>,
    /// Seconds after which an entry that no request asks for has no connections, probes and names to resolve any more.
    #[serde(default)]
    pub idle: Int<1, 86_400, 300>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

/// Entries by their keys: 1 to 256 visible characters of ASCII without `/`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline, extend("propertyNames" = {"pattern": "^[!-.0-~]{1,256}$", "x-expected": ENTRY_KEY_RULE}))]
pub struct Entries(IndexMap<String, Arc<LookupEntry>>);

impl Entries {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Deref for Entries {
    type Target = IndexMap<String, Arc<LookupEntry>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// Where the requests of one key go. Either `upstream` or `upstream_id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(ENTRY_RULES))]
pub struct LookupEntry {
    /// The key, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// A description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<Desc>,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// An upstream of this entry alone, with nodes, scheme, TLS and whatever an upstream can have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Arc<Upstream>>,
    /// The upstream resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_id: Option<Id>,
    /// The path to ask for, with variables; a query may follow. In place of what the route says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<WideText<1, 4096>>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

/// A list that is fetched by HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Where it is: an answer of 200 with `{"entries": {"KEY": {..}}}`, or 304.
    pub url: Url,
    /// Seconds between two requests.
    #[serde(default = "ten_seconds")]
    pub interval: Seconds,
    /// Seconds that a request may take.
    #[serde(default = "five_seconds")]
    pub timeout: Seconds,
    /// Whether the certificate of an `https` server is verified.
    #[serde(default = "yes")]
    pub ssl_verify: bool,
    /// Fields of the request.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub headers: IndexMap<String, String>,
    /// The largest answer that is read, in bytes.
    #[serde(default)]
    pub max_bytes: Int<1024, 1_073_741_824, 67_108_864>,
}

fn ten_seconds() -> Seconds {
    Seconds::whole(10)
}

fn five_seconds() -> Seconds {
    Seconds::whole(5)
}

fn yes() -> bool {
    true
}

pub(crate) const ENTRY_RULES: &[Rule] = &[Rule::ExactlyOne("upstream", "upstream_id")];

/// The rules between fields of an entry as it is written, `at` a place in the object.
pub(crate) fn check_entry_fields(entry: &Map<String, Value>, at: &str, errors: &mut Vec<ConfigError>) {
    rules::check(ENTRY_RULES, entry, at, errors);
    if let Some(Value::Object(upstream)) = entry.get("upstream") {
        upstream::check_fields(upstream, &format!("{at}/upstream"), errors);
    }
}

/// The rules between fields of a table as it is written.
pub(crate) fn check_table_fields(table: &Map<String, Value>, errors: &mut Vec<ConfigError>) {
    let Some(Value::Object(entries)) = table.get("entries") else { return };
    for (key, entry) in entries {
        if let Value::Object(entry) = entry {
            check_entry_fields(entry, &place(key), errors);
        }
    }
}

fn place(key: &str) -> String {
    format!("/entries/{}", escape(key))
}

impl LookupTable {
    /// The rules between values of fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        for (key, entry) in self.entries.iter() {
            if !is_entry_key(key) {
                let expected = ENTRY_KEY_RULE.to_owned();
                errors.push(ConfigError::new(
                    place(key),
                    ErrorKind::BadFormat { found: key.clone(), expected },
                ));
            }
            entry.check(&place(key), errors);
        }
        for (name, value) in self.source.iter().flat_map(|source| &source.headers) {
            let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+.^_`|~-".contains(&byte);
            let valid = !name.is_empty()
                && name.bytes().all(token)
                && value.bytes().all(|byte| (byte >= b' ' && byte != 0x7f) || byte == b'\t');
            if !valid {
                let at = format!("/source/headers/{}", escape(name));
                errors.push(ConfigError::invalid(at, "write a header field: a name and a value in one line"));
            }
        }
    }
}

impl LookupEntry {
    /// The rules between values of fields.
    pub(crate) fn check(&self, at: &str, errors: &mut Vec<ConfigError>) {
        if let Some(upstream) = &self.upstream {
            upstream.check(&format!("{at}/upstream"), errors);
            if !upstream.scheme.is_http() {
                let problem = "write http, https, grpc or grpcs for an HTTP route";
                errors.push(ConfigError::invalid(format!("{at}/upstream/scheme"), problem));
            }
        }
        if self.uri.as_ref().is_some_and(|uri| !uri.starts_with('/')) {
            errors.push(ConfigError::invalid(format!("{at}/uri"), "a path begins with `/`"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use crate::id::{Kind, ResourceKey};
    use crate::plugin_catalog::NoPlugins;
    use crate::resource::Resource;

    #[test]
    fn what_is_wrong_in_an_entry_is_told_at_its_place() {
        let node = json!({"nodes": {"10.0.0.1:80": 1}, "type": "roundrobin"});
        for (entry, place, says) in [
            (json!({"upstream": node}), "", ""),
            (json!({"upstream_id": "manager", "uri": "/a/$uri_param_path?x=1"}), "", ""),
            (json!({}), "", "none of `upstream`, `upstream_id`"),
            (json!({"upstream": node, "upstream_id": "a"}), "", "exclude each other"),
            (json!({"upstream_id": "a", "uri": "x"}), "/uri", "begins with `/`"),
            (json!({"upstream_id": "a", "url": "/x"}), "/url", "unknown field"),
            (
                json!({"upstream": {"nodes": {"a:1": 1}, "max_failures": 1}}),
                "/upstream/max_failures",
                "breaker",
            ),
            (json!({"upstream": {"nodes": {"a:1": 1}, "type": "chash"}}), "/upstream", "needs `key`"),
            (json!({"upstream": {"nodes": {"a:1": 1}, "scheme": "tcp"}}), "/upstream/scheme", "write http"),
        ] {
            for (key, value, at) in [
                (ResourceKey::parse(Kind::LookupEntry, "t/entries/k~1").unwrap(), entry.clone(), ""),
                (
                    ResourceKey::parse(Kind::LookupTable, "t").unwrap(),
                    json!({"entries": {"k~1": entry}}),
                    "/entries/k~01",
                ),
            ] {
                let found = Resource::parse(&key, &value, &NoPlugins);
                if says.is_empty() {
                    assert!(found.is_ok(), "{value} {found:?}");
                    continue;
                }
                let errors = found.unwrap_err();
                let hit = errors.iter().any(|error| {
                    error.pointer == format!("{at}{place}") && error.kind.to_string().contains(says)
                });
                assert!(hit && errors.len() == 1, "{value}: {errors:#?}");
            }
        }
    }

    #[test]
    fn keys_and_fields_of_a_table_are_checked() {
        let key = ResourceKey::parse(Kind::LookupTable, "t").unwrap();
        let entry = json!({"upstream_id": "a"});
        for (value, place) in [
            (json!({"entries": {"a/b": entry}}), "/entries/a~1b"),
            (json!({"entries": {"": entry}}), "/entries/"),
            (json!({"entries": {"a b": entry}}), "/entries/a b"),
            (json!({"idle": 0}), "/idle"),
            (json!({"source": {}}), "/source"),
            (json!({"source": {"url": "http://a/", "headers": {"a b": "x"}}}), "/source/headers/a b"),
            (json!({"source": {"url": "http://a/", "interval": 0}}), "/source/interval"),
            (json!({"rows": {}}), "/rows"),
        ] {
            let errors = Resource::parse(&key, &value, &NoPlugins).unwrap_err();
            let places: Vec<_> = errors.iter().map(|error| error.pointer.as_str()).collect();
            assert_eq!(places, [place], "{value} {errors:?}");
        }
    }
}
