//! A server that plugins ask in their tests: it answers by a function, over plain text or TLS, and counts connections.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// A server of a test. It lives as long as the runtime of the test.
pub struct Peer {
    pub address: SocketAddr,
    scheme: &'static str,
    connections: Arc<AtomicUsize>,
    roots: Vec<CertificateDer<'static>>,
}

/// A runtime like the control side's.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

async fn serve<I, F>(io: I, answer: Arc<F>)
where
    I: Read + Write + Unpin + Send + 'static,
    F: Fn(Request<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Ok::<_, Infallible>(answer(Request::from_parts(head, body)).map(Full::new))
        }
    });
    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
}

impl Peer {
    /// Serves plain HTTP.
    pub async fn start<F>(answer: F) -> Self
    where
        F: Fn(Request<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
    {
        Self::accept(answer, None, Vec::new()).await
    }

    /// Serves HTTPS as `localhost`, h2 and http/1.1.
    pub async fn start_tls<F>(answer: F) -> Self
    where
        F: Fn(Request<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
    {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::accept(answer, Some(TlsAcceptor::from(Arc::new(config))), vec![certificate]).await
    }

    async fn accept<F>(answer: F, tls: Option<TlsAcceptor>, roots: Vec<CertificateDer<'static>>) -> Self
    where
        F: Fn(Request<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, answer) = (connections.clone(), Arc::new(answer));
        let scheme = if tls.is_some() { "https" } else { "http" };
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let (tls, answer) = (tls.clone(), answer.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(TokioIo::new(socket), answer).await,
                        Some(tls) => {
                            if let Ok(socket) = tls.accept(socket).await {
                                serve(TokioIo::new(socket), answer).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, scheme, connections, roots }
    }

    /// The URL of `path`, by address.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The authority of the certificate.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.roots.clone()
    }
}
