//! A response body on its way from an upstream, with what it holds while it lasts.
//!
//! The connection goes back to the pool when the body has ended, and only then; a body that is dropped or fails
//! takes its connection with it. The endpoint counts as active for as long. A timer is made only when the
//! upstream keeps the reader waiting, and time in which the reader itself does not read is not held against it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::endpoint::Picked;
use super::pool::{Keepalive, Key, Pool};
use super::send::{Http1, Http2Stream};
use crate::body::{Body, BodyError};

/// The connection under a response.
#[derive(Debug)]
pub(crate) enum Leased {
    Http1 { connection: Http1, transport: u64, name: Option<Box<str>>, keepalive: Keepalive, pool: Pool },
    Http2(Http2Stream),
}

/// What a response holds until its body has ended.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) picked: Picked,
    pub(crate) connection: Leased,
}

impl Lease {
    /// Both messages are complete.
    pub(crate) fn finish(self) {
        match self.connection {
            Leased::Http1 { connection, transport, name, keepalive, pool } => {
                let key = Key { endpoint: self.picked.id(), transport, name: name.as_deref() };
                pool.put(self.picked.endpoint(), key, connection, keepalive);
            }
            Leased::Http2(stream) => stream.finish(),
        }
    }
}

/// The upstream sent nothing for too long in the middle of a body.
#[derive(Debug, thiserror::Error)]
#[error("the upstream sent nothing for {0:?}")]
struct Stalled(Duration);

struct UpstreamBody {
    incoming: Incoming,
    lease: Option<Lease>,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// When the current wait is too long; none while the upstream is not waited for.
    deadline: Option<Instant>,
}

/// The response body `incoming`; each wait for more of it may take `limit`.
pub(crate) fn body(incoming: Incoming, lease: Lease, limit: Duration) -> Body {
    if incoming.is_end_stream() {
        lease.finish();
        return Body::Empty;
    }
    Body::Boxed(Box::pin(UpstreamBody { incoming, lease: Some(lease), limit, timer: None, deadline: None }))
}

impl UpstreamBody {
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
        let this = &mut *self;
        let frame = match &mut this.lease {
            Some(Lease { connection: Leased::Http1 { connection, .. }, .. }) => {
                connection.poll_fed(cx, |cx| Pin::new(&mut this.incoming).poll_frame(cx))
            }
            _ => Pin::new(&mut this.incoming).poll_frame(cx),
        };
        match frame {
            Poll::Pending => self.poll_stalled(cx).map(|()| {
                self.lease = None;
                Some(Err(Stalled(self.limit).into()))
            }),
            Poll::Ready(frame) => {
                self.deadline = None;
                match &frame {
                    Some(Err(_)) => self.lease = None,
                    Some(Ok(_)) if !self.incoming.is_end_stream() => {}
                    _ => {
                        if let Some(lease) = self.lease.take() {
                            lease.finish();
                        }
                    }
                }
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
