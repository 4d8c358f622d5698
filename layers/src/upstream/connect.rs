//! A connection to one address: TCP, then TLS if the upstream asks for it, within one time limit.
//!
//! Nothing is written before the connection stands, so every failure here may be tried again elsewhere.
//! Endpoints are addresses; names were resolved in the background.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::mesh::{self, Carries, MeshLink, MeshPeer};
use crate::error::{Error, Reason};
use crate::transport::hbone::Tunnel;
use crate::transport::join;
use crate::transport::original_dst::{AsClient, connect_as};

/// What went over a connection so far. A retry needs to know whether the request reached the socket.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) written: Cell<u64>,
    pub(crate) read: Cell<u64>,
    /// The peer has refused our certificate, of which TLS 1.3 tells only when something is read: nothing that was written
    /// has been looked at.
    pub(crate) refused: Cell<bool>,
}

/// A connected stream that counts.
#[derive(Debug)]
pub(crate) struct Io {
    stream: Transport,
    traffic: Rc<Traffic>,
    mesh: Option<Rc<MeshLink>>,
}

#[derive(Debug)]
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Tunnel(Box<Tunnel>),
}

impl Io {
    pub(crate) fn traffic(&self) -> &Rc<Traffic> {
        &self.traffic
    }

    /// What has to be remembered of it, where the peer is of the mesh.
    pub(crate) fn mesh(&self) -> Option<&Rc<MeshLink>> {
        self.mesh.as_ref()
    }

    /// The protocol that was agreed on in the handshake.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match &self.stream {
            Transport::Plain(_) | Transport::Tunnel(_) => None,
            Transport::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }
}

/// Connect to `addr`, as another if there is one, and shake hands under `name` if there is a TLS configuration.
///
/// # Errors
/// Always retryable: nothing of the request was sent.
pub(crate) async fn connect(
    addr: SocketAddr,
    as_client: Option<AsClient>,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    limit: Duration,
) -> Result<Io, Error> {
    let connecting = async {
        let stream = tcp(addr, as_client).await?;
        let stream = match tls {
            None => Transport::Plain(stream),
            Some((config, name)) => {
                let stream = TlsConnector::from(config).connect(name, stream).await;
                Transport::Tls(Box::new(stream.map_err(|error| failed(tls_reason(&error), error))?))
            }
        };
        Ok(Io { stream, traffic: Rc::default(), mesh: None })
    };
    match tokio::time::timeout(limit, connecting).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(Reason::ConnectTimeout).retryable(true)),
    }
}

/// Connect to a node of the mesh.
///
/// # Errors
/// Retryable, but for a process without an identity: then no node can be spoken to.
pub(crate) async fn connect_mesh(
    addr: SocketAddr,
    peer: &Arc<MeshPeer>,
    carries: Carries,
    limit: Duration,
) -> Result<Io, Error> {
    let config = peer.config(carries)?;
    let connecting = async {
        let stream = tcp(addr, None).await?;
        let connecting = TlsConnector::from(config).connect(addr.ip().into(), stream);
        let stream = connecting.await.map_err(|error| match tls_error(&error) {
            Some(cause) => failed(peer.failed(cause), error),
            None => failed(Reason::TlsFailed, error),
        })?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(carries.alpn()) {
            let error =
                Error::new(Reason::TlsFailed).detail("the node of the mesh does not speak our protocol");
            return Err(error.retryable(true));
        }
        let mesh = Some(Rc::new(peer.connected(session.peer_certificates())));
        Ok(Io { stream: Transport::Tls(Box::new(stream)), traffic: Rc::default(), mesh })
    };
    match tokio::time::timeout(limit, connecting).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(Reason::ConnectTimeout).retryable(true)),
    }
}

/// Connect to a node of the mesh through a tunnel. What is spoken inside is the application's matter.
///
/// # Errors
/// As [`connect_mesh`].
pub(crate) async fn connect_tunnel(
    addr: SocketAddr,
    peer: &Arc<MeshPeer>,
    limit: Duration,
) -> Result<Io, Error> {
    let (tunnel, link) = peer.tunnel(addr, limit).await?;
    let (stream, mesh) = (Transport::Tunnel(Box::new(tunnel)), Some(Rc::new(link)));
    Ok(Io { stream, traffic: Rc::default(), mesh })
}

async fn tcp(addr: SocketAddr, as_client: Option<AsClient>) -> Result<TcpStream, Error> {
    let stream = match as_client {
        Some(AsClient { address, mark }) => connect_as(address, addr, mark).await,
        None => certs::outgoing::connect(addr).await,
    };
    let stream = stream.map_err(|error| failed(Reason::ConnectFailed, error))?;
    // Requests are written whole; waiting for more would only delay the last piece.
    stream.set_nodelay(true).map_err(|error| failed(Reason::ConnectFailed, error))?;
    Ok(stream)
}

fn failed(reason: Reason, error: io::Error) -> Error {
    Error::new(reason).because(error).retryable(true)
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|cause| cause.downcast_ref())
}

fn tls_reason(error: &io::Error) -> Reason {
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            Reason::TlsCertificate
        }
        _ => Reason::TlsFailed,
    }
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let result = match &mut this.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Tunnel(stream) => Pin::new(stream).poll_read(cx, buffer),
        };
        let read = buffer.filled().len() - before;
        this.traffic.read.set(this.traffic.read.get() + read as u64);
        if let (Poll::Ready(Err(error)), Some(mesh)) = (&result, &this.mesh)
            && this.traffic.read.get() == 0
            && let Some(rustls::Error::AlertReceived(alert)) = tls_error(error)
            && mesh::is_about_us(*alert)
        {
            this.traffic.refused.set(true);
            mesh.peer().refused(*alert);
        }
        result
    }
}

impl Io {
    fn count(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = result {
            self.traffic.written.set(self.traffic.written.get() + written as u64);
        }
        result
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = match &mut this.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tunnel(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        this.count(result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = match &mut this.stream {
            Transport::Plain(stream) => join::poll_write(Pin::new(stream), cx, pieces),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, pieces),
            Transport::Tunnel(stream) => join::poll_write(Pin::new(stream), cx, pieces),
        };
        this.count(result)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
            Transport::Tunnel(_) => true,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
