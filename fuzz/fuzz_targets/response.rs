//! Answers of upstreams: no panic, what is understood does not depend on how the bytes are cut, and no field of the
//! upstream's connection passes.

#![no_main]

use bytes::Bytes;
use http::{HeaderMap, Method};
use layers::upstream::http1::Defect;
use layers::upstream::http1::head::Asked;
use layers::upstream::http1::reader::Reader;
use libfuzzer_sys::fuzz_target;

const OWN: [&str; 6] =
    ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];

#[derive(Debug, Default, PartialEq)]
struct Answer {
    status: u16,
    fields: HeaderMap,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
    again: bool,
    rest: usize,
}

fn read(bytes: &[u8], asked: Asked<'_>, size: usize) -> Result<Answer, Defect> {
    let mut reader = Reader::default();
    let mut pieces = bytes.chunks(size);
    let mut answer = Answer::default();
    loop {
        if let Some(head) = reader.head(asked)? {
            answer.status = head.status.as_u16();
            answer.fields = head.headers;
            answer.again = head.keep_alive;
            break;
        }
        let piece = pieces.next().ok_or(Defect::CutShort)?;
        reader.push(Bytes::copy_from_slice(piece));
    }
    loop {
        match reader.frame()? {
            Some(frame) => match frame.into_data() {
                Ok(data) => {
                    assert!(!data.is_empty());
                    answer.body.extend_from_slice(&data);
                }
                Err(frame) => answer.trailers = frame.into_trailers().ok(),
            },
            None if reader.body().is_end() => break,
            None => match pieces.next() {
                Some(piece) => reader.push(Bytes::copy_from_slice(piece)),
                None => reader.close()?,
            },
        }
    }
    answer.rest = reader.into_rest().len() + pieces.map(<[u8]>::len).sum::<usize>();
    Ok(answer)
}

fuzz_target!(|input: &[u8]| {
    // The first byte: what was asked, and the size of the pieces.
    let Some((&first, bytes)) = input.split_first() else { return };
    let method = if first & 1 == 0 { Method::GET } else { Method::HEAD };
    let asked = Asked { method: &method, switch: first & 2 != 0 };
    let whole = read(bytes, asked, usize::MAX);
    for size in [usize::from(first >> 2) + 1, 1] {
        let pieces = read(bytes, asked, size);
        // The end of a bad head is waited for.
        assert!(pieces == whole || (pieces.is_err() && whole.is_err()), "{whole:?} {pieces:?}");
    }
    let Ok(answer) = whole else { return };
    assert!(answer.status == 101 || answer.status >= 200);
    assert!(answer.rest == 0 || answer.body.len() + answer.rest <= bytes.len());
    for fields in [Some(&answer.fields), answer.trailers.as_ref()].into_iter().flatten() {
        assert!(OWN.iter().all(|name| !fields.contains_key(*name)), "{fields:?}");
    }
    let length = answer.fields.get("content-length").and_then(|length| length.to_str().ok());
    if let Some(length) = length.filter(|_| !answer.body.is_empty()) {
        assert_eq!(length.parse(), Ok(answer.body.len()));
    }
});
