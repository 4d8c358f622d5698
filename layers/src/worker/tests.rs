//! Workers on real sockets, with a small service in place of the stack.

use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use certs::SniTable;
use certs::sni::{CertPem, Change, SslObject, TableSettings};
use certs::verify::ClientAuth;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::Service;

use crate::body::{Body, BodyError};
use crate::error::{Error, Fault, Reason};
use crate::exchange::{Answered, Exchange};
use crate::local::LocalBox;
use crate::transport::listen::Listen;
use crate::transport::tls_server::{TlsListen, check_client_certificate};
use crate::upgrade::Upgrade;
use crate::worker::deadlines::{Ended, TICK};
use crate::worker::{
    ListenOptions, Listening, ProxyProtocol, Report, Timeouts, WorkerFailure, WorkerSettings, Workers,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers by path, as a stack and an upstream would.
#[derive(Clone)]
struct Paths;

impl Service<Exchange> for Paths {
    type Response = Exchange;
    type Error = Fault;
    type Future = LocalBox<'static, Result<Exchange, Fault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        Box::pin(async move {
            if let Some(error) = x.refused.take() {
                return Err(Fault { exchange: x, error: *error });
            }
            x.answered = Answered::Upstream;
            let path = x.request.uri.path().to_owned();
            let answer = match path.as_str() {
                "/echo" => match x.request_body.collect_up_to(1 << 20).await {
                    Ok(body) => Response::new(Body::from(body)),
                    Err(error) => {
                        let error = Error::new(Reason::RequestBody).because(error);
                        return Err(Fault { exchange: x, error });
                    }
                },
                "/fields" => fields(&x.request.headers),
                "/early" => status(413),
                "/trailers" => {
                    let mut frames = Vec::new();
                    while let Some(frame) = x.request_body.frame().await {
                        frames.extend(frame.ok());
                    }
                    let mut response = Response::new(Body::boxed(Frames(frames.into())));
                    response.headers_mut().insert(header::TRAILER, HeaderValue::from_static("x-sum"));
                    response
                }
                "/elsewhere" => {
                    // Read by a task of its own while this one answers; what it read is the next answer.
                    let mut body = std::mem::take(&mut x.request_body);
                    let (sender, receiver) = tokio::sync::oneshot::channel();
                    tokio::task::spawn_local(async move {
                        let _ = sender.send(body.collect_up_to(1 << 20).await);
                    });
                    match receiver.await {
                        Ok(Ok(body)) => Response::new(Body::from(body)),
                        _ => status(400),
                    }
                }
                "/later" => {
                    // The answer is out before the body is read.
                    let mut body = std::mem::take(&mut x.request_body);
                    tokio::task::spawn_local(async move {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        let _ = body.collect_up_to(1 << 20).await;
                    });
                    Response::new(Body::from("early"))
                }
                "/broken" => {
                    let mut response = Response::new(Body::boxed(Broken(true)));
                    if x.request.uri.query().is_some() {
                        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("9"));
                    }
                    response
                }
                "/nothing" => status(204),
                "/slow" => {
                    tokio::time::sleep(Duration::from_millis(800)).await;
                    Response::new(Body::from("slow"))
                }
                "/never" => std::future::pending().await,
                "/big" => Response::new(Body::boxed(Endless(16 << 20))),
                "/drip" => Response::new(Body::boxed(Drip(4, None))),
                "/info" => {
                    let tls = x.conn.tls.as_ref();
                    let info = format!(
                        "{} {} {} {}",
                        x.conn.peer,
                        x.conn.local,
                        tls.map_or("-", |tls| tls.sni.as_deref().unwrap_or("none")),
                        tls.and_then(|tls| tls.client.as_ref()).map_or("-", |client| client.subject.as_str()),
                    );
                    Response::new(Body::from(info))
                }
                "/switch" => {
                    let upgrade = x.upgrade.take();
                    match upgrade {
                        Some(upgrade) => {
                            tokio::task::spawn_local(echo_tunnel(upgrade));
                            status(101)
                        }
                        None => status(400),
                    }
                }
                "/panic" => panic!("as asked"),
                _ => Response::new(Body::from(format!("hello {}", x.request.uri))),
            };
            x.response = answer;
            Ok(x)
        })
    }
}

/// All fields of the request in the body, and those for the answer in its head too.
fn fields(asked: &HeaderMap) -> Response<Body> {
    let mut text = String::new();
    let mut response = Response::new(Body::Empty);
    for (name, value) in asked {
        text.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap()));
        if name.as_str().starts_with("x-answer") {
            response.headers_mut().append(name, value.clone());
        }
    }
    *response.body_mut() = Body::from(text);
    response
}

fn status(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if status == 101 {
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("echo"));
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    response
}

async fn echo_tunnel(upgrade: Upgrade) {
    let Some(upgraded) = upgrade.await else { return };
    let (mut reader, mut writer) = tokio::io::split(upgraded);
    let _ = tokio::io::copy(&mut reader, &mut writer).await;
    let _ = writer.shutdown().await;
}

/// So many bytes, in pieces of 16 KB.
struct Endless(usize);

impl HttpBody for Endless {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let size = self.0.min(16 * 1024);
        self.0 -= size;
        Poll::Ready((size > 0).then(|| Ok(Frame::data(Bytes::from(vec![b'x'; size])))))
    }
}

/// Frames that are all here.
struct Frames(std::collections::VecDeque<Frame<Bytes>>);

impl HttpBody for Frames {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

/// A piece, and then a failure.
struct Broken(bool);

impl HttpBody for Broken {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let piece = std::mem::take(&mut self.0).then(|| Frame::data(Bytes::from_static(b"piece")));
        Poll::Ready(Some(piece.ok_or_else(|| "broken".into())))
    }
}

/// So many pieces, one each 100 ms.
struct Drip(u32, Option<std::pin::Pin<Box<tokio::time::Sleep>>>);

impl HttpBody for Drip {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if this.0 == 0 {
            return Poll::Ready(None);
        }
        let sleep = this.1.get_or_insert_with(|| Box::pin(tokio::time::sleep(Duration::from_millis(100))));
        std::task::ready!(sleep.as_mut().poll(cx));
        (this.0, this.1) = (this.0 - 1, None);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"drip")))))
    }
}

struct Running {
    workers: Workers,
    address: SocketAddr,
}

fn start(change: impl FnOnce(&mut WorkerSettings, &mut ListenOptions)) -> Running {
    let mut settings = WorkerSettings { workers: 1, ..WorkerSettings::default() };
    let mut options = ListenOptions { http2: true, ..ListenOptions::default() };
    change(&mut settings, &mut options);
    let listen = Listen { address: "127.0.0.1:0".parse().unwrap(), key: "test".to_owned() };
    let sockets = listen.bind(settings.workers).unwrap();
    let address = sockets[0].local_addr().unwrap();
    let workers = Workers::start(&settings, vec![Listening { sockets, options }], |_| Paths).unwrap();
    Running { workers, address }
}

fn plain() -> Running {
    start(|_, _| ())
}

fn quick(settings: &mut WorkerSettings) {
    // Long enough for an honest client on a machine that is busy with other things.
    let short = Duration::from_millis(600);
    settings.timeouts =
        Timeouts { handshake: short, header: short, body: short, send: short, idle: short, linger: short };
}

impl Running {
    async fn connect(&self) -> Client {
        Client(TcpStream::connect(self.address).await.unwrap())
    }

    fn stat(&self, read: impl Fn(&crate::worker::Stats) -> u64) -> u64 {
        self.workers.stats().iter().map(|stats| read(stats)).sum()
    }

    fn ended(&self, cause: Ended) -> u64 {
        self.stat(|stats| stats.ended[cause as usize - 1].get())
    }

    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain for: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self, within: Duration) -> Report {
        self.workers.drain().start(within);
        let report = self.workers.ended(PATIENCE).await;
        assert_eq!(report.stuck, [0usize; 0]);
        report
    }

    async fn http2(&self) -> http2::SendRequest<Full<Bytes>> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(async move {
            let _ = connection.await;
        });
        sender
    }
}

struct Client(TcpStream);

impl Client {
    async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// One answer with `Content-Length`, or with none and no body.
    async fn answer(&mut self) -> String {
        let mut text = Vec::new();
        loop {
            let text_so_far = String::from_utf8_lossy(&text).into_owned();
            if let Some((head, body)) = text_so_far.split_once("\r\n\r\n") {
                let length = head
                    .lines()
                    .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok())
                    .unwrap_or(0);
                if body.len() >= length {
                    return text_so_far;
                }
            }
            let read =
                timeout(PATIENCE, self.0.read_buf(&mut text)).await.expect("an answer in time").unwrap();
            assert!(read > 0, "closed after {text_so_far:?}");
        }
    }

    /// Everything until the other side closes, and how it did.
    async fn rest(&mut self) -> (String, Option<ErrorKind>) {
        let mut all = Vec::new();
        let end = timeout(PATIENCE, self.0.read_to_end(&mut all)).await.expect("an end in time");
        (String::from_utf8_lossy(&all).into_owned(), end.err().map(|error| error.kind()))
    }

    /// The same, of a client that sends nothing more.
    async fn rest_after_shutdown(&mut self) -> (String, Option<ErrorKind>) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.0.shutdown().await.unwrap();
        self.rest().await
    }

    /// Waits for a clean close without a byte.
    async fn closed(&mut self) {
        assert_eq!(self.rest().await, (String::new(), None));
    }
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n";

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_order() {
    let running = plain();
    let mut client = running.connect().await;
    for _ in 0..3 {
        client.send(GET).await;
        assert!(client.answer().await.ends_with("\r\n\r\nhello /a"));
    }
    client.send("GET /1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /3 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await;
    let (all, end) = client.rest().await;
    let bodies: Vec<_> = ["hello /1", "abc", "hello /3"].map(|body| all.find(body)).into();
    assert!(bodies.is_sorted() && bodies.iter().all(Option::is_some), "{all}");
    assert_eq!(end, None);
    assert_eq!(running.stat(|s| s.requests.get()), 6);
    assert_eq!(running.stat(|s| s.in_flight.get()), 0);
}

/// Maps of fields are used again, by whichever request or answer is next.
#[tokio::test]
async fn no_field_is_seen_in_another_request_or_answer() {
    let running = plain();
    let mut clients = [running.connect().await, running.connect().await];
    for round in 0..60 {
        // What ends in other ways gives its map back too.
        let odd = ["/panic", "/broken", "/early", "/never", "bad target"][round % 5];
        let mut other = running.connect().await;
        other.send(&format!("GET {odd} HTTP/1.1\r\nHost: h\r\nX-Answer-Odd: odd\r\n\r\n")).await;
        if odd != "/never" {
            other.rest_after_shutdown().await;
        }
        drop(other);
        for (index, client) in clients.iter_mut().enumerate() {
            let number = 2 * round + index;
            let answered: Vec<_> = (0..number % 4).map(|n| format!("x-answer-{number}: {n}\r\n")).collect();
            let answered = answered.concat();
            let asked: Vec<_> =
                (0..number % 7).map(|n| format!("x-asked-{n}-{number}: {number}\r\n")).collect();
            let sent = format!("host: h\r\n{}{answered}", asked.concat());
            client.send(&format!("GET /fields HTTP/1.1\r\n{sent}\r\n")).await;
            let answer = client.answer().await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert_eq!(body, sent, "{number}");
            let in_head: Vec<_> = head.lines().filter(|line| line.starts_with("x-")).collect();
            assert_eq!(in_head, answered.lines().collect::<Vec<_>>(), "{number}");
        }
    }
}

#[tokio::test]
async fn a_half_closed_client_gets_its_answer() {
    let running = plain();
    let mut client = running.connect().await;
    client.send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n").await;
    client.0.shutdown().await.unwrap();
    let (all, end) = client.rest().await;
    assert!(all.ends_with("slow"), "{all}");
    assert_eq!(end, None);
}

#[tokio::test]
async fn refused_bytes_are_answered_and_the_connection_closes() {
    let running = plain();
    let cases = [
        (
            "CL and TE",
            "POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            "400",
        ),
        (
            "TE and CL",
            "POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
        ("bare LF", "GET / HTTP/1.1\nHost: h\n\n", "400"),
        ("bare CR", "GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n", "400"),
        ("NUL", "GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n", "400"),
        ("folded", "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", "400"),
        ("two hosts", "GET / HTTP/1.1\r\nHost: h\r\nHost: g\r\n\r\n", "400"),
        ("fragment", "GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", "400"),
        ("garbage", "\u{16}\u{3}\u{1}\n", "400"),
        ("long target", &format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(9000)), "414"),
        ("large head", &format!("GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "a".repeat(40_000)), "431"),
        ("many fields", &format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "a: b\r\n".repeat(200)), "431"),
    ];
    for (what, bytes, status) in cases {
        let mut client = running.connect().await;
        client.send(&format!("{GET}{bytes}{GET}")).await;
        let (all, end) = client.rest().await;
        assert!(all.starts_with("HTTP/1.1 200 OK\r\n"), "{what}: {all}");
        let (_, refused) = all.split_once("hello /a").unwrap();
        assert!(refused.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {refused}");
        assert!(refused.contains("\r\nconnection: close\r\n"), "{what}: {refused}");
        assert_eq!((refused.matches("HTTP/1.1 ").count(), end), (1, None), "{what}: {refused}");
    }
    assert_eq!(running.stat(|s| s.refused.get()), cases.len() as u64);
}

#[tokio::test]
async fn a_broken_body_is_answered_and_the_connection_closes() {
    let running = plain();
    for body in ["5\r\nhelloX", "5\nhello\r\n0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n"] {
        let mut client = running.connect().await;
        client
            .send(&format!("POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{body}{GET}"))
            .await;
        let (all, end) = client.rest().await;
        assert!(all.starts_with("HTTP/1.1 400 "), "{body:?}: {all}");
        assert_eq!((all.matches("HTTP/1.1 ").count(), end), (1, None), "{body:?}: {all}");
    }
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let running = plain();
    let mut client = running.connect().await;
    client.send("POST /early HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n").await;
    let piece = vec![b'x'; 64 * 1024];
    // The server stops reading at some point, but resets nothing: the client may finish sending what it likes.
    for _ in 0..20 {
        client.0.write_all(&piece).await.unwrap();
    }
    client.0.shutdown().await.unwrap();
    let (all, end) = client.rest().await;
    assert!(all.starts_with("HTTP/1.1 413 "), "{all}");
    assert_eq!((all.matches("HTTP/1.1 ").count(), end), (1, None));
}

#[tokio::test]
async fn a_small_body_that_nobody_reads_does_not_end_the_connection() {
    let running = plain();
    let mut client = running.connect().await;
    for (head, body) in
        [("Content-Length: 5", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\nX: y\r\n\r\n")]
    {
        client.send(&format!("POST /early HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n{body}{GET}")).await;
        let refused = client.answer_head().await;
        assert!(refused.starts_with("HTTP/1.1 413 ") && !refused.contains("close"), "{refused}");
        assert!(client.answer().await.ends_with("hello /a"));
    }
    // A part of it is not enough, nor is one that the client was not told to send.
    for request in [
        "POST /early HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhell",
        "POST /early HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    ] {
        let mut client = running.connect().await;
        client.send(request).await;
        let (all, end) = client.rest_after_shutdown().await;
        assert!(all.starts_with("HTTP/1.1 413 ") && all.contains("\r\nconnection: close\r\n"), "{all}");
        assert_eq!((all.matches("HTTP/1.1 ").count(), end), (1, None));
    }
}

#[tokio::test]
async fn trailers_pass_and_only_to_those_who_want_them() {
    let running = plain();
    let body = "3\r\nabc\r\n0\r\nX-Sum: 42\r\nX-Other: 1\r\n\r\n";
    for (field, end) in [("TE: trailers\r\n", "0\r\nx-sum: 42\r\n\r\n"), ("", "0\r\n\r\n")] {
        let mut client = running.connect().await;
        client
            .send(&format!(
                "POST /trailers HTTP/1.1\r\nHost: h\r\n{field}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n{body}"
            ))
            .await;
        let (all, _) = client.rest().await;
        assert!(all.contains("\r\ntransfer-encoding: chunked\r\n"), "{all}");
        assert!(all.ends_with(&format!("\r\n\r\n3\r\nabc\r\n{end}")), "{all}");
    }
}

#[tokio::test]
async fn a_body_may_be_read_by_another_task() {
    let running = plain();
    let mut client = running.connect().await;
    for path in ["/elsewhere", "/later"] {
        client.send(&format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello")).await;
        if path == "/later" {
            assert!(client.answer().await.ends_with("early"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.send("world").await;
        if path == "/elsewhere" {
            assert!(client.answer().await.ends_with("helloworld"));
        }
        client.send(GET).await;
        assert!(client.answer().await.ends_with("hello /a"), "after {path}");
    }
}

#[tokio::test]
async fn a_body_that_fails_has_no_clean_end() {
    let running = plain();
    for (path, end) in [("/broken", "5\r\npiece\r\n"), ("/broken?length", "\r\n\r\npiece")] {
        let mut client = running.connect().await;
        client.send(&format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n{GET}")).await;
        let mut all = Vec::new();
        // Closing with a request unread is a reset, which says the same.
        let _ = timeout(PATIENCE, client.0.read_to_end(&mut all)).await.unwrap();
        let all = String::from_utf8(all).unwrap();
        assert!(all.ends_with(end), "{path}: {all}");
    }
}

#[tokio::test]
async fn the_version_and_the_method_shape_the_answer() {
    let running = plain();
    let old = "GET /a HTTP/1.0\r\n\r\n";
    let mut client = running.connect().await;
    client.send(&format!("{old}{old}")).await;
    let (all, end) = client.rest().await;
    assert!(all.starts_with("HTTP/1.0 200 OK\r\n") && all.contains("\r\nconnection: close\r\n"), "{all}");
    assert_eq!((all.matches("hello").count(), end), (1, None));

    let mut client = running.connect().await;
    for _ in 0..2 {
        client.send("GET /a HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").await;
        assert!(client.answer().await.contains("\r\nconnection: keep-alive\r\n"));
    }
    client.send("GET /drip HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
    let (all, _) = client.rest().await;
    assert!(all.contains("\r\nconnection: close\r\n") && all.ends_with("\r\n\r\ndripdripdripdrip"), "{all}");

    let mut client = running.connect().await;
    client
        .send(&format!("HEAD /a HTTP/1.1\r\nHost: h\r\n\r\nGET /nothing HTTP/1.1\r\nHost: h\r\n\r\n{GET}"))
        .await;
    let head = client.answer_head().await;
    assert!(head.contains("\r\ncontent-length: 8\r\n") && head.contains("\r\ndate: "), "{head}");
    let nothing = client.answer_head().await;
    assert!(nothing.starts_with("HTTP/1.1 204 No Content\r\n") && !nothing.contains("length"), "{nothing}");
    assert!(client.answer().await.ends_with("hello /a"));
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_request_where_it_may_not_half_close() {
    let running = start(|settings, _| settings.serve.half_close = false);
    let mut client = running.connect().await;
    client.send(&format!("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n{GET}")).await;
    assert!(client.answer().await.contains("slow"), "what is pipelined is no going away");
    let mut client = running.connect().await;
    client.send("GET /never HTTP/1.1\r\nHost: h\r\n\r\n").await;
    running.until("work", |r| r.stat(|s| s.in_flight.get()) == 1).await;
    drop(client);
    running.until("the end of it", |r| r.stat(|s| s.in_flight.get()) == 0).await;
}

#[tokio::test]
async fn a_large_body_passes_both_ways_in_both_framings() {
    let running = plain();
    let body: String = (0..700_000u32).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
    let chunked: String = body
        .as_bytes()
        .chunks(9001)
        .map(|piece| format!("{:X}\r\n{}\r\n", piece.len(), String::from_utf8_lossy(piece)))
        .collect();
    for (head, bytes) in [
        (format!("Content-Length: {}", body.len()), body.clone()),
        ("Transfer-Encoding: chunked".to_owned(), format!("{chunked}0\r\n\r\n")),
    ] {
        let client = running.connect().await;
        let (mut reader, mut writer) = client.0.into_split();
        let request = format!("POST /echo HTTP/1.1\r\nHost: h\r\n{head}\r\nConnection: close\r\n\r\n{bytes}");
        let write = tokio::spawn(async move { writer.write_all(request.as_bytes()).await.map(|()| writer) });
        let mut all = String::new();
        timeout(PATIENCE, reader.read_to_string(&mut all)).await.unwrap().unwrap();
        let _writer = write.await.unwrap().unwrap();
        assert!(all.split_once("\r\n\r\n").unwrap().1 == body, "{head}: {} bytes", all.len());
    }
}

#[tokio::test]
async fn a_client_that_expects_is_told_to_go_on() {
    let running = plain();
    let mut client = running.connect().await;
    client.send("POST /echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").await;
    let mut continued = [0; 25];
    timeout(PATIENCE, client.0.read_exact(&mut continued)).await.unwrap().unwrap();
    assert_eq!(&continued, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.send("ok").await;
    assert!(client.answer().await.ends_with("ok"));
}

#[tokio::test]
async fn an_idle_connection_leaves_the_engine_and_comes_back() {
    let running = plain();
    let mut client = running.connect().await;
    for round in 1..3 {
        client.send(GET).await;
        client.answer().await;
        running.until("parking", |r| r.stat(|s| s.parked.get()) == round).await;
    }
    client.send(&GET[..10]).await;
    client.send(&GET[10..]).await;
    assert!(client.answer().await.ends_with("hello /a"));
}

#[tokio::test]
async fn http2_is_told_by_its_first_bytes() {
    let running = plain();
    let mut sender = running.http2().await;
    let request = Request::builder().uri("http://h/x").body(Full::default()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "hello http://h/x");
    let big = Bytes::from(vec![b'y'; 500_000]);
    let request = Request::post("http://h/echo").body(Full::new(big.clone())).unwrap();
    let echoed = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(echoed.to_bytes(), big);
    running.until("quiet", |r| r.stat(|s| s.in_flight.get()) == 0).await;

    let mut neither = running.connect().await;
    neither.send("INVALID CONNECTION PREFACE\r\n\r\n").await;
    neither.closed().await;

    let mut slowly = running.connect().await;
    slowly.send("PRI * HT").await;
    slowly.send("TP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut head = [0; 9];
    timeout(PATIENCE, slowly.0.read_exact(&mut head)).await.unwrap().unwrap();
    assert_eq!(head[3], 4, "a SETTINGS frame");
}

#[tokio::test]
async fn http2_is_not_spoken_where_it_is_off() {
    let running = start(|_, options| options.http2 = false);
    let mut client = running.connect().await;
    client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    let (all, _) = client.rest().await;
    assert!(all.starts_with("HTTP/1.1 400 "), "{all}");
}

/// The preface, settings, and a header block for `GET http://h/PATH` on stream `id`.
fn http2_start() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    bytes
}

fn http2_get(id: u32, path: &str, flags: u8) -> Vec<u8> {
    // Indexed :method GET and :scheme http; :authority and :path as literals without indexing.
    let mut block = vec![0x82, 0x86, 0x01, 1, b'h', 0x04, path.len() as u8];
    block.extend(path.as_bytes());
    let mut bytes = vec![0, 0, block.len() as u8, 1, flags];
    bytes.extend(id.to_be_bytes());
    bytes.extend(block);
    bytes
}

fn frame_types(mut bytes: &[u8]) -> Vec<u8> {
    let mut types = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        types.push(head[3]);
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        bytes = rest.get(length..).unwrap_or_default();
    }
    types
}

/// Types of the frames that came, until the connection ended.
async fn frames_until_end(client: &mut Client) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = timeout(PATIENCE, client.0.read_to_end(&mut all)).await.expect("an end in time");
    frame_types(&all)
}

#[tokio::test]
async fn streams_that_are_only_reset_end_the_connection_with_goaway() {
    let running = plain();
    let client = running.connect().await;
    let (mut reader, mut writer) = client.0.into_split();
    let flood = tokio::spawn(async move {
        writer.write_all(&http2_start()).await?;
        for n in 0..3000u32 {
            let id = 2 * n + 1;
            let mut bytes = http2_get(id, "/never", 5);
            bytes.extend([0, 0, 4, 3, 0]);
            bytes.extend(id.to_be_bytes());
            bytes.extend(8u32.to_be_bytes());
            writer.write_all(&bytes).await?;
        }
        Ok::<_, std::io::Error>(())
    });
    let mut all = Vec::new();
    // The connection may end by a reset, as the flood goes on; what was sent before it arrives first.
    let _ = timeout(PATIENCE, reader.read_to_end(&mut all)).await.expect("an end in time");
    let _ = flood.await.unwrap();
    running.until("the end", |r| r.stat(|s| s.open.get()) == 0).await;
    assert!(frame_types(&all).contains(&7), "GOAWAY");
    assert!(running.stat(|s| s.requests.get()) < 2000);
    assert_eq!(running.stat(|s| s.in_flight.get()), 0);
}

#[tokio::test]
async fn a_flood_of_pings_ends_the_connection() {
    let running = plain();
    let client = running.connect().await;
    let (mut reader, mut writer) = client.0.into_split();
    let flood = tokio::spawn(async move {
        writer.write_all(&http2_start()).await?;
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8].repeat(100);
        for _ in 0..2000 {
            writer.write_all(&ping).await?;
        }
        Ok::<_, std::io::Error>(())
    });
    let mut sink = Vec::new();
    let _ = timeout(PATIENCE, reader.read_to_end(&mut sink)).await.expect("an end in time");
    let _ = flood.await.unwrap();
    running.until("the end", |r| r.stat(|s| s.floods.get()) == 1).await;
}

#[tokio::test]
async fn a_switch_of_protocols_becomes_a_tunnel() {
    let running = plain();
    let mut client = running.connect().await;
    client
        .send("GET /switch HTTP/1.1\r\nHost: h\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\nearly \x01\n")
        .await;
    assert!(client.answer_head().await.starts_with("HTTP/1.1 101 "));
    client.send("late").await;
    let mut echoed = [0; 12];
    timeout(PATIENCE, client.0.read_exact(&mut echoed)).await.unwrap().unwrap();
    assert_eq!(&echoed, b"early \x01\nlate");
    running.until("a tunnel", |r| r.stat(|s| s.tunnels.get()) == 1).await;
    client.0.shutdown().await.unwrap();
    client.closed().await;
    running.until("the end", |r| r.stat(|s| s.open.get() + s.tunnels.get()) == 0).await;
}

impl Client {
    /// The head of an answer, byte by byte, so that nothing behind it is taken.
    async fn answer_head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(PATIENCE, self.0.read_u8()).await.expect("an answer in time").unwrap());
        }
        String::from_utf8(head).unwrap()
    }
}

#[tokio::test]
async fn a_refused_switch_goes_on_with_the_next_request() {
    let running = plain();
    let mut client = running.connect().await;
    client
        .send(&format!("GET /a HTTP/1.1\r\nHost: h\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n{GET}"))
        .await;
    for _ in 0..2 {
        let head = client.answer_head().await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        client.0.read_exact(&mut [0; 8]).await.unwrap();
    }
    // An upgrade to cleartext HTTP/2 is not even seen.
    client.send("GET /switch HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nConnection: upgrade\r\n\r\n").await;
    assert!(client.answer_head().await.starts_with("HTTP/1.1 400 "));
    client.send(GET).await;
    assert!(client.answer().await.ends_with("hello /a"));
}

#[tokio::test]
async fn slow_clients_are_ended_and_honest_ones_do_not_notice() {
    let running = start(|settings, _| quick(settings));
    let started = Instant::now();
    let honest = async {
        let mut client = running.connect().await;
        while started.elapsed() < Duration::from_secs(3) {
            client.send(GET).await;
            client.answer().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let silent = async {
        running.connect().await.closed().await;
    };
    let request_line = async {
        let mut client = running.connect().await;
        client.send("GET /a HT").await;
        assert!(client.rest().await.0.starts_with("HTTP/1.1 408 "));
    };
    let header = async {
        // A byte now and then is no progress.
        let mut client = running.connect().await;
        client.send("GET /a HTTP/1.1\r\nHost: h\r\nX: ").await;
        let (mut reader, mut writer) = client.0.split();
        let mut all = String::new();
        let read = reader.read_to_string(&mut all);
        let drip = async {
            while writer.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! { read = read => { let _ = read; } () = drip => {} }
        assert!(all.starts_with("HTTP/1.1 408 "), "{all}");
    };
    let body = async {
        let mut client = running.connect().await;
        client.send("POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nabc").await;
        assert!(client.rest().await.0.starts_with("HTTP/1.1 4"));
    };
    let body_then_head = async {
        let mut client = running.connect().await;
        client.send(&format!("{GET}{}", &GET[..9])).await;
        client.answer().await;
        assert!(client.rest().await.0.starts_with("HTTP/1.1 408 "));
    };
    let reader = async {
        let mut client = running.connect().await;
        client.send("GET /big HTTP/1.1\r\nHost: h\r\n\r\n").await;
        running.until("the send time-out", |r| r.ended(Ended::SendTimeout) >= 1).await;
        client.rest().await;
    };
    let preface = async {
        let mut client = running.connect().await;
        client.send("PRI * HTTP").await;
        client.closed().await;
    };
    let after_preface = async {
        let mut client = running.connect().await;
        client.0.write_all(&http2_start()).await.unwrap();
        assert!(frames_until_end(&mut client).await.contains(&7), "GOAWAY");
    };
    let http2_header = async {
        // HEADERS without END_HEADERS, and then silence.
        let mut client = running.connect().await;
        client.0.write_all(&http2_start()).await.unwrap();
        client.0.write_all(&http2_get(1, "/a", 1)).await.unwrap();
        frames_until_end(&mut client).await;
    };
    let http2_body = async {
        let mut client = running.connect().await;
        client.0.write_all(&http2_start()).await.unwrap();
        client.0.write_all(&http2_get(1, "/echo", 4)).await.unwrap();
        assert!(frames_until_end(&mut client).await.contains(&3), "RST_STREAM");
    };
    let http2_reader = async {
        // The window for answers is 64 KB, and never grows.
        let mut client = running.connect().await;
        client.0.write_all(&http2_start()).await.unwrap();
        client.0.write_all(&http2_get(1, "/big", 5)).await.unwrap();
        assert!(frames_until_end(&mut client).await.contains(&3), "RST_STREAM");
    };
    let idle = async {
        let mut client = running.connect().await;
        client.send(GET).await;
        client.answer().await;
        client.closed().await;
    };
    let all = async {
        tokio::join!(
            silent,
            request_line,
            header,
            body,
            body_then_head,
            reader,
            preface,
            after_preface,
            http2_header,
            http2_body,
            http2_reader,
            idle
        );
        assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    };
    tokio::join!(honest, all);
    running.until("all gone", |r| r.stat(|s| s.open.get()) == 0).await;
    assert_eq!(running.stat(|s| s.in_flight.get()), 0);
}

#[tokio::test]
async fn steady_progress_is_no_slowness() {
    let running = start(|settings, _| quick(settings));
    let mut client = running.connect().await;
    client.send("POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n").await;
    for _ in 0..10 {
        client.send("x").await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(client.answer().await.ends_with("xxxxxxxxxx"));
    // Nor is an upstream that takes longer than the client may.
    client.send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert!(client.answer().await.ends_with("slow"));
    client.send("GET /drip HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await;
    assert_eq!(client.rest().await.0.matches("drip").count(), 4);
}

#[tokio::test]
async fn the_proxy_header_names_the_client_where_it_is_believed() {
    let trusted = |nets: &[&str]| {
        let trusted = nets.iter().map(|net| net.parse().unwrap()).collect();
        start(move |settings, options| {
            quick(settings);
            options.proxy_protocol = Some(ProxyProtocol { trusted });
        })
    };
    let info = "GET /info HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let v1 = "PROXY TCP4 192.0.2.7 10.0.0.1 12345 443\r\n";
    for (nets, believed) in [(&[][..], true), (&["127.0.0.0/8"][..], true), (&["10.0.0.0/8"][..], false)] {
        let running = trusted(nets);
        let mut client = running.connect().await;
        let own = client.0.local_addr().unwrap().to_string();
        client.send(&v1[..7]).await;
        client.send(&v1[7..]).await;
        client.send(info).await;
        let (answer, _) = client.rest().await;
        let expected = if believed { "192.0.2.7:12345 10.0.0.1:443" } else { own.as_str() };
        assert!(answer.contains(expected), "{nets:?}: {answer}");
    }
    let running = trusted(&[]);
    let mut client = running.connect().await;
    client.0.write_all(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0").await.unwrap();
    client.send(info).await;
    let own = client.0.local_addr().unwrap().to_string();
    assert!(client.rest().await.0.contains(&own), "a header for the balancer itself");
    let mut none = running.connect().await;
    none.send(GET).await;
    let (answer, _) = none.rest().await;
    assert_eq!(answer, "", "without a header there is no answer");
    let mut slow = running.connect().await;
    slow.send("PROXY TCP4").await;
    slow.closed().await;
    running.until("it is counted", |running| running.ended(Ended::HandshakeTimeout) == 1).await;
    assert_eq!(running.stat(|s| s.proxy_refused.get()), 1);
}

#[tokio::test]
async fn a_full_worker_prefers_new_connections_to_idle_ones() {
    let running = start(|settings, _| settings.connections = 2);
    let mut idle = running.connect().await;
    idle.send(GET).await;
    idle.answer().await;
    running.until("parking", |r| r.stat(|s| s.parked.get()) == 1).await;
    let mut busy = running.connect().await;
    busy.send("GET /never HTTP/1.1\r\nHost: h\r\n\r\n").await;
    running.until("work", |r| r.stat(|s| s.in_flight.get()) == 1).await;
    let mut new = running.connect().await;
    new.send(GET).await;
    assert!(new.answer().await.ends_with("hello /a"));
    idle.closed().await;
    assert_eq!(running.stat(|s| s.evicted.get()), 1);
    // The new one is not idle for long enough, the other is at work: there is no place.
    let mut refused = running.connect().await;
    let (all, _) = refused.rest().await;
    assert_eq!((all.as_str(), running.stat(|s| s.rejected.get())), ("", 1));
}

#[tokio::test]
async fn a_drain_lets_requests_finish_and_closes_after_them() {
    let running = plain();
    let mut parked = running.connect().await;
    parked.send(GET).await;
    parked.answer().await;
    running.until("parking", |r| r.stat(|s| s.parked.get()) == 1).await;
    let mut idle = running.connect().await;
    idle.send(GET).await;
    idle.answer().await;
    let fresh = running.connect().await;
    let mut slow = running.connect().await;
    slow.send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let mut sender = running.http2().await;
    let request = Request::get("http://h/slow").body(Full::default()).unwrap();
    let http2 =
        tokio::spawn(async move { sender.send_request(request).await.unwrap().into_body().collect().await });
    running.until("work", |r| r.stat(|s| s.in_flight.get()) == 2).await;
    let started = Instant::now();
    let address = running.address;
    let stop = tokio::spawn(running.stop(Duration::from_secs(30)));
    let answer = slow.answer().await;
    assert!(answer.contains("\r\nconnection: close\r\n") && answer.ends_with("slow"), "{answer}");
    slow.closed().await;
    assert_eq!(http2.await.unwrap().unwrap().to_bytes(), "slow");
    for mut client in [parked, idle, fresh] {
        client.closed().await;
    }
    let report = stop.await.unwrap();
    assert_eq!(report.casualties, []);
    assert!(started.elapsed() < PATIENCE, "nobody waits for its 30 s: {:?}", started.elapsed());
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_request_on_its_way_is_answered_during_a_drain() {
    let running = plain();
    let mut busy = running.connect().await;
    busy.send(GET).await;
    busy.answer().await;
    running.workers.drain().start(Duration::from_secs(30));
    // Sent while the drain begins: the connection was in use a moment ago.
    busy.send(GET).await;
    let answer = busy.answer().await;
    assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    busy.closed().await;
    assert_eq!(running.workers.ended(PATIENCE).await.casualties, []);
}

#[tokio::test]
async fn the_deadline_of_a_drain_cuts_what_is_left_and_names_it() {
    let running = plain();
    let mut never = running.connect().await;
    never.send("GET /never HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let mut tunnel = running.connect().await;
    tunnel.send("GET /switch HTTP/1.1\r\nHost: h\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n").await;
    tunnel.answer_head().await;
    let mut sender = running.http2().await;
    let request = Request::get("http://h/never").body(Full::default()).unwrap();
    let http2 = tokio::spawn(async move { sender.send_request(request).await });
    running.until("work", |r| r.stat(|s| s.in_flight.get()) == 2 && r.stat(|s| s.tunnels.get()) == 1).await;
    let never_address = never.0.local_addr().unwrap();
    let report = running.stop(Duration::from_millis(300)).await;
    assert!(http2.await.unwrap().is_err());
    never.rest().await;
    tunnel.rest().await;
    assert_eq!(report.casualties.len(), 3, "{report:?}");
    assert!(report.casualties.iter().any(|c| c.peer == never_address && c.in_flight == 1), "{report:?}");
}

#[tokio::test]
async fn what_waits_to_be_accepted_is_served_before_the_socket_closes() {
    let running = plain();
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut client = running.connect().await;
        client.send(GET).await;
        clients.push(client);
    }
    running.workers.drain().start(Duration::from_secs(30));
    for mut client in clients {
        assert!(client.answer().await.ends_with("hello /a"));
    }
    assert_eq!(running.workers.ended(PATIENCE).await.casualties, []);
}

#[tokio::test]
async fn a_panic_ends_its_request_and_not_its_worker() {
    let running = plain();
    let mut client = running.connect().await;
    client.send("GET /panic HTTP/1.1\r\nHost: h\r\n\r\n").await;
    client.rest().await;
    let mut other = running.connect().await;
    other.send(GET).await;
    other.answer().await;
    running.until("quiet", |r| r.stat(|s| s.in_flight.get()) == 0).await;
}

#[tokio::test]
async fn a_worker_that_cannot_start_is_told() {
    let settings = WorkerSettings { workers: 1, ..WorkerSettings::default() };
    let mut workers = Workers::start(&settings, Vec::new(), |_| -> Paths { panic!("no stack") }).unwrap();
    let failure = timeout(PATIENCE, workers.failed()).await.unwrap();
    assert!(
        matches!(&failure, WorkerFailure::Panicked { worker: 0, message } if message == "no stack"),
        "{failure}"
    );
}

#[tokio::test]
async fn without_their_handle_workers_end() {
    let running = plain();
    let mut client = running.connect().await;
    client.send("GET /never HTTP/1.1\r\nHost: h\r\n\r\n").await;
    running.until("work", |r| r.stat(|s| s.in_flight.get()) == 1).await;
    drop(running);
    client.rest().await;
}

struct Ca {
    pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    der: CertificateDer<'static>,
}

impl Ca {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    fn leaf(&self, name: &str) -> CertPem {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        CertPem { cert: certificate.pem(), key: key.serialize_pem() }
    }

    fn ssl(&self, name: &str, client: Option<&[&str]>) -> SslObject {
        SslObject {
            id: name.into(),
            order: 0,
            names: vec![name.to_owned()],
            pairs: vec![self.leaf(name)],
            remote: Vec::new(),
            client: client.map(|skip| ClientAuth {
                ca: self.pem.clone(),
                depth: 1,
                skip_uri_regex: skip.iter().map(|s| (*s).to_owned()).collect(),
            }),
            protocols: Vec::new(),
        }
    }

    fn connector(&self, alpn: &[&[u8]], identity: Option<&CertPem>) -> tokio_rustls::TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(pair) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Arc::new(config).into()
    }
}

type TlsClient = tokio_rustls::client::TlsStream<TcpStream>;

async fn tls(
    running: &Running,
    connector: &tokio_rustls::TlsConnector,
    name: &str,
) -> std::io::Result<TlsClient> {
    let tcp = TcpStream::connect(running.address).await.unwrap();
    connector.connect(ServerName::try_from(name.to_owned()).unwrap(), tcp).await
}

async fn tls_get(client: &mut TlsClient, path: &str) -> std::io::Result<String> {
    client
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut answer = String::new();
    timeout(PATIENCE, client.read_to_string(&mut answer)).await.expect("an answer in time")?;
    Ok(answer)
}

#[tokio::test]
async fn tls_is_served_by_name_and_follows_the_table() {
    let ca = Ca::new();
    let (first, errors) = SniTable::build(TableSettings::default(), [ca.ssl("a.test", None)]);
    assert_eq!(errors, []);
    let table = Arc::new(ArcSwap::from_pointee(first));
    let listen = TlsListen { table: table.clone(), http2: true };
    let running = start(|settings, options| {
        quick(settings);
        options.tls = Some(listen);
    });
    let http1 = ca.connector(&[b"http/1.1"], None);
    let mut client = tls(&running, &http1, "a.test").await.unwrap();
    let answer = tls_get(&mut client, "/info").await.unwrap();
    assert!(answer.ends_with(" a.test -"), "{answer}");

    let mut silent = running.connect().await;
    let unknown = tls(&running, &http1, "b.test").await.unwrap_err();
    assert!(unknown.to_string().contains("UnrecognisedName"), "{unknown}");
    let (next, errors) =
        table.load().apply([Change::Put(ca.ssl("b.test", None)), Change::Remove("a.test".into())]);
    assert_eq!(errors, []);
    table.store(Arc::new(next));
    let mut client = tls(&running, &http1, "b.test").await.unwrap();
    assert!(tls_get(&mut client, "/info").await.unwrap().ends_with(" b.test -"));
    assert!(tls(&running, &http1, "a.test").await.is_err());

    let client = tls(&running, &ca.connector(&[b"h2", b"http/1.1"], None), "b.test").await.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        http2::handshake::<_, _, Empty<Bytes>>(TokioExecutor::new(), TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("https://b.test/info").body(Empty::new()).unwrap();
    let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(b" b.test -"));

    silent.closed().await;
    let counted = |running: &Running| running.ended(Ended::HandshakeTimeout) == 1;
    running.until("a client that says nothing is counted", counted).await;
    assert_eq!(running.stat(|s| s.handshakes_failed.get()), 2);
}

/// Keeps a copy of everything that is read.
struct Tapped(TcpStream, Arc<std::sync::Mutex<Vec<u8>>>);

impl tokio::io::AsyncRead for Tapped {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let read = std::pin::Pin::new(&mut self.0).poll_read(cx, buf);
        self.1.lock().unwrap().extend_from_slice(&buf.filled()[before..]);
        read
    }
}

impl tokio::io::AsyncWrite for Tapped {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn an_answer_over_tls_is_one_record() {
    let ca = Ca::new();
    let (table, errors) = SniTable::build(TableSettings::default(), [ca.ssl("a.test", None)]);
    assert_eq!(errors, []);
    let table = Arc::new(ArcSwap::from_pointee(table));
    let running = start(|_, options| options.tls = Some(TlsListen { table, http2: false }));
    let read = Arc::<std::sync::Mutex<Vec<u8>>>::default();
    let tcp = Tapped(TcpStream::connect(running.address).await.unwrap(), read.clone());
    let name = ServerName::try_from("a.test").unwrap();
    let mut client = ca.connector(&[], None).connect(name, tcp).await.unwrap();
    let mut answer = [0; 1024];
    for round in 0..3 {
        client.write_all(GET.as_bytes()).await.unwrap();
        let mut length = 0;
        while !answer[..length].ends_with(b"hello /a") {
            length += timeout(PATIENCE, client.read(&mut answer[length..])).await.unwrap().unwrap();
        }
        let bytes = std::mem::take(&mut *read.lock().unwrap());
        let mut rest = bytes.as_slice();
        let mut records = 0;
        while let Some((head, behind)) = rest.split_first_chunk::<5>() {
            rest = &behind[usize::from(u16::from_be_bytes([head[3], head[4]]))..];
            records += 1;
        }
        // With the first answer comes what is left of the handshake.
        assert!(records == 1 || round == 0, "{records}");
    }
}

/// Answers 421 and 400 as the edge does with what a connection proved.
#[derive(Clone)]
struct Judge(Arc<ArcSwap<SniTable>>);

impl Service<Exchange> for Judge {
    type Response = Exchange;
    type Error = Fault;
    type Future = LocalBox<'static, Result<Exchange, Fault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, x: Exchange) -> Self::Future {
        let host = x.request.headers.get(header::HOST).unwrap().to_str().unwrap().to_owned();
        let checked = check_client_certificate(&x.conn, &host, x.request.uri.path(), &self.0.load());
        match checked {
            Ok(()) => Paths.call(x),
            Err(reason) => Box::pin(std::future::ready(Err(Fault { exchange: x, error: reason.into() }))),
        }
    }
}

#[tokio::test]
async fn a_client_certificate_opens_its_own_host_only() {
    let ca = Ca::new();
    let objects = [
        ca.ssl("open.test", None),
        ca.ssl("strict.test", Some(&[])),
        ca.ssl("*.some.test", Some(&["^/free"])),
        ca.ssl("other.test", Some(&[])),
    ];
    let (built, errors) = SniTable::build(TableSettings::default(), objects);
    assert_eq!(errors, []);
    let table = Arc::new(ArcSwap::from_pointee(built));
    let listen = Listen { address: "127.0.0.1:0".parse().unwrap(), key: "test".to_owned() };
    let sockets = listen.bind(1).unwrap();
    let address = sockets[0].local_addr().unwrap();
    let tls_listen = TlsListen { table: table.clone(), http2: false };
    let options = ListenOptions { tls: Some(tls_listen), ..ListenOptions::default() };
    let settings = WorkerSettings { workers: 1, ..WorkerSettings::default() };
    let judged = table.clone();
    let workers =
        Workers::start(&settings, vec![Listening { sockets, options }], move |_| Judge(judged.clone()))
            .unwrap();
    let running = Running { workers, address };
    let identity = ca.leaf("client");
    let stranger = Ca::new().leaf("client");
    let cases = [
        ("open.test", "open.test", "/", None, Some("200")),
        ("open.test", "unknown.test", "/", None, Some("200")),
        ("open.test", "strict.test", "/", None, Some("421")),
        ("open.test", "a.some.test", "/free", None, Some("421")),
        ("strict.test", "strict.test", "/", None, None),
        ("strict.test", "strict.test", "/", Some(&stranger), None),
        ("strict.test", "strict.test", "/", Some(&identity), Some("200")),
        ("strict.test", "open.test", "/", Some(&identity), Some("421")),
        ("strict.test", "other.test", "/", Some(&identity), Some("421")),
        ("a.some.test", "a.some.test", "/free/x", None, Some("200")),
        ("a.some.test", "a.some.test", "/x", None, Some("400")),
        ("a.some.test", "a.some.test", "/x", Some(&stranger), Some("400")),
        ("a.some.test", "a.some.test", "/x", Some(&identity), Some("200")),
        ("a.some.test", "b.some.test", "/x", Some(&identity), Some("421")),
    ];
    for (sni, host, path, identity, status) in cases {
        let what = format!("{sni} {host} {path} {}", identity.is_some());
        let connector = ca.connector(&[], identity);
        let answer = async {
            let mut client = tls(&running, &connector, sni).await?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            client.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            client.read_to_string(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = timeout(PATIENCE, answer).await.unwrap();
        match status {
            Some(status) => assert!(
                answer.as_ref().unwrap().starts_with(&format!("HTTP/1.1 {status} ")),
                "{what}: {answer:?}"
            ),
            None => assert!(answer.is_err(), "{what}: {answer:?}"),
        }
    }
    assert!(TICK < Duration::from_secs(1));
}
