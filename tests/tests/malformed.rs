//! Hostile clients and hostile origins, as raw bytes. What is ambiguous is refused, never repaired and never
//! passed on; the numbers are those of the bug classes the gateway must withstand.

use std::time::Duration;

use e2e::client::{Call, Connection, End, Outcome, Raw, exchange};
use e2e::frames::{self, frame};
use e2e::origin::recorder::{self, Records};
use e2e::origin::{Origin, echo, malformed, slow_body};
use e2e::{Edge, eventually, json};

const LIMIT: Duration = Duration::from_secs(15);

/// What would be seen at the origin if the gateway lost count of where a request ends.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";

async fn recording() -> (Edge, Origin, Records) {
    let (origin, records) = recorder::ok().await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    (edge, origin, records)
}

/// Sends each case with another request behind it: it must be answered with a refusal and the connection must
/// end, and the origin must not have seen a byte.
async fn all_refused(cases: &[(&str, &[u8])]) {
    let (edge, origin, records) = recording().await;
    let mut failures = Vec::new();
    for (name, bytes) in cases {
        let outcome = exchange(edge.http, [bytes, SMUGGLED.as_bytes()].concat(), LIMIT).await;
        let refused = match outcome.statuses()[..] {
            [status] => (400..=505).contains(&status) && !matches!(status, 404 | 502 | 503 | 504),
            [] => true,
            _ => false,
        };
        if !refused || outcome.end == End::Open || origin.requests() > 0 {
            let seen = records.text();
            failures.push(format!(
                "{name}: {:?} {:?}, the origin saw {seen:?}",
                outcome.statuses(),
                outcome.end
            ));
        }
        if origin.requests() > 0 {
            // The count is the origin's: start anew for the following cases.
            return assert!(failures.is_empty(), "{}", failures.join("\n"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // An honest client is none the worse for it.
    edge.get("/honest").await.expect_status(200);
}

#[tokio::test]
async fn rules_1_and_2_a_length_is_one_number_and_never_beside_chunks() {
    let post =
        |fields: &str, body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n{body}").into_bytes();
    let cases = [
        ("length and chunks", post("content-length: 5\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n")),
        ("chunks and length", post("transfer-encoding: chunked\r\ncontent-length: 5\r\n", "0\r\n\r\n")),
        ("two lengths", post("content-length: 5\r\ncontent-length: 6\r\n", "hello")),
        ("the same length twice", post("content-length: 5\r\ncontent-length: 5\r\n", "hello")),
        ("length list", post("content-length: 5, 5\r\n", "hello")),
        ("length with plus", post("content-length: +5\r\n", "hello")),
        ("length with minus", post("content-length: -5\r\n", "hello")),
        ("length in hex", post("content-length: 0x5\r\n", "hello")),
        ("length with space inside", post("content-length: 1 0\r\n", "hello")),
        ("empty length", post("content-length:\r\n", "hello")),
        ("length overflow", post("content-length: 18446744073709551621\r\n", "hello")),
        (
            "length overflow of 32 bits with junk",
            post("content-length: 99999999999999999999999999\r\n", "hello"),
        ),
        ("chunked twice", post("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n")),
        ("chunked and identity", post("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n")),
        ("unknown coding", post("transfer-encoding: xchunked\r\n", "0\r\n\r\n")),
        ("coding with a vertical tab", post("transfer-encoding: \x0bchunked\r\n", "0\r\n\r\n")),
        ("coding in quotes", post("transfer-encoding: \"chunked\"\r\n", "0\r\n\r\n")),
        ("gzip before chunked", post("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n")),
        (
            "chunks in HTTP/1.0",
            b"POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        ),
    ];
    let cases: Vec<(&str, &[u8])> = cases.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    all_refused(&cases).await;
}

#[tokio::test]
async fn rule_3_chunks_are_hexadecimal_and_end_in_crlf() {
    // The head is good, so that a request may be under way when the body turns out bad: what counts is that the
    // origin gets no second request and no complete first one.
    let bodies = [
        ("size overflow", "ffffffffffffffff1\r\nhello\r\n0\r\n\r\n"),
        ("size overflow of 64 bits to five", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
        ("size with sign", "+5\r\nhello\r\n0\r\n\r\n"),
        ("size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("size with space before", " 5\r\nhello\r\n0\r\n\r\n"),
        ("empty size", "\r\nhello\r\n0\r\n\r\n"),
        ("not hex", "5g\r\nhello\r\n0\r\n\r\n"),
        ("bare LF after the size", "5\nhello\r\n0\r\n\r\n"),
        ("bare CR after the size", "5\rXhello\r\n0\r\n\r\n"),
        ("wrong end of chunk", "5\r\nhelloXX0\r\n\r\n"),
        ("bare LF after the chunk", "5\r\nhello\n0\r\n\r\n"),
        ("LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        ("CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n"),
        ("bad trailer", "5\r\nhello\r\n0\r\nbad trailer\r\n\r\n"),
    ];
    let origin = echo::start().await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    let mut failures = Vec::new();
    for (name, body) in bodies {
        let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        let outcome = exchange(edge.http, format!("{head}{body}{SMUGGLED}"), LIMIT).await;
        let statuses = outcome.statuses();
        if statuses.contains(&200) || statuses.len() > 1 || outcome.end == End::Open {
            failures.push(format!("{name}: {statuses:?} {:?} {}", outcome.end, outcome.text()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1_000_000));
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let outcome = exchange(edge.http, format!("{head}{long}"), LIMIT).await;
    assert!(!outcome.statuses().contains(&200), "an extension of a megabyte is refused");
}

#[tokio::test]
async fn rule_3_chunk_extensions_are_not_passed_on() {
    let (edge, _origin, records) = recording().await;
    let mut raw = Raw::connect(edge.http).await;
    raw.write(
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5;secret=1\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    raw.answer().await.expect("an answer");
    let seen = records.wait_for("hello").await;
    assert!(!seen.contains("secret"), "{seen}");
}

#[tokio::test]
async fn rule_4_nothing_in_a_head_is_dropped_or_repaired() {
    all_refused(&[
        ("empty name", b"GET / HTTP/1.1\r\nhost: a\r\n: b\r\n\r\n"),
        ("space before the colon", b"GET / HTTP/1.1\r\nhost: a\r\nx-a : b\r\n\r\n"),
        ("tab before the colon", b"GET / HTTP/1.1\r\nhost: a\r\nx-a\t: b\r\n\r\n"),
        ("space in a name", b"GET / HTTP/1.1\r\nhost: a\r\nx a: b\r\n\r\n"),
        ("NUL in a name", b"GET / HTTP/1.1\r\nhost: a\r\nx\0a: b\r\n\r\n"),
        ("NUL in a value", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b\0c\r\n\r\n"),
        ("bare CR in a value", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b\rc\r\n\r\n"),
        ("bare CR hiding a length", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b\rcontent-length: 35\r\n\r\n"),
        ("bare LF in a head", b"GET / HTTP/1.1\r\nhost: a\nx-a: b\r\n\r\n"),
        ("bare LF at the end of the head", b"GET / HTTP/1.1\nhost: a\n\n"),
        ("folded field", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b\r\n c\r\n\r\n"),
        ("folded first field", b"GET / HTTP/1.1\r\n host: a\r\n\r\n"),
        ("line without a colon", b"GET / HTTP/1.1\r\nhost: a\r\nnonsense\r\n\r\n"),
        ("control character in a value", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: b\x01c\r\n\r\n"),
        ("no host", b"GET / HTTP/1.1\r\nx-a: b\r\n\r\n"),
        ("two hosts", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
        ("host with a path", b"GET / HTTP/1.1\r\nhost: a/b\r\n\r\n"),
        ("host with a space", b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n"),
        ("host with user", b"GET / HTTP/1.1\r\nhost: user@a\r\n\r\n"),
        ("host with a comma", b"GET / HTTP/1.1\r\nhost: a,b\r\n\r\n"),
    ])
    .await;
}

#[tokio::test]
async fn rule_5_targets_are_plain_and_request_lines_well_formed() {
    all_refused(&[
        ("fragment", b"GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("control character", b"GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("DEL", b"GET /\x7f HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("NUL", b"GET /\0 HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("tab", b"GET /\ta HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("two spaces", b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("space in the target", b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("no version", b"GET /\r\nhost: a\r\n\r\n"),
        ("version 1.2", b"GET / HTTP/1.2\r\nhost: a\r\n\r\n"),
        ("version 2.0", b"GET / HTTP/2.0\r\nhost: a\r\n\r\n"),
        ("version 0.9", b"GET / HTTP/0.9\r\nhost: a\r\n\r\n"),
        ("version in small letters", b"GET / http/1.1\r\nhost: a\r\n\r\n"),
        ("method with a separator", b"G(T / HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("relative target", b"GET a HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("asterisk of a GET", b"GET * HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("another scheme", b"GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("broken escape", b"GET /%zz HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("escaped NUL", b"GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ])
    .await;
}

#[tokio::test]
async fn rule_5_bytes_beyond_ascii_and_fragments_do_not_reach_the_origin() {
    let (edge, _origin, records) = recording().await;
    for target in [&b"/\xc3\xa9"[..], b"/\xff", b"/a?b=\xc3\xa9"] {
        let request = [b"GET ", target, b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"].concat();
        let outcome = exchange(edge.http, request, LIMIT).await;
        assert!(matches!(outcome.statuses()[..], [200 | 400]), "{:?}", outcome.statuses());
    }
    let mut fields = frames::get("/a", "a");
    fields[2].1 = b"/a#b";
    let headers =
        frame(frames::HEADERS, frames::END_HEADERS | frames::END_STREAM, 1, &frames::block(&fields));
    Http2::send(&edge, &[headers], Duration::from_millis(500)).await;
    let seen = records.text();
    assert!(seen.is_ascii() && !seen.contains('#'), "{seen:?}");
}

#[tokio::test]
async fn rule_6_a_body_that_was_not_read_is_not_taken_for_a_request() {
    let origin = echo::start().await;
    let edge = Edge::file()
        .route(json!({"id": "open", "uri": "/open", "upstream": origin.upstream()}))
        .route(json!({"id": "shut", "uri": "/shut", "upstream": origin.upstream(),
                      "plugins": {"ip-restriction": {"blacklist": ["127.0.0.1"]}}}))
        .start()
        .await;
    for (path, status) in [("/none", 404), ("/shut", 403)] {
        let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", SMUGGLED.len());
        let next = "GET /open HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let outcome = exchange(edge.http, format!("{head}{SMUGGLED}{next}"), LIMIT).await;
        let statuses = outcome.statuses();
        assert!(statuses == [status, 200] || statuses == [status], "{path}: {statuses:?}");
        // The same with the body behind the answer.
        let mut raw = Raw::connect(edge.http).await;
        raw.write(&head).await;
        assert_eq!(raw.answer().await.expect("an early answer").status, status);
        raw.write(format!("{SMUGGLED}{next}")).await;
        let rest = raw.read_to_end(LIMIT).await;
        assert!(matches!(rest.statuses()[..], [] | [200]), "{path}: {:?}", rest.statuses());
    }
    assert!(origin.requests() <= 4, "only what was asked for");
}

#[tokio::test]
async fn rule_6_an_answer_that_was_not_read_to_its_end_is_not_left_in_the_pool() {
    let origin = slow_body::start(200, 1000, Duration::from_millis(5)).await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    for _ in 0..3 {
        let mut raw = Raw::connect(edge.http).await;
        raw.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        raw.read_until("\r\n\r\n").await;
        drop(raw);
    }
    eventually("the abandoned connections are closed", || async {
        (origin.open_connections() == 0).then_some(())
    })
    .await;
    assert_eq!(edge.get("/").await.expect_status(200).body.len(), 200_000);
}

#[tokio::test]
async fn rule_7_an_upgrade_waits_for_the_101() {
    let (origin, records) = recorder::start("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno").await;
    let edge = Edge::file()
        .route(json!({"id": "r", "uri": "/*", "enable_websocket": true, "upstream": origin.upstream()}))
        .start()
        .await;
    let upgrade = "GET /up HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let outcome = exchange(edge.http, format!("{upgrade}{SMUGGLED}"), Duration::from_secs(2)).await;
    assert!(!outcome.statuses().contains(&101));
    // What was sent behind is at most a request of its own, with everything the gateway adds to one.
    let seen = records.text();
    for head in seen.split_inclusive("\r\n\r\n") {
        assert!(head.to_lowercase().contains("x-forwarded-for:"), "passed through raw: {head:?}");
    }
}

#[tokio::test]
async fn rule_7_an_upgrade_to_h2c_is_not_done_and_not_passed_on() {
    let (edge, _origin, records) = recording().await;
    let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\
                   http2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n";
    let outcome = exchange(edge.http, request, Duration::from_secs(2)).await;
    assert!(!outcome.statuses().contains(&101), "{}", outcome.text());
    let seen = records.text().to_lowercase();
    assert!(!seen.contains("h2c") && !seen.contains("http2-settings"), "{seen}");
}

/// What came of one HTTP/2 connection.
struct Http2 {
    frames: Vec<frames::Received>,
    end: End,
}

impl Http2 {
    async fn send(edge: &Edge, parts: &[bytes::Bytes], limit: Duration) -> Http2 {
        let mut raw = Raw::connect(edge.http).await;
        raw.write(frames::hello()).await;
        for part in parts {
            raw.write(part).await;
        }
        let Outcome { bytes, end } = raw.read_to_end(limit).await;
        Http2 { frames: frames::parse(&bytes), end }
    }

    fn has(&self, kind: u8) -> bool {
        self.frames.iter().any(|frame| frame.kind == kind)
    }

    /// The status of a stream, when its head was sent by us: literal or from the static table.
    fn status(&self, stream: u32) -> Option<u16> {
        let head =
            self.frames.iter().find(|frame| frame.kind == frames::HEADERS && frame.stream == stream)?;
        let mut decoder = HpackStatus(&head.payload);
        decoder.status()
    }
}

/// Reads `:status` from the beginning of a header block, where every server puts it.
struct HpackStatus<'a>(&'a [u8]);

impl HpackStatus<'_> {
    fn status(&mut self) -> Option<u16> {
        match self.0 {
            // A change of the table size before the first field.
            [first, rest @ ..] if first & 0xe0 == 0x20 => {
                self.0 = rest;
                self.status()
            }
            [0x88, ..] => Some(200),
            [0x89, ..] => Some(204),
            [0x8a, ..] => Some(206),
            [0x8b, ..] => Some(304),
            [0x8c, ..] => Some(400),
            [0x8d, ..] => Some(404),
            [0x8e, ..] => Some(500),
            // Any other one is a literal: enough to know that it is none of these.
            _ => Some(0),
        }
    }
}

#[tokio::test]
async fn rule_8_nothing_of_http2_becomes_a_line_of_http1_unchecked() {
    let (edge, origin, records) = recording().await;
    let base = || frames::get("/", "a");
    let with = |name: &'static str, value: &'static [u8]| {
        let mut fields = base();
        fields.push((name, value));
        fields
    };
    let replaced = |name: &'static str, value: &'static [u8]| {
        let mut fields = base();
        for field in &mut fields {
            if field.0 == name {
                field.1 = value;
            }
        }
        fields
    };
    let without = |name: &'static str| {
        let mut fields = base();
        fields.retain(|field| field.0 != name);
        fields
    };
    type Fields = Vec<(&'static str, &'static [u8])>;
    let cases: Vec<(&str, Fields)> = vec![
        ("CRLF in a value", with("x-a", b"b\r\nx-smuggled: 1")),
        ("LF in a value", with("x-a", b"b\nx-smuggled: 1")),
        ("CR in a value", with("x-a", b"b\rc")),
        ("NUL in a value", with("x-a", b"b\0c")),
        ("CRLF in a name", with("x-a: b\r\nx-smuggled", b"1")),
        ("space in a name", with("x a", b"b")),
        ("colon in a name", with("x-a:", b"b")),
        ("capital in a name", with("X-A", b"b")),
        ("empty name", with("", b"b")),
        ("CRLF in the path", replaced(":path", b"/ HTTP/1.1\r\nx-smuggled: 1\r\n")),
        ("space in the path", replaced(":path", b"/a b")),
        ("empty path", replaced(":path", b"")),
        ("path without a slash", replaced(":path", b"a")),
        ("CRLF in the method", replaced(":method", b"GET / HTTP/1.1\r\nx-smuggled: 1\r\n")),
        ("space in the method", replaced(":method", b"GE T")),
        ("CRLF in the authority", replaced(":authority", b"a\r\nx-smuggled: 1")),
        ("authority with a path", replaced(":authority", b"a/b")),
        ("authority with user", replaced(":authority", b"user@a")),
        ("CRLF in the scheme", replaced(":scheme", b"http\r\nx-smuggled: 1")),
        ("no method", without(":method")),
        ("no path", without(":path")),
        ("no scheme", without(":scheme")),
        ("path twice", with(":path", b"/b")),
        ("unknown pseudo-header", with(":extra", b"1")),
        ("host that contradicts the authority", with("host", b"b")),
        ("connection", with("connection", b"close")),
        ("transfer-encoding", with("transfer-encoding", b"chunked")),
        ("keep-alive", with("keep-alive", b"1")),
        ("upgrade", with("upgrade", b"websocket")),
        ("proxy-connection", with("proxy-connection", b"close")),
        ("te that is not trailers", with("te", b"gzip")),
        ("length without a body", with("content-length", b"5")),
        ("length not a number", with("content-length", b"five")),
        ("length with sign", with("content-length", b"+0")),
    ];
    let mut failures = Vec::new();
    for (name, fields) in cases {
        let block = frames::block(&fields);
        let headers = frame(frames::HEADERS, frames::END_HEADERS | frames::END_STREAM, 1, &block);
        // The PING behind shows when the answer to the request, if there is one, has been given.
        let ping = frame(frames::PING, 0, 0, &[7; 8]);
        let outcome = Http2::send(&edge, &[headers, ping], Duration::from_millis(500)).await;
        let refused = outcome.has(frames::RST_STREAM)
            || outcome.has(frames::GOAWAY)
            || outcome.status(1).is_some_and(|status| !matches!(status, 200 | 204 | 500));
        if !refused || origin.requests() > 0 {
            failures.push(format!("{name}: {:?}, {:?}", outcome.status(1), records.text()));
        }
        if origin.requests() > 0 {
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Connection::http2(edge.http).await.send(Call::get("/honest")).await.expect_status(200);
}

#[tokio::test]
async fn rule_10_ill_formed_answers_are_a_502_and_end_their_connection() {
    let mut failures = Vec::new();
    let mut origins = Vec::new();
    let mut builder = Edge::file();
    for (index, answer) in malformed::ANSWERS.iter().enumerate() {
        let origin = malformed::start(*answer).await;
        let mut upstream = origin.upstream();
        upstream["retries"] = json!(0);
        builder = builder
            .route(json!({"id": format!("r{index}"), "uri": format!("/{index}"), "upstream": upstream}));
        origins.push(origin);
    }
    let edge = builder.start().await;
    for (index, answer) in malformed::ANSWERS.iter().enumerate() {
        for mut connection in [Connection::http1(edge.http).await, Connection::http2(edge.http).await] {
            match connection.try_send(Call::get(&format!("/{index}"))).await {
                Ok(got) if got.status == 502 => {}
                other => failures.push(format!("{}: {other:?}", answer.name)),
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    for (origin, answer) in origins.iter().zip(malformed::ANSWERS) {
        eventually(&format!("{}: the connection is closed", answer.name), || async {
            (origin.open_connections() == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn rule_10_an_origin_cannot_flood_the_gateway_with_head() {
    let (many, large) =
        (malformed::header_bomb(20_000, 10).await, malformed::header_bomb(10, 1_000_000).await);
    let endless = malformed::endless_interim().await;
    let upstream = |origin: &Origin| {
        let mut upstream = origin.upstream();
        upstream["retries"] = json!(0);
        upstream["timeout"] = json!({"connect": 2, "send": 2, "read": 2});
        upstream
    };
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/many", "upstream": upstream(&many)}))
        .route(json!({"id": "2", "uri": "/large", "upstream": upstream(&large)}))
        .route(json!({"id": "3", "uri": "/endless", "upstream": upstream(&endless)}))
        .start()
        .await;
    let before = edge.resident();
    for path in ["/many", "/large", "/endless"] {
        let status = edge.get(path).await.status;
        assert!(matches!(status, 502 | 504), "{path}: {status}");
    }
    assert!(edge.resident() < before + 64 * 1024, "{before} KiB before, {} KiB after", edge.resident());
}

#[tokio::test]
async fn rule_11_rapid_resets_end_the_connection() {
    let origin = e2e::origin::stall::start().await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    let block = frames::block(&frames::get("/", "a"));
    let mut raw = Raw::connect(edge.http).await;
    raw.write(frames::hello()).await;
    for number in 0..4000u32 {
        let stream = number * 2 + 1;
        let open = frame(frames::HEADERS, frames::END_HEADERS | frames::END_STREAM, stream, &block);
        let reset = frame(frames::RST_STREAM, 0, stream, &8u32.to_be_bytes());
        raw.write([open, reset].concat()).await;
    }
    let outcome = raw.read_to_end(LIMIT).await;
    assert_ne!(outcome.end, End::Open, "the connection was ended");
    assert!(origin.requests() < 2000, "{} requests reached the origin", origin.requests());
    eventually("no call to the origin is left over", || async {
        (origin.open_connections() <= 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn rule_12_floods_end_the_connection_and_cost_no_memory() {
    let origin = echo::start().await;
    let edge =
        Edge::file().route(json!({"id": "r", "uri": "/*", "upstream": origin.upstream()})).start().await;
    let block = frames::block(&frames::get("/", "a"));
    let open = frame(frames::HEADERS, frames::END_HEADERS, 1, &block);
    let begun = frame(frames::HEADERS, frames::END_STREAM, 1, &block);
    let piece = frames::block(&[("x-a", &[b'b'; 1000])]);
    let floods: Vec<(&str, bytes::Bytes, bytes::Bytes)> = vec![
        ("CONTINUATION", begun.clone(), frame(frames::CONTINUATION, 0, 1, &piece)),
        ("empty CONTINUATION", begun, frame(frames::CONTINUATION, 0, 1, &[])),
        ("empty DATA", open.clone(), frame(frames::DATA, 0, 1, &[])),
        ("PING", bytes::Bytes::new(), frame(frames::PING, 0, 0, &[1; 8])),
        ("SETTINGS", bytes::Bytes::new(), frame(frames::SETTINGS, 0, 0, &[])),
        ("PRIORITY", bytes::Bytes::new(), frame(frames::PRIORITY, 0, 3, &[0, 0, 0, 0, 1])),
        ("WINDOW_UPDATE", open, frame(frames::WINDOW_UPDATE, 0, 1, &1u32.to_be_bytes())),
    ];
    let before = edge.resident();
    let mut failures = Vec::new();
    for (name, first, frame) in floods {
        let many: Vec<u8> = frame.repeat(1000);
        let mut raw = Raw::connect(edge.http).await;
        raw.write(frames::hello()).await;
        raw.write(first).await;
        let mut ended = false;
        for _ in 0..200 {
            use tokio::io::AsyncWriteExt;
            let sent = tokio::time::timeout(Duration::from_secs(5), raw.stream.write_all(&many)).await;
            if !matches!(sent, Ok(Ok(()))) {
                ended = matches!(sent, Ok(Err(_)));
                break;
            }
        }
        let ended = ended || raw.read_to_end(Duration::from_secs(5)).await.end != End::Open;
        if !ended {
            failures.push(format!("{name}: the connection lives on"));
        }
        let grown = edge.resident().saturating_sub(before);
        if grown > 48 * 1024 {
            failures.push(format!("{name}: {grown} KiB more"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    edge.get("/").await.expect_status(200);
}

#[tokio::test]
async fn rule_13_many_small_fields_and_cookie_crumbs_are_limited() {
    let (edge, origin, _records) = recording().await;
    let before = edge.resident();
    let mut crumbs = frames::get("/", "a");
    crumbs.resize(crumbs.len() + 50_000, ("cookie", b"a=b"));
    let mut fields = frames::get("/", "a");
    fields.resize(fields.len() + 50_000, ("x", b""));
    for (name, fields) in [("crumbs", crumbs), ("fields", fields)] {
        let block = frames::block(&fields);
        let mut parts = Vec::new();
        let mut chunks = block.chunks(16_000).peekable();
        let first = chunks.next().expect("a block");
        parts.push(frame(frames::HEADERS, frames::END_STREAM, 1, first));
        while let Some(chunk) = chunks.next() {
            let flags = if chunks.peek().is_none() { frames::END_HEADERS } else { 0 };
            parts.push(frame(frames::CONTINUATION, flags, 1, chunk));
        }
        let outcome = Http2::send(&edge, &parts, Duration::from_secs(3)).await;
        let refused = outcome.has(frames::GOAWAY)
            || outcome.has(frames::RST_STREAM)
            || outcome.end != End::Open
            || outcome.status(1).is_some_and(|status| status != 200);
        assert!(refused && origin.requests() == 0, "{name}: {:?}", outcome.status(1));
    }
    assert!(edge.resident() < before + 64 * 1024, "{before} KiB before, {} KiB after", edge.resident());
}

#[tokio::test]
async fn rule_16_headers_of_trust_cannot_be_sent_by_a_client() {
    let origin = echo::start().await;
    let edge = Edge::file()
        .config(json!({"nginx_config": {"http": {"real_ip_from": ["192.0.2.1"]}}}))
        .route(json!({"id": "r", "uri": "/*", "plugins": {"key-auth": {}}, "upstream": origin.upstream()}))
        .resource("consumers", json!({"username": "ann", "plugins": {"key-auth": {"key": "k"}}}))
        .start()
        .await;
    let names = [
        "X-Consumer-Username",
        "X-Consumer-Groups",
        "X-Consumer-Custom-Id",
        "X-Credential-Identifier",
        "X-Userinfo",
        "X-Forwarded-Client-Cert",
        "X-Real-IP",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-Port",
    ];
    for name in names {
        for spelling in [name.to_owned(), name.to_lowercase(), name.to_uppercase(), name.replace('-', "_")] {
            for mut connection in [Connection::http1(edge.http).await, Connection::http2(edge.http).await] {
                let call = Call::get("/").header("apikey", "k").header(&spelling, "spoofed");
                let seen = connection.send(call).await.expect_status(200).json();
                let headers = seen["headers"].to_string();
                assert!(
                    !headers.contains("spoofed"),
                    "{spelling} over {:?}: {headers}",
                    connection.version()
                );
            }
        }
    }
    let seen = edge.send(Call::get("/").header("apikey", "k")).await.json();
    assert_eq!(seen["headers"]["x-consumer-username"], json!(["ann"]));
}
