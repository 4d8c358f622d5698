//! A WebSocket that sends every message back.

use std::net::{Ipv4Addr, SocketAddr};

use futures_util::{SinkExt, StreamExt};

use super::Origin;

pub async fn start() -> Origin {
    start_at((Ipv4Addr::LOCALHOST, 0).into()).await
}

/// [`start`] at an address.
pub async fn start_at(addr: SocketAddr) -> Origin {
    Origin::tcp_at(addr, |stream, seen| async move {
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
