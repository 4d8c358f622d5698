//! PEM files named in the process settings: certificates, a private key, trusted roots. Read once at
//! start on the control side; every error names the file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A PEM file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read {}: {error}", .path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{} is not valid PEM: {reason}", .path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("{} holds no PEM block of a certificate", .path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} holds no PEM block of a private key", .path.display())]
    NoKey { path: PathBuf },
    #[error("{} holds a certificate that cannot be trusted: {reason}", .path.display())]
    Untrusted { path: PathBuf, reason: String },
    #[error("the system has no trusted certificates: {reason}")]
    NoSystemRoots { reason: String },
}

/// All certificates of a PEM file, at least one.
///
/// # Errors
/// The file cannot be read, is not PEM, or holds no certificate.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let bytes = read(path)?;
    let found = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| FileError::Pem { path: path.into(), reason: error.to_string() })?;
    if found.is_empty() {
        return Err(FileError::NoCertificate { path: path.into() });
    }
    Ok(found)
}

/// The first private key of a PEM file.
///
/// # Errors
/// The file cannot be read, is not PEM, or holds no private key.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    match PrivateKeyDer::from_pem_slice(&read(path)?) {
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) => Err(FileError::NoKey { path: path.into() }),
        Err(error) => Err(FileError::Pem { path: path.into(), reason: error.to_string() }),
    }
}

/// Trusted roots from a PEM file, or the system's own for the word `system` (APISIX's
/// `ssl_trusted_certificate`).
///
/// # Errors
/// The file cannot be read or one of its certificates is no usable trust anchor; the system has none.
pub fn trusted_roots(path: &Path) -> Result<Arc<RootCertStore>, FileError> {
    if path.as_os_str() == "system" {
        return system_roots();
    }
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| FileError::Untrusted { path: path.into(), reason: error.to_string() })?;
    }
    Ok(Arc::new(roots))
}

/// The roots the operating system trusts; those that do not parse are left out.
///
/// # Errors
/// None could be loaded.
pub fn system_roots() -> Result<Arc<RootCertStore>, FileError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
        return Err(FileError::NoSystemRoots { reason });
    }
    Ok(Arc::new(roots))
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|error| FileError::Read { path: path.into(), error })
}
