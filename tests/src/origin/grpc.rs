//! A gRPC service with all four kinds of call, and a client for it; both written without generated code.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::uri::PathAndQuery;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, ServerConfig};
use std::net::SocketAddr;
use tonic::body::Body;
use tonic::client::Grpc as Client;
use tonic::server::{
    ClientStreamingService, Grpc as Server, ServerStreamingService, StreamingService, UnaryService,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::{Origin, Seen, serve_with};
use crate::client::Io;

/// The one message, for both ways.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Word {
    #[prost(string, tag = "1")]
    pub text: String,
    /// In a request: how many answers are wanted, or the status to fail with.
    #[prost(int32, tag = "2")]
    pub number: i32,
}

pub fn word(text: &str, number: i32) -> Word {
    Word { text: text.to_owned(), number }
}

type Words = Pin<Box<dyn Stream<Item = Result<Word, Status>> + Send>>;
type Reply<T> = Pin<Box<dyn Future<Output = Result<tonic::Response<T>, Status>> + Send>>;

/// Gives the message back in upper case, with metadata of the request; `fail` fails with `number` as status.
struct Unary;

impl UnaryService<Word> for Unary {
    type Response = Word;
    type Future = Reply<Word>;

    fn call(&mut self, request: tonic::Request<Word>) -> Self::Future {
        Box::pin(async move {
            let seen = request.metadata().get("x-test").cloned();
            let message = request.into_inner();
            if message.text == "fail" {
                return Err(Status::new(message.number.into(), "asked to fail"));
            }
            let mut response = tonic::Response::new(word(&message.text.to_uppercase(), message.number));
            if let Some(seen) = seen {
                response.metadata_mut().insert("x-seen", seen);
            }
            Ok(response)
        })
    }
}

/// Counts from one to `number`; `text` "fail" ends the stream with ABORTED after that.
struct Count;

impl ServerStreamingService<Word> for Count {
    type Response = Word;
    type ResponseStream = Words;
    type Future = Reply<Words>;

    fn call(&mut self, request: tonic::Request<Word>) -> Self::Future {
        let message = request.into_inner();
        let end = (message.text == "fail").then(|| Err(Status::aborted("asked to fail")));
        let words = (1..=message.number).map(move |number| Ok(word(&message.text, number))).chain(end);
        let words: Words = Box::pin(futures_util::stream::iter(words));
        Box::pin(async move { Ok(tonic::Response::new(words)) })
    }
}

/// Joins all texts and adds all numbers.
struct Join;

impl ClientStreamingService<Word> for Join {
    type Response = Word;
    type Future = Reply<Word>;

    fn call(&mut self, request: tonic::Request<Streaming<Word>>) -> Self::Future {
        Box::pin(async move {
            let mut words = request.into_inner();
            let mut all = Word::default();
            while let Some(next) = words.message().await? {
                all.text.push_str(&next.text);
                all.number += next.number;
            }
            Ok(tonic::Response::new(all))
        })
    }
}

/// Sends every message back as it comes.
struct Chat;

impl StreamingService<Word> for Chat {
    type Response = Word;
    type ResponseStream = Words;
    type Future = Reply<Words>;

    fn call(&mut self, request: tonic::Request<Streaming<Word>>) -> Self::Future {
        let words: Words = Box::pin(request.into_inner());
        Box::pin(async move { Ok(tonic::Response::new(words)) })
    }
}

async fn dispatch(seen: Arc<Seen>, request: Request<Incoming>) -> Response<Body> {
    seen.request();
    let codec = ProstCodec::<Word, Word>::default();
    match request.uri().path() {
        "/e2e.Words/Unary" => Server::new(codec).unary(Unary, request).await,
        "/e2e.Words/Count" => Server::new(codec).server_streaming(Count, request).await,
        "/e2e.Words/Join" => Server::new(codec).client_streaming(Join, request).await,
        "/e2e.Words/Chat" => Server::new(codec).streaming(Chat, request).await,
        _ => Status::unimplemented("no such method").into_http(),
    }
}

async fn serve(io: impl Io + 'static, seen: Arc<Seen>) {
    serve_with(io, move |request| dispatch(Arc::clone(&seen), request)).await;
}

/// The service over cleartext HTTP/2.
pub async fn start() -> Origin {
    Origin::tcp(serve).await
}

/// [`start`] at an address.
pub async fn start_at(addr: SocketAddr) -> Origin {
    Origin::tcp_at(addr, serve).await
}

/// The service over TLS.
pub async fn tls(config: Arc<ServerConfig>) -> Origin {
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    Origin::tcp(move |stream, seen| {
        let acceptor = acceptor.clone();
        async move {
            if let Ok(stream) = acceptor.accept(stream).await {
                serve(stream, seen).await;
            }
        }
    })
    .await
}

/// A client of the service.
#[derive(Clone)]
pub struct WordsClient {
    inner: Client<Channel>,
}

impl WordsClient {
    /// Over cleartext HTTP/2.
    pub async fn connect(addr: SocketAddr) -> WordsClient {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("an endpoint");
        WordsClient { inner: Client::new(endpoint.connect().await.expect("a gRPC connection")) }
    }

    /// Over TLS with `sni` as name; `config` must offer `h2`.
    pub async fn connect_tls(addr: SocketAddr, config: Arc<ClientConfig>, sni: &str) -> WordsClient {
        let endpoint = Endpoint::from_shared(format!("http://{sni}")).expect("an endpoint");
        let sni = sni.to_owned();
        let connector = tower::service_fn(move |_| {
            let (config, sni) = (Arc::clone(&config), sni.clone());
            async move { crate::client::tls(addr, &config, &sni).await.map(TokioIo::new) }
        });
        let channel = endpoint.connect_with_connector(connector).await.expect("a gRPC connection");
        WordsClient { inner: Client::new(channel) }
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.inner.ready().await.map_err(|error| Status::unavailable(error.to_string()))
    }

    pub async fn unary(&mut self, request: tonic::Request<Word>) -> Result<tonic::Response<Word>, Status> {
        self.ready().await?;
        self.inner.unary(request, path("/e2e.Words/Unary"), codec()).await
    }

    pub async fn count(&mut self, message: Word) -> Result<tonic::Response<Streaming<Word>>, Status> {
        self.ready().await?;
        self.inner.server_streaming(tonic::Request::new(message), path("/e2e.Words/Count"), codec()).await
    }

    pub async fn join(
        &mut self,
        words: impl Stream<Item = Word> + Send + 'static,
    ) -> Result<tonic::Response<Word>, Status> {
        self.ready().await?;
        self.inner.client_streaming(tonic::Request::new(words), path("/e2e.Words/Join"), codec()).await
    }

    pub async fn chat(
        &mut self,
        words: impl Stream<Item = Word> + Send + 'static,
    ) -> Result<tonic::Response<Streaming<Word>>, Status> {
        self.ready().await?;
        self.inner.streaming(tonic::Request::new(words), path("/e2e.Words/Chat"), codec()).await
    }
}

fn path(path: &'static str) -> PathAndQuery {
    PathAndQuery::from_static(path)
}

fn codec() -> ProstCodec<Word, Word> {
    ProstCodec::default()
}

/// A call whose messages the test sends one by one.
pub fn outgoing() -> (tokio::sync::mpsc::Sender<Word>, impl Stream<Item = Word> + Send + 'static) {
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let words =
        futures_util::stream::unfold(receiver, |mut receiver: tokio::sync::mpsc::Receiver<Word>| async {
            receiver.recv().await.map(|word| (word, receiver))
        });
    (sender, words.boxed())
}

/// A unary message in its wire frame, for clients that are not tonic.
pub fn frame(word: &Word) -> Bytes {
    use prost::Message;
    let message = word.encode_to_vec();
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).expect("a short message").to_be_bytes());
    frame.extend_from_slice(&message);
    frame.into()
}
