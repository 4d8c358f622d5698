//! A client's side of a switch of protocols. A request that asks for one has an [`Upgrade`]; whoever answers it with 101
//! waits for that, and then owns the connection. The worker goes on to watch it, and can end it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::worker::deadlines::Watch;
use crate::worker::io::Stream;

/// The client's connection, once the answer 101 is out. `None` if it never was.
#[derive(Debug)]
pub struct Upgrade(oneshot::Receiver<Switched>);

/// Where the connection goes that an [`Upgrade`] waits for.
pub(crate) type Grant = oneshot::Sender<Switched>;

/// Both ends of a switch.
pub(crate) fn channel() -> (Grant, Upgrade) {
    let (grant, upgrade) = oneshot::channel();
    (grant, Upgrade(upgrade))
}

impl Future for Upgrade {
    type Output = Option<Switched>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(Result::ok)
    }
}

/// What a worker and the owner of a tunnel tell each other.
#[derive(Debug, Default)]
pub(crate) struct Tunnel {
    closed: Cell<bool>,
    reader: RefCell<Option<Waker>>,
}

impl Tunnel {
    /// Whether its owner has let go of it.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Lets its reader look.
    pub fn wake(&self) {
        if let Some(reader) = self.reader.borrow_mut().take() {
            reader.wake();
        }
    }
}

/// The client's bytes after a switch of protocols, beginning with those that came before the answer.
#[derive(Debug)]
pub struct Switched {
    stream: Stream,
    early: Bytes,
    watch: Arc<Watch>,
    tunnel: Rc<Tunnel>,
}

impl Switched {
    pub(crate) fn new(stream: Stream, early: Bytes, watch: &Arc<Watch>, tunnel: &Rc<Tunnel>) -> Self {
        Self { stream, early, watch: watch.clone(), tunnel: tunnel.clone() }
    }

    /// Its owner learns from an error that its time is over.
    fn ended(&self) -> io::Result<()> {
        match self.watch.ended() {
            None => Ok(()),
            Some(cause) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, cause.code())),
        }
    }

    fn noted<T>(&self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(_) => self.watch.unstuck(),
            Poll::Pending => self.watch.stuck(),
        }
        written
    }
}

impl AsyncRead for Switched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.ended()?;
        if !self.early.is_empty() {
            let taken = self.early.len().min(buf.remaining());
            buf.put_slice(self.early.get(..taken).unwrap_or_default());
            self.early.advance(taken);
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_pending() {
            let reader = &mut *self.tunnel.reader.borrow_mut();
            if !reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
                *reader = Some(cx.waker().clone());
            }
        }
        read
    }
}

impl AsyncWrite for Switched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.ended()?;
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.noted(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.noted(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.noted(shut)
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        self.tunnel.closed.set(true);
        self.watch.wake();
    }
}
