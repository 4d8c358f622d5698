//! Takes the identity of this process from PEM files that somebody else replaces: a certificate, its key, the roots, and
//! revocation lists.
//!
//! They are read every second and compared by content, so it does not matter whether they are written in place, renamed or
//! swapped by a link. What does not fit together yet is looked at again; what is in force stays until something better is
//! there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use zeroize::{Zeroize, Zeroizing};

use crate::ca::authority::{pem_certificates, pem_key};
use crate::identity::TrustDomain;
use crate::mesh::{InstallError, MeshIdentity};
use crate::source::{Hopeless, Intake, IntakeError, Roots, Source, Told};
use crate::svid::Svid;

const PERIOD: Duration = Duration::from_secs(1);
/// More than a bundle with some thousand roots has.
const LARGEST: u64 = 4 << 20;

/// Where the files are.
#[derive(Clone, Debug)]
pub struct IdentityFiles {
    /// Of the roots.
    pub domain: TrustDomain,
    /// The certificate, and those between it and a root.
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub roots: PathBuf,
    /// Revocation lists.
    pub crl: Option<PathBuf>,
}

#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    roots: Vec<u8>,
    crl: Option<Vec<u8>>,
}

impl Source for IdentityFiles {
    fn name(&self) -> String {
        format!("files {}", self.certificate.display())
    }

    fn follow(self: Box<Self>, identity: MeshIdentity, told: Told) -> BoxFuture<'static, Hopeless> {
        Box::pin(async move {
            let mut intake = Intake::new(identity, told);
            let mut taken: Option<Contents> = None;
            loop {
                match self.read().await {
                    Ok(contents) if taken.as_ref() == Some(&contents) => intake.told().well(),
                    Ok(contents) => match self.take(&contents, &mut intake) {
                        Ok(()) => {
                            intake.told().well();
                            taken = Some(contents);
                        }
                        // Looked at again, for the other half of a change may be on its way.
                        Err(problem) => intake.told().problem(&problem),
                    },
                    Err(problem) => intake.told().problem(&problem),
                }
                tokio::time::sleep(PERIOD).await;
            }
        })
    }
}

impl IdentityFiles {
    async fn read(&self) -> Result<Contents, String> {
        Ok(Contents {
            certificate: read(&self.certificate).await?,
            key: Zeroizing::new(read(&self.key).await?),
            roots: read(&self.roots).await?,
            crl: match &self.crl {
                Some(path) => Some(read(path).await?),
                None => None,
            },
        })
    }

    fn take(&self, contents: &Contents, intake: &mut Intake) -> Result<(), String> {
        let of = |path: &Path, problem: &dyn std::fmt::Display| format!("{}: {problem}", path.display());
        let roots = pem_certificates(&contents.roots).map_err(|error| of(&self.roots, &error))?;
        let mut roots = Roots::of(self.domain.clone(), roots);
        if let Some((path, pem)) = self.crl.as_ref().zip(contents.crl.as_ref()) {
            let lists: Result<_, _> = CertificateRevocationListDer::pem_slice_iter(pem).collect();
            roots.crls = lists.map_err(|error| of(path, &error))?;
        }
        let svid = self.svid(contents);
        // New roots count whatever became of the certificate.
        let (svid, problem) = match svid {
            Ok(svid) => (Some(svid), None),
            Err(problem) => (None, Some(problem)),
        };
        let taken = intake.take(Some(&roots), svid).map_err(|error| {
            let is_about_roots = matches!(
                error,
                IntakeError::Domain { .. }
                    | IntakeError::Install(InstallError::Trust(_) | InstallError::Domain { .. })
            );
            of(if is_about_roots { &self.roots } else { &self.certificate }, &error)
        });
        problem.map_or(taken.map(drop), Err)
    }

    fn svid(&self, contents: &Contents) -> Result<Svid, String> {
        let of = |path: &Path, problem: &dyn std::fmt::Display| format!("{}: {problem}", path.display());
        let chain = pem_certificates(&contents.certificate).map_err(|error| of(&self.certificate, &error))?;
        let mut key = pem_key(&contents.key).map_err(|error| of(&self.key, &error))?;
        let svid = Svid::new(chain, &key);
        key.zeroize();
        svid.map_err(|error| of(&self.certificate, &error))
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    let reading = async {
        let length = tokio::fs::metadata(path).await?.len();
        if length > LARGEST {
            return Ok(Err(format!("{}: {length} bytes are too many for PEM", path.display())));
        }
        Ok(Ok(tokio::fs::read(path).await?))
    };
    reading.await.unwrap_or_else(|error: std::io::Error| Err(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rcgen::PublicKeyData;

    use super::*;
    use crate::ca::authority::{Key, KeyKind, pem};
    use crate::ca::csr::PublicKey;
    use crate::source::{Following, Standing};
    use crate::testing::{Ca, DAY, PATIENCE};
    use crate::trust::Serial;

    fn pem_of_key(der: &[u8]) -> String {
        let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, der);
        format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
    }

    #[tokio::test]
    async fn files_are_followed_by_what_is_in_them() {
        let ca = Ca::new("mesh.local");
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let point = |version: &str| {
            // As Kubernetes mounts a secret: one link is exchanged.
            let link = dir.path().join("new");
            std::os::unix::fs::symlink(dir.path().join(version), &link).unwrap();
            std::fs::rename(&link, &data).unwrap();
        };
        let write = |version: &str, name: &str, swapped: bool| {
            let folder = dir.path().join(version);
            std::fs::create_dir(&folder).unwrap();
            let key = Key::generate(KeyKind::P256).unwrap();
            let public = PublicKey::from_spki(&key.subject_public_key_info()).unwrap();
            let issued = ca.sign(&public, &ca.id(name), DAY);
            let chain: String = issued.chain.iter().map(pem).collect();
            std::fs::write(folder.join("cert.pem"), chain).unwrap();
            std::fs::write(folder.join("roots.pem"), pem(&ca.root_der())).unwrap();
            let key = if swapped { Key::generate(KeyKind::P256).unwrap() } else { key };
            let der = key.der();
            std::fs::write(folder.join("key.pem"), pem_of_key(&der)).unwrap();
            point(version);
            issued.serial
        };
        let first = write("1", "orders", false);
        let files = IdentityFiles {
            domain: ca.domain.clone(),
            certificate: data.join("cert.pem"),
            key: data.join("key.pem"),
            roots: data.join("roots.pem"),
            crl: None,
        };
        let identity = MeshIdentity::new();
        let following = Following::start(Box::new(files), identity.clone());
        let shows = |serial: &Serial| identity.svid().is_some_and(|svid| svid.leaf().serial == *serial);
        let mut changes = identity.changes();
        let mut until_shown = async |serial: &Serial| {
            let shown = async {
                while !shows(serial) {
                    changes.changed().await.unwrap();
                }
            };
            tokio::time::timeout(PATIENCE, shown).await.unwrap();
        };
        let mut standing = following.standing();
        let mut until = async |is: fn(&Standing) -> bool| {
            let waiting = standing.wait_for(is);
            tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap().clone()
        };
        until_shown(&first).await;
        let second = write("2", "orders", false);
        until_shown(&second).await;
        for (version, name, swapped, told) in
            [("3", "orders", true, "key"), ("4", "somebody-else", false, "somebody-else")]
        {
            write(version, name, swapped);
            let problem = until(|standing| standing.problem.is_some()).await.problem.unwrap();
            assert!(problem.contains("cert.pem: ") && problem.contains(told), "{problem}");
            assert!(shows(&second), "what is in use stays");
            point("2");
            until(|standing| standing.problem.is_none()).await;
        }
        let last = write("5", "orders", false);
        until_shown(&last).await;
        assert_eq!(identity.trust().unwrap().generation(), 1, "the roots have not changed");
    }
}
