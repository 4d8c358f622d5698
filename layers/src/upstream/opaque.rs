//! A connection to an upstream for bytes that nobody understands: one endpoint is chosen for all of it.
//!
//! Endpoints are tried one after the other until one takes the connection; once it stands nothing is tried again, for
//! nobody knows what the bytes have done.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use certs::trust::Peer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::cluster::{Choice, Cluster, State};
use super::connect::{self, Io};
use super::endpoint::Picked;
use super::health::Report;
use super::mesh::{By, Carries};
use super::picker::{PickKey, Tried};
use super::{send, tls_client};
use crate::error::{Blame, Error, Reason};
use crate::target::Timeouts;
use crate::telemetry::metrics::Metrics;

/// A connection to an endpoint, which counts as active as long as it lasts.
#[derive(Debug)]
pub struct OpaqueStream {
    io: Io,
    picked: Picked,
}

impl OpaqueStream {
    /// Where it goes.
    pub fn address(&self) -> SocketAddr {
        self.picked.endpoint().addr()
    }

    /// Who has answered, where the endpoint is of the mesh.
    pub fn identity(&self) -> Option<Peer> {
        self.io.mesh().and_then(|mesh| mesh.identity())
    }

    /// Waits until what the endpoint has shown is taken back; for ever where it is not of the mesh.
    pub fn revoked(&self) -> impl Future<Output = ()> + use<> {
        let mesh = self.io.mesh().cloned();
        async {
            match mesh {
                Some(mesh) => send::revoked(mesh).await,
                None => std::future::pending().await,
            }
        }
    }
}

impl AsyncRead for OpaqueStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for OpaqueStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Connects to an endpoint of `cluster`. `hash` is what `chash` goes by.
///
/// # Errors
/// Why no endpoint took the connection: what the last one failed with.
pub async fn dial(cluster: &Arc<Cluster>, hash: u64, metrics: &Metrics) -> Result<OpaqueStream, Error> {
    let started = Instant::now();
    cluster.budget.request(started);
    let mut state = cluster.state();
    let mut key = PickKey { hash, now: started };
    let mut tried = Tried::default();
    let first = match state.choose(&key, &tried) {
        Err(_) if state.is_unknown() => {
            state = cluster.known().await;
            state.choose(&key, &tried)
        }
        choice => choice,
    };
    let mut choice = first.map_err(Error::new)?;
    let mut left = state.retries();
    let until = state.settings.retry_timeout.map(|limit| started + limit);
    loop {
        tried.add(choice.picked.endpoint());
        let error = match attempt(cluster, &state, choice).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let now = Instant::now();
        let next = cluster.state();
        key.now = now;
        let may = left > 0
            && error.is_retryable()
            && state.settings.retry.after(error.reason())
            && until.is_none_or(|until| now < until);
        let Some(again) = may.then(|| next.again(&key, &tried)).flatten() else { return Err(error) };
        if !cluster.budget.retry(now, next.settings.allowance) {
            metrics.retry_budget_exhausted.inc();
            return Err(error.detail("the retry budget is used up"));
        }
        metrics.retries.inc();
        left -= 1;
        (state, choice) = (next, again);
    }
}

/// Connects to the endpoint of `cluster` at `address`, and to no other.
///
/// # Errors
/// There is none, or it does not take the connection.
pub async fn dial_at(cluster: &Arc<Cluster>, address: SocketAddr) -> Result<OpaqueStream, Error> {
    let state = cluster.state();
    match state.at(address) {
        Some(choice) => attempt(cluster, &state, choice).await,
        None => Err(Error::new(Reason::NoNodes)),
    }
}

async fn attempt(cluster: &Cluster, state: &State, choice: Choice) -> Result<OpaqueStream, Error> {
    let Choice { picked, leave } = choice;
    let endpoint = picked.endpoint();
    let started = Instant::now();
    let Timeouts { connect: limit, .. } = state.settings.timeouts;
    match open(state, &picked, limit).await {
        Ok(io) => {
            let now = Instant::now();
            endpoint.latency.observe(now - started, now);
            cluster.report(state, endpoint, Report::Success(0));
            if let Some(leave) = leave {
                cluster.breaker_connected(endpoint, leave);
            }
            Ok(OpaqueStream { io, picked })
        }
        Err(error) => {
            if error.reason().blame() == Blame::Upstream {
                endpoint.failed();
                let timeout = error.reason() == Reason::ConnectTimeout;
                cluster.report(state, endpoint, if timeout { Report::Timeout } else { Report::TcpFailure });
                if let Some(leave) = leave {
                    cluster.breaker_failed(endpoint, leave, Instant::now());
                }
            }
            Err(error)
        }
    }
}

async fn open(state: &State, picked: &Picked, limit: Duration) -> Result<Io, Error> {
    let endpoint = picked.endpoint();
    let mesh = state.settings.mesh.as_ref().and_then(|_| endpoint.mesh());
    if let Some(mesh) = mesh {
        if mesh.by() == By::Tunnel {
            return connect::connect_tunnel(endpoint.addr(), &mesh, limit).await;
        }
        return connect::connect_mesh(endpoint.addr(), &mesh, Carries::Opaque, limit).await;
    }
    let tls = match state.settings.tls() {
        None => None,
        Some(config) => {
            let name = tls_client::server_name(endpoint.host()).ok_or_else(|| {
                Error::new(Reason::TlsFailed).detail("the host of the node is no TLS server name")
            })?;
            Some((config.clone(), name))
        }
    };
    connect::connect(endpoint.addr(), state.settings.as_client, tls, limit).await
}
