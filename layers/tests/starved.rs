//! A worker without file descriptors: it waits instead of spinning, and serves again when there are some. In a
//! process of its own, because the limit is the process's.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use layers::body::Body;
use layers::error::Fault;
use layers::exchange::Exchange;
use layers::transport::listen::Listen;
use layers::worker::{ListenOptions, Listening, WorkerSettings, Workers};
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::Service;

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

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |time: nix::sys::time::TimeVal| (time.tv_sec() * 1_000_000 + time.tv_usec()) as u64;
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

#[tokio::test]
async fn without_descriptors_a_worker_waits_and_comes_back() {
    let settings = WorkerSettings { workers: 1, ..WorkerSettings::default() };
    let listen = Listen { address: "127.0.0.1:0".parse().unwrap(), key: "test".to_owned() };
    let sockets = listen.bind(1).unwrap();
    let address = sockets[0].local_addr().unwrap();
    let listening = Listening { sockets, options: ListenOptions::default() };
    let workers = Workers::start(&settings, vec![listening], |_| Hello).unwrap();
    let stats = workers.stats()[0].clone();

    assert!(get(address).await.ends_with("hello"), "the worker runs, with all it opens once");
    setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
    let mut files = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        files.push(file);
    }
    // The last descriptor goes to the client; the worker wants one for its side.
    files.pop();
    let _client = TcpStream::connect(address).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while stats.starved.get() == 0 {
        assert!(Instant::now() < deadline, "never starved");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (starved, before) = (stats.starved.get(), cpu());
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert!(stats.starved.get() - starved < 20, "{} attempts in a second", stats.starved.get() - starved);
    assert!(cpu() - before < Duration::from_millis(300), "{:?}", cpu() - before);

    files.clear();
    let answer = timeout(Duration::from_secs(10), get(address)).await.unwrap();
    assert!(answer.ends_with("hello"), "{answer}");
}

async fn get(address: SocketAddr) -> String {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}
