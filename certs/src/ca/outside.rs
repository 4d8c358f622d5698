//! An authority outside, which holds the key of the root and signs issuers of this one.
//!
//! The key of a new issuer is made here and never leaves: what goes out is a request. It is in the store, sealed, before
//! anybody is asked, so whoever asks again after a crash asks for the same key, and a request that is already there is gone on
//! with. Nothing is written of what comes back before it has been looked at as if it came from a stranger.

pub mod cert_manager;
pub mod vault;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{Facts, Key, KeyKind};
use super::foundry::Foundry;
use super::record::{Der, Issuer, IssuerState, Lifetimes, Moment, Record, Root, RootState, SealedKey};
use super::rotation::forge::{Forge, ForgeError, Material, Request};
use super::seal::Sealer;
use super::store::{Store, SwapError, Version};
use crate::identity::TrustDomain;
use crate::renewing::{Failure, Signed};
use crate::trust::{Fingerprint, KeyId};

/// The name of what was asked for, in a store.
const ASKED: &str = "asked";
/// What is older was given up: who asks now wants a certificate that begins now.
const STALE: Duration = Duration::from_secs(86_400);
/// Certificates above an issuer.
const LONGEST: usize = 8;

/// Which authority it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Vault,
    CertManager,
}

impl Kind {
    /// The word in requests.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vault => "vault",
            Self::CertManager => "cert_manager",
        }
    }

    /// The option that asks for it.
    #[must_use]
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Vault => "--vault",
            Self::CertManager => "--cert-manager",
        }
    }
}

/// What an authority outside is to sign.
#[derive(Clone, Debug)]
pub struct Question {
    /// PKCS #10, in PEM.
    pub csr: String,
    /// The names that the issuer is to have.
    pub organization: String,
    pub common_name: String,
    /// Says which key it is: the same for the same request.
    pub key: Fingerprint,
    pub life: Duration,
    pub now: Moment,
}

/// What is found out before anything is asked for.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The root, where that can be known without a signature.
    pub root: Option<CertificateDer<'static>>,
    /// The first end of those that would be above the issuer.
    pub ends: Option<Moment>,
    /// For people.
    pub told: String,
}

/// Why there is no signature.
#[derive(Clone, Debug)]
pub struct NotSigned {
    pub reason: String,
    /// This request will never be signed: the next has to be another.
    pub spent: bool,
}

impl From<Failure> for NotSigned {
    fn from(failure: Failure) -> Self {
        Self { reason: failure.reason, spent: false }
    }
}

/// An authority outside. Every question has a deadline.
pub trait Outside: fmt::Debug + Send + Sync + 'static {
    fn kind(&self) -> Kind;

    /// What and where it is, for people.
    fn name(&self) -> String;

    /// Has it signed. The same question may be asked again.
    fn sign<'a>(&'a self, question: &'a Question) -> BoxFuture<'a, Result<Signed, NotSigned>>;

    /// Whether it could be asked, without asking for anything.
    fn look(&self) -> BoxFuture<'_, Result<Seen, NotSigned>>;

    /// Whether issuers by it may lack a path length, because it cannot give them one.
    fn lacks_path_length(&self) -> bool;
}

/// The key of a request, as it waits in a store.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Waiting {
    key: SealedKey,
    made_at: Moment,
}

/// A request that is under way, with its key.
struct Asked {
    key: Key,
    question: Question,
    version: Version,
}

/// The request for an issuer: the one that is under way, or a new one, which is in the store when this returns.
async fn ask(
    store: &dyn Store,
    sealer: &Sealer,
    kind: KeyKind,
    record: Option<&Record>,
    domain: &TrustDomain,
    life: Duration,
    now: Moment,
) -> Result<Asked, ForgeError> {
    let wrong = |error: &dyn fmt::Display| ForgeError(error.to_string());
    loop {
        let stored = store.load(ASKED).await.map_err(|error| wrong(&error))?;
        let open = |value: &[u8]| {
            let waiting: Waiting = serde_json::from_slice(value).ok()?;
            let key = sealer.open(ASKED, &waiting.key.0).ok()?;
            let key = Key::load(&PrivateKeyDer::try_from(key.as_slice()).ok()?).ok()?;
            let is_fresh = waiting.made_at <= now && now.since(waiting.made_at) < STALE;
            (is_fresh && !is_used(record, &key)).then_some(key)
        };
        if let Some(stored) = &stored
            && let Some(key) = open(&stored.value)
        {
            let question = question(&key, domain, life, now)?;
            return Ok(Asked { key, question, version: stored.version });
        }
        let key = Key::generate(kind)?;
        let sealed = SealedKey(sealer.seal(ASKED, &key.der())?);
        let waiting = serde_json::to_vec(&Waiting { key: sealed, made_at: now });
        let waiting = waiting.map_err(|error| wrong(&error))?;
        match store.swap(ASKED, stored.map(|stored| stored.version), &waiting).await {
            Ok(version) => {
                return Ok(Asked { question: question(&key, domain, life, now)?, key, version });
            }
            // Another replica was faster: its key is taken.
            Err(SwapError::Conflict) => {}
            Err(SwapError::Store(error)) => return Err(wrong(&error)),
        }
    }
}

/// Forgets the request whose issuer is in the record.
pub async fn forget(store: &dyn Store) {
    if let Ok(Some(stored)) = store.load(ASKED).await {
        remove(store, stored.version).await;
    }
}

/// If it stays, the next who asks sees that its key is in use, or that it is old.
async fn remove(store: &dyn Store, version: Version) {
    let _ = store.remove(ASKED, version).await;
}

/// Whether there is an issuer with that key.
fn is_used(record: Option<&Record>, key: &Key) -> bool {
    let hash = key.hash();
    record.into_iter().flat_map(|record| &record.issuers).any(|issuer| {
        let facts = Facts::read(&CertificateDer::from(issuer.certificate.0.as_slice()));
        facts.is_ok_and(|facts| facts.key_hash == hash)
    })
}

fn question(key: &Key, domain: &TrustDomain, life: Duration, now: Moment) -> Result<Question, ForgeError> {
    let hash = key.hash();
    let short: String = hash.to_string().chars().take(8).collect();
    let (organization, common_name) = (domain.as_str().to_owned(), format!("issuer {short}"));
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organization.as_str());
    params.distinguished_name.push(DnType::CommonName, common_name.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let csr = params.serialize_request(key).and_then(|csr| csr.pem());
    let csr = csr.map_err(|error| ForgeError(format!("no request can be made: {error}")))?;
    Ok(Question { csr, organization, common_name, key: hash, life, now })
}

/// An authority outside, with what makes keys and judges what comes back.
#[derive(Debug)]
pub struct Elsewhere {
    foundry: Arc<Foundry>,
    authority: Arc<dyn Outside>,
}

impl Elsewhere {
    /// For the keys of this foundry.
    #[must_use]
    pub fn new(foundry: Arc<Foundry>, authority: Arc<dyn Outside>) -> Self {
        Self { foundry, authority }
    }

    /// Which authority it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.authority.kind()
    }

    /// What and where it is, for people.
    #[must_use]
    pub fn name(&self) -> String {
        self.authority.name()
    }

    /// The first record of an authority whose root's key is elsewhere.
    ///
    /// # Errors
    /// Nobody signs, or what came back cannot be used.
    pub async fn found(
        &self,
        store: &dyn Store,
        domain: &TrustDomain,
        lifetimes: Lifetimes,
        now: Moment,
    ) -> Result<Record, ForgeError> {
        let (root, issuer) = self.obtain(store, None, domain, &lifetimes, now).await?;
        Ok(Record::new(domain.as_str(), lifetimes, root, issuer, now))
    }

    /// What a rotation needs: an issuer below the root in use, or one below a new root.
    ///
    /// # Errors
    /// Nobody signs, what came back cannot be used, or its root is not the one that is wanted.
    pub async fn make(
        &self,
        store: &dyn Store,
        record: &Record,
        new_root: bool,
        now: Moment,
    ) -> Result<Material, ForgeError> {
        let domain = domain(record)?;
        let (root, mut issuer) = self.obtain(store, Some(record), &domain, &record.lifetimes, now).await?;
        self.judge(record, &root, new_root)?;
        if !new_root {
            return Ok(Material { issuer: Some(issuer), ..Material::default() });
        }
        let (foundry, record) = (Arc::clone(&self.foundry), record.clone());
        let signing_over = tokio::task::spawn_blocking(move || {
            let no_cross = signed_over(&foundry, &record, &root, &mut issuer, now);
            Material { root: Some(root), issuer: Some(issuer), back: None, no_cross }
        });
        signing_over.await.map_err(|_| ForgeError("its thread has ended".to_owned()))
    }

    /// What a rotation would get, as far as it can be known without asking for it, and words for people.
    ///
    /// # Errors
    /// It could not be asked.
    pub async fn plan(
        &self,
        record: &Record,
        new_root: bool,
        now: Moment,
    ) -> Result<(Material, String), ForgeError> {
        let seen = self.authority.look().await.map_err(|not| ForgeError(not.reason))?;
        let current = record.current_root().ok_or_else(|| ForgeError("there is no root".to_owned()))?;
        let root = match &seen.root {
            Some(certificate) => Foundry::root_elsewhere(certificate, &self.name(), now)?,
            None if new_root => Root {
                id: "the root that comes with the certificate".into(),
                spki: String::new(),
                not_before: now,
                not_after: now + record.lifetimes.root(),
                ..current.clone()
            },
            None => current.clone(),
        };
        self.judge(record, &root, new_root)?;
        let ends = seen.ends.unwrap_or(root.not_after).min(root.not_after);
        let issuer = Issuer {
            id: "planned".into(),
            state: IssuerState::Staged,
            root: root.id.clone(),
            certificate: Der(Vec::new()),
            above: Vec::new(),
            cross: None,
            not_before: now,
            not_after: (now + record.lifetimes.issuer()).min(ends),
            key: None,
            made_at: now,
            changed_at: now,
        };
        let told = match &seen.root {
            Some(_) => {
                format!("{}; its root is {}, which ends {}", seen.told, root.id.short(), root.not_after)
            }
            None => seen.told,
        };
        let root = new_root.then_some(root);
        Ok((Material { root, issuer: Some(issuer), ..Material::default() }, told))
    }

    /// Whether a root is the one that is wanted.
    fn judge(&self, record: &Record, root: &Root, new_root: bool) -> Result<(), ForgeError> {
        let (name, flag) = (self.name(), self.kind().flag());
        let current = record.current_root().map(|root| &root.id);
        let is_current = current == Some(&root.id);
        let distrusted = |one: &&Root| one.state == RootState::Distrusted && one.spki == root.spki;
        if let Some(bad) = record.roots.iter().find(distrusted) {
            return Err(ForgeError(format!(
                "{name} signs with the key of root {}, which is distrusted ({}): make a root with another key there",
                bad.id.short(),
                bad.note
            )));
        }
        match new_root {
            true if is_current => Err(ForgeError(format!(
                "{name} signs below root {}, which is in use already: make a new root there first, or `postern certs rotate issuer` for a new issuer below this one",
                root.id.short()
            ))),
            false if !is_current => Err(ForgeError(format!(
                "{name} signs below root {}, and the one in use is {}: `postern certs rotate root {flag}` exchanges it",
                root.id.short(),
                current.map_or("none", |id| id.short())
            ))),
            _ => Ok(()),
        }
    }

    /// Has an issuer signed and looks at what comes back.
    async fn obtain(
        &self,
        store: &dyn Store,
        record: Option<&Record>,
        domain: &TrustDomain,
        lifetimes: &Lifetimes,
        now: Moment,
    ) -> Result<(Root, Issuer), ForgeError> {
        let asked =
            ask(store, self.foundry.sealer(), self.foundry.kind(), record, domain, lifetimes.issuer(), now)
                .await?;
        let signed = match self.authority.sign(&asked.question).await {
            Ok(signed) => signed,
            Err(not) => {
                if not.spent {
                    remove(store, asked.version).await;
                }
                return Err(ForgeError(not.reason));
            }
        };
        let (foundry, name) = (Arc::clone(&self.foundry), self.name());
        let (unlimited, version) = (self.authority.lacks_path_length(), asked.version);
        let (domain, life) = (domain.clone(), lifetimes.leaf());
        let judging = tokio::task::spawn_blocking(move || {
            let request = Request { trust_domain: domain.as_str(), now, life };
            let chain = way_up(&signed)?;
            foundry.accept(&request, asked.key, &chain, &name, unlimited)
        });
        let judged = judging.await.unwrap_or_else(|_| Err(ForgeError("its thread has ended".to_owned())));
        match judged {
            Ok(made) => Ok(made),
            Err(error) => {
                // The same question would get the same answer.
                remove(store, version).await;
                Err(ForgeError(format!("what {} has signed is not taken: {error}", self.name())))
            }
        }
    }
}

/// Has the root in use, if its key is at hand, sign the new one, and proves the whole. Gives why it did not.
fn signed_over(foundry: &Foundry, record: &Record, root: &Root, issuer: &mut Issuer, now: Moment) -> String {
    let request = |life| Request { trust_domain: &record.trust_domain, now, life };
    let Some(old) = record.current_root() else { return "there is no root".to_owned() };
    match foundry.cross(&request(record.lifetimes.root()), root, old) {
        Ok(cross) => issuer.cross = Some(cross),
        Err(error) => return error.0,
    }
    match foundry.prove(&request(record.lifetimes.leaf()), issuer, &[root, old]) {
        Ok(()) => String::new(),
        // More authorities stand between than the old root may vouch for; without it the way was proven already.
        Err(error) => {
            issuer.cross = None;
            error.0
        }
    }
}

fn domain(record: &Record) -> Result<TrustDomain, ForgeError> {
    record.trust_domain.parse().map_err(|error| ForgeError(format!("{error}")))
}

/// What was signed, those above it in their order, and the root at the end.
fn way_up(signed: &Signed) -> Result<Vec<CertificateDer<'static>>, ForgeError> {
    let Some((first, others)) = signed.chain.split_first() else {
        return Err(ForgeError("no certificate came back".to_owned()));
    };
    let mut chain = vec![first.clone()];
    let mut last = Names::of(first)?;
    while chain.len() <= LONGEST {
        let mut above = Vec::new();
        for certificate in others.iter().chain(&signed.roots).filter(|one| !chain.contains(one)) {
            let names = Names::of(certificate)?;
            if names.subject == last.issuer {
                above.push((certificate, names));
            }
        }
        // An authority that has got a new key has kept its name, as a rule.
        above.sort_by_key(|(_, names)| names.key.is_none() || names.key != last.issuer_key);
        let Some((certificate, names)) = above.into_iter().next() else {
            return Err(ForgeError(
                "the root is not among what came back with the certificate: set `roots_file`".to_owned(),
            ));
        };
        chain.push(certificate.clone());
        if names.subject == names.issuer {
            return Ok(chain);
        }
        last = names;
    }
    Err(ForgeError(format!("more than {LONGEST} authorities stand above what was signed")))
}

struct Names {
    subject: Vec<u8>,
    issuer: Vec<u8>,
    key: Option<KeyId>,
    issuer_key: Option<KeyId>,
}

impl Names {
    fn of(certificate: &CertificateDer<'_>) -> Result<Self, ForgeError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| ForgeError(format!("a certificate that came back cannot be read: {error}")))?;
        let find = |which: fn(&ParsedExtension<'_>) -> Option<KeyId>| {
            parsed.iter_extensions().find_map(|extension| which(extension.parsed_extension()))
        };
        Ok(Self {
            subject: parsed.subject().as_raw().to_vec(),
            issuer: parsed.issuer().as_raw().to_vec(),
            key: find(|extension| match extension {
                ParsedExtension::SubjectKeyIdentifier(id) => Some(KeyId::new(id.0)),
                _ => None,
            }),
            issuer_key: find(|extension| match extension {
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    id.key_identifier.as_ref().map(|id| KeyId::new(id.0))
                }
                _ => None,
            }),
        })
    }
}

#[cfg(test)]
mod tests;
