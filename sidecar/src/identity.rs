//! Where the sidecar's certificate and trust come from, as far as they are files: PEM, looked at every second.
//!
//! Files are compared by what is in them, because mounted ones are swapped as whole directories. What is wrong with new
//! files is told, and what was in force stays.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use certs::identity::{SpiffeId, TrustDomain};
use certs::mesh::MeshIdentity;
use certs::svid::Svid;
use certs::trust::Trust;
use config::sidecar::CaFiles;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::sync::Notify;

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What is known of the identity, for those who ask.
#[derive(Clone, Default)]
pub struct IdentityStatus(Arc<Mutex<Option<String>>>);

impl IdentityStatus {
    /// What is wrong with it.
    pub fn problem(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, problem: Option<String>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == problem {
            return;
        }
        match &problem {
            Some(problem) => {
                tracing::error!(problem, "the identity cannot be taken over; what was there stays")
            }
            None => tracing::info!("certificate and trust are taken over"),
        }
        *known = problem;
    }
}

/// Certificate and trust in files.
pub struct Files {
    /// The files.
    pub files: CaFiles,
    /// The trust domain.
    pub domain: TrustDomain,
    /// Who the certificate has to be for, if that is known.
    pub own: Option<SpiffeId>,
}

#[derive(Clone, PartialEq, Eq, Default)]
struct Content {
    cert: Vec<u8>,
    key: Vec<u8>,
    trust: Vec<u8>,
    crl: Option<Vec<u8>>,
}

impl Drop for Content {
    fn drop(&mut self) {
        use zeroize::Zeroize;
        self.key.zeroize();
    }
}

impl Files {
    /// Keeps `identity` as the files are, for ever.
    /// `renew` asks for a look at once.
    pub async fn follow(self, identity: MeshIdentity, status: IdentityStatus, renew: Arc<Notify>) {
        let files = Arc::new(self);
        let mut before = Content::default();
        let mut generation = 0;
        loop {
            let reader = files.clone();
            let read = tokio::task::spawn_blocking(move || reader.read()).await;
            match read {
                Ok(Ok(content)) if content != before => {
                    generation += 1;
                    status.set(files.install(&content, generation, &identity).err());
                    before = content;
                }
                Ok(Ok(_)) => {}
                Ok(Err(problem)) => status.set(Some(problem)),
                Err(error) => status.set(Some(error.to_string())),
            }
            // Nobody is asked more often than this, however many peers refuse us.
            tokio::time::sleep(LOOK / 10).await;
            let _ = tokio::time::timeout(LOOK, renew.notified()).await;
        }
    }

    fn read(&self) -> Result<Content, String> {
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))
        };
        Ok(Content {
            cert: read(&self.files.cert)?,
            key: read(&self.files.key)?,
            trust: read(&self.files.trust)?,
            crl: self.files.crl.as_deref().map(read).transpose()?,
        })
    }

    fn install(&self, content: &Content, generation: u64, identity: &MeshIdentity) -> Result<(), String> {
        let CaFiles { cert, key, trust, crl } = &self.files;
        let of = |path: &std::path::Path, problem: String| format!("{}: {problem}", path.display());
        let roots = certificates(&content.trust).map_err(|problem| of(trust, problem))?;
        let mut bundle = Trust::new(self.domain.clone(), generation)
            .with_roots(&self.domain, roots)
            .map_err(|error| of(trust, error.to_string()))?;
        if let (Some(path), Some(bytes)) = (crl, &content.crl) {
            let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
            let lists = lists.map_err(|error| of(path, error.to_string()))?;
            bundle = bundle.with_crls(&lists).map_err(|error| of(path, error.to_string()))?;
        }
        identity.set_trust(bundle).map_err(|error| of(trust, error.to_string()))?;
        let chain = certificates(&content.cert).map_err(|problem| of(cert, problem))?;
        let private = PrivateKeyDer::from_pem_slice(&content.key)
            .map_err(|_| of(key, "found no private key in PEM".to_owned()))?;
        let svid = Svid::new(chain, &private).map_err(|error| of(cert, error.to_string()))?;
        if let Some(own) = self.own.as_ref().filter(|own| *own != svid.id()) {
            return Err(of(cert, format!("it is for {}, and `workload.identity` says {own}", svid.id())));
        }
        identity.install(svid).map_err(|error| of(cert, error.to_string()))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err("found no certificate in PEM".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Why the sidecar has no identity yet; none if it has one that is good now.
pub fn missing(identity: &MeshIdentity, status: &IdentityStatus) -> Option<String> {
    let problem = || status.problem().map(|problem| format!(": {problem}")).unwrap_or_default();
    if identity.trust().is_none() {
        return Some(format!("no trust bundle yet{}", problem()));
    }
    match identity.svid() {
        None => Some(format!("no certificate yet{}", problem())),
        Some(svid) if svid.left(identity.now()).is_zero() => {
            Some(format!("the certificate has expired{}", problem()))
        }
        Some(_) => None,
    }
}

/// For the admin interface.
pub fn told(identity: &MeshIdentity, status: &IdentityStatus) -> Value {
    let seconds =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let svid = identity.svid().map(|svid| {
        json!({
            "id": svid.id().as_str(),
            "serial": svid.leaf().serial.to_string(),
            "not_before": seconds(svid.leaf().not_before),
            "not_after": seconds(svid.leaf().not_after),
            "issuer": svid.leaf().issuer.to_string(),
        })
    });
    let trust = identity.trust().map(|trust| {
        let own = trust.own().as_str().to_owned();
        let roots: Vec<_> = trust.roots(&own).map(|root| root.fingerprint.to_string()).collect();
        json!({"domain": own, "generation": trust.generation(), "roots": roots})
    });
    json!({"svid": svid, "trust": trust, "problem": status.problem()})
}
