//! HTTP/1 framing: no panic, what is read does not depend on how the bytes are cut, and another parser reads the same of a
//! head that passes.

#![no_main]

use layers::transport::framing::{Chunks, HeadLimits, HeadReader, Part, Violation};
use libfuzzer_sys::fuzz_target;

const LIMITS: HeadLimits = HeadLimits { line: 128, head: 512, fields: 8 };

/// What a connection makes of its bytes: heads, data of bodies, and why it ends.
#[derive(Debug, Default, PartialEq)]
struct Read {
    heads: Vec<Vec<u8>>,
    data: Vec<u8>,
    trailers: Vec<Option<http::HeaderMap>>,
    end: Option<Violation>,
}

enum Body {
    Length(u64),
    Chunks(Chunks),
}

fn run(bytes: &[u8], size: usize) -> Read {
    let mut all = Read::default();
    let mut reader = HeadReader::new(LIMITS);
    let mut here = Vec::new();
    let mut body = None;
    for piece in bytes.chunks(size) {
        here.extend_from_slice(piece);
        if let Err(violation) = step(&mut all, &mut reader, &mut here, &mut body) {
            all.end = Some(violation);
            return all;
        }
    }
    all
}

fn step(
    all: &mut Read,
    reader: &mut HeadReader,
    here: &mut Vec<u8>,
    body: &mut Option<Body>,
) -> Result<(), Violation> {
    loop {
        match body {
            None => {
                let Some(length) = reader.read(here)? else { return Ok(()) };
                check(reader, &here[..length]);
                let facts = reader.facts();
                *body = match facts.length {
                    _ if facts.chunked => Some(Body::Chunks(Chunks::new(LIMITS))),
                    Some(length @ 1..) => Some(Body::Length(length)),
                    _ => None,
                };
                reader.restart();
                all.heads.push(here.drain(..length).collect());
            }
            Some(_) if here.is_empty() => return Ok(()),
            Some(Body::Length(left)) => {
                let taken = (here.len() as u64).min(*left);
                *left -= taken;
                if *left == 0 {
                    *body = None;
                }
                all.data.extend(here.drain(..taken as usize));
            }
            Some(Body::Chunks(chunks)) => match chunks.next(here)? {
                Part::Data(taken) => all.data.extend(here.drain(..taken)),
                Part::Framing(taken) => {
                    here.drain(..taken);
                    if chunks.is_over() {
                        all.trailers.push(chunks.trailers()?);
                        *body = None;
                    }
                }
                Part::Over => panic!("asked again after the end"),
            },
        }
    }
}

/// httparse agrees on every head that passes, up to what we encode in its target.
fn check(reader: &HeadReader, head: &[u8]) {
    let mut places = [httparse::EMPTY_HEADER; 16];
    let mut other = httparse::Request::new(&mut places);
    let parsed = other.parse(head);
    if reader.facts().encode {
        return;
    }
    assert_eq!(parsed, Ok(httparse::Status::Complete(head.len())));
    let (method, target) = reader.request_line().expect("a request line");
    assert_eq!(other.method.map(str::as_bytes), Some(&head[method]));
    assert_eq!(other.path.map(str::as_bytes), Some(&head[target]));
    assert_eq!(other.headers.len(), reader.fields().len());
    for (theirs, ours) in other.headers.iter().zip(reader.fields()) {
        assert_eq!(theirs.name.as_bytes(), &head[ours.name()]);
        assert_eq!(theirs.value, &head[ours.value()]);
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let whole = run(bytes, usize::MAX);
    assert_eq!(run(bytes, usize::from(size) + 1), whole);
    assert_eq!(run(bytes, 1), whole);
});
