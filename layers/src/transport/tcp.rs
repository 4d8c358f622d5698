//! Bytes between two connections that nobody understands: both ways, with half-closes, counted, until both sides have ended
//! or nothing moved for too long. An idle connection holds no buffer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::upstream::tunnel;
pub use crate::upstream::tunnel::Ended;

/// Bytes that went over a connection, for whoever looks on.
#[derive(Debug, Default)]
pub struct Traffic {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Traffic {
    /// Bytes that came from the client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes that came from the upstream.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// Carries bytes between `client` and `upstream`. `early` has come from the upstream already.
pub async fn copy<C, U>(client: C, upstream: U, early: Bytes, idle: Duration, traffic: &Arc<Traffic>) -> Ended
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    traffic.sent.fetch_add(early.len() as u64, Ordering::Relaxed);
    let client = Counted { inner: client, count: &traffic.received };
    let upstream = Counted { inner: upstream, count: &traffic.sent };
    tunnel::run(client, upstream, early, idle).await
}

/// Counts what is read.
struct Counted<'a, S> {
    inner: S,
    count: &'a AtomicU64,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buffer);
        self.count.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_are_counted_each_way_and_half_closes_pass() {
        let ((mut client, near), (mut server, far)) = (duplex(16), duplex(16));
        let traffic = Arc::<Traffic>::default();
        let copying = copy(near, far, Bytes::from_static(b"220 "), Duration::from_secs(60), &traffic);
        let talking = async {
            let mut got = [0; 4];
            client.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"220 ", "what came early comes first");
            let request = async {
                client.write_all(b"some words to the server").await.unwrap();
                client.shutdown().await.unwrap();
            };
            let mut words = Vec::new();
            let (read, ()) = tokio::join!(server.read_to_end(&mut words), request);
            assert_eq!(read.unwrap(), 24);
            server.write_all(b"bye").await.unwrap();
            drop(server);
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).await.unwrap();
            assert_eq!(rest, b"bye", "the answer after the half-close");
        };
        let (ended, ()) = tokio::join!(copying, talking);
        assert_eq!(ended, Ended::Finished);
        assert_eq!((traffic.received(), traffic.sent()), (24, 7));
    }
}
