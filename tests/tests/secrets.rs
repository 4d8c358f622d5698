//! Secrets that a manager keeps: used, renewed, and refused where they cannot be had.

use e2e::client::Call;
use e2e::origin::echo;
use e2e::vault::{TOKEN, Vault};
use e2e::{Edge, Value, eventually, json};

fn manager(vault: &Vault, prefix: &str) -> Value {
    json!({"uri": vault.uri(), "prefix": prefix, "token": TOKEN})
}

async fn status(edge: &Edge, key: &str) -> u16 {
    edge.send(Call::get("/").header("apikey", key)).await.status
}

async fn until(edge: &Edge, key: &str, expected: u16) {
    let what = format!("{key} is answered {expected}");
    eventually(&what, async || (status(edge, key).await == expected).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_of_vault_is_used_and_renewed_and_outlives_vault() {
    let (vault, origin) = (Vault::start().await, echo::start().await);
    vault.write("kv/apisix/jack", json!({"key": "first"}));
    vault.write("secret/data/apisix/jill", json!({"key": "of-jill"}));
    let edge = Edge::embedded().start().await;
    edge.put("secrets/vault/1", manager(&vault, "kv/apisix")).await;
    edge.put("secrets/vault/2", manager(&vault, "secret/data/apisix")).await;
    for (name, reference) in [("jack", "$secret://vault/1/jack/key"), ("jill", "$secret://vault/2/jill/key")]
    {
        let consumer = json!({"username": name, "plugins": {"key-auth": {"key": reference}}});
        let answer = edge.put(&format!("consumers/{name}"), consumer).await;
        assert!(answer.text().contains(reference), "the secret is not shown: {answer:?}");
    }
    edge.put("routes/1", json!({"uri": "/*", "plugins": {"key-auth": {}}, "upstream": origin.upstream()}))
        .await;
    until(&edge, "first", 200).await;
    assert_eq!(status(&edge, "of-jill").await, 200);
    assert_eq!(status(&edge, "$secret://vault/1/jack/key").await, 401, "a reference is no secret");

    // A changed manager is asked again at once.
    vault.write("kv/apisix/jack", json!({"key": "second"}));
    let mut changed = manager(&vault, "kv/apisix/");
    changed["namespace"] = "team".into();
    edge.put("secrets/vault/1", changed).await;
    until(&edge, "second", 200).await;
    assert_eq!(status(&edge, "first").await, 401);

    vault.seal(true);
    edge.put("secrets/vault/1", manager(&vault, "kv/apisix")).await;
    let asked = vault.requests();
    eventually("vault is asked in vain", async || (vault.requests() > asked).then_some(())).await;
    assert_eq!(status(&edge, "second").await, 200, "what is known stays in use");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_cannot_be_had_refuses_its_object() {
    let (vault, origin) = (Vault::start().await, echo::start().await);
    vault.write("kv/apisix/jack", json!({"key": "k"}));
    let edge = Edge::embedded().start().await;
    edge.put("secrets/vault/1", manager(&vault, "kv/apisix")).await;
    edge.put("secrets/vault/2", json!({"uri": vault.uri(), "prefix": "kv/apisix", "token": "wrong"})).await;
    for (reference, reason) in [
        ("$secret://vault/1/nobody/key", "vault has nothing at kv/apisix/nobody"),
        ("$secret://vault/1/jack/other", "`other` is not in"),
        ("$secret://vault/2/jack/key", "does not let this token read"),
        ("$secret://vault/9/jack/key", "there is no secrets/vault/9"),
        ("$secret://vault/1/../sys/key", "not the name of a secret"),
        ("$secret://vault", "write it as"),
    ] {
        let consumer = json!({"username": "jack", "plugins": {"key-auth": {"key": reference}}});
        let answer = edge.call_admin("PUT", "consumers/jack", Some(&consumer)).await;
        assert_eq!(answer.status, 400, "{reference}: {answer:?}");
        assert!(answer.text().contains(reason), "{reference}: {answer:?}");
        assert!(answer.text().contains("/plugins/key-auth/key"), "{reference}: {answer:?}");
    }
    drop(origin);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_may_refer_to_a_vault_that_comes_later() {
    let (vault, origin) = (Vault::start().await, echo::start().await);
    vault.seal(true);
    vault.write("kv/apisix/jack", json!({"key": "k"}));
    let mut secret = manager(&vault, "kv/apisix");
    secret["id"] = "vault/1".into();
    let edge = Edge::file()
        .resources(json!({
            "secrets": [secret],
            "consumers": [{"username": "jack", "plugins": {"key-auth": {"key": "$secret://vault/1/jack/key"}}}],
            "routes": [{"id": "1", "uri": "/*", "plugins": {"key-auth": {}}, "upstream": origin.upstream()}],
        }))
        .start()
        .await;
    assert_eq!(status(&edge, "k").await, 401);
    vault.seal(false);
    until(&edge, "k", 200).await;
}
