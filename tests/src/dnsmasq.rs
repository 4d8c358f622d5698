//! A real dnsmasq with a zone of its own.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::net::UdpSocket;

use crate::eventually;
use crate::ports::Port;
use crate::process::Process;

/// Answers for the zone `test`; ended when dropped.
pub struct Dnsmasq {
    port: Port,
    hosts: PathBuf,
    process: Process,
    _folder: TempDir,
}

impl Dnsmasq {
    /// Whether there is one on this machine.
    pub fn is_there() -> bool {
        Path::new("/usr/sbin/dnsmasq").exists()
    }

    /// With these hosts, and more of its options. Denials come without an SOA, unless it is authoritative.
    pub async fn start(hosts: &[(&str, &str)], authoritative: bool, options: &[String]) -> Dnsmasq {
        let folder = tempfile::Builder::new().prefix("postern-dnsmasq-").tempdir().expect("a folder");
        let port = Port::free();
        let file = folder.path().join("hosts");
        write(&file, hosts);
        let mut args: Vec<String> = [
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--listen-address=127.0.0.1",
            "--bind-interfaces",
            "--no-resolv",
            "--no-hosts",
            "--local=/test/",
            "--local-ttl=1",
            "--auth-ttl=1",
            "--user=",
            "--pid-file=",
        ]
        .map(str::to_owned)
        .into();
        args.push(format!("--port={}", port.number()));
        args.push(format!("--addn-hosts={}", file.display()));
        if authoritative {
            args.extend(["--auth-server=ns.test,127.0.0.1".to_owned(), "--auth-zone=test".to_owned()]);
        }
        args.extend_from_slice(options);
        let log = folder.path().join("dnsmasq.log");
        let process = Process::start(Path::new("/usr/sbin/dnsmasq"), &args, &[], folder.path(), &log);
        let server = Dnsmasq { port, hosts: file, process, _folder: folder };
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        eventually("dnsmasq answers", || async {
            let question = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x04test\0\0\x06\0\x01";
            socket.send_to(question, server.addr()).await.ok()?;
            let mut answer = [0; 512];
            let wait = std::time::Duration::from_millis(200);
            tokio::time::timeout(wait, socket.recv(&mut answer)).await.ok()?.ok()
        })
        .await;
        server
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// Has other hosts from now on.
    pub fn write(&self, hosts: &[(&str, &str)]) {
        write(&self.hosts, hosts);
        self.process.signal(Signal::SIGHUP);
    }

    /// Stops it in its tracks, or lets it go on.
    pub fn freeze(&self, frozen: bool) {
        self.process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
    }
}

fn write(file: &Path, hosts: &[(&str, &str)]) {
    let mut text = String::new();
    for (address, name) in hosts {
        writeln!(text, "{address} {name}").expect("text");
    }
    std::fs::write(file, text).expect("the hosts file");
}
