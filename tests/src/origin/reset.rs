//! Resets the connection (RST) before or in the middle of its answer.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::{Origin, read_head};

/// Resets after having read a request head and said `beginning`.
pub async fn after(beginning: &'static str) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        if read_head(&mut stream).await.is_some() {
            seen.request();
            let _ = stream.write_all(beginning.as_bytes()).await;
            abort(stream);
        }
    })
    .await
}

/// Drops the connection so that the peer sees a reset.
pub fn abort(stream: TcpStream) {
    // A linger time of zero turns close into RST; the socket has nothing left to send that we want to arrive.
    let _ = stream.set_zero_linger();
    drop(stream);
}

/// How long a peer has to take what was written before a reset discards it.
pub const SETTLE: Duration = Duration::from_millis(50);
