//! Where an etcd is and how it is spoken to, for whoever keeps something there: an authority, and a gateway its resources.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

/// Where etcd is.
#[derive(Clone, Default)]
pub struct Settings {
    /// `http://HOST:PORT` or `https://HOST:PORT`, one for each member.
    pub endpoints: Vec<String>,
    /// What all keys begin with, without a slash at the end: `/apisix`.
    pub prefix: String,
    /// User and password, if etcd asks for them.
    pub user: Option<(String, String)>,
    /// For one question.
    pub timeout: Duration,
    /// For `https` endpoints.
    pub tls: Tls,
}

/// TLS towards etcd. Files are PEM; the server's certificate is always verified.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// Whom to trust instead of the system's roots.
    pub ca: Option<PathBuf>,
    /// Certificate and key to show.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name the server's certificate must have, if that is not the host of the endpoint.
    pub server_name: Option<String>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The password stays out.
        f.debug_struct("Settings")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Who asks, and TLS where some endpoint has it. Times are the caller's. Reads the files.
    ///
    /// # Errors
    /// Which file cannot be read, and why.
    pub fn options(&self) -> Result<ConnectOptions, String> {
        let mut options = ConnectOptions::new();
        if let Some((user, password)) = &self.user {
            options = options.with_user(user, password);
        }
        if self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")) {
            options = options.with_tls(self.tls.options()?);
        }
        Ok(options)
    }
}

impl Tls {
    fn options(&self) -> Result<TlsOptions, String> {
        let mut tls = match &self.ca {
            Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => TlsOptions::new().with_native_roots(),
        };
        if let Some((certificate, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name);
        }
        Ok(tls)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}
