//! Active health checks: one task for each endpoint, on the control runtime, for as long as the endpoint stays.
//!
//! A probe is a connection of its own. Its result goes into the endpoint's counters like any other; only a changed
//! verdict wakes whoever builds the picker.

use std::borrow::Cow;
use std::io;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::endpoint::{EndpointKey, EndpointState};
use super::health::{Report, Source};
use super::mesh::{By, Carries};
use super::settings::Active;
use super::tls_client;
use crate::transport::hbone::PORT;

/// Bytes of an answer that are read for its status line.
const STATUS_LINE: usize = 1024;

/// The running probes of one cluster. Dropped, they end.
#[derive(Default)]
pub(crate) struct Probes {
    running: HashMap<EndpointKey, Probe>,
    /// How they probe, and how many of them may at once.
    how: Option<(Arc<Active>, Arc<Semaphore>)>,
}

/// The probe of one endpoint.
struct Probe {
    endpoint: Arc<EndpointState>,
    task: JoinHandle<()>,
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.running.values().for_each(|probe| probe.task.abort());
    }
}

impl Probes {
    /// Probes exactly these endpoints in this way. What is probed so already goes on undisturbed.
    pub(crate) fn settle<'a>(
        &mut self,
        upstream: &str,
        active: &Arc<Active>,
        endpoints: impl Iterator<Item = &'a Arc<EndpointState>>,
        flipped: &Arc<Notify>,
        runtime: &Handle,
    ) {
        let mut before = std::mem::take(&mut self.running);
        let (how, places) = match self.how.take() {
            Some(same) if *same.0 == **active => same,
            _ => {
                before.drain().for_each(|(_, probe)| probe.task.abort());
                (active.clone(), Arc::new(Semaphore::new(active.concurrency.max(1))))
            }
        };
        for endpoint in endpoints {
            // Two nodes of one address are one endpoint, and probed once.
            if self.running.contains_key(endpoint.key()) {
                continue;
            }
            let kept = before.remove(endpoint.key()).and_then(|probe| {
                if Arc::ptr_eq(&probe.endpoint, endpoint) {
                    return Some(probe);
                }
                probe.task.abort();
                None
            });
            let probe = kept.unwrap_or_else(|| {
                let (flipped, places) = (flipped.clone(), places.clone());
                let task = run(upstream.into(), how.clone(), endpoint.clone(), flipped, places);
                Probe { endpoint: endpoint.clone(), task: runtime.spawn(task) }
            });
            self.running.insert(endpoint.key().clone(), probe);
        }
        before.values().for_each(|probe| probe.task.abort());
        self.how = Some((how, places));
    }
}

async fn run(
    upstream: Arc<str>,
    check: Arc<Active>,
    endpoint: Arc<EndpointState>,
    flipped: Arc<Notify>,
    places: Arc<Semaphore>,
) {
    let pause = || {
        let usable = endpoint.health.state().usable();
        if usable { check.healthy_interval } else { check.unhealthy_interval }
    };
    // Not all at once after a start.
    tokio::time::sleep(pause().min(Duration::from_secs(1)).mul_f64(fastrand::f64())).await;
    loop {
        let interval = pause();
        // An interval of 0 switches the probes of endpoints in this state off.
        if !interval.is_zero() {
            let Ok(place) = places.acquire().await else { return };
            let report = match tokio::time::timeout(check.timeout, probe(&check, &endpoint)).await {
                Err(_) => Some(Report::Timeout),
                Ok(Err(_)) => Some(Report::TcpFailure),
                Ok(Ok(None)) => Some(Report::Success(0)),
                Ok(Ok(Some(status))) => check.judge.status(status),
            };
            drop(place);
            let flip =
                report.and_then(|report| endpoint.health.report(Source::Active, report, &check.judge.limits));
            if let Some(flip) = flip {
                let because = endpoint.health.reason().map(|reason| reason.to_string()).unwrap_or_default();
                tracing::warn!(%upstream, endpoint = %endpoint, from = flip.from.as_str(), to = flip.to.as_str(), because, "health changed by a probe");
                flipped.notify_one();
            }
        }
        tokio::time::sleep(if interval.is_zero() { Duration::from_secs(1) } else { interval }).await;
    }
}

/// Connects, and asks over the connection if there is something to ask. A status of 0 is an answer that is no HTTP. Of a node
/// behind a tunnel it is found out whether tunnels are taken there.
async fn probe(check: &Active, endpoint: &EndpointState) -> io::Result<Option<u16>> {
    let mut address = endpoint.addr();
    if let Some(port) = check.port {
        address.set_port(port);
    }
    // A node of the mesh is spoken to in no other way, by probes neither; another port is not its sidecar's.
    let mesh = endpoint.mesh().filter(|_| check.port.is_none());
    let is_tunnel = mesh.as_ref().is_some_and(|mesh| mesh.by() == By::Tunnel);
    if is_tunnel {
        address.set_port(PORT);
    }
    let stream = certs::outgoing::connect(address).await?;
    let Some((before, after)) = check.request.as_ref().filter(|_| !is_tunnel) else { return Ok(None) };
    let host = match check.host.as_deref().unwrap_or(endpoint.host()) {
        // In a `Host` field, IPv6 stands in brackets.
        bare if bare.parse::<Ipv6Addr>().is_ok() => Cow::from(format!("[{bare}]")),
        host => Cow::from(host),
    };
    let request = [before, &*host, after].concat();
    if let Some(mesh) = mesh {
        let config = mesh.config(Carries::Upgrades).map_err(io::Error::other)?;
        let stream = TlsConnector::from(config).connect(address.ip().into(), stream).await?;
        return ask(stream, request.as_bytes()).await.map(Some);
    }
    match &check.tls {
        None => ask(stream, request.as_bytes()).await.map(Some),
        Some(tls) => {
            let name: ServerName<'static> = tls_client::server_name(&host).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "the host is no TLS server name")
            })?;
            let stream = TlsConnector::from(tls.clone()).connect(name, stream).await?;
            ask(stream, request.as_bytes()).await.map(Some)
        }
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &[u8]) -> io::Result<u16> {
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut answer = Vec::with_capacity(STATUS_LINE);
    while answer.len() < STATUS_LINE && !answer.contains(&b'\n') {
        if stream.read_buf(&mut answer).await? == 0 {
            break;
        }
    }
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(status(&answer).unwrap_or(0))
}

/// The status of `HTTP/1.1 200 OK`.
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let (version, rest) = line.split_once(' ')?;
    let code = rest.get(..3).filter(|code| code.bytes().all(|byte| byte.is_ascii_digit()))?;
    version.starts_with("HTTP/1.").then(|| code.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_from_http_and_nothing_else() {
        let cases: [(&[u8], Option<u16>); 5] = [
            (b"HTTP/1.1 200 OK\r\n", Some(200)),
            (b"HTTP/1.0 503\r\n", Some(503)),
            (b"SSH-2.0-OpenSSH\r\n", None),
            (b"HTTP/1.1 2x0 OK\r\n", None),
            (b"\xff\xfe\n", None),
        ];
        for (answer, expected) in cases {
            assert_eq!(status(answer), expected, "{}", String::from_utf8_lossy(answer));
        }
    }
}
