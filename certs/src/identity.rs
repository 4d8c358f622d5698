//! SPIFFE identities: trust domains, the ids of workloads, and patterns of ids.
//!
//! The rules are those of the SPIFFE-ID standard, section 2: lower-case trust domain, path segments of letters, digits, dot,
//! dash and underscore, nothing empty, nothing relative, nothing after the path.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The longest id in bytes that everybody has to accept (SPIFFE-ID 2.3).
const MAX_ID: usize = 2048;
/// The longest trust domain in bytes.
const MAX_DOMAIN: usize = 255;
const SCHEME: &str = "spiffe://";

/// Text that is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("an identity begins with `spiffe://`, such as spiffe://mesh.local/ns/default/sa/orders")]
    Scheme,
    #[error("a trust domain has 1 to 255 lower-case letters, digits, `.`, `-` and `_`, such as mesh.local")]
    TrustDomain,
    #[error("an identity has a path after its trust domain, such as /ns/default/sa/orders")]
    NoPath,
    #[error("a path has segments of letters, digits, `.`, `-` and `_`, none of them empty, `.` or `..`")]
    Path,
    #[error("an identity has at most 2048 bytes")]
    TooLong,
    #[error("`*` stands alone or after the last `/`, such as spiffe://mesh.local/ns/default/*")]
    Wildcard,
}

/// The name of what shares a set of roots.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Cow<'_, str>", into = "String")]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_DOMAIN || !text.bytes().all(allowed) {
            return Err(IdentityError::TrustDomain);
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The id of a workload: `spiffe://TRUST-DOMAIN/PATH`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Cow<'_, str>", into = "String")]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path begins.
    path: usize,
}

impl SpiffeId {
    /// The id of `path` in `domain`.
    ///
    /// # Errors
    /// The path is none; it begins with `/`.
    pub fn new(domain: &TrustDomain, path: &str) -> Result<Self, IdentityError> {
        format!("{SCHEME}{domain}{path}").parse()
    }

    /// All of it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of the trust domain.
    pub fn trust_domain(&self) -> &str {
        self.text.get(SCHEME.len()..self.path).unwrap_or_default()
    }

    /// The path, from its first `/` on.
    pub fn path(&self) -> &str {
        self.text.get(self.path..).unwrap_or_default()
    }

    /// The segment after `/ns/`, with which paths of Kubernetes, Istio and Consul begin.
    pub fn namespace(&self) -> Option<&str> {
        self.after("ns")
    }

    /// The segment after `sa`, the service account of Kubernetes.
    pub fn service_account(&self) -> Option<&str> {
        self.after("sa")
    }

    /// The value of `name` in a path of names and values.
    fn after(&self, name: &str) -> Option<&str> {
        let mut segments = self.path().split('/').skip(1);
        while let Some(key) = segments.next() {
            let value = segments.next()?;
            if key == name {
                return Some(value);
            }
        }
        None
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_ID {
            return Err(IdentityError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Scheme)?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| match rest.parse::<TrustDomain>() {
            Ok(_) => IdentityError::NoPath,
            Err(error) => error,
        })?;
        let domain: TrustDomain = domain.parse()?;
        if !path.split('/').all(is_segment) {
            return Err(IdentityError::Path);
        }
        Ok(Self { text: text.into(), path: SCHEME.len() + domain.0.len() })
    }
}

fn is_segment(segment: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(allowed)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Ids that are meant: one, all under a path, all of a trust domain, or all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Cow<'_, str>", into = "String")]
pub enum IdentityPattern {
    /// `*`: whoever has an identity.
    Any,
    /// `spiffe://mesh.local/ns/default/*`: what begins so, the text up to and with the last `/`.
    Under(Arc<str>),
    /// One id.
    Exact(SpiffeId),
}

impl IdentityPattern {
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Any => true,
            Self::Under(prefix) => id.as_str().starts_with(&**prefix),
            Self::Exact(exact) => exact == id,
        }
    }
}

impl FromStr for IdentityPattern {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let Some(prefix) = text.strip_suffix('*') else {
            return if text.contains('*') {
                Err(IdentityError::Wildcard)
            } else {
                text.parse().map(Self::Exact)
            };
        };
        if prefix.contains('*') || !prefix.ends_with('/') {
            return Err(IdentityError::Wildcard);
        }
        // What stands before the wildcard has to be the beginning of an id.
        format!("{prefix}any").parse::<SpiffeId>()?;
        Ok(Self::Under(prefix.into()))
    }
}

impl fmt::Display for IdentityPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Under(prefix) => write!(f, "{prefix}*"),
            Self::Exact(id) => id.fmt(f),
        }
    }
}

impl From<SpiffeId> for IdentityPattern {
    fn from(id: SpiffeId) -> Self {
        Self::Exact(id)
    }
}

/// Text in files: read by `FromStr`, written by `Display`, told to schemas as a pattern.
macro_rules! text {
    ($name:ident, $pattern:literal, $words:literal) => {
        impl TryFrom<Cow<'_, str>> for $name {
            type Error = IdentityError;

            fn try_from(text: Cow<'_, str>) -> Result<Self, IdentityError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern, "description": $words})
            }
        }
    };
}

text!(TrustDomain, "^[a-z0-9._-]{1,255}$", "The name of a trust domain.");
text!(SpiffeId, "^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+$", "A SPIFFE ID.");
text!(
    IdentityPattern,
    "^(\\*|spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*(/\\*|/[A-Za-z0-9._-]+))$",
    "A SPIFFE ID, ids under a path (`spiffe://mesh.local/ns/default/*`), or `*`."
);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn ids_have_the_form_of_the_standard_and_no_other() {
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        let domain = format!("spiffe://{}/a", "a".repeat(256));
        let cases = [
            ("spiffe://mesh.local/ns/default/sa/orders", Ok(("mesh.local", "/ns/default/sa/orders"))),
            (
                "spiffe://11111111-2222.consul/ns/default/dc/dc1/svc/web",
                Ok(("11111111-2222.consul", "/ns/default/dc/dc1/svc/web")),
            ),
            ("spiffe://td/A_b.c-9", Ok(("td", "/A_b.c-9"))),
            ("spiffe://td", Err(IdentityError::NoPath)),
            ("spiffe://td/", Err(IdentityError::Path)),
            ("spiffe://td/a/", Err(IdentityError::Path)),
            ("spiffe://td//a", Err(IdentityError::Path)),
            ("spiffe://td/a/../b", Err(IdentityError::Path)),
            ("spiffe://td/./b", Err(IdentityError::Path)),
            ("spiffe://td/a%2fb", Err(IdentityError::Path)),
            ("spiffe://td/a?b", Err(IdentityError::Path)),
            ("spiffe://td/a#b", Err(IdentityError::Path)),
            ("spiffe://td/\u{e4}", Err(IdentityError::Path)),
            ("spiffe://td/a\0", Err(IdentityError::Path)),
            ("spiffe://TD/a", Err(IdentityError::TrustDomain)),
            ("spiffe://td:443/a", Err(IdentityError::TrustDomain)),
            ("spiffe://user@td/a", Err(IdentityError::TrustDomain)),
            ("spiffe:///a", Err(IdentityError::TrustDomain)),
            ("spiffe://T", Err(IdentityError::TrustDomain)),
            ("SPIFFE://td/a", Err(IdentityError::Scheme)),
            ("spiffe:/td/a", Err(IdentityError::Scheme)),
            ("https://td/a", Err(IdentityError::Scheme)),
            ("", Err(IdentityError::Scheme)),
            (&long, Err(IdentityError::TooLong)),
            (&domain, Err(IdentityError::TrustDomain)),
        ];
        for (text, expected) in cases {
            let read = text.parse::<SpiffeId>();
            let parts = read.as_ref().map(|id| (id.trust_domain(), id.path())).map_err(Clone::clone);
            assert_eq!(parts, expected, "{text}");
            if let Ok(id) = read {
                assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn namespace_and_account_are_values_and_not_names() {
        let id: SpiffeId = "spiffe://td/ns/sa/sa/orders".parse().unwrap();
        assert_eq!((id.namespace(), id.service_account()), (Some("sa"), Some("orders")));
        let id: SpiffeId = "spiffe://td/orders".parse().unwrap();
        assert_eq!((id.namespace(), id.service_account()), (None, None));
    }

    #[test]
    fn patterns_end_at_the_border_of_a_segment() {
        let id: SpiffeId = "spiffe://td/ns/default/sa/orders".parse().unwrap();
        let cases = [
            ("*", true),
            ("spiffe://td/*", true),
            ("spiffe://td/ns/default/*", true),
            ("spiffe://td/ns/def/*", false),
            ("spiffe://td/ns/default/sa/orders", true),
            ("spiffe://td/ns/default/sa/orders2", false),
            ("spiffe://td/ns/default/sa/orders/*", false),
            ("spiffe://other/*", false),
        ];
        for (text, expected) in cases {
            let pattern: IdentityPattern = text.parse().unwrap();
            assert_eq!(pattern.matches(&id), expected, "{text}");
            assert_eq!(pattern.to_string(), text);
        }
        for text in ["spiffe://td/ns/def*", "spiffe://*/a", "spiffe://td/*/a", "**", "spiffe://td/a/**"] {
            assert_eq!(text.parse::<IdentityPattern>(), Err(IdentityError::Wildcard), "{text}");
        }
        assert_eq!("spiffe://TD/*".parse::<IdentityPattern>(), Err(IdentityError::TrustDomain));
    }
}
