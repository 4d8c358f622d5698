//! Takes the identity of this process from the PKI engine of Vault or OpenBao.
//!
//! The engine signs a request for a role. A life that the role cuts short is taken and told.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::renewing::{Csr, Failure, Signed, Signer};
use crate::vault::{Access, Vault, certified, path};
pub use crate::vault::{AppRole, Auth};

const DEADLINE: Duration = Duration::from_secs(10);

/// A PKI engine, and who asks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The server: `https://vault.example.com:8200`.
    pub address: String,
    /// Where the engine is mounted.
    #[serde(default = "default_mount")]
    pub mount: String,
    /// The role that signs. It has to allow the identity as a URI name, and a certificate without a common name
    /// (`allowed_uri_sans`, `require_cn=false`).
    pub role: String,
    /// How this process shows who it is.
    pub auth: Auth,
    /// The namespace, where there are any.
    #[serde(default)]
    pub namespace: Option<String>,
    /// PEM of the authorities of an `https` server; the system's where this is not set.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// PEM of the roots to believe, where the engine does not hold its root. It is read for each certificate.
    #[serde(default)]
    pub roots_file: Option<PathBuf>,
    /// How long certificates are to live, in seconds; what the role gives where this is not set.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

fn default_mount() -> String {
    "pki".to_owned()
}

/// The PKI engine as an issuer.
#[derive(Debug)]
pub struct VaultPki {
    vault: Vault,
    sign: String,
    roots_file: Option<PathBuf>,
    ttl: Option<Duration>,
}

impl VaultPki {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let mount = path("mount", &settings.mount)?;
        let role = path("role", &settings.role)?;
        let vault = Vault::new(Access {
            address: settings.address,
            auth: settings.auth,
            namespace: settings.namespace,
            ca_file: settings.ca_file,
            deadline: DEADLINE,
        })?;
        Ok(Self {
            vault,
            sign: format!("/v1/{mount}/sign/{role}"),
            roots_file: settings.roots_file,
            ttl: settings.ttl_seconds.map(Duration::from_secs),
        })
    }

    async fn certificate(&self, csr: &Csr) -> Result<Signed, Failure> {
        let token = self.vault.token().await?;
        let mut body = json!({"csr": csr.pem, "format": "pem"});
        if let Some(fields) = body.as_object_mut() {
            if let Some(identity) = &csr.identity {
                fields.insert("uri_sans".to_owned(), identity.as_str().into());
            }
            if let Some(ttl) = self.ttl {
                fields.insert("ttl".to_owned(), format!("{}s", ttl.as_secs()).into());
            }
        }
        let answer = self.vault.post(&self.sign, Some(token), &body).await?;
        certified(&answer, self.roots_file.as_deref()).await
    }
}

impl Signer for VaultPki {
    fn name(&self) -> String {
        format!("vault {}{}", self.vault.url(), self.sign)
    }

    fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    fn sign<'a>(&'a mut self, csr: &'a Csr, _: SystemTime) -> BoxFuture<'a, Result<Signed, Failure>> {
        Box::pin(self.certificate(csr))
    }
}

#[cfg(test)]
mod tests;
