//! Both ends of the Workload API with each other, and each with an end that misbehaves.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::stream::{self, StreamExt};
use prost::Message;
use rustls::pki_types::{PrivateKeyDer, PrivateSec1KeyDer};
use tokio::net::UnixListener;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::proto::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use super::proto::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use super::{HEADER, Serving, Settings, WorkloadApi, joined, parted, proto};
use crate::mesh::MeshIdentity;
use crate::source::Following;
use crate::svid::Svid;
use crate::testing::{Ca, trust, until, until_is};
use crate::trust::Usage;

fn settings(socket: &Path) -> Settings {
    Settings { socket: socket.to_owned(), users: BTreeSet::new() }
}

fn follow(socket: &Path, identity: &MeshIdentity) -> Following {
    let api = WorkloadApi { socket: Some(format!("unix://{}", socket.display())), identity: None };
    Following::start(Box::new(api), identity.clone())
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    (folder, socket)
}

async fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    SpiffeWorkloadApiClient::new(endpoint.connect().await.unwrap())
}

fn with_header<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(HEADER, MetadataValue::from_static("true"));
    request
}

/// Whether two processes believe each other.
fn believe(one: &MeshIdentity, other: &MeshIdentity) -> bool {
    let judge = |believer: &MeshIdentity, shown: &MeshIdentity| {
        shown.svid().is_some_and(|svid| believer.peer(svid.chain(), Usage::Server).is_ok())
    };
    judge(one, other) && judge(other, one)
}

#[tokio::test]
async fn an_application_has_identity_key_and_bundles_and_every_change_of_them() {
    let (_folder, socket) = folder();
    let (ca, next, other) = (Ca::new("mesh.test"), Ca::new("mesh.test"), Ca::new("other.test"));
    let identity = MeshIdentity::new();
    let _serving = Serving::start(identity.clone(), settings(&socket)).await.unwrap();
    let application = MeshIdentity::new();
    let following = follow(&socket, &application);

    // The call waits for an identity.
    identity.set_trust(trust(1, &ca.domain, &ca, &[&other])).unwrap();
    identity.install(ca.svid("web")).unwrap();
    until_is(&application, "the application has an identity", |it| it.svid().is_some()).await;
    assert_eq!(application.svid().unwrap().leaf(), identity.svid().unwrap().leaf());
    assert!(believe(&identity, &application));
    let stranger = other.process("stranger", &[&ca]);
    assert!(believe(&stranger, &application), "the federated bundle came along");

    // Another root, then a certificate below it.
    let both = trust(2, &ca.domain, &ca, &[&next]);
    identity.set_trust(both).unwrap();
    until_is(&application, "the new root", |it| it.trust().unwrap().roots("mesh.test").count() == 2).await;
    assert!(application.trust().unwrap().roots("other.test").next().is_none(), "no longer federated");
    identity.install(next.svid("web")).unwrap();
    let hash = identity.svid().unwrap().leaf().hash;
    until_is(&application, "the new certificate", |it| it.svid().unwrap().leaf().hash == hash).await;
    assert!(believe(&identity, &application));
    until(&mut following.standing(), "both are counted once", |it| {
        (it.certificates == 2 && it.bundles == 2 && it.problem.is_none()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn who_comes_without_the_metadata_or_as_another_user_gets_nothing() {
    let (_folder, socket) = folder();
    let ca = Ca::new("mesh.test");
    let identity = ca.process("web", &[]);
    let serving = Serving::start(identity.clone(), settings(&socket)).await.unwrap();
    let mut api = client(&socket).await;

    let bare = api.fetch_x509svid(proto::X509svidRequest {}).await.unwrap_err();
    assert_eq!(bare.code(), Code::InvalidArgument, "{bare:?}");
    let bare = api.fetch_x509_bundles(proto::X509BundlesRequest {}).await.unwrap_err();
    assert_eq!(bare.code(), Code::InvalidArgument, "{bare:?}");
    let mut request = Request::new(proto::X509svidRequest {});
    request.metadata_mut().insert(HEADER, MetadataValue::from_static("yes"));
    assert_eq!(api.fetch_x509svid(request).await.unwrap_err().code(), Code::InvalidArgument);

    let jwt = api.fetch_jwtsvid(with_header(proto::JwtsvidRequest::default())).await.unwrap_err();
    assert_eq!(jwt.code(), Code::Unimplemented);
    assert!(jwt.message().contains("FetchX509SVID"), "{jwt:?}");
    let jwt = api.fetch_jwt_bundles(with_header(proto::JwtBundlesRequest {})).await.unwrap_err();
    assert_eq!(jwt.code(), Code::Unimplemented);
    let jwt = api.validate_jwtsvid(with_header(proto::ValidateJwtsvidRequest::default())).await.unwrap_err();
    assert_eq!(jwt.code(), Code::Unimplemented);

    let own = tokio::net::UnixStream::pair().unwrap().0.peer_cred().unwrap().uid();
    drop(serving);
    let others = Settings { users: BTreeSet::from([own + 1]), ..settings(&socket) };
    let serving = Serving::start(identity.clone(), others).await.unwrap();
    let mut api = client(&socket).await;
    let denied = api.fetch_x509svid(with_header(proto::X509svidRequest {})).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied:?}");

    drop(serving);
    let named = Settings { users: BTreeSet::from([own, own + 1]), ..settings(&socket) };
    let _serving = Serving::start(identity.clone(), named).await.unwrap();
    let mut api = client(&socket).await;
    let call = api.fetch_x509svid(with_header(proto::X509svidRequest {})).await.unwrap();
    let message = call.into_inner().message().await.unwrap().unwrap();
    assert_eq!(message.svids[0].spiffe_id, "spiffe://mesh.test/ns/default/sa/web");
    assert_eq!(parted(&message.svids[0].x509_svid).unwrap(), identity.svid().unwrap().chain());
    assert_eq!(message.svids[0].bundle, joined([&ca.root_der()]));
    let call = api.fetch_x509_bundles(with_header(proto::X509BundlesRequest {})).await.unwrap();
    let bundles = call.into_inner().message().await.unwrap().unwrap().bundles;
    assert_eq!(bundles["spiffe://mesh.test"], joined([&ca.root_der()]));
}

#[test]
fn messages_have_the_numbers_of_the_standard() {
    let svid = proto::X509svid {
        spiffe_id: "a".into(),
        x509_svid: b"b".to_vec(),
        x509_svid_key: b"c".to_vec(),
        bundle: b"d".to_vec(),
        hint: "e".into(),
    };
    let bytes = b"\x0a\x01a\x12\x01b\x1a\x01c\x22\x01d\x2a\x01e";
    assert_eq!(svid.encode_to_vec(), bytes);
    let response = proto::X509svidResponse {
        svids: vec![svid],
        crl: vec![b"f".to_vec()],
        federated_bundles: [("g".to_owned(), b"h".to_vec())].into(),
    };
    let expected = [&b"\x0a\x0f"[..], bytes, b"\x12\x01f\x1a\x06\x0a\x01g\x12\x01h"].concat();
    assert_eq!(response.encode_to_vec(), expected);
    let bundles = proto::X509BundlesResponse {
        crl: vec![b"f".to_vec()],
        bundles: [("g".to_owned(), b"h".to_vec())].into(),
    };
    assert_eq!(bundles.encode_to_vec(), b"\x0a\x01f\x12\x06\x0a\x01g\x12\x01h");
}

#[tokio::test]
async fn a_socket_is_taken_over_from_the_dead_and_not_from_the_living() {
    let (folder, socket) = folder();
    let identity = MeshIdentity::new();
    drop(StdListener::bind(&socket).unwrap());
    assert!(socket.exists(), "left behind");
    let serving = Serving::start(identity.clone(), settings(&socket)).await.unwrap();
    let error = Serving::start(identity.clone(), settings(&socket)).await.unwrap_err();
    assert!(error.to_string().contains("another process listens"), "{error}");
    drop(serving);
    assert!(!socket.exists());

    std::fs::write(&socket, "text").unwrap();
    let error = Serving::start(identity.clone(), settings(&socket)).await.unwrap_err();
    assert!(error.to_string().contains("no socket"), "{error}");
    let nowhere = folder.path().join("none/api.sock");
    let error = Serving::start(identity, settings(&nowhere)).await.unwrap_err();
    assert!(error.to_string().contains("none/api.sock"), "{error}");
}

/// An agent that gives the answers of a list, then waits.
struct Agent {
    answers: Vec<Result<proto::X509svidResponse, Status>>,
    refusal: Option<Status>,
    calls: Arc<AtomicUsize>,
}

type Answers<T> = stream::BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Agent {
    type FetchX509SVIDStream = Answers<proto::X509svidResponse>;
    type FetchX509BundlesStream = Answers<proto::X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<proto::JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<proto::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        assert_eq!(request.metadata().get(HEADER).unwrap(), "true");
        self.calls.fetch_add(1, Ordering::SeqCst);
        match &self.refusal {
            Some(status) => Err(status.clone()),
            None => Ok(Response::new(stream::iter(self.answers.clone()).chain(stream::pending()).boxed())),
        }
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<proto::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwtsvid(
        &self,
        _: Request<proto::JwtsvidRequest>,
    ) -> Result<Response<proto::JwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<proto::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn validate_jwtsvid(
        &self,
        _: Request<proto::ValidateJwtsvidRequest>,
    ) -> Result<Response<proto::ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Runs an agent at `socket` until the task is aborted; how often it was called.
fn agent(
    socket: &Path,
    answers: Vec<Result<proto::X509svidResponse, Status>>,
    refusal: Option<Status>,
) -> (tokio::task::JoinHandle<()>, Arc<AtomicUsize>) {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let agent = Agent { answers, refusal, calls: Arc::clone(&calls) };
    let incoming = stream::unfold(listener, |listener| async move {
        Some((listener.accept().await.map(|(stream, _)| stream), listener))
    });
    let server = tonic::transport::Server::builder().add_service(SpiffeWorkloadApiServer::new(agent));
    let task = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    (task, calls)
}

fn message(ca: &Ca, svid: &Svid) -> proto::X509svidResponse {
    proto::X509svidResponse {
        svids: vec![proto::X509svid {
            spiffe_id: svid.id().to_string(),
            x509_svid: joined(svid.chain()),
            x509_svid_key: svid.pkcs8().unwrap().to_vec(),
            bundle: joined([&ca.root_der()]),
            hint: String::new(),
        }],
        ..Default::default()
    }
}

#[tokio::test]
async fn what_an_agent_sends_wrongly_takes_nothing_away() {
    let (_folder, socket) = folder();
    let (ca, stranger) = (Ca::new("mesh.test"), Ca::new("mesh.test"));
    let good = ca.svid("web");
    let mut cases = vec![("nothing", proto::X509svidResponse::default(), "no identity in it")];
    let mut case = |what, expected, change: &dyn Fn(&mut proto::X509svid)| {
        let mut message = message(&ca, &good);
        change(&mut message.svids[0]);
        cases.push((what, message, expected));
    };
    case("no name", "begins with `spiffe://`", &|svid| svid.spiffe_id.clear());
    case("another name", "the message says", &|svid| svid.spiffe_id += "2");
    case("half a certificate", "certificate 0 is no DER", &|svid| svid.x509_svid.truncate(20));
    case("something behind the chain", "certificate 2 is no DER", &|svid| svid.x509_svid.push(0));
    case("no chain", "no certificate", &|svid| svid.x509_svid.clear());
    case("no key", "cannot be used", &|svid| svid.x509_svid_key.clear());
    let other = ca.svid("web").pkcs8().unwrap();
    case("another key", "belongs to another", &|svid| svid.x509_svid_key = other.to_vec());
    case("no bundle", "no root", &|svid| svid.bundle.clear());
    let leaf = good.chain()[0].to_vec();
    case("a leaf as root", "no authority", &|svid| svid.bundle = leaf.clone());
    let foreign = joined([&stranger.root_der()]);
    case("roots of somebody else", "no root signed", &|svid| svid.bundle = foreign.clone());

    for (what, wrong, expected) in cases {
        let identity = ca.process("web", &[]);
        let before = identity.svid().unwrap().leaf().hash;
        let (agent, _) = agent(&socket, vec![Ok(wrong)], None);
        let following = follow(&socket, &identity);
        let problem = until(&mut following.standing(), what, |it| it.problem.clone()).await;
        assert!(problem.contains(expected), "{what}: {problem}");
        assert_eq!(identity.svid().unwrap().leaf().hash, before, "{what}");
        assert!(!following.standing().borrow().hopeless);
        agent.abort();
    }

    // A federated bundle that cannot be read does not keep the rest out; a good message after a wrong one counts.
    let mut good = message(&ca, &good);
    good.federated_bundles.insert("spiffe://other.test".into(), b"text".to_vec());
    let (_agent, _) = agent(&socket, vec![Ok(proto::X509svidResponse::default()), Ok(good)], None);
    let identity = MeshIdentity::new();
    let following = follow(&socket, &identity);
    until_is(&identity, "the good message", |it| it.svid().is_some()).await;
    until(&mut following.standing(), "the problem is gone", |it| it.problem.is_none().then_some(())).await;
}

#[tokio::test]
async fn an_agent_that_goes_away_is_found_again_and_nothing_is_lost_meanwhile() {
    let (_folder, socket) = folder();
    let ca = Ca::new("mesh.test");
    let identity = MeshIdentity::new();
    let following = follow(&socket, &identity);
    // Not there yet.
    until(&mut following.standing(), "a problem", |it| it.problem.clone()).await;
    let (first, second) = (ca.svid("web"), ca.svid("web"));
    let (task, _) = agent(&socket, vec![Ok(message(&ca, &first)), Err(Status::unavailable("bye"))], None);
    until_is(&identity, "the first", |it| it.svid().is_some_and(|own| own.leaf() == first.leaf())).await;
    let problem = until(&mut following.standing(), "told", |it| it.problem.clone()).await;
    assert!(problem.contains("bye"), "{problem}");
    task.abort();
    let (_task, _) = agent(&socket, vec![Ok(message(&ca, &second))], None);
    until_is(&identity, "the second", |it| it.svid().unwrap().leaf() == second.leaf()).await;
}

#[tokio::test]
async fn a_wrong_call_is_not_repeated_and_an_unknown_process_asks_slowly() {
    let (_folder, socket) = folder();
    let (task, calls) = agent(&socket, Vec::new(), Some(Status::invalid_argument("what?")));
    let following = follow(&socket, &MeshIdentity::new());
    let problem =
        until(&mut following.standing(), "it gives up", |it| it.hopeless.then(|| it.problem.clone())).await;
    assert!(problem.unwrap().contains("what?"));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    task.abort();

    let (_task, calls) = agent(&socket, Vec::new(), Some(Status::permission_denied("who are you")));
    let following = follow(&socket, &MeshIdentity::new());
    let problem = until(&mut following.standing(), "told", |it| it.problem.clone()).await;
    assert!(problem.contains("registered?"), "{problem}");
    assert!(!following.standing().borrow().hopeless);
    assert_eq!(calls.load(Ordering::SeqCst), 1, "at least 12 s lie between two questions");
}

#[tokio::test]
async fn one_of_several_identities_is_chosen_by_name() {
    let (_folder, socket) = folder();
    let ca = Ca::new("mesh.test");
    let (web, api) = (ca.svid("web"), ca.svid("api"));
    let mut both = message(&ca, &web);
    both.svids.extend(message(&ca, &api).svids);
    let (_task, _) = agent(&socket, vec![Ok(both)], None);
    for (wanted, expected) in [(None, &web), (Some("api"), &api), (Some("web"), &web)] {
        let identity = MeshIdentity::new();
        let socket = Some(socket.display().to_string());
        let source = WorkloadApi { socket, identity: wanted.map(|name| ca.id(name)) };
        let _following = Following::start(Box::new(source), identity.clone());
        until_is(&identity, "an identity", |it| it.svid().is_some()).await;
        assert_eq!(identity.svid().unwrap().leaf(), expected.leaf(), "{wanted:?}");
    }
}

#[test]
fn keys_in_older_forms_are_handed_out_in_pkcs_8() {
    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};

    let ca = Ca::new("mesh.test");
    let svid = ca.svid("web");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &svid.pkcs8().unwrap()).unwrap();
    let sec1: aws_lc_rs::encoding::EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().unwrap();
    let key = PrivateKeyDer::from(PrivateSec1KeyDer::from(sec1.as_ref().to_vec()));
    let again = Svid::new(svid.chain().to_vec(), &key).unwrap();
    let pkcs8 = PrivateKeyDer::Pkcs8(again.pkcs8().unwrap().to_vec().into());
    assert!(Svid::new(svid.chain().to_vec(), &pkcs8).is_ok(), "the same key");
}
