//! The Admin API told by requests and answers: each `tests/golden/admin/*.txt` runs against an Admin handler
//! on a store of its own.
//!
//! A file is a list of cases. A line `@ stream` or `@ standalone` before the first sets the handler up. A case
//! is a line `### TITLE`, the request (method and path, headers, an empty line, the body), a line `--- STATUS`,
//! headers that must be there, an empty line and the body. Every request carries the admin key unless it has
//! an `X-API-KEY` header; `X-API-KEY: -` sends none. In an expected body `"<any>"` stands for any value, `<any>`
//! inside a text for any text, and a member `"...": "..."` for whatever members there are besides. `text: ...`
//! is a body that is not JSON, `(empty)` none at all; without a body none is looked at. In a request `$CERT`
//! and `$KEY` stand for a certificate and its key, as JSON strings; `N bytes` is a body of that size.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use config::process::{self, AdminKey, AdminRole};
use config::{ConfigError, ErrorKind, PluginCatalog, PluginSchema};
use edge::admin::auth::Access;
use edge::admin::{Admin, AdminParts};
use edge::store::Store;
use edge::store::embedded::Embedded;
use edge::store::standalone::Standalone;
use http::Request;
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};

const ADMIN_KEY: &str = "admin-key";

/// A few plugins with just enough rules.
struct Catalog;

const PLUGINS: [(&str, i32); 11] = [
    ("cors", 4000),
    ("ip-restriction", 3000),
    ("basic-auth", 2520),
    ("key-auth", 2500),
    ("proxy-rewrite", 1008),
    ("limit-count", 1002),
    ("traffic-split", 966),
    ("grpc-transcode", 506),
    ("prometheus", 500),
    ("echo", 412),
    ("http-logger", 410),
];

impl PluginCatalog for Catalog {
    fn check(&self, name: &str, which: PluginSchema, value: &Value) -> Result<Value, Vec<ConfigError>> {
        let mut value = value.clone();
        let members = value.as_object_mut().ok_or_else(|| {
            let kind = ErrorKind::WrongType { found: "text", expected: "an object".into() };
            vec![ConfigError::new("", kind)]
        })?;
        let mut errors = Vec::new();
        let mut needs = |field: &str, is: fn(&Value) -> bool, expected: &str| match members.get(field) {
            None => {
                let kind = ErrorKind::MissingField { field: field.into() };
                errors.push(ConfigError::new(format!("/{field}"), kind));
            }
            Some(value) if !is(value) => {
                let kind = ErrorKind::WrongType { found: "text", expected: expected.into() };
                errors.push(ConfigError::new(format!("/{field}"), kind));
            }
            Some(_) => {}
        };
        match (name, which) {
            ("limit-count", PluginSchema::Config) => {
                needs("count", Value::is_u64, "a number");
                needs("time_window", Value::is_u64, "a number");
                members.entry("rejected_code").or_insert(json!(503));
            }
            ("key-auth", PluginSchema::Consumer) => needs("key", Value::is_string, "text"),
            ("key-auth", PluginSchema::Config) => {
                members.entry("header").or_insert(json!("apikey"));
            }
            ("basic-auth", PluginSchema::Consumer) => {
                needs("username", Value::is_string, "text");
                needs("password", Value::is_string, "text");
            }
            _ => {}
        }
        if errors.is_empty() { Ok(value) } else { Err(errors) }
    }

    fn schema(&self, name: &str, which: PluginSchema) -> Option<Value> {
        let known = PLUGINS.iter().any(|(known, _)| *known == name);
        let has = match which {
            PluginSchema::Config => true,
            PluginSchema::Consumer => self.is_auth(name),
            PluginSchema::Metadata => name == "http-logger",
        };
        (known && has).then(|| json!({"type": "object", "title": format!("{name} {which:?}")}))
    }

    fn priority(&self, name: &str) -> Option<i32> {
        PLUGINS.iter().find(|(known, _)| *known == name).map(|(_, priority)| *priority)
    }

    fn names(&self) -> Vec<&'static str> {
        PLUGINS.iter().map(|(name, _)| *name).collect()
    }

    fn is_auth(&self, name: &str) -> bool {
        name.ends_with("-auth")
    }

    fn refusal(&self, name: &str) -> Option<String> {
        (name == "uri-rewrite").then(|| "use `proxy-rewrite`".to_owned())
    }
}

struct Case {
    title: String,
    line: usize,
    method: String,
    uri: String,
    headers: Vec<(String, String)>,
    body: String,
    status: u16,
    expected_headers: Vec<(String, String)>,
    expected_body: String,
}

/// Headers, then the body after an empty line.
fn head_and_body(text: &str) -> (Vec<(String, String)>, String) {
    let mut headers = Vec::new();
    let mut rest = text;
    while let Some((line, after)) = rest.split_once('\n') {
        rest = after;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no header: {line}"));
        headers.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
    }
    (headers, rest.trim().to_owned())
}

fn cases(text: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut line = text.lines().take_while(|line| !line.starts_with("### ")).count() + 1;
    for part in format!("\n{text}").split("\n### ").skip(1) {
        let (title, rest) = part.split_once('\n').unwrap();
        let (request, answer) = rest.split_once("\n--- ").unwrap_or_else(|| panic!("line {line}: no answer"));
        let (first, request) = request.split_once('\n').unwrap_or((request, ""));
        let (method, uri) = first.split_once(' ').unwrap();
        let (status, answer) = answer.split_once('\n').unwrap_or((answer, ""));
        let (headers, body) = head_and_body(&format!("{request}\n"));
        let (expected_headers, expected_body) = head_and_body(&format!("{answer}\n"));
        cases.push(Case {
            title: title.to_owned(),
            line,
            method: method.to_owned(),
            uri: uri.trim().to_owned(),
            headers,
            body,
            status: status.trim().parse().unwrap(),
            expected_headers,
            expected_body,
        });
        line += part.matches('\n').count() + 1;
    }
    cases
}

/// Whether `text` is `pattern` with `<any>` for any text.
fn text_matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split("<any>");
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap()) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn value_matches(pattern: &Value, value: &Value) -> bool {
    match (pattern, value) {
        (Value::String(pattern), _) if pattern == "<any>" => true,
        (Value::String(pattern), Value::String(text)) => text_matches(pattern, text),
        (Value::Object(pattern), Value::Object(members)) => {
            let open = pattern.contains_key("...");
            let all = pattern.iter().filter(|(name, _)| *name != "...").all(|(name, pattern)| {
                members.get(name).is_some_and(|member| value_matches(pattern, member))
            });
            all && (open || pattern.len() == members.len())
        }
        (Value::Array(pattern), Value::Array(elements)) => {
            pattern.len() == elements.len()
                && pattern.iter().zip(elements).all(|(pattern, element)| value_matches(pattern, element))
        }
        _ => pattern == value,
    }
}

fn admin(text: &str, data_dir: &Path) -> Admin {
    let directives: Vec<&str> = text
        .lines()
        .take_while(|line| !line.starts_with("###"))
        .filter_map(|line| line.strip_prefix("@ "))
        .collect();
    let key = |name: &str, key: &str, role| AdminKey { name: name.into(), key: key.to_owned().into(), role };
    let settings = process::Admin {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        keys: vec![key("admin", ADMIN_KEY, AdminRole::Admin), key("viewer", "viewer-key", AdminRole::Viewer)],
        key_required: true,
        allow: vec!["127.0.0.0/24".parse().unwrap()],
        cors: true,
        tls: None,
    };
    let standalone = directives.contains(&"standalone").then(|| Arc::new(Standalone::open(data_dir)));
    let store: Arc<dyn Store> = match &standalone {
        Some(standalone) => standalone.clone(),
        None => Arc::new(Embedded::open(data_dir).unwrap()),
    };
    Admin::new(AdminParts {
        secrets: edge::secrets::Secrets::default(),
        consumers: layers::consumer::Consumers::default(),
        store,
        catalog: Arc::new(Catalog),
        access: Access::new(&settings, data_dir).unwrap(),
        prefix: "/apisix".to_owned(),
        cors: true,
        stream: directives.contains(&"stream"),
        signers: vec!["main".to_owned()],
        standalone,
        reload_plugins: Arc::new(|| {}),
    })
}

fn certificate() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["test.com".to_owned()]).unwrap().self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

async fn run(path: &Path) -> (usize, Vec<String>) {
    let text = fs::read_to_string(path).unwrap();
    let data = tempfile::tempdir().unwrap();
    let admin = admin(&text, data.path());
    let (certificate, key) = certificate();
    let mut failures = Vec::new();
    let cases = cases(&text);
    for case in &cases {
        let mut request = Request::builder().method(case.method.as_str()).uri(&case.uri);
        let mut peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut keyed = false;
        for (name, value) in &case.headers {
            keyed |= name == "x-api-key";
            match (name.as_str(), value.as_str()) {
                ("x-api-key", "-") => {}
                ("peer", address) => peer = address.parse().unwrap(),
                _ => request = request.header(name, value),
            }
        }
        if !keyed {
            request = request.header("x-api-key", ADMIN_KEY);
        }
        let body = match case.body.strip_suffix(" bytes").and_then(|size| size.parse::<usize>().ok()) {
            Some(size) => format!("\"{}\"", "x".repeat(size - 2)),
            None => case
                .body
                .replace("$CERT", &json!(certificate).to_string())
                .replace("$KEY", &json!(key).to_string()),
        };
        let response = admin.handle(peer, request.body(Full::new(Bytes::from(body))).unwrap()).await;
        let (parts, body) = response.into_parts();
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let mut wrong = Vec::new();
        if parts.status.as_u16() != case.status {
            wrong.push(format!("status {} instead of {}", parts.status.as_u16(), case.status));
        }
        for (name, expected) in &case.expected_headers {
            let found = parts.headers.get(name).and_then(|value| value.to_str().ok());
            if !found.is_some_and(|found| text_matches(expected, found)) {
                wrong.push(format!("header {name} is {found:?} instead of {expected:?}"));
            }
        }
        let matches = match case.expected_body.as_str() {
            "" => true,
            "(empty)" => body.is_empty(),
            expected => match expected.strip_prefix("text: ") {
                Some(expected) => text_matches(expected, body.trim_end()),
                None => {
                    let expected: Value = serde_json::from_str(expected).unwrap_or_else(|error| {
                        panic!("{}:{} {}: {error}", path.display(), case.line, case.title)
                    });
                    serde_json::from_str(&body).is_ok_and(|value| value_matches(&expected, &value))
                }
            },
        };
        if !matches {
            wrong.push("body differs".to_owned());
        }
        if !wrong.is_empty() {
            failures.push(format!(
                "{}:{} {}\n  {}\n  answer: {body}",
                path.file_name().unwrap().to_string_lossy(),
                case.line,
                case.title,
                wrong.join("; ")
            ));
        }
    }
    (cases.len(), failures)
}

#[tokio::test]
async fn every_pair_of_request_and_answer_holds() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/admin");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let (mut count, mut failures) = (0, Vec::new());
    for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "txt")) {
        let (cases, wrong) = run(path).await;
        count += cases;
        failures.extend(wrong);
    }
    assert!(failures.is_empty(), "{} of {count} differ:\n{}", failures.len(), failures.join("\n"));
    assert!(count >= 60, "only {count} pairs");
}

/// A route that was accepted has its upstream, whoever deletes it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_was_checked_stands() {
    let data = tempfile::tempdir().unwrap();
    let admin = Arc::new(admin("", data.path()));
    let call = |method: &'static str, uri: String, body: Value| {
        let admin = Arc::clone(&admin);
        let request = Request::builder().method(method).uri(uri).header("x-api-key", ADMIN_KEY);
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let request = request.body(Full::new(body)).unwrap();
        tokio::spawn(
            async move { admin.handle(IpAddr::V4(Ipv4Addr::LOCALHOST), request).await.status().as_u16() },
        )
    };
    for round in 0..50 {
        let upstream = json!({"nodes": {"127.0.0.1:80": 1}, "type": "roundrobin"});
        let made = call("PUT", format!("/apisix/admin/upstreams/{round}"), upstream).await.unwrap();
        assert_eq!(made, 201);
        let route = json!({"uri": "/a", "upstream_id": round.to_string()});
        let put = call("PUT", format!("/apisix/admin/routes/{round}"), route);
        let delete = call("DELETE", format!("/apisix/admin/upstreams/{round}"), Value::Null);
        let outcome = (put.await.unwrap(), delete.await.unwrap());
        assert!(matches!(outcome, (201, 400) | (400, 200)), "round {round}: {outcome:?}");
    }
}

/// Two PATCHes of one object at a time: neither is lost.
#[tokio::test(flavor = "multi_thread")]
async fn patches_of_one_object_do_not_overwrite_each_other() {
    let data = tempfile::tempdir().unwrap();
    let admin = Arc::new(admin("", data.path()));
    let call = |method: &'static str, body: Value| {
        let admin = Arc::clone(&admin);
        let request = Request::builder().method(method).uri("/apisix/admin/upstreams/1");
        let request =
            request.header("x-api-key", ADMIN_KEY).body(Full::new(Bytes::from(body.to_string()))).unwrap();
        tokio::spawn(async move {
            let response = admin.handle(IpAddr::V4(Ipv4Addr::LOCALHOST), request).await;
            let status = response.status().as_u16();
            (status, response.into_body().collect().await.unwrap().to_bytes())
        })
    };
    call("PUT", json!({"nodes": {"127.0.0.1:80": 1}, "type": "roundrobin"})).await.unwrap();
    let patches: Vec<_> =
        (2..10).map(|n| call("PATCH", json!({"nodes": {format!("127.0.0.{n}:80"): 1}}))).collect();
    for patch in patches {
        assert_eq!(patch.await.unwrap().0, 200);
    }
    let (_, body) = call("GET", json!({})).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body.pointer("/value/nodes").unwrap().as_object().unwrap().len(), 9, "{body}");
}
