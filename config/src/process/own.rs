//! The `postern` group: settings APISIX has no key for. What is written here wins over `nginx_config`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::membership::Membership;

use super::acme::{self, Acme};
use super::discovery_server::{self, DiscoveryServer};
use super::nginx::Nginx;
use super::section::Section;
use super::signers::{self, SignerPool};
use super::{Env, HostPort, Limits, Place, Workers};

pub(super) struct Own {
    pub(super) data_dir: PathBuf,
    pub(super) workers: Workers,
    pub(super) limits: Limits,
    pub(super) place: Place,
    pub(super) peers: Vec<HostPort>,
    pub(super) discovery_server: Option<DiscoveryServer>,
    pub(super) mesh: Option<Membership>,
    pub(super) signers: Vec<SignerPool>,
    pub(super) acme: Option<Acme>,
}

pub(super) fn read(own: Section<'_>, nginx: &Nginx, dir: &Path, env: &dyn Env) -> Own {
    let written = own.path("data_dir");
    let from_env = env.var("POSTERN_DATA_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let workers = match own.get("workers") {
        Some(value) if value.as_str() == Some("auto") => Some(Workers::Auto),
        Some(_) => own.count("workers", 1).map(Workers::Count),
        None => None,
    };
    let result = Own {
        data_dir: from_env.or(written).unwrap_or_else(|| "./postern-data".into()),
        workers: workers.or(nginx.workers).unwrap_or(Workers::Auto),
        limits: limits(&own, nginx),
        place: place(&own),
        peers: peers(&own),
        discovery_server: discovery_server::read(own.section("discovery_server")),
        acme: acme::read(own.section("acme")),
        mesh: own.get("mesh").and_then(|value| {
            let read = Membership::read(value, dir);
            read.map_err(|errors| errors.into_iter().for_each(|error| own.below("mesh", error))).ok()
        }),
        signers: signers::read(&own, dir),
    };
    own.finish();
    result
}

fn place(own: &Section<'_>) -> Place {
    let section = own.section("locality");
    // A zone named by a number is a number to YAML.
    let name = |key| section.loose_text(key).filter(|name| !name.is_empty());
    let place = Place { region: name("region"), zone: name("zone"), machine: name("machine") };
    section.finish();
    place
}

/// Control APIs of the other gateways.
fn peers(own: &Section<'_>) -> Vec<HostPort> {
    let elements = own.list("peers").unwrap_or_default();
    let read = |element| {
        let text = own.element_text(&element)?;
        let peer = HostPort::parse(text);
        if peer.is_none() {
            let problem = format!("`{text}` is no HOST:PORT of a Control API: write `gw-2.example.com:9090`");
            own.element_invalid(&element, problem);
        }
        peer
    };
    elements.into_iter().filter_map(read).collect()
}

fn limits(own: &Section<'_>, nginx: &Nginx) -> Limits {
    let section = own.section("limits");
    // nginx counts buffers: a line must fit into one, all of them together hold the headers.
    let (header_bytes, uri_length) = match nginx.header_buffers {
        Some((count, size)) => (count.saturating_mul(size), size),
        None => (32 << 10, 16 << 10),
    };
    let bytes =
        |key, default| section.size(key).map_or(default, |size| u32::try_from(size).unwrap_or(u32::MAX));
    let time = |key, or: Option<Duration>, default| {
        section.duration(key).or(or).unwrap_or(Duration::from_secs(default))
    };
    let limits = Limits {
        header_bytes: bytes("header_bytes", header_bytes),
        header_count: section.count("header_count", 1).unwrap_or(100),
        uri_length: bytes("uri_length", uri_length),
        body_bytes: nginx.body_bytes,
        connections: section.count("connections", 1),
        connections_per_worker: nginx.worker_connections,
        concurrent_streams: section.count("concurrent_streams", 1).unwrap_or(128),
        handshake_timeout: time("handshake_timeout", None, 10),
        header_timeout: time("header_timeout", nginx.header_timeout, 20),
        body_timeout: time("body_timeout", nginx.body_timeout, 60),
        send_timeout: section.duration("send_timeout").unwrap_or(nginx.send_timeout),
        idle_timeout: time("idle_timeout", nginx.idle_timeout, 60),
        drain_timeout: time("drain_timeout", nginx.drain_timeout, 30),
    };
    for (key, value) in [("header_bytes", limits.header_bytes), ("uri_length", limits.uri_length)] {
        // A request line and a few headers must fit, or nothing is served at all.
        if value < 256 {
            section.invalid(key, format!("{value} bytes are too few: write 256 or more"));
        }
    }
    section.finish();
    limits
}
