//! kill -9 of a real authority at every write of a root rotation: whoever starts it again goes on where the record says,
//! and nobody is refused meanwhile.

use std::time::{Duration, Instant};

use certs::workload::Proof;
use e2e::ca::{Authority, Watcher};
use e2e::{Value, eventually_within, json};

/// A rotation of a root has fewer writes than this.
const WRITES: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_authority_killed_at_every_write_of_a_rotation_ends_it() {
    let limits = json!({"certificates_per_second": 1000.0, "certificates_burst": 1000});
    let mut authority = Authority::start(json!({ "limits": limits })).await;
    let mut members = Vec::new();
    for number in 0..2 {
        let token = authority.token(&format!("spiffe://mesh.local/ns/shop/sa/s{number}"));
        let member = authority.join(Proof::JoinToken(token.into()), &format!("p{number}"));
        member.until(1).await;
        members.push(member);
    }
    eventually_within(Duration::from_secs(30), "the authority knows them", || async {
        (authority.certs_status().await["fleet"]["current"] == 2).then_some(())
    })
    .await;
    let watcher = Watcher::start(&members);
    let begin = ["rotate", "root", "--reason", "a test", "--soak", "1ms", "--spread", "1ms", "--no-wait"];
    let (code, out, err) = authority.certs(&begin).await;
    assert_eq!(code, 4, "{out} {err}");

    let mut kills = 0;
    let mut seen = authority.sequence().expect("a record");
    let until = Instant::now() + Duration::from_secs(120);
    let ended = loop {
        let Some(next) = authority.next_write(seen).await else { break authority.certs_status().await };
        authority.kill();
        kills += 1;
        seen = authority.sequence().unwrap_or(next);
        assert!(kills < WRITES && Instant::now() < until, "{kills} writes and no end: {seen}");
        authority.run().await;
    };
    assert!(kills >= 5, "{kills} writes are too few for a rotation");
    assert_eq!((&ended["rotation"], &ended["past"][0]["ended"]), (&Value::Null, &json!("done")));
    assert_eq!(
        (&ended["roots"][0]["state"], &ended["roots"][1]["state"]),
        (&json!("retired"), &json!("active"))
    );
    watcher.finish();
    for member in &members {
        member.workload.renew_now();
        eventually_within(Duration::from_secs(30), "only the new root is trusted", || {
            let roots = member.identity.trust().map(|trust| trust.roots("mesh.local").count());
            async move { (roots == Some(1)).then_some(()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_given_a_certificate_in_the_last_second_is_known_again() {
    let mut authority = Authority::start(json!({})).await;
    let token = authority.token("spiffe://mesh.local/ns/shop/sa/last");
    let member = authority.join(Proof::JoinToken(token.into()), "last");
    member.until(1).await;
    authority.kill();
    // It has gone too, and confirms nothing.
    drop(member);
    authority.run().await;
    let fleet = &authority.certs_status().await["fleet"];
    assert_eq!((&fleet["workloads"], &fleet["listed"][0]["id"]), (&json!(1), &json!("last")), "{fleet}");
}
