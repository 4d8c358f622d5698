//! Against a small agent that says what it is told to; the real one is in `tests/tests/consul_connect.rs`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::*;
use crate::ca::authority::pem;
use crate::source::Following;
use crate::testing::{Ca, poll, until, until_is};

/// Answers in the order in which they were given, per path; waits when there are none.
#[derive(Clone)]
struct Agent {
    url: String,
    state: Arc<Mutex<State>>,
    more: Arc<Notify>,
}

#[derive(Default)]
struct State {
    roots: VecDeque<(u16, u64, Value)>,
    leaf: VecDeque<(u16, u64, Value)>,
    /// Targets and tokens.
    asked: Vec<(String, String)>,
}

impl Agent {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let agent = Self { url, state: Arc::default(), more: Arc::default() };
        let shared = agent.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let agent = shared.clone();
                tokio::spawn(async move {
                    loop {
                        let mut head = Vec::new();
                        while !head.ends_with(b"\r\n\r\n") {
                            let Ok(byte) = stream.read_u8().await else { return };
                            head.push(byte);
                        }
                        let answer = agent.answer(&String::from_utf8(head).unwrap()).await;
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        agent
    }

    async fn answer(&self, head: &str) -> String {
        let target = head.split(' ').nth(1).unwrap().to_owned();
        let token = head.lines().find_map(|line| line.strip_prefix("x-consul-token: ")).unwrap_or_default();
        self.state.lock().unwrap().asked.push((target.clone(), token.to_owned()));
        loop {
            let more = self.more.notified();
            let next = {
                let mut state = self.state.lock().unwrap();
                let queue = if target.contains("/roots") { &mut state.roots } else { &mut state.leaf };
                queue.pop_front()
            };
            if let Some((status, index, body)) = next {
                let body = body.to_string();
                let length = body.len();
                return format!(
                    "HTTP/1.1 {status} X\r\nx-consul-index: {index}\r\ncontent-length: {length}\r\n\r\n{body}"
                );
            }
            more.await;
        }
    }

    fn say(&self, add: impl FnOnce(&mut State)) {
        add(&mut self.state.lock().unwrap());
        self.more.notify_waiters();
    }

    fn targets(&self, part: &str) -> Vec<String> {
        let state = self.state.lock().unwrap();
        let targets = state.asked.iter().map(|(target, _)| target);
        targets.filter(|target| target.contains(part)).cloned().collect()
    }

    fn follow(&self, identity: &MeshIdentity, token: Option<Token>) -> Following {
        let settings =
            Settings { address: self.url.clone(), service: "web".to_owned(), token, ca_file: None };
        Following::start(Box::new(ConsulConnect::new(settings).unwrap()), identity.clone())
    }
}

fn roots(domain: &str, cas: &[&Ca]) -> Value {
    let list: Vec<_> =
        cas.iter().map(|ca| json!({"RootCert": pem(&ca.root_der()), "Active": false})).collect();
    json!({"ActiveRootID": "a", "TrustDomain": domain, "Roots": list})
}

fn leaf(svid: &Svid) -> Value {
    use base64::Engine as _;
    let key = base64::engine::general_purpose::STANDARD.encode(svid.pkcs8().unwrap());
    let chain: String = svid.chain().iter().map(pem).collect();
    json!({
        "CertPEM": chain,
        "PrivateKeyPEM": format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n"),
        "ServiceURI": svid.id().to_string(),
    })
}

#[test]
fn an_index_is_never_zero_and_begins_anew_when_it_goes_back() {
    for (asked, told, first, next) in [(0, 7, 0, 7), (7, 7, 0, 7), (7, 9, 0, 9), (7, 3, 0, 0), (7, 0, 0, 0)] {
        assert_eq!(next_index(asked, told, first), next, "roots {asked} {told}");
    }
    for (asked, told, first, next) in [(1, 0, 1, 1), (1, 7, 1, 7), (7, 3, 1, 1), (0, 0, 0, 1)] {
        assert_eq!(next_index(asked, told, first), next, "leaf {asked} {told}");
    }
}

#[test]
fn settings_that_cannot_work_are_told() {
    let base = Settings {
        address: "http://127.0.0.1:8500".to_owned(),
        service: "web".to_owned(),
        token: None,
        ca_file: None,
    };
    assert!(ConsulConnect::new(base.clone()).is_ok());
    for (change, expected) in [
        (Settings { service: "a/b".to_owned(), ..base.clone() }, "service: `a/b`"),
        (Settings { service: String::new(), ..base.clone() }, "service: ``"),
        (Settings { address: "127.0.0.1:8500".to_owned(), ..base.clone() }, "address: `127.0.0.1:8500`"),
        (Settings { ca_file: Some("/no/such/file".into()), ..base }, "ca_file: cannot read /no/such/file"),
    ] {
        let error = ConsulConnect::new(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn roots_and_leaf_are_followed_by_index_and_the_leaf_is_always_waited_for() {
    let agent = Agent::start().await;
    let (old, new) = (Ca::new("c.consul"), Ca::new("c.consul"));
    let identity = MeshIdentity::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    std::fs::write(&path, "secret\n").unwrap();
    let following = agent.follow(&identity, Some(Token::File(path)));
    let first = old.svid("web");
    // The leaf comes first and waits for the roots.
    agent.say(|state| state.leaf.push_back((200, 20, leaf(&first))));
    agent.say(|state| state.roots.push_back((200, 10, roots("c.consul", &[&old]))));
    until_is(&identity, "an identity", |it| it.svid().is_some()).await;
    assert_eq!(identity.trust().unwrap().own().as_str(), "c.consul");

    // Another root, and a leaf below it that comes before the root: it is kept until it is believed.
    let second = new.svid("web");
    agent.say(|state| state.leaf.push_back((200, 21, leaf(&second))));
    let problem = until(&mut following.standing(), "the leaf is refused", |it| it.problem.clone()).await;
    assert!(problem.contains("no root signed"), "{problem}");
    assert_eq!(identity.svid().unwrap().leaf(), first.leaf(), "the old one stays");
    agent.say(|state| state.roots.push_back((200, 11, roots("c.consul", &[&old, &new]))));
    until_is(&identity, "the second leaf", |it| it.svid().unwrap().leaf() == second.leaf()).await;
    assert_eq!(identity.trust().unwrap().roots("c.consul").count(), 2, "the old root is still believed");
    until(&mut following.standing(), "well again", |it| it.problem.is_none().then_some(())).await;

    // The index goes back: from the beginning. The roots are the same: nothing changes.
    let generation = identity.trust().unwrap().generation();
    agent.say(|state| state.roots.push_back((200, 3, roots("c.consul", &[&new, &old]))));
    agent.say(|state| state.roots.push_back((200, 4, roots("c.consul", &[&new, &old]))));
    poll("the roots are waited for again", || agent.targets("index=4").len() == 1).await;
    poll("the next leaf is waited for", || agent.targets("index=21").len() == 1).await;
    assert_eq!(identity.trust().unwrap().generation(), generation);

    let path = "/v1/agent/connect/ca/roots";
    let expected = ["", "?index=10&wait=30s", "?index=11&wait=30s", "", "?index=4&wait=30s"]
        .map(|query| format!("{path}{query}"));
    assert_eq!(agent.targets("roots"), expected);
    let path = "/v1/agent/connect/ca/leaf/web";
    let expected = [1, 20, 21].map(|index| format!("{path}?index={index}&wait=30s"));
    assert_eq!(agent.targets("leaf"), expected);
    assert!(agent.state.lock().unwrap().asked.iter().all(|(_, token)| token == "secret"));
}

#[tokio::test]
async fn what_an_agent_answers_wrongly_takes_nothing_away() {
    let (ca, other) = (Ca::new("c.consul"), Ca::new("other.consul"));
    let good = ca.svid("web");
    let mut misnamed = leaf(&good);
    misnamed["ServiceURI"] = json!("spiffe://c.consul/ns/default/sa/api");
    let mut keyless = leaf(&good);
    keyless["PrivateKeyPEM"] = json!("");
    let r = |body| (true, 200, body);
    let l = |body| (false, 200, body);
    for (what, (is_root, status, body), expected) in [
        ("no leader", (true, 500, json!("No cluster leader")), "500"),
        ("no right", (false, 403, json!("Permission denied")), "service:write"),
        ("text", r(json!("text")), "the roots cannot be read"),
        ("no roots", r(json!({"TrustDomain": "c.consul", "Roots": null})), "no root"),
        ("no domain", r(json!({"TrustDomain": "", "Roots": []})), "TrustDomain"),
        ("no PEM", r(json!({"TrustDomain": "c.consul", "Roots": [{"RootCert": "x"}]})), "a root"),
        ("another Consul", r(roots("other.consul", &[&other])), "until it is started again"),
        ("a leaf of somebody else", l(misnamed), "Consul says"),
        ("no key", l(keyless), "the key of the leaf"),
        ("an object", l(json!({})), "the leaf cannot be read"),
        ("a leaf below other roots", l(leaf(&Ca::new("c.consul").svid("web"))), "no root signed"),
    ] {
        let agent = Agent::start().await;
        let identity = ca.process("web", &[]);
        let (before, bundle) = (identity.svid().unwrap().leaf().hash, identity.trust().unwrap().generation());
        let following = agent.follow(&identity, None);
        agent.say(|state| {
            let queue = if is_root { &mut state.roots } else { &mut state.leaf };
            queue.push_back((status, 5, body));
        });
        let problem = until(&mut following.standing(), what, |it| it.problem.clone()).await;
        assert!(problem.contains(expected), "{what}: {problem}");
        assert_eq!(identity.svid().unwrap().leaf().hash, before, "{what}");
        assert_eq!(identity.trust().unwrap().generation(), bundle, "{what}");
    }
}
