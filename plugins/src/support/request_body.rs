//! The body of a request for a plugin that sends it elsewhere first: read within a bound, and still forwarded.
//!
//! How long a client may take to send it is the connection's affair, which ends slow clients.

use bytes::Bytes;
use http::StatusCode;
use layers::body::{Body, TooLarge};
use layers::exchange::State;
use layers::plugin::Flow;

use super::reply::Canned;

/// Reads the whole body, at most `limit` bytes.
///
/// # Errors
/// The answer to give: 413 when it is larger, 400 when it broke off.
pub async fn read(x: &mut State, limit: usize) -> Result<Bytes, Flow> {
    match x.request_body.collect_up_to(limit).await {
        Ok(bytes) => {
            x.request_body = Body::from(bytes.clone());
            Ok(bytes)
        }
        Err(error) if error.is::<TooLarge>() => Err(Canned::status(StatusCode::PAYLOAD_TOO_LARGE).flow()),
        Err(_) => Err(Canned::status(StatusCode::BAD_REQUEST).flow()),
    }
}
