//! A client's connection as its owner and the body of its request share it: the stream, what was read of it and not yet
//! used, and where in the body the client stands. Both are on one thread; no borrow outlives a call.

use std::cell::{Cell, RefCell, RefMut};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tokio::io::AsyncReadExt;

use crate::transport::framing::{Chunks, Part, Violation};
use crate::worker::deadlines::{Phase, Watch};
use crate::worker::io::Stream;

/// Bytes of a body that are read at once, at first and when the client keeps up.
const READ: (usize, usize) = (8 * 1024, 64 * 1024);
/// Bytes of a body that nobody wants which are read so that the connection can go on.
const DRAINED: usize = 64 * 1024;

/// Why the rest of a request's body cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum BodyFailure {
    #[error("the connection ended inside the body")]
    Cut,
    #[error("the client's body took too long")]
    Slow,
    #[error("the request is over")]
    Over,
    #[error(transparent)]
    Malformed(#[from] Violation),
    #[error("{0}")]
    Io(io::ErrorKind),
}

/// What is left of the current request's body.
#[derive(Debug)]
enum Rest {
    Nothing,
    Length(u64),
    Chunks(Box<Chunks>),
    Failed(BodyFailure),
}

/// Whether the client waits to be told that it may send its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continue {
    /// It does not.
    No,
    /// It does, and nobody has asked for the body.
    Expected,
    /// It is to be told.
    Due,
}

/// How it stands with the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was read to its end.
    Read,
    /// Somebody may read it.
    Open,
    /// Nobody will, or it is broken.
    Dead,
}

/// How the body of a request is delimited.
#[derive(Debug)]
pub(crate) enum Length {
    Nothing,
    Exact(u64),
    Chunked(Box<Chunks>),
}

/// A piece of a body.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// What the connection and a body share.
#[derive(Debug)]
pub(crate) struct Wire {
    state: RefCell<State>,
    watch: Arc<Watch>,
    /// The request whose body may be read; a body of an earlier one is dead.
    request: Cell<u32>,
    expects: Cell<Continue>,
    /// The body has somebody who may read it.
    read: Cell<bool>,
    /// The connection waits for the end of the body.
    awaited: Cell<bool>,
}

#[derive(Debug)]
pub(crate) struct State {
    /// None once it was handed over.
    pub stream: Option<Stream>,
    /// What was read and belongs to nobody yet.
    pub input: BytesMut,
    rest: Rest,
    /// The task that waits for the body.
    reader: Option<Waker>,
    read_size: usize,
    /// Something has come since the reader last had to wait.
    fresh: bool,
}

impl Wire {
    /// Around a stream of which nothing was read.
    pub fn new(stream: Stream, watch: Arc<Watch>) -> Self {
        let state = State {
            stream: Some(stream),
            input: BytesMut::new(),
            rest: Rest::Nothing,
            reader: None,
            read_size: READ.0,
            fresh: true,
        };
        Self {
            state: RefCell::new(state),
            watch,
            request: Cell::new(0),
            expects: Cell::new(Continue::No),
            read: Cell::new(false),
            awaited: Cell::new(false),
        }
    }

    /// The stream and what was read of it. Not to be held while anybody else is called.
    pub fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// A request begins, whose body is delimited like this. Returns its number.
    pub fn begin(&self, length: Length, expects: bool) -> u32 {
        let rest = match length {
            Length::Nothing => Rest::Nothing,
            Length::Exact(length) => Rest::Length(length),
            Length::Chunked(chunks) => Rest::Chunks(chunks),
        };
        let body = !matches!(rest, Rest::Nothing);
        let state = &mut *self.state();
        (state.rest, state.read_size, state.fresh) = (rest, READ.0, true);
        self.expects.set(if expects && body { Continue::Expected } else { Continue::No });
        self.read.set(body);
        self.awaited.set(false);
        let request = self.request.get().wrapping_add(1);
        self.request.set(request);
        request
    }

    /// Whether the client is to be told now that it may send its body.
    pub fn take_continue(&self) -> bool {
        let due = self.expects.get() == Continue::Due;
        if due {
            self.expects.set(Continue::No);
        }
        due
    }

    /// The answer has begun: the client is told nothing else any more.
    pub fn answer_begins(&self) {
        self.expects.set(Continue::No);
    }

    /// How it stands with the body.
    pub fn standing(&self) -> Standing {
        match self.state.borrow().rest {
            Rest::Nothing => Standing::Read,
            Rest::Length(_) | Rest::Chunks(_) if self.read.get() => Standing::Open,
            _ => Standing::Dead,
        }
    }

    /// Lets the connection's task look when the body has ended or nobody wants it any more. From now on its reader has
    /// to get on with it.
    pub fn await_body(&self) {
        self.awaited.set(true);
        self.watch.enter(Phase::Body);
    }

    /// Reads on without waiting, up to a bound, in a body that nobody wants. Whether that was its end.
    pub fn drain(&self, cx: &mut Context<'_>) -> bool {
        let mut state = self.state();
        let mut left = DRAINED;
        loop {
            match state.poll_piece(cx) {
                Poll::Ready(Ok(None)) => return true,
                Poll::Ready(Ok(Some(Piece::Data(data)))) if data.len() <= left => left -= data.len(),
                Poll::Ready(Ok(Some(Piece::Trailers(_)))) => {}
                Poll::Ready(_) | Poll::Pending => return false,
            }
        }
    }

    /// The body ends here, with an error for its reader.
    pub fn fail(&self, failure: BodyFailure) {
        let state = &mut *self.state();
        if !matches!(state.rest, Rest::Nothing | Rest::Failed(_)) {
            state.rest = Rest::Failed(failure);
            if let Some(reader) = state.reader.take() {
                reader.wake();
            }
        }
    }

    /// The next piece of the body of `request`.
    pub fn poll_piece(&self, request: u32, cx: &mut Context<'_>) -> Poll<Result<Option<Piece>, BodyFailure>> {
        if self.request.get() != request {
            return Poll::Ready(Err(BodyFailure::Over));
        }
        if self.expects.get() == Continue::Expected {
            self.expects.set(Continue::Due);
            self.watch.wake();
        }
        let state = &mut *self.state();
        let piece = state.poll_piece(cx);
        match &piece {
            Poll::Pending => {
                if !state.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
                    state.reader = Some(cx.waker().clone());
                }
                if std::mem::take(&mut state.fresh) {
                    self.watch.enter(Phase::Body);
                } else {
                    self.watch.stay(Phase::Body);
                }
            }
            Poll::Ready(read) => {
                state.fresh = true;
                if !self.awaited.get() {
                    self.watch.busy();
                } else if matches!(read, Err(_) | Ok(None)) || matches!(state.rest, Rest::Nothing) {
                    self.watch.wake();
                } else {
                    self.watch.enter(Phase::Body);
                }
            }
        }
        piece
    }

    /// Nobody reads the body of `request` any more.
    pub fn abandon(&self, request: u32) {
        if self.request.get() == request && self.read.replace(false) {
            self.state().reader = None;
            if self.watch.phase() == Phase::Body {
                self.watch.busy();
            }
            if self.awaited.get() {
                self.watch.wake();
            }
        }
    }

    /// Whether the body of `request` is known to have no more bytes.
    pub fn is_over(&self, request: u32) -> bool {
        self.request.get() == request && self.standing() == Standing::Read
    }

    /// How many bytes are left of the body of `request`, if that is known.
    pub fn left(&self, request: u32) -> Option<u64> {
        match &self.state.borrow().rest {
            _ if self.request.get() != request => None,
            Rest::Nothing => Some(0),
            Rest::Length(left) => Some(*left),
            Rest::Chunks(_) | Rest::Failed(_) => None,
        }
    }
}

impl State {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Piece>, BodyFailure>> {
        let piece = self.poll_rest(cx);
        if let Poll::Ready(Err(failure)) = &piece {
            self.rest = Rest::Failed(failure.clone());
        }
        piece
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Piece>, BodyFailure>> {
        loop {
            match &mut self.rest {
                Rest::Nothing => return Poll::Ready(Ok(None)),
                Rest::Failed(failure) => return Poll::Ready(Err(failure.clone())),
                Rest::Length(left) if !self.input.is_empty() => {
                    let taken =
                        usize::try_from(*left).map_or(self.input.len(), |left| left.min(self.input.len()));
                    *left -= taken as u64;
                    if *left == 0 {
                        self.rest = Rest::Nothing;
                    }
                    return Poll::Ready(Ok(Some(Piece::Data(self.split(taken)))));
                }
                Rest::Chunks(chunks) if !self.input.is_empty() => match chunks.next(&self.input)? {
                    Part::Data(taken) => return Poll::Ready(Ok(Some(Piece::Data(self.split(taken))))),
                    Part::Framing(taken) => {
                        let over = chunks.is_over();
                        let trailers = if over { chunks.trailers()? } else { None };
                        drop(self.split(taken));
                        if over {
                            self.rest = Rest::Nothing;
                            return Poll::Ready(Ok(trailers.map(Piece::Trailers)));
                        }
                    }
                    Part::Over => self.rest = Rest::Nothing,
                },
                Rest::Length(left) => {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX);
                    ready!(self.poll_read(cx, most))?;
                }
                Rest::Chunks(_) => ready!(self.poll_read(cx, usize::MAX))?,
            }
        }
    }

    /// The first bytes of the input, which takes no memory when it is empty.
    fn split(&mut self, length: usize) -> Bytes {
        if length == self.input.len() && self.input.capacity() - length < READ.0 / 2 {
            std::mem::take(&mut self.input).freeze()
        } else {
            self.input.split_to(length).freeze()
        }
    }

    /// Reads some of a body, at most `most` bytes of it if that spares room.
    fn poll_read(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<Result<(), BodyFailure>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(Err(BodyFailure::Cut)) };
        let size = self.read_size.min(most.max(1));
        if self.input.capacity() - self.input.len() < size / 2 {
            self.input.reserve(size);
        }
        let room = self.input.capacity() - self.input.len();
        let read = ready!(pin!(stream.read_buf(&mut self.input)).poll(cx));
        match read {
            Ok(0) => Poll::Ready(Err(BodyFailure::Cut)),
            Ok(read) => {
                if read == room {
                    self.read_size = READ.1;
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(BodyFailure::Io(error.kind()))),
        }
    }

    /// Reads once into `room`: none at the end of the stream, or if it is broken.
    pub fn poll_some(&mut self, cx: &mut Context<'_>, room: &mut [u8]) -> Poll<usize> {
        use tokio::io::AsyncRead;
        let Some(stream) = &mut self.stream else { return Poll::Ready(0) };
        let mut room = tokio::io::ReadBuf::new(room);
        let read = ready!(Pin::new(stream).poll_read(cx, &mut room));
        Poll::Ready(if read.is_ok() { room.filled().len() } else { 0 })
    }
}
