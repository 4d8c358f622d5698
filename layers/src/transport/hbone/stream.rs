//! One tunnel as a stream of bytes. Bytes are acknowledged to the peer when they are taken here, so a side that does not
//! read holds up its peer and nobody's memory grows.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::FRAME;

/// Counts a tunnel as long as it lives.
#[derive(Debug)]
pub struct Lease(Rc<Open>);

/// The tunnels of a connection.
#[derive(Debug)]
pub struct Open {
    count: Cell<usize>,
    /// Since when the count is what it is.
    since: Cell<Instant>,
}

impl Default for Open {
    fn default() -> Self {
        Self { count: Cell::new(0), since: Cell::new(Instant::now()) }
    }
}

impl Open {
    /// One more.
    pub fn lease(self: &Rc<Self>) -> Lease {
        self.set(self.count.get() + 1);
        Lease(self.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// When the last one came or went.
    pub fn since(&self) -> Instant {
        self.since.get()
    }

    fn set(&self, count: usize) {
        self.count.set(count);
        self.since.set(Instant::now());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.set(self.0.count().saturating_sub(1));
    }
}

/// A tunnel. Dropping it before both sides have ended resets it.
#[derive(Debug)]
pub struct Tunnel {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// What has come and was not taken.
    held: Bytes,
    read_all: bool,
    shut: bool,
    _lease: Lease,
}

impl Tunnel {
    pub(crate) fn new(send: SendStream<Bytes>, receive: RecvStream, lease: Lease) -> Self {
        Self { send, receive, held: Bytes::new(), read_all: false, shut: false, _lease: lease }
    }
}

fn broken(error: h2::Error) -> io::Error {
    let kind = match error.reason() {
        Some(Reason::CANCEL | Reason::CONNECT_ERROR | Reason::REFUSED_STREAM) => {
            io::ErrorKind::ConnectionReset
        }
        _ => io::ErrorKind::BrokenPipe,
    };
    io::Error::new(kind, error)
}

impl AsyncRead for Tunnel {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.held.is_empty() && !this.read_all {
            match ready!(this.receive.poll_data(cx)) {
                Some(Ok(bytes)) => this.held = bytes,
                // A peer that has said everything may let go of the stream.
                Some(Err(error)) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => {
                    this.read_all = true;
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => this.read_all = true,
            }
        }
        let taken = this.held.len().min(buffer.remaining());
        if let Some(bytes) = this.held.get(..taken) {
            buffer.put_slice(bytes);
            this.held.advance(taken);
            // A stream that has ended needs no window.
            let _ = this.receive.flow_control().release_capacity(taken);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let wanted = bytes.len().min(FRAME as usize);
        let mut room = this.send.capacity();
        if room == 0 {
            this.send.reserve_capacity(wanted);
        }
        while room == 0 {
            room = match ready!(this.send.poll_capacity(cx)) {
                Some(Ok(room)) => room,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let piece = bytes.get(..wanted.min(room)).unwrap_or_default();
        this.send.send_data(Bytes::copy_from_slice(piece), false).map_err(broken)?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's own task writes.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.shut {
            this.shut = true;
            this.send.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}
