//! Server-sent events, each sent only when the test says so.

use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::sync::{Mutex, mpsc};

use super::{Origin, read_head};

/// An event stream and the handle that feeds it; one client at a time.
pub async fn start() -> (Origin, mpsc::Sender<String>) {
    let (sender, receiver) = mpsc::channel::<String>(16);
    let receiver = Arc::new(Mutex::new(receiver));
    let origin = Origin::tcp(move |mut stream, seen| {
        let receiver = Arc::clone(&receiver);
        async move {
            if read_head(&mut stream).await.is_none() {
                return;
            }
            seen.request();
            let head =
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            let _ = stream.write_all(head).await;
            let mut events = receiver.lock().await;
            while let Some(event) = events.recv().await {
                let event = format!("data: {event}\n\n");
                let chunk = format!("{:x}\r\n{event}\r\n", event.len());
                if stream.write_all(chunk.as_bytes()).await.is_err() {
                    return;
                }
            }
            let _ = stream.write_all(b"0\r\n\r\n").await;
        }
    })
    .await;
    (origin, sender)
}
