//! A real ACME authority: Debian's `pebble`, with the name server that comes with it.
//!
//! Every name is at 127.0.0.1. What it looks at on the ports 80 and 443 of names is a [`Door`], which leads to gateways in
//! turn, so that every replica is asked.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::certs::Authority;
use crate::client::{Call, Connection};
use crate::eventually;
use crate::ports::Port;
use crate::process::Process;

/// The account that may ask where [`Settings::bound`] is set, and its key.
pub const BOUND: (&str, &str) = ("kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W");

/// How it behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Of a hundred nonces that are good, so many are refused.
    pub refused_nonces: u8,
    /// Accounts are given to those alone who have one at the operator's.
    pub bound: bool,
}

/// A running pebble.
pub struct Pebble {
    /// Leads to what answers on port 80.
    pub http: Door,
    /// Leads to what answers on port 443.
    pub https: Door,
    ca: Authority,
    port: Port,
    management: Port,
    process: Process,
    _names: Process,
    folder: TempDir,
    names: [Port; 2],
}

impl Pebble {
    /// Whether there is one on this machine.
    pub fn is_there() -> bool {
        Path::new("/usr/bin/pebble").exists()
    }

    pub async fn start(settings: Settings) -> Pebble {
        let folder = tempfile::Builder::new().prefix("postern-pebble-").tempdir().expect("a folder");
        let [port, management, names, names_management] = [(); 4].map(|()| Port::free());
        let (http, https) = (Door::open().await, Door::open().await);
        let ca = Authority::new("pebble's own");
        let leaf = ca.server(&["localhost", "127.0.0.1"]);
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("a file of pebble");
            path
        };
        let (cert, key) = (write("cert.pem", &leaf.cert), write("key.pem", &leaf.key));
        write("ca.pem", &ca.pem());
        let config = json!({"pebble": {
            "listenAddress": port.addr().to_string(),
            "managementListenAddress": management.addr().to_string(),
            "certificate": cert,
            "privateKey": key,
            "httpPort": http.address.port(),
            "tlsPort": https.address.port(),
            "ocspResponderURL": "",
            "externalAccountBindingRequired": settings.bound,
            "externalAccountMACKeys": {BOUND.0: BOUND.1},
        }});
        let config = write("pebble.json", &config.to_string());
        let log = folder.path().join("names.log");
        let args = ["-dns01", &names.addr().to_string(), "-http01", "", "-https01", "", "-tlsalpn01", ""];
        let args = args.into_iter().chain(["-defaultIPv6", "", "-management"]).map(str::to_owned);
        let args: Vec<String> = args.chain([names_management.addr().to_string()]).collect();
        let program = Path::new("/usr/bin/pebble-challtestsrv");
        let name_server = Process::start(program, &args, &[], folder.path(), &log);
        let args = ["-config", &config.display().to_string(), "-dnsserver", &names.addr().to_string()]
            .map(str::to_owned);
        let env = [
            ("PEBBLE_VA_NOSLEEP", "1".to_owned()),
            ("PEBBLE_AUTHZREUSE", "0".to_owned()),
            ("PEBBLE_WFE_NONCEREJECT", settings.refused_nonces.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let log = folder.path().join("pebble.log");
        let process = Process::start(Path::new("/usr/bin/pebble"), &args, &env, folder.path(), &log);
        let pebble = Pebble {
            http,
            https,
            ca,
            port,
            management,
            process,
            _names: name_server,
            folder,
            names: [names, names_management],
        };
        let [names, _] = &pebble.names;
        for at in [pebble.port.addr(), pebble.management.addr(), names.addr()] {
            eventually("pebble and its name server listen", || async { TcpStream::connect(at).await.ok() })
                .await;
        }
        pebble
    }

    /// The part of `config.yaml` that makes a gateway ask it.
    pub fn config(&self) -> Value {
        json!({"postern": {"acme": {
            "directory": format!("https://127.0.0.1:{}/dir", self.port.number()),
            "accept_terms": true,
            "email": "ops@example.com",
            "ca_file": self.ca_file(),
            "retry": "1s",
        }}})
    }

    /// Whom its directory's certificate is from.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A client that believes the certificates it gives, and those alone.
    pub async fn client_config(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        let own = self.ca.client_config().build();
        let mut connection =
            Connection::tls(self.management.addr(), &own, "localhost").await.expect("pebble's management");
        let root = connection.send(Call::get("/roots/0")).await.expect_status(200).text();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(root.as_bytes()).expect("a root")).expect("a usable root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        // Every handshake shows a certificate.
        config.resumption = rustls::client::Resumption::disabled();
        Arc::new(config)
    }

    /// How many certificates it has given.
    pub fn issued(&self) -> usize {
        self.process.output().matches("Issued certificate serial").count()
    }

    /// kill -9; it forgets everything.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// A port that leads to others in turn, and to nobody at first.
pub struct Door {
    /// Where it is.
    pub address: SocketAddr,
    to: Arc<Mutex<Vec<SocketAddr>>>,
    task: JoinHandle<()>,
}

impl Door {
    async fn open() -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let to: Arc<Mutex<Vec<SocketAddr>>> = Arc::default();
        let behind = Arc::clone(&to);
        let task = tokio::spawn(async move {
            let turn = AtomicUsize::new(0);
            while let Ok((mut outer, _)) = listener.accept().await {
                let all = behind.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let turn = turn.fetch_add(1, Ordering::Relaxed);
                let Some(next) = all.get(turn % all.len().max(1)).copied() else { continue };
                tokio::spawn(async move {
                    if let Ok(mut inner) = TcpStream::connect(next).await {
                        let _ = copy_bidirectional(&mut outer, &mut inner).await;
                    }
                });
            }
        });
        Door { address, to, task }
    }

    /// Leads to these from now on.
    pub fn lead_to(&self, addresses: &[SocketAddr]) {
        *self.to.lock().unwrap_or_else(PoisonError::into_inner) = addresses.to_vec();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}
