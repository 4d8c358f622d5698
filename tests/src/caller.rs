//! Somebody of a mesh who calls without a sidecar: shakes hands as sidecars do, and then says what the test wants.

use std::net::SocketAddr;

use certs::identity::TrustDomain;
use certs::mesh::{Expected, MeshIdentity};
use certs::svid::Svid;
use certs::trust::Trust;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::{Connection, connect};
use crate::sidecar::{DOMAIN, Mesh};

/// One with an identity.
pub struct Caller {
    identity: MeshIdentity,
}

impl Mesh {
    /// Somebody with this SPIFFE id.
    pub fn caller(&self, id: &str) -> Caller {
        let leaf = self.authority.svid(id);
        let domain: TrustDomain = DOMAIN.parse().expect("a trust domain");
        let trust =
            Trust::new(domain.clone(), 1).with_roots(&domain, [self.authority.der()]).expect("a usable root");
        let svid = Svid::new(leaf.chain(), &leaf.private_key()).expect("our own certificate");
        let identity = MeshIdentity::new();
        identity.set_trust(trust).expect("a trust that can be used");
        identity.install(svid).expect("an identity that is believed");
        Caller { identity }
    }
}

impl Caller {
    /// A connection to the inbound port of a sidecar, with this ALPN.
    pub async fn shake(&self, to: SocketAddr, alpn: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let config = self.identity.client_config(Expected::OwnDomain, &[alpn.as_bytes()]);
        let name = ServerName::IpAddress(to.ip().into());
        TlsConnector::from(config.expect("a configuration")).connect(name, connect(to).await).await
    }

    /// Bytes that nobody understands.
    pub async fn bytes(&self, to: SocketAddr) -> TlsStream<TcpStream> {
        self.shake(to, "postern-tcp").await.expect("a handshake, which all of the mesh get")
    }

    /// Requests.
    pub async fn http2(&self, to: SocketAddr) -> Connection {
        let stream = self.shake(to, "postern-h2").await.expect("a handshake, which all of the mesh get");
        Connection::http2_over(stream, "orders".to_owned(), "http").await
    }
}
