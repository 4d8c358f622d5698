//! Requests through the layer: what is answered, told and counted, tokens, and connections that are ended.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use certs::mesh::MeshIdentity;
use config::mesh::Policies;
use layers::chain::PluginChain;
use layers::exchange::OwnDoor;
use layers::http::normalize::Options;
use layers::http::sanitize::{Limits, SanitizeLayer};
use layers::plugin::{Flow, Hooks, Rewrite};
use layers::stack::Stack;
use layers::telemetry::exposition::Exposition;
use layers::testing::{ExchangeBuilder, exchange, field, service};
use layers::worker::deadlines::{Deadlines, Ended, Phase, Timeouts, Watched};
use layers::worker::view::View;
use serde_json::json;
use tower::layer::layer_fn;

use super::*;
use crate::client_cert::{ClientCertLayer, X_FORWARDED_CLIENT_CERT};
use crate::live::Arrival;
use crate::policy::{PolicyTable, Question};
use crate::testing::peer;
use crate::tokens::Issuers;

const ALICE: &str = "spiffe://mesh.local/ns/web/sa/alice";
const BOB: &str = "spiffe://mesh.local/ns/batch/sa/bob";

const LIMITS: Limits = Limits { uri: 4096, header_count: 64, header_bytes: 65_536, body: None };

fn of(conn: &Conn) -> Option<&Admission> {
    conn.door.as_ref()?.get()
}

/// A sidecar with policies, as far as the layer sees one.
struct Bench {
    table: PolicyTable,
    live: Rc<Live>,
    deadlines: Rc<Deadlines>,
}

impl Bench {
    fn new(policies: Option<Value>) -> Self {
        let (table, _) = PolicyTable::new();
        let live = Live::new(Rc::new(View::new(table.published().clone())), None);
        let bench = Self { table, live, deadlines: Deadlines::new(&Timeouts::default()) };
        if let Some(policies) = policies {
            bench.publish(policies);
        }
        bench
    }

    fn publish(&self, policies: Value) {
        let policies = config::typed::parse::<Policies>(&policies).unwrap();
        assert_eq!(policies.check(), []);
        let issuers = Issuers::new(&policies.tokens).unwrap();
        self.table.publish(&policies, &["orders"], Arc::new(issuers));
    }

    /// A connection that is served, and what it can be ended by.
    fn connect(&self, identity: &str) -> (Admission, Watched) {
        let peer = (!identity.is_empty()).then(|| Arc::new(peer(identity)));
        let admission = self.live.admit(Arrival {
            peer,
            authorities: Arc::default(),
            connected: None,
            from: ([10, 0, 0, 1], 4000).into(),
            port: 8080,
        });
        let watched = self.deadlines.watch(Phase::Idle);
        admission.watched(watched.watch());
        (admission, watched)
    }

    /// Sends a request over the connection, as far as the application.
    async fn send(&self, admission: &Admission, x: ExchangeBuilder) -> Exchange {
        self.send_as(admission, x, Options::default()).await
    }

    async fn send_as(&self, admission: &Admission, x: ExchangeBuilder, paths: Options) -> Exchange {
        let mut stack = Stack::new()
            .push(layer_fn(PluginChain::new))
            .push(SanitizeLayer::new(LIMITS, paths))
            .push(AuthorizeLayer::new(self.live.clone(), of, Handle::current()))
            .push(ClientCertLayer::new(MeshIdentity::new(), of))
            .around(service(|_| Ok(())));
        let x = x.header("host", "orders").door(OwnDoor::new(Rc::new(admission.clone()))).raw();
        stack.call(x).await.unwrap()
    }

    async fn status(&self, identity: &str, method: &str, target: &str) -> u16 {
        self.send(&self.connect(identity).0, exchange(method, target)).await.status()
    }
}

fn allow_web() -> Value {
    json!({"authorization": [
        {"name": "no-admin", "action": "deny", "rules": [{"to": [{"paths": ["/admin", "/admin/*"]}]}]},
        {"name": "web", "action": "allow", "rules": [{"from": [{"namespaces": ["web"]}]}]},
    ]})
}

#[tokio::test]
async fn policies_that_have_not_come_refuse_everything() {
    let bench = Bench::new(None);
    let x = bench.send(&bench.connect(ALICE).0, exchange("GET", "/")).await;
    assert_eq!(x.status(), 403);
    assert_eq!(x.reason(), Some(Reason::PolicyPending));
    assert!(!bench.table.is_ready() && !bench.table.status().ready);
    bench.publish(json!({}));
    assert_eq!(bench.status(ALICE, "GET", "/").await, 200);
    assert!(bench.table.is_ready());
}

#[tokio::test]
async fn a_refusal_names_its_policy() {
    let bench = Bench::new(Some(allow_web()));
    let x = bench.send(&bench.connect(ALICE).0, exchange("GET", "/admin/x")).await;
    assert_eq!(x.status(), 403);
    assert_eq!(
        field(&x, "proxy-status"),
        "postern; error=http_request_denied; details=\"policy_denied:no-admin\""
    );
    assert_eq!(x.get(&Var::parse("policy")).as_deref(), Some("no-admin"));
    assert_eq!(x.error.as_ref().unwrap().detail_text(), Some("policy no-admin, rule 1"));
    let x = bench.send(&bench.connect(BOB).0, exchange("GET", "/")).await;
    assert_eq!((x.status(), x.policy.as_deref()), (403, Some("(none allows)")));
    let x = bench.send(&bench.connect(ALICE).0, exchange("GET", "/")).await;
    assert_eq!((x.status(), x.policy.as_deref()), (200, Some("web")));
}

#[tokio::test]
async fn a_grpc_client_gets_a_grpc_status() {
    let bench = Bench::new(Some(allow_web()));
    let x =
        exchange("POST", "/p.S/M").header("content-type", "application/grpc").version(http::Version::HTTP_2);
    let x = bench.send(&bench.connect(BOB).0, x).await;
    assert_eq!((x.status(), field(&x, "grpc-status")), (200, "7"), "PERMISSION_DENIED");
}

#[tokio::test]
async fn no_spelling_of_a_path_gets_past_a_denial() {
    let bench = Bench::new(Some(allow_web()));
    let spellings = [
        "/admin",
        "/admin/",
        "/admin/x?y=/z",
        "/%61dmin",
        "/%61%64%6d%69%6e/x",
        "//admin",
        "/./admin",
        "/x/../admin",
        "/x/%2e%2e/admin",
        "/x/.%2E/admin/y",
        "/x%2f..%2fadmin",
        "/admin%2fx",
        // Who decodes twice would see a slash.
        "/admin%252fx",
        "/admin//x",
        "/public/..%2f/admin",
        "http://orders/admin",
    ];
    for target in spellings {
        let status = bench.status(ALICE, "GET", target).await;
        assert!(matches!(status, 400 | 403), "{target}: {status}");
    }
    for target in ["/", "/administrator", "/x/admin", "/Admin"] {
        assert_eq!(bench.status(ALICE, "GET", target).await, 200, "{target}");
    }
}

#[tokio::test]
async fn a_path_with_encoded_slashes_is_judged_both_ways() {
    let keep = Options { keep_encoded_slash: true, ..Options::default() };
    let bench = Bench::new(Some(json!({"authorization": [
        {"name": "d", "action": "deny", "rules": [{"to": [{"paths": ["/admin/*"]}]}]},
        {"name": "a", "action": "allow", "rules": [{"to": [{"paths": ["/admin/*", "/files/*"]}]}]},
    ]})));
    for (target, status) in [
        ("/files/a%2Fb", 200),
        ("/files/a%2fb", 200),
        ("/admin%2Fx", 403),
        ("/admin%2f%2fx", 403),
        ("/admin%252Fx", 403),
        ("/files%2Fa", 403),
        ("/x%2Fadmin/y", 403),
    ] {
        let x = bench.send_as(&bench.connect(ALICE).0, exchange("GET", target), keep).await;
        assert_eq!(x.status(), status, "{target}");
    }
    assert_eq!(without_encoded_slashes("/a/b"), None);
    assert_eq!(without_encoded_slashes("/a%2F/b%252F%25").as_deref(), Some("/a/b%2F%"));
}

#[tokio::test]
async fn what_a_caller_says_of_itself_does_not_count() {
    let bench = Bench::new(Some(json!({"authorization": [
        {"name": "lan", "action": "allow", "rules": [{"when": [["remote_addr", "==", "10.9.9.9"]]}]},
    ]})));
    let x = exchange("GET", "/").header("x-forwarded-for", "10.9.9.9").header("x-real-ip", "10.9.9.9");
    assert_eq!(bench.send(&bench.connect(ALICE).0, x).await.status(), 403);
}

#[tokio::test]
async fn audits_pass_and_are_told_and_counted() {
    let bench = Bench::new(Some(json!({"authorization": [
        {"name": "watch", "action": "audit", "rules": [{"to": [{"methods": ["DELETE"]}]}]},
    ]})));
    let x = bench.send(&bench.connect(ALICE).0, exchange("DELETE", "/")).await;
    assert_eq!((x.status(), x.policy.as_deref()), (200, Some("watch")));
    assert_eq!(bench.status(ALICE, "GET", "/").await, 200);
    bench.publish(json!({"default": "audit", "authorization": [
        {"name": "watch", "action": "audit", "rules": [{"to": [{"methods": ["DELETE"]}]}]},
    ]}));
    assert_eq!(bench.status(ALICE, "GET", "/").await, 200);
    let status = bench.table.status();
    let told = |name: &str| {
        let policy = status.authorization.iter().find(|policy| policy.name == name).unwrap();
        (policy.allowed, policy.denied, policy.audited)
    };
    assert_eq!(told("watch"), (0, 0, 1), "counts go on over changes");
    assert_eq!(told("(default)"), (3, 0, 1));
    let mut out = Exposition::default();
    bench.table.expose(&mut out);
    let text = out.finish();
    let line =
        "postern_policy_decisions_total{kind=\"authorization\",policy=\"watch\",verdict=\"audited\"} 1\n";
    assert!(text.contains(line), "{text}");
}

fn encode(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn token(pair: &Ed25519KeyPair, claims: &Value) -> String {
    let signed = format!("{}.{}", encode(&json!({"alg": "EdDSA", "kid": "k"})), encode(claims));
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(pair.sign(signed.as_bytes())))
}

#[tokio::test]
async fn claims_of_good_tokens_count_and_other_tokens_are_refused() {
    let pair = Ed25519KeyPair::generate().unwrap();
    let x = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
    let jwks = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "k"}]});
    let bench = Bench::new(Some(json!({
        "tokens": [{"issuer": "https://i", "audiences": ["orders"], "jwks": jwks}],
        "authorization": [
            {"name": "readers", "action": "allow", "rules": [
                {"to": [{"methods": ["GET"]}], "when": [["jwt_claim_realm.roles", "has", "reader"]]},
                {"when": [["jwt_claim_sub", "==", "root"]]},
            ]},
        ],
    })));
    let end = 4_000_000_000_u64;
    let good = json!({"iss": "https://i", "aud": ["x", "orders"], "exp": end, "sub": "a", "realm": {"roles": ["reader"]}});
    let with = |changes: Value| {
        let mut claims = good.clone();
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        token(&pair, &claims)
    };
    let other = Ed25519KeyPair::generate().unwrap();
    let cases = [
        ("a reader", Some(with(json!({}))), "GET", 200),
        ("a reader, once more", Some(with(json!({}))), "GET", 200),
        ("a reader who writes", Some(with(json!({}))), "PUT", 403),
        ("root", Some(with(json!({"sub": "root"}))), "PUT", 200),
        ("no role", Some(with(json!({"realm": {"roles": []}}))), "GET", 403),
        ("a role that is text", Some(with(json!({"realm": {"roles": "reader"}}))), "GET", 403),
        ("no token", None, "GET", 403),
        ("another key", Some(token(&other, &good)), "GET", 401),
        ("another issuer", Some(with(json!({"iss": "https://j"}))), "GET", 401),
        ("another audience", Some(with(json!({"aud": "payments"}))), "GET", 401),
        ("no audience", Some(with(json!({"aud": null}))), "GET", 401),
        ("expired", Some(with(json!({"exp": 1}))), "GET", 401),
        ("without an end", Some(with(json!({"exp": null}))), "GET", 401),
        ("not yet", Some(with(json!({"nbf": end}))), "GET", 401),
        ("nonsense", Some("a.b.c".to_owned()), "GET", 401),
    ];
    let (admission, _watched) = bench.connect(ALICE);
    for (what, token, method, status) in cases {
        let mut x = exchange(method, "/");
        if let Some(token) = token {
            x = x.header("authorization", &format!("Bearer {token}"));
        }
        assert_eq!(bench.send(&admission, x).await.status(), status, "{what}");
    }
    let twice = exchange("GET", "/").header("authorization", "Bearer a").header("authorization", "Bearer b");
    assert_eq!(bench.send(&admission, twice).await.status(), 401);
    bench.publish(json!({}));
    let bad = exchange("GET", "/").header("authorization", "Bearer a.b.c");
    assert_eq!(bench.send(&admission, bad).await.status(), 200, "nobody asks for claims");
}

#[tokio::test]
async fn who_called_is_cleaned_of_claims_and_set() {
    let bench = Bench::new(Some(json!({})));
    let x = exchange("GET", "/")
        .header("x-forwarded-client-cert", "URI=spiffe://mesh.local/root")
        .header("X-Forwarded-Client-Cert", "URI=spiffe://mesh.local/root")
        .header("x_forwarded_client_cert", "URI=spiffe://mesh.local/root")
        .header("l5d-client-id", "root")
        .header("l5d_client-id", "root")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let x = bench.send(&bench.connect(ALICE).0, x).await;
    let headers = &x.request.headers;
    // This process has no identity, so there is nothing to set.
    for name in ["x-forwarded-client-cert", "x_forwarded_client_cert", "l5d-client-id", "l5d_client-id"] {
        assert!(!headers.contains_key(name), "{name}");
    }
    assert!(headers.contains_key("traceparent"));
    let value = crate::client_cert::value("spiffe://mesh.local/own", &peer(ALICE)).unwrap();
    let value = value.to_str().unwrap();
    let (before, after) = value.split_once("Hash=").unwrap();
    assert_eq!(before, "By=spiffe://mesh.local/own;");
    let (hash, after) = after.split_once(';').unwrap();
    assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");
    assert_eq!(after, format!("Subject=\"\";URI={ALICE}"));
    assert_eq!(X_FORWARDED_CLIENT_CERT, "x-forwarded-client-cert");
}

#[tokio::test]
async fn a_change_ends_the_connections_that_it_forbids_and_no_others() {
    let bench = Bench::new(Some(json!({})));
    let (alice, alice_watched) = bench.connect(ALICE);
    let (bob, bob_watched) = bench.connect(BOB);
    let (bytes, bytes_watched) = bench.connect(BOB);
    bytes.carries_bytes();
    bench.live.check();
    bench.publish(json!({"authorization": [
        {"name": "web", "action": "deny", "rules": [{"from": [{"namespaces": ["batch"]}], "to": [{"methods": ["GET"]}]}]},
    ]}));
    bench.live.check();
    assert_eq!(
        (alice_watched.ended(), bob_watched.ended()),
        (None, None),
        "requests other than GET may pass"
    );
    assert_eq!(bytes_watched.ended(), Some(Ended::Forbidden), "bytes may be what is denied");
    bench.publish(allow_web());
    bench.live.check();
    assert_eq!((alice_watched.ended(), bob_watched.ended()), (None, Some(Ended::Forbidden)));
    bob.revoked().await;
    assert!(bob.is_revoked() && !alice.is_revoked());
    let x = bench.send(&bob, exchange("GET", "/")).await;
    assert_eq!(x.status(), 403, "nothing passes that comes before the end");
    drop((alice, bob, bytes));
    drop(x);
    assert_eq!(bench.live.count(), 0);
}

#[tokio::test]
async fn a_request_at_work_that_is_forbidden_ends_its_connection() {
    let bench = Bench::new(Some(json!({})));
    let denies = |path: &str| json!({"authorization": [{"name": "d", "action": "deny", "rules": [{"to": [{"paths": [path], "hosts": ["orders"]}]}]}]});
    let (admission, watched) = bench.connect(ALICE);
    let over = bench.send(&admission, exchange("GET", "/over")).await;
    let works = bench.send(&admission, exchange("GET", "/a%62/c?x=1")).await;
    drop(over);
    bench.publish(denies("/over"));
    bench.live.check();
    assert_eq!(watched.ended(), None, "that request is over");
    bench.publish(denies("/ab/*"));
    bench.live.check();
    assert_eq!(watched.ended(), Some(Ended::Forbidden));
    drop(works);
}

#[tokio::test]
async fn many_connections_are_judged_over_several_ticks() {
    let bench = Bench::new(Some(json!({})));
    let all: Vec<_> = (0..10_000).map(|_| bench.connect(BOB)).collect();
    bench.publish(allow_web());
    let ended = || all.iter().filter(|(admission, _)| admission.is_revoked()).count();
    bench.live.check();
    assert!((1..10_000).contains(&ended()), "{}", ended());
    (0..9).for_each(|_| bench.live.check());
    assert_eq!(ended(), 10_000, "within a second");
}

#[tokio::test]
async fn a_connection_by_which_probes_come_stays_while_it_carries_requests() {
    let bench = Bench::new(Some(json!({})));
    let (other, probing, bytes) = (bench.connect(""), bench.connect(""), bench.connect(""));
    probing.0.carries_probes();
    bytes.0.carries_probes();
    bytes.0.carries_bytes();
    bench.publish(json!({"default": "deny"}));
    bench.live.check();
    let ended = [other, probing, bytes].map(|(admission, _)| admission.is_revoked());
    assert_eq!(ended, [true, false, true], "nobody, one that probes, one that sends bytes");
}

#[test]
fn a_question_is_answered_as_a_request_would_be() {
    let bench = Bench::new(Some(allow_web()));
    let ask = |question: Value| {
        let answer = bench.table.explain(&serde_json::from_value::<Question>(question).unwrap());
        (answer.allowed, answer.why)
    };
    assert_eq!(
        ask(json!({"identity": ALICE, "port": 8080, "method": "GET", "path": "/"})),
        (true, "policy web, rule 1".to_owned())
    );
    assert_eq!(
        ask(json!({"identity": ALICE, "port": 8080, "method": "GET", "path": "/admin/x"})),
        (false, "policy no-admin, rule 1".to_owned())
    );
    assert_eq!(
        ask(json!({"identity": ALICE, "port": 8080})),
        (false, "policy no-admin, rule 1".to_owned()),
        "bytes are denied"
    );
    let written =
        format!("port=8080&identity={ALICE}&method=GET&path=/admin%2Fx&header.X-A=1&claim.roles=[1]");
    let question = Question::read(&written).unwrap();
    assert_eq!((question.path.as_deref(), &question.claims["roles"]), (Some("/admin/x"), &json!([1])));
    assert_eq!(bench.table.explain(&question).why, "policy no-admin, rule 1");
    assert_eq!(Question::read(&question.query()), Ok(question), "what is written is read");
    for (query, words) in
        [("", "`port` is missing"), ("port=x", "no port"), ("port=1&a=b", "`a` is not known")]
    {
        assert!(Question::read(query).unwrap_err().contains(words), "{query}");
    }
    let before = bench.table.status();
    assert!(
        before.authorization.iter().all(|policy| policy.allowed + policy.denied == 0),
        "nothing is counted"
    );
}

/// A plugin that tells what it saw of the request does not see what was refused.
#[tokio::test]
async fn nothing_further_in_sees_what_is_refused() {
    struct Never;
    impl Rewrite for Never {
        fn rewrite(&self, _: &mut Exchange) -> Flow {
            unreachable!("the request was refused")
        }
    }
    let mut hooks = Hooks::default();
    hooks.rewrite(&Arc::new(Never));
    let instance = layers::chain::Instance {
        name: "never",
        priority: 0,
        source: layers::chain::Source("services/1".into()),
        filter: None,
        error_response: None,
        hooks,
    };
    let bench = Bench::new(Some(allow_web()));
    let mut stack = Stack::new()
        .push(AuthorizeLayer::new(bench.live.clone(), of, Handle::current()))
        .push(layers::plugin_layer::PluginLayer::new(Arc::new(instance)))
        .around(service(|_| Ok(())));
    let (admission, _watched) = bench.connect(BOB);
    let x = exchange("GET", "http://orders/").door(OwnDoor::new(Rc::new(admission))).build();
    assert_eq!(stack.call(x).await.unwrap_err().error.reason(), Reason::PolicyDenied);
    let x = exchange("GET", "http://orders/").build();
    assert_eq!(stack.call(x).await.unwrap_err().error.reason(), Reason::PolicyDenied, "not admitted");
}
