//! The certificate of the door for clients of Istio, who know an authority by its DNS name and the roots of the mesh.
//!
//! It comes from files, or the authority makes it for itself: by the issuer in force, for a day, and anew when half of it is
//! over or another issuer signs. What cannot be read or made leaves the one before in use.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rcgen::PublicKeyData as _;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::ca::audit::Entry;
use crate::ca::authority::{Authority, Key, KeyKind, Request};
use crate::ca::csr::PublicKey;
use crate::ca::service::Service;
use crate::ca::{Current, channel};
use crate::files;
use crate::identity::SpiffeId;
use crate::svid::Svid;

/// How often files and times are looked at.
const LOOK: Duration = Duration::from_secs(30);
/// What the authority is called below the trust domain.
const NAME: &str = "postern/ca";

/// Where the certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// PEM that somebody else replaces.
    Files { certificate: PathBuf, key: PathBuf },
    /// Made by the authority for these DNS names.
    Names(Vec<String>),
}

#[derive(Debug, Default)]
struct Shown(ArcSwapOption<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// A certificate that the authority made.
struct Made {
    by: Arc<Authority>,
    renew_at: SystemTime,
}

/// Keeps the certificate.
pub struct Door {
    origin: Origin,
    service: Service,
    current: watch::Receiver<Arc<Current>>,
    shown: Arc<Shown>,
    made: Option<Made>,
    problem: Option<String>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl Door {
    /// Reads or makes the first certificate.
    ///
    /// # Errors
    /// The files cannot be used, or a name is none. An authority that cannot sign now makes one later.
    pub async fn open(origin: Origin, service: Service) -> Result<Self, String> {
        let current = service.follow();
        let mut door = Self { origin, service, current, shown: Arc::default(), made: None, problem: None };
        match door.look().await {
            Err(problem)
                if door.service.current().issuer.is_some() || matches!(door.origin, Origin::Files { .. }) =>
            {
                Err(problem)
            }
            looked => {
                door.tell(looked);
                Ok(door)
            }
        }
    }

    /// The side of the server; clients may show a certificate.
    ///
    /// # Errors
    /// The library fails.
    pub fn config(&self) -> Result<Arc<ServerConfig>, String> {
        channel::door(self.shown.clone()).map_err(|error| error.to_string())
    }

    /// Keeps it until it is dropped.
    pub async fn keep(mut self) {
        loop {
            tokio::select! {
                changed = self.current.changed() => if changed.is_err() {
                    return;
                },
                () = self.service.clock().pause(LOOK) => {}
            }
            let looked = self.look().await;
            self.tell(looked);
        }
    }

    /// A problem is told when it begins, and when it is over.
    fn tell(&mut self, looked: Result<(), String>) {
        let problem = looked.err();
        match (&self.problem, &problem) {
            (before, Some(problem)) if before.as_ref() != Some(problem) => {
                warn!(problem, "the certificate of the door for clients of Istio is not renewed");
            }
            (Some(_), None) => info!("the certificate of the door for clients of Istio is well again"),
            _ => {}
        }
        self.problem = problem;
    }

    async fn look(&mut self) -> Result<(), String> {
        match &self.origin {
            Origin::Files { certificate, key } => {
                let (certificate, key) = (certificate.clone(), key.clone());
                let read = tokio::task::spawn_blocking(move || read(&certificate, &key)).await;
                self.shown.0.store(Some(Arc::new(read.map_err(|error| error.to_string())??)));
                Ok(())
            }
            Origin::Names(names) => {
                let (now, current) = (self.service.now(), self.service.current());
                let issuer = current.issuer.clone().ok_or("there is no issuer that can sign")?;
                let good = |made: &Made| Arc::ptr_eq(&made.by, &issuer) && now < made.renew_at;
                if !self.made.as_ref().is_some_and(good) {
                    let svid = make(&self.service, &current, &issuer, names, now)?;
                    let renew_at = now + svid.left(now) / 2;
                    self.shown.0.store(Some(Arc::clone(svid.certified_key())));
                    self.made = Some(Made { by: issuer, renew_at });
                }
                Ok(())
            }
        }
    }
}

fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, String> {
    let chain = files::certificates(certificate).map_err(|error| error.to_string())?;
    let signing = files::private_key(key).map_err(|error| error.to_string())?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain, signing, &provider).map_err(|error| {
        format!("{} and {} are not a certificate and its key: {error}", certificate.display(), key.display())
    })
}

fn make(
    service: &Service,
    current: &Current,
    issuer: &Authority,
    names: &[String],
    now: SystemTime,
) -> Result<Svid, String> {
    let domain = &current.bundle().trust_domain;
    let identity = SpiffeId::new(domain, &format!("/{NAME}")).map_err(|error| error.to_string())?;
    let key = Key::generate(KeyKind::P256).map_err(|error| error.to_string())?;
    let public = PublicKey::from_spki(&key.subject_public_key_info()).map_err(|error| error.to_string())?;
    let request = Request {
        key: &public,
        identity: &identity,
        dns_names: names,
        ttl: Duration::ZERO,
        not_before: None,
        mark: None,
    };
    let issued = issuer.leaf(&request, &current.lifetimes, now).map_err(|error| error.to_string())?;
    let entry = Entry::allowed("sign", identity.as_str())
        .with("attestor", "authority")
        .with("serial", issued.serial.to_string())
        .with("issuer", issued.issuer.to_string());
    service.write(&entry).map_err(|status| status.message().to_owned())?;
    Svid::new(issued.chain, &key.private_key()).map_err(|error| error.to_string())
}
