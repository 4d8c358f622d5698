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
