//! Batches of log entries sent over TCP, with TLS where asked, and UDP.

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use config::error::ConfigError;
use layers::plugin::BuildEnv;
use layers::upstream::tls_client::{Offer, TlsSettings};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The largest datagram that IPv4 carries.
pub const DATAGRAM: usize = 65_507;

/// A host and a port.
#[derive(Clone, Debug)]
pub struct Remote {
    host: String,
    port: u16,
}

impl Remote {
    /// The place, whose name is looked up for each connection.
    pub fn new(host: &str, port: u16) -> Self {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Self { host: host.to_owned(), port }
    }

    async fn addresses(&self) -> io::Result<impl Iterator<Item = SocketAddr>> {
        tokio::net::lookup_host((self.host.as_str(), self.port)).await
    }

    /// A connection.
    ///
    /// # Errors
    /// No address takes it.
    pub async fn tcp(&self) -> io::Result<TcpStream> {
        let stream = certs::outgoing::connect_to((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// A socket whose datagrams go there.
    ///
    /// # Errors
    /// The name has no address, or there is no socket for it.
    pub async fn udp(&self) -> io::Result<UdpSocket> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
        for address in self.addresses().await? {
            let any: SocketAddr =
                if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() };
            let socket = UdpSocket::bind(any).await?;
            match socket.connect(address).await {
                Ok(()) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// As it is told in the log.
    pub fn told(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// How a TCP connection is made: plain, or with TLS.
#[derive(Clone)]
pub struct Dialer {
    remote: Remote,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

/// The TLS of a [`Dialer`].
#[derive(Clone, Copy, Debug)]
pub struct Tls<'a> {
    /// Check the certificate of the server.
    pub verify: bool,
    /// The name that is asked for and checked; the host's without it.
    pub name: Option<&'a str>,
    /// The setting that switches it on.
    pub pointer: &'a str,
}

impl Dialer {
    /// To a host, which is checked with `tls`.
    ///
    /// # Errors
    /// The name cannot be checked, or there are no authorities to check it with.
    pub fn new(remote: Remote, tls: Option<Tls<'_>>, env: &BuildEnv<'_>) -> Result<Self, ConfigError> {
        let connector = |tls: Tls<'_>| {
            let wanted = TlsSettings {
                verify: tls.verify,
                authorities: Vec::new(),
                client: None,
                offer: Offer::Nothing,
            };
            let config = env.tls.config(&wanted).map_err(|error| {
                ConfigError::invalid(tls.pointer, format!("certificates cannot be checked: {error}"))
            })?;
            let name = tls.name.unwrap_or(&remote.host);
            let name = ServerName::try_from(name.to_owned())
                .map_err(|_| ConfigError::invalid(tls.pointer, format!("`{name}` is no name of a server")))?;
            Ok((TlsConnector::from(Arc::clone(&config)), name))
        };
        let tls = tls.map(connector).transpose()?;
        Ok(Self { remote, tls })
    }

    /// A connection.
    ///
    /// # Errors
    /// There is none, or the server is not whom it should be.
    pub async fn dial(&self) -> io::Result<Stream> {
        let plain = self.remote.tcp().await?;
        match &self.tls {
            None => Ok(Stream::Plain(plain)),
            Some((connector, name)) => {
                Ok(Stream::Tls(Box::new(connector.connect(name.clone(), plain).await?)))
            }
        }
    }

    /// As it is told in the log.
    pub fn told(&self) -> String {
        self.remote.told()
    }
}

/// A connection, plain or with TLS.
pub enum Stream {
    /// Plain.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Whether the other end has not closed it. What it says is not looked at.
    pub fn is_open(&self) -> bool {
        let tcp = match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        };
        let mut byte = [MaybeUninit::uninit(); 1];
        // Asks the system and not the runtime, which may not have heard of the end yet.
        match SockRef::from(tcp).peek(&mut byte) {
            Ok(0) => false,
            // Under TLS, whoever says something unasked says goodbye.
            Ok(_) => matches!(self, Self::Plain(_)),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
