//! Clients: HTTP/1 and HTTP/2 connections over plain TCP or TLS, and raw connections that send exact bytes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;

/// No single step of a test waits longer for the other side.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The body type of everything the clients send.
pub type SentBody = BoxBody<Bytes, std::convert::Infallible>;

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a text header"))
    }

    /// All values of a header, in order.
    pub fn header_values(&self, name: &str) -> Vec<&str> {
        self.headers.get_all(name).iter().map(|value| value.to_str().expect("a text header")).collect()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}), status {}: {}", self.status, self.text()))
    }

    /// Panics with the whole answer unless the status is this one.
    #[track_caller]
    pub fn expect_status(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    async fn read(response: Response<Incoming>) -> Result<Answer, hyper::Error> {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned();
        Ok(Answer {
            status: parts.status.as_u16(),
            version: parts.version,
            headers: parts.headers,
            body: collected.to_bytes(),
            trailers,
        })
    }
}

/// A request under construction.
#[derive(Clone, Debug)]
pub struct Call {
    method: Method,
    uri: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Call {
    /// `uri` is a path with query; the host is set by the connection unless a `Host` header is given.
    pub fn new(method: &str, uri: &str) -> Call {
        Call {
            method: Method::from_bytes(method.as_bytes()).expect("a method"),
            uri: uri.to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    pub fn get(uri: &str) -> Call {
        Call::new("GET", uri)
    }

    pub fn header(mut self, name: &str, value: &str) -> Call {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a header name");
        self.headers.append(name, HeaderValue::from_str(value).expect("a header value"));
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Call {
        self.body = body.into();
        self
    }

    pub fn json(self, body: &Value) -> Call {
        self.header("content-type", "application/json").body(body.to_string())
    }

    /// Sends this over an HTTP/1 connection of its own.
    #[track_caller]
    pub fn send_to(self, addr: SocketAddr) -> impl Future<Output = Answer> {
        let caller = std::panic::Location::caller();
        async move {
            let mut connection = Connection::http1(addr).await;
            match connection.try_send(self.clone()).await {
                Ok(answer) => answer,
                Err(error) => panic!("{caller}: {} {}: {error}", self.method, self.uri),
            }
        }
    }

    fn into_request(self, authority: &str, scheme: &str, version: Version) -> Request<SentBody> {
        let mut request = Request::new(full(self.body));
        *request.method_mut() = self.method;
        *request.headers_mut() = self.headers;
        if version == Version::HTTP_2 {
            // In HTTP/2 the authority is a pseudo-header and hyper takes it from the URI.
            let host = match request.headers_mut().remove("host") {
                Some(host) => host.to_str().expect("a text host").to_owned(),
                None => authority.to_owned(),
            };
            *request.uri_mut() = format!("{scheme}://{host}{}", self.uri).parse().expect("a URI");
        } else {
            *request.uri_mut() = self.uri.parse().expect("a URI");
            if !request.headers().contains_key("host") {
                request.headers_mut().insert("host", HeaderValue::from_str(authority).expect("a host"));
            }
        }
        request
    }
}

/// A body that is known whole.
pub fn full(body: impl Into<Bytes>) -> SentBody {
    Full::new(body.into()).boxed()
}

/// A body whose frames come from a channel; it ends when the sender is dropped.
pub fn channel() -> (mpsc::Sender<Frame<Bytes>>, SentBody) {
    let (sender, receiver) = mpsc::channel(4);
    let frames = futures_util::stream::unfold(receiver, |mut receiver: mpsc::Receiver<Frame<Bytes>>| async {
        receiver.recv().await.map(|frame| (frame, receiver))
    });
    (sender, BodyExt::boxed(StreamBody::new(frames.map(Ok))))
}

enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<SentBody>),
    Http2(hyper::client::conn::http2::SendRequest<SentBody>),
}

/// One HTTP connection to the gateway; requests on it are made one after the other.
pub struct Connection {
    sender: Sender,
    driver: JoinHandle<Result<(), hyper::Error>>,
    authority: String,
    scheme: &'static str,
}

impl Connection {
    pub async fn http1(addr: SocketAddr) -> Connection {
        let stream = connect(addr).await;
        Connection::http1_over(stream, addr.to_string(), "http").await
    }

    /// HTTP/2 over cleartext with prior knowledge.
    pub async fn http2(addr: SocketAddr) -> Connection {
        let stream = connect(addr).await;
        Connection::http2_over(stream, addr.to_string(), "http").await
    }

    /// TLS to `addr` with `sni` in the handshake; ALPN decides which HTTP is spoken.
    pub async fn tls(addr: SocketAddr, config: &Arc<ClientConfig>, sni: &str) -> std::io::Result<Connection> {
        let stream = tls(addr, config, sni).await?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(if http2 {
            Connection::http2_over(stream, sni.to_owned(), "https").await
        } else {
            Connection::http1_over(stream, sni.to_owned(), "https").await
        })
    }

    pub async fn http1_over(io: impl Io + 'static, authority: String, scheme: &'static str) -> Connection {
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(io)).await.expect("an HTTP/1 client");
        let driver = tokio::spawn(connection.with_upgrades());
        Connection { sender: Sender::Http1(sender), driver, authority, scheme }
    }

    pub async fn http2_over(io: impl Io + 'static, authority: String, scheme: &'static str) -> Connection {
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))
                .await
                .expect("an HTTP/2 client");
        let driver = tokio::spawn(connection);
        Connection { sender: Sender::Http2(sender), driver, authority, scheme }
    }

    pub fn version(&self) -> Version {
        match self.sender {
            Sender::Http1(_) => Version::HTTP_11,
            Sender::Http2(_) => Version::HTTP_2,
        }
    }

    /// Sends and reads the whole answer; panics if the connection fails.
    #[track_caller]
    pub fn send(&mut self, call: Call) -> impl Future<Output = Answer> {
        let caller = std::panic::Location::caller();
        async move {
            let name = format!("{} {}", call.method, call.uri);
            self.try_send(call).await.unwrap_or_else(|error| panic!("{caller}: {name}: {error}"))
        }
    }

    /// Sends and reads the whole answer.
    pub async fn try_send(&mut self, call: Call) -> Result<Answer, BoxError> {
        let request = call.into_request(&self.authority, self.scheme, self.version());
        let answer = async { Ok(Answer::read(self.start(request).await?).await?) };
        tokio::time::timeout(DEADLINE, answer).await?
    }

    /// Sends and gives the answer as soon as its headers are there.
    pub async fn open(&mut self, call: Call) -> Result<Response<Incoming>, BoxError> {
        let request = call.into_request(&self.authority, self.scheme, self.version());
        self.start(request).await
    }

    /// Like [`Connection::open`] with a body that is still being made.
    pub async fn open_with(&mut self, call: Call, body: SentBody) -> Result<Response<Incoming>, BoxError> {
        let request = call.into_request(&self.authority, self.scheme, self.version()).map(|_| body);
        self.start(request).await
    }

    async fn start(&mut self, request: Request<SentBody>) -> Result<Response<Incoming>, BoxError> {
        let response = async {
            match &mut self.sender {
                Sender::Http1(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Sender::Http2(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
            }
        };
        Ok(tokio::time::timeout(DEADLINE, response).await??)
    }

    /// Whether the other side has closed the connection or announced that it will.
    pub fn is_closed(&self) -> bool {
        self.driver.is_finished()
            || match &self.sender {
                Sender::Http1(sender) => sender.is_closed(),
                Sender::Http2(sender) => sender.is_closed(),
            }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // An upgraded connection has been taken out of the driver by then.
        self.driver.abort();
    }
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A TCP connection without delay.
pub async fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).await.unwrap_or_else(|error| panic!("connect to {addr}: {error}"));
    stream.set_nodelay(true).expect("TCP_NODELAY");
    stream
}

/// A TLS connection; `sni` may be an IP address, and then no name is sent.
pub async fn tls(
    addr: SocketAddr,
    config: &Arc<ClientConfig>,
    sni: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(sni.to_owned()).expect("a server name");
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
    let stream = connect(addr).await;
    match tokio::time::timeout(DEADLINE, connector.connect(name, stream)).await {
        Ok(result) => result,
        Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
    }
}

/// How a raw connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The other side closed it in order.
    Closed,
    /// The other side reset it.
    Reset,
    /// It was still open when we stopped waiting.
    Open,
}

/// What came back on a raw connection.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub bytes: Bytes,
    pub end: End,
}

impl Outcome {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// The statuses of all HTTP/1 answers in the bytes, interim ones included.
    pub fn statuses(&self) -> Vec<u16> {
        // Good enough for answers the gateway makes: no body of ours contains a status line.
        self.text()
            .match_indices("HTTP/1.")
            .filter_map(|(at, _)| self.bytes.get(at + 9..at + 12))
            .filter_map(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
            .collect()
    }

    /// The last status, if there is one.
    pub fn status(&self) -> Option<u16> {
        self.statuses().last().copied()
    }
}

/// A connection on which exact bytes are sent.
pub struct Raw<S = TcpStream> {
    pub stream: S,
    buffer: BytesMut,
}

impl Raw {
    pub async fn connect(addr: SocketAddr) -> Raw {
        Raw::over(connect(addr).await)
    }
}

impl<S: Io> Raw<S> {
    pub fn over(stream: S) -> Raw<S> {
        Raw { stream, buffer: BytesMut::new() }
    }

    /// Writes the bytes; an error is only noticed when reading, as with a peer that closes early.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = tokio::time::timeout(DEADLINE, self.stream.write_all(bytes.as_ref())).await;
        let _ = self.stream.flush().await;
    }

    /// Closes our sending half.
    pub async fn finish(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Reads everything until the other side ends the connection, or `limit` has passed.
    pub async fn read_to_end(&mut self, limit: Duration) -> Outcome {
        let end = loop {
            match tokio::time::timeout(limit, self.stream.read_buf(&mut self.buffer)).await {
                Ok(Ok(0)) => break End::Closed,
                Ok(Ok(_)) => {}
                Ok(Err(_)) => break End::Reset,
                Err(_) => break End::Open,
            }
        };
        Outcome { bytes: self.buffer.split().freeze(), end }
    }

    /// Reads until the bytes so far contain `mark` and takes everything up to and with it.
    #[track_caller]
    pub fn read_until(&mut self, mark: &str) -> impl Future<Output = Bytes> {
        let caller = std::panic::Location::caller();
        async move {
            loop {
                if let Some(at) = find(&self.buffer, mark.as_bytes()) {
                    return self.buffer.split_to(at + mark.len()).freeze();
                }
                let read = tokio::time::timeout(DEADLINE, self.stream.read_buf(&mut self.buffer)).await;
                match read {
                    Ok(Ok(count)) if count > 0 => {}
                    other => panic!(
                        "{caller}: no {mark:?} but {other:?} after {:?}",
                        String::from_utf8_lossy(&self.buffer)
                    ),
                }
            }
        }
    }

    /// Reads one HTTP/1 answer framed by `Content-Length`, by chunks, or without a body.
    ///
    /// `Err` says how the connection ended instead.
    pub async fn answer(&mut self) -> Result<Answer, End> {
        let head = self.take_until(b"\r\n\r\n").await?;
        let (status, headers) = parse_head(&head);
        let mut body = Bytes::new();
        let mut trailers = None;
        let bodiless = status < 200 || status == 204 || status == 304;
        if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
            let mut whole = BytesMut::new();
            loop {
                let line = self.take_until(b"\r\n").await?;
                let size = String::from_utf8_lossy(&line);
                let size = usize::from_str_radix(size.trim().split(';').next().unwrap_or(""), 16)
                    .unwrap_or_else(|error| panic!("chunk size {size:?}: {error}"));
                if size == 0 {
                    let mut block = String::new();
                    loop {
                        let line = self.take_until(b"\r\n").await?;
                        if &line[..] == b"\r\n" {
                            break;
                        }
                        block.push_str(&String::from_utf8_lossy(&line));
                    }
                    trailers = Some(parse_fields(&block)).filter(|fields| !fields.is_empty());
                    break;
                }
                whole.extend_from_slice(&self.take(size).await?);
                self.take(2).await?;
            }
            body = whole.freeze();
        } else if let Some(length) = headers.get("content-length").filter(|_| !bodiless) {
            let length = length.to_str().ok().and_then(|text| text.parse().ok()).expect("a length");
            body = self.take(length).await?;
        }
        Ok(Answer { status, version: Version::HTTP_11, headers, body, trailers })
    }

    async fn take_until(&mut self, mark: &[u8]) -> Result<Bytes, End> {
        loop {
            if let Some(at) = find(&self.buffer, mark) {
                return Ok(self.buffer.split_to(at + mark.len()).freeze());
            }
            self.fill().await?;
        }
    }

    /// Takes exactly `count` bytes.
    pub async fn take(&mut self, count: usize) -> Result<Bytes, End> {
        while self.buffer.len() < count {
            self.fill().await?;
        }
        Ok(self.buffer.split_to(count).freeze())
    }

    async fn fill(&mut self) -> Result<(), End> {
        match tokio::time::timeout(DEADLINE, self.stream.read_buf(&mut self.buffer)).await {
            Ok(Ok(0)) => Err(End::Closed),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(End::Reset),
            Err(_) => Err(End::Open),
        }
    }
}

/// Sends `bytes` on a new connection and reads until it ends or `limit` passes without a byte.
pub async fn exchange(addr: SocketAddr, bytes: impl AsRef<[u8]>, limit: Duration) -> Outcome {
    let mut raw = Raw::connect(addr).await;
    raw.write(bytes).await;
    raw.read_to_end(limit).await
}

fn parse_head(head: &[u8]) -> (u16, HeaderMap) {
    let text = String::from_utf8_lossy(head).into_owned();
    let (line, fields) = text.split_once("\r\n").expect("a status line");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or_else(|| panic!("a status line, not {line:?}")), parse_fields(fields))
}

fn parse_fields(text: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in text.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("a field, not {line:?}"));
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap_or_else(|_| panic!("a name, not {name:?}"));
        headers.append(name, HeaderValue::from_str(value.trim()).expect("a field value"));
    }
    headers
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}
