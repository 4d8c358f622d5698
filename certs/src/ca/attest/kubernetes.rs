//! Proof by a service-account token of Kubernetes: the cluster is asked whose it is (TokenReview).
//!
//! Only a token for the audience of this authority counts, and only one that is bound to a pod, which ends with it. What the
//! cluster said is kept for a minute at most.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::call::Server;
use super::{Grant, Refusal};
use crate::identity::{SpiffeId, TrustDomain};
use crate::trust::Fingerprint;

/// The kind of this proof.
pub const KIND: &str = "kubernetes";
const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const KEPT: Duration = Duration::from_secs(60);
const MOST: usize = 10_000;
const LONGEST_TOKEN: usize = 16 * 1024;

/// Where the cluster is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://kubernetes.default.svc`.
    pub server: String,
    pub ca: Option<PathBuf>,
    /// The token of this authority's own service account, which may create TokenReviews.
    pub token: PathBuf,
    /// What tokens have to be for.
    pub audience: String,
}

/// Asks a cluster.
pub struct Kubernetes {
    server: Server,
    settings: Settings,
    /// By the hash of the token: what was said, and until when it is taken again.
    known: Mutex<HashMap<Fingerprint, (Reviewed, SystemTime)>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reviewed {
    pub namespace: String,
    pub account: String,
    pub pod: String,
    /// Of the pod; empty where the cluster does not say it.
    pub uid: String,
}

impl Kubernetes {
    /// # Errors
    /// The URL is none.
    pub fn new(settings: Settings) -> Result<Self, String> {
        Ok(Self {
            server: Server::new(&settings.server, settings.ca.clone())?,
            settings,
            known: Mutex::default(),
        })
    }

    /// Judges a token.
    ///
    /// # Errors
    /// It is not good, or the cluster cannot be asked.
    pub async fn attest(&self, token: &str, domain: &TrustDomain, now: SystemTime) -> Result<Grant, Refusal> {
        let Reviewed { namespace, account, pod, .. } = self.reviewed(token, now).await?;
        let identity = SpiffeId::new(domain, &format!("/ns/{namespace}/sa/{account}"))
            .map_err(|error| Refusal::Identity(error.to_string()))?;
        let process = format!("{namespace}/{pod}");
        Ok(Grant {
            identity,
            dns_names: Vec::new(),
            longest_ttl: None,
            attestor: KIND,
            evidence: format!("pod {process}"),
            process: Some(process),
        })
    }

    /// Whose a token is.
    pub(super) async fn reviewed(&self, token: &str, now: SystemTime) -> Result<Reviewed, Refusal> {
        if token.is_empty()
            || token.len() > LONGEST_TOKEN
            || !token.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(Refusal::Malformed("this is not a service-account token".to_owned()));
        }
        let hash = Fingerprint::of(token.as_bytes());
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(&hash).filter(|(_, until)| now < *until).map(|(reviewed, _)| reviewed.clone())
        };
        if let Some(reviewed) = known {
            return Ok(reviewed);
        }
        let reviewed = self.review(token).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        // Never longer than the token itself is good.
        let until = now + KEPT;
        known.insert(hash, (reviewed.clone(), expiry(token).map_or(until, |end| end.min(until))));
        Ok(reviewed)
    }

    async fn review(&self, token: &str) -> Result<Reviewed, Refusal> {
        let question = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self.settings.audience]},
        });
        let body = Bytes::from(question.to_string());
        let answer = self.ask(Method::POST, PATH, body).await?;
        let answer = answer.ok_or_else(|| unavailable("it has no TokenReviews"))?;
        read(&answer, &self.settings.audience)
    }

    /// An object of the cluster; none where it says that there is none.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Option<Value>, Refusal> {
        let own = tokio::fs::read_to_string(&self.settings.token).await;
        let own = Zeroizing::new(own.map_err(unavailable)?);
        let bearer = Zeroizing::new(format!("Bearer {}", own.trim()));
        let asked = self.server.ask(method, path, (AUTHORIZATION, &bearer), body).await;
        let (status, body) = asked.map_err(unavailable)?;
        match status {
            StatusCode::OK | StatusCode::CREATED => {}
            StatusCode::NOT_FOUND => return Ok(None),
            other => return Err(unavailable(format!("it answered {other}"))),
        }
        serde_json::from_slice(&body).map(Some).map_err(|_| unavailable("its answer is not JSON"))
    }
}

fn unavailable(problem: impl Display) -> Refusal {
    Refusal::Unavailable(format!("the cluster cannot be asked: {problem}"))
}

fn read(answer: &Value, audience: &str) -> Result<Reviewed, Refusal> {
    let refused = |words: &str| Refusal::Proof(words.to_owned());
    let text = |pointer: &str| answer.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    if answer.pointer("/status/authenticated") != Some(&Value::Bool(true)) {
        let words = text("/status/error").chars().take(200).collect::<String>();
        return Err(Refusal::Proof(
            format!("the cluster does not know the token {words}").trim_end().to_owned(),
        ));
    }
    let audiences = answer.pointer("/status/audiences").and_then(Value::as_array);
    if !audiences.is_some_and(|all| all.iter().any(|one| one == audience)) {
        return Err(Refusal::Proof(format!("the token is not for the audience {audience}")));
    }
    let mut name = text("/status/user/username").split(':');
    let parts = (name.next(), name.next(), name.next(), name.next(), name.next());
    let (Some("system"), Some("serviceaccount"), Some(namespace), Some(account), None) = parts else {
        return Err(refused("the token is not of a service account"));
    };
    let pod = answer.pointer("/status/user/extra/authentication.kubernetes.io~1pod-name/0");
    let Some(pod) = pod.and_then(Value::as_str).filter(|pod| !pod.is_empty()) else {
        return Err(refused("the token is not bound to a pod; mount it as a projected volume"));
    };
    Ok(Reviewed {
        namespace: namespace.to_owned(),
        account: account.to_owned(),
        pod: pod.to_owned(),
        uid: text("/status/user/extra/authentication.kubernetes.io~1pod-uid/0").to_owned(),
    })
}

/// When a token ends, as it says itself.
fn expiry(token: &str) -> Option<SystemTime> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let payload: Value = serde_json::from_slice(&payload).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(payload.get("exp")?.as_u64()?))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn answer(change: fn(&mut Value)) -> Value {
        let mut answer = json!({"status": {
            "authenticated": true,
            "audiences": ["postern-ca"],
            "user": {
                "username": "system:serviceaccount:shop:orders",
                "extra": {"authentication.kubernetes.io/pod-name": ["orders-1"]},
            },
        }});
        change(&mut answer);
        answer
    }

    #[test]
    fn only_a_bound_token_for_this_audience_counts() {
        let good = Reviewed {
            namespace: "shop".into(),
            account: "orders".into(),
            pod: "orders-1".into(),
            uid: String::new(),
        };
        assert_eq!(read(&answer(|_| {}), "postern-ca"), Ok(good));
        type Case = (&'static str, fn(&mut Value));
        let cases: [Case; 8] = [
            ("not authenticated", |it| it["status"]["authenticated"] = json!(false)),
            ("said as text", |it| it["status"]["authenticated"] = json!("true")),
            ("nothing", |it| *it = json!({})),
            ("another audience", |it| it["status"]["audiences"] = json!(["https://kubernetes"])),
            ("no audience", |it| it["status"]["audiences"] = json!([])),
            ("a person", |it| it["status"]["user"]["username"] = json!("jane")),
            ("more parts", |it| it["status"]["user"]["username"] = json!("system:serviceaccount:a:b:c")),
            ("not bound", |it| it["status"]["user"]["extra"] = json!({})),
        ];
        for (what, change) in cases {
            assert!(matches!(read(&answer(change), "postern-ca"), Err(Refusal::Proof(_))), "{what}");
        }
    }

    #[tokio::test]
    async fn the_cluster_is_asked_once_a_minute_for_a_token() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "own-token\n").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let cluster = tokio::spawn(async move {
            let mut asked = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"}}") {
                    let mut buffer = [0; 4096];
                    let read = stream.read(&mut buffer).await.unwrap();
                    assert!(read > 0);
                    request.extend_from_slice(&buffer[..read]);
                }
                let body = answer(|_| {}).to_string();
                let head = format!("HTTP/1.1 201 Created\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(head.as_bytes()).await.unwrap();
                asked.push(String::from_utf8(request).unwrap());
            }
            asked
        });
        let settings = Settings { server, ca: None, token, audience: "postern-ca".to_owned() };
        let cluster_of = Kubernetes::new(settings).unwrap();
        let domain: TrustDomain = "mesh.local".parse().unwrap();
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds);
        for seconds in [0, 59, 60] {
            let grant = cluster_of.attest("a.b.c", &domain, at(seconds)).await.unwrap();
            assert_eq!(grant.identity.as_str(), "spiffe://mesh.local/ns/shop/sa/orders");
        }
        let asked = cluster.await.unwrap();
        assert!(asked[0].contains("authorization: Bearer own-token\r\n"), "{}", asked[0]);
        assert!(asked[0].contains("\"token\":\"a.b.c\""));
        let away = cluster_of.attest("other", &domain, at(60)).await;
        assert!(matches!(away, Err(Refusal::Unavailable(_))), "{away:?}");
    }
}
