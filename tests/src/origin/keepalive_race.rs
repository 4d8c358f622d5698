//! The keep-alive race: answers the first request of a connection and drops the connection when the second
//! one arrives, without a word. A gateway that reuses connections meets this whenever an idle time-out of the
//! upstream is a moment shorter than its own.

use super::{Origin, read_head, reset, write_answer};

/// How the second request on a connection is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    Close,
    Reset,
}

pub async fn start(death: Death) -> Origin {
    Origin::tcp(move |mut stream, seen| async move {
        if read_head(&mut stream).await.is_none() {
            return;
        }
        seen.request();
        if write_answer(&mut stream, 200, "first").await.is_err() {
            return;
        }
        // The second request is read whole, so that its loss cannot be blamed on the network.
        if read_head(&mut stream).await.is_some() && death == Death::Reset {
            reset::abort(stream);
        }
    })
    .await
}
