//! Where a process has its identity and its trust from, whoever issues them.
//!
//! A [`Source`] follows an issuer and puts what it tells into a [`MeshIdentity`]. Whatever goes wrong takes nothing away:
//! what is in force stays, the [`Standing`] tells the problem, and the source asks again. [`Intake`] is the way into the
//! identity for sources whose issuers tell roots and certificates, not numbered bundles.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh::{InstallError, MeshIdentity};
use crate::svid::Svid;
use crate::trust::{Fingerprint, Trust};
use crate::workload::plan::Backoff;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The pauses of sources between attempts that fail.
pub(crate) fn backoff() -> Backoff {
    Backoff::new(FIRST_PAUSE, LONGEST_PAUSE)
}

/// An issuer, and how it is asked.
pub trait Source: Send + 'static {
    /// Who it is, for logs: `consul http://127.0.0.1:8500`.
    fn name(&self) -> String;

    /// Keeps `identity` as new as the issuer has it, until the future is dropped. It ends only where asking again cannot
    /// help before somebody has changed the configuration.
    fn follow(self: Box<Self>, identity: MeshIdentity, told: Told) -> BoxFuture<'static, Hopeless>;
}

/// Why a source has given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Hopeless(pub String);

/// How a source fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What went wrong the last time; none after a success.
    pub problem: Option<String>,
    /// Whether nobody asks any more.
    pub hopeless: bool,
    /// What is not as it was asked for, although it is taken.
    pub notice: Option<String>,
    /// Certificates that were taken.
    pub certificates: u64,
    /// Sets of roots that were taken.
    pub bundles: u64,
}

/// Where a source says how it fares. Problems are logged when they begin and when they change.
#[derive(Debug)]
pub struct Told {
    name: String,
    standing: watch::Sender<Standing>,
}

impl Told {
    /// The issuer did not give what it should have.
    pub fn problem(&self, problem: &dyn fmt::Display) {
        let problem = problem.to_string();
        self.standing.send_if_modified(|standing| {
            let new = standing.problem.as_ref() != Some(&problem);
            if new {
                tracing::warn!(source = self.name, problem, "identity is not renewed for now");
                standing.problem = Some(problem);
            }
            new
        });
    }

    /// The issuer gave something else than it was asked for, and it is taken all the same. Nothing for what is as asked.
    pub fn notice(&self, notice: Option<String>) {
        self.standing.send_if_modified(|standing| {
            let new = standing.notice != notice;
            if let Some(notice) = notice.as_ref().filter(|_| new) {
                tracing::warn!(source = self.name, notice, "identity is not as it was asked for");
            }
            standing.notice = notice;
            new
        });
    }

    /// The issuer answered as it should.
    pub fn well(&self) {
        self.standing.send_if_modified(|standing| {
            let was = standing.problem.take();
            if was.is_some() {
                tracing::info!(source = self.name, "identity is renewed again");
            }
            was.is_some()
        });
    }

    fn taken(&self, what: Taken) {
        if what != Taken::default() {
            self.standing.send_modify(|standing| {
                standing.certificates += u64::from(what.certificate);
                standing.bundles += u64::from(what.bundle);
            });
        }
    }
}

/// A source at work; ends when dropped.
#[derive(Debug)]
pub struct Following {
    name: String,
    standing: watch::Receiver<Standing>,
    task: AbortHandle,
}

impl Following {
    /// Puts a source to work on the runtime of the caller.
    #[must_use]
    pub fn start(source: Box<dyn Source>, identity: MeshIdentity) -> Self {
        let name = source.name();
        let (sender, standing) = watch::channel(Standing::default());
        let told = Told { name: name.clone(), standing: sender.clone() };
        let who = name.clone();
        let task = tokio::spawn(async move {
            let Hopeless(problem) = source.follow(identity, told).await;
            tracing::error!(source = who, problem, "identity is not asked for any more");
            sender.send_modify(|standing| {
                standing.problem = Some(problem);
                standing.hopeless = true;
            });
        });
        Self { name, standing, task: task.abort_handle() }
    }

    /// Who is followed.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it fares, as it changes.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whom an issuer says to believe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Of this process.
    pub own: TrustDomain,
    /// By trust domain, the own among them.
    pub domains: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>,
    pub crls: Vec<CertificateRevocationListDer<'static>>,
}

impl Roots {
    /// Of one domain alone.
    #[must_use]
    pub fn of(own: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Self {
        Self { domains: BTreeMap::from([(own.clone(), roots)]), own, crls: Vec::new() }
    }

    /// The same however it is ordered.
    fn fingerprint(&self) -> Fingerprint {
        let mut all: Vec<_> = self
            .domains
            .iter()
            .flat_map(|(domain, roots)| {
                roots.iter().map(move |root| (domain.as_str(), Fingerprint::of(root)))
            })
            .chain(self.crls.iter().map(|crl| ("", Fingerprint::of(crl))))
            .collect();
        all.sort_unstable();
        all.dedup();
        let mut text = format!("{}\n", self.own);
        for (domain, hash) in all {
            text.push_str(&format!("{domain} {hash}\n"));
        }
        Fingerprint::of(text.as_bytes())
    }

    fn trust(&self, generation: u64) -> Result<Trust, InstallError> {
        let mut trust = Trust::new(self.own.clone(), generation);
        for (domain, roots) in &self.domains {
            trust = trust.with_roots(domain, roots.iter().cloned())?;
        }
        Ok(trust.with_crls(&self.crls)?)
    }
}

/// What an issuer has told and is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntakeError {
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error("the roots are of the trust domain `{new}`; this process is {own} until it is started again")]
    Domain { own: SpiffeId, new: TrustDomain },
}

/// What was put in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub certificate: bool,
    pub bundle: bool,
}

/// Puts roots and certificates into an identity, the roots first. What is there already is not put there again, for
/// connections may be made anew after each change. A certificate that the roots do not verify yet is kept and tried again
/// with the next roots.
#[derive(Debug)]
pub struct Intake {
    identity: MeshIdentity,
    told: Told,
    roots: Option<Fingerprint>,
    waiting: Option<Arc<Svid>>,
}

impl Intake {
    #[must_use]
    pub fn new(identity: MeshIdentity, told: Told) -> Self {
        Self { identity, told, roots: None, waiting: None }
    }

    /// Into what.
    #[must_use]
    pub fn identity(&self) -> &MeshIdentity {
        &self.identity
    }

    /// Where problems are told.
    #[must_use]
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// Whether a certificate waits for roots that verify it.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    /// Takes what an issuer has told. A certificate that comes before the first roots waits for them.
    ///
    /// # Errors
    /// Something of it is not taken; what was in force stays.
    pub fn take(&mut self, roots: Option<&Roots>, svid: Option<Svid>) -> Result<Taken, IntakeError> {
        let mut taken = Taken::default();
        let result = self.put(roots, svid, &mut taken);
        self.told.taken(taken);
        result.map(|()| taken)
    }

    fn put(
        &mut self,
        roots: Option<&Roots>,
        svid: Option<Svid>,
        taken: &mut Taken,
    ) -> Result<(), IntakeError> {
        if let Some(svid) = svid {
            self.waiting = Some(Arc::new(svid));
        }
        if let Some(roots) = roots {
            let fingerprint = roots.fingerprint();
            if self.roots != Some(fingerprint) {
                if let Some(svid) = self.identity.svid()
                    && svid.id().trust_domain() != roots.own.as_str()
                {
                    return Err(IntakeError::Domain { own: svid.id().clone(), new: roots.own.clone() });
                }
                let generation = self.identity.trust().map_or(1, |trust| trust.generation() + 1);
                self.identity.set_trust(roots.trust(generation)?)?;
                self.roots = Some(fingerprint);
                taken.bundle = true;
            }
        }
        let Some(svid) = self.waiting.as_ref().filter(|_| self.identity.trust().is_some()) else {
            return Ok(());
        };
        if self.identity.svid().is_none_or(|own| own.leaf().hash != svid.leaf().hash) {
            self.identity.install(svid.clone())?;
            taken.certificate = true;
        }
        self.waiting = None;
        Ok(())
    }
}
