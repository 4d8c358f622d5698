#![allow(clippy::unwrap_used, reason = "tests")]

use std::cell::Cell;
use std::future::pending;
use std::time::SystemTime;

use certs::identity::TrustDomain;
use certs::mesh::Clients;
use certs::trust::{Revoked, Trust};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{LocalSet, spawn_local};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::local::LocalBox;
use crate::transport::hbone::receiver::{Gate, Guest, Leave, Receiver};
use crate::transport::hbone::server::Server;
use crate::transport::original_dst::Own;
use crate::transport::tcp::Traffic;

/// A client without a certificate.
#[derive(Debug)]
struct Nobody;

impl ResolvesClientCert for Nobody {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

const LIMIT: Duration = Duration::from_secs(20);
const WEB: &str = "spiffe://mesh.test/ns/default/sa/web";
const API: &str = "spiffe://mesh.test/ns/default/sa/api";

fn target() -> SocketAddr {
    "10.0.0.1:8080".parse().unwrap()
}

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn trust(&self, generation: u64) -> Trust {
        let domain: TrustDomain = "mesh.test".parse().unwrap();
        Trust::new(domain.clone(), generation).with_roots(&domain, [self.0.der().clone()]).unwrap()
    }

    fn svid(&self, id: &str) -> Svid {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let hour = Duration::from_secs(3600);
        params.not_before = (SystemTime::now() - hour).into();
        params.not_after = (SystemTime::now() + hour).into();
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.0).unwrap().der().clone();
        Svid::new(vec![leaf], &PrivateKeyDer::try_from(key.serialize_der()).unwrap()).unwrap()
    }

    fn identity(&self, id: &str) -> MeshIdentity {
        let identity = MeshIdentity::new();
        identity.set_trust(self.trust(1)).unwrap();
        identity.install(self.svid(id)).unwrap();
        identity
    }
}

/// A peer: what arrived there, and how it can be told to end.
struct Peer {
    address: SocketAddr,
    connections: Rc<Cell<usize>>,
    /// Connections with a lower number are told to end.
    drain: watch::Sender<usize>,
}

/// Serves every connection with `serve`, as `config` shakes hands.
async fn peer<F>(config: Arc<ServerConfig>, serve: impl Fn(Connect) -> F + Copy + 'static) -> Peer
where
    F: Future<Output = ()> + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Rc::new(Cell::new(0));
    let (drain, drained) = watch::channel(0);
    let count = connections.clone();
    spawn_local(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (config, count, mut drained) = (config.clone(), count.clone(), drained.clone());
            spawn_local(async move {
                let Ok(stream) = TlsAcceptor::from(config).accept(tcp).await else { return };
                let number = count.get();
                count.set(number + 1);
                let Ok(server) = Server::begin(stream, LIMIT).await else { return };
                let drained = async move {
                    if drained.wait_for(|upto| number < *upto).await.is_err() {
                        pending::<()>().await;
                    }
                };
                let _ = server.run(serve, drained).await;
            });
        }
    });
    Peer { address, connections, drain }
}

async fn echo(connect: Connect) {
    let mut tunnel = connect.accept().unwrap();
    let mut piece = vec![0; 16 * 1024];
    while let Ok(read) = tunnel.read(&mut piece).await {
        if read == 0 {
            let _ = tunnel.shutdown().await;
            return;
        }
        if tunnel.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

/// A peer that is `API`, echoes, and a client that is `WEB`.
async fn pair(ca: &Ca) -> (Peer, Hbone, MeshIdentity) {
    let api = ca.identity(API);
    let peer = peer(api.server_config(Clients::Required, &[ALPN]).unwrap(), echo).await;
    let web = ca.identity(WEB);
    (peer, Hbone::new(web.clone()), web)
}

fn api() -> Expected {
    Expected::from(API.parse::<SpiffeId>().unwrap())
}

async fn says(tunnel: &mut Tunnel, words: &[u8]) -> io::Result<()> {
    tunnel.write_all(words).await?;
    let mut heard = vec![0; words.len()];
    tunnel.read_exact(&mut heard).await?;
    assert_eq!(heard, words);
    Ok(())
}

/// Lets the tasks of this thread run until `done`, within a bound.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + LIMIT;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn tunnels_share_a_connection_and_half_closes_pass() {
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        let mut first = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        let mut second = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        says(&mut first, b"one").await.unwrap();
        says(&mut second, b"two").await.unwrap();
        second.write_all(b"last words").await.unwrap();
        second.shutdown().await.unwrap();
        let mut rest = Vec::new();
        second.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"last words", "the answer comes after our end");
        drop(second);
        says(&mut first, b"still here").await.unwrap();
        assert_eq!((peer.connections.get(), hbone.connections()), (1, 1));
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_hundred_megabytes_go_there_and_back() {
    const SIZE: usize = 100 << 20;
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        let tunnel = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        let (mut read, mut write) = tokio::io::split(tunnel);
        let send = async {
            let piece: Vec<u8> = (0..=255).cycle().take(64 * 1024).collect();
            for _ in 0..SIZE / piece.len() {
                write.write_all(&piece).await.unwrap();
            }
            write.shutdown().await.unwrap();
        };
        let receive = async {
            let mut piece = vec![0; 64 * 1024];
            let mut heard = 0;
            loop {
                let count = read.read(&mut piece).await.unwrap();
                if count == 0 {
                    return heard;
                }
                assert_eq!(usize::from(piece[0]), heard % 256, "in order");
                heard += count;
            }
        };
        let ((), heard) = tokio::join!(send, receive);
        assert_eq!(heard, SIZE);
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn who_does_not_read_is_held_up_and_holds_up_nobody_else() {
    async fn deaf(connect: Connect) {
        if connect.authority().port_u16() == Some(8080) {
            return echo(connect).await;
        }
        let _tunnel = connect.accept().unwrap();
        pending::<()>().await;
    }
    let work = async {
        let ca = Ca::new("root");
        let config = ca.identity(API).server_config(Clients::Required, &[ALPN]).unwrap();
        let peer = peer(config, deaf).await;
        let hbone = Hbone::new(ca.identity(WEB));
        let deaf = "10.0.0.1:9".parse().unwrap();
        let mut stuck = Vec::new();
        for _ in 0..20 {
            let mut tunnel = hbone.connect(peer.address, deaf, &api(), LIMIT).await.unwrap().tunnel;
            let piece = vec![0; 64 * 1024];
            let mut written = 0;
            while let Ok(count) = timeout(Duration::from_millis(100), tunnel.write(&piece)).await {
                written += count.unwrap();
            }
            let bound = STREAM_WINDOW as usize + SEND_BUFFER;
            assert!(written <= bound, "{written} bytes were taken from us, of {bound} that may be");
            stuck.push(tunnel);
        }
        let mut other = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        let words = async { says(&mut other, b"not held up").await };
        timeout(LIMIT, words).await.unwrap().unwrap();
        assert_eq!(hbone.connections(), 1);
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn one_more_than_a_connection_takes_opens_another() {
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        // All at once: those that come while the connection is being made wait for it and count.
        let all = (0..=MAX_STREAMS).map(|_| {
            let (hbone, address) = (hbone.clone(), peer.address);
            spawn_local(async move { hbone.connect(address, target(), &api(), LIMIT).await.unwrap().tunnel })
        });
        let mut tunnels = Vec::new();
        for tunnel in all.collect::<Vec<_>>() {
            tunnels.push(tunnel.await.unwrap());
        }
        assert_eq!(hbone.connections(), 2);
        assert_eq!(peer.connections.get(), 2);
        for tunnel in &mut tunnels {
            says(tunnel, b"here").await.unwrap();
        }
        tunnels.clear();
        tunnels.push(hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel);
        assert_eq!(peer.connections.get(), 2, "those that are there are used again");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn identities_are_never_mixed() {
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        let first = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        let second = hbone.connect(peer.address, target(), &Expected::OwnDomain, LIMIT).await.unwrap().tunnel;
        assert_eq!(peer.connections.get(), 2, "another expectation, another connection");
        drop((first, second));
        let other = Expected::from("spiffe://mesh.test/ns/default/sa/other".parse::<SpiffeId>().unwrap());
        let error = hbone.connect(peer.address, target(), &other, LIMIT).await.unwrap_err();
        assert!(matches!(error.verify_error(), Some(VerifyError::Unexpected { .. })), "{error}");
        assert_eq!(hbone.connections(), 2, "one that was not made is not kept");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_renewal_moves_new_tunnels_and_leaves_the_old() {
    let work = async {
        let ca = Ca::new("root");
        let (peer, hbone, web) = pair(&ca).await;
        let mut old = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        says(&mut old, b"before").await.unwrap();
        web.install(ca.svid(WEB)).unwrap();
        let mut new = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        assert_eq!(peer.connections.get(), 2);
        says(&mut old, b"old").await.unwrap();
        says(&mut new, b"new").await.unwrap();
        assert_eq!(hbone.connections(), 1, "the old one is not for new tunnels");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_peer_whose_root_has_gone_keeps_its_tunnels_and_one_that_is_revoked_does_not() {
    let work = async {
        let ca = Ca::new("root");
        let (peer, hbone, web) = pair(&ca).await;
        let mut tunnel = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        says(&mut tunnel, b"before").await.unwrap();
        web.set_trust(Ca::new("another root").trust(2)).unwrap();
        until("nothing new goes by the connection", || hbone.connections() == 0).await;
        says(&mut tunnel, b"still").await.unwrap();
        let error = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap_err();
        assert_eq!(error.verify_error(), Some(VerifyError::UnknownIssuer), "{error}");
        let mut revoked = Revoked::default();
        revoked.identities.insert(API.parse().unwrap(), SystemTime::now());
        web.set_trust(ca.trust(3).with_revoked(revoked)).unwrap();
        let heard = timeout(LIMIT, tunnel.read_u8()).await.unwrap();
        assert!(heard.is_err(), "the tunnel is cut");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_peer_that_leaves_keeps_its_tunnels_and_gets_no_new_ones() {
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        let mut old = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        says(&mut old, b"before").await.unwrap();
        peer.drain.send_replace(1);
        // Until we are told, the old connection takes more.
        let deadline = Instant::now() + LIMIT;
        while peer.connections.get() < 2 {
            assert!(Instant::now() < deadline, "new tunnels get a new connection");
            let mut new = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
            says(&mut new, b"new").await.unwrap();
            says(&mut old, b"during").await.unwrap();
        }
        says(&mut old, b"after").await.unwrap();
        old.shutdown().await.unwrap();
        let mut rest = Vec::new();
        old.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_refusal_is_told_and_the_connection_stays() {
    async fn picky(connect: Connect) {
        match connect.target() {
            Some(address) if address.port() == 8080 => echo(connect).await,
            Some(_) => connect.refuse(StatusCode::FORBIDDEN, "postern; details=\"not ours\""),
            None => connect.refuse(StatusCode::BAD_REQUEST, "postern; details=\"not an address\""),
        }
    }
    let work = async {
        let ca = Ca::new("root");
        let config = ca.identity(API).server_config(Clients::Required, &[ALPN]).unwrap();
        let peer = peer(config, picky).await;
        let hbone = Hbone::new(ca.identity(WEB));
        let foreign = "192.0.2.7:22".parse().unwrap();
        let error = hbone.connect(peer.address, foreign, &api(), LIMIT).await.unwrap_err();
        assert!(matches!(&error, HboneError::Refused { status: StatusCode::FORBIDDEN, .. }), "{error}");
        let v6 = "[2001:db8::1]:8080".parse().unwrap();
        let mut tunnel = hbone.connect(peer.address, v6, &api(), LIMIT).await.unwrap().tunnel;
        says(&mut tunnel, b"fine").await.unwrap();
        assert_eq!(peer.connections.get(), 1);
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn only_the_mesh_gets_in_and_only_by_http2() {
    let work = async {
        let ca = Ca::new("root");
        let (peer, hbone, web) = pair(&ca).await;
        let shake = |config: Arc<ClientConfig>| async move {
            let tcp = TcpStream::connect(peer.address).await.unwrap();
            let mut stream = TlsConnector::from(config).connect(peer.address.ip().into(), tcp).await?;
            // With TLS 1.3 the server judges the client after the client has finished.
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await?;
            stream.read_u8().await
        };
        assert!(shake(web.client_config(api(), &[ALPN]).unwrap()).await.is_ok(), "the test itself");
        let mut nobody = (*web.client_config(api(), &[ALPN]).unwrap()).clone();
        nobody.client_auth_cert_resolver = Arc::new(Nobody);
        assert!(shake(Arc::new(nobody)).await.is_err(), "a client without a certificate");
        let stranger = MeshIdentity::new();
        let other = Ca::new("another root");
        stranger.set_trust(other.trust(1)).unwrap();
        stranger.install(other.svid(WEB)).unwrap();
        stranger.set_trust(ca.trust(2)).unwrap();
        assert!(shake(stranger.client_config(api(), &[ALPN]).unwrap()).await.is_err(), "a stranger");
        assert!(shake(web.client_config(api(), &[b"http/1.1"]).unwrap()).await.is_err(), "another protocol");
        drop(hbone);
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_peer_that_does_not_speak_it_is_told() {
    let work = async {
        let ca = Ca::new("root");
        let silent = peer(ca.identity(API).server_config(Clients::Required, &[]).unwrap(), echo).await;
        let hbone = Hbone::new(ca.identity(WEB));
        let error = hbone.connect(silent.address, target(), &api(), LIMIT).await.unwrap_err();
        assert!(matches!(error, HboneError::Protocol(_)), "{error}");
        let nobody = Hbone::new(MeshIdentity::new());
        let error = nobody.connect(silent.address, target(), &api(), LIMIT).await.unwrap_err();
        assert!(matches!(error, HboneError::NoIdentity(_)), "{error}");
        let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let limit = Duration::from_millis(50);
        let error = hbone.connect(mute.local_addr().unwrap(), target(), &api(), limit).await.unwrap_err();
        assert!(matches!(error, HboneError::TimedOut { .. }), "{error}");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_connection_without_tunnels_is_let_go_after_a_while() {
    let work = async {
        let (peer, hbone, _) = pair(&Ca::new("root")).await;
        let mut kept = hbone.connect(peer.address, target(), &api(), LIMIT).await.unwrap().tunnel;
        says(&mut kept, b"here").await.unwrap();
        tokio::time::pause();
        tokio::time::advance(IDLE / 2).await;
        until("the timer has run", || true).await;
        assert_eq!(hbone.connections(), 1, "it is used");
        drop(kept);
        tokio::time::advance(IDLE - Duration::from_secs(1)).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(hbone.connections(), 1, "not yet");
        tokio::time::advance(IDLE).await;
        until("the connection is let go", || hbone.connections() == 0).await;
    };
    LocalSet::new().run_until(work).await;
}

/// Only `WEB` may, and only to ports above 1023; the application is somewhere else.
struct Door(SocketAddr);

impl Gate for Door {
    fn admit(&self, guest: &Guest, target: SocketAddr) -> Option<Rc<dyn Leave>> {
        let may = guest.peer.id.as_str() == WEB && target.port() > 1023;
        may.then(|| Rc::new(Granted(self.0, Arc::default())) as Rc<dyn Leave>)
    }
}

struct Granted(SocketAddr, Arc<Traffic>);

impl Leave for Granted {
    fn application(&self) -> SocketAddr {
        self.0
    }

    fn idle(&self) -> Duration {
        LIMIT
    }

    fn traffic(&self) -> &Arc<Traffic> {
        &self.1
    }

    fn revoked(&self) -> LocalBox<'static, &'static str> {
        Box::pin(pending())
    }

    fn over(&self, why: &'static str) {
        assert_ne!(why, "connect_failed");
    }
}

#[tokio::test]
async fn tunnels_lead_to_our_application_and_nowhere_else() {
    let work = async {
        let ca = Ca::new("root");
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = application.local_addr().unwrap();
        let answering = spawn_local(async move {
            let (mut stream, _) = application.accept().await.unwrap();
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        });
        let api_identity = ca.identity(API);
        // An address of 127.0.0.0/8 stands in for one of the machine's.
        let own = Own::at([15006, 15008], ["127.0.0.9".parse().unwrap()]);
        let receiver = Arc::new(Receiver::new(api_identity.clone(), Arc::new(own)).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = listener.local_addr().unwrap();
        let serving = receiver.clone();
        spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                spawn_local(serving.clone().serve(tcp, Door(behind), pending()));
            }
        });
        let web = Hbone::new(ca.identity(WEB));
        for (target, told, case) in [
            ("127.0.0.9:15006", StatusCode::LOOP_DETECTED, "our own listener"),
            ("127.0.0.1:15008", StatusCode::LOOP_DETECTED, "our own listener, by loopback"),
            ("127.0.0.1:8080", StatusCode::FORBIDDEN, "what is only on loopback stays there"),
            ("10.1.2.3:8080", StatusCode::FORBIDDEN, "somebody else"),
            ("127.0.0.9:22", StatusCode::FORBIDDEN, "a policy"),
        ] {
            match web.connect(peer, target.parse().unwrap(), &api(), LIMIT).await.unwrap_err() {
                HboneError::Refused { status, .. } => assert_eq!(status, told, "{case}"),
                error => panic!("{case}: {error}"),
            }
        }
        let stranger = Hbone::new(ca.identity("spiffe://mesh.test/ns/default/sa/other"));
        let ours = "127.0.0.9:8080".parse().unwrap();
        let error = stranger.connect(peer, ours, &api(), LIMIT).await.unwrap_err();
        assert!(matches!(error, HboneError::Refused { status: StatusCode::FORBIDDEN, .. }), "{error}");

        let mut tunnel = web.connect(peer, ours, &api(), LIMIT).await.unwrap().tunnel;
        says(&mut tunnel, b"to the application").await.unwrap();
        assert_eq!(web.connections(), 1, "refusals have not ended the connection");
        // The peer's root was exchanged in order: what stands stays, and what is new has to show something newer.
        api_identity.set_trust(Ca::new("another root").trust(2)).unwrap();
        let told = async { while web.connect(peer, ours, &api(), LIMIT).await.is_ok() {} };
        timeout(LIMIT, told).await.expect("new tunnels are refused, once the peer has heard of it");
        says(&mut tunnel, b"still to the application").await.unwrap();
        // It is taken back: that cuts what stands.
        let mut revoked = Revoked::default();
        revoked.identities.insert(WEB.parse().unwrap(), SystemTime::now());
        api_identity.set_trust(ca.trust(3).with_revoked(revoked)).unwrap();
        assert!(timeout(LIMIT, tunnel.read_u8()).await.unwrap().is_err(), "the tunnel is cut");
        timeout(LIMIT, answering).await.unwrap().unwrap();
        assert_eq!(receiver.counts.read().map(|(_, count)| count)[1..], [2, 2, 2, 0]);
    };
    LocalSet::new().run_until(work).await;
}
