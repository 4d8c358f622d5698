//! The request body on its way to an upstream: streamed, and kept while it is small, so that it can be sent again.
//!
//! What was read from the client stays here until it is more than [`REPLAY_LIMIT`]; from then on nothing is
//! kept and the request cannot be tried again. The body also remembers who is being waited for, which is how
//! one timer per request tells a slow client from an upstream that does not read.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use smallvec::SmallVec;

use crate::body::{Body, BodyError, TooLarge};
use crate::error::Reason;

/// Bytes of a streamed body that are kept for another attempt.
pub(crate) const REPLAY_LIMIT: usize = 64 * 1024;

/// Who a request body waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The client has not sent the next piece.
    Client,
    /// The upstream has been given nothing to do with the body since then.
    Upstream(Instant),
    /// The whole body was handed over at that time.
    Done(Instant),
}

/// The body of one request, over all attempts.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Empty,
    Full(Bytes),
    Streamed(Rc<Stream>),
}

#[derive(Debug)]
pub(crate) struct Stream {
    state: RefCell<State>,
    /// The attempt that may read. A body handle of an earlier one is dead.
    attempt: Cell<u32>,
    progress: Cell<Progress>,
    hint: SizeHint,
}

#[derive(Debug)]
struct State {
    body: Body,
    kept: SmallVec<[Bytes; 4]>,
    trailers: Option<HeaderMap>,
    kept_bytes: usize,
    /// Pieces are kept, because another attempt is still possible.
    keep: bool,
    /// A piece was handed out that is not kept.
    lost: bool,
    ended: bool,
    /// The client's side failed.
    failed: Option<Reason>,
}

impl Outgoing {
    pub(crate) fn new(body: Body) -> Self {
        match body {
            Body::Empty => Self::Empty,
            Body::Full(bytes) if bytes.is_empty() => Self::Empty,
            Body::Full(bytes) => Self::Full(bytes),
            body if body.is_empty() => Self::Empty,
            body => Self::Streamed(Rc::new(Stream {
                hint: body.size_hint(),
                state: RefCell::new(State {
                    body,
                    kept: SmallVec::new(),
                    trailers: None,
                    kept_bytes: 0,
                    keep: true,
                    lost: false,
                    ended: false,
                    failed: None,
                }),
                attempt: Cell::new(0),
                progress: Cell::new(Progress::Upstream(Instant::now())),
            })),
        }
    }

    /// The body for the next attempt, from its first byte. Handles of earlier attempts read no more.
    pub(crate) fn attempt(&self, now: Instant) -> RequestBody {
        match self {
            Self::Empty => RequestBody(Source::Empty),
            Self::Full(bytes) => RequestBody(Source::Full(bytes.clone())),
            Self::Streamed(stream) => {
                stream.attempt.set(stream.attempt.get() + 1);
                stream.progress.set(Progress::Upstream(now));
                RequestBody(Source::Streamed {
                    stream: Rc::clone(stream),
                    attempt: stream.attempt.get(),
                    place: 0,
                    trailers_sent: false,
                })
            }
        }
    }

    /// Whether another attempt would send the same bytes.
    pub(crate) fn replayable(&self) -> bool {
        match self {
            Self::Empty | Self::Full(_) => true,
            Self::Streamed(stream) => {
                let state = stream.state.borrow();
                !state.lost && state.failed.is_none()
            }
        }
    }

    /// No other attempt will follow: keep nothing more.
    pub(crate) fn settle(&self) {
        if let Self::Streamed(stream) = self {
            stream.state.borrow_mut().keep = false;
        }
    }

    /// Who is waited for; none for a body that has been here from the start.
    pub(crate) fn progress(&self) -> Option<Progress> {
        match self {
            Self::Empty | Self::Full(_) => None,
            Self::Streamed(stream) => Some(stream.progress.get()),
        }
    }

    /// Why the client failed to deliver the body, if it did.
    pub(crate) fn client_failed(&self) -> Option<Reason> {
        match self {
            Self::Empty | Self::Full(_) => None,
            Self::Streamed(stream) => stream.state.borrow().failed,
        }
    }

    /// How many bytes there are, if that is known.
    pub(crate) fn exact_length(&self) -> Option<u64> {
        match self {
            Self::Empty => Some(0),
            Self::Full(bytes) => Some(bytes.len() as u64),
            Self::Streamed(stream) => stream.hint.exact(),
        }
    }
}

/// The request body of one attempt.
#[derive(Debug)]
pub(crate) struct RequestBody(Source);

#[derive(Debug)]
enum Source {
    Empty,
    Full(Bytes),
    Streamed { stream: Rc<Stream>, attempt: u32, place: usize, trailers_sent: bool },
}

impl RequestBody {
    fn note(&self, progress: Progress) {
        if let Source::Streamed { stream, attempt, .. } = &self.0
            && stream.attempt.get() == *attempt
        {
            stream.progress.set(progress);
        }
    }

    /// The upstream does not take what was handed over; `moved` says that it has taken something until now.
    pub(crate) fn held_up(&self, moved: bool) {
        if let Source::Streamed { stream, .. } = &self.0
            && (moved || !matches!(stream.progress.get(), Progress::Upstream(_)))
        {
            self.note(Progress::Upstream(Instant::now()));
        }
    }

    /// The upstream has taken everything.
    pub(crate) fn sent(&self) {
        if matches!(self.0, Source::Streamed { .. }) {
            self.note(Progress::Done(Instant::now()));
        }
    }
}

/// A handle of an attempt that was given up.
#[derive(Debug, thiserror::Error)]
#[error("the attempt was given up")]
struct Superseded;

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Source::Empty => Poll::Ready(None),
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = Source::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Source::Streamed { stream, attempt, place, trailers_sent } => {
                if stream.attempt.get() != *attempt {
                    return Poll::Ready(Some(Err(Superseded.into())));
                }
                let mut state = stream.state.borrow_mut();
                if let Some(piece) = state.kept.get(*place) {
                    let piece = piece.clone();
                    *place += 1;
                    if !state.keep {
                        // Nobody will ask for it again.
                        if let Some(slot) = state.kept.get_mut(*place - 1) {
                            *slot = Bytes::new();
                        }
                    }
                    stream.progress.set(state.handed_over(*place));
                    return Poll::Ready(Some(Ok(Frame::data(piece))));
                }
                if state.ended {
                    stream.progress.set(Progress::Done(Instant::now()));
                    let trailers = if *trailers_sent { None } else { state.trailers.clone() };
                    *trailers_sent = true;
                    return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
                }
                stream.progress.set(Progress::Client);
                let frame = ready!(Pin::new(&mut state.body).poll_frame(cx));
                let frame = match frame {
                    None => {
                        state.ended = true;
                        None
                    }
                    Some(Err(error)) => {
                        let large = error.is::<TooLarge>();
                        state.failed = Some(if large { Reason::BodyTooLarge } else { Reason::RequestBody });
                        Some(Err(error))
                    }
                    Some(Ok(frame)) => Some(Ok(state.pass(frame, place, trailers_sent))),
                };
                stream.progress.set(state.handed_over(*place));
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Empty => true,
            Source::Full(_) => false,
            Source::Streamed { stream, place, .. } => {
                let state = stream.state.borrow();
                *place >= state.kept.len()
                    && state.trailers.is_none()
                    && (state.ended || state.body.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // Asked before the first byte is read, to choose the framing.
            Source::Streamed { stream, .. } => stream.hint,
        }
    }
}

impl State {
    /// Who is waited for after a piece: the reader may have no reason to ask for the end.
    fn handed_over(&self, place: usize) -> Progress {
        let now = Instant::now();
        let ended = self.ended || self.body.is_end_stream();
        match ended && place >= self.kept.len() && self.trailers.is_none() {
            true => Progress::Done(now),
            false => Progress::Upstream(now),
        }
    }

    fn pass(&mut self, frame: Frame<Bytes>, place: &mut usize, trailers_sent: &mut bool) -> Frame<Bytes> {
        match frame.into_data() {
            Ok(data) => {
                if !self.keep {
                    self.lost = true;
                } else if self.kept_bytes + data.len() <= REPLAY_LIMIT {
                    self.kept_bytes += data.len();
                    self.kept.push(data.clone());
                    *place = self.kept.len();
                } else {
                    self.lost = true;
                    self.keep = false;
                    self.kept.clear();
                    *place = 0;
                }
                Frame::data(data)
            }
            Err(frame) => {
                self.ended = true;
                match frame.into_trailers() {
                    Ok(trailers) => {
                        self.trailers = Some(trailers.clone());
                        *trailers_sent = true;
                        Frame::trailers(trailers)
                    }
                    Err(other) => other,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use futures_util::stream;
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn streamed(pieces: usize, size: usize) -> Outgoing {
        let piece = move |_| Ok::<_, BodyError>(Frame::data(Bytes::from(vec![b'a'; size])));
        Outgoing::new(Body::boxed(StreamBody::new(stream::iter((0..pieces).map(piece)))))
    }

    async fn read(mut body: RequestBody, pieces: usize) -> usize {
        let mut bytes = 0;
        for _ in 0..pieces {
            match body.frame().await {
                Some(frame) => bytes += frame.unwrap().into_data().unwrap().len(),
                None => break,
            }
        }
        bytes
    }

    #[tokio::test]
    async fn a_small_body_is_sent_again_from_its_first_byte() {
        let outgoing = streamed(3, 10);
        assert_eq!(read(outgoing.attempt(Instant::now()), 2).await, 20, "given up in the middle");
        assert!(outgoing.replayable());
        assert_eq!(read(outgoing.attempt(Instant::now()), 9).await, 30);
        assert!(matches!(outgoing.progress(), Some(Progress::Done(_))));
    }

    #[tokio::test]
    async fn a_large_body_cannot_be_sent_again() {
        let outgoing = streamed(3, 30_000);
        let mut first = outgoing.attempt(Instant::now());
        first.frame().await.unwrap().unwrap();
        first.frame().await.unwrap().unwrap();
        assert!(outgoing.replayable(), "60,000 bytes are kept");
        first.frame().await.unwrap().unwrap();
        assert!(!outgoing.replayable(), "90,000 are not");
    }

    #[tokio::test]
    async fn nothing_is_kept_once_the_answer_is_there() {
        let outgoing = streamed(2, 10);
        let mut body = outgoing.attempt(Instant::now());
        body.frame().await.unwrap().unwrap();
        outgoing.settle();
        body.frame().await.unwrap().unwrap();
        assert!(body.frame().await.is_none());
        assert!(!outgoing.replayable());
    }

    #[tokio::test]
    async fn a_handle_of_an_earlier_attempt_is_dead() {
        let outgoing = streamed(2, 10);
        let mut old = outgoing.attempt(Instant::now());
        let new = outgoing.attempt(Instant::now());
        assert!(old.frame().await.unwrap().is_err());
        assert_eq!(read(new, 9).await, 20);
    }

    #[tokio::test]
    async fn a_failing_client_is_told_from_a_failing_upstream() {
        let reset: Result<Frame<Bytes>, BodyError> = Err("reset".into());
        let outgoing = Outgoing::new(Body::boxed(StreamBody::new(stream::iter([reset]))));
        assert!(outgoing.attempt(Instant::now()).frame().await.unwrap().is_err());
        assert_eq!(outgoing.client_failed(), Some(Reason::RequestBody));
        assert!(!outgoing.replayable());
    }

    #[tokio::test]
    async fn a_waiting_body_waits_for_the_client() {
        let silent = stream::pending::<Result<Frame<Bytes>, BodyError>>();
        let outgoing = Outgoing::new(Body::boxed(StreamBody::new(silent)));
        let mut handle = outgoing.attempt(Instant::now());
        assert!(matches!(outgoing.progress(), Some(Progress::Upstream(_))), "not asked for yet");
        let pending =
            std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut handle).poll_frame(cx).is_pending()));
        assert!(pending.await);
        assert_eq!(outgoing.progress(), Some(Progress::Client));
    }
}
