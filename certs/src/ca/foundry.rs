//! Roots and issuers of the record, made and opened: [`Forge`] with real keys, sealed before they are written anywhere.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;

use super::authority::{Authority, AuthorityError, Facts, Key, KeyKind, Rules, pem_certificates, pem_key};
use super::record::{Cross, Der, Issuer, IssuerState, Lifetimes, Moment, Record, Root, RootState, SealedKey};
use super::rotation::forge::{Forge, ForgeError, Request};
use super::seal::{SealError, Sealer};
use crate::identity::TrustDomain;
use crate::trust::{Fingerprint, Trust};

/// Makes and opens authorities with one sealing key.
pub struct Foundry {
    sealer: Arc<Sealer>,
    kind: KeyKind,
}

impl std::fmt::Debug for Foundry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Foundry").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl From<AuthorityError> for ForgeError {
    fn from(error: AuthorityError) -> Self {
        Self(error.to_string())
    }
}

impl From<SealError> for ForgeError {
    fn from(error: SealError) -> Self {
        Self(error.to_string())
    }
}

impl Foundry {
    /// Keys of that kind, sealed by that key.
    #[must_use]
    pub fn new(sealer: Arc<Sealer>, kind: KeyKind) -> Self {
        Self { sealer, kind }
    }

    /// The first record of an authority.
    ///
    /// # Errors
    /// Keys cannot be made or sealed.
    pub fn found(&self, trust_domain: &str, lifetimes: Lifetimes, now: Moment) -> Result<Record, ForgeError> {
        let request = |life| Request { trust_domain, now, life };
        let root = self.root(&request(lifetimes.root()), None)?;
        let issuer = self.issuer(&request(lifetimes.issuer()), &root)?;
        self.prove(&request(lifetimes.leaf()), &issuer, &[&root])?;
        Ok(Record::new(trust_domain, lifetimes, root, issuer, now))
    }

    /// The first record, with a root from elsewhere: PEM of a root and its key, or of an issuer below it, its key and the
    /// root's certificate, where the root's key stays away.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn found_with(
        &self,
        trust_domain: &str,
        lifetimes: Lifetimes,
        pem: &str,
        now: Moment,
    ) -> Result<Record, ForgeError> {
        let request = |life| Request { trust_domain, now, life };
        let (root, issuer) = self.import(&request(lifetimes.root()), pem)?;
        let issuer = match issuer {
            Some(issuer) => issuer,
            None => self.issuer(&request(lifetimes.issuer()), &root)?,
        };
        self.prove(&request(lifetimes.leaf()), &issuer, &[&root])?;
        Ok(Record::new(trust_domain, lifetimes, root, issuer, now))
    }

    /// The issuer, ready to sign.
    ///
    /// # Errors
    /// Its key is gone, or sealed by another key.
    pub fn open(&self, record: &Record, issuer: &Issuer) -> Result<Authority, ForgeError> {
        let mut chain: Vec<_> =
            record.intermediates(issuer).into_iter().map(|der| CertificateDer::from(der.0)).collect();
        let cross = chain.split_off(chain.len().min(1 + issuer.above.len()));
        let key = self.key(&format!("issuer {}", issuer.id), issuer.key.as_ref())?;
        let authority = Authority::load(chain, cross, key)?;
        Ok(match record.root(&issuer.root) {
            Some(root) => authority.ending_with(root.not_after.into()),
            None => authority,
        })
    }

    /// What keys are sealed with.
    pub(super) fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    /// Of which kind new keys are.
    pub(super) fn kind(&self) -> KeyKind {
        self.kind
    }

    /// A root that is known by its certificate alone: `kept` says who has the key.
    ///
    /// # Errors
    /// It is none.
    pub(super) fn root_elsewhere(
        certificate: &CertificateDer<'_>,
        kept: &str,
        now: Moment,
    ) -> Result<Root, ForgeError> {
        let facts = Facts::read(certificate).map_err(ForgeError)?;
        if !(facts.self_signed && facts.is_ca) {
            return Err(ForgeError(format!("{} is no root: a root signs itself and is a CA", facts.subject)));
        }
        Ok(kept_root(certificate, &facts, kept, now))
    }

    /// An issuer that was signed elsewhere, and its root. `chain` begins with it and ends with the root; the key has to be
    /// its own.
    ///
    /// # Errors
    /// It is not what was asked for, or its certificates would not be believed.
    pub(super) fn accept(
        &self,
        request: &Request<'_>,
        key: Key,
        chain: &[CertificateDer<'static>],
        kept: &str,
        unlimited: bool,
    ) -> Result<(Root, Issuer), ForgeError> {
        let Some((top, below)) = chain.split_last() else {
            return Err(ForgeError("no certificate came back".to_owned()));
        };
        let root = Self::root_elsewhere(top, kept, request.now)?;
        let made = Authority::load(below.to_vec(), Vec::new(), key)?.ending_with(root.not_after.into());
        if !unlimited && made.facts().path_length != Some(0) {
            return Err(ForgeError("it was asked for with path length 0 and has another".to_owned()));
        }
        let issuer = self.issuer_of(&made, &root, request.now)?;
        self.prove(request, &issuer, &[&root])?;
        Ok((root, issuer))
    }

    fn key(&self, purpose: &str, sealed: Option<&SealedKey>) -> Result<Key, ForgeError> {
        let sealed = sealed.ok_or_else(|| ForgeError(format!("the key of {purpose} is not here")))?;
        let der = self.sealer.open(purpose, &sealed.0)?;
        let der = rustls::pki_types::PrivateKeyDer::try_from(der.as_slice())
            .map_err(|error| ForgeError(format!("the key of {purpose} cannot be read: {error}")))?;
        Ok(Key::load(&der)?)
    }

    fn seal(&self, purpose: &str, key: &Key) -> Result<SealedKey, ForgeError> {
        Ok(SealedKey(self.sealer.seal(purpose, &key.der())?))
    }

    fn root_authority(&self, root: &Root) -> Result<Authority, ForgeError> {
        let key = self.key(&format!("root {}", root.id), root.key.as_ref())?;
        Ok(Authority::load(vec![CertificateDer::from(root.certificate.0.clone())], Vec::new(), key)?)
    }

    fn record_root(&self, authority: &Authority, now: Moment) -> Result<Root, ForgeError> {
        let id = Fingerprint::of(authority.certificate()).to_string();
        let facts = authority.facts();
        Ok(Root {
            state: RootState::Staged,
            certificate: Der(authority.certificate().to_vec()),
            spki: facts.key_hash.to_string(),
            not_before: facts.not_before.into(),
            not_after: facts.not_after.into(),
            key: Some(self.seal(&format!("root {id}"), authority.key())?),
            kept: String::new(),
            made_at: now,
            changed_at: now,
            note: String::new(),
            id: id.as_str().into(),
        })
    }

    fn issuer_of(&self, authority: &Authority, root: &Root, now: Moment) -> Result<Issuer, ForgeError> {
        let id = authority.id().to_string();
        let facts = authority.facts();
        Ok(Issuer {
            state: IssuerState::Staged,
            root: root.id.clone(),
            certificate: Der(authority.certificate().to_vec()),
            above: authority.above().iter().map(|above| Der(above.to_vec())).collect(),
            cross: None,
            not_before: facts.not_before.into(),
            // What is signed by it ends with the first that ends above it.
            not_after: Moment::from(authority.ends()).min(root.not_after),
            key: Some(self.seal(&format!("issuer {id}"), authority.key())?),
            made_at: now,
            changed_at: now,
            id: id.as_str().into(),
        })
    }
}

/// A root whose key somebody else has.
fn kept_root(certificate: &CertificateDer<'_>, facts: &Facts, kept: &str, now: Moment) -> Root {
    Root {
        id: Fingerprint::of(certificate).to_string().as_str().into(),
        state: RootState::Staged,
        certificate: Der(certificate.to_vec()),
        spki: facts.key_hash.to_string(),
        not_before: facts.not_before.into(),
        not_after: facts.not_after.into(),
        key: None,
        kept: kept.to_owned(),
        made_at: now,
        changed_at: now,
        note: String::new(),
    }
}

fn domain(request: &Request<'_>) -> Result<TrustDomain, ForgeError> {
    request.trust_domain.parse().map_err(|error| ForgeError(format!("{error}")))
}

impl Forge for Foundry {
    fn root(&self, request: &Request<'_>, same_key: Option<&Root>) -> Result<Root, ForgeError> {
        let key = match same_key {
            Some(root) => self.key(&format!("root {}", root.id), root.key.as_ref())?,
            None => Key::generate(self.kind)?,
        };
        let made = Authority::root_of(&domain(request)?, key, request.life, request.now.into())?;
        self.record_root(&made, request.now)
    }

    fn import(&self, request: &Request<'_>, pem: &str) -> Result<(Root, Option<Issuer>), ForgeError> {
        let certificates = pem_certificates(pem.as_bytes())?;
        let key = Key::load(&pem_key(pem.as_bytes())?)?;
        let authority = Authority::load(certificates.clone(), Vec::new(), key)?;
        let facts = authority.facts();
        if facts.self_signed && facts.is_ca && facts.signs_certificates {
            return Ok((self.record_root(&authority, request.now)?, None));
        }
        let top = certificates.last().filter(|_| !facts.self_signed && facts.is_ca);
        let Some(top) = top else {
            return Err(ForgeError(format!(
                "{} is no root: a root signs itself and may sign authorities (CA, keyCertSign)",
                facts.subject
            )));
        };
        let above = Facts::read(top).map_err(ForgeError)?;
        if !above.self_signed {
            return Err(ForgeError("the root's certificate is not among them: put it last".to_owned()));
        }
        let root = Self::root_elsewhere(top, "elsewhere", request.now)?;
        let issuer = self.issuer_of(&authority.ending_with(root.not_after.into()), &root, request.now)?;
        Ok((root, Some(issuer)))
    }

    fn issuer(&self, request: &Request<'_>, root: &Root) -> Result<Issuer, ForgeError> {
        let above = self.root_authority(root)?;
        let made = above.intermediate(&domain(request)?, self.kind, request.life, request.now.into())?;
        self.issuer_of(&made, root, request.now)
    }

    fn cross(&self, request: &Request<'_>, root: &Root, by: &Root) -> Result<Cross, ForgeError> {
        let signer = self.root_authority(by)?;
        let signed =
            signer.cross_sign(&CertificateDer::from(root.certificate.0.clone()), request.now.into())?;
        let facts = Facts::read(&signed).map_err(ForgeError)?;
        Ok(Cross {
            root: by.id.clone(),
            certificate: Der(signed.to_vec()),
            not_after: facts.not_after.into(),
        })
    }

    fn prove(&self, request: &Request<'_>, issuer: &Issuer, roots: &[&Root]) -> Result<(), ForgeError> {
        let domain = domain(request)?;
        let key = self.key(&format!("issuer {}", issuer.id), issuer.key.as_ref())?;
        let chain = std::iter::once(&issuer.certificate).chain(&issuer.above);
        let chain = chain.map(|one| CertificateDer::from(one.0.clone())).collect();
        let cross = issuer.cross.iter().map(|cross| CertificateDer::from(cross.certificate.0.clone()));
        let authority = Authority::load(chain, cross.collect(), key)?;
        // Who signs elsewhere may be unable to limit the length of paths; nothing but leaves is signed here.
        let unlimited = roots.iter().any(|root| !root.kept.is_empty());
        let rules = Rules { longest_leaf: Duration::ZERO, distrusted: Vec::new(), unlimited };
        for root in roots {
            let certificate = CertificateDer::from(root.certificate.0.clone());
            let trust = Trust::new(domain.clone(), 1)
                .with_roots(&domain, [certificate])
                .map_err(|error| ForgeError(error.to_string()))?;
            if let Some(finding) = authority.lint(&trust, &rules, request.now.into()).first() {
                return Err(ForgeError(format!("the new issuer cannot be used: {finding}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::rotation::forge::{Wanted, make};
    use super::*;

    fn foundry() -> Foundry {
        Foundry::new(Arc::new(Sealer::random().unwrap()), KeyKind::P256)
    }

    #[test]
    fn an_authority_is_founded_and_rotated_with_real_keys() {
        let foundry = foundry();
        let now = Moment::from_secs(1_795_000_000);
        let record = foundry.found("mesh.local", Lifetimes::default(), now).unwrap();
        let record = Record::decode(&record.encode().unwrap()).unwrap();
        let signing = record.signing().unwrap();
        assert_eq!(foundry.open(&record, signing).unwrap().id().to_string(), signing.id.0);
        let wanted = Wanted::Root { same_key: false, import: None, cross: true };
        let made = make(&foundry, &record, &wanted, now).unwrap();
        assert_eq!(made.no_cross, "");
        assert!(made.back.is_some() && made.issuer.unwrap().cross.is_some());
    }

    #[test]
    fn a_root_from_elsewhere_is_taken_with_its_key_and_nothing_else_is() {
        let foundry = foundry();
        let now = Moment::from_secs(1_795_000_000);
        let domain: TrustDomain = "mesh.local".parse().unwrap();
        let life = Duration::from_secs(10 * 365 * 86_400);
        let root = Authority::root(&domain, KeyKind::P384, life, now.into()).unwrap();
        let issuer = root.intermediate(&domain, KeyKind::P256, life / 2, now.into()).unwrap();
        let text = |authorities: &[&Authority], key: &Authority| {
            let certificates: Vec<Der> =
                authorities.iter().map(|one| Der(one.certificate().to_vec())).collect();
            let key = super::super::rotation::driver::pem(&[Der(key.key().der().to_vec())])
                .replace("CERTIFICATE", "PRIVATE KEY");
            super::super::rotation::driver::pem(&certificates) + &key
        };
        let lifetimes = Lifetimes::default;
        let whole = foundry.found_with("mesh.local", lifetimes(), &text(&[&root], &root), now).unwrap();
        assert!(whole.current_root().unwrap().key.is_some());
        let offline =
            foundry.found_with("mesh.local", lifetimes(), &text(&[&issuer, &root], &issuer), now).unwrap();
        assert!(offline.current_root().unwrap().key.is_none());
        for (text, words) in [
            (text(&[&issuer], &issuer), "put it last"),
            (text(&[&root], &issuer), "does not belong"),
            (String::new(), "no PEM block"),
        ] {
            let error = foundry.found_with("mesh.local", lifetimes(), &text, now).unwrap_err();
            assert!(error.0.contains(words), "{error}");
        }
        // Without the key of its root there is no new issuer, and the reason says so.
        let error = make(&foundry, &offline, &Wanted::Issuer, now).unwrap_err();
        assert!(error.0.contains("is not here"), "{error}");
    }
}
