//! The door of an authority for clients of Istio: by the sidecar's own client, and by calls as they are on the wire.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use e2e::ca::Authority;
use e2e::client::Call;
use e2e::kube::KubeApi;
use e2e::load::Load;
use e2e::origin::echo;
use e2e::ports::Port;
use e2e::sidecar::id;
use e2e::{Value, eventually, json};
use rcgen::{CertificateParams, KeyPair};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

const NAME: &str = "istiod.istio-system.svc";

/// As Istio publishes it.
#[derive(Clone, PartialEq, prost::Message)]
struct CertificateRequest {
    #[prost(string, tag = "1")]
    csr: String,
    #[prost(int64, tag = "3")]
    validity_duration: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CertificateResponse {
    #[prost(string, repeated, tag = "1")]
    cert_chain: Vec<String>,
}

struct Mesh {
    authority: Authority,
    kube: KubeApi,
    door: Port,
}

impl Mesh {
    async fn start() -> Mesh {
        let (kube, door) = (KubeApi::start().await, Port::free());
        kube.user("token-of-orders", "system:serviceaccount:default:orders");
        let settings = json!({
            "istio": {"listen": door.addr().to_string()},
            "kubernetes": {"server": format!("http://{}", kube.addr), "token_file": "ca.yaml"},
            "bundle_files": ["roots.pem"],
            "limits": {"certificates_per_second": 1000, "certificates_burst": 1000},
        });
        let mesh = Mesh { authority: Authority::start(settings).await, kube, door };
        let roots = mesh.roots();
        eventually("the roots are in a file", || async { roots.exists().then_some(()) }).await;
        mesh
    }

    /// What clients of Istio believe, for Istio `CA_ROOT_CA`.
    fn roots(&self) -> PathBuf {
        self.authority.folder().join("roots.pem")
    }

    async fn call(&self, asked: CertificateRequest, token: Option<&str>) -> Result<Vec<String>, Status> {
        create(self.door.addr(), &self.roots(), asked, token).await
    }
}

async fn create(
    door: SocketAddr,
    roots: &Path,
    asked: CertificateRequest,
    token: Option<&str>,
) -> Result<Vec<String>, Status> {
    let dial = certs::grpc::Dial {
        server: door.to_string(),
        tls: Some(certs::grpc::client_tls(Some(roots), None).expect("the roots")),
        server_name: Some(NAME.to_owned()),
        patience: None,
    };
    let mut client = tonic::client::Grpc::new(dial.connect().await.expect("the door"));
    client.ready().await.expect("a connection");
    let mut request = tonic::Request::new(asked);
    if let Some(token) = token {
        let value: MetadataValue<_> = format!("Bearer {token}").parse().expect("a token");
        request.metadata_mut().insert("authorization", value);
    }
    let path = "/istio.v1.auth.IstioCertificateService/CreateCertificate".parse().expect("a path");
    let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
    Ok(client.unary(request, path, codec).await?.into_inner().cert_chain)
}

fn request(seconds: i64) -> CertificateRequest {
    let key = KeyPair::generate().expect("a key");
    let csr = CertificateParams::default().serialize_request(&key).expect("a request");
    CertificateRequest { csr: csr.pem().expect("PEM"), validity_duration: seconds }
}

fn pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_lives_by_the_door_through_a_rotation_that_waits_for_those_who_say_nothing() {
    let mesh = Mesh::start().await;
    let (authority, origin) = (&mesh.authority, echo::start().await);
    let payments = authority.sidecar("payments").inbound(origin.addr, json!({})).start().await;
    let token = authority.folder().join("orders.token");
    std::fs::write(&token, "token-of-orders").unwrap();
    // Its certificates live so short that it renews during the test.
    let istio = json!({"address": mesh.door.addr().to_string(), "server_name": NAME, "ca_file": mesh.roots(),
        "token_file": token, "ttl": 16});
    let ca = json!({"ca": {"address": null, "pin_file": null, "token_file": null, "istio": istio}});
    let orders = authority.sidecar("orders").config(ca).service("payments", payments.inbound(0), json!({}));
    let orders = orders.start().await;
    let call = || async { Call::get("/").send_to(orders.listener(0)).await };
    let answer = call().await.expect_status(200).json();
    assert!(answer["headers"]["x-forwarded-client-cert"].to_string().contains(&id("orders")), "{answer}");

    // Somebody who is handed a certificate, and is never heard of again.
    let secret = authority.token(&id("once"));
    let chain = mesh.call(request(12), Some(&secret)).await.expect("a certificate");
    assert_eq!(chain.len(), 3, "a leaf, its issuer, roots: {chain:?}");
    let end = SystemTime::now() + Duration::from_secs(10);
    let before = std::fs::read_to_string(mesh.roots()).unwrap();

    let load = Load::start(orders.listener(0), "GET / HTTP/1.1\r\nhost: payments\r\n\r\n", 200, 4, 40);
    let begin = ["rotate", "root", "--soak", "200ms", "--spread", "200ms", "--no-wait"];
    let (code, out, err) = authority.certs(&begin).await;
    assert_eq!(code, 4, "{out} {err}");
    let status = eventually("the rotation ends", || async {
        let status: Value = authority.certs_status().await;
        status["rotation"].is_null().then_some(status)
    })
    .await;
    assert!(SystemTime::now() > end, "the old root was taken away before its last certificate ended");
    assert_eq!(status["past"][0]["ended"], "done", "{status}");
    let listed = status["fleet"]["listed"].as_array().unwrap();
    let known = |start: &str| listed.iter().any(|one| one["id"].as_str().unwrap().starts_with(start));
    assert!(known("istio:default/orders-0") && known("istio:request/"), "{listed:?}");
    let after = std::fs::read_to_string(mesh.roots()).unwrap();
    assert!(!after.contains(before.trim()), "the old root is out of the bundle");
    // It renews once more by the door, which the new root has signed.
    let signed = || async {
        let metrics = Call::get("/metrics").send_to(authority.status).await.text();
        let line = "mesh_ca_requests_total{rpc=\"create_certificate\",attestor=\"kubernetes\",code=\"ok\"} ";
        let count = metrics.lines().find_map(|found| found.strip_prefix(line)?.parse::<u64>().ok());
        count.unwrap_or_default()
    };
    let so_far = signed().await;
    eventually("it renews again", || async { (signed().await > so_far).then_some(()) }).await;
    call().await.expect_status(200);
    load.finish_after(100).await.expect_no_failure();
    assert!(mesh.kube.requests().iter().any(|line| line.contains("tokenreviews")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_good_token_or_request_is_refused_at_the_door() {
    let mut mesh = Mesh::start().await;
    let once = mesh.authority.token(&id("orders"));
    mesh.call(request(600), Some(&once)).await.expect("a certificate");
    let weak = include_str!("../../certs/src/ca/csr/rsa1024.b64").replace('\n', "");
    let weak = base64::engine::general_purpose::STANDARD.decode(weak).unwrap();
    let of = |csr: String| CertificateRequest { csr, validity_duration: 0 };
    let good = Some("token-of-orders");
    let cases = [
        (request(0), None, Code::Unauthenticated, "show a token"),
        (request(0), Some("token-of-nobody"), Code::Unauthenticated, "does not know the token"),
        (request(0), Some(once.as_str()), Code::Unauthenticated, "used already"),
        (of("none".to_owned()), good, Code::InvalidArgument, "CERTIFICATE REQUEST"),
        (of(pem(&weak)), good, Code::InvalidArgument, "RSA of 1024 bits"),
        (of(pem(&[0x30; 20_000])), good, Code::InvalidArgument, "more than 16384 bytes"),
        (of("x".repeat(100_000)), good, Code::OutOfRange, "too large"),
    ];
    for (asked, token, code, words) in cases {
        let status = mesh.call(asked, token).await.expect_err(words);
        assert_eq!(status.code(), code, "{words}: {status}");
        assert!(status.message().contains(words), "{words}: {status}");
    }
    mesh.call(request(0), good).await.expect("who has one gets a certificate");
    mesh.kube.stop().await;
    mesh.kube.forget();
    let status = mesh.call(request(0), Some("another-token")).await.expect_err("nobody can be asked");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(mesh.authority.stop().await, Some(0));
    let (code, _, err) = mesh.authority.command(&["audit", "verify"]);
    assert_eq!(code, 0, "{err}");
}
