//! What authentication plugins share: where a credential stands, how it is hidden and compared, what a refusal says,
//! and whose a request without a valid one is.
//!
//! A plugin that refuses leaves the request as it was, because `multi-auth` may ask another one after it.

use std::sync::{Arc, OnceLock};

use aws_lc_rs::{hmac, rand};
use config::error::ConfigError;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use layers::consumer::{Consumer, Consumers};
use layers::exchange::Exchange;
use layers::plugin::Flow;
use percent_encoding::percent_decode_str;

use super::consumer;
use super::reply::Canned;

/// The challenge of refusals: `Basic realm="shop"`.
///
/// # Errors
/// The realm cannot be written in quotes; the error stands at `/realm`.
pub fn challenge(scheme: &str, realm: &str) -> Result<HeaderValue, ConfigError> {
    let plain = !realm.contains(['"', '\\']);
    plain.then(|| HeaderValue::try_from(format!("{scheme} realm=\"{realm}\"")).ok()).flatten().ok_or_else(
        || ConfigError::invalid("/realm", "a realm has neither quotes, backslashes nor control characters"),
    )
}

/// A refusal: 401 with this message and challenge.
pub fn refusal(challenge: &HeaderValue, message: &str) -> Canned {
    Canned::message(StatusCode::UNAUTHORIZED, message).header(header::WWW_AUTHENTICATE, challenge.clone())
}

/// Who gets in, and as whom.
pub struct Gate {
    consumers: Consumers,
    anonymous: Option<Box<str>>,
    no_anonymous: Canned,
}

impl Gate {
    /// With the consumer that requests without a valid credential belong to, if there is one.
    pub fn new(consumers: &Consumers, anonymous: Option<String>, challenge: &HeaderValue) -> Self {
        Self {
            consumers: consumers.clone(),
            anonymous: anonymous.map(Into::into),
            no_anonymous: refusal(challenge, "Invalid user authorization"),
        }
    }

    /// The consumer that `plugin` recognises by `key`. A look-up by hash: how long it takes says nothing about how
    /// near a wrong key is.
    pub fn find(&self, plugin: &str, key: &str) -> Option<Arc<Consumer>> {
        self.consumers.find(plugin, key)
    }

    /// Lets the request in as the consumer that was found, as the anonymous one, or not.
    pub fn settle(&self, x: &mut Exchange, found: Result<Arc<Consumer>, &Canned>) -> Flow {
        let known = match (found, &self.anonymous) {
            (Ok(known), _) => known,
            (Err(refusal), None) => return refusal.flow(),
            (Err(_), Some(anonymous)) => match self.consumers.named(anonymous) {
                Some(known) => known,
                None => return self.no_anonymous.flow(),
            },
        };
        consumer::attach(x, known);
        Flow::Next
    }
}

/// What stands in a header field that holds a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown<'a> {
    /// There is no such field.
    Nothing,
    /// Text.
    Text(&'a str),
    /// Bytes that are no text, or several fields, of which the upstream could take another one.
    Unusable,
}

/// The credential in a header field.
pub fn shown<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Shown<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(|value| std::str::from_utf8(value.as_bytes())), values.next()) {
        (None, _) => Shown::Nothing,
        (Some(Ok(text)), None) => Shown::Text(text),
        _ => Shown::Unusable,
    }
}

/// What follows the name of the scheme, which is written in any case: `Basic dTpw` has `dTpw`.
pub fn after_scheme<'a>(text: &'a str, scheme: &str) -> Option<&'a str> {
    let (name, rest) = text.split_at_checked(scheme.len())?;
    (name.eq_ignore_ascii_case(scheme) && rest.starts_with(' ')).then(|| rest.trim_start_matches(' '))
}

/// Takes an argument out of the target that is forwarded, and of the one that logs tell.
pub fn hide_argument(x: &mut Exchange, name: &str) {
    if let Some(uri) = without_argument(&x.request.uri, name) {
        x.request.uri = uri;
    }
    if let Some(uri) = x.original_uri.as_ref().and_then(|uri| without_argument(uri, name)) {
        x.original_uri = Some(Box::new(uri));
    }
}

fn without_argument(uri: &Uri, name: &str) -> Option<Uri> {
    let query = uri.query()?;
    let is_it = |pair: &str| {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        key == name || percent_decode_str(&key.replace('+', " ")).decode_utf8_lossy() == name
    };
    let rest: Vec<&str> = query.split('&').filter(|pair| !is_it(pair)).collect();
    let mut target = uri.path().to_owned();
    if !rest.is_empty() {
        target.push('?');
        target.push_str(&rest.join("&"));
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    Uri::from_parts(parts).ok()
}

/// Takes a cookie out of the request; the others stay as they are.
pub fn hide_cookie(headers: &mut HeaderMap, name: &str) {
    let is_it = |pair: &[u8]| {
        let key = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
        key.trim_ascii() == name.as_bytes()
    };
    let rest: Vec<HeaderValue> = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|field| {
            let pairs = field.as_bytes().split(|byte| *byte == b';');
            let kept: Vec<&[u8]> = pairs.filter(|pair| !is_it(pair)).map(<[u8]>::trim_ascii).collect();
            let joined = kept.join(&b"; "[..]);
            if joined.is_empty() { None } else { HeaderValue::from_bytes(&joined).ok() }
        })
        .collect();
    headers.remove(header::COOKIE);
    for field in rest {
        headers.append(header::COOKIE, field);
    }
}

/// A secret that others are compared with. How long that takes depends on what was shown, not on the secret: not on
/// its length, and not on where the two differ.
pub struct Fingerprint(hmac::Tag);

impl Fingerprint {
    /// Of `secret`.
    pub fn of(secret: &[u8]) -> Self {
        Self(hmac::sign(process_key(), secret))
    }

    /// Of nothing that anybody could show.
    pub fn of_nobody() -> Self {
        Self::of(&random())
    }

    /// Whether `shown` is the secret.
    pub fn matches(&self, shown: &[u8]) -> bool {
        hmac::verify(process_key(), shown, self.0.as_ref()).is_ok()
    }
}

/// A key that nobody outside the process knows, so that nobody can choose texts whose digests begin alike.
fn process_key() -> &'static hmac::Key {
    static KEY: OnceLock<hmac::Key> = OnceLock::new();
    KEY.get_or_init(|| hmac::Key::new(hmac::HMAC_SHA256, &random()))
}

/// Bytes that nobody can guess, to compare with where there is nothing to compare with. No secret depends on them.
pub fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    // Should the system have none, what is compared is still not accepted, and still takes its time.
    let _ = rand::fill(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use layers::testing::exchange;

    use super::*;

    #[test]
    fn a_credential_is_one_text_or_none() {
        let name = HeaderName::from_static("authorization");
        let mut headers = HeaderMap::new();
        assert_eq!(shown(&headers, &name), Shown::Nothing);
        headers.insert(&name, HeaderValue::from_static("a"));
        assert_eq!(shown(&headers, &name), Shown::Text("a"));
        headers.append(&name, HeaderValue::from_static("a"));
        assert_eq!(shown(&headers, &name), Shown::Unusable);
        headers.insert(&name, HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(shown(&headers, &name), Shown::Unusable);
    }

    #[test]
    fn a_scheme_is_read_in_any_case_and_needs_a_space() {
        let cases = [
            ("Basic abc", Some("abc")),
            ("bASIC   abc", Some("abc")),
            ("Basic ", Some("")),
            ("Basic", None),
            ("Basicabc", None),
            ("Bas\u{ef}c abc", None),
            ("", None),
        ];
        for (text, rest) in cases {
            assert_eq!(after_scheme(text, "Basic"), rest, "{text}");
        }
    }

    #[test]
    fn a_hidden_cookie_leaves_the_others() {
        let cases = [
            (vec!["jwt=a"], vec![]),
            (vec!["a=1; jwt=x; b=2"], vec!["a=1; b=2"]),
            (vec!["jwt=x; jwt=y;ajwt=1"], vec!["ajwt=1"]),
            (vec!["a=1", "jwt=x"], vec!["a=1"]),
            (vec!["a=jwt=x"], vec!["a=jwt=x"]),
        ];
        for (before, after) in cases {
            let mut x = exchange("GET", "http://a/").build();
            for field in &before {
                x.request.headers.append(header::COOKIE, HeaderValue::from_static(field));
            }
            hide_cookie(&mut x.request.headers, "jwt");
            let left: Vec<_> = x
                .request
                .headers
                .get_all(header::COOKIE)
                .iter()
                .map(|field| field.to_str().unwrap())
                .collect();
            assert_eq!(left, after, "{before:?}");
        }
    }

    #[test]
    fn a_fingerprint_matches_its_secret_alone() {
        let fingerprint = Fingerprint::of(b"secret");
        assert!(fingerprint.matches(b"secret"));
        for other in [&b""[..], b"secre", b"secret ", b"Secret"] {
            assert!(!fingerprint.matches(other));
        }
        assert!(!Fingerprint::of_nobody().matches(b""));
    }

    #[test]
    fn a_realm_stands_in_quotes() {
        assert_eq!(challenge("Basic", "a b").unwrap(), "Basic realm=\"a b\"");
        for realm in ["a\"b", "a\\", "a\nb"] {
            assert_eq!(challenge("Basic", realm).unwrap_err().pointer, "/realm", "{realm}");
        }
    }
}
