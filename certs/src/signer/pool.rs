//! The nodes that hold the same keys, as a gateway asks them.
//!
//! A signature is asked of the node with the fewest under way. If it fails or does not answer in time, the next one is
//! asked, each at most once; all of it has a deadline. When no node answers, a signature is refused at once: who comes for
//! one waits for a node and for a place before ([`Pool::place`]), without a thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use rustls::SignatureScheme;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::KeyAddress;
use super::key::NotOffered;
use super::metrics::Reason;
use super::node::{Credentials, Failure, Node};
use crate::trust::Fingerprint;

/// Of a pool.
#[derive(Clone, Debug)]
pub struct Settings {
    pub name: Arc<str>,
    /// `host:port`, at least one.
    pub nodes: Vec<String>,
    /// The name in the nodes' certificates, where it is not their host.
    pub server_name: Option<String>,
    pub credentials: Credentials,
    /// For one node.
    pub timeout: Duration,
    /// For a signature, whatever nodes are asked.
    pub deadline: Duration,
    /// Signatures at a time.
    pub in_flight: usize,
}

/// The key that is to sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    pub(super) name: Arc<str>,
    /// Of its public half.
    pub(super) public_key: Fingerprint,
}

/// No signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    #[error("the signers of the pool `{pool}` do not sign: none of them answers")]
    NoneUp { pool: Arc<str> },
    #[error("the signers of the pool `{pool}` do not sign: {}", told(.failures))]
    All { pool: Arc<str>, failures: Vec<Failure> },
    #[error("the signers of the pool `{pool}` have not signed within {} ms", .deadline.as_millis())]
    Deadline { pool: Arc<str>, deadline: Duration },
}

fn told(failures: &[Failure]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Too many handshakes wait for the signatures of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many handshakes wait for signatures")]
pub struct Crowded;

/// What became of signatures, whatever nodes were asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub signed: u64,
    /// No node signed, or none answered.
    pub failed: u64,
    /// Another node was asked because one had failed.
    pub failovers: u64,
    /// Handshakes that were refused because too many waited.
    pub crowded: u64,
}

/// Nodes that hold the same keys. Ends its connections when it is dropped.
#[derive(Debug)]
pub struct Pool {
    name: Arc<str>,
    nodes: Vec<Arc<Node>>,
    deadline: Duration,
    timeout: Duration,
    places: Arc<Semaphore>,
    changed: watch::Sender<u64>,
    signed: AtomicU64,
    failed: AtomicU64,
    failovers: AtomicU64,
    crowded: AtomicU64,
    handle: Handle,
    tasks: Vec<AbortHandle>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Pool {
    /// Begins to connect, on the runtime of `handle`.
    #[must_use]
    pub fn start(settings: &Settings, handle: &Handle) -> Arc<Self> {
        let changed = watch::Sender::new(0);
        let nodes: Vec<Arc<Node>> = settings
            .nodes
            .iter()
            .map(|address| {
                Arc::new(Node::new(
                    Arc::clone(&settings.name),
                    address.as_str().into(),
                    settings.server_name.clone(),
                    settings.credentials.clone(),
                    settings.timeout,
                    changed.clone(),
                ))
            })
            .collect();
        let follow = |node: &Arc<Node>| handle.spawn(Arc::clone(node).follow()).abort_handle();
        let tasks = nodes.iter().map(follow).collect();
        Arc::new(Self {
            name: Arc::clone(&settings.name),
            nodes,
            deadline: settings.deadline,
            timeout: settings.timeout,
            places: Arc::new(Semaphore::new(settings.in_flight.max(1))),
            changed,
            signed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            failovers: AtomicU64::new(0),
            crowded: AtomicU64::new(0),
            handle: handle.clone(),
            tasks,
        })
    }

    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    #[must_use]
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The runtime whose threads may wait for a signature.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Counts what changes: a node comes or goes, or offers other keys.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    #[must_use]
    pub fn totals(&self) -> Totals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            signed: read(&self.signed),
            failed: read(&self.failed),
            failovers: read(&self.failovers),
            crowded: read(&self.crowded),
        }
    }

    /// Waits until each node has been heard from, or could not be, since this was called.
    pub async fn look_again(&self, within: Duration) {
        let _ = timeout(within, join_all(self.nodes.iter().map(|node| node.look_again()))).await;
    }

    /// Whether the key is offered, as far as nodes have told.
    ///
    /// # Errors
    /// Some have told, and none offers it.
    pub(super) fn offers(&self, ask: &Ask) -> Result<(), NotOffered> {
        let told: Vec<_> = self.nodes.iter().filter_map(|node| node.keys()).collect();
        let of_name = || told.iter().filter_map(|keys| keys.get(&*ask.name));
        if told.is_empty() || of_name().any(|key| *key == ask.public_key) {
            return Ok(());
        }
        let address = KeyAddress { pool: Arc::clone(&self.name), name: Arc::clone(&ask.name) };
        if of_name().next().is_some() {
            return Err(NotOffered::Mismatch { address });
        }
        let mut held: Vec<&str> = told.iter().flat_map(|keys| keys.keys()).map(String::as_str).collect();
        held.sort_unstable();
        held.dedup();
        let held = match held.as_slice() {
            [] => "none is offered: look at `clients` of its signer.yaml".to_owned(),
            some => format!("it offers: {}", some.join(", ")),
        };
        Err(NotOffered::Missing { address, held })
    }

    /// Waits for a node that answers, and for a place among those who wait for signatures. The wait for a node ends with the
    /// time for one call: then the handshake goes on and may fail, because one that is resumed needs no signature.
    ///
    /// # Errors
    /// No place became free within the time for one call.
    pub async fn place(&self) -> Result<OwnedSemaphorePermit, Crowded> {
        let mut changed = self.changed.subscribe();
        let is_up = || self.nodes.iter().any(|node| node.is_up());
        let up = async {
            while !is_up() {
                if changed.changed().await.is_err() {
                    break;
                }
            }
        };
        let _ = timeout(self.timeout, up).await;
        let place = timeout(self.timeout, Arc::clone(&self.places).acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or_else(|| {
            self.crowded.fetch_add(1, Ordering::Relaxed);
            Crowded
        })
    }

    /// A signature by one of the nodes.
    ///
    /// # Errors
    /// No node gave one in time.
    pub async fn sign(
        &self,
        ask: &Ask,
        scheme: SignatureScheme,
        message: &[u8],
    ) -> Result<Vec<u8>, SignError> {
        let signed = timeout(self.deadline, self.attempts(ask, scheme.into(), message)).await;
        let signed = signed.unwrap_or_else(|_| {
            Err(SignError::Deadline { pool: Arc::clone(&self.name), deadline: self.deadline })
        });
        let count = if signed.is_ok() { &self.signed } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
        signed
    }

    async fn attempts(&self, ask: &Ask, scheme: u16, message: &[u8]) -> Result<Vec<u8>, SignError> {
        let mut failures: Vec<Failure> = Vec::new();
        loop {
            let untried = self.nodes.iter().filter(|node| {
                node.is_up() && !failures.iter().any(|failure| failure.node == *node.address())
            });
            let Some(node) = untried.min_by_key(|node| (node.in_flight(), fastrand::u32(..))) else {
                let pool = Arc::clone(&self.name);
                return Err(match failures.is_empty() {
                    true => SignError::NoneUp { pool },
                    false => SignError::All { pool, failures },
                });
            };
            if !failures.is_empty() {
                self.failovers.fetch_add(1, Ordering::Relaxed);
            }
            match node.sign(ask, scheme, message).await {
                Ok(signature) => return Ok(signature),
                Err(failure) => {
                    // No other node takes what is no handshake.
                    let last = failure.reason == Reason::Invalid;
                    failures.push(failure);
                    if last {
                        return Err(SignError::All { pool: Arc::clone(&self.name), failures });
                    }
                }
            }
        }
    }
}

/// The pools of a gateway by their names.
#[derive(Clone, Debug, Default)]
pub struct Pools(Arc<BTreeMap<Arc<str>, Arc<Pool>>>);

impl Pools {
    /// Of these pools.
    #[must_use]
    pub fn new(pools: impl IntoIterator<Item = Arc<Pool>>) -> Self {
        Self(Arc::new(pools.into_iter().map(|pool| (Arc::clone(pool.name()), pool)).collect()))
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<Pool>> {
        self.0.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.0.values()
    }

    /// The names, for messages.
    #[must_use]
    pub fn names(&self) -> String {
        let names: Vec<_> = self.0.keys().map(|name| format!("`{name}`")).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }
}
