//! cert-manager in a cluster of Kubernetes, as the authority that signs issuers.
//!
//! A `CertificateRequest` is made under a name that says which key it is for, and looked at until it is ready, refused, or
//! time is up. It stays: somebody may have to approve it, and the same question asked again finds it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, StatusCode};
use rustls::RootCertStore;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Kind, NotSigned, Outside, Question, Seen};
use crate::ca::authority::pem_certificates;
use crate::files;
use crate::http::{AskError, Question as Http, Server};
use crate::renewing::{Failure, Signed};
use crate::token::Token;
use crate::vault::roots_of;

/// For one question to the cluster.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a request is looked at.
const PACE: Duration = Duration::from_millis(500);
/// cert-manager's own kinds of issuers; others answer to other controllers and have paths of their own.
const OWN_GROUP: &str = "cert-manager.io";

/// A cluster, and which issuer of cert-manager signs there.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://kubernetes.default.svc`.
    pub server: String,
    /// PEM of the authorities of an `https` server.
    pub ca_file: PathBuf,
    /// The token of the service account, which may create and get CertificateRequests.
    pub token: Token,
    /// Where requests are made.
    pub namespace: String,
    /// The issuer.
    pub name: String,
    pub kind: String,
    pub group: String,
    /// PEM of the root, where the issuer does not tell it.
    pub roots_file: Option<PathBuf>,
    /// How long a request is waited for.
    pub wait: Duration,
}

/// cert-manager as what signs issuers.
#[derive(Debug)]
pub struct CertManager {
    server: Server,
    settings: Settings,
}

impl CertManager {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let roots = match settings.server.starts_with("https:") {
            true => files::trusted_roots(&settings.ca_file).map_err(|error| format!("ca_file: {error}"))?,
            false => Arc::new(RootCertStore::empty()),
        };
        let server = Server::new(&settings.server, roots).map_err(|error| format!("server: {error}"))?;
        Ok(Self { server, settings })
    }

    fn requests(&self) -> String {
        format!("/apis/cert-manager.io/v1/namespaces/{}/certificaterequests", self.settings.namespace)
    }

    async fn bearer(&self) -> Result<Option<HeaderValue>, Failure> {
        self.settings.token.header("Bearer ").await.map(Some).map_err(Failure::new)
    }

    async fn get(&self, target: &str) -> Result<Result<Value, AskError>, Failure> {
        let question = Http::get(target, DEADLINE).with("authorization", self.bearer().await?);
        match self.server.ask(question).await {
            Ok(answer) => read(answer.body()).map(Ok),
            Err(error) => Ok(Err(error)),
        }
    }

    /// The request of that name: the one that is there, or a new one.
    async fn request(&self, name: &str, question: &Question) -> Result<Value, Failure> {
        let Settings { name: issuer, kind, group, namespace, .. } = &self.settings;
        let body = json!({
            "apiVersion": "cert-manager.io/v1",
            "kind": "CertificateRequest",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/managed-by": "postern"},
            },
            "spec": {
                "request": STANDARD.encode(&question.csr),
                "isCA": true,
                "usages": ["cert sign", "crl sign"],
                "duration": format!("{}s", question.life.as_secs()),
                "issuerRef": {"name": issuer, "kind": kind, "group": group},
            },
        });
        let target = self.requests();
        let made = Http::post(&target, &body, DEADLINE).with("authorization", self.bearer().await?);
        match self.server.ask(made).await {
            Ok(answer) => read(answer.body()),
            Err(error) if error.status() == Some(StatusCode::CONFLICT) => {
                let there = self.get(&format!("{}/{name}", self.requests())).await?;
                there.map_err(|error| self.refused(&error, "get"))
            }
            Err(error) => Err(self.refused(&error, "create")),
        }
    }

    fn refused(&self, error: &AskError, verb: &str) -> Failure {
        let hint = match error.status() {
            Some(StatusCode::FORBIDDEN) => format!(
                " (may the service account {verb} certificaterequests.cert-manager.io in {}?)",
                self.settings.namespace
            ),
            Some(StatusCode::NOT_FOUND) => {
                " (is cert-manager installed, and is the namespace there?)".to_owned()
            }
            _ => String::new(),
        };
        Failure::new(format!("{error}{hint}"))
    }

    async fn signed(&self, question: &Question) -> Result<Signed, NotSigned> {
        let key: String = question.key.to_string().chars().take(16).collect();
        let name = format!("postern-ca-{key}");
        let (namespace, until) = (&self.settings.namespace, Instant::now() + self.settings.wait);
        let mut request = self.request(&name, question).await?;
        loop {
            match Standing::of(&request) {
                Standing::Ready { certificate, ca } => return self.chain(&certificate, &ca).await,
                Standing::Refused(why) => {
                    let reason = format!("CertificateRequest {namespace}/{name} is refused: {why}");
                    return Err(NotSigned { reason, spent: true });
                }
                Standing::Waiting(why) if Instant::now() >= until => {
                    let reason = format!(
                        "CertificateRequest {namespace}/{name} is not ready after {} s: {why}; it stays, and the same command goes on with it",
                        self.settings.wait.as_secs()
                    );
                    return Err(NotSigned { reason, spent: false });
                }
                Standing::Waiting(_) => sleep(PACE).await,
            }
            // A cluster that is away for a moment is asked again, until time is up.
            match self.get(&format!("{}/{name}", self.requests())).await? {
                Ok(now) => request = now,
                Err(error) if error.status().is_some_and(|status| status.is_client_error()) => {
                    return Err(self.refused(&error, "get").into());
                }
                Err(error) if Instant::now() >= until => return Err(self.refused(&error, "get").into()),
                Err(_) => {}
            }
        }
    }

    async fn chain(&self, certificate: &str, ca: &str) -> Result<Signed, NotSigned> {
        let pem = |what: &str, text: &str| {
            let bytes = STANDARD.decode(text).map_err(|error| error.to_string());
            let read = bytes.and_then(|bytes| pem_certificates(&bytes).map_err(|error| error.to_string()));
            read.map_err(|error| Failure::new(format!("cert-manager's status.{what}: {error}")))
        };
        let mut chain = pem("certificate", certificate)?;
        let roots = match &self.settings.roots_file {
            Some(file) => roots_of(file).await?,
            None if ca.is_empty() => {
                return Err(Failure::new("the issuer does not tell its root: set `roots_file`").into());
            }
            None => pem("ca", ca)?,
        };
        // The root may stand at the end of the chain, too.
        chain.retain(|certificate| !roots.contains(certificate));
        Ok(Signed { chain, roots })
    }

    async fn seen(&self) -> Result<Seen, NotSigned> {
        let Settings { name, kind, group, namespace, .. } = &self.settings;
        let of_cluster = kind == "ClusterIssuer";
        let place = if of_cluster { "the cluster".to_owned() } else { format!("namespace {namespace}") };
        let told = format!("{kind} {name} of {place}");
        if group != OWN_GROUP {
            return Ok(Seen { root: None, ends: None, told: format!("{told} ({group}) is not looked at") });
        }
        let target = match of_cluster {
            true => format!("/apis/cert-manager.io/v1/clusterissuers/{name}"),
            false => format!("/apis/cert-manager.io/v1/namespaces/{namespace}/issuers/{name}"),
        };
        match self.get(&target).await? {
            Ok(issuer) => match condition(&issuer, "Ready") {
                Some(("True", _)) => Ok(Seen { root: None, ends: None, told: format!("{told} is ready") }),
                Some((_, why)) => Err(Failure::new(format!("{told} is not ready: {why}")).into()),
                None => {
                    Err(Failure::new(format!("{told} is not ready: cert-manager has not looked at it"))
                        .into())
                }
            },
            // To look at issuers is a right that requests do not need.
            Err(error) if error.status() == Some(StatusCode::FORBIDDEN) => Ok(Seen {
                root: None,
                ends: None,
                told: format!("{told} may not be looked at by this account"),
            }),
            Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => {
                Err(Failure::new(format!("there is no {told}: {error}")).into())
            }
            Err(error) => Err(Failure::new(error).into()),
        }
    }
}

/// How a request stands.
enum Standing {
    Ready { certificate: String, ca: String },
    Refused(String),
    Waiting(String),
}

impl Standing {
    fn of(request: &Value) -> Self {
        let field = |name: &str| {
            let value = request.pointer(&format!("/status/{name}")).and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        for refusal in ["Denied", "InvalidRequest"] {
            if let Some(("True", why)) = condition(request, refusal) {
                return Self::Refused(format!("{refusal}: {why}"));
            }
        }
        let reason =
            |request| conditions(request).find(|one| one["type"] == "Ready").map(|one| &one["reason"]);
        match condition(request, "Ready") {
            Some(("True", _)) if !field("certificate").is_empty() => {
                Self::Ready { certificate: field("certificate"), ca: field("ca") }
            }
            Some((_, why))
                if reason(request).is_some_and(|reason| reason == "Failed" || reason == "Denied") =>
            {
                Self::Refused(why.to_owned())
            }
            Some((_, why)) => Self::Waiting(why.to_owned()),
            None if condition(request, "Approved").is_none() => {
                Self::Waiting("nobody has approved it (`cmctl approve`)".to_owned())
            }
            None => Self::Waiting("cert-manager has not looked at it".to_owned()),
        }
    }
}

fn conditions(object: &Value) -> impl Iterator<Item = &Value> {
    object.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten()
}

/// Status and message of a condition.
fn condition<'a>(object: &'a Value, kind: &str) -> Option<(&'a str, &'a str)> {
    let found = conditions(object).find(|one| one["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default();
    Some((text("status"), text("message")))
}

fn read(body: &Bytes) -> Result<Value, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::new(format!("the cluster's answer cannot be read: {error}")))
}

impl Outside for CertManager {
    fn kind(&self) -> Kind {
        Kind::CertManager
    }

    fn name(&self) -> String {
        let Settings { name, kind, namespace, .. } = &self.settings;
        format!("cert-manager {} {kind} {namespace}/{name}", self.server.url())
    }

    fn sign<'a>(&'a self, question: &'a Question) -> BoxFuture<'a, Result<Signed, NotSigned>> {
        Box::pin(self.signed(question))
    }

    fn look(&self) -> BoxFuture<'_, Result<Seen, NotSigned>> {
        Box::pin(self.seen())
    }

    fn lacks_path_length(&self) -> bool {
        true
    }
}
