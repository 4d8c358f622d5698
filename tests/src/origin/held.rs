//! Answers nothing until it is told to.

use bytes::Bytes;
use http::Response;
use tokio::sync::watch;

use super::Origin;

/// The origin, and what lets its answers go.
pub async fn start() -> (Origin, watch::Sender<bool>) {
    let (go, gone) = watch::channel(false);
    let origin = Origin::http(move |_| {
        let mut gone = gone.clone();
        async move {
            let _ = gone.wait_for(|go| *go).await;
            Response::new(Bytes::from_static(b"done"))
        }
    });
    (origin.await, go)
}
