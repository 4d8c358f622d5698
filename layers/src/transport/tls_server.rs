//! TLS from clients. The ClientHello is read first, whole whatever records it comes in; its server name picks the
//! `ssl` resource, whose configuration then runs the handshake. A change of the table is seen by the next handshake.
//! What the client proved is kept with the connection; what a request may do with it is judged here too.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use certs::signer::pool::Crowded;
use certs::verify::ClientIdentity;
use certs::{SniTable, SslEntry};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::Acceptor;
use rustls::{HandshakeKind, ProtocolVersion, ServerConnection};
use sha1::{Digest, Sha1};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::error::Reason;
use crate::exchange::{ClientCertificate, Conn, Tls};
use crate::transport::tls_remote;

/// A fatal `unrecognized_name` alert (RFC 6066), as a record before any key is agreed on.
const UNRECOGNIZED_NAME: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 112];

/// The table of server names, as control replaces it.
pub type SharedTable = Arc<ArcSwap<SniTable>>;

/// What a TLS listener needs.
#[derive(Clone)]
pub struct TlsListen {
    /// Server names and their certificates.
    pub table: SharedTable,
    /// Whether HTTP/2 is offered.
    pub http2: bool,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("no ssl resource serves {}", .0.as_deref().unwrap_or("a client that names no server"))]
    UnknownName(Option<Box<str>>),
    #[error("it was a challenge of an ACME authority, which is answered")]
    AcmeChallenge,
    #[error("the TLS handshake failed: {0}")]
    Tls(#[from] io::Error),
    #[error("the client certificate is not accepted: {0}")]
    ClientCertificate(rustls::Error),
    #[error(transparent)]
    Crowded(#[from] Crowded),
}

/// A connection after its handshake.
pub struct Accepted<T> {
    /// The encrypted stream.
    pub stream: TlsStream<T>,
    /// What was settled.
    pub tls: Tls,
    /// HTTP/2 was agreed on.
    pub http2: bool,
    /// The session was resumed.
    pub resumed: bool,
}

/// Runs the handshake on `io`. The caller bounds its time.
///
/// # Errors
/// The client names no server we know, speaks no TLS we serve, or shows no certificate where one is required; or it was an
/// ACME authority, who wanted the handshake alone.
pub async fn accept<T>(io: T, listen: &TlsListen) -> Result<Accepted<T>, HandshakeError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut start = LazyConfigAcceptor::new(Acceptor::default(), io).await?;
    let hello = start.client_hello();
    let name: Option<Box<str>> = hello.server_name().map(|name| name.to_ascii_lowercase().into());
    let table = listen.table.load();
    if let Some(config) = table.challenge(&hello).cloned() {
        drop(table);
        start.into_stream(config).await?.shutdown().await?;
        return Err(HandshakeError::AcmeChallenge);
    }
    let found = table.find(name.as_deref()).cloned();
    drop(table);
    let Some(entry) = found else {
        // Best effort: a client that does not read it learns by the closed connection.
        let _ = start.io.write_all(&UNRECOGNIZED_NAME).await;
        let _ = start.io.shutdown().await;
        return Err(HandshakeError::UnknownName(name));
    };
    let config = entry.config(listen.http2).clone();
    let stream = match entry.signer() {
        None => start.into_stream(config).await?,
        Some(pool) => Box::pin(tls_remote::handshake(start, config, pool)).await?,
    };
    let (_, session) = stream.get_ref();
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let client = client_certificate(&entry, session, resumed)?;
    let http2 = session.alpn_protocol() == Some(b"h2");
    let tls = Tls {
        sni: name.map(|name| name.strip_suffix('.').map(Into::into).unwrap_or(name)),
        version: match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "",
        },
        cipher: session
            .negotiated_cipher_suite()
            .and_then(|suite| suite.suite().as_str())
            .unwrap_or_default(),
        ssl_id: Some(entry.id().clone()),
        asks_client_certificate: entry.client().is_some(),
        client,
        entry: Some(entry),
        peer: None,
    };
    Ok(Accepted { stream, tls, http2, resumed })
}

/// The client's certificate if it is one to believe.
fn client_certificate(
    entry: &SslEntry,
    session: &ServerConnection,
    resumed: bool,
) -> Result<Option<Box<ClientCertificate>>, HandshakeError> {
    let Some(policy) = entry.client() else { return Ok(None) };
    let chain = session.peer_certificates().unwrap_or_default();
    let Some(leaf) = chain.first() else { return Ok(None) };
    // The handshake has checked it, except where the URI decides, and a resumed session was checked long ago.
    if policy.is_optional() || resumed {
        match policy.verify(chain, UnixTime::now()) {
            Ok(()) => {}
            Err(_) if policy.is_optional() => return Ok(None),
            Err(error) => return Err(HandshakeError::ClientCertificate(error)),
        }
    }
    Ok(described(leaf).map(Box::new))
}

fn described(leaf: &CertificateDer<'_>) -> Option<ClientCertificate> {
    let identity = ClientIdentity::parse(leaf)?;
    let mut fingerprint = String::with_capacity(40);
    for byte in Sha1::digest(leaf.as_ref()) {
        let _ = write!(fingerprint, "{byte:02x}");
    }
    Some(ClientCertificate {
        subject: identity.subject,
        issuer: identity.issuer,
        serial: identity.serial,
        fingerprint,
        der: Bytes::copy_from_slice(leaf),
    })
}

/// Whether a request for `host` and `path` may be served on this connection, as far as client certificates go.
/// `host` is in lower case, without port and trailing dot; `table` says what the host asks for now.
///
/// # Errors
/// [`Reason::Misdirected`] (421) when the host or the connection's server name asks for client certificates and
/// the two differ, so that a certificate shown to one name never opens another; and
/// [`Reason::ClientCertificateRequired`] when none was shown and the path is no exception.
pub fn check_client_certificate(conn: &Conn, host: &str, path: &str, table: &SniTable) -> Result<(), Reason> {
    let Some(tls) = &conn.tls else { return Ok(()) };
    let shown = tls.entry.as_ref().and_then(|entry| entry.client());
    if tls.sni.as_deref() == Some(host) {
        return match shown {
            Some(policy) if tls.client.is_none() && !policy.skips(path) => {
                Err(Reason::ClientCertificateRequired)
            }
            // Asked for only since the handshake: this connection cannot show it.
            None if table.asks_client_certificate(host) => Err(Reason::Misdirected),
            _ => Ok(()),
        };
    }
    if shown.is_some() || table.asks_client_certificate(host) { Err(Reason::Misdirected) } else { Ok(()) }
}
