//! Bytes both ways after a protocol switch, until both sides have ended or nothing moved for too long.
//!
//! An idle tunnel holds no buffers: bytes are read into one buffer of the worker and written on at once; only
//! what the other side does not take is kept, and then nothing more is read. A tunnel does not end with a
//! configuration change. The worker counts tunnels and cuts the client's side when a drain is over, which ends the other.

use std::cell::RefCell;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until};

/// Bytes read at once.
const PIECE: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE].into());
}

/// How a tunnel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both sides finished.
    Finished,
    /// One side broke.
    Broken,
    /// Nothing moved for the idle limit.
    Idle,
}

impl Ended {
    /// As it is written in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Ended::Finished => "finished",
            Ended::Broken => "broken",
            Ended::Idle => "idle",
        }
    }
}

/// Carry bytes between `client` and `upstream`. `early` are bytes that came from the upstream with its answer.
pub(crate) async fn run<C, U>(client: C, upstream: U, early: Bytes, idle: Duration) -> Ended
where
    C: AsyncRead + AsyncWrite,
    U: AsyncRead + AsyncWrite,
{
    let (mut client, mut upstream) = (pin!(client), pin!(upstream));
    let mut down = Direction { held: early, ..Direction::default() };
    let mut up = Direction::default();
    let mut deadline = Instant::now() + idle;
    let mut timer = pin!(sleep_until(deadline));
    std::future::poll_fn(|cx| {
        let ends = [
            down.poll(cx, upstream.as_mut(), client.as_mut()),
            up.poll(cx, client.as_mut(), upstream.as_mut()),
        ];
        if ends.iter().any(|end| matches!(end, Poll::Ready(Err(_)))) {
            return Poll::Ready(Ended::Broken);
        }
        if ends.iter().all(Poll::is_ready) {
            return Poll::Ready(Ended::Finished);
        }
        // The timer is not moved with every byte; it looks at the deadline when it fires.
        if std::mem::take(&mut down.moved) | std::mem::take(&mut up.moved) {
            deadline = Instant::now() + idle;
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(Ended::Idle);
            }
            timer.as_mut().reset(deadline);
        }
    })
    .await
}

/// One direction: what was read and not yet taken, and how far it is.
#[derive(Default)]
struct Direction {
    held: Bytes,
    read_all: bool,
    shut: bool,
    /// A byte went through since the flag was last taken.
    moved: bool,
}

impl Direction {
    /// Move what can be moved. Ready when the source has ended and the sink knows.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        mut source: Pin<&mut R>,
        mut sink: Pin<&mut W>,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead,
        W: AsyncWrite,
    {
        while !self.shut {
            while !self.held.is_empty() {
                let written = ready!(sink.as_mut().poll_write(cx, &self.held))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.held.advance(written);
                self.moved = true;
            }
            if self.read_all {
                ready!(sink.as_mut().poll_shutdown(cx))?;
                self.shut = true;
                break;
            }
            let read = SCRATCH.with_borrow_mut(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                ready!(source.as_mut().poll_read(cx, &mut buffer))?;
                self.moved = true;
                let piece = buffer.filled();
                self.read_all = piece.is_empty();
                // Usually the other side takes it at once and nothing is copied.
                let taken = match piece.is_empty() {
                    true => 0,
                    false => match sink.as_mut().poll_write(cx, piece) {
                        Poll::Ready(taken) => taken?,
                        Poll::Pending => 0,
                    },
                };
                self.held = Bytes::copy_from_slice(piece.get(taken..).unwrap_or_default());
                Poll::Ready(io::Result::Ok(()))
            });
            if read.is_pending() {
                // Nothing more for now: what a layer below has buffered must not wait.
                ready!(sink.as_mut().poll_flush(cx))?;
            }
            ready!(read)?;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::cell::Cell;
    use std::rc::Rc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::{JoinHandle, LocalSet, spawn_local};

    use super::*;

    fn start(idle: Duration, room: usize) -> (DuplexStream, DuplexStream, JoinHandle<Ended>) {
        let (client, inner_client) = duplex(room);
        let (upstream, inner_upstream) = duplex(room);
        let early = Bytes::from_static(b"hello ");
        (client, upstream, spawn_local(run(inner_client, inner_upstream, early, idle)))
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_half_closes_too() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, mut upstream, ended) = start(Duration::from_secs(60), 64);
                upstream.write_all(b"client").await.unwrap();
                let mut got = [0; 12];
                client.read_exact(&mut got).await.unwrap();
                assert_eq!(&got, b"hello client", "what came with the answer comes first");

                // More than either pipe holds, while nobody reads at first.
                let sent = vec![7; 200_000];
                let write = async {
                    client.write_all(&sent).await.unwrap();
                    client.shutdown().await.unwrap();
                };
                let read = async {
                    let mut all = Vec::new();
                    upstream.read_to_end(&mut all).await.unwrap();
                    all
                };
                let ((), all) = tokio::join!(write, read);
                assert_eq!(all, sent);

                upstream.write_all(b"bye").await.unwrap();
                drop(upstream);
                let mut rest = Vec::new();
                client.read_to_end(&mut rest).await.unwrap();
                assert_eq!(rest, b"bye", "the other direction lives on after a half close");
                drop(client);
                assert_eq!(ended.await.unwrap(), Ended::Finished);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_tunnel_ends_and_a_busy_one_does_not() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, mut upstream, ended) = start(Duration::from_secs(10), 64);
                for _ in 0..5 {
                    tokio::time::sleep(Duration::from_secs(8)).await;
                    client.write_all(b"x").await.unwrap();
                    upstream.read_u8().await.unwrap();
                }
                assert!(!ended.is_finished());
                let quiet = Instant::now();
                assert_eq!(ended.await.unwrap(), Ended::Idle);
                assert_eq!(quiet.elapsed().as_secs(), 10);
            })
            .await;
    }

    /// A client's side that the worker cuts when a drain is over.
    struct Cut(DuplexStream, Rc<Cell<bool>>);

    impl AsyncRead for Cut {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.1.get() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            Pin::new(&mut self.0).poll_read(cx, buffer)
        }
    }

    impl AsyncWrite for Cut {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn a_client_that_is_cut_takes_the_upstream_with_it() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, inner_client) = duplex(64);
                let (mut upstream, inner_upstream) = duplex(64);
                let cut = Rc::new(Cell::new(false));
                let inner_client = Cut(inner_client, cut.clone());
                let idle = Duration::from_secs(60);
                let ended = spawn_local(run(inner_client, inner_upstream, Bytes::new(), idle));
                client.write_all(b"x").await.unwrap();
                assert_eq!(upstream.read_u8().await.unwrap(), b'x');
                cut.set(true);
                // The worker wakes the reader; here a byte does.
                client.write_all(b"y").await.unwrap();
                assert_eq!(ended.await.unwrap(), Ended::Broken);
                assert_eq!(upstream.read(&mut [0]).await.unwrap(), 0, "the upstream sees the end");
            })
            .await;
    }
}
