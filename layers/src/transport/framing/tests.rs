//! Raw bytes in, verdicts out: each case whole, and in pieces of every small size.

use std::task::Waker;

use proptest::prelude::*;

use super::*;

/// A transport that hands out its bytes in pieces.
struct Pieces<'a> {
    bytes: &'a [u8],
    size: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let taken = self.bytes.len().min(self.size).min(buf.remaining());
        buf.put_slice(&self.bytes[..taken]);
        self.bytes = &self.bytes[taken..];
        Poll::Ready(Ok(()))
    }
}

/// What came out of a guard, and how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Out {
    passed: Vec<u8>,
    refusal: Option<Refusal>,
    broken: Option<Violation>,
    position: Position,
}

fn run(bytes: &[u8], size: usize, room: usize) -> Out {
    run_with(Guard::new(HeadLimits::default()), bytes, size, room)
}

fn run_with(mut guard: Guard, bytes: &[u8], size: usize, room: usize) -> Out {
    let mut io = Pieces { bytes, size };
    let mut passed = Vec::new();
    let mut cx = Context::from_waker(Waker::noop());
    let mut broken = None;
    loop {
        let mut space = vec![0; room];
        let mut buf = ReadBuf::new(&mut space);
        match guard.poll_read(Pin::new(&mut io), &mut cx, &mut buf) {
            Poll::Ready(Ok(())) if buf.filled().is_empty() => break,
            Poll::Ready(Ok(())) => passed.extend_from_slice(buf.filled()),
            Poll::Ready(Err(error)) => {
                broken = error.into_inner().and_then(|e| e.downcast::<Violation>().ok()).map(|v| *v);
                break;
            }
            Poll::Pending => break,
        }
    }
    Out { passed, refusal: guard.refusal(), broken, position: guard.position() }
}

fn in_every_way(bytes: &[u8], check: impl Fn(&Out, &str)) {
    for (size, room) in
        [(usize::MAX, 65_536), (1, 65_536), (2, 65_536), (3, 7), (7, 3), (17, 65_536), (usize::MAX, 5)]
    {
        check(&run(bytes, size, room), &format!("in pieces of {size} into {room}"));
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn well_formed_requests_pass_unchanged() {
    let cases: &[(&str, String)] = &[
        ("plain", GET.to_owned()),
        ("1.0 without host", "GET / HTTP/1.0\r\n\r\n".to_owned()),
        ("two pipelined", GET.repeat(2)),
        ("empty line before", format!("\r\n{GET}")),
        ("body by length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello".to_owned() + GET),
        ("zero length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned() + GET),
        ("body that looks like a head", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nGET \n\r\n\0".to_owned() + GET),
        ("chunks", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_owned() + GET),
        ("chunks with extension", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:  Chunked \r\n\r\n5;a=\"b\"\r\nhello\r\n0\r\n\r\n".to_owned()),
        ("chunks with trailers", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\nZ:\r\n\r\n".to_owned() + GET),
        ("largest chunk digits", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000001\r\nx\r\n0\r\n\r\n".to_owned()),
        ("empty value, tab in value", "GET / HTTP/1.1\r\nHost:\r\nX: a\tb\r\nY:\r\n\r\n".to_owned()),
        ("bytes beyond ASCII in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \u{e9}\r\n\r\n".to_owned()),
        ("absolute form", "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("asterisk form", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("many token bytes", "M-SEARCH!#$ / HTTP/1.1\r\nHost: a\r\nX_~`|^: 1\r\n\r\n".to_owned()),
        ("a similar name", "GET / HTTP/1.1\r\nHost: a\r\nContent-Lengthy: x\r\nXost: b\r\n\r\n".to_owned()),
    ];
    for (what, text) in cases {
        in_every_way(text.as_bytes(), |out, how| {
            assert_eq!(String::from_utf8_lossy(&out.passed), *text, "{what} {how}");
            assert_eq!(
                (out.refusal, out.broken, out.position),
                (None, None, Position::Between),
                "{what} {how}"
            );
        });
    }
}

#[test]
fn heads_that_readers_could_disagree_on_are_refused() {
    use Violation as V;
    let field = |field: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n").into_bytes();
    let cases: Vec<(&str, Vec<u8>, V)> = vec![
        ("length then chunked", field("Content-Length: 5\r\nTransfer-Encoding: chunked"), V::BothLengths),
        ("chunked then length", field("Transfer-Encoding: chunked\r\nContent-Length: 5"), V::BothLengths),
        (
            "chunked then zero length",
            field("Transfer-Encoding: chunked\r\nContent-Length: 0"),
            V::BothLengths,
        ),
        ("two lengths", field("Content-Length: 5\r\nContent-Length: 6"), V::ContentLength),
        ("the same length twice", field("Content-Length: 5\r\ncontent-length: 5"), V::ContentLength),
        ("list of lengths", field("Content-Length: 5, 5"), V::ContentLength),
        ("plus", field("Content-Length: +5"), V::ContentLength),
        ("minus", field("Content-Length: -5"), V::ContentLength),
        ("hexadecimal", field("Content-Length: 0x5"), V::ContentLength),
        ("empty length", field("Content-Length:"), V::ContentLength),
        ("blank length", field("Content-Length:   "), V::ContentLength),
        ("length with a space inside", field("Content-Length: 1 2"), V::ContentLength),
        ("length over 64 bits", field("Content-Length: 18446744073709551616"), V::ContentLength),
        ("encoding list", field("Transfer-Encoding: gzip, chunked"), V::TransferEncoding),
        (
            "encoding twice",
            field("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            V::TransferEncoding,
        ),
        ("identity", field("Transfer-Encoding: identity"), V::TransferEncoding),
        ("empty encoding", field("Transfer-Encoding:"), V::TransferEncoding),
        ("quoted encoding", field("Transfer-Encoding: \"chunked\""), V::TransferEncoding),
        ("encoding with a parameter", field("Transfer-Encoding: chunked;x"), V::TransferEncoding),
        ("encoding behind a vertical tab", field("Transfer-Encoding: \u{b}chunked"), V::TransferEncoding),
        (
            "encoding in 1.0",
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
            V::TransferEncoding,
        ),
        ("space before the colon", field("Content-Length : 5"), V::FieldName),
        ("tab before the colon", field("Transfer-Encoding\t: chunked"), V::FieldName),
        ("empty name", field(": x"), V::FieldName),
        ("no colon", field("X"), V::FieldName),
        ("space inside a name", field("X Y: z"), V::FieldName),
        ("folded", field("X: y\r\n z"), V::FieldName),
        ("folded with a tab", field("X: y\r\n\tz"), V::FieldName),
        ("folded first", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n".to_vec(), V::FieldName),
        ("name beyond ASCII", field("X\u{e9}: y"), V::FieldName),
        ("NUL in a value", field("X: a\0b"), V::Control),
        ("NUL in a name", field("X\0: b"), V::FieldName),
        ("DEL in a value", field("X: a\x7fb"), V::Control),
        ("bare CR in a value", field("X: a\rb"), V::LineEnd),
        ("bare LF as line end", b"GET / HTTP/1.1\nHost: a\n\n".to_vec(), V::LineEnd),
        ("bare LF in the middle", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n".to_vec(), V::LineEnd),
        ("bare LF as last line", b"GET / HTTP/1.1\r\nHost: a\r\n\n".to_vec(), V::LineEnd),
        ("CR CR LF", b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n".to_vec(), V::LineEnd),
        ("no host", b"GET / HTTP/1.1\r\n\r\n".to_vec(), V::Host),
        ("two hosts", field("Host: a"), V::Host),
        ("no version", b"GET /\r\n\r\n".to_vec(), V::RequestLine),
        ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("lower case version", b"GET / http/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("space in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("space after the version", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("no target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("no method", b" / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("method with a colon", b"GE:T / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("tab as separator", b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("fragment", b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::Target),
        ("control in the target", b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::RequestLine),
        ("TLS on a plain port", b"\x16\x03\x01\x02\n".to_vec(), V::LineEnd),
        ("five empty lines before", b"\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\n\r\n".to_vec(), V::LeadingLines),
        ("bare LF before", b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), V::LineEnd),
    ];
    for (what, bytes, violation) in cases {
        let mut twice = GET.as_bytes().to_vec();
        twice.extend(&bytes);
        twice.extend(GET.as_bytes());
        in_every_way(&bytes, |out, how| {
            assert_eq!(out.refusal, Some(Refusal { request: 1, violation }), "{what} {how}");
            assert_harmless(&out.passed, what);
        });
        in_every_way(&twice, |out, how| {
            assert_eq!(out.refusal, Some(Refusal { request: 2, violation }), "{what}, second, {how}");
            assert_harmless(out.passed.strip_prefix(GET.as_bytes()).expect("the first passes"), what);
        });
    }
}

/// What stands in for a refused head asks for nothing and ends the connection.
fn assert_harmless(passed: &[u8], what: &str) {
    let text = std::str::from_utf8(passed).unwrap();
    assert!(text.ends_with(" HTTP/1.1\r\nConnection: close\r\n\r\n"), "{what}: {text:?}");
    assert_eq!(text.matches("\r\n").count(), 3, "{what}: {text:?}");
}

#[test]
fn a_refused_head_keeps_its_good_request_line_for_the_log() {
    let out = run(b"PUT /x?y HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", usize::MAX, 4096);
    assert_eq!(out.passed, b"PUT /x?y HTTP/1.1\r\nConnection: close\r\n\r\n");
}

#[test]
fn the_engine_refuses_no_target_that_passes() {
    for byte in 0x21..=0x7eu8 {
        for target in [format!("/a{}b", char::from(byte)), format!("/a?b{}c", char::from(byte))] {
            let out = run(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes(), usize::MAX, 4096);
            assert_eq!(out.refusal.is_none(), byte != b'#', "{target}");
            let passed = String::from_utf8(out.passed).unwrap();
            let passed = passed.split(' ').nth(1).unwrap();
            assert_eq!(http::Uri::try_from(passed).unwrap().to_string(), passed, "{target}");
        }
    }
}

#[test]
fn bytes_that_may_not_stand_in_a_target_go_on_encoded() {
    let plain = "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n\"<>";
    let odd = "GET /\u{e9}?f={\"a\":1}&g=<`> HTTP/1.1\r\nHost: a\r\nX: \"<>`\u{e9}\r\n\r\n";
    let encoded = "GET /%C3%A9?f={%22a%22:1}&g=%3C%60%3E HTTP/1.1\r\nHost: a\r\nX: \"<>`\u{e9}\r\n\r\n";
    in_every_way(format!("\r\n{odd}{plain}{odd}{odd}{GET}").as_bytes(), |out, how| {
        let expected = format!("\r\n{encoded}{plain}{encoded}{encoded}{GET}");
        assert_eq!(String::from_utf8_lossy(&out.passed), expected, "{how}");
        assert_eq!((out.refusal, out.position), (None, Position::Between), "{how}");
    });
}

#[test]
fn limits_have_their_own_status() {
    let limits = HeadLimits { line: 64, head: 256, fields: 3 };
    let long_line = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(80));
    let endless_line = format!("GET /{}", "x".repeat(80));
    let long_head = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(300));
    let endless_head = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(300));
    let fields = "GET / HTTP/1.1\r\nHost: a\r\nB: 1\r\nC: 1\r\nD: 1\r\n\r\n".to_owned();
    for (text, reason) in [
        (long_line, Reason::UriTooLong),
        (endless_line, Reason::UriTooLong),
        (long_head, Reason::HeadersTooLarge),
        (endless_head, Reason::HeadersTooLarge),
        (fields, Reason::HeadersTooLarge),
    ] {
        for size in [1, 10, usize::MAX] {
            let out = run_with(Guard::new(limits), text.as_bytes(), size, 4096);
            assert_eq!(out.refusal.map(|r| r.violation.reason()), Some(reason), "{text} in {size}");
        }
    }
    let exactly = "GET / HTTP/1.1\r\nHost: a\r\nB: 1\r\nC: 1\r\n\r\n";
    assert_eq!(run_with(Guard::new(limits), exactly.as_bytes(), usize::MAX, 4096).passed, exactly.as_bytes());
}

#[test]
fn broken_chunks_end_the_body_with_an_error() {
    use Violation as V;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = format!("1;{}\r\nx\r\n", "e".repeat(9000));
    let cases: &[(&str, &str, V)] = &[
        ("no digit", "\r\n", V::ChunkSize),
        ("sign", "+5\r\nhello\r\n", V::ChunkSize),
        ("prefix", "0x5\r\nhello\r\n", V::ChunkSize),
        ("no hexadecimal digit", "5g\r\nhello\r\n", V::ChunkSize),
        ("seventeen digits", "00000000000000005\r\nhello\r\n", V::ChunkSize),
        ("overflow", "fffffffffffffffff\r\n", V::ChunkSize),
        ("space after the size", "5 \r\nhello\r\n", V::ChunkSize),
        ("bare LF after the size", "5\nhello\r\n", V::ChunkSize),
        ("bare CR after the size", "5\rhello\r\n", V::ChunkSize),
        ("bare LF in an extension", "5;a\nhello\r\n", V::ChunkExtension),
        ("bare CR in an extension", "5;a\rb\r\nhello\r\n", V::ChunkSize),
        ("NUL in an extension", "5;\0\r\nhello\r\n", V::ChunkExtension),
        ("endless extension", &long, V::ChunkExtension),
        ("chunk too long", "5\r\nhello!\r\n0\r\n\r\n", V::ChunkEnd),
        ("chunk too short", "5\r\nhell\r\n0\r\n\r\n", V::ChunkEnd),
        ("bare LF after a chunk", "5\r\nhello\n0\r\n\r\n", V::ChunkEnd),
        ("bare LF at the end", "0\r\n\n", V::Trailers),
        ("folded trailer", "0\r\n X: y\r\n\r\n", V::Trailers),
        ("bare LF in trailers", "0\r\nX: y\n\r\n", V::Trailers),
        ("NUL in trailers", "0\r\nX: \0\r\n\r\n", V::Trailers),
        ("trailer without name", "0\r\n: y\r\n\r\n", V::Trailers),
    ];
    for (what, body, violation) in cases {
        let bytes = format!("{head}{body}{GET}");
        in_every_way(bytes.as_bytes(), |out, how| {
            assert_eq!(out.broken, Some(*violation), "{what} {how}");
            assert!(out.passed.starts_with(head.as_bytes()), "{what} {how}");
            assert!(!out.passed.ends_with(GET.as_bytes()), "{what} {how}");
        });
    }
}

#[test]
fn bytes_behind_an_upgrade_wait_for_its_answer() {
    let head = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n";
    let connect = "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n";
    for request in [head, connect] {
        for size in [1, usize::MAX] {
            let bytes = format!("{request}\x01\x02 not HTTP\n");
            let mut guard = Guard::new(HeadLimits::default());
            let mut io = Pieces { bytes: bytes.as_bytes(), size };
            let passed = drain(&mut guard, &mut io);
            assert_eq!(String::from_utf8_lossy(&passed), request);
            assert_eq!((guard.position(), guard.refusal()), (Position::Waiting, None));
            guard.switched(true);
            assert_eq!(drain(&mut guard, &mut io), b"\x01\x02 not HTTP\n");
            assert_eq!(guard.position(), Position::Blind);
        }
        let bytes = format!("{request}{GET}");
        let mut guard = Guard::new(HeadLimits::default());
        let mut io = Pieces { bytes: bytes.as_bytes(), size: usize::MAX };
        assert_eq!(String::from_utf8_lossy(&drain(&mut guard, &mut io)), request);
        guard.switched(false);
        assert_eq!(drain(&mut guard, &mut io), GET.as_bytes(), "refused: the next request follows");
    }
}

fn drain(guard: &mut Guard, io: &mut Pieces<'_>) -> Vec<u8> {
    let mut cx = Context::from_waker(Waker::noop());
    let mut all = Vec::new();
    loop {
        let mut space = [0; 64];
        let mut buf = ReadBuf::new(&mut space);
        match guard.poll_read(Pin::new(io), &mut cx, &mut buf) {
            Poll::Ready(Ok(())) if !buf.filled().is_empty() => all.extend_from_slice(buf.filled()),
            _ => return all,
        }
    }
}

#[test]
fn a_head_that_is_given_up_is_refused_as_it_stands() {
    for (sent, line) in [("POST /x HTTP/1.1\r\nHost: a\r\nX: y", "POST /x"), ("POST /x HTT", "GET /")] {
        let mut guard = Guard::new(HeadLimits::default());
        drain(&mut guard, &mut Pieces { bytes: sent.as_bytes(), size: 5 });
        guard.expire();
        let passed = drain(&mut guard, &mut Pieces { bytes: GET.as_bytes(), size: 5 });
        assert_eq!(String::from_utf8_lossy(&passed), format!("{line} HTTP/1.1\r\nConnection: close\r\n\r\n"));
        assert_eq!(guard.refusal(), Some(Refusal { request: 1, violation: Violation::Slow }));
    }
    let mut guard = Guard::new(HeadLimits::default());
    guard.expire();
    assert_eq!(guard.refusal(), None, "between requests there is nothing to refuse");
}

#[test]
fn a_head_cut_off_passes_nothing() {
    for cut in 1..GET.len() {
        let out = run(&GET.as_bytes()[..cut], usize::MAX, 4096);
        assert_eq!((out.passed.len(), out.position), (0, Position::Head), "cut at {cut}");
    }
}

proptest! {
    #[test]
    fn the_verdict_does_not_depend_on_the_pieces(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "GET / HTTP/1.1\r\n", "POST /x HTTP/1.1\r\n", "Host: a\r\n", "Content-Length: 3\r\n", "abc",
                "Transfer-Encoding: chunked\r\n", "\r\n", "3\r\n", "0\r\n", "\n", "\r", " ", ":", "X: y\r\n",
                "Upgrade: z\r\n", "\0", ";e", "GET /\" HTTP/1.1\r\nHost: a\r\n",
            ]),
            0..24,
        ),
        size in 1usize..40,
        room in 1usize..40,
    ) {
        let bytes = parts.concat();
        let whole = run(bytes.as_bytes(), usize::MAX, 65_536);
        let pieces = run(bytes.as_bytes(), size, room);
        prop_assert_eq!(&whole.passed, &pieces.passed);
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..512), size in 1usize..64) {
        run(&bytes, size, 64);
    }
}
