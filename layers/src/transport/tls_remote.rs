//! Handshakes whose signature is made elsewhere. rustls waits for a signature where it asks for it, so the step that asks is
//! taken on a thread that may wait, and the worker goes on meanwhile. All other steps are taken here, as those of other
//! handshakes are.
//!
//! A server signs when it has read the ClientHello; the first one, or the second after a HelloRetryRequest.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use certs::signer::Pool;
use rustls::{HandshakeKind, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, StartHandshake};

use super::tls_server::HandshakeError;

/// Goes on from the ClientHello. The caller bounds the time.
///
/// # Errors
/// As other handshakes; and the signers do not sign, or too many handshakes wait for them.
pub(super) async fn handshake<T>(
    start: StartHandshake<T>,
    config: Arc<ServerConfig>,
    pool: &Pool,
) -> Result<TlsStream<T>, HandshakeError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let place = pool.place().await?;
    let begin = move || {
        let mut retried = false;
        let accept = start.into_stream_with(config, |session| {
            retried = session.handshake_kind() == Some(HandshakeKind::FullWithHelloRetryRequest);
        });
        drop(place);
        (accept, retried)
    };
    let (accept, retried) = pool.handle().spawn_blocking(begin).await.map_err(io::Error::other)?;
    if retried { elsewhere(accept, pool).await } else { Ok(accept.await?) }
}

/// Takes each step on a thread that may wait. It never waits for the client there: between two steps there is no thread.
async fn elsewhere<T>(mut accept: Accept<T>, pool: &Pool) -> Result<TlsStream<T>, HandshakeError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let woken = Arc::new(Woken(Notify::new()));
    loop {
        let place = pool.place().await?;
        let waker = Waker::from(Arc::clone(&woken));
        let step = move || {
            let polled = Pin::new(&mut accept).poll(&mut Context::from_waker(&waker));
            drop(place);
            (accept, polled)
        };
        let (rest, polled) = pool.handle().spawn_blocking(step).await.map_err(io::Error::other)?;
        if let Poll::Ready(stream) = polled {
            return Ok(stream?);
        }
        accept = rest;
        woken.0.notified().await;
    }
}

/// Remembers that the socket is ready, also if that was so before anybody waited.
struct Woken(Notify);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}
