//! The SPIFFE Workload API as others speak it: the client from PyPI against Postern's server.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use certs::ca::Lifetimes;
use certs::ca::authority::{Authority, Key, KeyKind, Request};
use certs::ca::csr::PublicKey;
use certs::identity::{SpiffeId, TrustDomain};
use certs::mesh::MeshIdentity;
use certs::svid::Svid;
use certs::trust::Trust;
use certs::workload_api::{Serving, Settings};
use rcgen::PublicKeyData;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::time::timeout;

const YEAR: Duration = Duration::from_secs(365 * 86_400);

fn root(domain: &TrustDomain) -> Authority {
    Authority::root(domain, KeyKind::P256, YEAR, SystemTime::now()).expect("a root")
}

fn svid(issuer: &Authority, identity: &SpiffeId) -> Svid {
    let key = Key::generate(KeyKind::P256).expect("a key");
    let public = PublicKey::from_spki(&key.subject_public_key_info()).expect("a public key");
    let request =
        Request { key: &public, identity, dns_names: &[], ttl: Duration::ZERO, not_before: None, mark: None };
    let issued = issuer.leaf(&request, &Lifetimes::default(), SystemTime::now()).expect("a certificate");
    Svid::new(issued.chain, &key.private_key()).expect("an SVID")
}

/// The next line of the client that has this field; a stream that breaks fails the test.
async fn line(lines: &mut Lines<BufReader<ChildStdout>>, field: &str) -> Value {
    let line = timeout(Duration::from_secs(30), lines.next_line()).await;
    let line = line.expect("a line within 30 s").expect("a pipe").expect("the client is alive");
    let value: Value = serde_json::from_str(&line).expect("JSON");
    assert!(value.get(field).is_some(), "{line}");
    value
}

#[tokio::test]
async fn the_client_of_pypi_has_identity_bundles_and_every_change() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = here.join("../.cache/venv/bin/python");
    let there = Command::new(&python).args(["-c", "import spiffe"]).stderr(Stdio::null()).status().await;
    if !there.is_ok_and(|status| status.success()) {
        eprintln!("there is no spiffe of PyPI (tests/needs.sh installs it): not tested");
        return;
    }
    let (domain, other): (TrustDomain, TrustDomain) =
        ("mesh.test".parse().expect("a domain"), "other.test".parse().expect("a domain"));
    let identity: SpiffeId = "spiffe://mesh.test/ns/default/sa/web".parse().expect("an identity");
    let (old, foreign) = (root(&domain), root(&other));
    let issuer = old.intermediate(&domain, KeyKind::P256, YEAR / 2, SystemTime::now()).expect("an issuer");
    let trust = |generation, roots: &[&Authority]| {
        let roots = roots.iter().map(|root| root.certificate().clone());
        let trust = Trust::new(domain.clone(), generation).with_roots(&domain, roots).expect("roots");
        trust.with_roots(&other, [foreign.certificate().clone()]).expect("roots")
    };
    let process = MeshIdentity::new();
    process.set_trust(trust(1, &[&old])).expect("a trust");
    process.install(svid(&issuer, &identity)).expect("an identity");
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("api.sock");
    let settings = Settings { socket: socket.clone(), users: Default::default() };
    let _serving = Serving::start(process.clone(), settings).await.expect("a server");

    let mut client = Command::new(&python)
        .arg(here.join("tests/spiffe_client.py"))
        .arg(format!("unix://{}", socket.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("a client");
    let stdout = client.stdout.take().expect("a pipe");
    let mut lines = BufReader::new(stdout).lines();
    let refused = line(&mut lines, "jwt").await;
    assert!(refused["jwt"].as_str().is_some_and(|text| text.contains("FetchX509SVID")), "{refused}");

    let shown = |process: &MeshIdentity| process.svid().expect("an identity").leaf().serial.to_string();
    let first = line(&mut lines, "id").await;
    assert_eq!(first["id"], identity.as_str());
    assert_eq!(
        format!("{:0>32}", first["serial"].as_str().unwrap_or("")),
        format!("{:0>32}", shown(&process))
    );
    assert_eq!((&first["chain"], &first["key"]), (&2.into(), &true.into()));
    assert_eq!(first["bundles"], json!({"mesh.test": 1, "other.test": 1}));

    let new = root(&domain);
    process.set_trust(trust(2, &[&old, &new])).expect("a trust");
    let second = line(&mut lines, "id").await;
    assert_eq!(second["bundles"], json!({"mesh.test": 2, "other.test": 1}));
    process.install(svid(&new, &identity)).expect("an identity");
    let third = line(&mut lines, "id").await;
    assert_eq!(
        format!("{:0>32}", third["serial"].as_str().unwrap_or("")),
        format!("{:0>32}", shown(&process))
    );
    assert_eq!((&third["chain"], &third["key"]), (&1.into(), &true.into()));

    drop(client.stdin.take());
    let ended = timeout(Duration::from_secs(30), client.wait()).await;
    assert!(ended.expect("it ends").expect("a status").success());
}
