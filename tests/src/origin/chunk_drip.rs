//! A chunked answer that comes piece by piece, each chunk at a distance, some split in their middle.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::{Origin, read_head};

/// Sends `pieces` as one chunk each, `pause` apart, with every second chunk cut in two writes.
pub async fn start(pieces: &'static [&'static str], pause: Duration) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        while read_head(&mut stream).await.is_some() {
            seen.request();
            if drip(&mut stream, pieces, pause).await.is_err() {
                return;
            }
        }
    })
    .await
}

async fn drip(stream: &mut tokio::net::TcpStream, pieces: &[&str], pause: Duration) -> std::io::Result<()> {
    stream
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n")
        .await?;
    for (index, piece) in pieces.iter().enumerate() {
        tokio::time::sleep(pause).await;
        let chunk = format!("{:x}\r\n{piece}\r\n", piece.len());
        let cut = if index % 2 == 1 { chunk.len() / 2 } else { chunk.len() };
        stream.write_all(&chunk.as_bytes()[..cut]).await?;
        if cut < chunk.len() {
            tokio::time::sleep(pause).await;
            stream.write_all(&chunk.as_bytes()[cut..]).await?;
        }
    }
    stream.write_all(b"0\r\n\r\n").await
}
