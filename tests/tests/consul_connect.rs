//! The real Consul as the authority of a mesh: identities of services, and its authority changed under live handshakes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use certs::consul_connect::{ConsulConnect, Settings};
use certs::mesh::{Clients, Expected, MeshIdentity};
use certs::source::Following;
use certs::token::Token;
use e2e::consul::{self, Consul};
use e2e::{Value, eventually_within, json};
use rcgen::KeyPair;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Agents spread the renewal of leaves over half a minute when roots change.
const SPREAD: Duration = Duration::from_secs(45);
/// So many services that some of them have new leaves soon, while others still have old ones.
const SERVICES: usize = 8;

struct Service {
    identity: MeshIdentity,
    following: Following,
    addr: SocketAddr,
    _server: tokio::task::AbortHandle,
}

fn settings(consul: &Consul, service: &str) -> Settings {
    Settings { address: consul.url(), service: service.to_owned(), token: None, ca_file: None }
}

fn follow(settings: Settings) -> (MeshIdentity, Following) {
    let identity = MeshIdentity::new();
    let source = ConsulConnect::new(settings).expect("settings");
    let following = Following::start(Box::new(source), identity.clone());
    (identity, following)
}

async fn until_known(identity: &MeshIdentity, following: &Following) {
    eventually_within(Duration::from_secs(30), "there is an identity", || async {
        identity.svid().map(drop).ok_or_else(|| following.standing().borrow().clone()).ok()
    })
    .await;
}

impl Service {
    /// A service that answers one byte with another over the mesh's TLS.
    async fn start(consul: &Consul, name: &str) -> Service {
        let (identity, following) = follow(settings(consul, name));
        until_known(&identity, &following).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let tls = TlsAcceptor::from(identity.server_config(Clients::Required, &[]).expect("a configuration"));
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let tls = tls.clone();
                connections.spawn(async move {
                    let mut stream = tls.accept(stream).await?;
                    let byte = stream.read_u8().await?;
                    stream.write_u8(byte + 1).await?;
                    stream.shutdown().await
                });
            }
        });
        Service { identity, following, addr, _server: server.abort_handle() }
    }

    /// A whole handshake, and a byte each way: only then both have believed each other.
    async fn call(&self, other: &Service) -> Result<(), String> {
        let expected = Expected::from(other.identity.svid().expect("an identity").id().clone());
        let config = self.identity.client_config(expected, &[]).map_err(|error| error.to_string())?;
        let call = async {
            let stream = TcpStream::connect(other.addr).await?;
            let name = ServerName::try_from("mesh").expect("a name");
            let mut stream = TlsConnector::from(config).connect(name, stream).await?;
            stream.write_u8(1).await?;
            stream.read_u8().await
        };
        match tokio::time::timeout(Duration::from_secs(10), call).await {
            Ok(Ok(2)) => Ok(()),
            Ok(Ok(byte)) => Err(format!("{byte} and not 2")),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer".to_owned()),
        }
    }

    fn issuer(&self) -> String {
        self.identity.svid().expect("an identity").leaf().issuer.to_string()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_of_consul_changes_and_no_handshake_fails() {
    if !consul::is_there() {
        return;
    }
    let consul = Consul::with(json!({"connect": {"enabled": true}})).await;
    let mut services = Vec::new();
    for number in 0..SERVICES {
        services.push(Arc::new(Service::start(&consul, &format!("service-{number}")).await));
    }
    let trust = services[0].identity.trust().expect("a trust");
    let domain = trust.own().as_str().to_owned();
    let id = services[0].identity.svid().expect("an identity").id().clone();
    assert_eq!(id.as_str(), format!("spiffe://{domain}/ns/default/dc/dc1/svc/service-0"));
    assert!(domain.ends_with(".consul"), "{domain}");

    // Everybody calls everybody, all the time.
    let done = Arc::new(AtomicBool::new(false));
    let calls = Arc::new(AtomicUsize::new(0));
    let mut callers = JoinSet::new();
    for caller in &services {
        let (caller, services) = (caller.clone(), services.clone());
        let (done, calls) = (done.clone(), calls.clone());
        callers.spawn(async move {
            while !done.load(Ordering::SeqCst) {
                for other in &services {
                    let who = other.identity.svid().expect("an identity").id().clone();
                    caller.call(other).await.map_err(|error| format!("{who}: {error}"))?;
                    calls.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            Ok::<(), String>(())
        });
    }
    let more = async |of: usize| {
        let before = calls.load(Ordering::SeqCst);
        eventually_within(Duration::from_secs(30), "calls go on", || async {
            (calls.load(Ordering::SeqCst) >= before + of).then_some(())
        })
        .await;
    };
    more(SERVICES * SERVICES).await;

    let before = services[0].issuer();
    let key = KeyPair::generate().expect("a key").serialize_pem();
    let config = json!({"Provider": "consul", "Config": {"PrivateKey": key, "RootCert": ""}});
    consul.put("/v1/connect/ca/configuration", &config).await;
    let roots = consul.get("/v1/agent/connect/ca/roots").await.json();
    assert_eq!(
        roots["Roots"].as_array().map(Vec::len),
        Some(2),
        "the old root stays for its leaves: {roots}"
    );

    eventually_within(
        SPREAD,
        "everybody believes both roots, and some show a leaf below the new one",
        || async {
            let both = |service: &Arc<Service>| {
                service.identity.trust().is_some_and(|trust| trust.roots(&domain).count() == 2)
            };
            let issuers: BTreeSet<_> = services.iter().map(|service| service.issuer()).collect();
            let new = services.iter().filter(|service| service.issuer() != before).count();
            (services.iter().all(both) && new >= 2 && issuers.len() >= 2).then_some(())
        },
    )
    .await;
    // Old with old, old with new, new with old, new with new.
    more(2 * SERVICES * SERVICES).await;
    done.store(true, Ordering::SeqCst);
    while let Some(ended) = callers.join_next().await {
        assert_eq!(ended.expect("a caller"), Ok(()), "after {} calls", calls.load(Ordering::SeqCst));
    }
    for service in &services {
        assert_eq!(service.following.standing().borrow().problem, None);
        assert_eq!(service.identity.refused().iter().map(|(_, _, count)| count).sum::<u64>(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_decides_and_a_consul_that_is_away_takes_nothing_away() {
    if !consul::is_there() {
        return;
    }
    let master = "6d4e2c33-7d6f-4a5b-9a0e-000000000001";
    let mut consul = Consul::with(json!({
        "connect": {"enabled": true},
        "acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": master, "agent": master}},
    }))
    .await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("token");
    std::fs::write(&path, "6d4e2c33-7d6f-4a5b-9a0e-000000000002").expect("a file");
    let settings = Settings { token: Some(Token::File(path.clone())), ..settings(&consul, "web") };
    let (identity, following) = follow(settings.clone());
    let problem = eventually_within(Duration::from_secs(20), "the token is refused", || async {
        following.standing().borrow().problem.clone()
    })
    .await;
    assert!(problem.contains("403"), "{problem}");
    assert!(identity.svid().is_none());

    // The right token is in the file from now on; nobody starts anything again.
    std::fs::write(&path, master).expect("a file");
    until_known(&identity, &following).await;
    let before = identity.svid().expect("an identity").leaf().clone();
    assert!(identity.trust().is_some());

    consul.kill();
    eventually_within(Duration::from_secs(20), "it is noticed", || async {
        following.standing().borrow().problem.clone()
    })
    .await;
    assert_eq!(identity.svid().expect("an identity").leaf(), &before);
    consul.start_again().await;
    eventually_within(Duration::from_secs(60), "well again", || async {
        let standing: Option<String> = following.standing().borrow().problem.clone();
        standing.is_none().then_some(())
    })
    .await;
    assert_eq!(identity.svid().expect("an identity").id(), &before.id);
    let _: Value = consul.get("/v1/connect/ca/configuration").await.json();
}
