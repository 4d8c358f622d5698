//! Paths and queries: no panic, nothing dangerous comes out, and the form that is sent is its own normal form.

#![no_main]

use layers::http::normalize::{Options, normalize, normalize_query};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (flags, raw) = input;
    let options = Options {
        keep_encoded_slash: flags & 1 != 0,
        servlet: flags & 2 != 0,
        delete_tail_slash: flags & 4 != 0,
    };
    if let Ok(normal) = normalize(raw, options) {
        let climbs = |segment: &[u8]| segment == b"." || segment == b"..";
        assert!(!normal.decoded.split(|byte| *byte == b'/').any(climbs));
        assert!(!normal.decoded.windows(2).any(|pair| pair == b"//"));
        assert!(!normal.decoded.iter().any(u8::is_ascii_control));
        assert!(normal.sent.bytes().all(|byte| matches!(byte, 0x21..=0x7E) && byte != b'#' && byte != b'?'));
        assert_eq!(normalize(normal.sent.as_bytes(), options).as_ref(), Ok(&normal));
    }
    let query = normalize_query(raw);
    assert_eq!(normalize_query(query.as_bytes()), query);
    assert!(query.bytes().all(|byte| matches!(byte, 0x21..=0x7E) && byte != b'#'));
});
