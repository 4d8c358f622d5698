//! Against a server of the API over TLS, which signs, refuses, or answers nonsense.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::VecDeque;
use std::sync::Mutex;

use futures_util::stream;
use prost::Message;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::Response;

use super::proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use super::*;
use crate::ca::authority::{Key, KeyKind, pem};
use crate::ca::csr::PublicKey;
use crate::clock::SystemClock;
use crate::mesh::MeshIdentity;
use crate::renewing::Renewing;
use crate::source::Following;
use crate::testing::{Ca, until, until_is};
use crate::workload::time::MeshTime;

type Answers = Arc<Mutex<VecDeque<Result<Vec<String>, Status>>>>;

struct Authority {
    ca: Ca,
    /// In place of signing.
    answers: Answers,
    /// Tokens and lives that were asked for.
    asked: Arc<Mutex<Vec<(String, i64)>>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<proto::IstioCertificateRequest>,
    ) -> Result<Response<proto::IstioCertificateResponse>, Status> {
        let token = request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned();
        let asked = request.into_inner();
        self.asked.lock().unwrap().push((token, asked.validity_duration));
        let cert_chain = match self.answers.lock().unwrap().pop_front() {
            Some(answer) => answer?,
            None => {
                let der = CertificateSigningRequestDer::from_pem_slice(asked.csr.as_bytes()).unwrap();
                let key = PublicKey::from_csr(&der).unwrap();
                let ttl = Duration::from_secs(asked.validity_duration.unsigned_abs());
                let issued = self.ca.sign(&key, &self.ca.id("web"), ttl);
                issued.chain.iter().chain([&self.ca.root_der()]).map(pem).collect()
            }
        };
        Ok(Response::new(proto::IstioCertificateResponse { cert_chain, root_cert: None }))
    }
}

struct Served {
    address: String,
    pin: Pin,
    answers: Answers,
    asked: Arc<Mutex<Vec<(String, i64)>>>,
    folder: tempfile::TempDir,
}

/// Serves the API on a port; the certificate of its TLS is made by itself.
async fn serve() -> Served {
    let key = Key::generate(KeyKind::P256).unwrap();
    let tls = TlsAcceptor::from(channel::server(&key, SystemTime::now()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (answers, asked) = (Answers::default(), Arc::default());
    let authority =
        Authority { ca: Ca::new("cluster.local"), answers: answers.clone(), asked: Arc::clone(&asked) };
    let incoming = stream::unfold((listener, tls), |(listener, tls)| async move {
        let (stream, _) = listener.accept().await.unwrap();
        Some((tls.accept(stream).await, (listener, tls)))
    });
    let server = tonic::transport::Server::builder()
        .add_service(IstioCertificateServiceServer::new(authority))
        .serve_with_incoming(Box::pin(incoming));
    tokio::spawn(async move { server.await.unwrap() });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "first\n").unwrap();
    Served { address, pin: Pin::of(&key), answers, asked, folder }
}

fn settings(served: &Served) -> Settings {
    Settings {
        address: served.address.clone(),
        server_name: None,
        ca_file: None,
        pin: Some(served.pin.to_string()),
        token: Token::File(served.folder.path().join("token")),
        ttl_seconds: Some(7200),
    }
}

fn follow(settings: Settings) -> (MeshIdentity, Following) {
    let time = MeshTime::new(SystemClock::new());
    let identity = MeshIdentity::with_clock(time.clone());
    let source = Renewing::new(Istio::new(settings).unwrap(), None, time);
    (identity.clone(), Following::start(Box::new(source), identity))
}

#[tokio::test]
async fn an_authority_of_istio_gives_identity_and_roots() {
    let served = serve().await;
    let (identity, _following) = follow(settings(&served));
    until_is(&identity, "an identity", |it| it.svid().is_some()).await;
    let svid = identity.svid().unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://cluster.local/ns/default/sa/web");
    assert_eq!(svid.chain().len(), 2, "the roots are no part of it");
    assert_eq!(identity.trust().unwrap().roots("cluster.local").count(), 1);
    assert_eq!(*served.asked.lock().unwrap(), [("Bearer first".to_owned(), 7200)]);
}

#[tokio::test]
async fn refusals_and_nonsense_are_told_and_asked_again() {
    let ca = Ca::new("cluster.local");
    let root = pem(&ca.root_der());
    let leaf = pem(&ca.svid("web").chain()[0]);
    for (answer, expected) in [
        (Err(Status::unauthenticated("expired")), "(the token and its audience?)"),
        (Ok(Vec::new()), "it is empty"),
        (Ok(vec![root.clone()]), "one entry"),
        (Ok(vec!["text".to_owned(), root.clone()]), "no PEM block"),
        (Ok(vec![leaf.clone(), root.clone()]), "belongs to another"),
        (Ok(vec![root; 17]), "more than 16 entries"),
    ] {
        let served = serve().await;
        served.answers.lock().unwrap().push_back(answer);
        let (identity, following) = follow(settings(&served));
        let problem = until(&mut following.standing(), expected, |it| it.problem.clone()).await;
        assert!(problem.contains(expected), "{expected}: {problem}");
        assert!(problem.contains(&served.address), "{problem}");
        // The token is read again for the next attempt, which signs.
        std::fs::write(served.folder.path().join("token"), "second").unwrap();
        until_is(&identity, "an identity", |it| it.svid().is_some()).await;
        let asked = served.asked.lock().unwrap().last().unwrap().0.clone();
        assert!(asked == "Bearer second" || asked == "Bearer first", "{asked}");
    }
}

#[tokio::test]
async fn an_authority_with_another_key_or_name_gets_no_token() {
    let served = serve().await;
    let other = Pin::of(&Key::generate(KeyKind::P256).unwrap()).to_string();
    let (_, following) = follow(Settings { pin: Some(other), ..settings(&served) });
    until(&mut following.standing(), "told", |it| it.problem.clone()).await;
    let ca = Ca::new("cluster.local");
    let file = served.folder.path().join("roots.pem");
    std::fs::write(&file, pem(&ca.root_der())).unwrap();
    let (_, following) = follow(Settings { pin: None, ca_file: Some(file), ..settings(&served) });
    until(&mut following.standing(), "told", |it| it.problem.clone()).await;
    assert!(served.asked.lock().unwrap().is_empty());
}

#[test]
fn roots_are_the_last_entry_or_named_apart() {
    let (old, new) = (Ca::new("cluster.local"), Ca::new("cluster.local"));
    let chain: Vec<String> = old.svid("web").chain().iter().map(pem).collect();
    let roots = [pem(&old.root_der()), pem(&new.root_der())];
    let last = proto::IstioCertificateResponse {
        cert_chain: [chain.clone(), vec![roots.concat()]].concat(),
        root_cert: None,
    };
    let apart = proto::IstioCertificateResponse {
        cert_chain: chain,
        root_cert: Some(proto::Roots { ca_cert: roots.to_vec() }),
    };
    let empty = proto::IstioCertificateResponse { root_cert: Some(proto::Roots::default()), ..last.clone() };
    for answer in [last, apart, empty] {
        let signed = read(&answer).unwrap();
        assert_eq!(signed.chain.len(), 2);
        assert_eq!(signed.roots, [old.root_der(), new.root_der()]);
    }
}

#[test]
fn settings_that_cannot_work_are_told() {
    let base = Settings {
        address: "istiod.istio-system.svc:15012".to_owned(),
        server_name: None,
        ca_file: Some("/roots.pem".into()),
        pin: None,
        token: Token::Env("TOKEN".to_owned()),
        ttl_seconds: None,
    };
    assert!(Istio::new(base.clone()).is_ok());
    assert!(Istio::new(Settings { address: "[::1]:15012".to_owned(), ..base.clone() }).is_ok());
    for (change, expected) in [
        (Settings { ca_file: None, ..base.clone() }, "either `ca_file` or `pin`"),
        (Settings { pin: Some("sha256/x".to_owned()), ..base.clone() }, "either `ca_file` or `pin`"),
        (Settings { ca_file: None, pin: Some("x".to_owned()), ..base.clone() }, "pin: "),
        (Settings { address: "istiod".to_owned(), ..base.clone() }, "address: `istiod`"),
        (Settings { address: "https://istiod:1".to_owned(), ..base.clone() }, "address: `https://istiod:1`"),
        (Settings { server_name: Some("a b".to_owned()), ..base }, "server_name: "),
    ] {
        let error = Istio::new(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn messages_have_the_numbers_of_istio() {
    let fields = [("k".to_owned(), proto::Value { string_value: "v".into() })].into();
    let request = proto::IstioCertificateRequest {
        csr: "a".into(),
        validity_duration: 3,
        metadata: Some(proto::Struct { fields }),
    };
    let struct_of_one = b"\x22\x0a\x0a\x08\x0a\x01k\x12\x03\x1a\x01v";
    assert_eq!(request.encode_to_vec(), [b"\x0a\x01a\x18\x03".as_slice(), struct_of_one].concat());
    let response = proto::IstioCertificateResponse {
        cert_chain: vec!["a".into(), "b".into()],
        root_cert: Some(proto::Roots { ca_cert: vec!["c".into()] }),
    };
    assert_eq!(response.encode_to_vec(), b"\x0a\x01a\x0a\x01b\x12\x03\x0a\x01c");
}
