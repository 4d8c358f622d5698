//! Takes the identity of this process from the PKI engine of Vault or OpenBao.
//!
//! The engine signs a request for a role; a token in a file or the environment, or an AppRole, says who asks. By an AppRole
//! there is a new token for each certificate, so no lease of a token has to be kept alive. A life that the role cuts short
//! is taken and told.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, StatusCode};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::{Zeroize, Zeroizing};

use crate::ca::authority::pem_certificates;
use crate::files;
use crate::http::{AskError, Question, Server};
use crate::renewing::{Csr, Failure, Signed, Signer};
use crate::token::Token;

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

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Auth {
    /// A token that somebody else keeps alive.
    Token(Token),
    /// An AppRole.
    AppRole(AppRole),
}

/// An AppRole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AppRole {
    pub role_id: String,
    pub secret_id: Token,
    /// Where the method is mounted.
    #[serde(default = "default_approle")]
    pub mount: String,
}

fn default_approle() -> String {
    "approle".to_owned()
}

/// The PKI engine as an issuer.
#[derive(Debug)]
pub struct VaultPki {
    server: Server,
    sign: String,
    auth: Auth,
    login: String,
    namespace: Option<HeaderValue>,
    roots_file: Option<PathBuf>,
    ttl: Option<Duration>,
}

impl VaultPki {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let roots = match &settings.ca_file {
            Some(path) => files::trusted_roots(path).map_err(|error| format!("ca_file: {error}"))?,
            None if settings.address.starts_with("https:") => {
                files::system_roots().map_err(|error| error.to_string())?
            }
            None => Arc::new(RootCertStore::empty()),
        };
        let server = Server::new(&settings.address, roots).map_err(|error| format!("address: {error}"))?;
        let mount = path("mount", &settings.mount)?;
        let role = path("role", &settings.role)?;
        let login = match &settings.auth {
            Auth::Token(_) => String::new(),
            Auth::AppRole(role) => format!("/v1/auth/{}/login", path("auth.app_role.mount", &role.mount)?),
        };
        let namespace = settings.namespace.as_deref().map(HeaderValue::from_str).transpose();
        Ok(Self {
            server,
            sign: format!("/v1/{mount}/sign/{role}"),
            auth: settings.auth,
            login,
            namespace: namespace
                .map_err(|_| "namespace: it has characters that cannot be sent".to_owned())?,
            roots_file: settings.roots_file,
            ttl: settings.ttl_seconds.map(Duration::from_secs),
        })
    }

    async fn ask(&self, target: &str, token: Option<HeaderValue>, body: &Value) -> Result<Bytes, Failure> {
        let question = Question::post(target, body, DEADLINE)
            .with("x-vault-request", Some(HeaderValue::from_static("true")))
            .with("x-vault-token", token)
            .with("x-vault-namespace", self.namespace.clone());
        self.server
            .ask(question)
            .await
            .map(http::Response::into_body)
            .map_err(|error| refused(&error, target))
    }

    async fn token(&self) -> Result<HeaderValue, Failure> {
        let role = match &self.auth {
            Auth::Token(token) => return token.header("").await.map_err(Failure::new),
            Auth::AppRole(role) => role,
        };
        let secret = role.secret_id.read().await.map_err(Failure::new)?;
        let mut body = json!({"role_id": role.role_id, "secret_id": secret.as_str()});
        let answer = self.ask(&self.login, None, &body).await;
        if let Some(Value::String(secret)) = body.get_mut("secret_id") {
            secret.zeroize();
        }
        let told: Login = read(&answer?)?;
        let token = Zeroizing::new(told.auth.client_token);
        let mut value = HeaderValue::from_str(&token)
            .map_err(|_| Failure::new("the token of the login has characters that cannot be sent"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn certificate(&self, csr: &Csr) -> Result<Signed, Failure> {
        let token = self.token().await?;
        let mut body = json!({"csr": csr.pem, "format": "pem"});
        if let Some(fields) = body.as_object_mut() {
            if let Some(identity) = &csr.identity {
                fields.insert("uri_sans".to_owned(), identity.as_str().into());
            }
            if let Some(ttl) = self.ttl {
                fields.insert("ttl".to_owned(), format!("{}s", ttl.as_secs()).into());
            }
        }
        let answer = self.ask(&self.sign, Some(token), &body).await?;
        let told: Answer = read(&answer)?;
        let roots = match &self.roots_file {
            None => Vec::new(),
            Some(path) => {
                let text = tokio::fs::read(path).await;
                let text =
                    text.map_err(|error| Failure::new(format!("roots_file: {}: {error}", path.display())))?;
                pem_certificates(&text)
                    .map_err(|error| Failure::new(format!("roots_file: {}: {error}", path.display())))?
            }
        };
        told.data.signed(roots).map_err(Failure::new)
    }
}

impl Signer for VaultPki {
    fn name(&self) -> String {
        format!("vault {}{}", self.server.url(), self.sign)
    }

    fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    fn sign<'a>(&'a mut self, csr: &'a Csr, _: SystemTime) -> BoxFuture<'a, Result<Signed, Failure>> {
        Box::pin(self.certificate(csr))
    }
}

/// A path whose segments are sent as they are.
fn path(name: &str, text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let segment = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(allowed);
    let text = text.trim_matches('/');
    if text.split('/').all(segment) {
        Ok(text.to_owned())
    } else {
        Err(format!("{name}: `{text}` is not a path: use letters, digits, `-`, `_` and `.` between slashes"))
    }
}

fn refused(error: &AskError, target: &str) -> Failure {
    let hint = match error.status() {
        Some(StatusCode::FORBIDDEN) => {
            format!(" (may the token update {}?)", target.trim_start_matches("/v1/"))
        }
        Some(StatusCode::NOT_FOUND) => " (the mount and the role?)".to_owned(),
        _ => String::new(),
    };
    Failure { retry_after: error.retry_after(), ..Failure::new(format!("{error}{hint}")) }
}

fn read<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::new(format!("vault's answer cannot be read: {error}")))
}

#[derive(Deserialize)]
struct Login {
    auth: LoginAuth,
}

#[derive(Deserialize)]
struct LoginAuth {
    client_token: String,
}

#[derive(Deserialize)]
struct Answer {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    certificate: String,
    #[serde(default)]
    issuing_ca: String,
    #[serde(default)]
    ca_chain: Option<Vec<String>>,
}

impl Data {
    /// Those above the certificate are roots if they sign themselves, and part of the chain if not.
    fn signed(&self, mut roots: Vec<CertificateDer<'static>>) -> Result<Signed, String> {
        let read = |what: &str, text: &str| {
            pem_certificates(text.as_bytes()).map_err(|error| format!("vault's {what}: {error}"))
        };
        let given = !roots.is_empty();
        let mut chain = read("certificate", &self.certificate)?;
        let above = self.ca_chain.iter().flatten().chain([&self.issuing_ca]).filter(|text| !text.is_empty());
        for text in above {
            for certificate in read("ca_chain", text)? {
                let parsed = X509Certificate::from_der(&certificate);
                let (_, parsed) = parsed.map_err(|error| format!("vault's ca_chain: {error}"))?;
                if parsed.subject() == parsed.issuer() {
                    if !given && !roots.contains(&certificate) {
                        roots.push(certificate);
                    }
                } else if !chain.contains(&certificate) {
                    chain.push(certificate);
                }
            }
        }
        if roots.is_empty() {
            return Err("vault does not hold the root of its engine: set `roots_file`".to_owned());
        }
        Ok(Signed { chain, roots })
    }
}

#[cfg(test)]
mod tests;
