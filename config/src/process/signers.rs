//! `postern.signers`: pools of `postern signer` nodes, which hold private keys of `ssl` resources.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HostPort;
use super::section::Section;
use crate::key_material::SignerKey;

/// Nodes that hold the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignerPool {
    /// As in `signer://NAME/KEY`.
    pub name: String,
    /// `HOST:PORT`, at least one.
    pub nodes: Vec<String>,
    /// The name in the nodes' certificates; that of their host if it is absent.
    pub server_name: Option<String>,
    /// What the gateway shows to them.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// What their certificates have to be signed by.
    pub ca: PathBuf,
    /// How long one node is waited for.
    pub timeout: Duration,
    /// How long a signature may take, whatever nodes are asked.
    pub deadline: Duration,
    /// Handshakes that wait for a signature at a time.
    pub in_flight: u32,
}

const TIMEOUT: Duration = Duration::from_millis(500);
const IN_FLIGHT: u32 = 256;
/// A thread waits for each.
const MOST_IN_FLIGHT: u32 = 4096;
/// Less than no network keeps; more than clients wait.
const TIMEOUTS: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(10);

/// `directory` is where relative paths begin.
pub(super) fn read(own: &Section<'_>, directory: &Path) -> Vec<SignerPool> {
    let mut pools: Vec<SignerPool> = Vec::new();
    for element in own.list("signers").unwrap_or_default() {
        let expected = "an object with `name`, `nodes`, `cert_file`, `key_file` and `ca_file`";
        let Some(section) = own.element_section(&element, expected) else { continue };
        let Some(pool) = pool(&section, directory) else { continue };
        if pools.iter().any(|other| other.name == pool.name) {
            section.invalid("name", format!("there is another pool `{}`", pool.name));
            continue;
        }
        pools.push(pool);
    }
    pools
}

fn pool(section: &Section<'_>, directory: &Path) -> Option<SignerPool> {
    let name = section.word("name").filter(|name| {
        let fits = SignerKey::is_pool_name(name);
        if !fits {
            section
                .invalid("name", format!("`{name}` is no name of a pool: letters, digits, `.`, `_` and `-`"));
        }
        fits
    });
    let nodes = nodes(section);
    let path = |key| section.path(key).map(|path| directory.join(path));
    let (certificate, key, ca) = (path("cert_file"), path("key_file"), path("ca_file"));
    let server_name = section.word("server_name").map(str::to_owned);
    let duration = |key, default: Duration| {
        let given = section.duration(key).unwrap_or(default);
        if !TIMEOUTS.contains(&given) {
            section.invalid(key, "from 10ms to 10s");
        }
        given
    };
    let timeout = duration("timeout", TIMEOUT);
    let deadline = duration("deadline", (timeout * 3).min(*TIMEOUTS.end()));
    let in_flight = section.number("in_flight", 1, MOST_IN_FLIGHT.into());
    for (key, given) in [
        ("name", name.is_some()),
        ("cert_file", certificate.is_some()),
        ("key_file", key.is_some()),
        ("ca_file", ca.is_some()),
    ] {
        if !given && !section.has(key) {
            section.invalid(
                "",
                format!("`{key}` is missing: signers are spoken to with certificates on both sides"),
            );
        }
    }
    section.report_unknown();
    Some(SignerPool {
        name: name?.to_owned(),
        nodes: Some(nodes).filter(|nodes| !nodes.is_empty())?,
        server_name,
        certificate: certificate?,
        key: key?,
        ca: ca?,
        timeout,
        deadline,
        in_flight: in_flight.and_then(|count| u32::try_from(count).ok()).unwrap_or(IN_FLIGHT),
    })
}

fn nodes(section: &Section<'_>) -> Vec<String> {
    let mut nodes: Vec<String> = Vec::new();
    for element in section.list("nodes").unwrap_or_default() {
        let Some(text) = section.element_text(&element) else { continue };
        if HostPort::parse(text).is_none() {
            section.element_invalid(
                &element,
                format!("`{text}` is no HOST:PORT: write `signer-1.internal:7443`"),
            );
        } else if nodes.iter().any(|node| node == text) {
            section.element_invalid(&element, format!("`{text}` is named twice"));
        } else {
            nodes.push(text.to_owned());
        }
    }
    if nodes.is_empty() {
        section.invalid("nodes", "name one node at least, better two: `[signer-1.internal:7443]`");
    }
    nodes
}
