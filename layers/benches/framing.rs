//! What reading a request's framing costs, with allocation counts.
//!
//! `cargo bench -p layers --bench framing`. Nothing here may allocate once it has run.

use divan::{AllocProfiler, Bencher};
use layers::transport::frames::Frames;
use layers::transport::framing::{Chunks, HeadLimits, HeadReader, Part};

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

/// As wrk sends it.
const SHORT: &[u8] =
    b"GET /api/v1/items/17 HTTP/1.1\r\nHost: 127.0.0.1:9080\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";

/// As a browser sends it: 14 fields, 900 bytes.
const BROWSER: &[u8] = b"GET /shop/articles?page=3&sort=price HTTP/1.1\r\n\
Host: www.example.com\r\n\
Connection: keep-alive\r\n\
sec-ch-ua: \"Chromium\";v=\"140\", \"Not=A?Brand\";v=\"24\"\r\n\
sec-ch-ua-mobile: ?0\r\n\
sec-ch-ua-platform: \"Linux\"\r\n\
Upgrade-Insecure-Requests: 1\r\n\
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36\r\n\
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8\r\n\
Sec-Fetch-Site: same-origin\r\n\
Sec-Fetch-Mode: navigate\r\n\
Referer: https://www.example.com/shop/articles?page=2&sort=price\r\n\
Accept-Encoding: gzip, deflate, br, zstd\r\n\
Accept-Language: en-GB,en;q=0.9,de;q=0.8\r\n\
Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; consent=all; tracking=none; currency=EUR; \
basket=0123456789abcdef0123456789abcdef0123456789abcdef; lang=en; seen=0123456789abcdef0123456789\r\n\
\r\n";

const POST: &[u8] =
    b"POST /api/v1/items HTTP/1.1\r\nHost: 127.0.0.1:9080\r\nContent-Type: application/json\r\n\
Content-Length: 27\r\nAccept: */*\r\n\r\n{\"name\":\"x\",\"price\":1.2345}";

fn main() {
    divan::main();
}

fn read(bencher: Bencher<'_, '_>, request: &'static [u8]) {
    let mut reader = HeadReader::new(HeadLimits::default());
    bencher.counter(divan::counter::BytesCount::new(request.len())).bench_local(|| {
        let read = reader.read(divan::black_box(request));
        assert!(matches!(read, Ok(Some(_))));
        reader.restart();
    });
}

#[divan::bench]
fn short_get(bencher: Bencher<'_, '_>) {
    read(bencher, SHORT);
}

#[divan::bench]
fn browser_get(bencher: Bencher<'_, '_>) {
    read(bencher, BROWSER);
}

#[divan::bench]
fn post(bencher: Bencher<'_, '_>) {
    read(bencher, POST);
}

/// A body of sixteen chunks of 1 KB.
#[divan::bench]
fn chunked_body(bencher: Bencher<'_, '_>) {
    let mut body = Vec::new();
    for _ in 0..16 {
        body.extend(b"400\r\n");
        body.resize(body.len() + 1024, b'x');
        body.extend(b"\r\n");
    }
    body.extend(b"0\r\n\r\n");
    bencher.counter(divan::counter::BytesCount::new(body.len())).bench_local(|| {
        let mut chunks = Chunks::new(HeadLimits::default());
        let mut rest = body.as_slice();
        while let Ok(Part::Data(taken) | Part::Framing(taken)) = chunks.next(rest) {
            rest = rest.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
        assert!(chunks.is_over());
    });
}

/// A HEADERS and a DATA frame, as the frame counter sees a request over HTTP/2.
#[divan::bench]
fn http2_request(bencher: Bencher<'_, '_>) {
    let mut bytes = vec![0, 0, 40, 1, 4, 0, 0, 0, 1];
    bytes.resize(9 + 40, 0x82);
    bytes.extend([0, 0, 100, 0, 1, 0, 0, 0, 1]);
    bytes.resize(9 + 40 + 9 + 100, b'x');
    let mut frames = Frames::new(0);
    let started = frames.scan(&[0; 24], 0);
    assert!(started.is_ok());
    bencher.bench_local(|| frames.scan(&bytes, 0).is_ok());
}
