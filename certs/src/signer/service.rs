//! The side of a node: who asks, whether it may, and the signature. A signature takes a place that there are as many of as
//! cores; who waits for one is counted, and beyond a number refused, so that its gateway asks another node.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rustls::SignatureScheme;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use tonic::{Request, Response, Status};

use super::access::{Client, Clients};
use super::journal::Journal;
use super::proto::signer_server::{Signer, SignerServer};
use super::proto::{Key, ListKeysReply, ListKeysRequest, SignReply, SignRequest};
use super::store::KeyStore;
use super::transcript::{Handshake, NotSigned};
use super::{LONGEST_MESSAGE, LONGEST_REQUEST};
use crate::ca::limits::{Buckets, Rate};
use crate::grpc::Caller;

/// How much a node does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Signatures at a time.
    pub signers: usize,
    /// Requests that wait for one.
    pub queue: usize,
    /// For one line of the list of clients.
    pub rate: Rate,
}

/// What a node has done since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pub signed: u64,
    /// Time that signatures took, without the wait for a place.
    pub signing: Duration,
    /// By [`REFUSALS`].
    pub refused: [u64; REFUSALS.len()],
    pub waiting: usize,
}

/// Why signatures are refused, as the audit log and metrics say it.
pub const REFUSALS: [&str; 8] = [
    "unknown-client",
    "not-allowed",
    "wrong-key",
    "not-a-handshake",
    "wrong-scheme",
    "too-many",
    "busy",
    "stopping",
];

#[derive(Clone, Copy)]
#[repr(usize)]
enum Refusal {
    UnknownClient,
    NotAllowed,
    WrongKey,
    NotAHandshake,
    WrongScheme,
    TooMany,
    Busy,
    Stopping,
}

/// A node.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    keys: Arc<KeyStore>,
    clients: Clients,
    journal: Arc<Journal>,
    buckets: Buckets<usize>,
    started: Instant,
    places: Semaphore,
    queue: usize,
    waiting: AtomicUsize,
    stopping: AtomicBool,
    under_way: watch::Sender<usize>,
    signed: AtomicU64,
    micros: AtomicU64,
    refused: [AtomicU64; REFUSALS.len()],
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

impl Service {
    #[must_use]
    pub fn new(keys: Arc<KeyStore>, clients: Clients, journal: Arc<Journal>, limits: Limits) -> Self {
        Self(Arc::new(Inner {
            keys,
            clients,
            journal,
            buckets: Buckets::new(limits.rate),
            started: Instant::now(),
            places: Semaphore::new(limits.signers.max(1)),
            queue: limits.queue,
            waiting: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            under_way: watch::Sender::new(0),
            signed: AtomicU64::new(0),
            micros: AtomicU64::new(0),
            refused: Default::default(),
        }))
    }

    /// For [`grpc::serve`](crate::grpc::serve).
    #[must_use]
    pub fn server(&self) -> SignerServer<Self> {
        SignerServer::new(self.clone())
            .max_decoding_message_size(LONGEST_REQUEST)
            .max_encoding_message_size(LONGEST_MESSAGE)
    }

    /// Begins nothing more, and waits for what is under way. Gateways are told to ask another node.
    pub async fn stop(&self, within: Duration) {
        self.0.stopping.store(true, Ordering::Relaxed);
        let mut under_way = self.0.under_way.subscribe();
        let _ = timeout(within, under_way.wait_for(|count| *count == 0)).await;
    }

    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn keys(&self) -> &Arc<KeyStore> {
        &self.0.keys
    }

    #[must_use]
    pub fn journal(&self) -> &Arc<Journal> {
        &self.0.journal
    }

    #[must_use]
    pub fn numbers(&self) -> Numbers {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Numbers {
            signed: read(&self.0.signed),
            signing: Duration::from_micros(read(&self.0.micros)),
            refused: self.0.refused.each_ref().map(read),
            waiting: self.0.waiting.load(Ordering::Relaxed),
        }
    }

    /// Nothing is signed while this is kept.
    #[cfg(test)]
    pub(super) fn take_all_places(&self) -> tokio::sync::SemaphorePermit<'_> {
        let places = u32::try_from(self.0.places.available_permits()).unwrap();
        self.0.places.try_acquire_many(places).unwrap()
    }

    fn client<T>(&self, request: &Request<T>, key: &str) -> Result<Client<'_>, Status> {
        if self.is_stopping() {
            return Err(self.refuse(Refusal::Stopping, "", key, Status::unavailable("the signer stops")));
        }
        let chain = request.extensions().get::<Caller>().map(|caller| &*caller.chain).unwrap_or_default();
        self.0.clients.find(chain).map_err(|shown| {
            let status = Status::permission_denied(format!("no client of this signer: {shown}"));
            self.refuse(Refusal::UnknownClient, &shown, key, status)
        })
    }

    fn refuse(&self, why: Refusal, client: &str, key: &str, status: Status) -> Status {
        let index = why as usize;
        if let (Some(count), Some(word)) = (self.0.refused.get(index), REFUSALS.get(index)) {
            count.fetch_add(1, Ordering::Relaxed);
            self.0.journal.refused(client, key, word);
        }
        status
    }

    async fn signature(&self, client: &Client<'_>, request: &SignRequest) -> Result<Vec<u8>, Status> {
        let name = request.key.as_str();
        let refuse = |why, status| self.refuse(why, &client.name, name, status);
        if let Err(wait) = self.0.buckets.take(client.place, self.0.started.elapsed()) {
            let text = format!("too many signatures for {}: come back in {wait:?}", client.name);
            return Err(refuse(Refusal::TooMany, Status::resource_exhausted(text)));
        }
        // A key that there is not and one that is not allowed are answered alike.
        let Some(held) = self.0.keys.get(name).filter(|_| client.may_use(name)) else {
            let text = format!("{} may not use a key `{name}`, or there is none", client.name);
            return Err(refuse(Refusal::NotAllowed, Status::permission_denied(text)));
        };
        if request.public_key != held.public_key().as_bytes() {
            let text = format!("the key `{name}` of this signer is {}", held.public_key());
            return Err(refuse(Refusal::WrongKey, Status::failed_precondition(text)));
        }
        let wrong_scheme = || {
            let text = format!("the key `{name}` does not sign by the scheme {:#06x}", request.scheme);
            refuse(Refusal::WrongScheme, Status::invalid_argument(text))
        };
        let scheme = u16::try_from(request.scheme).map(SignatureScheme::from).map_err(|_| wrong_scheme())?;
        Handshake::read(&request.message, scheme).map_err(|error| match error {
            NotSigned::Form => refuse(Refusal::NotAHandshake, Status::invalid_argument(error.to_string())),
            NotSigned::Scheme => refuse(Refusal::WrongScheme, Status::invalid_argument(error.to_string())),
        })?;
        let signer = held.key().choose_scheme(&[scheme]).ok_or_else(wrong_scheme)?;
        let waiting = Waiting::new(&self.0.waiting);
        if self.0.places.available_permits() == 0 && waiting.before >= self.0.queue {
            return Err(refuse(Refusal::Busy, Status::resource_exhausted("too many signatures wait")));
        }
        let place = self.0.places.acquire().await.map_err(|error| Status::internal(error.to_string()))?;
        drop(waiting);
        let message = request.message.clone();
        let begun = Instant::now();
        let signing = tokio::task::spawn_blocking(move || signer.sign(&message)).await;
        drop(place);
        let signed = signing.map_err(|error| Status::internal(error.to_string()))?;
        let signature = signed.map_err(|error| Status::internal(error.to_string()))?;
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.0.micros.fetch_add(micros, Ordering::Relaxed);
        self.0.signed.fetch_add(1, Ordering::Relaxed);
        self.0.keys.count(name);
        self.0.journal.signed(&client.name, name);
        Ok(signature)
    }
}

/// A request that waits for a place.
struct Waiting<'a> {
    count: &'a AtomicUsize,
    before: usize,
}

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        Self { count, before: count.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request that a stop waits for.
struct UnderWay<'a>(&'a watch::Sender<usize>);

impl<'a> UnderWay<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[tonic::async_trait]
impl Signer for Service {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignReply>, Status> {
        let _under_way = UnderWay::new(&self.0.under_way);
        let client = self.client(&request, &request.get_ref().key)?;
        let signature = self.signature(&client, request.get_ref()).await?;
        Ok(Response::new(SignReply { signature }))
    }

    async fn list_keys(&self, request: Request<ListKeysRequest>) -> Result<Response<ListKeysReply>, Status> {
        let client = self.client(&request, "")?;
        let offered = self.0.keys.offered().into_iter().filter(|(name, _)| client.may_use(name));
        let keys = offered.map(|(name, key)| Key { name, public_key: key.as_bytes().to_vec() }).collect();
        Ok(Response::new(ListKeysReply { keys }))
    }
}
