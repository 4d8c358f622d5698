//! The client's bytes on their way to the protocol engine. Every read and write passes here once: the framing guard
//! or the frame counter looks at what comes, and what the client lets us wait for is noted for the deadlines.
//! It is `Send` because the engine hands it out at an upgrade; nothing else of a worker is.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::transport::frames::{Flood, Frames};
use crate::transport::framing::{Guard, Position, Refusal};
use crate::transport::join;
use crate::worker::deadlines::{Phase, Watch};

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

/// What the worker asks of the transport at its next read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Command {
    None = 0,
    /// The switch of protocols was refused: the next request follows.
    Next,
    /// The switch was granted: from here on the bytes are not ours to read.
    Tunnel,
    /// The head took too long: refuse it.
    SlowHead,
    /// The body took too long: end it with an error.
    SlowBody,
}

/// The answer to the last request: on its way, handed over, or out.
const ANSWERING: u8 = 0;
const ANSWERED: u8 = 1;
const SENT: u8 = 2;

/// What the transport and the worker tell each other while the engine owns the transport. Both are on one thread.
#[derive(Debug, Default)]
pub(crate) struct Link {
    command: AtomicU8,
    answer: AtomicU8,
    /// The engine waits for the next request, and its transport has not been asked again since.
    waits: AtomicBool,
    eof: AtomicBool,
    /// The transport is gone: after an upgrade this is the end of the tunnel.
    closed: AtomicBool,
    refusal: OnceLock<Refusal>,
    flood: OnceLock<Flood>,
    /// The task that reads a tunnel is none of the worker's own.
    tunnel: AtomicWaker,
}

impl Link {
    /// Before an engine starts to use the transport (again).
    pub fn restart(&self) {
        self.answer.store(ANSWERING, Relaxed);
        self.waits.store(false, Relaxed);
    }

    pub fn command(&self, command: Command) {
        self.command.store(command as u8, Relaxed);
    }

    fn take_command(&self) -> Command {
        let command = match self.command.load(Relaxed) {
            0 => return Command::None,
            1 => Command::Next,
            2 => Command::Tunnel,
            3 => Command::SlowHead,
            _ => Command::SlowBody,
        };
        self.command(Command::None);
        command
    }

    /// A request has begun.
    pub fn answering(&self) {
        self.answer.store(ANSWERING, Relaxed);
    }

    /// The last byte of the answer was handed to the engine.
    pub fn answered(&self) {
        self.answer.store(ANSWERED, Relaxed);
    }

    /// Whether the last byte of the answer was written to the socket.
    pub fn is_sent(&self) -> bool {
        self.answer.load(Relaxed) == SENT
    }

    /// Whether the engine waits for the next request.
    pub fn waits(&self) -> bool {
        self.waits.load(Relaxed)
    }

    /// The client has closed its side.
    pub fn is_eof(&self) -> bool {
        self.eof.load(Relaxed)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal.get().copied()
    }

    pub fn flood(&self) -> Option<Flood> {
        self.flood.get().copied()
    }

    /// Lets the reader of a tunnel look.
    pub fn wake_tunnel(&self) {
        self.tunnel.wake();
    }
}

/// Tells when the transport is gone.
#[derive(Debug)]
struct Closing(Arc<Link>, Arc<Watch>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.closed.store(true, Relaxed);
        self.1.wake();
    }
}

#[derive(Debug)]
enum Protocol {
    Http1(Guard),
    Http2 { early: Vec<u8>, frames: Frames },
}

/// The transport as the engine sees it.
#[derive(Debug)]
pub(crate) struct Io {
    stream: Stream,
    protocol: Protocol,
    watch: Arc<Watch>,
    link: Arc<Link>,
    /// Bytes have come since the last time there were none.
    fresh: bool,
    _closing: Closing,
}

impl Io {
    /// For HTTP/1, behind a guard that may hold bytes already.
    pub fn http1(stream: Stream, guard: Guard, watch: Arc<Watch>, link: Arc<Link>) -> Self {
        Self::new(stream, Protocol::Http1(guard), watch, link)
    }

    /// For HTTP/2, with the bytes that showed it.
    pub fn http2(stream: Stream, early: Vec<u8>, watch: Arc<Watch>, link: Arc<Link>) -> Self {
        let frames = Frames::new(watch.now());
        Self::new(stream, Protocol::Http2 { early, frames }, watch, link)
    }

    fn new(stream: Stream, protocol: Protocol, watch: Arc<Watch>, link: Arc<Link>) -> Self {
        let closing = Closing(link.clone(), watch.clone());
        Self { stream, protocol, watch, link, fresh: true, _closing: closing }
    }

    /// Takes it apart when the engine is done with it.
    pub fn into_parts(self) -> (Stream, Option<Guard>) {
        match self.protocol {
            Protocol::Http1(guard) => (self.stream, Some(guard)),
            Protocol::Http2 { .. } => (self.stream, None),
        }
    }

    fn note_read(&mut self, read: &Poll<io::Result<()>>, any: bool, position: Position) {
        match read {
            Poll::Ready(_) => {
                self.watch.busy();
                self.link.waits.store(false, Relaxed);
                self.fresh = true;
                if !any {
                    self.link.eof.store(true, Relaxed);
                }
            }
            Poll::Pending => {
                match position {
                    Position::Between if self.watch.in_flight() > 0 => {
                        // The answer is still to come; when it is out, the connection idles.
                        self.link.waits.store(true, Relaxed);
                        self.watch.busy();
                    }
                    Position::Between if self.fresh => self.watch.enter(Phase::Idle),
                    Position::Between => self.watch.stay(Phase::Idle),
                    Position::Head => self.watch.stay(Phase::Head),
                    Position::Body if self.fresh => self.watch.enter(Phase::Body),
                    Position::Body => self.watch.stay(Phase::Body),
                    Position::Waiting | Position::Blind => self.watch.busy(),
                }
                self.fresh = false;
            }
        }
    }

    fn note_write<T>(&mut self, written: &Poll<io::Result<T>>) {
        match written {
            Poll::Ready(_) => self.watch.unstuck(),
            Poll::Pending => self.watch.stuck(),
        }
    }

    fn sent(&mut self, written: &Poll<io::Result<usize>>) {
        if let (Protocol::Http2 { frames, .. }, Poll::Ready(Ok(bytes))) = (&mut self.protocol, written) {
            frames.sent(*bytes);
        }
    }

    /// A tunnel learns from an error that its time is over.
    fn tunnel_end(&self, cx: &Context<'_>) -> io::Result<()> {
        self.link.tunnel.register(cx.waker());
        match self.watch.ended() {
            None => Ok(()),
            Some(cause) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, cause.code())),
        }
    }

    fn is_tunnel(&self) -> bool {
        matches!(&self.protocol, Protocol::Http1(guard) if guard.is_tunnel())
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_tunnel() {
            this.tunnel_end(cx)?;
        }
        let before = buf.filled().len();
        match &mut this.protocol {
            Protocol::Http1(guard) => {
                match this.link.take_command() {
                    Command::None => {}
                    Command::Next => guard.switched(false),
                    Command::Tunnel => guard.switched(true),
                    Command::SlowHead => guard.expire(),
                    Command::SlowBody => {
                        let slow = io::Error::new(io::ErrorKind::TimedOut, "the client's body took too long");
                        return Poll::Ready(Err(slow));
                    }
                }
                let read = guard.poll_read(Pin::new(&mut this.stream), cx, buf);
                let position = guard.position();
                if let Some(refusal) = guard.refusal() {
                    let _ = this.link.refusal.set(refusal);
                }
                this.note_read(&read, buf.filled().len() > before, position);
                read
            }
            Protocol::Http2 { early, frames } => {
                if this.link.flood().is_some() {
                    return Poll::Pending;
                }
                if !read_early(early, buf) {
                    match Pin::new(&mut this.stream).poll_read(cx, buf) {
                        Poll::Ready(Ok(())) => {}
                        other => return other,
                    }
                }
                let fresh = buf.filled().get(before..).unwrap_or_default();
                if fresh.is_empty() {
                    this.link.eof.store(true, Relaxed);
                }
                if let Err(flood) = frames.scan(fresh, this.watch.now()) {
                    // What has come is not passed on, so the engine has only to say goodbye.
                    buf.set_filled(before);
                    let _ = this.link.flood.set(flood);
                    this.watch.wake();
                    return Poll::Pending;
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.is_tunnel() {
            this.tunnel_end(cx)?;
        }
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.note_write(&written);
        this.sent(&written);
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.note_write(&flushed);
        if flushed.is_ready() && this.link.answer.load(Relaxed) == ANSWERED {
            // The engine flushes only what it has written out, so nothing of the answer is left in it.
            this.link.answer.store(SENT, Relaxed);
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.note_write(&shut);
        shut
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.is_tunnel() {
            this.tunnel_end(cx)?;
        }
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bytes);
        this.note_write(&written);
        this.sent(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
