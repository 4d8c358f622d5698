//! `postern certs` against a running authority, with workloads that do what it tells them.

use std::process::Command;
use std::time::{Duration, SystemTime};

use certs::trust::Usage;
use certs::workload::Proof;
use e2e::ca::{Authority, Member, Watcher};
use e2e::clock::WallClock;
use e2e::edge::binary;
use e2e::{Value, eventually_within, json};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const LIMITS: &str = r#"{"certificates_per_second": 1000.0, "certificates_burst": 1000}"#;

async fn authority() -> Authority {
    let limits: Value = serde_json::from_str(LIMITS).expect("JSON");
    Authority::start(json!({"limits": limits})).await
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
        let status = authority.certs_status().await;
        (status["fleet"]["current"] == count).then_some(())
    })
    .await;
    members
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_exchanged_under_way_and_the_authority_may_be_killed() {
    let mut authority = authority().await;
    let members = members(&authority, 3).await;
    let watcher = Watcher::start(&members);
    let root = authority.certs_status().await["roots"][0]["fingerprint"].clone();
    let quick = ["--soak", "200ms", "--spread", "500ms", "--timeout", "60s"];

    for kind in ["leaf", "issuer"] {
        let (code, out, err) = authority.certs(&[&["rotate", kind][..], &quick].concat()).await;
        assert_eq!(code, 0, "{out} {err}");
        assert!(out.contains("done"), "{out}");
    }
    let args = ["rotate", "root", "--reason", "a test", "--soak", "500ms", "--spread", "1s", "--no-wait"];
    let (code, out, err) = authority.certs(&args).await;
    assert_eq!(code, 4, "{out} {err}");
    for _ in 0..2 {
        authority.kill();
        authority.run().await;
    }
    let (code, out, err) = authority.certs(&["watch", "--timeout", "90s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    let now = authority.certs_status().await;
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
    assert_eq!(authority.certs(&["observe", "edge-1"]).await.0, 0);

    // A plan writes nothing; the rotation waits for the edge and says so.
    let (code, out, err) = authority.certs(&["rotate", "root", "--plan"]).await;
    assert_eq!(code, 0, "{out} {err}");
    assert!(out.contains("TRUSTING") && out.contains("RETIRING"), "{out}");
    assert!(authority.certs_status().await["rotation"].is_null());
    let rotate = [&["rotate", "root", "--timeout", "4s"][..], &quick].concat();
    let (code, out, err) = authority.certs(&rotate).await;
    assert_eq!(code, 3, "{out} {err}");
    assert!(out.contains("interlock 9") && out.contains("edge-1") && out.contains("--waive"), "{out}");
    let (code, _, err) = authority.certs(&["rotate", "leaf"]).await;
    assert_eq!((code, err.contains("rollback")), (4, true), "{err}");
    let (code, _, err) = authority.certs(&["advance", "--force"]).await;
    assert_eq!((code, err.contains("reason")), (3, true), "{err}");
    let (code, out, err) = authority.certs(&["rollback", "--reason", "not today", "--timeout", "60s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    assert_eq!(authority.certs_status().await["past"][0]["ended"], "rolled back");

    // Past the edge, and back from where everybody has renewed.
    let (code, out, err) =
        authority.certs(&[&["rotate", "root", "--step", "--no-wait"][..], &quick].concat()).await;
    assert_eq!(code, 4, "{out} {err}");
    let waive = ["advance", "--waive", "edge-1", "--reason", "not in use"];
    assert_eq!(authority.certs(&waive).await.0, 4);
    eventually_within(Duration::from_secs(60), "it migrates", || async {
        authority.certs(&["advance"]).await;
        (authority.certs_status().await["rotation"]["state"] == "MIGRATING").then_some(())
    })
    .await;
    let (code, out, err) = authority.certs(&["rollback", "--timeout", "60s"]).await;
    assert_eq!(code, 0, "{out} {err}");
    watcher.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_tells_what_ends_and_gets_out_of_trouble() {
    let authority = authority().await;
    let members = members(&authority, 2).await;
    assert_eq!(authority.certs(&["status"]).await.0, 0);
    assert_eq!(authority.certs(&["check", "--fail-before", "30d"]).await.0, 0);
    let (code, out, _) = authority.certs(&["check", "--fail-before", "400d"]).await;
    assert_eq!((code, out.contains("issuer ")), (2, true), "{out}");
    let (code, out, err) = authority.certs(&["rehearse"]).await;
    assert_eq!((code, out.contains("2 of 2")), (0, true), "{out} {err}");

    let (_, pem, _) = authority.certs(&["export-bundle"]).await;
    assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 1);
    let (_, told, _) = authority.certs(&["export-bundle", "-o", "json"]).await;
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!((&told["trust_domain"], &told["roots"]), (&json!("mesh.local"), &json!([pem])));
    let (_, spiffe, _) = authority.certs(&["export-bundle", "--format", "spiffe"]).await;
    let spiffe: Value = serde_json::from_str(&spiffe).expect("JSON");
    assert_eq!(spiffe["keys"][0]["use"], "x509-svid");

    let id = "spiffe://mesh.local/ns/shop/sa/s1";
    assert_eq!(authority.certs(&["revoke", id, "--reason", "broken into"]).await.0, 0);
    eventually_within(Duration::from_secs(30), "it is refused", || async {
        let trust = members[0].identity.trust()?;
        let svid = members[1].identity.svid()?;
        trust.verify(svid.chain(), Usage::Server, SystemTime::now()).is_err().then_some(())
    })
    .await;
    assert_eq!(authority.certs(&["revoke", "--undo", id]).await.0, 0);

    let root = authority.certs_status().await["roots"][0]["fingerprint"].as_str().expect("text").to_owned();
    let args = ["distrust", &root[..16], "--reason", "its key is known", "--timeout", "60s"];
    let (code, out, err) = authority.certs(&args).await;
    assert_eq!(code, 0, "{out} {err}");
    let now = authority.certs_status().await;
    assert_eq!(
        (&now["roots"][0]["state"], &now["roots"][1]["state"]),
        (&json!("distrusted"), &json!("active"))
    );

    // What is served is judged as workloads judge it, by what is revoked as well.
    let origin = e2e::origin::echo::start().await;
    let served = authority.sidecar("orders").inbound(origin.addr, json!({})).start().await;
    let (at, orders) = (served.inbound(0).to_string(), e2e::sidecar::id("orders"));
    for (revoke, expected, told) in [
        (None, 0, "the mesh accepts it"),
        (Some(&["revoke", &orders, "--reason", "broken into"][..]), 1, "revoked"),
        (Some(&["revoke", "--undo", &orders][..]), 0, "the mesh accepts it"),
    ] {
        if let Some(revoke) = revoke {
            assert_eq!(authority.certs(revoke).await.0, 0);
        }
        let (code, out, err) = authority.certs(&["verify", &at, "--expect", &orders]).await;
        assert!(code == expected && out.contains(told), "{revoke:?}: {code} {out} {err}");
    }
    drop(served);

    // What makes no sense is refused with words, and an authority that is not there is no success.
    for (args, words) in [
        (&["distrust", "zz", "--reason", "x"][..], "no root begins with"),
        (&["revoke", "xyz", "--reason", "x"][..], "neither a serial"),
        (&["recover", "--new-root"][..], "rotate root"),
        (&["resume"][..], "no rotation"),
        (&["distrust", "zz"][..], "--reason"),
        (&["check", "--fail-befor", "30d"][..], "--fail-before"),
    ] {
        let (code, out, err) = authority.certs(args).await;
        assert_eq!(code, 1, "{args:?} {out} {err}");
        assert!(err.contains(words), "{args:?}: {err}");
    }
    let (code, _, err) = e2e::edge::run(&["certs", "status", "--socket", "/nowhere"]);
    assert_eq!((code, err.contains("postern ca run")), (1, true), "{err}");
}

/// Prints the certificates of a trust store in hexadecimal digits.
const READ_JKS: &str = "import sys, jks\nfor one in jks.KeyStore.load(sys.argv[1], sys.argv[2]).certs.values(): print(one.cert.hex())";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn java_and_python_read_the_roots_as_a_trust_store() {
    let authority = authority().await;
    let file = authority.folder().join("roots.jks").display().to_string();
    let export = ["export-bundle", "--format", "jks", "--file", &file];
    let (code, out, err) = authority.certs(&[&export[..], &["--password", "short"]].concat()).await;
    assert_eq!((code, out.as_str(), err.contains("6 characters")), (1, "", true), "{err}");
    let (code, out, err) = authority.certs(&[&export[..], &["--password", "im Gänsemarsch"]].concat()).await;
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    let (_, pem, _) = authority.certs(&["export-bundle"]).await;
    let root = CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");

    let mut readers = 0;
    let python = concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/venv/bin/python");
    let imported = Command::new(python).args(["-c", "import jks"]).output();
    if imported.is_ok_and(|imported| imported.status.success()) {
        readers += 1;
        let read =
            |password| Command::new(python).args(["-c", READ_JKS, &file, password]).output().expect("Python");
        let hex: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
        let told = read("im Gänsemarsch");
        assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), hex, "{told:?}");
        assert!(!read("changeit").status.success(), "the password is looked at");
    }
    let (code, _, err) = authority.certs(&export).await;
    assert_eq!(code, 0, "{err}");
    let keytool = ["-list", "-rfc", "-storetype", "JKS", "-storepass", "changeit", "-keystore", &file];
    if let Ok(told) = Command::new("keytool").args(keytool).output() {
        readers += 1;
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let there = CertificateDer::from_pem_slice(told.as_bytes()).unwrap_or_else(|_| panic!("{told}"));
        assert!(there == root && told.contains("postern-"), "{told}");
    }
    if readers == 0 {
        eprintln!("skipped: neither pyjks nor keytool is installed (tests/needs.sh)");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_has_ended_is_replaced_in_the_folder_of_an_authority_that_does_not_run() {
    let Some(clock) = WallClock::new() else {
        eprintln!("faketime is not installed: no clock to move");
        return;
    };
    let mut authority = Authority::start_with(json!({}), clock.env()).await;
    let before = authority.told().await["roots"].clone();
    assert_eq!(authority.stop().await, Some(0));
    let recover = || {
        let data = authority.data();
        let mut command = Command::new(binary());
        command.args(["certs", "recover", "--offline", "--new-root", "--reason", "it has ended", "--data"]);
        let output =
            command.arg(&data).arg("--key-file").arg(data.join("seal.key")).envs(clock.env()).output();
        let output = output.expect("postern can be run");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.code(), said)
    };
    let (code, said) = recover();
    assert!(code == Some(1) && said.contains("rotate root"), "it is good: {code:?} {said}");
    clock.set("+4015d");
    let (code, said) = recover();
    assert!(code == Some(0) && said.contains("is in place"), "{code:?} {said}");
    authority.run().await;
    assert_ne!(authority.told().await["roots"], before);
    let workload = authority.token("spiffe://mesh.local/ns/shop/sa/s0");
    assert!(workload.starts_with("pjt_"), "it gives tokens again: {workload}");
}
