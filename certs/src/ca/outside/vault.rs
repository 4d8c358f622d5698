//! The PKI engine of Vault or OpenBao, as the authority that signs issuers.
//!
//! What stands above the issuer is read first, without a token: nothing is asked for that would outlive it, because engines
//! as a rule sign that, too.

use std::path::PathBuf;

use futures_util::future::BoxFuture;
use http::HeaderValue;
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Kind, NotSigned, Outside, Question, Seen};
use crate::ca::authority::{Facts, MARGIN, pem_certificates};
use crate::ca::record::Moment;
use crate::renewing::{Failure, Signed};
use crate::vault::{Access, Vault, certified, path, read, roots_of};

/// A PKI engine, and who asks it.
#[derive(Clone, Debug)]
pub struct Settings {
    pub access: Access,
    /// Where the engine is mounted.
    pub mount: String,
    /// Which of its issuers signs; none: the default one.
    pub issuer: Option<String>,
    /// PEM of the root, where the engine does not hold it.
    pub roots_file: Option<PathBuf>,
}

/// The PKI engine as what signs issuers.
#[derive(Debug)]
pub struct VaultRoot {
    vault: Vault,
    mount: String,
    issuer: Option<String>,
    roots_file: Option<PathBuf>,
}

impl VaultRoot {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let mount = path("mount", &settings.mount)?;
        let issuer = settings.issuer.map(|issuer| path("issuer", &issuer)).transpose()?;
        let vault = Vault::new(settings.access)?;
        Ok(Self { vault, mount, issuer, roots_file: settings.roots_file })
    }

    /// What signs, below `/v1/`.
    fn sign_path(&self) -> String {
        match &self.issuer {
            None => format!("{}/root/sign-intermediate", self.mount),
            Some(issuer) => format!("{}/issuer/{issuer}/sign-intermediate", self.mount),
        }
    }

    /// The certificate that would sign, and those above it that are known.
    async fn above(&self) -> Result<Vec<CertificateDer<'static>>, Failure> {
        let target = match &self.issuer {
            None => format!("/v1/{}/cert/ca_chain", self.mount),
            Some(issuer) => format!("/v1/{}/issuer/{issuer}/json", self.mount),
        };
        let answer = self.vault.get(&target, None).await?;
        let told: Above = read(&answer)?;
        let text = match told.data.ca_chain {
            Some(Chain::One(text)) => text,
            Some(Chain::Several(texts)) => texts.join("\n"),
            None => String::new(),
        };
        let text = format!("{}\n{text}", told.data.certificate);
        let mut found = pem_certificates(text.as_bytes())
            .map_err(|error| Failure::new(format!("vault's {target}: {error}")))?;
        if let Some(file) = &self.roots_file {
            found.extend(roots_of(file).await?);
        }
        Ok(found)
    }

    async fn signed(&self, question: &Question) -> Result<Signed, NotSigned> {
        let ends = ends(&self.above().await?);
        let life = ends.map_or(question.life, |ends| question.life.min((ends - MARGIN).since(question.now)));
        let token = self.vault.token().await?;
        let body = json!({
            "csr": question.csr,
            "format": "pem",
            "common_name": question.common_name,
            "organization": question.organization,
            "exclude_cn_from_sans": true,
            "max_path_length": 0,
            "ttl": format!("{}s", life.as_secs()),
        });
        let target = format!("/v1/{}", self.sign_path());
        let answer = self.vault.post(&target, Some(token), &body).await?;
        Ok(certified(&answer, self.roots_file.as_deref()).await?)
    }

    async fn seen(&self) -> Result<Seen, NotSigned> {
        let above = self.above().await?;
        let path = self.sign_path();
        let token = self.vault.token().await?;
        if !self.may(&path, token).await? {
            let reason =
                format!("{} does not let the token update {path}: give it a policy", self.vault.url());
            return Err(NotSigned { reason, spent: false });
        }
        let root = above.iter().find(|one| Facts::read(one).is_ok_and(|facts| facts.self_signed)).cloned();
        Ok(Seen { root, ends: ends(&above), told: format!("{} lets the token update {path}", self.name()) })
    }

    async fn may(&self, path: &str, token: HeaderValue) -> Result<bool, Failure> {
        let body = json!({"paths": [path]});
        let answer = self.vault.post("/v1/sys/capabilities-self", Some(token), &body).await?;
        let told: Capabilities = read(&answer)?;
        let allowed = told.data.get(path).and_then(Value::as_array);
        Ok(allowed.is_some_and(|all| all.iter().any(|one| one == "update" || one == "root")))
    }
}

#[derive(Deserialize)]
struct Above {
    data: AboveData,
}

#[derive(Deserialize)]
struct AboveData {
    certificate: String,
    #[serde(default)]
    ca_chain: Option<Chain>,
}

/// The older question is answered by one text, the newer by a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Chain {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
struct Capabilities {
    data: Value,
}

/// The first end of some certificates.
fn ends(certificates: &[CertificateDer<'_>]) -> Option<Moment> {
    certificates.iter().filter_map(|one| Some(Facts::read(one).ok()?.not_after.into())).min()
}

impl Outside for VaultRoot {
    fn kind(&self) -> Kind {
        Kind::Vault
    }

    fn name(&self) -> String {
        format!("vault {}/v1/{}", self.vault.url(), self.mount)
    }

    fn sign<'a>(&'a self, question: &'a Question) -> BoxFuture<'a, Result<Signed, NotSigned>> {
        Box::pin(self.signed(question))
    }

    fn look(&self) -> BoxFuture<'_, Result<Seen, NotSigned>> {
        Box::pin(self.seen())
    }

    fn lacks_path_length(&self) -> bool {
        false
    }
}
