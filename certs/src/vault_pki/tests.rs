//! Against a small PKI engine over HTTP that signs as Vault does. No registry holds the real one ready to run; where
//! `POSTERN_TEST_VAULT` and `POSTERN_TEST_VAULT_TOKEN` name one, it is asked, too.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::sync::{Arc, Mutex};

use http::HeaderValue;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use super::*;
use crate::ca::authority::pem;
use crate::ca::csr::PublicKey;
use crate::clock::SystemClock;
use crate::http::{Question, Server};
use crate::mesh::MeshIdentity;
use crate::renewing::Renewing;
use crate::source::Following;
use crate::testing::{Ca, until, until_is};
use crate::token::Token;
use crate::workload::time::MeshTime;

const HOUR: Duration = Duration::from_secs(3600);

struct Engine {
    ca: Ca,
    token: Mutex<String>,
    /// In place of what it would answer.
    answer: Mutex<Option<(u16, Value)>>,
    /// Whether it holds its root.
    root: bool,
    longest: Duration,
}

impl Engine {
    fn new() -> Self {
        Self {
            ca: Ca::new("mesh.test"),
            token: Mutex::new("static".to_owned()),
            answer: Mutex::default(),
            root: true,
            longest: 24 * HOUR,
        }
    }

    async fn serve(self) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let engine = Arc::new(self);
        let shared = engine.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let engine = shared.clone();
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let field = |name: &str| {
                        let value = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                        value.unwrap_or_default().to_owned()
                    };
                    let mut body = vec![0; field("content-length").parse().unwrap()];
                    stream.read_exact(&mut body).await.unwrap();
                    let target = head.split(' ').nth(1).unwrap();
                    let body = serde_json::from_slice(&body).unwrap();
                    let (status, answer) = engine.answer(target, &field("x-vault-token"), &body);
                    let (answer, close) = (answer.to_string(), "connection: close");
                    let length = answer.len();
                    let answer =
                        format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{close}\r\n\r\n{answer}");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        (engine, url)
    }

    fn answer(&self, target: &str, token: &str, body: &Value) -> (u16, Value) {
        if let Some(answer) = self.answer.lock().unwrap().take() {
            return answer;
        }
        match target {
            "/v1/auth/approle/login" if body["role_id"] == "role" && body["secret_id"] == "secret" => {
                *self.token.lock().unwrap() = "by login".to_owned();
                (200, json!({"auth": {"client_token": "by login", "lease_duration": 60}}))
            }
            "/v1/auth/approle/login" => (400, json!({"errors": ["invalid role or secret ID"]})),
            _ if token != *self.token.lock().unwrap() => (403, json!({"errors": ["permission denied"]})),
            "/v1/mesh/pki/sign/web" => {
                let csr = body["csr"].as_str().unwrap();
                let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap();
                let identity = body["uri_sans"].as_str().unwrap().parse().unwrap();
                let ttl = body["ttl"].as_str().map_or(self.longest, |ttl| {
                    Duration::from_secs(ttl.trim_end_matches('s').parse().unwrap()).min(self.longest)
                });
                let issued = self.ca.sign(&PublicKey::from_csr(&der).unwrap(), &identity, ttl);
                let issuer = pem(self.ca.issuer.certificate());
                let mut chain = vec![issuer.clone()];
                if self.root {
                    chain.push(pem(&self.ca.root_der()));
                }
                let data =
                    json!({"certificate": pem(&issued.chain[0]), "issuing_ca": issuer, "ca_chain": chain});
                (200, json!({"data": data, "lease_id": "", "warnings": null}))
            }
            _ => (404, json!({"errors": []})),
        }
    }
}

fn settings(url: &str, folder: &std::path::Path) -> Settings {
    std::fs::write(folder.join("token"), "static\n").unwrap();
    Settings {
        address: url.to_owned(),
        mount: "mesh/pki".to_owned(),
        role: "web".to_owned(),
        auth: Auth::Token(Token::File(folder.join("token"))),
        namespace: None,
        ca_file: None,
        roots_file: None,
        ttl_seconds: Some(3600),
    }
}

fn follow(settings: Settings) -> (MeshIdentity, Following) {
    let time = MeshTime::new(SystemClock::new());
    let identity = MeshIdentity::with_clock(time.clone());
    let own = "spiffe://mesh.test/ns/default/sa/web".parse().unwrap();
    let source = Renewing::new(VaultPki::new(settings).unwrap(), Some(own), time);
    (identity.clone(), Following::start(Box::new(source), identity))
}

#[tokio::test]
async fn a_role_signs_for_a_token_and_for_an_app_role() {
    let folder = tempfile::tempdir().unwrap();
    let (_engine, url) = Engine::new().serve().await;
    let by_token = settings(&url, folder.path());
    std::fs::write(folder.path().join("secret"), "secret").unwrap();
    let role = AppRole {
        role_id: "role".to_owned(),
        secret_id: Token::File(folder.path().join("secret")),
        mount: "approle".to_owned(),
    };
    let by_role = Settings { auth: Auth::AppRole(role), ..by_token.clone() };
    for settings in [by_token, by_role] {
        let (identity, following) = follow(settings);
        until_is(&identity, "an identity", |it| it.svid().is_some()).await;
        let svid = identity.svid().unwrap();
        assert_eq!(svid.chain().len(), 2, "the root is no part of the chain");
        assert!(svid.left(SystemTime::now()) <= HOUR);
        assert_eq!(identity.trust().unwrap().roots("mesh.test").count(), 1);
        assert_eq!(following.standing().borrow().notice, None);
    }
}

/// Asks the real one for something to be done, as an administrator.
async fn administer(url: &str, path: &str, body: Value) -> Value {
    let server = Server::new(url, Arc::new(rustls::RootCertStore::empty())).unwrap();
    let token = HeaderValue::from_str(&std::env::var("POSTERN_TEST_VAULT_TOKEN").unwrap()).unwrap();
    let target = format!("/v1/{path}");
    let question = Question::post(&target, &body, HOUR).with("x-vault-token", Some(token));
    let answer = server.ask(question).await.unwrap();
    serde_json::from_slice(answer.body()).unwrap_or_default()
}

#[tokio::test]
async fn a_real_vault_signs_by_a_role_as_it_is_written_down() {
    let Ok(url) = std::env::var("POSTERN_TEST_VAULT") else {
        return eprintln!("skipped: POSTERN_TEST_VAULT names no Vault");
    };
    let id = std::process::id();
    let (mount, auth) = (format!("postern-pki-{id}"), format!("postern-approle-{id}"));
    let root = json!({"common_name": "mesh root", "ttl": "87600h", "key_type": "ec"});
    let role = json!({
        "key_type": "ec", "require_cn": false, "allowed_uri_sans": "spiffe://mesh.test/ns/default/sa/web",
        "key_usage": "DigitalSignature", "ext_key_usage": "", "server_flag": true, "client_flag": true,
        "max_ttl": "24h",
    });
    let policy = format!("path \"{mount}/sign/web\" {{ capabilities = [\"update\"] }}");
    let may = json!({"token_policies": format!("postern-{id}")});
    for (path, body) in [
        (format!("sys/mounts/{mount}"), json!({"type": "pki", "config": {"max_lease_ttl": "87600h"}})),
        (format!("{mount}/root/generate/internal"), root),
        (format!("{mount}/roles/web"), role),
        (format!("sys/policies/acl/postern-{id}"), json!({"policy": policy})),
        (format!("sys/auth/{auth}"), json!({"type": "approle"})),
        (format!("auth/{auth}/role/web"), may),
    ] {
        administer(&url, &path, body).await;
    }
    let secret = administer(&url, &format!("auth/{auth}/role/web/secret-id"), json!({})).await;
    let server = Server::new(&url, Arc::new(rustls::RootCertStore::empty())).unwrap();
    let token = HeaderValue::from_str(&std::env::var("POSTERN_TEST_VAULT_TOKEN").unwrap()).unwrap();
    let target = format!("/v1/auth/{auth}/role/web/role-id");
    let role = server.ask(Question::get(&target, HOUR).with("x-vault-token", Some(token))).await.unwrap();
    let role: Value = serde_json::from_slice(role.body()).unwrap();
    let text = |value: &Value, name: &str| value["data"][name].as_str().unwrap().to_owned();

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, text(&secret, "secret_id")).unwrap();
    let role = AppRole { role_id: text(&role, "role_id"), secret_id: Token::File(file), mount: auth };
    let by_role = Settings { mount, auth: Auth::AppRole(role), ..settings(&url, folder.path()) };
    let (identity, _following) = follow(by_role.clone());
    until_is(&identity, "an identity", |it| it.svid().is_some()).await;
    assert_eq!(identity.svid().unwrap().chain().len(), 1, "the root is no part of the chain");
    assert!(identity.svid().unwrap().left(SystemTime::now()) <= HOUR);
    let (_, following) = follow(Settings { role: "other".to_owned(), ..by_role });
    let problem = until(&mut following.standing(), "a refusal", |it| it.problem.clone()).await;
    assert!(problem.contains("may the token update") && problem.contains("sign/other?"), "{problem}");
}

#[tokio::test]
async fn a_life_that_is_cut_short_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (_engine, url) = Engine { longest: HOUR / 4, ..Engine::new() }.serve().await;
    let (identity, following) = follow(settings(&url, folder.path()));
    let notice = until(&mut following.standing(), "told", |it| it.notice.clone()).await;
    assert!(notice.contains("asked for were 3600 s"), "{notice}");
    assert!(identity.svid().is_some(), "it is taken all the same");
}

#[tokio::test]
async fn a_root_that_the_engine_does_not_hold_comes_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, url) = Engine { root: false, ..Engine::new() }.serve().await;
    let settings = settings(&url, folder.path());
    let (_, following) = follow(settings.clone());
    let problem = until(&mut following.standing(), "told", |it| it.problem.clone()).await;
    assert!(problem.contains("roots_file"), "{problem}");
    let file = folder.path().join("roots.pem");
    std::fs::write(&file, pem(&engine.ca.root_der())).unwrap();
    let (identity, _following) = follow(Settings { roots_file: Some(file), ..settings });
    until_is(&identity, "an identity", |it| it.svid().is_some()).await;
}

#[tokio::test]
async fn refusals_are_told_with_what_to_look_at_and_repeated() {
    for (answer, expected) in [
        ((403, json!({"errors": ["permission denied"]})), "may the token update mesh/pki/sign/web?"),
        ((404, json!({"errors": []})), "is mesh/pki/sign/web there?"),
        ((400, json!({"errors": ["URI SAN not allowed by this role"]})), "not allowed by this role"),
        ((503, json!({"errors": ["Vault is sealed"]})), "Vault is sealed"),
        ((200, json!({"data": {}})), "cannot be read"),
        ((200, json!({"data": {"certificate": "text"}})), "vault's certificate"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (engine, url) = Engine::new().serve().await;
        *engine.answer.lock().unwrap() = Some(answer);
        let (identity, following) = follow(settings(&url, folder.path()));
        let problem = until(&mut following.standing(), expected, |it| it.problem.clone()).await;
        assert!(problem.contains(expected), "{expected}: {problem}");
        until_is(&identity, "the next attempt", |it| it.svid().is_some()).await;
    }
}

#[test]
fn settings_that_cannot_work_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let base = settings("http://127.0.0.1:8200", folder.path());
    assert!(VaultPki::new(base.clone()).is_ok());
    for (change, expected) in [
        (Settings { mount: "a/../b".to_owned(), ..base.clone() }, "mount: `a/../b`"),
        (Settings { role: "a?b".to_owned(), ..base.clone() }, "role: `a?b`"),
        (Settings { address: "vault:8200".to_owned(), ..base.clone() }, "address: `vault:8200`"),
        (Settings { namespace: Some("a\nb".to_owned()), ..base }, "namespace: "),
    ] {
        let error = VaultPki::new(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
