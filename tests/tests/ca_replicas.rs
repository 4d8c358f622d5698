//! Two `postern ca run` over one etcd, or one Consul: what they have in common, and what one does when the other is killed.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use certs::workload::Proof;
use e2e::ca::{Authority, Member, Watcher};
use e2e::consul::{self, Consul};
use e2e::etcd::Etcd;
use e2e::{Value, eventually_within, json};
use tempfile::TempDir;

const IDENTITY: &str = "spiffe://mesh.local/ns/shop/sa/";

/// The store of both, as their settings name it.
fn in_etcd(etcd: &Etcd) -> Value {
    json!({"etcd": {"endpoints": [etcd.endpoint()]}, "signs_unread": 5})
}

async fn replica(store: &Value, seal: &Path, name: &str) -> Authority {
    Authority::start(json!({
        "seal": {"key_file": seal},
        "store": store,
        "replica": name,
        "limits": {"certificates_per_second": 1000.0, "certificates_burst": 1000},
    }))
    .await
}

/// What both have.
fn sealing_key() -> (TempDir, PathBuf) {
    let shared = tempfile::tempdir().expect("a folder");
    let seal = shared.path().join("seal.key");
    std::fs::write(&seal, "5a".repeat(32)).expect("a sealing key");
    std::fs::set_permissions(&seal, Permissions::from_mode(0o600)).expect("a mode");
    (shared, seal)
}

/// The one that leads, and the other.
async fn by_rank(replicas: [Authority; 2]) -> (Authority, Authority) {
    let leads = eventually_within(Duration::from_secs(60), "one leads", || async {
        let mut leads = Vec::new();
        for replica in &replicas {
            leads.push(replica.certs_status().await["leads"] == true);
        }
        (leads.iter().filter(|leads| **leads).count() == 1).then(|| leads[0])
    })
    .await;
    let [one, two] = replicas;
    if leads { (one, two) } else { (two, one) }
}

async fn renewed_again(members: &[Member]) {
    for member in members {
        let before = member.status().renewals;
        eventually_within(Duration::from_secs(60), "a renewal", || {
            member.workload.renew_now();
            let renewals = member.status().renewals;
            async move {
                tokio::time::sleep(Duration::from_millis(200)).await;
                (renewals > before).then_some(())
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_begun_at_one_goes_on_at_the_other_when_that_is_killed() {
    let etcd = Etcd::start().await;
    one_begins_and_the_other_goes_on(in_etcd(&etcd)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_over_consul_goes_on_at_the_other_when_one_is_killed() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::start().await;
    one_begins_and_the_other_goes_on(json!({"consul": {"server": consul.url()}, "signs_unread": 5})).await;
}

async fn one_begins_and_the_other_goes_on(store: Value) {
    let (_shared, seal) = sealing_key();
    // Both find an empty store, and one founds the authority.
    let (one, two) = tokio::join!(replica(&store, &seal, "ca-1"), replica(&store, &seal, "ca-2"));
    let (told, other) = (one.told().await, two.told().await);
    assert_eq!(told["pin"], other["pin"], "whoever knows one knows the other");
    assert_eq!(told["roots"], other["roots"]);
    let (mut leader, follower) = by_rank([one, two]).await;

    // A token is made at one and used at the other, once.
    let servers = [leader.addr, follower.addr];
    let mut members = Vec::new();
    for number in 0..3 {
        let token = leader.token(&format!("{IDENTITY}s{number}"));
        let (first, second) = if number == 0 { (&follower, &leader) } else { (&leader, &follower) };
        let proof = || Proof::JoinToken(token.clone().into());
        first.join_at(&[first.addr], proof(), "guest").until(1).await;
        let late = second.join_at(&[second.addr], proof(), "late");
        eventually_within(Duration::from_secs(30), "the second use is refused", || {
            let refused = late.status().last_error.is_some_and(|(_, why)| why.contains("used already"));
            async move { refused.then_some(()) }
        })
        .await;
        let token = follower.token(&format!("{IDENTITY}s{number}"));
        let member = leader.join_at(&servers, Proof::JoinToken(token.into()), &format!("p{number}"));
        member.until(1).await;
        members.push(member);
    }
    // Whoever is over is over at both.
    eventually_within(Duration::from_secs(30), "it is known at both", || async {
        (follower.certs(&["forget", "guest"]).await.0 == 0).then_some(())
    })
    .await;
    assert_eq!(follower.certs(&["forget", "late"]).await.0, 1, "it never had a certificate");
    let watcher = Watcher::start(&members);

    // Begun at the one that does not lead; then the one that does is killed.
    let begin = ["rotate", "root", "--reason", "a test", "--soak", "2s", "--spread", "1s", "--no-wait"];
    let (code, out, err) = follower.certs(&begin).await;
    assert_eq!(code, 4, "{out} {err}");
    eventually_within(Duration::from_secs(60), "it is under way at the one that leads", || async {
        let rotation = leader.certs_status().await["rotation"]["state"].clone();
        (rotation == "TRUSTING" || rotation == "CUTOVER").then_some(())
    })
    .await;
    leader.kill();
    renewed_again(&members).await;
    let (code, out, err) = follower.certs(&["watch", "--timeout", "120s"]).await;
    assert_eq!(code, 0, "{out} {err} {}", follower.certs_status().await);
    let now = follower.certs_status().await;
    assert_eq!((&now["leads"], &now["past"][0]["ended"]), (&json!(true), &json!("done")));
    assert_eq!(now["roots"][0]["state"], "retired");
    watcher.finish();

    // The one that was killed is where the other is.
    leader.run().await;
    eventually_within(Duration::from_secs(30), "it follows", || async {
        let told = leader.certs_status().await;
        (told["roots"] == now["roots"] && told["leads"] == false).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_ends_in_order_leaves_the_lead_and_is_not_waited_for() {
    let etcd = Etcd::start().await;
    let store = in_etcd(&etcd);
    let (_shared, seal) = sealing_key();
    let (one, two) = tokio::join!(replica(&store, &seal, "ca-1"), replica(&store, &seal, "ca-2"));
    let (mut leader, follower) = by_rank([one, two]).await;
    eventually_within(Duration::from_secs(30), "it knows the other", || async {
        let others = follower.certs_status().await["replicas"].clone();
        others.as_array().is_some_and(|others| !others.is_empty()).then_some(())
    })
    .await;
    assert_eq!(leader.stop().await, Some(0));
    eventually_within(Duration::from_secs(30), "the other leads, and waits for nobody", || async {
        let told = follower.certs_status().await;
        (told["leads"] == true && told["replicas"] == json!([])).then_some(())
    })
    .await;
    let quick = ["rotate", "issuer", "--soak", "100ms", "--spread", "1s", "--timeout", "60s"];
    let (code, out, err) = follower.certs(&quick).await;
    assert_eq!(code, 0, "{out} {err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_sealing_key_is_told_and_nothing_is_written() {
    let etcd = Etcd::start().await;
    let shared = tempfile::tempdir().expect("a folder");
    let first = replica(&in_etcd(&etcd), &shared.path().join("one.key"), "ca-1").await;
    let settings = json!({
        "listen": "127.0.0.1:0",
        "status": "off",
        "seal": {"key_file": shared.path().join("two.key")},
        "store": {"etcd": {"endpoints": [etcd.endpoint()]}},
    });
    let file = shared.path().join("ca.yaml");
    std::fs::write(&file, settings.to_string()).expect("ca.yaml");
    let (code, _, err) = e2e::edge::run(&["ca", "run", "-c", file.to_str().expect("text")]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("sealed"), "{err}");
    assert_eq!(first.certs(&["status"]).await.0, 0);
}
