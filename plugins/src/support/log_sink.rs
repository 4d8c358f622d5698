//! Servers that loggers send to in their tests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Response};
use layers::error::Error;
use layers::exchange::Exchange;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::peer::Peer;

/// An upstream that answers with a field and a body.
pub fn answered(x: &mut Exchange) -> Result<(), Error> {
    x.response.headers_mut().insert("x-answer", http::HeaderValue::from_static("yes"));
    *x.response.body_mut() = "answer".into();
    Ok(())
}

/// A request that a server got.
#[derive(Clone, Debug)]
pub struct Got {
    pub method: String,
    pub target: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Got {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn field(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// Keeps what was sent to it.
pub struct HttpSink {
    peer: Peer,
    got: Arc<Mutex<Vec<Got>>>,
}

impl HttpSink {
    /// Answers with that status.
    pub async fn start(status: u16) -> Self {
        Self::answering(move |_| (status, String::new())).await
    }

    /// Answers as `answer` says.
    pub async fn answering(answer: impl Fn(&Got) -> (u16, String) + Send + Sync + 'static) -> Self {
        let got = Arc::new(Mutex::new(Vec::new()));
        let kept = got.clone();
        let peer = Peer::start(move |request| {
            let (head, body) = request.into_parts();
            let target = head.uri.path_and_query().unwrap().to_string();
            let got = Got { method: head.method.to_string(), target, headers: head.headers, body };
            let (status, text) = answer(&got);
            kept.lock().unwrap().push(got);
            Response::builder().status(status).body(text.into()).unwrap()
        })
        .await;
        Self { peer, got }
    }

    pub fn url(&self, path: &str) -> String {
        self.peer.url(path)
    }

    /// Waits for something.
    pub async fn until(&self, holds: impl Fn() -> bool) {
        let wait = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
    }

    /// The requests, when there are so many.
    pub async fn requests(&self, count: usize) -> Vec<Got> {
        self.until(|| self.got.lock().unwrap().len() >= count).await;
        self.got.lock().unwrap().clone()
    }
}

/// A server that speaks TLS as `localhost`.
pub struct TlsSink {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

/// A server that speaks TLS, its port, and the certificate to trust.
pub async fn tls_listener() -> (TlsSink, u16, CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (TlsSink { listener, acceptor: TlsAcceptor::from(Arc::new(config)) }, port, certificate)
}

impl TlsSink {
    /// All that the next connection brings.
    pub async fn text(&self) -> String {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut stream = self.acceptor.accept(stream).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }
}
