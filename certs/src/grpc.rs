//! gRPC over TLS of our own and over socket files: connections by rustls with the configurations of this crate, and a server
//! that tells who is calling and ends in order. For what processes of Postern say to each other; requests of clients never come by here.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info};

use crate::{files, outgoing};

const ALPN: &[u8] = b"h2";
const CONNECT: Duration = Duration::from_secs(5);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A peer that is gone without a word is noticed by these.
const PING: Duration = Duration::from_secs(10);
const SERVER_PONG: Duration = Duration::from_secs(10);
const CLIENT_PONG: Duration = Duration::from_secs(5);
/// What calls under way get after a stop.
const LAST: Duration = Duration::from_secs(10);
/// After a failure to accept, as a rule for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// How a server is reached.
#[derive(Clone, Debug)]
pub struct Dial {
    /// `host:port`.
    pub server: String,
    /// Without it nothing is encrypted.
    pub tls: Option<Arc<ClientConfig>>,
    /// The name that the server's certificate has to have, where it is not its host.
    pub server_name: Option<String>,
    /// How long the server may leave a ping without an answer.
    pub patience: Option<Duration>,
}

impl Dial {
    /// A connection that stands, or says why not.
    ///
    /// # Errors
    /// In words, with what is below.
    pub async fn connect(&self) -> Result<Channel, String> {
        let server = &self.server;
        let uri: Uri = format!("http://{server}").parse().map_err(|error| format!("`{server}`: {error}"))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().ok_or_else(|| format!("`{server}` has no port"))?;
        let tls = match &self.tls {
            None => None,
            Some(tls) => {
                let name = self.server_name.clone().unwrap_or_else(|| host.clone());
                let name = ServerName::try_from(name).map_err(|error| error.to_string())?;
                Some((TlsConnector::from(Arc::clone(tls)), name))
            }
        };
        let connector = tower::service_fn(move |_: Uri| {
            let (host, tls) = (host.clone(), tls.clone());
            async move {
                let stream = timeout(CONNECT, outgoing::connect_to((host.as_str(), port))).await??;
                stream.set_nodelay(true)?;
                let io: Box<dyn Io> = match tls {
                    None => Box::new(stream),
                    Some((connector, name)) => {
                        Box::new(timeout(CONNECT, connector.connect(name, stream)).await??)
                    }
                };
                Ok::<_, io::Error>(TokioIo::new(io))
            }
        });
        let endpoint = Endpoint::from(uri)
            .http2_keep_alive_interval(self.patience.unwrap_or(PING))
            .keep_alive_timeout(self.patience.unwrap_or(CLIENT_PONG))
            .keep_alive_while_idle(true);
        endpoint.connect_with_connector(connector).await.map_err(|error| chain(&error))
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// An error with its causes: the last one is what an operator needs.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Who calls; an extension of each request.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Where the connection comes from, if that is not a process of this machine over a socket file.
    pub address: Option<SocketAddr>,
    /// What was shown in the handshake, leaf first, and believed by the configuration of the server.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// The user of a process of this machine, as the kernel says.
    pub user: Option<u32>,
}

impl Caller {
    /// Who sent a request.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }
}

/// Where callers come in.
#[derive(Debug)]
pub enum Door {
    /// Encrypted where there is a configuration.
    Tcp(TcpListener, Option<Arc<ServerConfig>>),
    Unix(UnixListener),
}

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time. Those beyond are closed at once.
    pub connections: usize,
    /// Calls at a time on one connection.
    pub calls: u32,
}

/// Somebody at the door.
enum Guest {
    Tcp(TcpStream, SocketAddr, Option<Arc<ServerConfig>>),
    Unix(UnixStream),
}

impl Door {
    async fn guest(&self) -> io::Result<Guest> {
        match self {
            Self::Tcp(listener, tls) => {
                let (stream, address) = listener.accept().await?;
                Ok(Guest::Tcp(stream, address, tls.clone()))
            }
            Self::Unix(listener) => Ok(Guest::Unix(listener.accept().await?.0)),
        }
    }
}

/// Serves until it is dropped; connections end with it.
pub async fn serve<S>(listener: TcpListener, tls: Option<Arc<ServerConfig>>, limits: Limits, service: S)
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    serve_until(Door::Tcp(listener, tls), limits, service, std::future::pending()).await;
}

/// Serves until `stop`. Then nobody is let in, calls that are under way get ten seconds, and connections are closed. When it
/// is dropped, everything ends at once.
pub async fn serve_until<S>(door: Door, limits: Limits, service: S, stop: impl Future<Output = ()>)
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let places = Arc::new(Semaphore::new(limits.connections));
    let (stopping, stopped) = watch::channel(false);
    // Connections end with the server.
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let guest = tokio::select! {
            accepted = door.guest() => match accepted {
                Ok(guest) => guest,
                Err(error) => {
                    debug!(%error, "no connection was accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
            () = &mut stop => break,
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            info!(most = limits.connections, "a connection is turned away: there are too many");
            continue;
        };
        let (service, stopped) = (service.clone(), stopped.clone());
        connections.spawn(async move {
            let served = match greet(guest).await {
                Ok((stream, caller)) => connection(stream, caller, limits, service, stopped).await,
                Err(error) => Err(error),
            };
            // How a connection ends is the caller's affair.
            if let Err(error) = served {
                debug!(%error, "a connection has ended");
            }
            drop(place);
        });
    }
    drop(door);
    stopping.send_replace(true);
    let ending = async { while connections.join_next().await.is_some() {} };
    if timeout(LAST, ending).await.is_err() {
        info!("calls that did not end in ten seconds are cut");
    }
}

/// Who has come, and the stream to speak over.
async fn greet(guest: Guest) -> Result<(Box<dyn Io>, Caller), String> {
    let (stream, address, tls) = match guest {
        Guest::Unix(stream) => {
            let user = stream.peer_cred().map_err(|error| error.to_string())?.uid();
            return Ok((Box::new(stream), Caller { user: Some(user), ..Caller::default() }));
        }
        Guest::Tcp(stream, address, tls) => (stream, address, tls),
    };
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let caller = Caller { address: Some(address), ..Caller::default() };
    let Some(tls) = tls else { return Ok((Box::new(stream), caller)) };
    let accepting = timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(stream)).await;
    let stream = accepting.map_err(|_| "no TLS handshake within 10 s")?.map_err(|error| error.to_string())?;
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain = shown.iter().map(|shown| shown.clone().into_owned()).collect();
    Ok((Box::new(stream), Caller { chain, ..caller }))
}

async fn connection<T, S>(
    stream: T,
    caller: Caller,
    limits: Limits,
    service: S,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        let mut service = service.clone();
        request.extensions_mut().insert(caller.clone());
        async move { service.call(request).await }
    });
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(SERVER_PONG)
        .max_concurrent_streams(limits.calls)
        .max_header_list_size(16 * 1024)
        .max_send_buf_size(64 * 1024);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let stop = async { drop(stopped.wait_for(|stopped| *stopped).await) };
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stop => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(|error| error.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A server with this certificate; clients have to show one that is signed by `client_ca` where there is such a file.
///
/// # Errors
/// A file cannot be read or used.
pub fn server_tls(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<Arc<ServerConfig>, String> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let roots = files::trusted_roots(file).map_err(|error| error.to_string())?;
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| error.to_string())?)
        }
    };
    let chain = files::certificates(certificate).map_err(|error| error.to_string())?;
    let key = files::private_key(key).map_err(|error| error.to_string())?;
    let mut config = builder.with_single_cert(chain, key).map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// A client that trusts `ca`, or what the system trusts, and shows a certificate where it has one.
///
/// # Errors
/// A file cannot be read or used.
pub fn client_tls(ca: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>, String> {
    let roots =
        ca.map_or_else(files::system_roots, files::trusted_roots).map_err(|error| error.to_string())?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = files::certificates(certificate).map_err(|error| error.to_string())?;
            let key = files::private_key(key).map_err(|error| error.to_string())?;
            builder.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}
