//! `postern.discovery_server`: what `postern discovery serve` listens on, and for whom.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::section::Section;

/// A discovery server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryServer {
    pub listen: SocketAddr,
    /// Its certificate and key; without them nothing is encrypted.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// What certificates of clients have to be signed by. Without this, they need none.
    pub client_ca: Option<PathBuf>,
    /// Connections at a time.
    pub clients: u32,
    /// Services that one client may follow.
    pub services: u32,
    /// Whether clients may have nodes drained, in the registries too.
    pub drains: bool,
}

pub(super) fn read(section: Section<'_>) -> Option<DiscoveryServer> {
    if !section.is_present() {
        section.finish();
        return None;
    }
    let listen = section.word("listen").and_then(|text| {
        let listen = text.parse().ok();
        if listen.is_none() {
            section.invalid("listen", "not an address with a port: write `127.0.0.1:7900`");
        }
        listen
    });
    let tls = section.section("tls");
    let identity = match (tls.path("cert_file"), tls.path("key_file")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            section.invalid("tls", "`cert_file` and `key_file` are needed together");
            None
        }
    };
    let client_ca = tls.path("client_ca_file");
    if client_ca.is_some() && identity.is_none() {
        section.invalid("tls", "`client_ca_file` needs `cert_file` and `key_file`");
    }
    tls.finish();
    let server = DiscoveryServer {
        listen: listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 7900))),
        identity,
        client_ca,
        clients: section.count("max_clients", 1).unwrap_or(10_000),
        services: section.count("max_services", 1).unwrap_or(1_000),
        drains: section.flag("drains").unwrap_or(false),
    };
    section.finish();
    Some(server)
}
