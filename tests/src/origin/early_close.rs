//! Closes the connection in order, before or in the middle of its answer.

use tokio::io::AsyncWriteExt;

use super::{Origin, read_head};

/// Closes after having read a request head and said `beginning`.
pub async fn after(beginning: &'static str) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        if read_head(&mut stream).await.is_some() {
            seen.request();
            let _ = stream.write_all(beginning.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    })
    .await
}

/// Closes each connection as soon as it is accepted.
pub async fn at_once() -> Origin {
    Origin::tcp(|stream, _| async move { drop(stream) }).await
}
