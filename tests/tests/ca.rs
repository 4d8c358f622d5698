//! The certificate authority as a process: tokens by its command line, certificates over its socket, its log, its end.

use std::time::Duration;

use certs::workload::Proof;
use e2e::ca::Authority;
use e2e::client::Call;
use e2e::consul::{self, Consul};
use e2e::{eventually_within, json};

const ORDERS: &str = "spiffe://mesh.local/ns/default/sa/orders";

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_joins_and_keeps_its_certificate_over_restarts_of_the_authority() {
    let mut ca = Authority::start(json!({})).await;
    let told = ca.told().await;
    assert_eq!((&told["ready"], &told["trust_domain"]), (&json!(true), &json!("mesh.local")));
    assert!(ca.output().contains(told["pin"].as_str().unwrap()), "{}", ca.output());

    let token = ca.token(ORDERS);
    let member = ca.join(Proof::JoinToken(token.clone().into()), "orders-1");
    member.until(1).await;
    let svid = member.identity.svid().unwrap();
    assert_eq!(svid.id().as_str(), ORDERS);
    let left = svid.left(std::time::SystemTime::now());
    assert!(left > Duration::from_secs(86_000) && left <= Duration::from_secs(86_400), "{left:?}");

    let thief = ca.join(Proof::JoinToken(token.into()), "orders-2");
    eventually_within(Duration::from_secs(30), "the second use is refused", || {
        let refused = thief.status().last_error.is_some_and(|(_, reason)| reason.contains("used already"));
        async move { refused.then_some(()) }
    })
    .await;
    drop(thief);

    ca.kill();
    member.workload.renew_now();
    eventually_within(Duration::from_secs(30), "nobody is there", || {
        let failed = member.status().failures >= 1;
        async move { failed.then_some(()) }
    })
    .await;
    assert!(member.identity.svid().is_some(), "what it has is still good");
    ca.run().await;
    assert_eq!(ca.told().await["pin"], told["pin"], "the key of the channel is kept");
    assert_eq!(ca.told().await["roots"], told["roots"]);
    member.until(2).await;
    eventually_within(Duration::from_secs(90), "the trust is followed", || {
        let following = member.status().following;
        async move { following.then_some(()) }
    })
    .await;
    let metrics = Call::get("/metrics").send_to(ca.status).await.text();
    assert!(
        metrics.contains("mesh_ca_requests_total{rpc=\"sign\",attestor=\"renewal\",code=\"ok\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("mesh_ca_workloads 1"), "{metrics}");

    assert_eq!(ca.stop().await, Some(0));
    let (code, out, err) = ca.command(&["audit", "verify", "-o", "json"]);
    assert_eq!(code, 0, "{err}");
    let whole: e2e::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(whole["whole"], json!(true));
    let log = ca.data().join("audit.log");
    let text = std::fs::read_to_string(&log).unwrap();
    for word in ["token.create", "\"attest\"", "\"sign\"", "used already", "\"stop\""] {
        assert!(text.contains(word), "{word}: {text}");
    }
    std::fs::write(&log, text.replace("orders-1", "orders-9")).unwrap();
    let (code, _, err) = ca.command(&["audit", "verify"]);
    assert_eq!(code, 1);
    assert!(err.contains("is not one that was written"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_and_deleted_and_keys_on_disk_are_sealed() {
    let mut ca = Authority::start(json!({"longest_ttl": 3600})).await;
    let create =
        ["token", "create", "--identity", "spiffe://mesh.local/ns/default/*", "--uses", "3", "-o", "json"];
    let (code, out, err) = ca.command(&create);
    assert_eq!(code, 0, "{err}");
    let made: e2e::Value = serde_json::from_str(&out).unwrap();
    let (_, out, _) = ca.command(&["token", "list", "-o", "json"]);
    let listed: e2e::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["tokens"][0]["id"], made["id"]);
    assert_eq!(listed["tokens"][0]["uses_left"], json!(3));
    let (code, _, _) = ca.command(&["token", "delete", made["id"].as_str().unwrap()]);
    assert_eq!(code, 0);
    let (code, _, err) = ca.command(&["token", "delete", made["id"].as_str().unwrap()]);
    assert_eq!(code, 1, "{err}");
    for wrong in ["spiffe://other.test/a", "orders", "*"] {
        let (code, _, err) = ca.command(&["token", "create", "--identity", wrong]);
        assert_eq!(code, 1, "{wrong}: {err}");
    }

    use std::os::unix::fs::PermissionsExt;
    let secret = made["token"].as_str().unwrap();
    let mut files = vec![ca.data()];
    let mut sealed = Vec::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let Ok(bytes) = std::fs::read(&path) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains("PRIVATE KEY") && !text.contains(secret), "{}", path.display());
        if path.extension().is_some_and(|extension| extension == "key") {
            assert_eq!(
                std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o600,
                "{}",
                path.display()
            );
            sealed.push(path);
        }
    }
    assert_eq!(sealed, [ca.data().join("seal.key")], "the one key that is no value of the store");

    // A second process does not get at the same directory.
    let other = ca.folder().join("other.yaml");
    let settings = json!({"listen": "127.0.0.1:0", "status": "off", "data_dir": ca.data()});
    std::fs::write(&other, settings.to_string()).unwrap();
    let (code, _, err) = e2e::edge::run(&["ca", "run", "-c", other.to_str().unwrap()]);
    assert_eq!(code, 3);
    assert!(err.contains("held by another process"), "{err}");
    assert_eq!(ca.stop().await, Some(0));
    let (code, _, err) = ca.command(&["token", "list"]);
    assert_eq!(code, 3);
    assert!(err.contains("is `postern ca run` running?"), "{err}");
}

#[test]
fn wrong_settings_are_told_with_their_places_and_nothing_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.yaml");
    std::fs::write(&file, "trust_domain: Mesh\nlisten: nowhere\nrot: 1\n").unwrap();
    let (code, _, err) = e2e::edge::run(&["ca", "run", "-c", folder.path().to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("ca.yaml:3"), "{err}");
    assert!(!folder.path().join("postern-ca").exists());
}

/// With the real Consul: the services of an ACL token say who somebody is.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_consul_is_a_proof_of_its_services() {
    if !consul::is_there() {
        return;
    }
    let master = "9f5c7d1e-0000-4000-8000-000000000001";
    let acl =
        json!({"enabled": true, "default_policy": "deny", "tokens": {"master": master, "agent": master}});
    let consul = Consul::with(json!({ "acl": acl })).await;
    let secret = |number: u32| format!("9f5c7d1e-0000-4000-8000-00000000001{number}");
    let tokens = [
        (1, json!([{"ServiceName": "orders"}])),
        (2, json!([{"ServiceName": "orders"}, {"ServiceName": "billing", "Datacenters": ["dc1"]}])),
        (3, json!([])),
    ];
    for (number, services) in tokens {
        consul
            .put("/v1/acl/token", &json!({"SecretID": secret(number), "ServiceIdentities": services}))
            .await;
    }
    let ca = Authority::start(json!({"consul": {"server": consul.url(), "datacenter": "dc1"}})).await;
    let file = |name: &str, token: String| {
        let path = ca.folder().join(name);
        std::fs::write(&path, token).unwrap();
        path
    };
    let one = ca.join(Proof::ConsulTokenFile(file("one", secret(1)), String::new()), "orders-1");
    let two = ca.join(Proof::ConsulTokenFile(file("two", secret(2)), "billing".to_owned()), "billing-1");
    one.until(1).await;
    two.until(1).await;
    assert_eq!(one.identity.svid().unwrap().id().as_str(), ORDERS);
    assert_eq!(two.identity.svid().unwrap().id().as_str(), "spiffe://mesh.local/ns/default/sa/billing");
    let refused = [
        ("of no service", secret(3), "", "is for no service"),
        ("unknown", secret(9), "", "does not know the ACL token"),
        ("of another service", secret(1), "billing", "and not for billing"),
        ("of several", secret(2), "", "say which service"),
    ];
    for (what, token, service, words) in refused {
        let proof = Proof::ConsulTokenFile(file("refused", token), service.to_owned());
        let member = ca.join(proof, "refused-1");
        eventually_within(Duration::from_secs(30), what, || {
            let refused = member.status().last_error.is_some_and(|(_, reason)| reason.contains(words));
            async move { refused.then_some(()) }
        })
        .await;
        assert!(member.identity.svid().is_none(), "{what}");
    }
}
