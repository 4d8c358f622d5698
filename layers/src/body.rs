//! One body type for requests and responses, so that no layer carries a generic body parameter.
//!
//! A body is streamed: nothing here collects it, except [`Body::collect_up_to`], which has a bound.
//! Body filters of plugins stack onto it by [`Body::filtered`].

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;

use crate::worker::http1::ClientBody;

/// What went wrong while a body was read; the connection it belongs to ends.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request or a response.
#[derive(Default)]
pub enum Body {
    /// No bytes, no trailers.
    #[default]
    Empty,
    /// Bytes that are all here.
    Full(Bytes),
    /// A body that arrives from a client's connection over HTTP/1.
    Client(ClientBody),
    /// Anything else: a filtered, counted or generated body.
    Boxed(Pin<Box<dyn HttpBody<Data = Bytes, Error = BodyError>>>),
}

/// A plugin's filter on a body.
pub trait BodyFilter {
    /// Takes one piece and returns what goes on in its place; empty while the filter holds data back.
    fn data(&mut self, piece: Bytes) -> Bytes;

    /// The body has ended: returns what was still held back.
    fn end(&mut self) -> Bytes {
        Bytes::new()
    }

    /// Whether the filter passes every piece as it is, so that the length of the body stays what it was.
    fn only_watches(&self) -> bool {
        false
    }
}

/// A body was larger than the reader allows.
#[derive(Debug, thiserror::Error)]
#[error("the body is larger than {limit} bytes")]
pub struct TooLarge {
    /// The bound that was passed to [`Body::collect_up_to`], in bytes.
    pub limit: usize,
}

impl Body {
    /// Wraps any body.
    pub fn boxed<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes> + 'static,
        B::Error: Into<BodyError>,
    {
        Self::Boxed(Box::pin(body.map_err(Into::into)))
    }

    /// Puts `filter` between this body and its reader. Trailers pass unchanged.
    pub fn filtered(self, filter: Box<dyn BodyFilter>) -> Self {
        let watched = filter.only_watches();
        Self::Boxed(Box::pin(Filtered { body: self, filter: Some(filter), held: None, watched }))
    }

    /// Fails with [`TooLarge`] where this body becomes larger than `limit` bytes.
    #[must_use]
    pub fn limited(self, limit: u64) -> Self {
        Self::Boxed(Box::pin(Limited { body: self, left: limit, limit }))
    }

    /// Waits until the body is here to its end, or `limit` bytes of it are. Nothing is taken from it: what has come
    /// is read again, then the rest. Pieces are kept as they came.
    ///
    /// # Errors
    /// The error of the connection that the body comes from.
    pub async fn read_ahead(&mut self, limit: usize) -> Result<(), BodyError> {
        if matches!(self, Self::Empty | Self::Full(_)) {
            return Ok(());
        }
        let mut come = VecDeque::new();
        let mut bytes = 0;
        let mut ended = false;
        while bytes < limit {
            let Some(frame) = self.frame().await else {
                ended = true;
                break;
            };
            let frame = frame?;
            bytes += frame.data_ref().map_or(0, Bytes::len);
            come.push_back(frame);
        }
        let rest = if ended { Self::Empty } else { std::mem::take(self) };
        *self = Self::Boxed(Box::pin(ReadAhead { come, rest, left: bytes as u64 }));
        Ok(())
    }

    /// Reads the whole body, at most `limit` bytes of it. Trailers are dropped.
    ///
    /// # Errors
    /// [`TooLarge`] when there is more, or the error of the connection that the body came from.
    pub async fn collect_up_to(&mut self, limit: usize) -> Result<Bytes, BodyError> {
        if let Self::Full(bytes) = self {
            return if bytes.len() > limit { Err(TooLarge { limit }.into()) } else { Ok(bytes.clone()) };
        }
        let mut first: Option<Bytes> = None;
        let mut joined = BytesMut::new();
        while let Some(frame) = self.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if first.as_ref().map_or(0, Bytes::len) + joined.len() + data.len() > limit {
                return Err(TooLarge { limit }.into());
            }
            match (&first, joined.is_empty()) {
                (None, true) => first = Some(data),
                (Some(_), true) => {
                    joined.extend_from_slice(&first.take().unwrap_or_default());
                    joined.extend_from_slice(&data);
                }
                _ => joined.extend_from_slice(&data),
            }
        }
        Ok(first.unwrap_or_else(|| joined.freeze()))
    }

    /// Whether it is known without reading that there are no bytes.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Client(body) => body.is_end_stream(),
            Self::Boxed(body) => body.is_end_stream(),
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Self::Client(body) => Pin::new(body).poll_frame(cx),
            Self::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Client(body) => body.size_hint(),
            Self::Boxed(body) => body.size_hint(),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Body::Empty"),
            Self::Full(bytes) => write!(f, "Body::Full({} bytes)", bytes.len()),
            Self::Client(_) => f.write_str("Body::Client"),
            Self::Boxed(_) => f.write_str("Body::Boxed"),
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { Self::Empty } else { Self::Full(bytes) }
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Bytes::from(text).into()
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Bytes::from_static(text.as_bytes()).into()
    }
}

/// A body behind a plugin's filter. Unless the filter only watches, the length is unknown until it has ended.
struct Filtered {
    body: Body,
    /// Taken at the end, so that the end is told once.
    filter: Option<Box<dyn BodyFilter>>,
    /// Trailers that wait until the filter's last bytes are out.
    held: Option<Frame<Bytes>>,
    watched: bool,
}

impl HttpBody for Filtered {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            let Some(filter) = this.filter.as_mut() else {
                return Poll::Ready(this.held.take().map(Ok));
            };
            let rest = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => filter.data(piece),
                    Err(trailers) => {
                        this.held = Some(trailers);
                        this.filter.take().map(|mut filter| filter.end()).unwrap_or_default()
                    }
                },
                None => this.filter.take().map(|mut filter| filter.end()).unwrap_or_default(),
            };
            if !rest.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(rest))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // Otherwise the filter may have something to add at the end.
        self.watched && self.held.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.watched { self.body.size_hint() } else { SizeHint::default() }
    }
}

/// A body of unknown length that fails when it becomes larger than allowed.
struct Limited {
    body: Body,
    left: u64,
    limit: u64,
}

impl HttpBody for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let size = frame.data_ref().map_or(0, |data| data.len() as u64);
            match self.left.checked_sub(size) {
                Some(left) => self.left = left,
                None => {
                    let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
                    return Poll::Ready(Some(Err(TooLarge { limit }.into())));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body of which the beginning has been waited for.
struct ReadAhead {
    come: VecDeque<Frame<Bytes>>,
    rest: Body,
    /// Bytes in `come`.
    left: u64,
}

impl HttpBody for ReadAhead {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(frame) = self.come.pop_front() {
            self.left = self.left.saturating_sub(frame.data_ref().map_or(0, |data| data.len() as u64));
            return Poll::Ready(Some(Ok(frame)));
        }
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.come.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + self.left);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + self.left);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Upper;

    impl BodyFilter for Upper {
        fn data(&mut self, piece: Bytes) -> Bytes {
            piece.to_ascii_uppercase().into()
        }

        fn end(&mut self) -> Bytes {
            Bytes::from_static(b"!")
        }
    }

    #[tokio::test]
    async fn a_filter_sees_every_piece_and_the_end() {
        let mut body = Body::from("hello").filtered(Box::new(Upper));
        assert_eq!(body.collect_up_to(100).await.unwrap(), "HELLO!");
    }

    /// Comes in pieces of three bytes, and says nothing of its length.
    struct Drip(u8);

    impl HttpBody for Drip {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            let more = self.0.checked_sub(1).map(|left| {
                self.0 = left;
                Ok(Frame::data(Bytes::from_static(b"abc")))
            });
            Poll::Ready(more)
        }
    }

    #[tokio::test]
    async fn reading_ahead_changes_nothing_but_what_is_known_of_the_length() {
        for (limit, lower, upper) in [(100, 9, Some(9)), (4, 6, None), (0, 0, None)] {
            let mut body = Body::boxed(Drip(3));
            body.read_ahead(limit).await.unwrap();
            let hint = body.size_hint();
            assert_eq!((hint.lower(), hint.upper()), (lower, upper), "{limit}");
            assert!(!body.is_end_stream());
            assert_eq!(body.collect_up_to(100).await.unwrap(), "abcabcabc", "{limit}");
            assert!(body.frame().await.is_none());
        }
    }

    #[tokio::test]
    async fn a_body_over_the_bound_is_refused() {
        let mut body = Body::boxed(Body::from("0123456789"));
        let error = body.collect_up_to(9).await.unwrap_err();
        assert!(error.is::<TooLarge>());
    }
}
