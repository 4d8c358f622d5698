//! PROXY headers: no panic, a header is never longer than its bytes, and more bytes never change a verdict.

#![no_main]

use layers::transport::proxy_protocol::{MAX_HEADER, Parsed, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let whole = parse(input);
    if let Ok(Parsed::Header { length, .. }) = whole {
        assert!(length <= input.len() && length <= MAX_HEADER);
    }
    if input.len() > MAX_HEADER {
        assert_ne!(whole, Ok(Parsed::Partial));
    }
    for cut in 0..input.len().min(300) {
        match parse(&input[..cut]) {
            Ok(Parsed::Partial) => {}
            early => assert_eq!(early, whole),
        }
    }
});
