//! The peers of `examples/`: the upstreams they name, and clients that curl is not.
//!
//! ```text
//! peers                        upstreams on loopback: 1980 and 1981 echo, 1982 is a WebSocket, 50051 a gRPC service
//! peers say ADDR PATH TEXT     sends TEXT over a WebSocket and prints what comes back
//! peers module TEXT FILE       turns a module in text form into one in binary form
//! peers call ADDR TEXT         calls the gRPC service: one message, then a stream of three
//! ```

use std::net::{Ipv4Addr, SocketAddr};

use e2e::client::connect;
use e2e::origin::grpc::{WordsClient, word};
use e2e::origin::{echo, grpc, websocket};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        [] => serve().await,
        ["say", addr, path, text] => say(address(addr), path, text).await,
        ["call", addr, text] => call(address(addr), text).await,
        ["module", text, file] => {
            let module = wat::parse_file(text).unwrap_or_else(|error| panic!("{error}"));
            std::fs::write(file, module).unwrap_or_else(|error| panic!("{file}: {error}"));
        }
        _ => {
            eprintln!("peers | peers say ADDR PATH TEXT | peers call ADDR TEXT | peers module TEXT FILE");
            std::process::exit(2);
        }
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is no address: write 127.0.0.1:9080"))
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

async fn serve() {
    let _origins = [
        echo::named_at(local(1980), "one").await,
        echo::named_at(local(1981), "two").await,
        websocket::start_at(local(1982)).await,
        grpc::start_at(local(50051)).await,
    ];
    println!("upstreams on 127.0.0.1: 1980 and 1981 echo, 1982 WebSocket, 50051 gRPC");
    std::future::pending().await
}

async fn say(addr: SocketAddr, path: &str, text: &str) {
    let uri = format!("ws://{addr}{path}");
    let (mut socket, answer) =
        tokio_tungstenite::client_async(uri, connect(addr).await).await.expect("an upgrade");
    println!("{}", answer.status());
    socket.send(Message::text(text)).await.expect("a message sent");
    let back = socket.next().await.expect("an answer").expect("a message");
    println!("{back}");
    socket.close(None).await.expect("an orderly end");
}

async fn call(addr: SocketAddr, text: &str) {
    let mut client = WordsClient::connect(addr).await;
    match client.unary(tonic::Request::new(word(text, 1))).await {
        Ok(answer) => println!("{}", answer.get_ref().text),
        Err(status) => {
            println!("{:?}: {}", status.code(), status.message());
            return;
        }
    }
    let mut words = client.count(word(text, 3)).await.expect("a stream").into_inner();
    while let Some(word) = words.message().await.expect("a message") {
        println!("{} {}", word.text, word.number);
    }
}
