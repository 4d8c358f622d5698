//! A client's side of a switch of protocols. A request that asks for one has an [`Upgrade`]; whoever answers it with 101
//! waits for that, and then owns the connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The client's connection, once the answer 101 is out. `None` if it never was.
#[derive(Debug)]
pub struct Upgrade(OnUpgrade);

impl Upgrade {
    pub(crate) fn new(upgrade: OnUpgrade) -> Self {
        Self(upgrade)
    }
}

impl Future for Upgrade {
    type Output = Option<Switched>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|switched| Some(Switched(TokioIo::new(switched.ok()?))))
    }
}

/// The client's bytes after a switch of protocols, beginning with those that came before the answer.
#[derive(Debug)]
pub struct Switched(TokioIo<Upgraded>);

impl AsyncRead for Switched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Switched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
