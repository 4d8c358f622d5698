//! The body of a request over HTTP/1, read from its connection when its reader asks, by whichever task that is.

use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use crate::body::BodyError;
use crate::worker::http1::wire::{Piece, Wire};

/// A body that arrives from a client's connection.
pub struct ClientBody {
    wire: Rc<Wire>,
    request: u32,
}

impl ClientBody {
    pub(crate) fn new(wire: &Rc<Wire>, request: u32) -> Self {
        Self { wire: wire.clone(), request }
    }
}

impl HttpBody for ClientBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(match ready!(self.wire.poll_piece(self.request, cx)) {
            Ok(None) => None,
            Ok(Some(Piece::Data(data))) => Some(Ok(Frame::data(data))),
            Ok(Some(Piece::Trailers(trailers))) => Some(Ok(Frame::trailers(trailers))),
            Err(failure) => Some(Err(failure.into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.wire.is_over(self.request)
    }

    fn size_hint(&self) -> SizeHint {
        self.wire.left(self.request).map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl fmt::Debug for ClientBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBody").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Drop for ClientBody {
    fn drop(&mut self) {
        self.wire.abandon(self.request);
    }
}
