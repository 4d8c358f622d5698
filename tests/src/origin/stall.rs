//! Reads requests and never answers, or stops in the middle of the answer.

use tokio::io::AsyncWriteExt;

use super::{Origin, read_head};

/// Never says anything.
pub async fn start() -> Origin {
    after("").await
}

/// Says `beginning` and then nothing more.
pub async fn after(beginning: &'static str) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        while read_head(&mut stream).await.is_some() {
            seen.request();
            let _ = stream.write_all(beginning.as_bytes()).await;
        }
    })
    .await
}
