//! Takes the identity of this process from Consul's own authority: roots and leaf of a service at an agent.
//!
//! Both are blocking queries, by the rules for indexes of Consul's API. The leaf is always asked for in this form, because
//! some versions answer the other one with a leaf that has expired. What counts is what the agent serves and the roots
//! verify, not which root Consul calls active; an error takes nothing away. The key is made by the agent and comes along.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use rustls::RootCertStore;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::{Zeroize, Zeroizing};

use crate::ca::authority::{pem_certificates, pem_key};
use crate::files;
use crate::http::{AskError, Question, Server};
use crate::identity::TrustDomain;
use crate::mesh::MeshIdentity;
use crate::source::{Hopeless, Intake, LONGEST_PAUSE, Roots, Source, Told, backoff};
use crate::svid::Svid;
use crate::token::Token;
use crate::workload::plan::Backoff;

/// How long Consul may wait for a change. No longer than what passes between two looks at the wall clock.
const WAIT: Duration = Duration::from_secs(30);
/// Consul adds up to a sixteenth, and the answer has to come.
const SLACK: Duration = Duration::from_secs(10);
/// Answers that may come in a row, and how long one more takes to be allowed.
const BURST: u32 = 5;
const REFILL: Duration = Duration::from_secs(1);

/// An agent of Consul with Connect enabled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The agent: `http://127.0.0.1:8500`.
    pub address: String,
    /// The service whose identity this process has.
    pub service: String,
    /// The ACL token, which needs `service:write` for the service. None where Consul has no ACLs.
    #[serde(default)]
    pub token: Option<Token>,
    /// PEM of the authorities of an `https` agent; the system's where this is not set.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
}

/// Consul as an issuer.
#[derive(Debug)]
pub struct ConsulConnect {
    server: Server,
    service: String,
    token: Option<Token>,
}

impl ConsulConnect {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if settings.service.is_empty() || !settings.service.bytes().all(allowed) {
            return Err(format!(
                "service: `{}` is not the name of a service: use letters, digits, `-`, `_` and `.`",
                settings.service
            ));
        }
        let roots = match &settings.ca_file {
            Some(path) => files::trusted_roots(path).map_err(|error| format!("ca_file: {error}"))?,
            None if settings.address.starts_with("https:") => {
                files::system_roots().map_err(|error| error.to_string())?
            }
            None => Arc::new(RootCertStore::empty()),
        };
        let server = Server::new(&settings.address, roots).map_err(|error| format!("address: {error}"))?;
        Ok(Self { server, service: settings.service, token: settings.token })
    }

    fn watch(&self, path: String, first: u64) -> Watch {
        Watch {
            server: self.server.clone(),
            token: self.token.clone(),
            path,
            first,
            index: first,
            pauses: backoff(),
            pause: Duration::ZERO,
            allowed: BURST,
            refilled: Instant::now(),
        }
    }
}

impl Source for ConsulConnect {
    fn name(&self) -> String {
        format!("consul {}", self.server.url())
    }

    fn follow(self: Box<Self>, identity: MeshIdentity, told: Told) -> BoxFuture<'static, Hopeless> {
        Box::pin(async move {
            let roots = self.watch("/v1/agent/connect/ca/roots".to_owned(), 0).answers();
            let leaf = self.watch(format!("/v1/agent/connect/ca/leaf/{}", self.service), 1).answers();
            let mut news = stream::select(
                roots.map(|answer| News::Roots(answer.and_then(|body| read_roots(&body)))),
                leaf.map(|answer| News::Leaf(answer.and_then(read_leaf))),
            );
            let mut intake = Intake::new(identity, told);
            // Of the roots, and of the leaf.
            let mut problems = [None, None];
            while let Some(news) = news.next().await {
                let [of_roots, of_leaf] = &mut problems;
                match news {
                    News::Roots(Ok(roots)) => {
                        // The roots may be what the leaf has waited for.
                        let taken = intake.take(Some(&roots), None).err().map(|error| error.to_string());
                        if taken.is_none() && !intake.waits() {
                            *of_leaf = None;
                        }
                        *of_roots = taken;
                    }
                    News::Roots(Err(problem)) => *of_roots = Some(problem),
                    News::Leaf(Ok(svid)) => {
                        *of_leaf = intake.take(None, Some(svid)).err().map(|error| error.to_string());
                    }
                    News::Leaf(Err(problem)) => *of_leaf = Some(problem),
                }
                match problems.iter().flatten().next() {
                    Some(problem) => intake.told().problem(problem),
                    None => intake.told().well(),
                }
            }
            // A watch has no end.
            Hopeless("nothing is watched".to_owned())
        })
    }
}

enum News {
    Roots(Result<Roots, String>),
    Leaf(Result<Svid, String>),
}

/// A blocking query that is asked again and again.
struct Watch {
    server: Server,
    token: Option<Token>,
    path: String,
    /// The index to begin with: with 0 Consul answers at once by another way.
    first: u64,
    index: u64,
    pauses: Backoff,
    /// Before the next question.
    pause: Duration,
    allowed: u32,
    refilled: Instant,
}

impl Watch {
    fn answers(self) -> BoxStream<'static, Result<Bytes, String>> {
        stream::unfold(self, |mut watch| async move {
            let answer = watch.next().await;
            Some((answer, watch))
        })
        .boxed()
    }

    /// The next answer, or why there is none.
    async fn next(&mut self) -> Result<Bytes, String> {
        tokio::time::sleep(std::mem::take(&mut self.pause)).await;
        self.refill().await;
        match self.ask().await {
            Ok(body) => {
                self.pauses = backoff();
                Ok(body)
            }
            Err(error) => {
                let asked = error.retry_after().unwrap_or_default().min(LONGEST_PAUSE);
                self.pause = self.pauses.pause(LONGEST_PAUSE).max(asked);
                // Who was away may have forgotten what an index means.
                self.index = self.first;
                Err(error.to_string())
            }
        }
    }

    async fn ask(&mut self) -> Result<Bytes, Problem> {
        let (target, deadline) = match self.index {
            0 => (self.path.clone(), SLACK),
            index => {
                let target = format!("{}?index={index}&wait={}s", self.path, WAIT.as_secs());
                (target, WAIT + WAIT / 16 + SLACK)
            }
        };
        let token = match &self.token {
            Some(token) => Some(token.header("").await.map_err(|error| Problem::Token(error.to_string()))?),
            None => None,
        };
        let question = Question::get(&target, deadline).with("x-consul-token", token);
        let answer = self.server.ask(question).await?;
        let told = answer.headers().get("x-consul-index").and_then(|value| value.to_str().ok()?.parse().ok());
        self.index = next_index(self.index, told.unwrap_or(0), self.first);
        Ok(answer.into_body())
    }

    /// A Consul whose index never stands still is not asked without end.
    async fn refill(&mut self) {
        let passed = self.refilled.elapsed();
        let more = u32::try_from(passed.as_millis() / REFILL.as_millis()).unwrap_or(BURST).min(BURST);
        if more > 0 {
            self.allowed = (self.allowed + more).min(BURST);
            self.refilled = Instant::now();
        }
        if self.allowed == 0 {
            tokio::time::sleep(REFILL.saturating_sub(passed)).await;
            self.refilled = Instant::now();
        } else {
            self.allowed -= 1;
        }
    }
}

/// Which index to wait with: never 0, and the first one again when it goes back.
fn next_index(asked: u64, told: u64, first: u64) -> u64 {
    match told.max(1) {
        told if told < asked => first,
        told => told,
    }
}

enum Problem {
    Token(String),
    Ask(AskError),
}

impl Problem {
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Token(_) => None,
            Self::Ask(error) => error.retry_after(),
        }
    }
}

impl From<AskError> for Problem {
    fn from(error: AskError) -> Self {
        Self::Ask(error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(problem) => f.write_str(problem),
            Self::Ask(error) => {
                error.fmt(f)?;
                if error.status() == Some(http::StatusCode::FORBIDDEN) {
                    f.write_str(" (the token needs service:write for the service)")?;
                }
                Ok(())
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ToldRoots {
    trust_domain: String,
    /// `null` before there is an authority.
    roots: Option<Vec<ToldRoot>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ToldRoot {
    root_cert: String,
}

/// All roots that Consul lists: those that are not active any more still have leaves below them.
fn read_roots(body: &[u8]) -> Result<Roots, String> {
    let told: ToldRoots =
        serde_json::from_slice(body).map_err(|error| format!("the roots cannot be read: {error}"))?;
    let domain: TrustDomain =
        told.trust_domain.parse().map_err(|error| format!("TrustDomain `{}`: {error}", told.trust_domain))?;
    let mut roots = Vec::new();
    for root in told.roots.unwrap_or_default() {
        roots
            .extend(pem_certificates(root.root_cert.as_bytes()).map_err(|error| format!("a root: {error}"))?);
    }
    Ok(Roots::of(domain, roots))
}

#[derive(Deserialize)]
struct ToldLeaf {
    #[serde(rename = "CertPEM")]
    certificates: String,
    #[serde(rename = "PrivateKeyPEM")]
    key: String,
    #[serde(rename = "ServiceURI")]
    uri: String,
}

fn read_leaf(body: Bytes) -> Result<Svid, String> {
    let mut told: ToldLeaf =
        serde_json::from_slice(&body).map_err(|error| format!("the leaf cannot be read: {error}"))?;
    let pem = Zeroizing::new(std::mem::take(&mut told.key));
    if let Ok(body) = body.try_into_mut() {
        Vec::from(body).zeroize();
    }
    let chain =
        pem_certificates(told.certificates.as_bytes()).map_err(|error| format!("the leaf: {error}"))?;
    let mut key = pem_key(pem.as_bytes()).map_err(|error| format!("the key of the leaf: {error}"))?;
    let svid = Svid::new(chain, &key);
    key.zeroize();
    let svid = svid.map_err(|error| format!("the leaf: {error}"))?;
    if svid.id().as_str() != told.uri {
        return Err(format!("the leaf is for {} and Consul says {}", svid.id(), told.uri));
    }
    Ok(svid)
}

#[cfg(test)]
mod tests;
