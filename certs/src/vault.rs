//! Vault and OpenBao over HTTP: where the server is, and who asks it.
//!
//! A token in a file or the environment, or an AppRole, says who asks. By an AppRole there is a new token for each question
//! that matters, so no lease of a token has to be kept alive.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
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
use crate::renewing::{Failure, Signed};
use crate::token::Token;

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

/// Where a server is, and who asks it.
#[derive(Clone, Debug)]
pub struct Access {
    pub address: String,
    pub auth: Auth,
    pub namespace: Option<String>,
    /// PEM of the authorities of an `https` server; the system's where this is not set.
    pub ca_file: Option<PathBuf>,
    /// For one question.
    pub deadline: Duration,
}

/// A server that can be asked.
#[derive(Debug)]
pub struct Vault {
    server: Server,
    auth: Auth,
    login: String,
    namespace: Option<HeaderValue>,
    deadline: Duration,
}

impl Vault {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(access: Access) -> Result<Self, String> {
        let roots = match &access.ca_file {
            Some(path) => files::trusted_roots(path).map_err(|error| format!("ca_file: {error}"))?,
            None if access.address.starts_with("https:") => {
                files::system_roots().map_err(|error| error.to_string())?
            }
            None => Arc::new(RootCertStore::empty()),
        };
        let server = Server::new(&access.address, roots).map_err(|error| format!("address: {error}"))?;
        let login = match &access.auth {
            Auth::Token(_) => String::new(),
            Auth::AppRole(role) => format!("/v1/auth/{}/login", path("auth.app_role.mount", &role.mount)?),
        };
        let namespace = access.namespace.as_deref().map(HeaderValue::from_str).transpose();
        Ok(Self {
            server,
            auth: access.auth,
            login,
            namespace: namespace
                .map_err(|_| "namespace: it has characters that cannot be sent".to_owned())?,
            deadline: access.deadline,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        self.server.url()
    }

    /// Who asks, for the questions that follow.
    ///
    /// # Errors
    /// There is no token, or the login is refused.
    pub async fn token(&self) -> Result<HeaderValue, Failure> {
        let role = match &self.auth {
            Auth::Token(token) => return token.header("").await.map_err(Failure::new),
            Auth::AppRole(role) => role,
        };
        let secret = role.secret_id.read().await.map_err(Failure::new)?;
        let mut body = json!({"role_id": role.role_id, "secret_id": secret.as_str()});
        let answer = self.post(&self.login, None, &body).await;
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

    /// Asks for something to be done.
    ///
    /// # Errors
    /// It is not done, with what to look at.
    pub async fn post(
        &self,
        target: &str,
        token: Option<HeaderValue>,
        body: &Value,
    ) -> Result<Bytes, Failure> {
        self.ask(Question::post(target, body, self.deadline), token).await
    }

    /// Asks for what is there.
    ///
    /// # Errors
    /// It cannot be had, with what to look at.
    pub async fn get(&self, target: &str, token: Option<HeaderValue>) -> Result<Bytes, Failure> {
        self.ask(Question::get(target, self.deadline), token).await
    }

    async fn ask(&self, question: Question<'_>, token: Option<HeaderValue>) -> Result<Bytes, Failure> {
        let target = question.target;
        let question = question
            .with("x-vault-request", Some(HeaderValue::from_static("true")))
            .with("x-vault-token", token)
            .with("x-vault-namespace", self.namespace.clone());
        let answer = self.server.ask(question).await;
        answer.map(http::Response::into_body).map_err(|error| refused(&error, target))
    }
}

/// A path whose segments are sent as they are.
pub(crate) fn path(name: &str, text: &str) -> Result<String, String> {
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
    let path = target.trim_start_matches("/v1/");
    let hint = match error.status() {
        Some(StatusCode::FORBIDDEN) => format!(" (may the token update {path}?)"),
        Some(StatusCode::NOT_FOUND) => format!(" (is {path} there?)"),
        _ => String::new(),
    };
    Failure { retry_after: error.retry_after(), ..Failure::new(format!("{error}{hint}")) }
}

/// What an answer says.
pub(crate) fn read<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, Failure> {
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

/// The certificate that a PKI engine has signed, and what it says is above it: roots if they sign themselves, and part of
/// the chain if not. Where `roots_file` is given, the roots are those in it.
pub(crate) async fn certified(answer: &[u8], roots_file: Option<&Path>) -> Result<Signed, Failure> {
    let told: Answer = read(answer)?;
    let mut roots = match roots_file {
        None => Vec::new(),
        Some(path) => roots_of(path).await?,
    };
    let read = |what: &str, text: &str| {
        pem_certificates(text.as_bytes()).map_err(|error| Failure::new(format!("vault's {what}: {error}")))
    };
    let given = !roots.is_empty();
    let mut chain = read("certificate", &told.data.certificate)?;
    let above = told.data.ca_chain.iter().flatten().chain([&told.data.issuing_ca]);
    for text in above.filter(|text| !text.is_empty()) {
        for certificate in read("ca_chain", text)? {
            let parsed = X509Certificate::from_der(&certificate);
            let (_, parsed) = parsed.map_err(|error| Failure::new(format!("vault's ca_chain: {error}")))?;
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
        return Err(Failure::new("vault does not hold the root of its engine: set `roots_file`"));
    }
    Ok(Signed { chain, roots })
}

/// The certificates of a file of settings, read anew each time.
pub(crate) async fn roots_of(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let wrong =
        |error: &dyn std::fmt::Display| Failure::new(format!("roots_file: {}: {error}", path.display()));
    let text = tokio::fs::read(path).await.map_err(|error| wrong(&error))?;
    pem_certificates(&text).map_err(|error| wrong(&error))
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
