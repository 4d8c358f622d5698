//! Every row of the semantics, and the compiled matcher against one that reads the configuration as it is written.

use std::borrow::Cow;
use std::collections::BTreeMap;

use config::var::Var;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const ALICE: &str = "spiffe://mesh.local/ns/web/sa/alice";
const BOB: &str = "spiffe://mesh.local/ns/batch/sa/bob";
const FAR: &str = "spiffe://other.mesh/ns/web/sa/alice";

fn policies(value: Value) -> Policies {
    let policies =
        config::typed::parse::<Policies>(&value).unwrap_or_else(|errors| panic!("{value}: {errors:?}"));
    let errors = policies.check();
    assert!(errors.is_empty(), "{value}: {errors:?}");
    policies
}

fn matcher(value: Value) -> Matcher {
    Matcher::new(&policies(value), &["orders"])
}

/// Variables of a request of a test.
#[derive(Debug, Default)]
struct Fields(BTreeMap<String, String>);

impl Vars for Fields {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        self.0.get(&var.to_string()).map(|value| Cow::Borrowed(value.as_str()))
    }
}

fn caller<'a>(identity: &'a str, address: &str, port: u16) -> Caller<'a> {
    Caller::new((!identity.is_empty()).then_some(identity), address.parse().unwrap(), port)
}

fn asked<'a>(method: &'a str, path: &'a str, host: &'a str, fields: &'a Fields) -> What<'a> {
    What::Request(Asked { method, path, host, vars: Some(fields) })
}

fn get<'a>(path: &'a str, fields: &'a Fields) -> What<'a> {
    asked("GET", path, "orders", fields)
}

#[test]
fn a_denial_beats_everything_an_allowance_beats_the_default() {
    let deny = json!({"name": "d", "action": "deny", "rules": [{"from": [{"identities": [ALICE]}]}]});
    let allow = json!({"name": "a", "action": "allow", "rules": [{"from": [{"namespaces": ["web"]}]}]});
    let elsewhere =
        json!({"name": "e", "action": "allow", "ports": [9], "rules": [{"from": [{"identities": ["*"]}]}]});
    let other = json!({"name": "o", "action": "allow", "services": ["payments"], "rules": [{"from": [{"identities": ["*"]}]}]});
    let audit = json!({"name": "w", "action": "audit", "rules": [{"from": [{"identities": ["*"]}]}]});
    let rule = |policy| By::Rule(policy, 0);
    // Policies, the default, who asks: whether it passes, by what, and what audits it.
    let rows = [
        ("nothing", json!([]), "allow", ALICE, true, By::Default, None),
        ("nothing", json!([]), "deny", ALICE, false, By::Default, None),
        ("nothing", json!([]), "audit", ALICE, true, By::Default, Some(By::Default)),
        ("deny", json!([deny]), "allow", ALICE, false, rule(0), None),
        ("deny of another", json!([deny]), "allow", BOB, true, By::Default, None),
        ("deny of another", json!([deny]), "deny", BOB, false, By::Default, None),
        ("allow", json!([allow]), "allow", ALICE, true, rule(0), None),
        ("allow, by default denied", json!([allow]), "deny", ALICE, true, rule(0), None),
        ("allow of others", json!([allow]), "allow", BOB, false, By::NoneAllows, None),
        ("allow of others", json!([allow]), "audit", BOB, false, By::NoneAllows, None),
        ("deny beats allow", json!([allow, deny]), "allow", ALICE, false, rule(1), None),
        ("deny beats allow in any order", json!([deny, allow]), "allow", ALICE, false, rule(0), None),
        ("the allow of another port", json!([elsewhere]), "allow", BOB, true, By::Default, None),
        ("the allow of another port", json!([elsewhere]), "deny", BOB, false, By::Default, None),
        ("the allow of another service", json!([other]), "allow", BOB, true, By::Default, None),
        ("audit decides nothing", json!([audit]), "allow", ALICE, true, By::Default, Some(rule(0))),
        ("audit decides nothing", json!([audit]), "deny", ALICE, false, By::Default, None),
        ("audit of what is allowed", json!([allow, audit]), "deny", ALICE, true, rule(0), Some(rule(1))),
        ("no audit of what is refused", json!([allow, audit]), "deny", BOB, false, By::NoneAllows, None),
        ("nobody is not everybody", json!([audit]), "allow", "", true, By::Default, None),
        ("a namespace of another domain", json!([allow]), "deny", FAR, true, rule(0), None),
    ];
    for (what, policies, default, who, allowed, by, audited) in rows {
        let matcher = matcher(json!({"default": default, "authorization": policies}));
        let expected = Decision { allowed, by, audited };
        let fields = Fields::default();
        for over in [get("/", &fields), What::Bytes, What::Requests] {
            assert_eq!(
                matcher.decide(&caller(who, "10.0.0.1", 80), &over),
                expected,
                "{what}, {default}, {who}"
            );
        }
    }
}

#[test]
fn conditions_of_http_on_bytes_deny_and_do_not_allow() {
    let http = [
        json!({"to": [{"methods": ["GET"]}]}),
        json!({"to": [{"not_methods": ["GET"]}]}),
        json!({"to": [{"paths": ["/a"]}]}),
        json!({"to": [{"not_paths": ["/a"]}]}),
        json!({"to": [{"hosts": ["a.com"]}]}),
        json!({"to": [{"not_hosts": ["a.com"]}]}),
        json!({"to": [{"ports": [80], "methods": ["GET"]}]}),
        json!({"when": [["http_x", "==", "1"]]}),
        json!({"from": [{"identities": [ALICE]}], "when": [["http_x", "~=", "1"]]}),
    ];
    let passes = |action: &str, rule: &Value, who: &str, port: u16, what: &What<'_>| {
        let policy = json!({"name": "p", "action": action, "rules": [rule]});
        matcher(json!({"authorization": [policy]})).decide(&caller(who, "10.0.0.1", port), what).allowed
    };
    for rule in &http {
        assert!(!passes("deny", rule, ALICE, 80, &What::Bytes), "{rule} denies bytes");
        assert!(!passes("allow", rule, ALICE, 80, &What::Bytes), "{rule} allows no bytes");
        assert!(
            passes("deny", rule, ALICE, 80, &What::Requests),
            "{rule} may not hold of the requests to come"
        );
        assert!(passes("allow", rule, ALICE, 80, &What::Requests), "{rule} may hold of the requests to come");
    }
    // What is known of a connection counts all the same.
    let other = json!({"from": [{"identities": [BOB]}], "to": [{"methods": ["GET"]}]});
    assert!(passes("deny", &other, ALICE, 80, &What::Bytes));
    let port = json!({"to": [{"ports": [81], "methods": ["GET"]}]});
    assert!(passes("deny", &port, ALICE, 80, &What::Bytes));
    assert!(!passes("deny", &port, ALICE, 81, &What::Bytes));
    let plain = json!({"to": [{"ports": [80]}, {"methods": ["GET"]}]});
    assert!(passes("allow", &plain, ALICE, 80, &What::Bytes), "one of two operations is of connections");
    assert!(!passes("allow", &plain, ALICE, 81, &What::Bytes));
    let audit = json!({"name": "w", "action": "audit", "rules": [{"to": [{"methods": ["GET"]}]}]});
    let audited =
        matcher(json!({"authorization": [audit]})).decide(&caller(ALICE, "10.0.0.1", 80), &What::Bytes);
    assert_eq!((audited.allowed, audited.audited), (true, Some(By::Rule(0, 0))), "as a denial would");
}

#[test]
fn every_condition_and_its_negation() {
    let fields = Fields(BTreeMap::from([("http_x".to_owned(), "1".to_owned())]));
    // A rule, who asks from where for which port, what, and whether the rule matches.
    let rows: Vec<(Value, &str, &str, u16, What<'_>, bool)> = vec![
        (json!({"from": [{"identities": [ALICE]}]}), ALICE, "10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"identities": [ALICE]}]}), BOB, "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"identities": [ALICE]}]}), FAR, "10.0.0.1", 80, get("/", &fields), false),
        (
            json!({"from": [{"identities": ["spiffe://mesh.local/ns/web/*"]}]}),
            ALICE,
            "10.0.0.1",
            80,
            get("/", &fields),
            true,
        ),
        (
            json!({"from": [{"identities": ["spiffe://mesh.local/ns/we/*"]}]}),
            ALICE,
            "10.0.0.1",
            80,
            get("/", &fields),
            false,
        ),
        (json!({"from": [{"identities": ["*"]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"not_identities": [ALICE]}]}), ALICE, "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"not_identities": [ALICE]}]}), BOB, "10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"not_identities": ["*"]}]}), "", "10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"namespaces": ["batch", "web"]}]}), ALICE, "10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"namespaces": ["batch"]}]}), ALICE, "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"namespaces": ["batch"]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"not_namespaces": ["web"]}]}), ALICE, "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"not_namespaces": ["web"]}]}), "", "10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"cidrs": ["10.0.0.0/8"]}]}), "", "10.255.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"cidrs": ["10.0.0.0/8"]}]}), "", "11.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"cidrs": ["10.0.0.0/8"]}]}), "", "::ffff:10.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"cidrs": ["fd00::/8"]}]}), "", "fd00::1", 80, get("/", &fields), true),
        (json!({"from": [{"cidrs": ["fd00::/8"]}]}), "", "fe80::1", 80, get("/", &fields), false),
        (json!({"from": [{"cidrs": ["0.0.0.0/0"]}]}), "", "fd00::1", 80, get("/", &fields), false),
        (json!({"from": [{"cidrs": ["127.0.0.1"]}]}), "", "127.0.0.1", 80, get("/", &fields), true),
        (json!({"from": [{"not_cidrs": ["10.0.0.0/8"]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (json!({"from": [{"not_cidrs": ["10.0.0.0/8"]}]}), "", "11.0.0.1", 80, get("/", &fields), true),
        (
            json!({"from": [{"namespaces": ["web"], "cidrs": ["10.0.0.0/8"]}]}),
            ALICE,
            "11.0.0.1",
            80,
            get("/", &fields),
            false,
        ),
        (
            json!({"from": [{"identities": [BOB]}, {"cidrs": ["11.0.0.0/8"]}]}),
            ALICE,
            "11.0.0.1",
            80,
            get("/", &fields),
            true,
        ),
        (
            json!({"from": [{"identities": ["*"], "not_identities": [ALICE]}]}),
            ALICE,
            "11.0.0.1",
            80,
            get("/", &fields),
            false,
        ),
        (json!({"to": [{"methods": ["GET", "PUT"]}]}), "", "10.0.0.1", 80, get("/", &fields), true),
        (json!({"to": [{"methods": ["PUT"]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (json!({"to": [{"methods": ["GET"]}]}), "", "10.0.0.1", 80, asked("get", "/", "a", &fields), false),
        (json!({"to": [{"not_methods": ["GET"]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (
            json!({"to": [{"not_methods": ["GET"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("PUT", "/", "a", &fields),
            true,
        ),
        (json!({"to": [{"paths": ["/a/*"]}]}), "", "10.0.0.1", 80, get("/a/b", &fields), true),
        (json!({"to": [{"paths": ["/a/*"]}]}), "", "10.0.0.1", 80, get("/a", &fields), false),
        (json!({"to": [{"paths": ["/a/*"]}]}), "", "10.0.0.1", 80, get("/ab", &fields), false),
        (json!({"to": [{"paths": ["/p.S/M"]}]}), "", "10.0.0.1", 80, get("/p.S/M", &fields), true),
        (json!({"to": [{"not_paths": ["/a/*"]}]}), "", "10.0.0.1", 80, get("/a/b", &fields), false),
        (
            json!({"to": [{"paths": ["/*"], "not_paths": ["/a/*"]}]}),
            "",
            "10.0.0.1",
            80,
            get("/a", &fields),
            true,
        ),
        (
            json!({"to": [{"hosts": ["A.com"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("GET", "/", "a.com", &fields),
            true,
        ),
        (
            json!({"to": [{"hosts": ["*.a.com"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("GET", "/", "x.a.com", &fields),
            true,
        ),
        (
            json!({"to": [{"hosts": ["*.a.com"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("GET", "/", "a.com", &fields),
            false,
        ),
        (
            json!({"to": [{"hosts": ["*.a.com"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("GET", "/", ".a.com", &fields),
            false,
        ),
        (
            json!({"to": [{"not_hosts": ["a.com"]}]}),
            "",
            "10.0.0.1",
            80,
            asked("GET", "/", "b.com", &fields),
            true,
        ),
        (json!({"to": [{"ports": [80]}]}), "", "10.0.0.1", 80, get("/", &fields), true),
        (json!({"to": [{"ports": [81]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (json!({"to": [{"not_ports": [80]}]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (
            json!({"to": [{"methods": ["PUT"]}, {"paths": ["/a"]}]}),
            "",
            "10.0.0.1",
            80,
            get("/a", &fields),
            true,
        ),
        (json!({"when": [["http_x", "==", "1"]]}), "", "10.0.0.1", 80, get("/", &fields), true),
        (json!({"when": [["http_x", "==", "2"]]}), "", "10.0.0.1", 80, get("/", &fields), false),
        (
            json!({"from": [{"namespaces": ["web"]}], "to": [{"methods": ["GET"]}], "when": [["http_x", "==", "1"]]}),
            ALICE,
            "1.1.1.1",
            80,
            get("/", &fields),
            true,
        ),
        (
            json!({"from": [{"namespaces": ["web"]}], "to": [{"methods": ["PUT"]}], "when": [["http_x", "==", "1"]]}),
            ALICE,
            "1.1.1.1",
            80,
            get("/", &fields),
            false,
        ),
        (
            json!({"from": [{"namespaces": ["web"]}], "to": [{"methods": ["GET"]}], "when": [["http_x", "==", "2"]]}),
            ALICE,
            "1.1.1.1",
            80,
            get("/", &fields),
            false,
        ),
    ];
    for (rule, who, address, port, what, expected) in rows {
        for action in ["deny", "allow", "audit"] {
            let policy = json!({"name": "p", "action": action, "rules": [rule]});
            let matcher = matcher(json!({"authorization": [policy]}));
            let decision = matcher.decide(&caller(who, address, port), &what);
            let matched = match action {
                "deny" => !decision.allowed,
                "allow" => decision.allowed,
                _ => decision.audited.is_some(),
            };
            assert_eq!(matched, expected, "{action} {rule} for {who:?} from {address}");
        }
    }
}

#[test]
fn the_first_rule_that_matches_is_told() {
    let matcher = matcher(json!({"authorization": [
        {"name": "few", "action": "allow", "rules": [
            {"from": [{"identities": [BOB]}]},
            {"from": [{"identities": [ALICE]}], "to": [{"paths": ["/a"]}]},
            {"from": [{"namespaces": ["web"]}]},
        ]},
        {"name": "all", "action": "allow", "rules": [{"from": [{"identities": [ALICE, BOB]}]}]},
    ]}));
    let fields = Fields::default();
    let told = |who: &str, path: &str| {
        let by = matcher.decide(&caller(who, "10.0.0.1", 80), &get(path, &fields)).by;
        (matcher.tell(by), matcher.name(by).map(ToString::to_string))
    };
    assert_eq!(told(ALICE, "/a"), ("policy few, rule 2".to_owned(), Some("few".to_owned())));
    assert_eq!(told(ALICE, "/b"), ("policy few, rule 3".to_owned(), Some("few".to_owned())));
    assert_eq!(told(BOB, "/b"), ("policy few, rule 1".to_owned(), Some("few".to_owned())));
    assert_eq!(told("", "/b"), ("no policy allows it".to_owned(), None));
}

/// Decides by the configuration as it is written, one condition after the other, as the documentation says.
fn naive(
    policies: &Policies,
    services: &[&str],
    who: Option<&str>,
    from: IpAddr,
    port: u16,
    what: &What<'_>,
) -> (bool, bool) {
    let any = |list: Option<&[bool]>| list.is_none_or(|list| list.contains(&true));
    let none = |list: Option<&[bool]>| list.is_none_or(|list| !list.contains(&true));
    let unknown = |action: Action| match what {
        What::Bytes => action != Action::Allow,
        _ => action == Action::Allow,
    };
    let tests = |action: Action, rule: &config::mesh::Rule| {
        let sources = rule.from.as_ref().map(|sources| {
            sources
                .iter()
                .map(|source| {
                    let id = |list: &Option<Distinct<IdentityPattern>>| {
                        list.as_ref().map(|list| {
                            list.iter().map(|one| who.is_some_and(|who| one.matches(who))).collect::<Vec<_>>()
                        })
                    };
                    let ns = |list: &Option<Distinct<Segment>>| {
                        let own = who.and_then(namespace);
                        list.as_ref()
                            .map(|list| list.iter().map(|one| own == Some(&**one)).collect::<Vec<_>>())
                    };
                    let net = |list: &Option<Distinct<Cidr>>| {
                        list.as_ref()
                            .map(|list| list.iter().map(|one| one.contains(from)).collect::<Vec<_>>())
                    };
                    any(id(&source.identities).as_deref())
                        && none(id(&source.not_identities).as_deref())
                        && any(ns(&source.namespaces).as_deref())
                        && none(ns(&source.not_namespaces).as_deref())
                        && any(net(&source.cidrs).as_deref())
                        && none(net(&source.not_cidrs).as_deref())
                })
                .collect::<Vec<_>>()
        });
        let operations = rule.to.as_ref().map(|operations| {
            operations
                .iter()
                .map(|operation| {
                    let ports = |list: &Option<Distinct<Port>>| {
                        list.as_ref().map(|list| {
                            list.iter().map(|one| one.get() == u32::from(port)).collect::<Vec<_>>()
                        })
                    };
                    let at = any(ports(&operation.ports).as_deref())
                        && none(ports(&operation.not_ports).as_deref());
                    if !operation.is_of_requests() {
                        return at;
                    }
                    let What::Request(asked) = what else { return at && unknown(action) };
                    let methods = |list: &Option<Distinct<MethodName>>| {
                        list.as_ref()
                            .map(|list| list.iter().map(|one| **one == *asked.method).collect::<Vec<_>>())
                    };
                    let paths = |list: &Option<Distinct<PathPattern>>| {
                        list.as_ref()
                            .map(|list| list.iter().map(|one| one.matches(asked.path)).collect::<Vec<_>>())
                    };
                    let hosts = |list: &Option<Distinct<Host>>| {
                        let is = |one: &Host| match one.to_ascii_lowercase().strip_prefix('*') {
                            Some(end) => asked.host.ends_with(end) && asked.host != end,
                            None => one.eq_ignore_ascii_case(asked.host),
                        };
                        list.as_ref().map(|list| list.iter().map(is).collect::<Vec<_>>())
                    };
                    at && any(methods(&operation.methods).as_deref())
                        && none(methods(&operation.not_methods).as_deref())
                        && any(paths(&operation.paths).as_deref())
                        && none(paths(&operation.not_paths).as_deref())
                        && any(hosts(&operation.hosts).as_deref())
                        && none(hosts(&operation.not_hosts).as_deref())
                })
                .collect::<Vec<_>>()
        });
        let when = rule.when.as_ref().is_none_or(|when| match what {
            What::Request(Asked { vars: Some(vars), .. }) => Expr::parse(when).unwrap().eval(*vars),
            _ => unknown(action),
        });
        any(sources.as_deref()) && any(operations.as_deref()) && when
    };
    let about = |policy: &&Authorization| {
        policy.services.as_ref().is_none_or(|own| own.iter().any(|one| services.contains(&&**one)))
            && policy.ports.as_ref().is_none_or(|own| own.iter().any(|one| one.get() == u32::from(port)))
    };
    let of = |action: Action| {
        policies.authorization.iter().filter(about).filter(move |policy| policy.action == action)
    };
    let matched =
        |action: Action| of(action).any(|policy| policy.rules.iter().any(|rule| tests(action, rule)));
    if matched(Action::Deny) {
        return (false, false);
    }
    let by_default = of(Action::Allow).count() == 0;
    let allowed = if by_default { policies.default != Fallback::Deny } else { matched(Action::Allow) };
    let audited = matched(Action::Audit) || (by_default && policies.default == Fallback::Audit);
    (allowed, allowed && audited)
}

fn some_of(words: &'static [&'static str]) -> impl Strategy<Value = Option<Vec<&'static str>>> {
    proptest::option::weighted(0.3, proptest::sample::subsequence(words, 1..=words.len().min(2)))
}

fn object(fields: Vec<(&'static str, Option<Value>)>) -> Value {
    Value::Object(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
}

const IDENTITIES: &[&str] = &[
    "*",
    "spiffe://mesh.local/*",
    "spiffe://mesh.local/ns/web/*",
    "spiffe://mesh.local/ns/web/sa/alice",
    "spiffe://mesh.local/ns/batch/sa/bob",
    "spiffe://other.mesh/ns/web/sa/alice",
];
const NAMESPACES: &[&str] = &["web", "batch"];
const NETS: &[&str] = &["10.0.0.0/8", "10.1.0.0/16", "::1", "fd00::/8"];
const METHODS: &[&str] = &["GET", "PUT"];
const PATHS: &[&str] = &["/", "/a", "/a/*", "/a/b", "/*"];
const HOSTS: &[&str] = &["a.com", "*.a.com", "X.a.com", "*"];

fn source() -> impl Strategy<Value = Value> {
    (
        some_of(IDENTITIES),
        some_of(IDENTITIES),
        some_of(NAMESPACES),
        some_of(NAMESPACES),
        some_of(NETS),
        some_of(NETS),
    )
        .prop_map(|(a, b, c, d, e, f)| {
            object(vec![
                ("identities", a.map(|v| json!(v))),
                ("not_identities", b.map(|v| json!(v))),
                ("namespaces", c.map(|v| json!(v))),
                ("not_namespaces", d.map(|v| json!(v))),
                ("cidrs", e.map(|v| json!(v))),
                ("not_cidrs", f.map(|v| json!(v))),
            ])
        })
}

fn ports() -> impl Strategy<Value = Option<Value>> {
    proptest::option::weighted(
        0.3,
        proptest::sample::subsequence(vec![80, 81], 1..=2).prop_map(|all| json!(all)),
    )
}

fn operation() -> impl Strategy<Value = Value> {
    (
        some_of(METHODS),
        some_of(METHODS),
        some_of(PATHS),
        some_of(PATHS),
        some_of(HOSTS),
        some_of(HOSTS),
        ports(),
        ports(),
    )
        .prop_map(|(a, b, c, d, e, f, g, h)| {
            object(vec![
                ("methods", a.map(|v| json!(v))),
                ("not_methods", b.map(|v| json!(v))),
                ("paths", c.map(|v| json!(v))),
                ("not_paths", d.map(|v| json!(v))),
                ("hosts", e.map(|v| json!(v))),
                ("not_hosts", f.map(|v| json!(v))),
                ("ports", g),
                ("not_ports", h),
            ])
        })
}

fn rule() -> impl Strategy<Value = Value> {
    let list = |one: proptest::strategy::BoxedStrategy<Value>| {
        proptest::option::weighted(0.6, proptest::collection::vec(one, 1..3).prop_map(Value::Array))
    };
    let when = proptest::option::weighted(
        0.2,
        proptest::sample::select(vec![json!([["http_x", "==", "1"]]), json!([["http_x", "~=", "1"]])]),
    );
    (list(source().boxed()), list(operation().boxed()), when)
        .prop_map(|(from, to, when)| object(vec![("from", from), ("to", to), ("when", when)]))
}

fn any_policies() -> impl Strategy<Value = Value> {
    let services = proptest::option::weighted(0.3, some_of(&["orders", "payments"]));
    let policy = (
        proptest::sample::select(vec!["deny", "allow", "audit"]),
        services,
        ports(),
        proptest::collection::vec(rule(), 1..4),
    )
        .prop_map(|(action, services, ports, rules)| {
            object(vec![
                ("action", Some(json!(action))),
                ("services", services.flatten().map(|v| json!(v))),
                ("ports", ports),
                ("rules", Some(json!(rules))),
            ])
        });
    (proptest::sample::select(vec!["allow", "deny", "audit"]), proptest::collection::vec(policy, 0..6))
        .prop_map(|(default, policies)| {
            let named: Vec<_> = policies
                .into_iter()
                .enumerate()
                .map(|(index, mut policy)| {
                    policy["name"] = json!(format!("p{index}"));
                    policy
                })
                .collect();
            json!({"default": default, "authorization": named})
        })
}

proptest! {
    #[test]
    fn the_compiled_matcher_decides_as_the_configuration_reads(
        // Conditions that take each other away are as good here as others.
        policies in any_policies(),
        who in proptest::sample::select(vec!["", ALICE, BOB, FAR]),
        from in proptest::sample::select(vec!["10.0.0.1", "10.1.0.1", "11.0.0.1", "::1", "fd00::1"]),
        port in proptest::sample::select(vec![80_u16, 81, 82]),
        (method, path) in (proptest::sample::select(METHODS), proptest::sample::select(vec!["/", "/a", "/a/", "/a/b", "/ab"])),
        host in proptest::sample::select(vec!["a.com", "x.a.com", "b.com", "", ".a.com"]),
        x in proptest::sample::select(vec!["", "1", "2"]),
        over in 0..4,
    ) {
        let policies: Policies = config::typed::parse(&policies).unwrap();
        let fields = Fields(if x.is_empty() { BTreeMap::new() } else { BTreeMap::from([("http_x".to_owned(), x.to_owned())]) });
        let what = match over {
            0 => What::Bytes,
            1 => What::Requests,
            2 => What::Request(Asked { method, path, host, vars: None }),
            _ => asked(method, path, host, &fields),
        };
        let who = (!who.is_empty()).then_some(who);
        let from: IpAddr = from.parse().unwrap();
        let matcher = Matcher::new(&policies, &["orders"]);
        let decision = matcher.decide(&Caller::new(who, from, port), &what);
        let expected = naive(&policies, &["orders"], who, from, port, &what);
        prop_assert_eq!((decision.allowed, decision.audited.is_some()), expected, "{}", matcher.tell(decision.by));
    }

    #[test]
    fn what_is_refused_of_all_requests_is_refused_of_each(
        policies in any_policies(),
        who in proptest::sample::select(vec!["", ALICE, BOB]),
        port in proptest::sample::select(vec![80_u16, 81]),
        method in proptest::sample::select(METHODS),
        path in proptest::sample::select(vec!["/", "/a", "/a/b"]),
    ) {
        let policies: Policies = config::typed::parse(&policies).unwrap();
        let matcher = Matcher::new(&policies, &["orders"]);
        let caller = Caller::new((!who.is_empty()).then_some(who), "10.0.0.1".parse().unwrap(), port);
        let fields = Fields::default();
        let one = matcher.decide(&caller, &asked(method, path, "a.com", &fields)).allowed;
        let all = matcher.decide(&caller, &What::Requests).allowed;
        let kept = matcher.decide(&caller, &What::Request(Asked { method, path, host: "a.com", vars: None })).allowed;
        prop_assert!(all || !one, "a connection is not ended while a request of it may pass");
        prop_assert!(kept || !one, "a request at work that is allowed is not ended");
    }
}
