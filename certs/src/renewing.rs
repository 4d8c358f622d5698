//! A source for issuers that sign requests and tell nothing by themselves: it makes a new key for each certificate and asks
//! for the next one at half of its life.
//!
//! The clocks are looked at every 30 seconds. A root that an issuer does not name any more is believed for as long as a
//! certificate lives that it gave before: others still show those, and learn of the new root only when they renew.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, DistinguishedName, SanType};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use crate::ca::authority::{Key, KeyKind};
use crate::identity::SpiffeId;
use crate::mesh::MeshIdentity;
use crate::source::{Hopeless, Intake, LONGEST_PAUSE, Roots, Source, Told, backoff};
use crate::svid::Svid;
use crate::workload::plan::Plan;
use crate::workload::time::MeshTime;

/// The longest between two looks at the clocks.
const TICK: Duration = Duration::from_secs(30);
/// One attempt, from the connection to the certificate.
const ATTEMPT: Duration = Duration::from_secs(30);
/// More roots than any issuer has.
const MAX_ROOTS: usize = 64;

/// An issuer that signs requests.
pub trait Signer: fmt::Debug + Send + Sync + 'static {
    /// Who it is, for logs.
    fn name(&self) -> String;

    /// How long certificates are to live; none where the issuer decides.
    fn ttl(&self) -> Option<Duration>;

    /// Signs a request for `ttl`.
    fn sign<'a>(&'a mut self, csr: &'a Csr, now: SystemTime) -> BoxFuture<'a, Result<Signed, Failure>>;
}

/// A request for a certificate (PKCS #10).
#[derive(Clone, Debug)]
pub struct Csr {
    pub pem: String,
    /// Whom it is for, where that is not left to the issuer.
    pub identity: Option<SpiffeId>,
}

/// What an issuer gave.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate, and those between it and a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whom to believe.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why there is no certificate.
#[derive(Clone, Debug)]
pub struct Failure {
    pub reason: String,
    /// The issuer wants to be left alone so long.
    pub retry_after: Option<Duration>,
    /// Asking again cannot help before somebody has changed the configuration.
    pub hopeless: bool,
}

impl Failure {
    pub fn new(reason: impl fmt::Display) -> Self {
        Self { reason: reason.to_string(), retry_after: None, hopeless: false }
    }
}

/// Keeps an identity by a [`Signer`].
#[derive(Debug)]
pub struct Renewing<S> {
    signer: S,
    identity: Option<SpiffeId>,
    time: Arc<MeshTime>,
}

impl<S: Signer> Renewing<S> {
    /// For `identity`, or whoever the issuer says that this is. The identity that is kept has to judge by `time`.
    pub fn new(signer: S, identity: Option<SpiffeId>, time: Arc<MeshTime>) -> Self {
        Self { signer, identity, time }
    }
}

impl<S: Signer> Source for Renewing<S> {
    fn name(&self) -> String {
        self.signer.name()
    }

    fn follow(mut self: Box<Self>, identity: MeshIdentity, told: Told) -> BoxFuture<'static, Hopeless> {
        Box::pin(async move {
            let mut intake = Intake::new(identity, told);
            let mut roots = Believed::default();
            let mut plan: Option<Plan> = None;
            let mut pauses = backoff();
            // By the clock that only grows.
            let mut held = Duration::ZERO;
            loop {
                let (now, elapsed) = (self.time.now(), self.time.elapsed());
                let due = plan.as_ref().map_or(Duration::ZERO, |plan| plan.due(now, elapsed));
                let wait = due.max(held.saturating_sub(elapsed));
                if !wait.is_zero() {
                    self.time.pause(wait.min(TICK)).await;
                    continue;
                }
                let obtained = match timeout(ATTEMPT, self.obtain(&mut intake, &mut roots)).await {
                    Ok(obtained) => obtained,
                    Err(_) => Err(Failure::new(format!("no certificate within {} s", ATTEMPT.as_secs()))),
                };
                match obtained {
                    Ok(end) => {
                        plan = Some(Plan::new(
                            self.time.now(),
                            end,
                            self.time.elapsed(),
                            &mut fastrand::Rng::new(),
                        ));
                        pauses = backoff();
                        held = Duration::ZERO;
                        intake.told().well();
                    }
                    Err(Failure { reason, hopeless: true, .. }) => return Hopeless(reason),
                    Err(failure) => {
                        intake.told().problem(&failure.reason);
                        let asked = failure.retry_after.unwrap_or_default().min(LONGEST_PAUSE);
                        held = self.time.elapsed() + pauses.pause(LONGEST_PAUSE).max(asked);
                    }
                }
            }
        })
    }
}

impl<S: Signer> Renewing<S> {
    /// A certificate, installed: when it ends.
    async fn obtain(&mut self, intake: &mut Intake, believed: &mut Believed) -> Result<SystemTime, Failure> {
        let key = Key::generate(KeyKind::P256).map_err(Failure::new)?;
        let csr = request(&key, self.identity.as_ref())?;
        let signed = self.signer.sign(&csr, self.time.now()).await?;
        let name = self.signer.name();
        let refused =
            |error: &dyn fmt::Display| Failure::new(format!("{name}: what was signed is not taken: {error}"));
        let svid = Svid::new(signed.chain, &key.private_key()).map_err(|error| refused(&error))?;
        if let Some(own) = self.identity.as_ref().filter(|own| *own != svid.id()) {
            return Err(refused(&format_args!("it is for {} and not for {own}", svid.id())));
        }
        let (now, end) = (self.time.now(), svid.leaf().not_after);
        let domain = svid.id().trust_domain().parse().map_err(Failure::new)?;
        let all = believed.with(&signed.roots, end, now);
        intake.take(Some(&Roots::of(domain, all.roots())), Some(svid)).map_err(|error| refused(&error))?;
        *believed = all;
        let life = end.duration_since(now).unwrap_or_default();
        intake.told().notice(self.signer.ttl().filter(|ttl| life < ttl.mul_f64(0.9)).map(|ttl| {
            format!("certificates live {} s; asked for were {} s", life.as_secs(), ttl.as_secs())
        }));
        Ok(end)
    }
}

fn request(key: &Key, identity: Option<&SpiffeId>) -> Result<Csr, Failure> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(identity) = identity {
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().map_err(Failure::new)?)];
    }
    let csr = params.serialize_request(key).map_err(Failure::new)?;
    Ok(Csr { pem: csr.pem().map_err(Failure::new)?, identity: identity.cloned() })
}

/// Roots, and until when each is believed without being named again.
#[derive(Debug, Default)]
struct Believed(Vec<(CertificateDer<'static>, SystemTime)>);

impl Believed {
    /// What to believe when an issuer has named `roots` with a certificate that ends at `end`: these, and those of before
    /// whose certificates still live.
    fn with(&self, named: &[CertificateDer<'static>], end: SystemTime, now: SystemTime) -> Self {
        let mut all: Vec<(CertificateDer<'static>, SystemTime)> = Vec::new();
        for root in named {
            if !all.iter().any(|(known, _)| known == root) {
                all.push((root.clone(), end));
            }
        }
        for (root, until) in self.0.iter().filter(|(_, until)| *until > now) {
            match all.iter_mut().find(|(known, _)| known == root) {
                Some((_, known)) => *known = (*known).max(*until),
                None => all.push((root.clone(), *until)),
            }
        }
        all.truncate(MAX_ROOTS);
        Self(all)
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.0.iter().map(|(root, _)| root.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
