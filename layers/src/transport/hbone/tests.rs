#![allow(clippy::unwrap_used, reason = "tests")]

use std::future::pending;
use std::io;
use std::time::Duration;

use http::StatusCode;
use http::uri::Authority;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};

use super::server::{Connect, Server, ServerError, address};

const LIMIT: Duration = Duration::from_secs(20);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A client that writes frames by hand.
struct Raw(DuplexStream);

impl Raw {
    async fn begin(io: DuplexStream) -> Self {
        let mut raw = Self(io);
        raw.0.write_all(PREFACE).await.unwrap();
        raw.frame(SETTINGS, 0, 0, &[]).await;
        raw
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.unwrap();
    }

    /// Fields as literals that are not indexed, each shorter than 127 bytes.
    async fn head(&mut self, stream: u32, flags: u8, fields: &[(&str, &str)]) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0);
            for text in [name, value] {
                block.push(u8::try_from(text.len()).unwrap());
                block.extend(text.as_bytes());
            }
        }
        self.frame(HEADERS, flags | END_HEADERS, stream, &block).await;
    }

    /// The next frame of a stream, by kind and payload; those of other kinds are passed over.
    async fn next(&mut self, stream: u32, kinds: &[u8]) -> (u8, Vec<u8>) {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.unwrap();
            if head[5..9] == stream.to_be_bytes() && kinds.contains(&head[3]) {
                return (head[3], payload);
            }
        }
    }

    /// The status of an answer, where HPACK has a byte for it; 0 for a reset.
    async fn status(&mut self, stream: u32) -> u16 {
        let (kind, block) = self.next(stream, &[HEADERS, RST_STREAM]).await;
        if kind == RST_STREAM {
            return 0;
        }
        match block[0] {
            0x88 => 200,
            0x8c => 400,
            // One that HPACK has no short word for.
            _ => 1,
        }
    }
}

const CONNECT: [(&str, &str); 2] = [(":method", "CONNECT"), (":authority", "10.0.0.1:8080")];

/// Serves one connection with `serve`, and gives its client, what ends it, and how it ended.
fn serve<F>(
    serve: impl Fn(Connect) -> F + 'static,
) -> (DuplexStream, oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), ServerError>>)
where
    F: Future<Output = ()> + 'static,
{
    let (client, io) = duplex(1 << 16);
    let (drain, drained) = oneshot::channel();
    let ended = spawn_local(async move {
        let server = Server::begin(io, LIMIT).await?;
        let drained = async move {
            if drained.await.is_err() {
                pending::<()>().await;
            }
        };
        server.run(serve, drained).await
    });
    (client, drain, ended)
}

#[test]
fn only_addresses_with_ports_are_targets() {
    for (authority, told) in [
        ("10.0.0.1:8080", Some("10.0.0.1:8080")),
        ("[2001:db8::1]:80", Some("[2001:db8::1]:80")),
        ("[::ffff:10.0.0.1]:80", Some("10.0.0.1:80")),
        ("10.0.0.1", None),
        ("10.0.0.1:0", None),
        ("orders.default.svc:80", None),
        ("user@10.0.0.1:80", None),
        ("2001:db8::1", None),
    ] {
        let Ok(authority) = authority.parse::<Authority>() else {
            assert_eq!(told, None, "{authority}");
            continue;
        };
        assert_eq!(address(&authority).map(|target| target.to_string()).as_deref(), told, "{authority}");
    }
}

#[tokio::test]
async fn bytes_go_both_ways_until_both_have_ended() {
    let work = async {
        let (client, _drain, _) = serve(|connect| async move {
            assert_eq!(connect.headers().get("baggage").unwrap(), "k8s.namespace.name=default");
            let mut tunnel = connect.accept().unwrap();
            let mut words = Vec::new();
            tunnel.read_to_end(&mut words).await.unwrap();
            tunnel.write_all(&words).await.unwrap();
            tunnel.shutdown().await.unwrap();
        });
        let mut raw = Raw::begin(client).await;
        let [method, authority] = CONNECT;
        raw.head(1, 0, &[method, authority, ("baggage", "k8s.namespace.name=default")]).await;
        assert_eq!(raw.status(1).await, 200);
        raw.frame(DATA, 0, 1, b"some ").await;
        raw.frame(DATA, END_STREAM, 1, b"words").await;
        let mut heard = Vec::new();
        while heard.len() < 10 {
            heard.extend(raw.next(1, &[DATA]).await.1);
        }
        assert_eq!(heard, b"some words");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_reset_in_the_middle_is_an_error_and_no_end() {
    let work = async {
        let (told, mut heard) = mpsc::unbounded_channel();
        let (client, _drain, _) = serve(move |connect| {
            let told = told.clone();
            async move {
                let mut tunnel = connect.accept().unwrap();
                let mut words = [0; 5];
                tunnel.read_exact(&mut words).await.unwrap();
                told.send(tunnel.read_u8().await.map_err(|error| error.kind())).unwrap();
            }
        });
        let mut raw = Raw::begin(client).await;
        raw.head(1, 0, &CONNECT).await;
        assert_eq!(raw.status(1).await, 200);
        raw.frame(DATA, 0, 1, b"words").await;
        raw.frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()).await;
        assert_eq!(heard.recv().await.unwrap(), Err(io::ErrorKind::ConnectionReset));
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn what_is_no_tunnel_is_refused() {
    let work = async {
        let (client, _drain, _) = serve(|connect| async move {
            connect.refuse(StatusCode::BAD_REQUEST, "postern; details=\"no\"");
        });
        let mut raw = Raw::begin(client).await;
        raw.head(
            1,
            END_STREAM,
            &[(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "10.0.0.1:80")],
        )
        .await;
        assert_ne!(raw.status(1).await, 200, "GET");
        raw.head(3, 0, &CONNECT).await;
        assert_eq!(raw.status(3).await, 400, "what the server refuses");
        raw.head(5, 0, &[(":method", "CONNECT")]).await;
        assert_ne!(raw.status(5).await, 200, "no authority");
        let long = "x".repeat(120);
        let fields: Vec<(&str, &str)> =
            CONNECT.into_iter().chain(std::iter::repeat_n((&*long, &*long), 100)).collect();
        raw.head(7, 0, &fields).await;
        assert_ne!(raw.status(7).await, 200, "a head that is too large");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test]
async fn a_drain_tells_the_peer_and_ends_with_the_last_tunnel() {
    let work = async {
        let (client, drain, ended) = serve(|connect| async move {
            let mut tunnel = connect.accept().unwrap();
            let mut words = Vec::new();
            tunnel.read_to_end(&mut words).await.unwrap();
            tunnel.write_all(&words).await.unwrap();
            tunnel.shutdown().await.unwrap();
        });
        let mut raw = Raw::begin(client).await;
        raw.head(1, 0, &CONNECT).await;
        assert_eq!(raw.status(1).await, 200);
        drain.send(()).unwrap();
        raw.next(0, &[GOAWAY]).await;
        assert!(!ended.is_finished());
        raw.frame(DATA, END_STREAM, 1, b"words").await;
        assert_eq!(raw.next(1, &[DATA]).await.1, b"words");
        // The peer goes when it has nothing left to do here.
        drop(raw);
        let ended = tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap();
        assert!(matches!(ended, Ok(()) | Err(ServerError::Http2(_))), "{ended:?}");
    };
    LocalSet::new().run_until(work).await;
}

#[tokio::test(start_paused = true)]
async fn who_speaks_no_http2_or_nothing_is_sent_away() {
    let (mut client, io) = duplex(1024);
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert!(matches!(Server::begin(io, LIMIT).await.map(drop), Err(ServerError::Http2(_))));
    let (_client, io) = duplex(1024);
    assert!(matches!(Server::begin(io, LIMIT).await.map(drop), Err(ServerError::Silent(_))));
}
