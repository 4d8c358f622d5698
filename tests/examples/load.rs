//! Load for `make bench` that wrk cannot make: full TLS handshakes only, and a fixed rate with its latencies.
//!
//! ```text
//! load handshakes ADDR CA.pem NAME CONNECTIONS SECONDS               connections made and closed without a request
//! load mutual     ADDR CA.pem NAME CONNECTIONS SECONDS CERT.pem KEY.pem ALPN  the same with a certificate
//! load rate       ADDR PATH CONNECTIONS RATE SECONDS                 requests at a fixed rate on keep-alive connections
//! ```
//!
//! Prints one line of JSON.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::json;
use e2e::load::Load;
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["handshakes", addr, ca, name, connections, seconds] => {
            let config = client(ca).with_no_client_auth();
            handshakes(number(addr), config, name, number(connections), number(seconds)).await;
        }
        ["mutual", addr, ca, name, connections, seconds, cert, key, alpn] => {
            let chain = CertificateDer::pem_file_iter(cert).expect("a file").collect::<Result<_, _>>();
            let key = PrivateKeyDer::from_pem_file(key).expect("a key");
            let mut config = client(ca)
                .with_client_auth_cert(chain.expect("certificates"), key)
                .expect("key and certificate fit");
            config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
            handshakes(number(addr), config, name, number(connections), number(seconds)).await;
        }
        ["rate", addr, path, connections, rate, seconds] => {
            rate_of(number(addr), path, number(connections), number(rate), number(seconds)).await;
        }
        _ => {
            eprintln!(
                "load handshakes ADDR CA NAME CONNECTIONS SECONDS | load mutual ADDR CA NAME CONNECTIONS SECONDS CERT KEY ALPN \
                 | load rate ADDR PATH CONNECTIONS RATE SECONDS"
            );
            std::process::exit(2);
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("cannot read {text}"))
}

/// A client that trusts `ca`.
fn client(ca: &str) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("a certificate")).expect("a root");
    ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the default versions")
        .with_root_certificates(roots)
}

async fn handshakes(addr: SocketAddr, mut config: ClientConfig, name: &str, connections: u32, seconds: u64) {
    config.resumption = Resumption::disabled();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(name.to_owned()).expect("a server name");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let (connector, name) = (connector.clone(), name.clone());
        clients.spawn(async move {
            let (mut done, mut failed) = (0u64, 0u64);
            while Instant::now() < end {
                match handshake(addr, &connector, name.clone()).await {
                    Ok(()) => done += 1,
                    Err(_) => failed += 1,
                }
            }
            (done, failed)
        });
    }
    let (mut done, mut failed) = (0, 0);
    while let Some(client) = clients.join_next().await {
        let (more_done, more_failed) = client.expect("a client does not panic");
        done += more_done;
        failed += more_failed;
    }
    println!("{}", json!({"count": done, "bad": failed}));
}

async fn handshake(
    addr: SocketAddr,
    connector: &tokio_rustls::TlsConnector,
    name: ServerName<'static>,
) -> std::io::Result<()> {
    let stream = TcpStream::connect(addr).await?;
    // No TIME_WAIT is kept on this side: the ports would be used up within seconds.
    stream.set_zero_linger()?;
    let mut stream = connector.connect(name, stream).await?;
    stream.shutdown().await?;
    // The server closes when it has seen our Finished and our close: then its work is done.
    let mut rest = [0; 4096];
    while stream.get_mut().0.read(&mut rest).await? > 0 {}
    Ok(())
}

async fn rate_of(addr: SocketAddr, path: &str, connections: u32, rate: u32, seconds: u64) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let load = Load::start(addr, &request, 200, connections, rate);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let account = load.finish().await;
    let micros = |share: f64| u64::try_from(account.latency(share).as_micros()).expect("a short time");
    println!(
        "{}",
        json!({"count": account.good, "bad": account.bad.len(), "died": account.died,
               "p50": micros(0.5), "p99": micros(0.99), "p999": micros(0.999)})
    );
}
