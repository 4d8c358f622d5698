//! Answers as bytes, however they are cut; requests as bytes; and both over a socket.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::Defect;
use super::connection::Http1;
use super::head::{Asked, Head};
use super::reader::Reader;
use crate::body::{Body, BodyError};
use crate::error::Reason;
use crate::exchange::Exchange;
use crate::target::Timeouts;
use crate::testing::{ExchangeBuilder, exchange};
use crate::upstream::connect;
use crate::upstream::request_body::Outgoing;
use crate::upstream::send::{Failure, Route, Wait};

/// What came of the bytes of one answer and the end of the connection.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    fields: Vec<String>,
    body: Vec<u8>,
    trailers: Vec<String>,
    /// The connection may be used again.
    again: bool,
    /// Bytes behind the answer.
    rest: usize,
}

fn lines(headers: &HeaderMap) -> Vec<String> {
    let line = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut lines: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {}", line(value))).collect();
    lines.sort();
    lines
}

/// Reads an answer from pieces of these sizes, the last of which is repeated.
fn read(bytes: &[u8], asked: Asked<'_>, sizes: &[usize]) -> Result<Answer, Defect> {
    let mut reader = Reader::default();
    let mut rest = bytes;
    let mut sizes = sizes.iter().copied().chain(std::iter::repeat(*sizes.last().unwrap()));
    let mut more = |reader: &mut Reader, rest: &mut &[u8]| {
        let (piece, others) =
            rest.split_at(sizes.next().unwrap().clamp(1, rest.len().max(1)).min(rest.len()));
        *rest = others;
        reader.push(Bytes::copy_from_slice(piece));
        !piece.is_empty()
    };
    let head = loop {
        if let Some(head) = reader.head(asked)? {
            break head;
        }
        if !more(&mut reader, &mut rest) {
            return Err(Defect::CutShort);
        }
    };
    let (mut body, mut trailers) = (Vec::new(), Vec::new());
    loop {
        match reader.frame()?.map(Frame::into_data) {
            Some(Ok(data)) => {
                assert!(!data.is_empty());
                body.extend_from_slice(&data);
            }
            Some(Err(frame)) => trailers = lines(frame.trailers_ref().unwrap()),
            None if reader.body().is_end() => break,
            None if more(&mut reader, &mut rest) => {}
            None => reader.close()?,
        }
    }
    let left = reader.into_rest().len() + rest.len();
    Ok(Answer {
        status: head.status.as_u16(),
        fields: lines(&head.headers),
        body,
        trailers,
        again: head.keep_alive && left == 0,
        rest: left,
    })
}

const GET: Asked<'static> = Asked { method: &Method::GET, switch: false };
const HEAD: Asked<'static> = Asked { method: &Method::HEAD, switch: false };
const SWITCH: Asked<'static> = Asked { method: &Method::GET, switch: true };

#[test]
fn answers_are_understood_however_they_are_cut() {
    let cases: &[(&str, Asked<'_>, &str, &str)] = &[
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            GET,
            "200 content-length: 2|ok||again",
            "a length",
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            GET,
            "200 content-length: 0|||again",
            "an empty one",
        ),
        ("HTTP/1.1 200 OK\r\na: 1\r\n\r\nuntil the end", GET, "200 a: 1|until the end||", "until the end"),
        ("HTTP/1.1 200 OK\r\n\r\n", GET, "200 |||", "nothing until the end"),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
            GET,
            "200 content-length: 2|ok||",
            "HTTP/1.0 closes",
        ),
        (
            "HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 2\r\n\r\nok",
            GET,
            "200 content-length: 2|ok||again",
            "unless it says otherwise",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: keep-alive\r\nconnection: x, close\r\ncontent-length: 0\r\n\r\n",
            GET,
            "200 content-length: 0|||",
            "one close is enough",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: x-a, content-length\r\nx-a: 1\r\nx-b: 2\r\ncontent-length: 0\r\n\r\n",
            GET,
            "200 content-length: 0,x-b: 2|||again",
            "named fields stay, framing does not",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: sum\r\n\r\n\
             3\r\nabc\r\n0a;name=\"v\" ;b\r\n0123456789\r\n0\r\nsum: 1\r\ncontent-length: 5\r\n\r\n",
            GET,
            "200 trailer: sum|abc0123456789|sum: 1|again",
            "chunks with an extension and trailers",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
            GET,
            "200 |||again",
            "no chunk but the last",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1 \r\na\r\n000\r\n\r\nmore",
            GET,
            "200 |a||+4",
            "a space behind a size, and bytes behind the end",
        ),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", HEAD, "200 content-length: 9|||again", "HEAD"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", HEAD, "200 |||again", "HEAD of chunks"),
        ("HTTP/1.1 204 No Content\r\na: 1\r\n\r\n", GET, "204 a: 1|||again", "204"),
        (
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
            GET,
            "304 content-length: 9|||again",
            "304",
        ),
        ("HTTP/1.1 204 No Content\r\n\r\nbody", GET, "204 |||+4", "a body where there is none"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n",
            GET,
            "200 content-length: 2|ok||+19",
            "another answer behind it",
        ),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\nupgrade: h2\r\n\r\n\
             HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            GET,
            "200 content-length: 2|ok||again",
            "heads that only inform",
        ),
        (
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nbytes",
            SWITCH,
            "101 |||+5",
            "a switch, and what follows it",
        ),
        (
            "HTTP/1.1 599 What\r\nA:  b \t\r\nEmpty:\r\na: c\r\n\r\n",
            HEAD,
            "599 a: b,a: c,empty: |||again",
            "fields",
        ),
    ];
    for (bytes, asked, wanted, case) in cases {
        for sizes in [vec![usize::MAX], vec![1], vec![7], vec![40, 3], vec![17, 1]] {
            let got = read(bytes.as_bytes(), *asked, &sizes).map(told);
            assert_eq!(got.as_deref(), Ok(*wanted), "{case}, cut as {sizes:?}");
        }
    }
}

/// `status fields|body|trailers|end`
fn told(answer: Answer) -> String {
    let body = String::from_utf8(answer.body).unwrap();
    let end = match answer.rest {
        _ if answer.again => "again".to_owned(),
        0 => String::new(),
        rest => format!("+{rest}"),
    };
    let (fields, trailers) = (answer.fields.join(","), answer.trailers.join(","));
    format!("{} {fields}|{body}|{trailers}|{end}", answer.status)
}

#[test]
fn what_two_readers_could_understand_differently_is_refused() {
    use Defect::*;
    let chunked = |rest: &str| format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{rest}");
    let fields = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n");
    let many = |count: usize| vec!["a: 1"; count].join("\r\n");
    let cases = [
        ("HTTP/1.1 000 Odd\r\n\r\n".to_owned(), StatusLine, "a status below 100"),
        ("HTTP/1.1 999999 Odd\r\n\r\n".to_owned(), StatusLine, "a status of six digits"),
        ("HTTP/2.0 200 OK\r\n\r\n".to_owned(), StatusLine, "another version"),
        ("HTTP/1.2 200 OK\r\n\r\n".to_owned(), StatusLine, "a version nobody has"),
        ("hello\r\n\r\n".to_owned(), StatusLine, "HTTP/0.9"),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n".to_owned(), StatusLine, "an empty line before it"),
        (fields("bad name: 1"), Field, "a space in a name"),
        (fields("name : 1"), Field, "a space before the colon"),
        (fields(": 1"), Field, "no name"),
        (fields("name"), Field, "no colon"),
        (fields("a: 1\r\n folded"), Field, "a folded line"),
        (fields("a: b\0c"), Field, "NUL"),
        (fields("a: b\rc"), Field, "a CR alone"),
        (fields("a: b\x7f"), Field, "DEL"),
        (fields(&many(101)), TooManyFields, "more fields than allowed"),
        (fields(&format!("a: {}", "b".repeat(70_000))), HeadTooLong, "a head that is too large"),
        (fields("content-length: 2\r\ncontent-length: 3"), ContentLength, "two lengths"),
        (fields("content-length: 2\r\ncontent-length: 2"), ContentLength, "one length twice"),
        (fields("content-length: 2, 2"), ContentLength, "a list"),
        (fields("content-length: +2"), ContentLength, "a sign"),
        (fields("content-length: -2"), ContentLength, "another"),
        (fields("content-length:"), ContentLength, "nothing"),
        (fields("content-length: 0x2"), ContentLength, "not decimal"),
        (fields("content-length: 18446744073709551616"), ContentLength, "more than 64 bits"),
        (fields("transfer-encoding: chunked\r\ncontent-length: 2"), BothLengths, "both"),
        (fields("transfer-encoding: gzip, chunked"), TransferEncoding, "another coding first"),
        (fields("transfer-encoding: chunked\r\ntransfer-encoding: chunked"), TransferEncoding, "twice"),
        (fields("transfer-encoding: identity"), TransferEncoding, "another coding"),
        ("HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(), TransferEncoding, "in HTTP/1.0"),
        ("HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n".to_owned(), Switch, "a switch nobody asked for"),
        ("HTTP/1.1 102 Processing\r\n\r\n".repeat(17), Informational, "no end of information"),
        (chunked("\r\n"), ChunkSize, "no size"),
        (chunked("x\r\n"), ChunkSize, "no number"),
        (chunked("-1\r\n"), ChunkSize, "a sign"),
        (chunked("0x1\r\n"), ChunkSize, "a prefix"),
        (chunked("00000000000000001\r\na"), ChunkSize, "more digits than 64 bits have"),
        (chunked("1\na\n"), ChunkSize, "no CR"),
        (chunked("1\ra\r\n"), ChunkSize, "no LF"),
        (chunked("1 2\r\n"), ChunkSize, "two sizes"),
        (chunked("1;a\nb\r\na\r\n"), ChunkExtension, "LF in an extension"),
        (chunked(&format!("1;{}\r\n", "a".repeat(20_000))), ChunkExtension, "an extension without end"),
        (chunked("1\r\nab\r\n"), ChunkEnd, "a chunk that is too long"),
        (chunked("1\r\na\n0\r\n\r\n"), ChunkEnd, "a chunk that ends with LF"),
        (chunked("0\r\na: 1\n\r\n"), Trailers, "LF in the trailers"),
        (chunked("0\r\na b: 1\r\n\r\n"), Trailers, "a trailer without a name"),
        (chunked(&format!("0\r\na: {}\r\n\r\n", "b".repeat(20_000))), Trailers, "trailers without end"),
        (chunked(&format!("0\r\n{}\r\n\r\n", many(101))), Trailers, "too many trailers"),
        (chunked("5\r\nabc"), CutShort, "the end in a chunk"),
        (chunked("3\r\nabc\r\n"), CutShort, "the end before the last chunk"),
        (chunked("0\r\n"), CutShort, "the end before the last line"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab".to_owned(), CutShort, "less than it said"),
        ("HTTP/1.1 200 OK\r\na: 1\r\n".to_owned(), CutShort, "half a head"),
        (String::new(), CutShort, "nothing at all"),
    ];
    for (bytes, wanted, case) in cases {
        for sizes in [vec![usize::MAX], vec![1], vec![5]] {
            assert_eq!(read(bytes.as_bytes(), GET, &sizes), Err(wanted), "{case}, cut as {sizes:?}");
        }
    }
}

/// A message that hyper and we should understand alike.
fn well_formed() -> impl Strategy<Value = (Vec<u8>, bool)> {
    let name = "(x-[a-z]{1,8}|Server|date|Set-Cookie|content-type|ETag)";
    let value = "[!-~]([ -~\t]{0,20}[!-~])?";
    let fields = proptest::collection::vec((name, value), 0..8);
    let informational = proptest::collection::vec(prop_oneof![Just("100 Continue"), Just("103 Early")], 0..3);
    let pieces = proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..5);
    let trailers = proptest::collection::vec(("x-[a-z]{1,5}", "[!-~]{1,9}"), 0..3);
    let status = prop_oneof![Just(200u16), Just(204), Just(304), Just(404), Just(500), 205u16..=599];
    let extension = "(;[a-z]{1,5}(=\"?[a-z]{0,5}\"?)?)?";
    (informational, status, fields, pieces, trailers, 0..3, extension, any::<bool>(), any::<bool>()).prop_map(
        |(informational, status, fields, pieces, trailers, framing, extension, http10, head)| {
            let mut out = Vec::new();
            for status in informational {
                out.extend_from_slice(format!("HTTP/1.1 {status}\r\nlink: <a>\r\n\r\n").as_bytes());
            }
            // What follows a message without a body would be another message.
            let bodiless = head || matches!(status, 204 | 304);
            let pieces = if bodiless { Vec::new() } else { pieces };
            let chunked = framing == 1 && !http10;
            let version = if http10 { "HTTP/1.0" } else { "HTTP/1.1" };
            out.extend_from_slice(format!("{version} {status} Some reason\r\n").as_bytes());
            for (name, value) in fields {
                out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
            }
            if chunked {
                out.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            } else if framing == 2 {
                let length = pieces.iter().map(Vec::len).sum::<usize>();
                out.extend_from_slice(format!("Content-Length: {length}\r\n\r\n").as_bytes());
            } else {
                out.extend_from_slice(b"\r\n");
            }
            for piece in &pieces {
                if chunked {
                    out.extend_from_slice(format!("{:X}{extension}\r\n", piece.len()).as_bytes());
                }
                out.extend_from_slice(piece);
                if chunked {
                    out.extend_from_slice(b"\r\n");
                }
            }
            if chunked && !bodiless {
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers {
                    out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
                }
                out.extend_from_slice(b"\r\n");
            }
            (out, head)
        },
    )
}

/// What hyper makes of it.
async fn as_hyper_reads(bytes: Vec<u8>, head: bool) -> (u16, Vec<String>, Vec<u8>, Vec<String>) {
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    let (mut sender, engine) = hyper::client::conn::http1::handshake(TokioIo::new(near)).await.unwrap();
    spawn_local(async move {
        let mut request = [0; 1024];
        assert!(far.read(&mut request).await.unwrap() > 0);
        far.write_all(&bytes).await.unwrap();
    });
    spawn_local(engine);
    let method = if head { Method::HEAD } else { Method::GET };
    let request = Request::builder().method(method).uri("/").body(Empty::<Bytes>::new()).unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    response.headers_mut().remove("transfer-encoding");
    let (status, fields) = (response.status().as_u16(), lines(response.headers()));
    let body = response.into_body().collect().await.unwrap();
    let trailers = body.trailers().map(lines).unwrap_or_default();
    (status, fields, body.to_bytes().to_vec(), trailers)
}

proptest! {
    #[test]
    fn what_is_well_formed_is_read_as_hyper_reads_it(
        (bytes, head) in well_formed(),
        sizes in proptest::collection::vec(1usize..60, 1..6),
    ) {
        let asked = if head { HEAD } else { GET };
        let whole = read(&bytes, asked, &[usize::MAX]);
        prop_assert_eq!(&read(&bytes, asked, &sizes), &whole);
        let whole = whole.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let theirs = LocalSet::new().block_on(&runtime, as_hyper_reads(bytes, head));
        prop_assert_eq!((whole.status, whole.fields, whole.body, whole.trailers), theirs);
        prop_assert_eq!(whole.rest, 0);
    }

    #[test]
    fn nothing_that_comes_panics_or_depends_on_how_it_is_cut(
        (mut bytes, _) in well_formed(),
        noise in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        switch: bool,
        sizes in proptest::collection::vec(1usize..60, 1..6),
    ) {
        for (place, byte) in noise {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        let asked = Asked { switch, ..GET };
        let whole = read(&bytes, asked, &[usize::MAX]);
        let pieces = read(&bytes, asked, &sizes);
        // Of a bad head its end is waited for.
        prop_assert!(whole == pieces || (whole.is_err() && pieces.is_err()), "{whole:?} {pieces:?}");
    }
}

fn local<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, test)
}

/// A connection to a peer that does this, and all that the peer is sent.
async fn connected<F: Future<Output = ()> + 'static>(
    peer: impl FnOnce(Peer) -> F + 'static,
) -> (Http1, Rc<RefCell<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let io =
        connect::connect(listener.local_addr().unwrap(), None, None, Duration::from_secs(5)).await.unwrap();
    let seen = Rc::<RefCell<Vec<u8>>>::default();
    let stream = listener.accept().await.unwrap().0;
    spawn_local(peer(Peer { stream, seen: Rc::clone(&seen) }));
    (Http1::new(io), seen)
}

struct Peer {
    stream: TcpStream,
    seen: Rc<RefCell<Vec<u8>>>,
}

impl Peer {
    /// Reads until it has seen `end`.
    async fn read(&mut self, end: &str) {
        let mut piece = vec![0; 64 * 1024];
        while !self.seen.borrow().ends_with(end.as_bytes()) {
            let read = self.stream.read(&mut piece).await.unwrap();
            assert!(read > 0, "{:?}", String::from_utf8_lossy(&self.seen.borrow()));
            self.seen.borrow_mut().extend_from_slice(&piece[..read]);
        }
    }

    async fn write(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).await.unwrap();
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Sends `x` over the connection, as one attempt.
async fn send(connection: &mut Http1, x: &mut Exchange, timeouts: &Timeouts) -> Result<Head, Failure> {
    let outgoing = Outgoing::new(std::mem::take(&mut x.request_body));
    let upgrade = x.request.headers.get("upgrade").cloned();
    let host = HeaderValue::from_static("up.test");
    let route = Route { host: &host, tls: false, upgrade: upgrade.as_ref(), spoken: None };
    let wait = Wait { outgoing: &outgoing, timeouts, started: Instant::now() };
    let sent = connection.send(x, &route, &wait);
    tokio::time::timeout(PATIENCE, sent).await.unwrap()
}

fn limits(read: u64, send: u64) -> Timeouts {
    Timeouts { connect: PATIENCE, read: Duration::from_millis(read), send: Duration::from_millis(send) }
}

/// The rest of the answer's body.
async fn body(connection: &mut Http1) -> Result<String, String> {
    let mut body = Vec::new();
    while let Some(frame) = poll_fn(|cx| connection.poll_frame(cx)).await {
        let frame = frame.map_err(|trouble| trouble.to_string())?;
        body.extend_from_slice(&frame.into_data().unwrap_or_default());
    }
    Ok(String::from_utf8(body).unwrap())
}

fn streamed(pieces: Vec<Result<Frame<Bytes>, BodyError>>) -> Body {
    Body::boxed(StreamBody::new(futures_util::stream::iter(pieces)))
}

/// A body that is given as it is sent.
fn given() -> (tokio::sync::mpsc::UnboundedSender<Bytes>, Body) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
    let pieces = futures_util::stream::unfold(receiver, |mut receiver| async move {
        let piece = receiver.recv().await?;
        Some((Ok::<_, BodyError>(Frame::data(piece)), receiver))
    });
    (sender, Body::boxed(StreamBody::new(pieces)))
}

const DONE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

#[test]
fn requests_are_written_from_the_fields_of_the_exchange() {
    let get = || exchange("GET", "http://a.test/b?c=d");
    let post = || exchange("POST", "http://a.test/");
    let piece = |text: &'static str| Ok(Frame::data(Bytes::from(text)));
    let trailers = |fields: &[(&'static str, &'static str)]| {
        let fields =
            fields.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
        Ok(Frame::trailers(fields.collect()))
    };
    let large = "x".repeat(5000);
    let cases: Vec<(ExchangeBuilder, &str, String)> = vec![
        (get(), "nothing", "GET /b?c=d HTTP/1.1\r\nhost: up.test\r\n\r\n".into()),
        (
            get().header("host", "a.test").header("X-A", "1").header("accept", "b").header("x-a", "2"),
            "fields with all their values, and our host",
            "GET /b?c=d HTTP/1.1\r\nhost: up.test\r\nx-a: 1\r\nx-a: 2\r\naccept: b\r\n\r\n".into(),
        ),
        (
            get()
                .header("connection", "x-a, keep-alive")
                .header("x-a", "1")
                .header("keep-alive", "2")
                .header("te", "trailers")
                .header("expect", "100-continue")
                .header("proxy-authorization", "s")
                .header("transfer-encoding", "chunked")
                .header("x-b", "3"),
            "not those of the client's connection",
            "GET /b?c=d HTTP/1.1\r\nhost: up.test\r\nx-b: 3\r\n\r\n".into(),
        ),
        (
            get().header("connection", "upgrade").header("upgrade", "x"),
            "a switch",
            "GET /b?c=d HTTP/1.1\r\nhost: up.test\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n".into(),
        ),
        (
            post().header("content-length", "0"),
            "an empty body that was said to be one",
            "POST / HTTP/1.1\r\nhost: up.test\r\ncontent-length: 0\r\n\r\n".into(),
        ),
        (
            post().header("content-length", "9").body("abc"),
            "a body that is here has its own length",
            "POST / HTTP/1.1\r\nhost: up.test\r\ncontent-length: 3\r\n\r\nabc".into(),
        ),
        (
            post().body(large.clone()),
            "a large one",
            format!("POST / HTTP/1.1\r\nhost: up.test\r\ncontent-length: 5000\r\n\r\n{large}"),
        ),
        (
            post().header("content-length", "6").body(streamed(vec![piece("abc"), piece(""), piece("def")])),
            "a body of unknown length is chunked, whatever was said",
            "POST / HTTP/1.1\r\nhost: up.test\r\ntransfer-encoding: chunked\r\n\r\n\
             3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
                .into(),
        ),
        (
            post().body(streamed(vec![
                piece("abc"),
                Ok(Frame::data(Bytes::from(large.clone()))),
                piece("d"),
            ])),
            "small and large chunks",
            format!(
                "POST / HTTP/1.1\r\nhost: up.test\r\ntransfer-encoding: chunked\r\n\r\n\
                 3\r\nabc\r\n1388\r\n{large}\r\n1\r\nd\r\n0\r\n\r\n"
            ),
        ),
        (
            post().header("trailer", "x-sum, host").body(streamed(vec![
                piece("abc"),
                trailers(&[("x-sum", "1"), ("x-other", "2"), ("host", "b")]),
            ])),
            "trailers that were announced and may stand there",
            "POST / HTTP/1.1\r\nhost: up.test\r\ntrailer: x-sum, host\r\ntransfer-encoding: chunked\r\n\r\n\
             3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"
                .into(),
        ),
        (
            exchange("GET", "http://a.test/").body(streamed(vec![piece("abc")])),
            "a body of a GET is not lost",
            "GET / HTTP/1.1\r\nhost: up.test\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                .into(),
        ),
    ];
    local(async {
        for (request, case, wanted) in cases {
            let end = wanted.clone();
            let (mut connection, seen) = connected(|mut peer: Peer| async move {
                peer.read(&end).await;
                peer.write(DONE).await;
                std::future::pending().await
            })
            .await;
            let sent = send(&mut connection, &mut request.build(), &limits(5000, 5000)).await;
            assert!(sent.is_ok(), "{case}: {sent:?}, {:?}", String::from_utf8_lossy(&seen.borrow()));
            assert_eq!(String::from_utf8_lossy(&seen.borrow()), wanted, "{case}");
            assert!(connection.is_ready(), "{case}");
        }
    });
}

#[test]
fn a_connection_is_used_again_only_when_nothing_is_left_on_it() {
    const CLOSE: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
    const MORE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok!";
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let cases = [
        (OK, "", true, "both are finished"),
        (CLOSE, "", false, "the peer wants to close"),
        (MORE, "", false, "a byte came behind the answer"),
        (OK, "!", false, "a byte came later"),
        ("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", "", false, "HTTP/1.0"),
    ];
    local(async {
        let cx = &mut std::task::Context::from_waker(Waker::noop());
        for (answer, later, again, case) in cases {
            let (tell, told) = tokio::sync::oneshot::channel::<()>();
            let (mut connection, _) = connected(move |mut peer: Peer| async move {
                peer.read("\r\n\r\n").await;
                peer.write(answer).await;
                told.await.unwrap();
                peer.write(later).await;
                std::future::pending().await
            })
            .await;
            let mut x = exchange("GET", "http://a.test/").build();
            send(&mut connection, &mut x, &limits(5000, 5000)).await.unwrap();
            assert_eq!(body(&mut connection).await.as_deref(), Ok("ok"), "{case}");
            tell.send(()).unwrap();
            let deadline = Instant::now() + PATIENCE;
            while connection.is_still_ready(cx) && !later.is_empty() {
                assert!(Instant::now() < deadline, "{case}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(connection.is_still_ready(cx), again, "{case}");
        }

        let (mut connection, _) = connected(|peer: Peer| async move { drop(peer) }).await;
        let deadline = Instant::now() + PATIENCE;
        while connection.is_still_ready(cx) {
            assert!(Instant::now() < deadline, "closed while it idled");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn an_upstream_that_takes_no_more_may_have_said_why() {
    local(async {
        let (mut connection, _) = connected(|mut peer: Peer| async move {
            let mut some = [0; 1000];
            assert!(peer.stream.read(&mut some).await.unwrap() > 0);
            peer.write("HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig").await;
        })
        .await;
        let mut x = exchange("POST", "http://a.test/").body("x".repeat(20_000_000)).build();
        let head = send(&mut connection, &mut x, &limits(5000, 5000)).await.unwrap();
        assert_eq!(head.status, 413);
        assert_eq!(body(&mut connection).await.as_deref(), Ok("big"));
        assert!(!connection.is_ready());
    });
}

#[test]
fn who_lets_time_pass_is_blamed() {
    local(async {
        let silent = |mut peer: Peer| async move {
            peer.read("0\r\n\r\n").await;
            std::future::pending().await
        };
        let (mut connection, _) = connected(silent).await;
        let piece = Ok(Frame::data(Bytes::from_static(b"abc")));
        let mut x = exchange("POST", "http://a.test/").body(streamed(vec![piece])).build();
        let failure = send(&mut connection, &mut x, &limits(100, 9000)).await.unwrap_err();
        assert_eq!(failure.error.reason(), Reason::ReadTimeout, "it has everything and says nothing");
        assert!(failure.silent && !failure.unsent);

        let (mut connection, _) = connected(|peer: Peer| async move {
            let _open = peer;
            std::future::pending().await
        })
        .await;
        let large = || Ok(Frame::data(Bytes::from(vec![b'a'; 1_000_000])));
        let mut x =
            exchange("POST", "http://a.test/").body(streamed((0..40).map(|_| large()).collect())).build();
        let failure = send(&mut connection, &mut x, &limits(9000, 100)).await.unwrap_err();
        assert_eq!(failure.error.reason(), Reason::SendTimeout, "it does not read");

        let (mut connection, _) = connected(|mut peer: Peer| async move {
            peer.read("0\r\n\r\n").await;
            peer.write(DONE).await;
            std::future::pending().await
        })
        .await;
        let (pieces, slow) = given();
        let mut x = exchange("POST", "http://a.test/").body(slow).build();
        spawn_local(async move {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_millis(60)).await;
                pieces.send(Bytes::from_static(b"a")).unwrap();
            }
        });
        let sent = send(&mut connection, &mut x, &limits(100, 100)).await;
        assert!(sent.is_ok(), "a slow client is not the upstream's fault: {sent:?}");
    });
}

#[test]
fn a_request_whose_answer_has_begun_ends_with_its_connection_or_in_time() {
    async fn begun(send_limit: u64) -> (Http1, tokio::sync::mpsc::UnboundedSender<Bytes>) {
        let (mut connection, _) = connected(|mut peer: Peer| async move {
            peer.read("\r\n\r\n").await;
            peer.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").await;
            std::future::pending().await
        })
        .await;
        let (pieces, given) = given();
        let mut x = exchange("POST", "http://a.test/").body(given).build();
        send(&mut connection, &mut x, &limits(5000, send_limit)).await.unwrap();
        (connection, pieces)
    }
    local(async {
        let over = |pieces: tokio::sync::mpsc::UnboundedSender<Bytes>| async move {
            tokio::time::timeout(PATIENCE, pieces.closed()).await
        };
        let (connection, pieces) = begun(9000).await;
        assert!(!connection.is_ready());
        drop(connection);
        assert!(over(pieces).await.is_ok(), "the answer was given up, and the request with it");

        let (connection, pieces) = begun(100).await;
        for _ in 0..40 {
            pieces.send(Bytes::from(vec![b'a'; 1_000_000])).unwrap();
        }
        assert!(over(pieces).await.is_ok(), "the upstream takes nothing for too long");
        drop(connection);

        let (connection, pieces) = begun(9000).await;
        connection.part();
        tokio::task::yield_now().await;
        assert!(!pieces.is_closed(), "the answer is complete, and the request goes on");
        drop(pieces);
    });
}

#[test]
fn what_comes_behind_a_switch_belongs_to_the_tunnel() {
    local(async {
        let (mut connection, _) = connected(|mut peer: Peer| async move {
            peer.read("\r\n\r\n").await;
            peer.write("HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nearly").await;
            std::future::pending().await
        })
        .await;
        let request =
            exchange("GET", "http://a.test/").header("connection", "upgrade").header("upgrade", "x");
        let head = send(&mut connection, &mut request.build(), &limits(5000, 5000)).await.unwrap();
        assert_eq!(head.upgrade.unwrap(), "x");
        assert_eq!(connection.upgraded().unwrap().early, "early");
    });
}

#[test]
fn a_body_that_breaks_off_is_an_error_unless_the_end_is_its_end() {
    local(async {
        for (answer, wanted) in [
            ("HTTP/1.1 200 OK\r\n\r\nall", Ok("all".to_owned())),
            ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", Err("the answer is cut short".to_owned())),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
                Err("the answer is cut short".to_owned()),
            ),
        ] {
            let (mut connection, _) = connected(move |mut peer: Peer| async move {
                peer.read("\r\n\r\n").await;
                peer.write(answer).await;
            })
            .await;
            let mut x = exchange("GET", "http://a.test/").build();
            send(&mut connection, &mut x, &limits(5000, 5000)).await.unwrap();
            assert_eq!(body(&mut connection).await, wanted, "{answer:?}");
            assert!(!connection.is_ready());
        }
    });
}
