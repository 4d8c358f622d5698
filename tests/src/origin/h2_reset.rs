//! An HTTP/2 origin that resets streams instead of answering them.

use bytes::Bytes;
use http::Response;

use super::Origin;

/// What is sent before the stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    Nothing,
    Headers,
    HalfTheBody,
}

/// Resets every stream with `reason` after having sent `before`.
pub async fn start(before: Before, reason: h2::Reason) -> Origin {
    Origin::tcp(move |stream, seen| async move {
        let Ok(mut connection) = h2::server::handshake(stream).await else { return };
        while let Some(Ok((_request, mut respond))) = connection.accept().await {
            seen.request();
            if before == Before::Nothing {
                respond.send_reset(reason);
                continue;
            }
            let Ok(mut body) = respond.send_response(Response::new(()), false) else { continue };
            if before == Before::HalfTheBody {
                let _ = body.send_data(Bytes::from_static(b"half"), false);
                // The data leaves only when the connection is driven, which `accept` does.
                tokio::spawn(async move {
                    tokio::time::sleep(super::reset::SETTLE).await;
                    body.send_reset(reason);
                });
            } else {
                body.send_reset(reason);
            }
        }
    })
    .await
}
