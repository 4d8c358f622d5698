//! What idle connections cost: opens many from a second process, one request each, and prints the memory of the
//! worker's process per connection while they are at rest.
//!
//! `cargo run --release -p layers --example idle -- plain 10000` (or `tls`, `http2`).

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use certs::SniTable;
use certs::sni::{CertPem, SslObject, TableSettings};
use certs::unverified::Unverified;
use layers::body::Body;
use layers::error::Fault;
use layers::exchange::Exchange;
use layers::transport::listen::Listen;
use layers::transport::tls_server::TlsListen;
use layers::worker::{ListenOptions, Listening, WorkerSettings, Workers};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tower::Service;

/// As the binary has it: what is left after a burst depends on the allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [_, "client", address, kind, count] => hold(address.parse()?, kind, count.parse()?),
        [program, kind, count] => measure(program, kind, count.parse()?),
        _ => Err("usage: idle (plain|tls|http2) CONNECTIONS".into()),
    }
}

#[derive(Clone)]
struct Hello;

impl Service<Exchange> for Hello {
    type Response = Exchange;
    type Error = Fault;
    type Future = Ready<Result<Exchange, Fault>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        x.response = http::Response::new(Body::from("hello"));
        ready(Ok(x))
    }
}

fn measure(program: &str, kind: &str, count: usize) -> Result<(), Failure> {
    let mut options = ListenOptions { http2: true, ..ListenOptions::default() };
    if kind == "tls" {
        options.tls = Some(TlsListen { table: Arc::new(ArcSwap::from_pointee(table()?)), http2: false });
    }
    let mut settings = WorkerSettings { workers: 1, connections: count + 10, ..WorkerSettings::default() };
    settings.timeouts.idle = Duration::from_secs(600);
    let listen = Listen { address: "127.0.0.1:0".parse()?, key: "idle".to_owned() };
    let sockets = listen.bind(1)?;
    let address = sockets.first().ok_or("no socket")?.local_addr()?;
    let workers = Workers::start(&settings, vec![Listening { sockets, options }], |_| Hello)?;
    // The first connections make what all share.
    let before = run(program, address, kind, 10, &workers)?;
    let after = run(program, address, kind, count, &workers)?;
    let each = (after.saturating_sub(before)) as f64 / count as f64;
    println!("{kind}: {count} connections, {each:.2} KB each ({before} KB before, {after} KB with them)");
    Ok(())
}

/// Memory of this process in KB while so many connections are at rest.
fn run(
    program: &str,
    address: SocketAddr,
    kind: &str,
    count: usize,
    workers: &Workers,
) -> Result<u64, Failure> {
    let stats = workers.stats().first().ok_or("no worker")?.clone();
    let parked = stats.parked.get();
    let mut client = Command::new(program)
        .args(["client", &address.to_string(), kind, &count.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(client.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let rest = std::time::Instant::now();
    while stats.parked.get() < parked + count as u64 && rest.elapsed() < Duration::from_secs(5) {
        std::thread::yield_now();
    }
    let memory = resident()?;
    drop(client.stdin.take());
    client.wait()?;
    while stats.open.get() > 0 {
        std::thread::yield_now();
    }
    Ok(memory)
}

fn resident() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn table() -> Result<SniTable, Failure> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["idle.test".to_owned()])?.self_signed(&key)?;
    let object = SslObject {
        id: "idle".into(),
        order: 0,
        names: vec!["idle.test".to_owned()],
        pairs: vec![CertPem { cert: certificate.pem(), key: key.serialize_pem() }],
        remote: Vec::new(),
        client: None,
        protocols: Vec::new(),
    };
    Ok(SniTable::build(TableSettings::default(), [object]).0)
}

/// The other process: opens the connections and holds them until its input ends.
fn hold(address: SocketAddr, kind: &str, count: usize) -> Result<(), Failure> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    // The certificate was made a moment ago; nothing is to be proved here.
    let config = Arc::new(
        ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
            .with_no_client_auth(),
    );
    let mut plain = Vec::new();
    let mut encrypted = Vec::new();
    let request = b"GET / HTTP/1.1\r\nHost: idle.test\r\n\r\n";
    let mut answer = [0; 4096];
    for _ in 0..count {
        let mut stream = TcpStream::connect(address)?;
        match kind {
            "tls" => {
                let session = ClientConnection::new(config.clone(), ServerName::try_from("idle.test")?)?;
                let mut stream = StreamOwned::new(session, stream);
                stream.write_all(request)?;
                answered(stream.read(&mut answer)?)?;
                encrypted.push(stream);
            }
            "http2" => {
                // Preface, SETTINGS, and GET / on stream 1.
                stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
                stream.write_all(b"\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x01\x01h")?;
                answered(stream.read(&mut answer)?)?;
                plain.push(stream);
            }
            _ => {
                stream.write_all(request)?;
                answered(stream.read(&mut answer)?)?;
                plain.push(stream);
            }
        }
    }
    println!("ready");
    let held: Result<usize, Infallible> = Ok(std::io::stdin().read(&mut answer).unwrap_or(0));
    drop((plain, encrypted, held));
    Ok(())
}

fn answered(bytes: usize) -> Result<(), Failure> {
    if bytes == 0 { Err("the worker closed a connection".into()) } else { Ok(()) }
}
