//! Bytes both ways after a protocol switch, until both sides have ended or nothing moved for too long.
//!
//! An idle tunnel holds no buffers: bytes are read into one buffer of the worker and written on at once; only
//! what the other side does not take is kept, and then nothing more is read. A tunnel does not end with a
//! configuration change; a drain counts tunnels and closes those that are left at its deadline.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
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
    /// The gateway drains.
    Closed,
}

/// The open tunnels of one worker.
#[derive(Clone, Debug, Default)]
pub struct Tunnels(Rc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    open: Cell<usize>,
    closing: Cell<bool>,
    close: Notify,
}

impl Tunnels {
    /// How many are open.
    pub fn open(&self) -> usize {
        self.0.open.get()
    }

    /// End all of them, also those that are opened from now on: the drain's deadline is over.
    pub fn close(&self) {
        self.0.closing.set(true);
        self.0.close.notify_waiters();
    }

    /// Carry bytes between `client` and `upstream`. `early` are bytes that came from the upstream with its
    /// answer.
    pub async fn run<C, U>(&self, client: C, upstream: U, early: Bytes, idle: Duration) -> Ended
    where
        C: AsyncRead + AsyncWrite,
        U: AsyncRead + AsyncWrite,
    {
        let _open = Open::new(&self.0);
        let closed = self.0.close.notified();
        let mut closed = pin!(closed);
        closed.as_mut().enable();
        if self.0.closing.get() {
            return Ended::Closed;
        }
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
            if closed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ended::Closed);
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
}

/// Counts a tunnel while it is open.
struct Open<'a>(&'a Registry);

impl<'a> Open<'a> {
    fn new(registry: &'a Registry) -> Self {
        registry.open.set(registry.open.get() + 1);
        Self(registry)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
    }
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

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::{JoinHandle, LocalSet, spawn_local};

    use super::*;

    fn start(
        tunnels: &Tunnels,
        idle: Duration,
        room: usize,
    ) -> (DuplexStream, DuplexStream, JoinHandle<Ended>) {
        let (client, inner_client) = duplex(room);
        let (upstream, inner_upstream) = duplex(room);
        let tunnels = tunnels.clone();
        let early = Bytes::from_static(b"hello ");
        let run = async move { tunnels.run(inner_client, inner_upstream, early, idle).await };
        (client, upstream, spawn_local(run))
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_half_closes_too() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let tunnels = Tunnels::default();
                let (mut client, mut upstream, ended) = start(&tunnels, Duration::from_secs(60), 64);
                upstream.write_all(b"client").await.unwrap();
                let mut got = [0; 12];
                client.read_exact(&mut got).await.unwrap();
                assert_eq!(&got, b"hello client", "what came with the answer comes first");
                assert_eq!(tunnels.open(), 1);

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
                assert_eq!(tunnels.open(), 0);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_tunnel_ends_and_a_busy_one_does_not() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let tunnels = Tunnels::default();
                let (mut client, mut upstream, ended) = start(&tunnels, Duration::from_secs(10), 64);
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

    #[tokio::test]
    async fn a_drain_closes_what_is_left() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let tunnels = Tunnels::default();
                let (_client, _upstream, ended) = start(&tunnels, Duration::from_secs(60), 64);
                tokio::task::yield_now().await;
                tunnels.close();
                assert_eq!(ended.await.unwrap(), Ended::Closed);
                let (_client, _upstream, late) = start(&tunnels, Duration::from_secs(60), 64);
                assert_eq!(late.await.unwrap(), Ended::Closed);
            })
            .await;
    }
}
