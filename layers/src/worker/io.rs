//! A client's bytes: the socket, plain or encrypted, and the way to the engine of HTTP/2, on which the frame counter looks
//! at what comes, and what the client lets us wait for is noted for the deadlines.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::transport::frames::{Flood, Frames};
use crate::transport::join;
use crate::transport::original_dst::{Captured, original_dst};
use crate::worker::deadlines::Watch;

/// A client's socket, with bytes that were read ahead of their reader.
#[derive(Debug)]
pub struct Socket {
    tcp: TcpStream,
    early: Vec<u8>,
}

impl Socket {
    /// A socket nobody has read from.
    pub fn new(tcp: TcpStream) -> Self {
        Self { tcp, early: Vec::new() }
    }

    /// Where it was going before it was captured.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn original_dst(&self, captured: Captured) -> io::Result<SocketAddr> {
        original_dst(&self.tcp, captured)
    }

    /// Gives bytes back that belong to the next reader.
    pub fn put_back(&mut self, bytes: &[u8]) {
        self.early.splice(..0, bytes.iter().copied());
    }
}

/// Copies as much of `early` as fits; false if there was none.
fn read_early(early: &mut Vec<u8>, buf: &mut ReadBuf<'_>) -> bool {
    if early.is_empty() {
        return false;
    }
    let taken = early.len().min(buf.remaining());
    buf.put_slice(early.get(..taken).unwrap_or_default());
    if taken == early.len() {
        *early = Vec::new();
    } else {
        early.drain(..taken);
    }
    true
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if read_early(&mut self.early, buf) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        join::poll_write(Pin::new(&mut self.tcp), cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// A client's stream, plain or encrypted.
#[derive(Debug)]
pub enum Stream {
    /// Bytes as they are.
    Plain(Socket),
    /// After a TLS handshake. Boxed: the session is large and plain connections are many.
    Tls(Box<TlsStream<Socket>>),
}

macro_rules! either {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream.get_mut() {
            Stream::Plain($inner) => $call,
            Stream::Tls($inner) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, inner => Pin::new(inner).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, inner => Pin::new(inner).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, inner => Pin::new(inner).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, inner => Pin::new(inner).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// What the worker is told while HTTP/2's engine owns the transport.
#[derive(Debug, Default)]
pub(crate) struct Link(Cell<Option<Flood>>);

impl Link {
    /// The client only makes work.
    pub fn flood(&self) -> Option<Flood> {
        self.0.get()
    }
}

/// The transport as HTTP/2's engine sees it.
#[derive(Debug)]
pub(crate) struct Io {
    stream: Stream,
    /// What came before the engine did.
    early: Vec<u8>,
    frames: Frames,
    watch: Arc<Watch>,
    link: Rc<Link>,
}

impl Io {
    /// With the bytes that showed which protocol it is.
    pub fn new(stream: Stream, early: Vec<u8>, watch: Arc<Watch>, link: Rc<Link>) -> Self {
        let frames = Frames::new(watch.now());
        Self { stream, early, frames, watch, link }
    }

    fn noted<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(_) => self.watch.unstuck(),
            Poll::Pending => self.watch.stuck(),
        }
        written
    }

    fn sent(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.frames.sent(*bytes);
        }
        self.noted(written)
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.link.flood().is_some() {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if !read_early(&mut this.early, buf) {
            match Pin::new(&mut this.stream).poll_read(cx, buf) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
        }
        let fresh = buf.filled().get(before..).unwrap_or_default();
        if let Err(flood) = this.frames.scan(fresh, this.watch.now()) {
            // What has come is not passed on, so the engine has only to say goodbye.
            buf.set_filled(before);
            this.link.0.set(Some(flood));
            this.watch.wake();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.sent(written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.noted(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.noted(shut)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bytes);
        this.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
