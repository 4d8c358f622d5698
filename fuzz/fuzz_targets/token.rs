//! Tokens and cookies of clients: no panic, and nothing passes that the holder of the key did not sign.

#![no_main]

use std::sync::LazyLock;

use http::{HeaderMap, HeaderValue, header};
use layers::vars::cookie;
use libfuzzer_sys::fuzz_target;
use plugins::support::credentials::hide_cookie;
use plugins::support::jwt::{Algorithm, Key, TimeClaim, Token};

/// A key that signed nothing.
static KEY: LazyLock<Key> =
    LazyLock::new(|| Key::secret(Algorithm::HS256, b"a key that signed nothing").expect("a secret"));

fuzz_target!(|input: &[u8]| {
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(token) = Token::parse(text)
    {
        assert!(!token.is_signed_by(&KEY));
        for claim in [TimeClaim::Exp, TimeClaim::Nbf] {
            let _ = claim.holds(token.claims(), 1_000.0, 60.0);
        }
        assert!(text.is_ascii() && text.matches('.').count() == 2);
    }
    if let Ok(value) = HeaderValue::from_bytes(input) {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, value);
        hide_cookie(&mut headers, "jwt");
        assert_eq!(cookie(&headers, "jwt"), None);
    }
});
