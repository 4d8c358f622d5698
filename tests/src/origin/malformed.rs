//! Answers no origin should give: for each the name, the bytes, and whether the connection is then closed.

use bytes::Bytes;
use tokio::io::AsyncWriteExt;

use super::{Origin, read_head};

/// One ill-formed answer.
#[derive(Clone, Copy, Debug)]
pub struct Malformed {
    pub name: &'static str,
    pub bytes: &'static str,
}

const fn answer(name: &'static str, bytes: &'static str) -> Malformed {
    Malformed { name, bytes }
}

/// Every one of these must become a 502 and end the upstream connection.
pub const ANSWERS: &[Malformed] = &[
    answer("status 000", "HTTP/1.1 000 Zero\r\ncontent-length: 0\r\n\r\n"),
    answer("status 099", "HTTP/1.1 099 Low\r\ncontent-length: 0\r\n\r\n"),
    answer("status 999999", "HTTP/1.1 999999 Huge\r\ncontent-length: 0\r\n\r\n"),
    answer("status 20", "HTTP/1.1 20 Short\r\ncontent-length: 0\r\n\r\n"),
    answer("status with letters", "HTTP/1.1 2OO Ok\r\ncontent-length: 0\r\n\r\n"),
    answer("negative status", "HTTP/1.1 -200 Ok\r\ncontent-length: 0\r\n\r\n"),
    answer("HTTP/0.9", "<html>hello</html>\r\n\r\n"),
    answer("HTTP/2.0 status line", "HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n"),
    answer("HTTP/1.2 status line", "HTTP/1.2 200 OK\r\ncontent-length: 0\r\n\r\n"),
    answer("no version", "200 OK\r\ncontent-length: 0\r\n\r\n"),
    answer("two lengths", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nhello"),
    answer("length list", "HTTP/1.1 200 OK\r\ncontent-length: 3, 5\r\n\r\nhello"),
    answer("length with sign", "HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\nhello"),
    answer("length not a number", "HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello"),
    answer("length overflow", "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551621\r\n\r\nhello"),
    answer(
        "length and chunks",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    answer("unknown coding", "HTTP/1.1 200 OK\r\ntransfer-encoding: rot13\r\n\r\nhello"),
    answer("bare CR in a value", "HTTP/1.1 200 OK\r\nx-a: one\rtwo\r\ncontent-length: 0\r\n\r\n"),
    answer("NUL in a value", "HTTP/1.1 200 OK\r\nx-a: one\0two\r\ncontent-length: 0\r\n\r\n"),
    answer("space before the colon", "HTTP/1.1 200 OK\r\nx-a : one\r\ncontent-length: 0\r\n\r\n"),
    answer("empty name", "HTTP/1.1 200 OK\r\n: one\r\ncontent-length: 0\r\n\r\n"),
    answer("folded field", "HTTP/1.1 200 OK\r\nx-a: one\r\n two\r\ncontent-length: 0\r\n\r\n"),
    answer("line without a colon", "HTTP/1.1 200 OK\r\nnonsense\r\ncontent-length: 0\r\n\r\n"),
];

/// Answers every request with these bytes and closes.
pub async fn start(answer: Malformed) -> Origin {
    bytes(Bytes::from_static(answer.bytes.as_bytes())).await
}

/// Answers every request with these bytes and closes.
pub async fn bytes(answer: Bytes) -> Origin {
    Origin::tcp(move |mut stream, seen| {
        let answer = answer.clone();
        async move {
            if read_head(&mut stream).await.is_some() {
                seen.request();
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
                // Stays until the gateway lets go: what counts is that it is the gateway that decides.
                let _ = read_head(&mut stream).await;
            }
        }
    })
    .await
}

/// An answer with `count` header fields of `size` bytes each.
pub async fn header_bomb(count: usize, size: usize) -> Origin {
    let mut answer = String::from("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n");
    for index in 0..count {
        answer.push_str(&format!("x-{index}: {}\r\n", "y".repeat(size)));
    }
    answer.push_str("\r\n");
    bytes(answer.into()).await
}

/// Interim answers without end and never a final one.
pub async fn endless_interim() -> Origin {
    Origin::tcp(|mut stream, seen| async move {
        if read_head(&mut stream).await.is_some() {
            seen.request();
            while stream.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").await.is_ok() {
                tokio::task::yield_now().await;
            }
        }
    })
    .await
}
