//! A WebSocket that sends every message back.

use futures_util::{SinkExt, StreamExt};

use super::Origin;

pub async fn start() -> Origin {
    Origin::tcp(|stream, seen| async move {
        let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
        seen.request();
        while let Some(Ok(message)) = socket.next().await {
            let answer = if message.is_text() || message.is_binary() { Some(message) } else { None };
            if let Some(message) = answer
                && socket.send(message).await.is_err()
            {
                return;
            }
        }
    })
    .await
}
