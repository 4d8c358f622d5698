//! Where loggers of a test send to: an HTTP server, a TCP server, a UDP socket, a broker and
//! a file, and what each has got.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::Response;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

use crate::origin::{Origin, kafka};

/// Everything that has arrived, as text; what belongs together ends with a line feed.
#[derive(Clone, Debug, Default)]
pub struct Arrived(Arc<Mutex<String>>);

impl Arrived {
    /// Adds what belongs together.
    pub fn add(&self, text: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push_str(text);
        all.push('\n');
    }

    /// All of it.
    pub fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The places of one test.
#[derive(Debug)]
pub struct Sinks {
    http: (Origin, Arrived),
    tcp: (Origin, Arrived),
    udp: (SocketAddr, Arrived, JoinHandle<()>),
    kafka: (Origin, Origin, Arrived),
    folder: TempDir,
}

impl Drop for Sinks {
    fn drop(&mut self) {
        self.udp.2.abort();
    }
}

impl Sinks {
    /// Opens all of them.
    pub async fn start() -> Sinks {
        let arrived = Arrived::default();
        let http = (Origin::http(recorded(arrived.clone())).await, arrived);
        let arrived = Arrived::default();
        let kept = arrived.clone();
        let tcp = Origin::tcp(move |mut stream, _| {
            let kept = kept.clone();
            async move {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    kept.add(&String::from_utf8_lossy(&buffer[..count]));
                }
            }
        });
        let tcp = (tcp.await, arrived);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a UDP socket");
        let address = socket.local_addr().expect("the address of a socket");
        let arrived = Arrived::default();
        let kept = arrived.clone();
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count) = socket.recv(&mut buffer).await {
                kept.add(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        let records = Arrived::default();
        let open = kafka::start(records.clone(), false).await;
        let closed = kafka::start(records.clone(), true).await;
        let folder = tempfile::tempdir().expect("a folder");
        Sinks { http, tcp, udp: (address, arrived, task), kafka: (open, closed, records), folder }
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// `text` with the places in it: `@http@` is `host:port`, `@tcp@`, `@udp@`, `@kafka@` and `@kafka-sasl@` are ports of
    /// 127.0.0.1, `@file@` is a path.
    pub fn fill(&self, text: &str) -> String {
        text.replace("@http@", &self.http.0.node())
            .replace("@tcp@", &self.tcp.0.addr.port().to_string())
            .replace("@udp@", &self.udp.0.port().to_string())
            .replace("@kafka@", &self.kafka.0.addr.port().to_string())
            .replace("@kafka-sasl@", &self.kafka.1.addr.port().to_string())
            .replace("@file@", &self.file().display().to_string())
    }

    /// What has arrived at one of `http`, `tcp`, `udp`, `kafka` and `file` so far.
    pub fn arrived(&self, place: &str) -> String {
        match place {
            "http" => self.http.1.text(),
            "tcp" => self.tcp.1.text(),
            "udp" => self.udp.1.text(),
            "kafka" => self.kafka.2.text(),
            "file" => std::fs::read_to_string(self.file()).unwrap_or_default(),
            other => panic!("there is no place `{other}` for logs"),
        }
    }
}

/// Keeps the request line, the fields and the body of each request, and answers as the servers of logs do.
fn recorded(arrived: Arrived) -> impl Fn(http::Request<Bytes>) -> std::future::Ready<Response<Bytes>> {
    move |request| {
        let (head, body) = request.into_parts();
        let mut text = format!("{} {}\n", head.method, head.uri);
        for (name, value) in &head.headers {
            text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        text.push_str(&String::from_utf8_lossy(&body));
        arrived.add(&text);
        let answer = match head.uri.path() {
            "/" => r#"{"version":{"number":"8.15.0"}}"#,
            _ => r#"{"errors":false}"#,
        };
        let answer = Response::builder().header("content-type", "application/json").body(answer.into());
        std::future::ready(answer.expect("an answer"))
    }
}
