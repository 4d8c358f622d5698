//! Tokens that the gateway signs, verified by another implementation (npm `jose`) with the served key set alone.

use e2e::client::Call;
use e2e::origin::echo;
use e2e::{Answer, Edge, Value, eventually, json, node};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256, SignatureAlgorithm};

const VERIFY: &str = "
    const jose = require('jose');
    const [token, set] = process.argv.slice(-2);
    jose.jwtVerify(token, jose.createLocalJWKSet(JSON.parse(set)), {issuer: 'gateway', audience: 'shop'})
        .then(({payload, protectedHeader}) => console.log(JSON.stringify({payload, header: protectedHeader})));
";

fn key(kid: &str, algorithm: &str, kind: &'static SignatureAlgorithm) -> Value {
    let pem = KeyPair::generate_for(kind).expect("a key").serialize_pem();
    json!({"kid": kid, "algorithm": algorithm, "private_key": pem})
}

/// The token that the origin got.
fn token(answer: &Answer) -> String {
    answer.json()["headers"]["x-bkapi-jwt"][0].as_str().expect("a token").to_owned()
}

#[tokio::test]
async fn keys_rotate_without_a_restart_and_old_tokens_stay_good() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    let keys = [
        key("rsa", "RS256", &PKCS_RSA_SHA256),
        key("pss", "PS256", &PKCS_RSA_SHA256),
        key("p256", "ES256", &PKCS_ECDSA_P256_SHA256),
        key("ed", "EdDSA", &PKCS_ED25519),
    ];
    edge.put("plugin_metadata/jwt-issue", json!({"keys": [keys[0]]})).await;
    edge.put("consumers/ann", json!({"username": "ann", "plugins": {"key-auth": {"key": "k"}}})).await;
    edge.put(
        "routes/keys",
        json!({"uri": "/keys", "plugins": {"public-api": {"uri": "/apisix/plugin/jwt-issue/jwks"}}}),
    )
    .await;
    let plugins = json!({"key-auth": {}, "jwt-issue": {"issuer": "gateway", "audience": "shop"}});
    edge.put("routes/a", json!({"uri": "/a", "plugins": plugins, "upstream": origin.upstream()})).await;
    let get = || edge.send(Call::get("/a").header("apikey", "k").header("x-bkapi-jwt", "forged"));
    let mut tokens = Vec::new();
    for first in 0..keys.len() {
        let mut order = keys.to_vec();
        order.rotate_left(first);
        edge.put("plugin_metadata/jwt-issue", json!({"keys": order})).await;
        let kid = keys[first]["kid"].as_str().unwrap();
        let set = eventually(&format!("the set begins with {kid}"), || async {
            let set = edge.get("/keys").await;
            (set.status == 200 && set.json()["keys"][0]["kid"] == kid).then(|| set.text())
        })
        .await;
        let answer = eventually(&format!("{kid} signs"), || async {
            let answer = get().await.expect_status(200);
            let verified: Value =
                serde_json::from_str(&node::run(VERIFY, &[&token(&answer), &set]).await).unwrap();
            assert_eq!(
                verified["payload"]["app"],
                json!({"version": 1, "app_code": "ann", "verified": true})
            );
            (verified["header"]["kid"] == kid).then_some(answer)
        })
        .await;
        tokens.push(token(&answer));
        assert!(!set.contains("\"d\""), "no private half");
    }
    let set = edge.get("/keys").await.text();
    for token in &tokens {
        node::run(VERIFY, &[token, &set]).await;
    }
    edge.send(Call::get("/a").header("x-bkapi-jwt", "forged")).await.expect_status(401);
}
