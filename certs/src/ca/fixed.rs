//! An authority that stays as it is: a root and an issuer in a directory, made once, and a bundle that only this process
//! changes. For a start without a record, and for tests.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::PrivateKeyDer;
use tokio::sync::watch;

use super::authority::{Authority, AuthorityError, Key, KeyKind, pem, pem_certificates};
use super::seal::{SealError, Sealer, write_secret};
use super::{Ack, Acks, Bundle, BundleRoot, Current, RootState};
use crate::identity::{SpiffeId, TrustDomain};
use crate::trust::{KeyId, Revoked, TrustError};

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
const ISSUER_LIFE: Duration = Duration::from_secs(365 * 86_400);

/// The directory does not hold an authority, and none can be made.
#[derive(Debug, thiserror::Error)]
pub enum FixedError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error("{}: {}", .0.display(), .1)]
    File(std::path::PathBuf, std::io::Error),
    #[error("`{0}` is not a certificate or a key of this authority")]
    Content(&'static str),
}

/// The key in a sealed file, or a new one.
///
/// # Errors
/// It cannot be opened or made.
pub fn sealed_key(dir: &Path, name: &'static str, sealer: &Sealer) -> Result<Key, FixedError> {
    let path = dir.join(name);
    let wrong = |error| FixedError::File(path.clone(), error);
    match fs::read_to_string(&path) {
        Ok(sealed) => load(&sealed, name, sealer),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let key = Key::generate(KeyKind::P256)?;
            write_secret(&path, sealer.seal(name, &key.der())?.as_bytes()).map_err(wrong)?;
            Ok(key)
        }
        Err(error) => Err(wrong(error)),
    }
}

fn load(sealed: &str, name: &'static str, sealer: &Sealer) -> Result<Key, FixedError> {
    let opened = sealer.open(name, sealed)?;
    let der = PrivateKeyDer::try_from(opened.as_slice()).map_err(|_| FixedError::Content(name))?;
    Ok(Key::load(&der)?)
}

/// A root and an issuer below it: those in the directory, or new ones.
///
/// # Errors
/// They cannot be opened or made.
pub fn authorities(
    dir: &Path,
    domain: &TrustDomain,
    sealer: &Sealer,
    now: SystemTime,
) -> Result<(Authority, Authority), FixedError> {
    let read = |name: &'static str, file: &'static str| -> Result<Option<Authority>, FixedError> {
        let path = dir.join(file);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FixedError::File(path, error)),
        };
        let sealed = dir.join(name);
        let key = fs::read_to_string(&sealed).map_err(|error| FixedError::File(sealed, error))?;
        let chain = pem_certificates(&text)?;
        Ok(Some(Authority::load(chain, Vec::new(), load(&key, name, sealer)?)?))
    };
    let write = |authority: &Authority, name: &'static str, file: &'static str| {
        let wrong = |file: &str, error| FixedError::File(dir.join(file), error);
        let sealed = sealer.seal(name, &authority.key().der())?;
        // A key without its certificate is from a start that was cut off.
        let _ = fs::remove_file(dir.join(name));
        write_secret(&dir.join(name), sealed.as_bytes()).map_err(|error| wrong(name, error))?;
        let beside = dir.join(file).with_extension("new");
        fs::write(&beside, pem(authority.certificate())).map_err(|error| wrong(file, error))?;
        fs::rename(&beside, dir.join(file)).map_err(|error| wrong(file, error))
    };
    let root = match read("root.key", "root.pem")? {
        Some(root) => root,
        None => {
            let root = Authority::root(domain, KeyKind::P256, ROOT_LIFE, now)?;
            write(&root, "root.key", "root.pem")?;
            root
        }
    };
    let issuer = match read("issuer.key", "issuer.pem")? {
        Some(issuer) if issuer.ends() > now + ISSUER_LIFE / 2 => issuer,
        _ => {
            let issuer = root.intermediate(domain, KeyKind::P256, ISSUER_LIFE, now)?;
            write(&issuer, "issuer.key", "issuer.pem")?;
            issuer
        }
    };
    let ends = root.ends();
    Ok((root, issuer.ending_with(ends)))
}

/// A bundle of these roots, the first one active.
pub fn bundle<'a>(
    domain: &TrustDomain,
    generation: u64,
    roots: impl IntoIterator<Item = &'a Authority>,
    now: SystemTime,
) -> Bundle {
    let roots = roots.into_iter().enumerate().map(|(index, root)| BundleRoot {
        certificate: root.certificate().clone(),
        state: if index == 0 { RootState::Active } else { RootState::Retiring },
    });
    Bundle {
        trust_domain: domain.clone(),
        generation,
        least_generation: 0,
        least_connection_generation: 0,
        roots: roots.collect(),
        revoked: Revoked::default(),
        made: now,
    }
}

/// An authority with this root and issuer and nothing else.
///
/// # Errors
/// The root cannot be one.
pub fn publish(
    domain: &TrustDomain,
    root: &Authority,
    issuer: Authority,
    now: SystemTime,
) -> Result<watch::Sender<Arc<Current>>, TrustError> {
    let current = Current::new(bundle(domain, 1, [root], now))?.with_issuer(Arc::new(issuer));
    Ok(watch::Sender::new(Arc::new(current)))
}

/// Hears what workloads use and forgets it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deaf;

impl Acks for Deaf {
    fn heard(&self, _: Ack) {}

    fn gone(&self, _: &SpiffeId, _: &str) {}

    fn signed(&self, _: &SpiffeId, _: &str, _: &KeyId, _: SystemTime) {}
}
