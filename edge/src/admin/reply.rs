//! Answers of the control-plane servers, and errors in the words scripts of APISIX users look for.
//!
//! A refused configuration gets the sentence APISIX would write, so that whatever matches on it goes on
//! working, then the pointer and what to write instead. All errors are listed in `errors`.

use bytes::Bytes;
use config::{ConfigError, ErrorKind, Kind};
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use super::query::BadQuery;
use crate::store::StoreError;

/// The body of all answers.
pub type ReplyBody = Full<Bytes>;

/// An answer in the making.
#[derive(Debug)]
pub struct Reply {
    status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
}

impl Reply {
    /// No body.
    #[must_use]
    pub fn empty(status: StatusCode) -> Reply {
        Reply { status, headers: Vec::new(), body: Bytes::new() }
    }

    /// JSON, ending with a line end.
    #[must_use]
    pub fn json(status: StatusCode, value: &Value) -> Reply {
        let mut body = value.to_string();
        body.push('\n');
        Reply::with(status, "application/json", body)
    }

    /// JSON that is written already.
    #[must_use]
    pub fn raw_json(status: StatusCode, body: Vec<u8>) -> Reply {
        Reply::with(status, "application/json", body)
    }

    /// `{"error_msg": message}`.
    #[must_use]
    pub fn error(status: StatusCode, message: impl Into<String>) -> Reply {
        Reply::json(status, &json!({"error_msg": message.into()}))
    }

    /// A body of any type.
    #[must_use]
    pub fn with(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
        let mut reply = Reply::empty(status);
        reply.headers.push((CONTENT_TYPE, HeaderValue::from_static(content_type)));
        reply.body = body.into();
        reply
    }

    /// An object that is not there.
    #[must_use]
    pub fn not_found() -> Reply {
        Reply::json(StatusCode::NOT_FOUND, &json!({"message": "Key not found"}))
    }

    /// A method the resource does not have.
    #[must_use]
    pub fn method_not_allowed(message: impl Into<String>, allowed: &'static str) -> Reply {
        let mut reply = Reply::error(StatusCode::METHOD_NOT_ALLOWED, message);
        reply.headers.push((ALLOW, HeaderValue::from_static(allowed)));
        reply
    }

    /// 400 with the message.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Reply {
        Reply::error(StatusCode::BAD_REQUEST, message)
    }

    /// The answer to an object that is wrong.
    #[must_use]
    pub fn invalid(kind: Kind, errors: &[ConfigError]) -> Reply {
        Reply::json(StatusCode::BAD_REQUEST, &invalid_body(kind, errors))
    }

    /// Add a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Reply {
        self.headers.push((name, value));
        self
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The answer itself.
    #[must_use]
    pub fn into_response(self) -> Response<ReplyBody> {
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        response.headers_mut().extend(self.headers);
        response
    }
}

impl From<StoreError> for Reply {
    fn from(error: StoreError) -> Reply {
        let status = match &error {
            StoreError::Unavailable(_) | StoreError::Conflict | StoreError::Corrupt { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            StoreError::TooLarge { .. } => StatusCode::BAD_REQUEST,
            StoreError::ReadOnly { .. } => StatusCode::METHOD_NOT_ALLOWED,
        };
        Reply::error(status, error.to_string())
    }
}

impl From<BadQuery> for Reply {
    fn from(bad: BadQuery) -> Reply {
        match bad {
            BadQuery::Text(text) => Reply::with(StatusCode::BAD_REQUEST, "text/plain", text),
            BadQuery::Message(message) => Reply::bad_request(message),
        }
    }
}

/// `error_msg` is about the first error, `errors` lists all.
#[must_use]
pub fn invalid_body(kind: Kind, errors: &[ConfigError]) -> Value {
    let list: Vec<Value> = errors
        .iter()
        .map(|error| json!({"pointer": error.pointer, "error": error.kind.to_string()}))
        .collect();
    json!({"error_msg": invalid_message(kind, errors), "errors": list})
}

/// The sentence about an object that is wrong.
#[must_use]
pub fn invalid_message(kind: Kind, errors: &[ConfigError]) -> String {
    let Some(error) = errors.first() else { return "invalid configuration".to_owned() };
    let mut message = sentence(kind, error);
    if errors.len() > 1 {
        message.push_str(&format!(" (and {} more, see `errors`)", errors.len() - 1));
    }
    message
}

fn sentence(kind: Kind, error: &ConfigError) -> String {
    let person = matches!(kind, Kind::Consumer | Kind::Credential);
    let mut tokens = error.pointer.split('/').skip(1).map(unescape);
    let plugin = match (tokens.next().as_deref(), tokens.next()) {
        (Some("plugins"), Some(name)) => Some(name),
        _ => None,
    };
    let advice = &error.kind;
    let place = |depth: usize| {
        let tokens: Vec<String> = error.pointer.split('/').skip(1 + depth).map(unescape).collect();
        chain(&tokens, advice)
    };
    let pointer = if error.pointer.is_empty() { "/" } else { &error.pointer };
    match (&error.kind, plugin) {
        (ErrorKind::UnknownPlugin { name, .. }, _) => {
            let prefix = if person { "invalid plugins configuration: " } else { "" };
            format!("{prefix}unknown plugin [{name}] ({pointer}: {advice})")
        }
        (ErrorKind::MisplacedPlugin { .. }, _) if kind == Kind::Credential => {
            format!("only supports auth type plugins in consumer credential ({pointer}: {advice})")
        }
        (ErrorKind::Exclusive { one, other }, _) => {
            format!("only one of {one} or {other} is allowed ({pointer}: {advice})")
        }
        (_, Some(name)) => {
            let prefix = if person { "invalid plugins configuration: " } else { "" };
            format!(
                "{prefix}failed to check the configuration of plugin {name} err: {} ({pointer}: {advice})",
                place(2)
            )
        }
        _ => format!("invalid configuration: {} ({pointer}: {advice})", place(0)),
    }
}

/// What the schema checker of APISIX would say: the way down to the place, then the reason.
fn chain(tokens: &[String], kind: &ErrorKind) -> String {
    let (reason, depth) = match kind {
        // These are said of the object that holds the field.
        ErrorKind::MissingField { field } => (format!("property \"{field}\" is required"), 1),
        ErrorKind::UnknownField { field, .. } => {
            (format!("additional properties forbidden, found {field}"), 1)
        }
        ErrorKind::WrongType { found, expected } => {
            (format!("wrong type: expected {}, got {}", type_name(expected), type_name(found)), 0)
        }
        ErrorKind::Null => ("wrong type: got null".to_owned(), 0),
        ErrorKind::NotOneOf { .. } => ("matches none of the enum values".to_owned(), 0),
        ErrorKind::NoneOf { .. } => ("object matches none of the required".to_owned(), 0),
        ErrorKind::OutOfRange { what, found, allowed } => {
            (format!("expected {what} {found} to be {allowed}"), 0)
        }
        ErrorKind::BadFormat { found, .. } => (format!("failed to match pattern with \"{found}\""), 0),
        ErrorKind::Duplicate => ("expected unique items".to_owned(), 0),
        other => (other.to_string(), 0),
    };
    let mut text = String::new();
    for token in tokens.get(..tokens.len().saturating_sub(depth)).unwrap_or_default() {
        match token.parse::<usize>() {
            Ok(index) => text.push_str(&format!("failed to validate item {}: ", index.saturating_add(1))),
            Err(_) => text.push_str(&format!("property \"{token}\" validation failed: ")),
        }
    }
    text.push_str(&reason);
    text
}

/// JSON's names for types, from ours.
fn type_name(words: &str) -> &str {
    const NAMES: [(&str, &str); 8] = [
        ("text", "string"),
        ("true or false", "boolean"),
        ("a list", "array"),
        ("an object", "object"),
        ("a number", "number"),
        ("a whole number", "integer"),
        ("an integer", "integer"),
        ("null", "null"),
    ];
    NAMES.iter().find(|(ours, _)| words.starts_with(ours)).map_or(words, |(_, name)| name)
}

fn unescape(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_words_of_apisix_and_ours() {
        let wrong = |found, expected: &str| ErrorKind::WrongType { found, expected: expected.to_owned() };
        for (kind, pointer, error, expected) in [
            (
                Kind::Route,
                "/uri",
                wrong("a number", "text"),
                "invalid configuration: property \"uri\" validation failed: wrong type: expected string, got number \
                 (/uri: found a number, write text)",
            ),
            (
                Kind::Upstream,
                "/nodes/0/weight",
                wrong("text", "a whole number"),
                "invalid configuration: property \"nodes\" validation failed: failed to validate item 1: property \
                 \"weight\" validation failed: wrong type: expected integer, got string (/nodes/0/weight: found text, \
                 write a whole number)",
            ),
            (
                Kind::Consumer,
                "/username",
                ErrorKind::MissingField { field: "username".into() },
                "invalid configuration: property \"username\" is required (/username: `username` is missing: add it)",
            ),
            (
                Kind::Route,
                "/plugins/uri-rewrite",
                ErrorKind::UnknownPlugin {
                    name: "uri-rewrite".into(),
                    advice: Some("use `proxy-rewrite`".into()),
                },
                "unknown plugin [uri-rewrite] (/plugins/uri-rewrite: plugin `uri-rewrite` does not exist here: use \
                 `proxy-rewrite`)",
            ),
            (
                Kind::Consumer,
                "/plugins/key-auth/key",
                wrong("a number", "text"),
                "invalid plugins configuration: failed to check the configuration of plugin key-auth err: property \
                 \"key\" validation failed: wrong type: expected string, got number (/plugins/key-auth/key: found a \
                 number, write text)",
            ),
            (
                Kind::Route,
                "/hosts",
                ErrorKind::Exclusive { one: "host", other: "hosts" },
                "only one of host or hosts is allowed (/hosts: `host` and `hosts` exclude each other: keep one of them)",
            ),
        ] {
            assert_eq!(invalid_message(kind, &[ConfigError::new(pointer, error)]), expected);
        }
    }
}
