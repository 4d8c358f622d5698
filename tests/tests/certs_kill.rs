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
    let until = Instant::now() + Duration::from_secs(180);
    let mut kills = 0;
    // A busy machine lets several writes pass before it is seen that there was one.
    while kills < 5 {
        kills += killed_in_a_rotation(&mut authority, until).await;
    }
    let ended = authority.certs_status().await;
    let all = |list: &str, key: &str| -> Vec<Value> {
        ended[list].as_array().expect("a list").iter().map(|one| one[key].clone()).collect()
    };
    assert!(all("past", "ended").iter().all(|ended| ended == "done"), "{ended}");
    let roots = all("roots", "state");
    let (last, former) = roots.split_last().expect("a root");
    assert!(last == "active" && former.iter().all(|state| state == "retired"), "{roots:?}");
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

/// Exchanges the root, and kills the authority whenever it was seen to have written. How often that was.
async fn killed_in_a_rotation(authority: &mut Authority, until: Instant) -> usize {
    let begin = ["rotate", "root", "--reason", "a test", "--soak", "1ms", "--spread", "1ms", "--no-wait"];
    let (code, out, err) = authority.certs(&begin).await;
    assert_eq!(code, 4, "{out} {err}");
    let mut kills = 0;
    let mut seen = authority.sequence().expect("a record");
    while let Some(next) = authority.next_write(seen).await {
        authority.kill();
        kills += 1;
        seen = authority.sequence().unwrap_or(next);
        assert!(kills < WRITES && Instant::now() < until, "{kills} writes and no end: {seen}");
        authority.run().await;
    }
    assert_eq!(authority.certs_status().await["rotation"], Value::Null);
    kills
}
