//! A root whose key somebody else has: Vault, or an issuer of cert-manager.
//!
//! `POSTERN_TEST_VAULT=http://127.0.0.1:8200` and `POSTERN_TEST_VAULT_TOKEN=TOKEN` run the first test against a real Vault or
//! OpenBao. It mounts engines of its own.

use std::time::Duration;

use certs::workload::Proof;
use e2e::ca::{Authority, Member, Watcher};
use e2e::certs::Authority as Company;
use e2e::client::Call;
use e2e::kube::{Kind, KubeApi};
use e2e::vault::{POOR_TOKEN, TOKEN, Vault};
use e2e::{Value, eventually_within, json};

const QUICK: [&str; 6] = ["--soak", "200ms", "--spread", "500ms", "--timeout", "60s"];

fn limits() -> Value {
    json!({"certificates_per_second": 1000.0, "certificates_burst": 1000})
}

async fn members(authority: &Authority, count: usize) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 0..count {
        let token = authority.token(&format!("spiffe://mesh.local/ns/shop/sa/s{number}"));
        let member = authority.join(Proof::JoinToken(token.into()), &format!("p{number}"));
        member.until(1).await;
        members.push(member);
    }
    eventually_within(Duration::from_secs(30), "the authority knows them", || async {
        (authority.certs_status().await["fleet"]["current"] == count).then_some(())
    })
    .await;
    members
}

/// The root in use, and the issuer that signs.
async fn in_use(authority: &Authority) -> (Value, Value) {
    let status = authority.certs_status().await;
    let one = |list: &str, state: &str| {
        let mut all = status[list].as_array().expect("a list").iter();
        all.rfind(|one| one["state"] == state).expect(state).clone()
    };
    (one("roots", "active"), one("issuers", "signing"))
}

/// A Vault with an engine at `mount`: the small one, or a real one.
enum Engine {
    Small(Vault),
    Real { url: String, token: String, mount: String },
}

impl Engine {
    async fn start() -> Engine {
        let Ok(url) = std::env::var("POSTERN_TEST_VAULT") else { return Engine::Small(Vault::start().await) };
        let token = std::env::var("POSTERN_TEST_VAULT_TOKEN").expect("POSTERN_TEST_VAULT_TOKEN");
        let engine = Engine::Real { url, token, mount: format!("postern-test-{}", std::process::id()) };
        let Engine::Real { mount, .. } = &engine else { unreachable!() };
        let config = json!({"type": "pki", "config": {"max_lease_ttl": "87600h"}});
        engine.post(&format!("sys/mounts/{mount}"), config).await;
        engine.make_root("root 1").await;
        engine
    }

    async fn post(&self, path: &str, body: Value) {
        let Engine::Real { url, token, .. } = self else { return };
        let addr = url.trim_start_matches("http://").parse().expect("http://ADDRESS:PORT");
        let call = Call::new("POST", &format!("/v1/{path}")).header("x-vault-token", token).json(&body);
        let answer = call.send_to(addr).await;
        assert!(answer.status / 100 == 2, "{path}: {}", answer.text());
    }

    /// A new root, which signs from now on.
    async fn make_root(&self, name: &str) {
        match self {
            Engine::Small(vault) => vault.replace_root(name),
            Engine::Real { mount, .. } => {
                let body = json!({"common_name": name, "ttl": "87000h", "key_type": "ec", "key_bits": 256,
                    "issuer_name": name.replace(' ', "-")});
                self.post(&format!("{mount}/root/generate/internal"), body).await;
                let body = json!({"default": name.replace(' ', "-")});
                self.post(&format!("{mount}/config/issuers"), body).await;
            }
        }
    }

    fn settings(&self, authority: &Authority) -> Value {
        let file = authority.folder().join("vault-token");
        let (address, mount, token) = match self {
            Engine::Small(vault) => (vault.uri(), "pki", TOKEN),
            Engine::Real { url, token, mount } => (url.clone(), mount.as_str(), token.as_str()),
        };
        std::fs::write(&file, token).expect("a token");
        json!({"vault": {"address": address, "mount": mount, "token_file": file, "timeout": 5}})
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_of_the_root_goes_to_vault_and_issuers_come_from_there() {
    let engine = Engine::start().await;
    let mut authority = Authority::start(json!({"limits": limits()})).await;
    let members = members(&authority, 2).await;
    let watcher = Watcher::start(&members);
    let (own, _) = in_use(&authority).await;

    // Nobody is named.
    let (code, _, err) = authority.certs(&["rotate", "root", "--vault"]).await;
    assert_eq!((code, err.contains("root: {vault: {...}}")), (1, true), "{err}");
    let settings = engine.settings(&authority);
    authority.configure("root", settings);
    assert_eq!(authority.stop().await, Some(0));
    authority.run().await;

    // A plan has nothing signed and writes nothing.
    let (code, out, err) = authority.certs(&["rotate", "root", "--vault", "--plan"]).await;
    assert_eq!(code, 0, "{out} {err}");
    assert!(out.contains("lets the token update") && out.contains("its root is"), "{out}");
    assert!(authority.certs_status().await["rotation"].is_null());
    if let Engine::Small(vault) = &engine {
        assert_eq!(vault.signed(), 0);
    }

    // Over to Vault: those who know the old root alone are led by its signature.
    let (code, out, err) = authority.certs(&[&["rotate", "root", "--vault"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "{out} {err}");
    let (first, issuer) = in_use(&authority).await;
    assert_ne!(first["fingerprint"], own["fingerprint"]);
    assert_eq!(first["key"], false);
    assert!(first["kept"].as_str().is_some_and(|kept| kept.starts_with("vault http")), "{first}");
    let notes = authority.certs_status().await["past"][0]["events"].to_string();
    assert!(!notes.contains("not signed over"), "{notes}");

    // An issuer comes from there, and a root that is in use already is not a new one.
    let (code, out, err) = authority.certs(&[&["rotate", "issuer"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_ne!(in_use(&authority).await.1["id"], issuer["id"]);
    for args in [&["rotate", "root", "--vault"][..], &["rotate", "root"], &["rotate", "root", "--plan"]] {
        let (code, _, err) = authority.certs(args).await;
        assert_eq!((code, err.contains("make a new root there first")), (1, true), "{args:?}: {err}");
    }

    // Vault has got another root: issuers are not taken from it before the root is exchanged.
    engine.make_root("root 2").await;
    let (code, _, err) = authority.certs(&["rotate", "issuer"]).await;
    assert_eq!((code, err.contains("`postern certs rotate root --vault`")), (1, true), "{err}");
    assert!(authority.certs_status().await["rotation"].is_null());
    let (code, out, err) = authority.certs(&[&["rotate", "root"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_ne!(in_use(&authority).await.0["fingerprint"], first["fingerprint"]);

    // And back.
    let (code, out, err) = authority.certs(&[&["rotate", "root", "--own"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_eq!(in_use(&authority).await.0["key"], true);
    watcher.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_is_founded_below_the_root_of_vault_and_goes_on_while_vault_is_away() {
    let engine = Engine::Small(Vault::start().await);
    let Engine::Small(vault) = &engine else { unreachable!() };
    let authority = Authority::found(
        json!({"limits": limits()}),
        |authority| json!({"root": engine.settings(authority)}),
    )
    .await;
    let (root, issuer) = in_use(&authority).await;
    assert_eq!((&root["key"], vault.signed()), (&json!(false), 1));
    let members = members(&authority, 2).await;
    let watcher = Watcher::start(&members);

    // Away, and a token that may not: told with what to do, and nothing has changed.
    vault.seal(true);
    let (code, _, err) = authority.certs(&["rotate", "issuer"]).await;
    assert_eq!((code, err.contains("Vault is sealed")), (1, true), "{err}");
    let (code, _, err) = authority.certs(&["rotate", "issuer", "--plan"]).await;
    assert_eq!((code, err.contains("Vault is sealed")), (1, true), "{err}");
    let (code, out, err) = authority.certs(&[&["rotate", "leaf"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "workloads renew: {out} {err}");
    vault.seal(false);
    std::fs::write(authority.folder().join("vault-token"), POOR_TOKEN).expect("a token");
    for args in [&["rotate", "issuer"][..], &["rotate", "issuer", "--plan"]] {
        let (code, _, err) = authority.certs(args).await;
        let words = "update pki/root/sign-intermediate";
        assert_eq!((code, err.contains(words)), (1, true), "{args:?}: {err}");
    }
    let (same_root, same_issuer) = in_use(&authority).await;
    assert_eq!((&same_root["fingerprint"], &same_issuer["id"]), (&root["fingerprint"], &issuer["id"]));
    assert_eq!(vault.signed(), 1);
    std::fs::write(authority.folder().join("vault-token"), TOKEN).expect("a token");
    let (code, out, err) = authority.certs(&[&["rotate", "issuer"][..], &QUICK].concat()).await;
    assert_eq!(code, 0, "{out} {err}");
    watcher.finish();
    for told in [authority.output(), authority.written()] {
        assert!(!told.contains(TOKEN), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cert_manager_signs_when_somebody_approves_and_a_killed_authority_goes_on_with_its_request() {
    let kube = KubeApi::start().await;
    kube.accept_tokens(&["account"]);
    let root = Company::new("the root of the company");
    let mut authority = Authority::start(json!({"limits": limits()})).await;
    let members = members(&authority, 2).await;
    let watcher = Watcher::start(&members);
    let token = authority.folder().join("account-token");
    std::fs::write(&token, "account").expect("a token");
    authority.configure(
        "root",
        json!({"cert_manager": {
            "namespace": "mesh", "issuer": {"name": "company", "kind": "ClusterIssuer"}, "wait": 1,
            "server": format!("http://{}", kube.addr), "token_file": token,
        }}),
    );
    assert_eq!(authority.stop().await, Some(0));
    authority.run().await;

    // Looked at without asking for anything.
    let plan = ["rotate", "root", "--cert-manager", "--plan"];
    let (code, _, err) = authority.certs(&plan).await;
    assert_eq!((code, err.contains("there is no ClusterIssuer company")), (1, true), "{err}");
    let ready = json!([{"type": "Ready", "status": "True", "message": "verified"}]);
    let issuer = json!({"metadata": {"name": "company"}, "status": {"conditions": ready}});
    kube.put(Kind::CLUSTER_ISSUER, issuer);
    let (code, out, err) = authority.certs(&plan).await;
    assert_eq!(
        (code, out.contains("ClusterIssuer company of the cluster is ready")),
        (0, true),
        "{out} {err}"
    );
    assert_eq!(kube.certificate_requests().len(), 0);

    // Nobody approves it; the authority is killed; the same request is gone on with.
    let rotate = [&["rotate", "root", "--cert-manager"][..], &QUICK].concat();
    let (code, _, err) = authority.certs(&rotate).await;
    assert_eq!((code, err.contains("cmctl approve")), (1, true), "{err}");
    assert!(authority.certs_status().await["rotation"].is_null());
    authority.kill();
    authority.run().await;
    assert_eq!(kube.sign_requests(&root), 1);
    let (code, out, err) = authority.certs(&rotate).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_eq!(kube.certificate_requests().len(), 1, "the same request");
    let (held, issuer) = in_use(&authority).await;
    assert!(held["kept"].as_str().is_some_and(|kept| kept.starts_with("cert-manager ")), "{held}");

    // A request that was denied is not asked again; the next is another, with another key.
    let rotate = [&["rotate", "issuer"][..], &QUICK].concat();
    assert_eq!(authority.certs(&rotate).await.0, 1);
    assert_eq!(kube.deny_requests(), 1);
    let (code, _, err) = authority.certs(&rotate).await;
    assert_eq!((code, err.contains("not for this namespace")), (1, true), "{err}");
    assert_eq!(authority.certs(&rotate).await.0, 1);
    assert_eq!(kube.sign_requests(&root), 1);
    let (code, out, err) = authority.certs(&rotate).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_eq!(kube.certificate_requests().len(), 3);
    let (same, new) = in_use(&authority).await;
    assert_eq!(same["fingerprint"], held["fingerprint"]);
    assert_ne!(new["id"], issuer["id"]);

    // A cluster that does not let it.
    kube.forbids("certificaterequests");
    let (code, _, err) = authority.certs(&["rotate", "issuer"]).await;
    assert_eq!((code, err.contains("may the service account create")), (1, true), "{err}");
    watcher.finish();
}
