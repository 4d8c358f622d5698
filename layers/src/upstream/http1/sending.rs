//! A request on its way to the upstream: its head, then its body with a length or in chunks.
//!
//! The head and what there is of the body at first go out with one write. Small pieces of a body are copied behind each
//! other, large ones are written from where they are. While the upstream does not take what it was given, nothing more
//! is asked of the client.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf, Bytes};
use http::header::{self, HeaderMap, HeaderName};
use http_body::Body as HttpBody;
use smallvec::SmallVec;
use tokio::io::AsyncWrite;

use super::{buffers, write};
use crate::body::BodyError;
use crate::exchange::State;
use crate::upstream::connect::Io;
use crate::upstream::fields;
use crate::upstream::request_body::{Outgoing, RequestBody};
use crate::upstream::send::Route;

/// Pieces up to this size are copied behind the head or the last piece.
const SMALL: usize = 4 * 1024;
/// Bytes that are gathered before they are written.
const ENOUGH: usize = 16 * 1024;

/// What the head says of the body's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    Known(u64),
    Chunked,
}

/// Why a request cannot be sent to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The upstream does not take it.
    Io(io::Error),
    /// The client does not deliver it.
    Body(BodyError),
}

/// The body is not as long as its head says.
#[derive(Debug, thiserror::Error)]
#[error("the request's body is not as long as it said")]
struct WrongLength;

/// A request that is being sent.
#[derive(Debug)]
pub(super) struct Sending {
    /// To be written first: the head, the lines of chunks, small pieces.
    out: Vec<u8>,
    /// How much of `out` was.
    written: usize,
    /// To be written then.
    piece: Bytes,
    /// To be written last: the end of the chunk in `piece`.
    tail: &'static [u8],
    body: RequestBody,
    left: Length,
    /// Trailers that the head announces.
    trailers: Vec<HeaderName>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing was written.
    Fresh,
    Body,
    /// The body has nothing more to give.
    Ended,
    /// Everything has left.
    Done,
}

impl Sending {
    /// The request of one attempt; nothing of it is written yet.
    pub(super) fn new(x: &State, route: &Route<'_>, outgoing: &Outgoing, now: Instant) -> Self {
        let headers = &x.request.headers;
        // The length is said where the client said it or the body has one; a body of unknown length is chunked.
        let length = match outgoing.exact_length() {
            Some(0) if !headers.contains_key(header::CONTENT_LENGTH) => None,
            Some(length) => Some(Length::Known(length)),
            None => Some(Length::Chunked),
        };
        let mut out = buffers::writing();
        write::head(&mut out, x, route, length);
        let trailers = match length {
            Some(Length::Chunked) => announced(headers),
            _ => Vec::new(),
        };
        Self {
            out,
            written: 0,
            piece: Bytes::new(),
            tail: b"",
            body: outgoing.attempt(now),
            left: length.unwrap_or(Length::Known(0)),
            trailers,
            stage: if outgoing.exact_length() == Some(0) { Stage::Ended } else { Stage::Fresh },
        }
    }

    /// Everything has left.
    pub(super) fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Something is here that the upstream does not take.
    pub(super) fn is_stuck(&self) -> bool {
        self.written < self.out.len() || !self.piece.is_empty() || !self.tail.is_empty()
    }

    /// Sends what can be sent. Ready when everything has left.
    pub(super) fn poll(&mut self, io: &RefCell<Io>, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut moved = false;
        while !self.is_done() {
            let gathered = self.gather(cx).map_err(Broken::Body)?;
            let mut io = io.borrow_mut();
            let mut io = Pin::new(&mut *io);
            while self.is_stuck() {
                match self.poll_write(io.as_mut(), cx).map_err(Broken::Io)? {
                    Poll::Ready(0) => return Poll::Ready(Err(Broken::Io(io::ErrorKind::WriteZero.into()))),
                    Poll::Ready(bytes) => self.advance(bytes),
                    Poll::Pending => {
                        self.body.held_up(moved);
                        return Poll::Pending;
                    }
                }
                moved = true;
            }
            // What a layer below has buffered must not wait.
            ready!(io.poll_flush(cx)).map_err(Broken::Io)?;
            if self.stage == Stage::Ended {
                self.stage = Stage::Done;
                self.body.sent();
                buffers::written(std::mem::take(&mut self.out));
            } else if gathered.is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes from the body what is there. Pending while it has nothing to give.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, BodyError> {
        // What is here goes first; only the head waits for company.
        if self.stage == Stage::Body && self.is_stuck() {
            return Ok(Poll::Ready(()));
        }
        while matches!(self.stage, Stage::Fresh | Stage::Body) {
            self.stage = Stage::Body;
            if self.out.len() >= ENOUGH || !self.piece.is_empty() {
                break;
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(None) => self.end(None)?,
                Poll::Ready(Some(frame)) => match frame?.into_data() {
                    Ok(data) => {
                        self.data(data)?;
                        if self.body.is_end_stream() {
                            self.end(None)?;
                        }
                    }
                    Err(frame) => self.end(frame.into_trailers().ok())?,
                },
            }
        }
        Ok(Poll::Ready(()))
    }

    fn data(&mut self, data: Bytes) -> Result<(), BodyError> {
        if data.is_empty() {
            // An empty chunk would be the end.
            return Ok(());
        }
        match &mut self.left {
            Length::Known(left) => *left = left.checked_sub(data.len() as u64).ok_or(WrongLength)?,
            Length::Chunked => {
                use std::io::Write;
                write!(self.out, "{:x}\r\n", data.len())?;
            }
        }
        let chunked = self.left == Length::Chunked;
        if data.len() <= SMALL {
            self.out.extend_from_slice(&data);
            if chunked {
                self.out.extend_from_slice(b"\r\n");
            }
        } else {
            self.piece = data;
            self.tail = if chunked { b"\r\n" } else { b"" };
        }
        Ok(())
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), BodyError> {
        self.stage = Stage::Ended;
        match self.left {
            Length::Known(0) => {}
            Length::Known(_) => return Err(WrongLength.into()),
            Length::Chunked if self.tail.is_empty() => {
                self.out.extend_from_slice(b"0\r\n");
                let names = &self.trailers;
                let allowed = |(name, _): &(&HeaderName, _)| names.contains(name) && fields::is_trailer(name);
                for (name, value) in trailers.iter().flatten().filter(allowed) {
                    write::field(&mut self.out, name, value);
                }
                self.out.extend_from_slice(b"\r\n");
            }
            Length::Chunked => self.tail = b"\r\n0\r\n\r\n",
        }
        Ok(())
    }

    fn poll_write(&self, io: Pin<&mut Io>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let out = self.out.get(self.written..).unwrap_or_default();
        if self.piece.is_empty() && self.tail.is_empty() {
            return io.poll_write(cx, out);
        }
        let pieces = [out, &self.piece, self.tail];
        let pieces: SmallVec<[IoSlice<'_>; 3]> =
            pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| IoSlice::new(piece)).collect();
        io.poll_write_vectored(cx, &pieces)
    }

    fn advance(&mut self, mut bytes: usize) {
        let out = bytes.min(self.out.len() - self.written);
        self.written += out;
        bytes -= out;
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
        }
        let piece = bytes.min(self.piece.len());
        self.piece.advance(piece);
        bytes -= piece;
        self.tail = self.tail.get(bytes..).unwrap_or_default();
    }
}

/// The trailers that a head announces.
fn announced(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::TRAILER).iter();
    let names = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()).collect()
}
