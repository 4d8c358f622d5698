//! A long download at a steady pace: a known length, sent in equal pieces.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::{Origin, read_head};

/// Sends `pieces` times `size` bytes, `pause` apart, under one `Content-Length`.
pub async fn start(pieces: usize, size: usize, pause: Duration) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        while read_head(&mut stream).await.is_some() {
            seen.request();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", pieces * size);
            if stream.write_all(head.as_bytes()).await.is_err() {
                return;
            }
            for _ in 0..pieces {
                if stream.write_all(&vec![b'x'; size]).await.is_err() {
                    return;
                }
                tokio::time::sleep(pause).await;
            }
        }
    })
    .await
}
