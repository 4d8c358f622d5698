//! Keeps an authority: the [`Driver`] with its record, and what the service needs of it, which is a [`Current`].
//!
//! What the service signs with follows from the record that was read last. A replica that cannot read it for a while
//! stops signing, because the others may go on without it.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::audit::Signature;
use super::authority::Authority;
use super::fleet::{Answer, Fleet, Said};
use super::foundry::Foundry;
use super::record::{Der, IssuerId, Moment, Record, RootState};
use super::rotation::driver::{Clock, Driver, DriverError};
use super::rotation::forge::ForgeError;
use super::rotation::metrics::{self, Sample};
use super::rotation::{self, State};
use super::store::Store;
use super::{Ack, Acks, Bundle, BundleRoot, Current, Handed, Lifetimes, Renew};
use crate::identity::{IdentityPattern, SpiffeId};
use crate::trust::{Fingerprint, KeyId, Revoked, Serial};

/// How often it is looked whether this replica may still sign.
const PACE: Duration = Duration::from_secs(1);
/// A certificate that ended no longer ago still proves who somebody is while an ended root is replaced.
const RECOVERY: Duration = Duration::from_secs(30 * 86_400);
/// A time after all others: what is revoked until then is revoked.
const NEVER: Duration = Duration::from_secs(253_402_300_799);

/// Why an authority cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("the record of the authority cannot be used: {0}")]
    Record(String),
}

impl From<ForgeError> for KeeperError {
    fn from(error: ForgeError) -> Self {
        Self::Record(error.0)
    }
}

/// Issuers with their keys, by what they hand out with a certificate.
type Opened = HashMap<(IssuerId, Vec<Der>), Arc<Authority>>;

/// One authority on one replica.
pub struct Keeper {
    driver: Arc<Driver>,
    fleet: Arc<Fleet>,
    foundry: Arc<Foundry>,
    clock: Arc<dyn Clock>,
    current: watch::Sender<Arc<Current>>,
    opened: Mutex<Opened>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("driver", &self.driver).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Opens the authority that the store has. None: it has none yet, see [`driver::found`](rotation::driver::found) and
    /// [`Foundry::found`]. `set_up` is told the driver before it is used.
    ///
    /// # Errors
    /// The store cannot be used, what it has is damaged, or its keys are sealed by another key.
    pub async fn open(
        store: Arc<dyn Store>,
        foundry: Arc<Foundry>,
        clock: Arc<dyn Clock>,
        replica: &str,
        set_up: impl FnOnce(Driver) -> Driver,
    ) -> Result<Option<Arc<Self>>, KeeperError> {
        let fleet = Arc::new(Fleet::default());
        let forge = Arc::clone(&foundry);
        let opened = Driver::open(store, Arc::clone(&fleet), forge, Arc::clone(&clock), replica).await?;
        let Some(driver) = opened else { return Ok(None) };
        let driver = Arc::new(set_up(driver));
        let known = driver.now();
        // A sealing key that is the wrong one is found here, and not when the first workload asks.
        let signing = known.record.signing().filter(|issuer| issuer.key.is_some());
        let opened = Mutex::default();
        if let Some(issuer) = signing {
            open(&foundry, &known.record, &issuer.id, &opened)?;
        }
        let first = assemble(&foundry, &known.record, true, &opened)?;
        let current = watch::Sender::new(Arc::new(first));
        Ok(Some(Arc::new(Self { driver, fleet, foundry, clock, current, opened })))
    }

    /// Takes in what the audit log knows of the seconds before this process began: who was given a certificate counts, even
    /// if the process before was killed before it could write so into the store.
    pub fn remember(&self, signatures: Vec<Signature>) {
        for Signature { identity, proxy_id, issuer, at, not_after } in signatures {
            self.fleet.signed_before(&identity, &proxy_id, &IssuerId(issuer), not_after.into(), at.into());
        }
    }

    /// What drives rotations.
    #[must_use]
    pub fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    /// What the service reads.
    #[must_use]
    pub fn current(&self) -> watch::Receiver<Arc<Current>> {
        self.current.subscribe()
    }

    /// The numbers of the authority.
    #[must_use]
    pub fn metrics(&self) -> Vec<Sample> {
        let (known, waiting) = self.driver.standing();
        let mut samples = metrics::samples(&known.record, &self.driver.view(), &waiting, self.clock.wall());
        samples.push(Sample {
            name: "mesh_rotation_overdue",
            help: "1 while something is due to be exchanged by its age and that cannot begin.",
            labels: Vec::new(),
            value: f64::from(u8::from(self.driver.overdue().is_some())),
        });
        samples
    }

    /// Drives and publishes until it is dropped.
    pub async fn run(self: Arc<Self>) {
        let driving = Arc::clone(&self.driver).run();
        let publishing = async {
            let mut known = self.driver.known();
            let mut signs = true;
            loop {
                let (record, may) = (known.borrow_and_update().clone(), self.driver.may_sign());
                self.publish(&record.record, may);
                if may != signs {
                    tracing::warn!(may, "whether this replica signs has changed: it has to read the record");
                    signs = may;
                }
                while tokio::time::timeout(PACE, known.changed()).await.is_err()
                    && self.driver.may_sign() == signs
                {}
            }
        };
        tokio::join!(driving, publishing);
    }

    fn publish(&self, record: &Record, may_sign: bool) {
        match assemble(&self.foundry, record, may_sign, &self.opened) {
            Ok(current) => {
                self.current.send_replace(Arc::new(current));
            }
            Err(error) => tracing::error!(%error, "the record cannot be used; the one before stays in use"),
        }
    }
}

/// Opens an issuer once; its key is needed at each signature.
fn open(
    foundry: &Foundry,
    record: &Record,
    id: &IssuerId,
    opened: &Mutex<Opened>,
) -> Result<Arc<Authority>, ForgeError> {
    let issuer = record.issuer(id).ok_or_else(|| ForgeError("it is not listed".to_owned()))?;
    let key = (id.clone(), record.intermediates(issuer));
    let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(authority) = opened.get(&key) {
        return Ok(Arc::clone(authority));
    }
    // Keys that nobody needs any more leave the memory.
    opened.retain(|(id, _), _| record.issuer(id).is_some_and(|issuer| issuer.key.is_some()));
    let authority = Arc::new(foundry.open(record, issuer)?);
    opened.insert(key, Arc::clone(&authority));
    Ok(authority)
}

/// What the service reads, made of a record.
fn assemble(
    foundry: &Foundry,
    record: &Record,
    may_sign: bool,
    opened: &Mutex<Opened>,
) -> Result<Current, ForgeError> {
    let broken = |error: &dyn std::fmt::Display| ForgeError(error.to_string());
    let signing = record.signing();
    let roots = record.trusted().map(|root| BundleRoot {
        certificate: CertificateDer::from(root.certificate.0.clone()),
        state: match root.state {
            RootState::Retiring => super::RootState::Retiring,
            _ if signing.is_some_and(|issuer| issuer.root == root.id) => super::RootState::Active,
            _ => super::RootState::Staged,
        },
    });
    let mut revoked = Revoked::default();
    for one in &record.revocations.serials {
        let padded = if one.what.len() % 2 == 1 { format!("0{}", one.what) } else { one.what.clone() };
        revoked.serials.insert(padded.parse::<Serial>().map_err(|error| broken(&error))?);
    }
    for one in &record.revocations.identities {
        let id: SpiffeId = one.what.parse().map_err(|error| broken(&error))?;
        revoked.identities.insert(id, SystemTime::UNIX_EPOCH + NEVER);
    }
    for root in record.roots.iter().filter(|root| root.state == RootState::Distrusted) {
        revoked.authorities.insert(root.id.0.parse::<Fingerprint>().map_err(|error| broken(&error))?);
    }
    let shadow = record.rehearsal.iter().map(|one| CertificateDer::from(one.certificate.0.clone()));
    let bundle = Bundle {
        trust_domain: record.trust_domain.parse().map_err(|error| broken(&error))?,
        generation: record.bundle.generation,
        least_generation: record.bundle.min_supported_generation,
        least_connection_generation: record.bundle.reconnect_below,
        roots: roots.collect(),
        revoked,
        shadow_roots: shadow.collect(),
        made: record.bundle.changed_at.into(),
    };
    let mut current = Current::new(bundle).map_err(|error| broken(&error))?;
    let longest = record.lifetimes.leaf();
    current.lifetimes = Lifetimes { longest, renewal: Lifetimes::default().renewal.min(longest / 4) };
    if may_sign && let Some(issuer) = signing.filter(|issuer| issuer.key.is_some()) {
        current.issuer = Some(open(foundry, record, &issuer.id, opened)?);
    }
    current.renew = renew(record)?;
    // Whoever held a certificate of a root that went may come for a new one.
    let were = |state| {
        let roots = record.roots.iter().filter(move |root| root.state == state);
        roots.map(|root| CertificateDer::from(root.certificate.0.clone())).collect()
    };
    current.former_roots = were(RootState::Retired);
    current.distrusted_roots = were(RootState::Distrusted);
    if let Some(rotation) = record.rotation.as_ref().filter(|rotation| rotation.doing() == State::Emergency)
        && record.root(&rotation.from.root).is_some_and(|root| root.state == RootState::Retired)
    {
        current.renew_expired = RECOVERY;
    }
    Ok(current)
}

fn renew(record: &Record) -> Result<Option<Renew>, ForgeError> {
    let Some(request) = rotation::renewal(record) else { return Ok(None) };
    let who = if request.who.is_empty() { vec!["*".to_owned()] } else { request.who };
    let who: Result<Vec<IdentityPattern>, _> = who.iter().map(|who| IdentityPattern::from_str(who)).collect();
    let issuer = request.unless_issued_by.map(|id| KeyId::from_str(&id.0)).transpose();
    Ok(Some(Renew {
        generation: request.generation,
        who: who.map_err(|error| ForgeError(error.to_string()))?,
        proxies: request.proxies.into_iter().collect(),
        unless_issued_by: issuer.map_err(|error| ForgeError(error.to_string()))?,
        spread: request.spread,
        reason: request.reason,
    }))
}

impl Acks for Keeper {
    fn heard(&self, ack: Ack) {
        let said = Said {
            id: ack.proxy_id,
            identity: ack.identity.as_str().to_owned(),
            version: ack.version,
            generation: ack.bundle_generation,
            issuer: IssuerId(ack.leaf_issuer.to_string()),
            serial: ack.leaf_serial.to_string(),
            not_after: Moment::from(ack.leaf_not_after),
            oldest_connection: ack.oldest_connection_generation,
            clock_offset_ms: ack.clock_offset_ms,
            refused: ack.refused,
            handshakes: ack.handshakes,
            failures: ack.handshake_failures,
            mesh_address: ack.mesh_address,
        };
        self.fleet.heard(said, self.clock.wall());
    }

    fn gone(&self, identity: &SpiffeId, proxy_id: &str) {
        self.fleet.gone(identity.as_str(), proxy_id);
    }

    fn left(&self, identity: &SpiffeId, proxy_id: &str) {
        self.fleet.left(identity.as_str(), proxy_id, self.clock.wall());
    }

    fn signed(&self, identity: &SpiffeId, proxy_id: &str, issuer: &KeyId, not_after: SystemTime) {
        let issuer = IssuerId(issuer.to_string());
        self.fleet.signed(identity.as_str(), proxy_id, &issuer, not_after.into(), self.clock.wall());
    }

    fn handed(&self, handed: Handed<'_>) {
        let answer = Answer {
            generation: handed.generation,
            issuer: IssuerId(handed.issuer.to_string()),
            serial: handed.serial.to_string(),
            at: self.clock.wall(),
            until: handed.not_after.into(),
            ..Answer::default()
        };
        let shown = handed.shown.map(ToString::to_string);
        self.fleet.handed(handed.identity.as_str(), handed.proxy_id, answer, shown.as_deref());
    }

    fn holder(&self, identity: &SpiffeId, serial: &Serial) -> Option<String> {
        self.fleet.holder(identity.as_str(), &serial.to_string())
    }

    fn written(&self) -> BoxFuture<'_, Result<(), String>> {
        // Whoever waits may go away; what is being written is written to its end.
        let driver = Arc::clone(&self.driver);
        let writing = tokio::spawn(async move { driver.keep_fleet().await });
        Box::pin(async move {
            let written = writing.await.map_err(|error| error.to_string())?;
            written.map_err(|error| error.to_string())
        })
    }
}
