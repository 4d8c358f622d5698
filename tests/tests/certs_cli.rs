//! `postern certs` against a running authority, with workloads that do what it tells them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use certs::mesh::MeshIdentity;
use certs::trust::Usage;
use certs::workload::Proof;
use e2e::ca::{Authority, Member};
use e2e::{Value, eventually_within, json};

const LIMITS: &str = r#"{"certificates_per_second": 1000.0, "certificates_burst": 1000}"#;

async fn authority() -> Authority {
    let limits: Value = serde_json::from_str(LIMITS).expect("JSON");
    Authority::start(json!({"limits": limits})).await
}

/// Runs `postern certs` with these arguments without holding up the workloads of this process.
async fn certs(authority: &Authority, args: &[&str]) -> (i32, String, String) {
    let socket = authority.data().join("operators.sock").display().to_string();
    let mut all = vec!["certs".to_owned()];
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    all.extend(["--socket".to_owned(), socket]);
    let run = move || e2e::edge::run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.expect("the command runs")
}

async fn status(authority: &Authority) -> Value {
    let (_, out, err) = certs(authority, &["status", "-o", "json", "--all"]).await;
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out} {err}"))
}

/// Workloads with a certificate each.
async fn members(authority: &Authority, count: usize) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 0..count {
        let identity = format!("spiffe://mesh.local/ns/shop/sa/s{number}");
        let token = authority.token(&identity);
        let member = authority.join(Proof::JoinToken(token.into()), &format!("p{number}"));
        member.until(1).await;
        members.push(member);
    }
    // All of them have said what they use.
    eventually_within(Duration::from_secs(30), "the authority knows them", || async {
        let status = status(authority).await;
        (status["fleet"]["current"] == count).then_some(())
    })
    .await;
    members
}

/// Looks all the time whether everybody accepts everybody.
struct Watcher {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl Watcher {
    fn start(members: &[Member]) -> Watcher {
        let identities: Vec<MeshIdentity> = members.iter().map(|member| member.identity.clone()).collect();
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, looked) = (Arc::clone(&stop), Arc::clone(&looks));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for shows in &identities {
                    let svid = shows.svid().ok_or("a certificate is gone")?;
                    for sees in &identities {
                        let trust = sees.trust().ok_or("a bundle is gone")?;
                        trust
                            .verify(svid.chain(), Usage::Server, SystemTime::now())
                            .map_err(|error| format!("{} is refused: {error}", svid.id()))?;
                    }
                }
                looked.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            Ok(())
        });
        Watcher { stop, looks, thread: Some(thread) }
    }

    fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let result = self.thread.take().expect("it runs").join().expect("it does not panic");
        assert_eq!(result, Ok(()));
        assert!(self.looks.load(Ordering::Relaxed) > 0);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_exchanged_under_way_and_the_authority_may_be_killed() {
    let mut authority = authority().await;
    let members = members(&authority, 3).await;
    let watcher = Watcher::start(&members);
    let root = status(&authority).await["roots"][0]["fingerprint"].clone();
    let quick = ["--soak", "200ms", "--spread", "500ms", "--timeout", "60s"];

    for kind in ["leaf", "issuer"] {
        let (code, out, err) = certs(&authority, &[&["rotate", kind][..], &quick].concat()).await;
        assert_eq!(code, 0, "{out} {err}");
        assert!(out.contains("done"), "{out}");
    }
    let args = ["rotate", "root", "--reason", "a test", "--soak", "500ms", "--spread", "1s", "--no-wait"];
    let (code, out, err) = certs(&authority, &args).await;
    assert_eq!(code, 4, "{out} {err}");
    for _ in 0..2 {
        authority.kill();
        authority.run().await;
    }
    let (code, out, err) = certs(&authority, &["watch", "--timeout", "90s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    let now = status(&authority).await;
    assert_eq!(now["roots"][0]["fingerprint"], root);
    assert_eq!(now["roots"][0]["state"], "retired");
    assert_eq!(now["roots"][1]["state"], "active");
    assert_eq!(now["past"].as_array().map(Vec::len), Some(3));
    watcher.finish();
    for member in &members {
        let trust = member.identity.trust().expect("a bundle");
        assert_eq!(trust.roots("mesh.local").count(), 1, "the old root is gone from everybody");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_the_way_is_named_and_there_is_a_way_back() {
    let authority = authority().await;
    let members = members(&authority, 2).await;
    let watcher = Watcher::start(&members);
    let quick = ["--soak", "200ms", "--spread", "500ms"];
    assert_eq!(certs(&authority, &["observe", "edge-1"]).await.0, 0);

    // A plan writes nothing; the rotation waits for the edge and says so.
    let (code, out, err) = certs(&authority, &["rotate", "root", "--plan"]).await;
    assert_eq!(code, 0, "{out} {err}");
    assert!(out.contains("TRUSTING") && out.contains("RETIRING"), "{out}");
    assert!(status(&authority).await["rotation"].is_null());
    let rotate = [&["rotate", "root", "--timeout", "4s"][..], &quick].concat();
    let (code, out, err) = certs(&authority, &rotate).await;
    assert_eq!(code, 3, "{out} {err}");
    assert!(out.contains("interlock 9") && out.contains("edge-1") && out.contains("--waive"), "{out}");
    let (code, _, err) = certs(&authority, &["rotate", "leaf"]).await;
    assert_eq!((code, err.contains("rollback")), (4, true), "{err}");
    let (code, _, err) = certs(&authority, &["advance", "--force"]).await;
    assert_eq!((code, err.contains("reason")), (3, true), "{err}");
    let (code, out, err) =
        certs(&authority, &["rollback", "--reason", "not today", "--timeout", "60s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_eq!(status(&authority).await["past"][0]["ended"], "rolled back");

    // Past the edge, and back from where everybody has renewed.
    let (code, out, err) =
        certs(&authority, &[&["rotate", "root", "--step", "--no-wait"][..], &quick].concat()).await;
    assert_eq!(code, 4, "{out} {err}");
    let waive = ["advance", "--waive", "edge-1", "--reason", "not in use"];
    assert_eq!(certs(&authority, &waive).await.0, 4);
    eventually_within(Duration::from_secs(60), "it migrates", || async {
        certs(&authority, &["advance"]).await;
        (status(&authority).await["rotation"]["state"] == "MIGRATING").then_some(())
    })
    .await;
    let (code, out, err) = certs(&authority, &["rollback", "--timeout", "60s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    watcher.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_tells_what_ends_and_gets_out_of_trouble() {
    let authority = authority().await;
    let members = members(&authority, 2).await;
    assert_eq!(certs(&authority, &["status"]).await.0, 0);
    assert_eq!(certs(&authority, &["check", "--fail-before", "30d"]).await.0, 0);
    let (code, out, _) = certs(&authority, &["check", "--fail-before", "400d"]).await;
    assert_eq!((code, out.contains("issuer ")), (2, true), "{out}");
    let (code, out, err) = certs(&authority, &["rehearse"]).await;
    assert_eq!((code, out.contains("2 of 2")), (0, true), "{out} {err}");

    let (_, pem, _) = certs(&authority, &["export-bundle"]).await;
    assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 1);
    let (_, spiffe, _) = certs(&authority, &["export-bundle", "--format", "spiffe"]).await;
    let spiffe: Value = serde_json::from_str(&spiffe).expect("JSON");
    assert_eq!(spiffe["keys"][0]["use"], "x509-svid");

    let id = "spiffe://mesh.local/ns/shop/sa/s1";
    assert_eq!(certs(&authority, &["revoke", id, "--reason", "broken into"]).await.0, 0);
    eventually_within(Duration::from_secs(30), "it is refused", || async {
        let trust = members[0].identity.trust()?;
        let svid = members[1].identity.svid()?;
        trust.verify(svid.chain(), Usage::Server, SystemTime::now()).is_err().then_some(())
    })
    .await;
    assert_eq!(certs(&authority, &["revoke", "--undo", id]).await.0, 0);

    let root = status(&authority).await["roots"][0]["fingerprint"].as_str().expect("text").to_owned();
    let args = ["distrust", &root[..16], "--reason", "its key is known", "--timeout", "60s"];
    let (code, out, err) = certs(&authority, &args).await;
    assert_eq!(code, 0, "{out} {err}");
    let now = status(&authority).await;
    assert_eq!(
        (&now["roots"][0]["state"], &now["roots"][1]["state"]),
        (&json!("distrusted"), &json!("active"))
    );

    // What makes no sense is refused with words, and an authority that is not there is no success.
    for (args, words) in [
        (&["distrust", "zz", "--reason", "x"][..], "no root begins with"),
        (&["revoke", "xyz", "--reason", "x"][..], "neither a serial"),
        (&["recover", "--new-root"][..], "rotate root"),
        (&["resume"][..], "no rotation"),
    ] {
        let (code, out, err) = certs(&authority, args).await;
        assert_eq!(code, 1, "{args:?} {out} {err}");
        assert!(err.contains(words), "{args:?}: {err}");
    }
    let (code, _, err) = e2e::edge::run(&["certs", "status", "--socket", "/nowhere"]);
    assert_eq!((code, err.contains("postern ca run")), (1, true), "{err}");
}
