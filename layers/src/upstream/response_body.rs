//! A response body on its way from an upstream, with what it holds while it lasts.
//!
//! The connection goes back to the pool when the body has ended, and only then; a body that is dropped or fails
//! takes its connection with it. The endpoint counts as active for as long. A body that has come with its head is handed
//! on as it is, and its connection is free at once. A timer is made only when the upstream keeps the reader waiting, and
//! time in which the reader itself does not read is not held against it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::endpoint::Picked;
use super::http1::connection::Http1;
use super::pool::{Keepalive, Key, Pool};
use super::send::Http2Stream;
use crate::body::{Body, BodyError};

/// Where an HTTP/1 connection goes when it is free.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) pool: Pool,
    pub(crate) transport: u64,
    pub(crate) name: Option<Box<str>>,
    pub(crate) keepalive: Keepalive,
}

impl Home {
    /// Both messages are complete, as far as the answer tells.
    fn take_back(&self, connection: Http1, picked: &Picked, now: std::time::Instant) {
        let key = Key { endpoint: picked.id(), transport: self.transport, name: self.name.as_deref() };
        self.pool.put(picked.endpoint(), key, connection, self.keepalive, now);
    }
}

/// The upstream sent nothing for too long in the middle of a body.
#[derive(Debug, thiserror::Error)]
#[error("the upstream sent nothing for {0:?}")]
struct Stalled(Duration);

/// What a body comes over, until it has ended.
#[derive(Debug)]
enum Source {
    Http1 { connection: Http1, picked: Picked, home: Home },
    Http2 { incoming: Incoming, stream: Http2Stream, _picked: Picked },
    Ended,
}

impl Source {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Http1 { connection, .. } => {
                connection.poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
            }
            Self::Http2 { incoming, .. } => {
                Pin::new(incoming).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
            }
            Self::Ended => Poll::Ready(None),
        }
    }

    fn is_end(&self) -> bool {
        match self {
            Self::Http1 { connection, .. } => connection.is_end(),
            Self::Http2 { incoming, .. } => incoming.is_end_stream(),
            Self::Ended => true,
        }
    }

    /// Both messages are complete.
    fn finish(&mut self) {
        match std::mem::replace(self, Self::Ended) {
            Self::Http1 { connection, picked, home } => {
                home.take_back(connection, &picked, std::time::Instant::now());
            }
            Self::Http2 { stream, .. } => stream.finish(),
            Self::Ended => {}
        }
    }
}

struct UpstreamBody {
    source: Source,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// When the current wait is too long; none while the upstream is not waited for.
    deadline: Option<Instant>,
}

/// The body of the answer whose head came `now` on `connection`; each wait for more of it may take `limit`.
pub(crate) fn http1(
    mut connection: Http1,
    picked: Picked,
    home: Home,
    limit: Duration,
    now: std::time::Instant,
) -> Body {
    match connection.whole_body() {
        Some(bytes) => {
            home.take_back(connection, &picked, now);
            bytes.into()
        }
        None => UpstreamBody::boxed(Source::Http1 { connection, picked, home }, limit),
    }
}

/// The body `incoming` of the answer on `stream`; each wait for more of it may take `limit`.
pub(crate) fn http2(incoming: Incoming, stream: Http2Stream, picked: Picked, limit: Duration) -> Body {
    if incoming.is_end_stream() {
        stream.finish();
        return Body::Empty;
    }
    UpstreamBody::boxed(Source::Http2 { incoming, stream, _picked: picked }, limit)
}

impl UpstreamBody {
    fn boxed(source: Source, limit: Duration) -> Body {
        Body::Boxed(Box::pin(Self { source, limit, timer: None, deadline: None }))
    }

    /// Too long a wait?
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.limit);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        loop {
            std::task::ready!(timer.as_mut().poll(cx));
            // It may have been set for an earlier wait.
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }
}

impl HttpBody for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match self.source.poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                std::task::ready!(self.poll_stalled(cx));
                Some(Err(Stalled(self.limit).into()))
            }
        };
        self.deadline = None;
        match &frame {
            Some(Err(_)) => self.source = Source::Ended,
            Some(Ok(_)) if !self.source.is_end() => {}
            _ => self.source.finish(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Http1 { connection, .. } => {
                connection.left().map_or_else(SizeHint::new, SizeHint::with_exact)
            }
            Source::Http2 { incoming, .. } => incoming.size_hint(),
            Source::Ended => SizeHint::with_exact(0),
        }
    }
}
