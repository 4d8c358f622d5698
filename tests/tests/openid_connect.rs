//! `openid-connect` against a real provider (npm `oidc-provider`): logins, sessions, renewals, bearer tokens, logout.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use e2e::client::Call;
use e2e::oidc::{Browser, Provider};
use e2e::origin::{Origin, echo};
use e2e::ports::Port;
use e2e::redis::Redis;
use e2e::{Answer, Edge, Value, eventually, json};

struct Site {
    provider: Provider,
    origin: Origin,
    edge: Edge,
}

/// What the plugin needs to know in any case.
fn settings(provider: &Provider, more: Value) -> Value {
    let mut settings = json!({
        "client_id": "shop",
        "client_secret": "secret-of-the-client",
        "discovery": provider.discovery(),
        "redirect_uri": "/cb",
        "session": {"secret": "a secret of sixteen or more"},
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    settings
}

impl Site {
    /// A gateway with one route, and a provider that sends browsers back to it.
    async fn start(lasts: u32, more: Value) -> Site {
        // The gateway's port is known once it runs, the provider's before.
        let origin = echo::start().await;
        let edge = Edge::embedded().start().await;
        let back = ["/cb", "/other/cb", "/posting/cb", "/deep/a/.apisix/redirect"]
            .map(|path| format!("http://{}{path}", edge.http));
        let back: Vec<&str> = back.iter().map(String::as_str).collect();
        let provider = Provider::start(&back, lasts).await;
        let site = Site { provider, origin, edge };
        site.put("site", "/*", more).await;
        site.edge.until_status("/logout", 302).await;
        site
    }

    async fn put(&self, id: &str, uri: &str, more: Value) {
        let plugins = json!({"openid-connect": settings(&self.provider, more)});
        let route = json!({"uri": uri, "plugins": plugins, "upstream": self.origin.upstream()});
        self.edge.put(&format!("routes/{id}"), route).await;
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.edge.http)
    }
}

/// A field that the origin got.
fn got(answer: &Answer, name: &str) -> Option<String> {
    answer.json()["headers"][name][0].as_str().map(str::to_owned)
}

fn decoded(text: &str) -> Value {
    let bytes = STANDARD.decode(text).expect("base64");
    serde_json::from_slice(&bytes).expect("JSON")
}

#[tokio::test]
async fn a_user_logs_in_is_known_and_logs_out() {
    let site = Site::start(600, json!({
        "scope": "openid email", "use_pkce": true, "set_refresh_token_header": true, "set_raw_id_token_header": true,
        "post_logout_redirect_uri": "http://127.0.0.1:1/bye",
    })).await;
    let mut browser = Browser::default();
    let login = browser.step(&site.url("/page?a=1&b=%2F")).await.expect_status(302);
    let to = login.header("location").unwrap();
    assert!(
        to.starts_with(&format!("http://{}/auth?response_type=code&client_id=shop", site.provider.addr())),
        "{to}"
    );
    assert!(
        to.contains("&code_challenge_method=S256") && to.contains("&nonce=") && to.contains("&state="),
        "{to}"
    );
    let answer = browser.open(&site.url("/page?a=1&b=%2F")).await.expect_status(200);
    assert_eq!(browser.url, site.url("/page?a=1&b=%2F"), "back where the login began");
    assert_eq!(
        (answer.json()["path"].as_str(), answer.json()["query"].as_str()),
        (Some("/page"), Some("a=1&b=%2F"))
    );
    let id = decoded(&got(&answer, "x-id-token").unwrap());
    assert_eq!((&id["sub"], &id["aud"]), (&json!("ann"), &json!("shop")));
    assert_eq!(decoded(&got(&answer, "x-userinfo").unwrap())["email"], "ann@example.com");
    for name in ["x-access-token", "x-refresh-token", "x-raw-id-token"] {
        assert!(got(&answer, name).is_some(), "{name}");
    }
    // The session lets in without the provider, and nothing that a client writes gets through.
    let forged =
        Call::get("/page").header("x-userinfo", "x").header("x-id-token", "x").header("x-access-token", "x");
    site.edge.send(forged).await.expect_status(302);
    browser.step(&site.url("/again")).await.expect_status(200);
    assert!(
        !browser.jar.keys().any(|(_, name)| name.contains("login") && name.len() > 30),
        "{:?}",
        browser.jar.keys()
    );
    let out = browser.step(&site.url("/logout")).await.expect_status(302);
    let to = out.header("location").unwrap();
    assert!(to.contains("/session/end?") && to.contains("id_token_hint=") && to.contains("bye"), "{to}");
    assert!(!browser.jar.keys().any(|(addr, name)| *addr == site.edge.http
        && name.starts_with("session")
        && !name.contains("login")));
    browser.step(&site.url("/again")).await.expect_status(302);
}

#[tokio::test]
async fn a_login_belongs_to_one_browser_one_state_and_one_callback() {
    let site = Site::start(600, json!({})).await;
    site.put("other", "/other/*", json!({"redirect_uri": "/other/cb"})).await;
    site.put(
        "client",
        "/posting/*",
        json!({
            "client_id": "posting", "redirect_uri": "/posting/cb", "token_endpoint_auth_method": "client_secret_post",
        }),
    )
    .await;
    site.edge.until_status("/other/x", 302).await;
    // Up to the callback, in one browser.
    let mut browser = Browser::default();
    let mut answer = browser.step(&site.url("/page")).await;
    let callback = loop {
        let next = browser.next(&answer);
        if next.starts_with(&site.url("/cb")) {
            break next;
        }
        answer = browser.step(&next).await;
    };
    let mut other = Browser::default();
    other.step(&callback).await.expect_status(400);
    let elsewhere = callback.replace("/cb?", "/other/cb?");
    browser.clone().step(&elsewhere).await.expect_status(400);
    browser.clone().step(&callback.replace("state=", "state=x")).await.expect_status(400);
    browser.clone().step(&callback.replace("iss=", "iss=x")).await.expect_status(500);
    browser.clone().step(&callback.replace("code=", "code=x")).await.expect_status(500);
    let mut second = browser.clone();
    browser.step(&callback).await.expect_status(302);
    browser.step(&site.url("/page")).await.expect_status(200);
    // A code is good once; the state is forgotten with the login.
    second.step(&callback).await.expect_status(500);
    browser.step(&callback).await.expect_status(400);
    // The session of one client is none of another's, whoever shares the secret.
    browser.step(&site.url("/posting/x")).await.expect_status(302);
    browser.open(&site.url("/posting/x")).await.expect_status(200);
}

#[tokio::test]
async fn an_access_token_that_ends_is_renewed_once_for_requests_that_come_together() {
    let site = Site::start(2, json!({"scope": "openid offline_access"})).await;
    let mut browser = Browser::default();
    let first = got(&browser.open(&site.url("/page")).await.expect_status(200), "x-access-token").unwrap();
    let renewed = eventually("the access token is renewed", || {
        let mut browser = browser.clone();
        let (url, first) = (site.url("/page"), first.clone());
        async move {
            let answer = browser.step(&url).await;
            let now = got(&answer, "x-access-token")?;
            (now != first).then_some(browser)
        }
    })
    .await;
    // Requests with the old cookies get the same new token: a refresh token is good once.
    let mut tokens = Vec::new();
    for mut browser in [browser.clone(), browser.clone(), renewed] {
        tokens
            .push(got(&browser.step(&site.url("/page")).await.expect_status(200), "x-access-token").unwrap());
    }
    assert!(tokens.iter().all(|token| *token != first));
    assert_eq!(tokens[0], tokens[1]);
}

#[tokio::test]
async fn sessions_may_be_kept_in_redis_and_are_refused_while_it_is_away() {
    let mut redis = Redis::start().await;
    let session = json!({
        "secret": "a secret of sixteen or more", "storage": "redis",
        "redis": {"host": "127.0.0.1", "port": redis.port(), "prefix": "of-tests", "read_timeout": 300},
    });
    let site = Site::start(600, json!({"session": session})).await;
    let mut browser = Browser::default();
    browser.open(&site.url("/page")).await.expect_status(200);
    let kept = redis.ask(&["KEYS", "of-tests:*"]);
    assert_eq!(kept.lines().count(), 1, "{kept}");
    let text = redis.ask(&["GET", kept.trim()]);
    assert!(!text.contains("ann") && !text.contains("eyJ"), "sealed: {text}");
    let cookie =
        browser.jar.iter().find(|((addr, name), _)| *addr == site.edge.http && name == "session").unwrap();
    assert!(cookie.1.len() < 200, "the cookie holds a name only: {}", cookie.1);
    redis.pause();
    browser.step(&site.url("/page")).await.expect_status(503);
    redis.resume();
    eventually("the session is known again", || {
        let mut browser = browser.clone();
        let url = site.url("/page");
        async move { (browser.step(&url).await.status == 200).then_some(()) }
    })
    .await;
    let copy = browser.clone();
    browser.step(&site.url("/logout")).await.expect_status(302);
    assert_eq!(redis.ask(&["KEYS", "of-tests:*"]).trim(), "");
    copy.clone().step(&site.url("/page")).await.expect_status(302);
    redis.kill();
}

#[tokio::test]
async fn bearer_tokens_are_checked_by_the_key_set_or_by_introspection() {
    let site = Site::start(600, json!({})).await;
    let wants = "grant_type=client_credentials&scope=read&resource=https%3A%2F%2Fapi.example";
    let signed = site.provider.token(wants).await;
    let opaque = site.provider.token("grant_type=client_credentials").await;
    let audience = |rule: Value| json!({"audience": rule});
    let cases = [
        ("jwks", json!({"use_jwks": true})),
        ("scope", json!({"use_jwks": true, "required_scopes": ["read"]})),
        ("scopes", json!({"use_jwks": true, "required_scopes": ["read", "write"]})),
        ("alg", json!({"use_jwks": true, "token_signing_alg_values_expected": "ES256"})),
        (
            "issuer",
            json!({"use_jwks": true, "claim_validator": {"issuer": {"valid_issuers": ["https://other"]}}}),
        ),
        (
            "client",
            json!({"use_jwks": true, "claim_validator": audience(json!({"match_with_client_id": true}))}),
        ),
        (
            "claim",
            json!({"use_jwks": true, "claim_validator": audience(json!({"claim": "tenant", "required": true}))}),
        ),
        ("schema", json!({"use_jwks": true, "claim_schema": {"required": ["tenant"]}})),
        ("ask", json!({})),
    ];
    for (name, more) in &cases {
        let mut more = more.clone();
        more["bearer_only"] = true.into();
        site.put(name, &format!("/{name}"), more).await;
    }
    site.edge.until_status("/ask", 401).await;
    // One letter of the signature is another one.
    let (rest, last) = signed.split_at(signed.len() - 2);
    let other = if last.starts_with('A') { 'B' } else { 'A' };
    let tampered = format!("{rest}{other}{}", &last[1..]);
    let with = |token: &str| format!("Bearer {token}");
    for (route, authorization, status) in [
        ("jwks", with(&signed), 200),
        ("jwks", format!("bearer {signed}"), 200),
        ("jwks", with(&tampered), 401),
        ("jwks", with(&opaque), 401),
        ("jwks", "Basic YTpi".to_owned(), 401),
        ("jwks", "Bearer".to_owned(), 400),
        ("scope", with(&signed), 200),
        ("scopes", with(&signed), 403),
        ("alg", with(&signed), 401),
        ("issuer", with(&signed), 401),
        ("client", with(&signed), 200),
        ("claim", with(&signed), 403),
        ("schema", with(&signed), 401),
        ("ask", with(&opaque), 200),
        ("ask", with(&opaque), 200),
        ("ask", with("nonsense"), 401),
    ] {
        let answer =
            site.edge.send(Call::get(&format!("/{route}")).header("authorization", &authorization)).await;
        assert_eq!(answer.status, status, "{route} {authorization}: {}", answer.text());
        if status == 200 {
            let claims = decoded(&got(&answer, "x-userinfo").unwrap());
            assert_eq!(claims["client_id"], "shop", "{route}");
            assert!(got(&answer, "x-access-token").is_some());
        }
        if status == 401 {
            assert!(
                answer.header("www-authenticate").unwrap().starts_with("Bearer realm=\"apisix\""),
                "{route}"
            );
        }
    }
}

#[tokio::test]
async fn what_becomes_of_nobody_can_be_chosen_and_a_provider_that_is_away_lets_nobody_in() {
    let site = Site::start(600, json!({})).await;
    site.put("deny", "/deny", json!({"unauth_action": "deny"})).await;
    site.put("pass", "/pass", json!({"unauth_action": "pass"})).await;
    site.put("no", "/no", json!({"authorization_params": {"login_hint": "nobody"}})).await;
    let mut deep = settings(&site.provider, json!({}));
    deep.as_object_mut().unwrap().remove("redirect_uri");
    let route = |plugin: &Value, uri: &str| json!({"uri": uri, "plugins": {"openid-connect": plugin}, "upstream": site.origin.upstream()});
    site.edge.put("routes/deep", route(&deep, "/deep/*")).await;
    let nowhere = Port::free();
    deep["discovery"] = format!("http://{}/", nowhere.addr()).into();
    site.edge.put("routes/away", route(&deep, "/away")).await;
    deep["bearer_only"] = true.into();
    site.edge.put("routes/keys", route(&deep, "/away-bearer")).await;
    site.edge.until_status("/away", 503).await;
    let passed = site.edge.send(Call::get("/pass").header("x-userinfo", "forged")).await.expect_status(200);
    assert_eq!(got(&passed, "x-userinfo"), None);
    site.edge.get("/deny").await.expect_status(401);
    Browser::default().open(&site.url("/no")).await.expect_status(403);
    Browser::default().open(&site.url("/deep/a")).await.expect_status(200);
    let bearer = Call::get("/away-bearer").header("authorization", "Bearer x.y.z");
    site.edge.send(bearer).await.expect_status(503);
}
