//! One listener of the control plane: Admin, Control or status API.
//!
//! HTTP/1.1 and HTTP/2 by hyper, on the control runtime, with bounds that a stuck or hostile client cannot
//! pass: connections, time for a handshake, for headers, for a whole request. Nothing of the data path comes
//! through here.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use config::process::AdminTls;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::admin::Admin;
use crate::admin::reply::{Reply, ReplyBody};
use crate::store::BoxFuture;

/// Connections at a time; more wait in the kernel.
const MAX_CONNECTIONS: usize = 512;
/// Time for a TLS handshake, and for the headers of a request; idle connections end after it too.
const HEADERS: Duration = Duration::from_secs(30);
/// Time for one request, its body included.
const REQUEST: Duration = Duration::from_secs(120);
/// Time for requests under way when the process ends.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause when a connection cannot be accepted, for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers requests of one listener.
pub trait Handler: Send + Sync + 'static {
    /// One answer. Never fails.
    fn handle(&self, peer: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>>;
}

impl Handler for Admin {
    fn handle(&self, peer: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>> {
        Box::pin(Admin::handle(self, peer.ip(), request))
    }
}

/// A bound listener.
pub struct Endpoint {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Endpoint {
    /// Bind `address`. Must be called inside the control runtime.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn bind(address: SocketAddr, tls: Option<Arc<ServerConfig>>) -> io::Result<Endpoint> {
        let listener = TcpListener::bind(address).await?;
        Ok(Endpoint { listener, tls: tls.map(TlsAcceptor::from) })
    }

    /// The address that is bound: with the port, where 0 was asked for.
    ///
    /// # Errors
    /// If the operating system does not tell.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serve until `shutdown` is ready, then finish what is under way, for 5 seconds at most.
    pub async fn serve(self, handler: Arc<dyn Handler>, shutdown: impl Future<Output = ()>) {
        let Endpoint { listener, tls } = self;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (stop, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accept = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            let accepted = tokio::select! {
                accepted = accept => accepted,
                () = &mut shutdown => break,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                (Ok(slot), Ok((stream, peer))) => {
                    let (handler, tls, stopped) = (Arc::clone(&handler), tls.clone(), stopped.clone());
                    connections.spawn(async move {
                        connection(stream, peer, tls, handler, stopped).await;
                        drop(slot);
                    });
                }
                (_, Err(error)) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                (Err(_), _) => break,
            }
        }
        drop(listener);
        stop.send_replace(true);
        let finished = timeout(DRAIN, async { while connections.join_next().await.is_some() {} });
        if finished.await.is_err() {
            tracing::warn!(connections = connections.len(), "control connections cut at the end");
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    handler: Arc<dyn Handler>,
    stopped: watch::Receiver<bool>,
) {
    // Answers are small and clients wait for them.
    let _ = stream.set_nodelay(true);
    match tls {
        None => http(stream, peer, handler, stopped).await,
        Some(tls) => match timeout(HEADERS, tls.accept(stream)).await {
            Ok(Ok(stream)) => http(stream, peer, handler, stopped).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
        },
    }
}

async fn http<S>(stream: S, peer: SocketAddr, handler: Arc<dyn Handler>, mut stopped: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let handler = Arc::clone(&handler);
        async move {
            let response = timeout(REQUEST, handler.handle(peer, request)).await.unwrap_or_else(|_| {
                Reply::error(StatusCode::GATEWAY_TIMEOUT, "the request took too long").into_response()
            });
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(HEADERS).max_concurrent_streams(64);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = async { drop(stopped.wait_for(|stopped| *stopped).await) } => None,
    };
    let result = match ended {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, error, "control connection ended");
    }
}

/// TLS of the Admin API from its files. Blocks.
///
/// # Errors
/// If a file cannot be read or does not hold what it should.
pub fn admin_tls(files: &AdminTls) -> io::Result<Arc<ServerConfig>> {
    let wrong = |path: &Path, error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
    };
    let certificates = |path: &Path| -> io::Result<Vec<CertificateDer<'static>>> {
        let found: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(path).map_err(|error| wrong(path, &error))?.collect();
        let found = found.map_err(|error| wrong(path, &error))?;
        if found.is_empty() { Err(wrong(path, &"no certificate in it")) } else { Ok(found) }
    };
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| wrong(&files.key, &error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(&files.cert, &error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| wrong(path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| wrong(path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certificates(&files.cert)?, key)
        .map_err(|error| wrong(&files.cert, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::path::PathBuf;

    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tokio::io::AsyncReadExt;
    use tokio::sync::oneshot;
    use tokio_rustls::TlsConnector;

    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, peer: SocketAddr, request: Request<Incoming>) -> BoxFuture<'_, Response<ReplyBody>> {
            let text = format!("{} {}", peer.ip(), request.uri().path());
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Reply::with(StatusCode::OK, "text/plain", text).into_response()
            })
        }
    }

    async fn serve(
        tls: Option<Arc<ServerConfig>>,
    ) -> (SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let endpoint = Endpoint::bind(SocketAddr::from(([127, 0, 0, 1], 0)), tls).await.unwrap();
        let address = endpoint.address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(endpoint.serve(Arc::new(Echo), async { drop(stopped.await) }));
        (address, stop, task)
    }

    async fn get<S>(stream: S) -> Result<String, Box<dyn std::error::Error>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder().uri("/x").header("host", "h").body(Empty::<Bytes>::new())?;
        let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
        drop(sender);
        connection.await??;
        Ok(String::from_utf8(body.to_vec())?)
    }

    #[tokio::test]
    async fn a_request_under_way_is_answered_before_the_end() {
        let (address, stop, task) = serve(None).await;
        let request =
            tokio::spawn(async move { get(TcpStream::connect(address).await.unwrap()).await.unwrap() });
        // Connected and idle: must not hold up the end.
        let mut idle = TcpStream::connect(address).await.unwrap();
        assert_eq!(get(TcpStream::connect(address).await.unwrap()).await.unwrap(), "127.0.0.1 /x");
        stop.send(()).unwrap();
        assert_eq!(request.await.unwrap(), "127.0.0.1 /x");
        timeout(Duration::from_secs(4), task).await.unwrap().unwrap();
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
        assert!(TcpStream::connect(address).await.is_err());
    }

    struct Files {
        directory: tempfile::TempDir,
    }

    impl Files {
        /// `ca`, and `server` and `client` signed by it; `stranger` signed by nobody.
        fn new() -> Files {
            let files = Files { directory: tempfile::tempdir().unwrap() };
            let key = rcgen::KeyPair::generate().unwrap();
            let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
            ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            std::fs::write(files.path("ca.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
            let issuer = rcgen::Issuer::new(ca, key);
            for name in ["server", "client", "stranger"] {
                let key = rcgen::KeyPair::generate().unwrap();
                let params = rcgen::CertificateParams::new(vec![format!("{name}.test")]).unwrap();
                let certificate = match name {
                    "stranger" => params.self_signed(&key).unwrap(),
                    _ => params.signed_by(&key, &issuer).unwrap(),
                };
                std::fs::write(files.path(&format!("{name}.pem")), certificate.pem()).unwrap();
                std::fs::write(files.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
            }
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn tls(&self, client_ca: Option<&str>) -> AdminTls {
            let client_ca = client_ca.map(|name| self.path(name));
            AdminTls { cert: self.path("server.pem"), key: self.path("server.key"), client_ca }
        }

        async fn connect(
            &self,
            address: SocketAddr,
            identity: Option<&str>,
        ) -> Result<String, Box<dyn std::error::Error>> {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(self.path("ca.pem"))?)?;
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots);
            let config = match identity {
                None => builder.with_no_client_auth(),
                Some(name) => builder.with_client_auth_cert(
                    vec![CertificateDer::from_pem_file(self.path(&format!("{name}.pem")))?],
                    PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key")))?,
                )?,
            };
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("server.test")?;
            get(TlsConnector::from(Arc::new(config)).connect(name, stream).await?).await
        }
    }

    #[tokio::test]
    async fn https_and_certificates_of_clients() {
        let files = Files::new();
        let (address, _stop, _task) = serve(Some(admin_tls(&files.tls(None)).unwrap())).await;
        assert_eq!(files.connect(address, None).await.unwrap(), "127.0.0.1 /x");
        let (address, _stop, _task) = serve(Some(admin_tls(&files.tls(Some("ca.pem"))).unwrap())).await;
        assert_eq!(files.connect(address, Some("client")).await.unwrap(), "127.0.0.1 /x");
        assert!(files.connect(address, None).await.is_err());
        assert!(files.connect(address, Some("stranger")).await.is_err());
        for (what, tls) in [
            ("a missing file", AdminTls { cert: files.path("gone.pem"), ..files.tls(None) }),
            ("a key that is none", AdminTls { key: files.path("server.pem"), ..files.tls(None) }),
            ("another key", AdminTls { key: files.path("client.key"), ..files.tls(None) }),
            ("no certificate", AdminTls { client_ca: Some(files.path("server.key")), ..files.tls(None) }),
        ] {
            assert!(admin_tls(&tls).is_err(), "{what}");
        }
    }
}
