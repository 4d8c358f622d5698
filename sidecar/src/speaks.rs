//! What a connection speaks, by the first byte of either side.
//!
//! Clients of HTTP speak first, so the client is waited for, a moment. Then the other side is connected as well, because
//! its protocol may be one in which the server begins, and whoever speaks first decides. So no protocol waits for a time
//! limit to pass, and none has to be declared.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use layers::error::Error;
use layers::transport::detect::{First, MAX_FIRST, detect};
use layers::upstream::opaque::OpaqueStream;
use layers::worker::io::Socket;
use tokio::io::AsyncReadExt;
use tokio::time::sleep;

/// Bytes of a server that speaks first.
const GREETING: usize = 4096;

/// Who spoke first, and what.
pub enum Spoken {
    /// The client; its bytes are in the socket. The other side was connected meanwhile, or not.
    Client(First, Option<OpaqueStream>),
    /// The other side.
    Server(OpaqueStream, Bytes),
}

/// Nobody said anything that tells.
#[derive(Debug, thiserror::Error)]
pub enum Silent {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the other side cannot be connected: {0}")]
    Dial(Error),
}

type Dialing<'a> = Pin<Box<dyn Future<Output = Result<OpaqueStream, Error>> + 'a>>;

/// Waits for the first bytes of `socket`, and after `patience` for those of the other side too, which `dial` connects.
///
/// # Errors
/// The client is gone, or the other side cannot be connected while it is waited for.
pub async fn first(
    socket: &mut Socket,
    patience: Duration,
    dial: impl FnOnce() -> Dialing<'static>,
) -> Result<Spoken, Silent> {
    let mut read = Vec::new();
    let mut dial = Some(dial);
    let mut dialing: Option<Dialing<'static>> = None;
    let mut upstream: Option<OpaqueStream> = None;
    let mut greeting = vec![0; GREETING];
    let mut pause = Box::pin(sleep(patience));
    loop {
        tokio::select! {
            // A client that has spoken is answered before anybody else is asked.
            biased;
            got = socket.read_buf(&mut read) => {
                // A client that says nothing more may still listen.
                let first = if got? == 0 { Some(First::Opaque) } else { detect(&read) };
                let first = first.or_else(|| (read.len() > MAX_FIRST).then_some(First::Opaque));
                if let Some(first) = first {
                    socket.put_back(&read);
                    return Ok(Spoken::Client(first, upstream));
                }
            }
            dialled = async { match &mut dialing { Some(dialing) => dialing.await, None => pending().await } } => {
                dialing = None;
                upstream = Some(dialled.map_err(Silent::Dial)?);
            }
            said = async { match &mut upstream { Some(upstream) => upstream.read(&mut greeting).await, None => pending().await } } => {
                let said = said?;
                let early = Bytes::copy_from_slice(greeting.get(..said).unwrap_or_default());
                let Some(upstream) = upstream.take() else { continue };
                socket.put_back(&read);
                return Ok(Spoken::Server(upstream, early));
            }
            () = &mut pause, if dial.is_some() => dialing = dial.take().map(|dial| dial()),
        }
    }
}
