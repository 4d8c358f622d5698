//! Raw bytes in, verdicts out: each case whole, and in pieces of every small size.

use proptest::prelude::*;

use super::*;

/// What a connection makes of its bytes: its messages, and why it does not go on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Out {
    /// Each good head, and what its body brought.
    messages: Vec<Message>,
    refused: Option<Violation>,
    broken: Option<Violation>,
    /// Bytes behind the last whole message.
    left: usize,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    line: String,
    fields: Vec<(String, Vec<u8>)>,
    facts: String,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
    whole: bool,
}

fn run(bytes: &[u8], size: usize) -> Out {
    run_within(HeadLimits::default(), bytes, size)
}

/// Reads `bytes` as a connection does to which they come in pieces of `size`.
fn run_within(limits: HeadLimits, bytes: &[u8], size: usize) -> Out {
    let mut out = Out::default();
    let mut reader = HeadReader::new(limits);
    // What has come and was not taken.
    let mut here: Vec<u8> = Vec::new();
    let mut body: Option<Rest> = None;
    for piece in bytes.chunks(size.min(bytes.len()).max(1)) {
        here.extend_from_slice(piece);
        loop {
            let Some(rest) = &mut body else {
                match reader.read(&here) {
                    Ok(None) => break,
                    Err(violation) => {
                        out.refused = Some(violation);
                        return out;
                    }
                    Ok(Some(length)) => {
                        out.messages.push(message(&reader, &here));
                        let facts = reader.facts();
                        body = match facts.length {
                            _ if facts.chunked => Some(Rest::Chunks(Chunks::new(limits))),
                            Some(length @ 1..) => Some(Rest::Length(length)),
                            _ => None,
                        };
                        out.messages.last_mut().unwrap().whole = body.is_none();
                        reader.restart();
                        here.drain(..length);
                        continue;
                    }
                }
            };
            if here.is_empty() {
                break;
            }
            let current = out.messages.last_mut().unwrap();
            let (taken, over) = match rest {
                Rest::Length(left) => {
                    let taken = here.len().min(*left as usize);
                    current.body.extend_from_slice(&here[..taken]);
                    *left -= taken as u64;
                    (taken, *left == 0)
                }
                Rest::Chunks(chunks) => match chunks.next(&here) {
                    Ok(Part::Data(taken)) => {
                        current.body.extend_from_slice(&here[..taken]);
                        (taken, false)
                    }
                    Ok(Part::Framing(taken)) => (taken, chunks.is_over()),
                    Ok(Part::Over) => panic!("asked again after the end"),
                    Err(violation) => {
                        out.broken = Some(violation);
                        return out;
                    }
                },
            };
            assert!(taken > 0, "no progress");
            here.drain(..taken);
            if over {
                if let Some(Rest::Chunks(mut chunks)) = body.take() {
                    match chunks.trailers() {
                        Ok(trailers) => current.trailers = trailers,
                        Err(violation) => {
                            out.broken = Some(violation);
                            return out;
                        }
                    }
                    assert_eq!(chunks.next(b"x"), Ok(Part::Over));
                }
                current.whole = true;
            }
        }
    }
    out.left = here.len();
    out
}

enum Rest {
    Length(u64),
    Chunks(Chunks),
}

fn message(reader: &HeadReader, bytes: &[u8]) -> Message {
    let text = |range: Range<usize>| String::from_utf8_lossy(&bytes[range]).into_owned();
    let (method, target) = reader.request_line().unwrap();
    Message {
        line: format!("{} {}", text(method), text(target)),
        fields: reader
            .fields()
            .iter()
            .map(|place| (text(place.name()), bytes[place.value()].to_vec()))
            .collect(),
        facts: format!("{:?}", reader.facts()),
        ..Message::default()
    }
}

/// Whole, and in pieces of every small size.
fn in_every_way(bytes: &[u8], check: impl Fn(&Out, &str)) {
    for size in [usize::MAX, 1, 2, 3, 7, 17] {
        check(&run(bytes, size), &format!("in pieces of {size}"));
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn well_formed_requests_pass() {
    let cases: &[(&str, String, &[&str])] = &[
        ("plain", GET.to_owned(), &[""]),
        ("1.0 without host", "GET / HTTP/1.0\r\n\r\n".to_owned(), &[""]),
        ("two pipelined", GET.repeat(2), &["", ""]),
        ("empty line before", format!("\r\n{GET}"), &[""]),
        ("body by length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello".to_owned() + GET, &["hello", ""]),
        ("zero length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned() + GET, &["", ""]),
        ("body that looks like a head", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nGET \n\r\n\0".to_owned() + GET, &["GET \n\r\n\0", ""]),
        ("chunks", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_owned() + GET, &["hello", ""]),
        ("chunks with extension", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:  Chunked \r\n\r\n5;a=\"b\"\r\nhello\r\n0\r\n\r\n".to_owned(), &["hello"]),
        ("chunks with trailers", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\nZ:\r\n\r\n".to_owned() + GET, &["", ""]),
        ("largest chunk digits", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000001\r\nx\r\n0\r\n\r\n".to_owned(), &["x"]),
        ("empty value, tab in value", "GET / HTTP/1.1\r\nHost:\r\nX: a\tb\r\nY:\r\n\r\n".to_owned(), &[""]),
        ("bytes beyond ASCII in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: \u{e9}\r\n\r\n".to_owned(), &[""]),
        ("absolute form", "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), &[""]),
        ("asterisk form", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), &[""]),
        ("many token bytes", "M-SEARCH!#$ / HTTP/1.1\r\nHost: a\r\nX_~`|^: 1\r\n\r\n".to_owned(), &[""]),
        ("a similar name", "GET / HTTP/1.1\r\nHost: a\r\nContent-Lengthy: x\r\nXost: b\r\n\r\n".to_owned(), &[""]),
    ];
    for (what, text, bodies) in cases {
        in_every_way(text.as_bytes(), |out, how| {
            assert_eq!((out.refused, out.broken, out.left), (None, None, 0), "{what} {how}");
            let got: Vec<_> =
                out.messages.iter().map(|message| String::from_utf8_lossy(&message.body)).collect();
            assert_eq!(got, *bodies, "{what} {how}");
            assert!(out.messages.iter().all(|message| message.whole), "{what} {how}");
        });
    }
}

#[test]
fn what_a_head_says_of_its_message_is_known() {
    let facts = |text: &str| {
        let mut reader = HeadReader::new(HeadLimits::default());
        assert_eq!(reader.read(text.as_bytes()), Ok(Some(text.len())), "{text}");
        *reader.facts()
    };
    let field = |field: &str| facts(&format!("POST / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n"));
    assert!(field("Connection: x, Close").close);
    assert!(field("connection:keep-alive").keep_alive);
    assert!(!field("Connection: closed").close);
    assert!(field("Expect: 100-Continue").expects);
    assert!(!field("Expect: 100").expects);
    assert!(field("TE: gzip;q=1, trailers;q=0.5").trailers);
    assert!(field("Upgrade: x").switches);
    assert!(!facts("GET / HTTP/1.0\r\nUpgrade: x\r\n\r\n").switches);
    assert!(facts("GET / HTTP/1.0\r\n\r\n").http10);
    assert!(facts("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n").connect);
    assert_eq!(field("Content-Length: 007").length, Some(7));
    assert!(field("Transfer-Encoding:\tCHUNKED ").chunked);
    assert!(facts("GET /\"x\" HTTP/1.1\r\nHost: a\r\n\r\n").encode);
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
            assert_eq!((out.refused, out.messages.len()), (Some(violation), 0), "{what} {how}");
        });
        in_every_way(&twice, |out, how| {
            assert_eq!((out.refused, out.messages.len()), (Some(violation), 1), "{what}, second, {how}");
        });
    }
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
            let out = run_within(limits, text.as_bytes(), size);
            assert_eq!(out.refused.map(Violation::reason), Some(reason), "{text} in {size}");
        }
    }
    let exactly = "GET / HTTP/1.1\r\nHost: a\r\nB: 1\r\nC: 1\r\n\r\n";
    assert_eq!(run_within(limits, exactly.as_bytes(), usize::MAX).messages[0].fields.len(), 3);
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
            assert!(out.messages.len() == 1 && !out.messages[0].whole, "{what} {how}");
        });
    }
}

#[test]
fn trailers_are_read_as_fields() {
    let body = |trailers: &str| {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n";
        format!("{head}{trailers}\r\n")
    };
    in_every_way(body("X-Sum:  42\r\nEmpty:\r\nX-Sum: 43\r\n").as_bytes(), |out, how| {
        let trailers = out.messages[0].trailers.as_ref().expect(how);
        let sums: Vec<_> = trailers.get_all("x-sum").iter().collect();
        assert_eq!(sums, ["42", "43"], "{how}");
        assert_eq!(trailers["empty"], "", "{how}");
    });
    in_every_way(body("").as_bytes(), |out, how| assert_eq!(out.messages[0].trailers, None, "{how}"));
    let limits = HeadLimits { line: 64, head: 256, fields: 3 };
    for trailers in ["A: 1\r\nB: 1\r\nC: 1\r\nD: 1\r\n".to_owned(), format!("A: {}\r\n", "x".repeat(300))] {
        let out = run_within(limits, body(&trailers).as_bytes(), usize::MAX);
        assert_eq!(out.broken, Some(Violation::Trailers), "{trailers}");
    }
    for trailers in ["X\r\n", "X : y\r\n", "X Y: z\r\n", "X: y\rz\r\n"] {
        let out = run(body(trailers).as_bytes(), usize::MAX);
        assert_eq!(out.broken, Some(Violation::Trailers), "{trailers:?}");
    }
}

#[test]
fn a_head_cut_off_passes_nothing() {
    for cut in 1..GET.len() {
        let out = run(&GET.as_bytes()[..cut], usize::MAX);
        assert_eq!((out.messages.len(), out.left, out.refused), (0, cut, None), "cut at {cut}");
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
    ) {
        let bytes = parts.concat();
        prop_assert_eq!(run(bytes.as_bytes(), usize::MAX), run(bytes.as_bytes(), size));
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..512), size in 1usize..64) {
        prop_assert_eq!(run(&bytes, usize::MAX), run(&bytes, size));
    }
}
