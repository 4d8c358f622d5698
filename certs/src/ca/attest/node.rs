//! Proof of a node's proxy, which asks for certificates of the pods on its node, as ztunnel does.
//!
//! Its own token shows which pod it is. It gets the identity of a service account only if its own account is listed for
//! this, and a pod of that account runs on its node: the cluster is asked for both pods each time.

use std::collections::BTreeSet;
use std::time::SystemTime;

use bytes::Bytes;
use http::Method;
use serde_json::Value;

use super::kubernetes::{Kubernetes, Reviewed};
use super::{Grant, Refusal};
use crate::identity::{SpiffeId, TrustDomain};

/// The kind of this proof.
pub const KIND: &str = "kubernetes_node";

/// Service accounts of node proxies: `NAMESPACE/NAME`.
pub type Accounts = BTreeSet<String>;

impl Kubernetes {
    /// Judges the token of a node's proxy that wants a certificate for `wanted`.
    ///
    /// # Errors
    /// It may not have one, or the cluster cannot be asked.
    pub async fn attest_node(
        &self,
        token: &str,
        wanted: &SpiffeId,
        accounts: &Accounts,
        domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Grant, Refusal> {
        let proxy = self.reviewed(token, now).await?;
        let account = format!("{}/{}", proxy.namespace, proxy.account);
        if !accounts.contains(&account) {
            return Err(Refusal::Identity(format!(
                "the service account {account} may not have certificates of others: it is not in `istio.node_accounts`"
            )));
        }
        let (namespace, name) = workload(wanted, domain)?;
        let node = self.node(&proxy).await?;
        // What has ended keeps its node, and needs no certificate.
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods?fieldSelector=spec.nodeName%3D{node}%2Cspec.serviceAccountName%3D{name}%2Cstatus.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed"
        );
        let pods = self.ask(Method::GET, &path, Bytes::new()).await?.unwrap_or_default();
        let mut pods = pods.get("items").and_then(Value::as_array).into_iter().flatten();
        // A server that does not know a selector must not decide.
        let here = |pod: &Value| {
            let is = |pointer: &str, expected: &str| text(pod, pointer) == expected;
            is("/spec/nodeName", &node)
                && is("/spec/serviceAccountName", name)
                && is("/metadata/namespace", namespace)
                && !matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
        };
        if !pods.any(here) {
            return Err(Refusal::Identity(format!("no pod of {namespace}/{name} runs on the node {node}")));
        }
        let process = format!("{}/{}", proxy.namespace, proxy.pod);
        Ok(Grant {
            identity: wanted.clone(),
            dns_names: Vec::new(),
            longest_ttl: None,
            attestor: KIND,
            evidence: format!("pod {process} on node {node}"),
            process: Some(process),
        })
    }

    /// The node of a pod.
    async fn node(&self, proxy: &Reviewed) -> Result<String, Refusal> {
        let Reviewed { namespace, account, pod, uid } = proxy;
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        let found = self.ask(Method::GET, &path, Bytes::new()).await?;
        let found = found.ok_or_else(|| Refusal::Proof(format!("there is no pod {namespace}/{pod}")))?;
        let same = text(&found, "/spec/serviceAccountName") == account
            && (uid.is_empty() || text(&found, "/metadata/uid") == uid);
        if !same {
            return Err(Refusal::Proof(format!("the pod {namespace}/{pod} is another one by now")));
        }
        match text(&found, "/spec/nodeName") {
            node if is_name(node) => Ok(node.to_owned()),
            _ => Err(Refusal::Proof(format!("the pod {namespace}/{pod} is on no node"))),
        }
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A name of Kubernetes, of which paths and selectors are made.
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(plain) && !text.starts_with('.')
}

/// Namespace and service account of an identity.
fn workload<'a>(wanted: &'a SpiffeId, domain: &TrustDomain) -> Result<(&'a str, &'a str), Refusal> {
    let named = wanted.namespace().zip(wanted.service_account());
    let plain = named.filter(|(namespace, name)| is_name(namespace) && is_name(name));
    match plain {
        // Nothing stands before, between or behind them.
        Some((namespace, name))
            if wanted.as_str() == format!("spiffe://{domain}/ns/{namespace}/sa/{name}") =>
        {
            Ok((namespace, name))
        }
        _ => Err(Refusal::Identity(format!(
            "{wanted} is no service account of this mesh: spiffe://{domain}/ns/NAMESPACE/sa/NAME"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, UNIX_EPOCH};

    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::kubernetes::Settings;
    use super::*;

    /// A cluster that answers each path with this, and 404 with nothing.
    async fn cluster(
        answers: fn(&str) -> Option<Value>,
    ) -> (Kubernetes, Arc<Mutex<Vec<String>>>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "own").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let paths = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = Vec::new();
                let head = loop {
                    let mut buffer = [0; 4096];
                    let read = stream.read(&mut buffer).await.unwrap();
                    assert!(read > 0);
                    request.extend_from_slice(&buffer[..read]);
                    let text = String::from_utf8(request.clone()).unwrap();
                    if text.starts_with("POST") && text.ends_with("}}")
                        || text.starts_with("GET") && text.ends_with("\r\n\r\n")
                    {
                        break text;
                    }
                };
                let path = head.split(' ').nth(1).unwrap().to_owned();
                paths.lock().unwrap().push(path.clone());
                let (status, body) = match answers(&path) {
                    Some(body) => ("200 OK", body.to_string()),
                    None => ("404 Not Found", "{}".to_owned()),
                };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let settings = Settings { server, ca: None, token, audience: "istio-ca".to_owned() };
        (Kubernetes::new(settings).unwrap(), asked, dir)
    }

    fn review() -> Value {
        json!({"status": {"authenticated": true, "audiences": ["istio-ca"], "user": {
            "username": "system:serviceaccount:istio-system:ztunnel",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["ztunnel-a"],
                "authentication.kubernetes.io/pod-uid": ["u-1"],
            },
        }}})
    }

    fn pod(namespace: &str, account: &str, node: &str, phase: &str) -> Value {
        json!({"metadata": {"namespace": namespace, "uid": "u-1"},
            "spec": {"serviceAccountName": account, "nodeName": node}, "status": {"phase": phase}})
    }

    fn usual(path: &str) -> Option<Value> {
        match path {
            "/apis/authentication.k8s.io/v1/tokenreviews" => Some(review()),
            "/api/v1/namespaces/istio-system/pods/ztunnel-a" => {
                Some(pod("istio-system", "ztunnel", "n1", "Running"))
            }
            path if path.contains("spec.serviceAccountName%3Dorders%2C") => {
                Some(json!({"items": [pod("shop", "orders", "n1", "Pending")]}))
            }
            // A server that does not look at selectors.
            path if path.contains("spec.serviceAccountName%3Delsewhere%2C") => Some(
                json!({"items": [pod("shop", "elsewhere", "n2", "Running"), pod("shop", "orders", "n1", "Running"),
                    pod("shop", "elsewhere", "n1", "Failed")]}),
            ),
            path if path.starts_with("/api/v1/namespaces/") => Some(json!({"items": []})),
            _ => None,
        }
    }

    async fn ask(cluster: &Kubernetes, wanted: &str, accounts: &[&str]) -> Result<Grant, Refusal> {
        let domain = "mesh.local".parse().unwrap();
        let accounts = accounts.iter().map(|one| (*one).to_owned()).collect();
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        cluster.attest_node("a.b.c", &wanted.parse().unwrap(), &accounts, &domain, now).await
    }

    #[tokio::test]
    async fn a_node_proxy_gets_identities_of_pods_on_its_node_alone() {
        let (cluster, asked, _dir) = cluster(usual).await;
        let ztunnel = ["istio-system/ztunnel"];
        let grant = ask(&cluster, "spiffe://mesh.local/ns/shop/sa/orders", &ztunnel).await.unwrap();
        assert_eq!(grant.identity.as_str(), "spiffe://mesh.local/ns/shop/sa/orders");
        assert_eq!(grant.process.as_deref(), Some("istio-system/ztunnel-a"));
        let list = asked.lock().unwrap().last().unwrap().clone();
        assert!(
            list.starts_with("/api/v1/namespaces/shop/pods?fieldSelector=spec.nodeName%3Dn1%2C"),
            "{list}"
        );

        let refused = [
            ("spiffe://mesh.local/ns/shop/sa/billing", ztunnel, "no pod of shop/billing runs on the node n1"),
            ("spiffe://mesh.local/ns/shop/sa/elsewhere", ztunnel, "no pod of shop/elsewhere"),
            ("spiffe://other.test/ns/shop/sa/orders", ztunnel, "no service account of this mesh"),
            ("spiffe://mesh.local/ns/shop/sa/a_b", ztunnel, "no service account of this mesh"),
            ("spiffe://mesh.local/ns/shop/sa/orders/x/y", ztunnel, "no service account of this mesh"),
            ("spiffe://mesh.local/orders", ztunnel, "no service account of this mesh"),
            ("spiffe://mesh.local/ns/shop/sa/orders", ["istio-system/other"], "`istio.node_accounts`"),
        ];
        for (wanted, accounts, expected) in refused {
            let refusal = ask(&cluster, wanted, &accounts).await.unwrap_err();
            assert!(matches!(refusal, Refusal::Identity(_)), "{wanted}: {refusal:?}");
            assert!(refusal.to_string().contains(expected), "{wanted}: {refusal}");
        }
    }

    #[tokio::test]
    async fn a_pod_that_was_replaced_proves_nothing() {
        let wanted = "spiffe://mesh.local/ns/shop/sa/orders";
        let cases: [fn(&str) -> Option<Value>; 4] = [
            |path| if path.ends_with("/ztunnel-a") { None } else { usual(path) },
            |path| {
                let mut found = usual(path)?;
                if path.ends_with("/ztunnel-a") {
                    found["metadata"]["uid"] = json!("u-2");
                }
                Some(found)
            },
            |path| {
                let mut found = usual(path)?;
                if path.ends_with("/ztunnel-a") {
                    found["spec"]["serviceAccountName"] = json!("default");
                }
                Some(found)
            },
            |path| {
                let mut found = usual(path)?;
                if path.ends_with("/ztunnel-a") {
                    found["spec"]["nodeName"] = json!("");
                }
                Some(found)
            },
        ];
        for answers in cases {
            let (cluster, _, _dir) = cluster(answers).await;
            let refusal = ask(&cluster, wanted, &["istio-system/ztunnel"]).await.unwrap_err();
            assert!(matches!(refusal, Refusal::Proof(_)), "{refusal:?}");
        }
    }
}
