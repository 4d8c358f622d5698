//! One node of a pool: its connection, the keys it offers, and whether it may be asked.
//!
//! A task of its own connects, asks for the keys, and asks again every few seconds. A node whose connection breaks is not
//! asked until the task has heard from it again; one that does not answer in time is asked for its keys at once, and left
//! out if it does not answer that either.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::metrics::{NodeMetrics, Reason};
use super::pool::Ask;
use super::proto::signer_client::SignerClient;
use super::proto::{ListKeysRequest, SignRequest};
use super::{LONGEST_MESSAGE, LONGEST_REQUEST};
use crate::grpc::{self, Dial};
use crate::trust::Fingerprint;

/// Between two questions for the keys, if nothing else gives a reason to ask.
const PERIOD: Duration = Duration::from_secs(5);
/// A connection, with its handshakes.
const CONNECT: Duration = Duration::from_secs(5);
/// Between two attempts to connect: doubled from the first to the last, and up to half of it left out at random.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What the gateway shows to nodes, and whom it believes.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Files, read again for each connection.
    Files { certificate: PathBuf, key: PathBuf, ca: PathBuf },
    /// Made elsewhere, and kept up to date there.
    Made(Arc<ClientConfig>),
}

impl Credentials {
    async fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        match self.clone() {
            Self::Made(config) => Ok(config),
            Self::Files { certificate, key, ca } => {
                let read = move || grpc::client_tls(Some(&ca), Some((&certificate, &key)));
                tokio::task::spawn_blocking(read).await.map_err(|error| error.to_string())?
            }
        }
    }
}

/// The keys that a node offers.
pub(super) type Keys = BTreeMap<String, Fingerprint>;

/// No signature, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{node}: {problem}")]
pub struct Failure {
    pub node: Arc<str>,
    pub reason: Reason,
    pub problem: String,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    pool: Arc<str>,
    address: Arc<str>,
    server_name: Option<String>,
    credentials: Credentials,
    timeout: Duration,
    /// Present while the node may be asked.
    up: ArcSwapOption<SignerClient<Channel>>,
    /// As last told, also while the node is away.
    keys: ArcSwapOption<Keys>,
    in_flight: AtomicUsize,
    metrics: NodeMetrics,
    /// Something makes it worth while to ask the node now.
    doubt: Notify,
    rounds: watch::Sender<Rounds>,
    changed: watch::Sender<u64>,
}

/// Attempts to hear from a node, whatever came of them.
#[derive(Clone, Copy, Debug, Default)]
struct Rounds {
    begun: u64,
    /// The number of the last one that has ended.
    ended: u64,
}

impl Node {
    pub(super) fn new(
        pool: Arc<str>,
        address: Arc<str>,
        server_name: Option<String>,
        credentials: Credentials,
        timeout: Duration,
        changed: watch::Sender<u64>,
    ) -> Self {
        Self {
            pool,
            address,
            server_name,
            credentials,
            timeout,
            up: ArcSwapOption::empty(),
            keys: ArcSwapOption::empty(),
            in_flight: AtomicUsize::new(0),
            metrics: NodeMetrics::default(),
            doubt: Notify::new(),
            rounds: watch::Sender::default(),
            changed,
        }
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> &Arc<str> {
        &self.address
    }

    /// Whether it may be asked.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load().is_some()
    }

    /// Signatures under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// What signatures took, and what went wrong.
    #[must_use]
    pub fn metrics(&self) -> &NodeMetrics {
        &self.metrics
    }

    pub(super) fn keys(&self) -> Option<Arc<Keys>> {
        self.keys.load_full()
    }

    /// Has the node asked at once, and waits until it was, whatever came of it. What was under way before may have been
    /// answered long ago.
    pub(super) async fn look_again(&self) {
        let mut rounds = self.rounds.subscribe();
        let before = rounds.borrow_and_update().begun;
        self.doubt.notify_one();
        // The sender is here.
        let _ = rounds.wait_for(|rounds| rounds.ended > before).await;
    }

    fn begin_round(&self) {
        self.rounds.send_modify(|rounds| rounds.begun += 1);
    }

    fn end_round(&self) {
        self.rounds.send_modify(|rounds| rounds.ended = rounds.begun);
    }

    /// Follows the node until it is dropped.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut pause = PAUSES.0;
        let mut told = false;
        loop {
            self.begin_round();
            let problem = match self.meet().await {
                Ok(client) => {
                    info!(pool = %self.pool, node = %self.address, "the signer answers");
                    (pause, told) = (PAUSES.0, false);
                    self.stay(&client).await
                }
                Err(problem) => problem,
            };
            // One line for each time that it goes away, however long that is.
            if !told {
                warn!(pool = %self.pool, node = %self.address, %problem, "the signer does not answer");
                told = true;
            }
            self.set_up(None);
            self.end_round();
            tokio::time::sleep(pause.mul_f64(1.0 - fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// A connection over which the node has told its keys.
    async fn meet(&self) -> Result<Arc<SignerClient<Channel>>, String> {
        let dial = Dial {
            server: self.address.to_string(),
            tls: Some(self.credentials.tls().await?),
            server_name: self.server_name.clone(),
            patience: None,
        };
        let channel = timeout(CONNECT, dial.connect()).await.map_err(|_| "no connection within 5 s")??;
        let client = SignerClient::new(channel)
            .max_decoding_message_size(LONGEST_MESSAGE)
            .max_encoding_message_size(LONGEST_REQUEST);
        let client = Arc::new(client);
        self.ask_for_keys(&client).await?;
        Ok(client)
    }

    /// Asks the node from time to time, and says why that came to an end.
    async fn stay(&self, client: &Arc<SignerClient<Channel>>) -> String {
        loop {
            self.set_up(Some(Arc::clone(client)));
            self.end_round();
            tokio::select! {
                () = tokio::time::sleep(PERIOD) => {}
                () = self.doubt.notified() => {}
            }
            self.begin_round();
            if let Err(problem) = self.ask_for_keys(client).await {
                return problem;
            }
        }
    }

    async fn ask_for_keys(&self, client: &SignerClient<Channel>) -> Result<(), String> {
        let mut client = client.clone();
        let asked = timeout(self.timeout, client.list_keys(ListKeysRequest {})).await;
        let answer = asked
            .map_err(|_| format!("no answer within {} ms", self.timeout.as_millis()))?
            .map_err(|status| words(&status))?;
        let mut keys = Keys::new();
        for key in answer.into_inner().keys {
            let public_key = <[u8; 32]>::try_from(key.public_key).map_err(|_| "a key without a hash")?;
            keys.insert(key.name, Fingerprint::from(public_key));
        }
        if self.keys.load().as_deref() != Some(&keys) {
            self.keys.store(Some(Arc::new(keys)));
            self.changed.send_modify(|changes| *changes += 1);
        }
        Ok(())
    }

    fn set_up(&self, client: Option<Arc<SignerClient<Channel>>>) {
        let is_up = client.is_some();
        if self.up.swap(client).is_some() != is_up {
            self.changed.send_modify(|changes| *changes += 1);
        }
    }

    /// A signature by this node.
    pub(super) async fn sign(&self, ask: &Ask, scheme: u16, message: &[u8]) -> Result<Vec<u8>, Failure> {
        let failure = |reason, problem| Failure { node: Arc::clone(&self.address), reason, problem };
        let Some(up) = self.up.load_full() else {
            return Err(failure(Reason::Lost, "it does not answer".to_owned()));
        };
        let request = SignRequest {
            key: ask.name.to_string(),
            public_key: ask.public_key.as_bytes().to_vec(),
            scheme: scheme.into(),
            message: message.to_vec(),
        };
        let begun = Instant::now();
        let mut client = SignerClient::clone(&up);
        let _counted = Counted::new(&self.in_flight);
        let failed = match timeout(self.timeout, client.sign(request)).await {
            Ok(Ok(reply)) => {
                self.metrics.signed(begun.elapsed());
                return Ok(reply.into_inner().signature);
            }
            Ok(Err(status)) => failure(reason(status.code()), words(&status)),
            Err(_) => {
                failure(Reason::Timeout, format!("no signature within {} ms", self.timeout.as_millis()))
            }
        };
        self.metrics.failed(failed.reason);
        match failed.reason {
            Reason::Lost => {
                // Only if it is still the connection that broke.
                let before = self.up.compare_and_swap(&up, None);
                if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, &up)) {
                    self.changed.send_modify(|changes| *changes += 1);
                }
                self.doubt.notify_one();
            }
            Reason::Timeout => self.doubt.notify_one(),
            _ => {}
        }
        Err(failed)
    }
}

/// A signature that is counted while it is under way, however it ends.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn reason(code: Code) -> Reason {
    match code {
        Code::DeadlineExceeded => Reason::Timeout,
        Code::PermissionDenied | Code::NotFound | Code::Unauthenticated => Reason::Denied,
        Code::FailedPrecondition => Reason::Mismatch,
        Code::ResourceExhausted => Reason::Full,
        Code::InvalidArgument => Reason::Invalid,
        // What tonic makes of a connection that breaks.
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => Reason::Lost,
        _ => Reason::Failed,
    }
}

fn words(status: &Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        _ => grpc::chain(status),
    }
}
