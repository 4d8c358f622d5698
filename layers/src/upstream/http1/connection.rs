//! One connection to an upstream: one request at a time, sent and answered in the task of whoever waits for it.
//!
//! While it idles nobody waits for it and it holds no buffer. What its peer does meanwhile is noted by the runtime and
//! found by the look before the next use, which costs no system call when nothing came.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::task::{JoinHandle, unconstrained};
use tokio::time::{Instant, Sleep, sleep_until};

use super::Defect;
use super::buffers::{self, Size};
use super::head::{Asked, Head};
use super::reader::Reader;
use super::sending::{Broken, Sending};
use crate::body::BodyError;
use crate::error::{Error, Reason};
use crate::exchange::State;
use crate::upstream::connect::{Io, Traffic};
use crate::upstream::mesh::MeshLink;
use crate::upstream::request_body::Outgoing;
use crate::upstream::send::{Failure, Route, Wait};

/// A body of which less is left is read like a beginning.
const LARGE: u64 = 16 * 1024;

/// An HTTP/1 connection.
#[derive(Debug)]
pub(crate) struct Http1(Box<Inner>);

#[derive(Debug)]
struct Inner {
    io: Rc<RefCell<Io>>,
    traffic: Rc<Traffic>,
    reader: Reader,
    timer: Option<Pin<Box<Sleep>>>,
    /// The request was sent to its end, and both sides want another.
    reusable: bool,
    /// Whoever asked last is woken when something comes.
    watched: bool,
    background: Option<Background>,
    served: u32,
    /// How long the peer said it keeps an idle connection.
    idle_limit: Option<Duration>,
    mesh: Option<Rc<MeshLink>>,
}

/// The stream behind a connection that has switched protocols, and what was read from it already.
#[derive(Debug)]
pub(crate) struct Upgraded {
    pub(crate) io: Io,
    pub(crate) early: Bytes,
}

/// Why a request has no answer, or an answer no end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("{0}")]
    Malformed(#[from] Defect),
    #[error("the upstream has closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("the request's body failed: {0}")]
    Request(BodyError),
}

impl Trouble {
    fn error(self, outgoing: &Outgoing) -> Error {
        let reason = match &self {
            Self::Malformed(_) => Reason::UpstreamProtocol,
            Self::Closed | Self::Io(_) => Reason::UpstreamClosed,
            Self::Request(_) => Reason::RequestBody,
        };
        Error::new(outgoing.client_failed().unwrap_or(reason)).because(self)
    }
}

impl Http1 {
    /// Nothing was sent on `io` yet.
    pub(crate) fn new(io: Io) -> Self {
        let traffic = Rc::clone(io.traffic());
        let mesh = io.mesh().cloned();
        Self(Box::new(Inner {
            mesh,
            io: Rc::new(RefCell::new(io)),
            traffic,
            reader: Reader::default(),
            timer: None,
            reusable: true,
            watched: false,
            background: None,
            served: 0,
            idle_limit: None,
        }))
    }

    /// Ready for a request as far as is known: the last one was finished by both sides.
    pub(crate) fn is_ready(&self) -> bool {
        let sent = self.0.background.as_ref().is_none_or(|background| background.sent.get());
        self.0.reusable && sent && self.0.reader.is_clean()
    }

    /// As [`is_ready`](Self::is_ready), after a look whether the peer has closed it or sent what nobody asked for.
    /// From now on the task of `cx` is woken when something comes.
    pub(crate) fn is_still_ready(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_ready() || self.is_stale() {
            return false;
        }
        let inner = &mut *self.0;
        let look = poll_fn(|cx| {
            let mut byte = [0];
            Pin::new(&mut *inner.io.borrow_mut()).poll_read(cx, &mut ReadBuf::new(&mut byte))
        });
        // Without a budget: a task that has used up its own would see nothing.
        inner.watched = pin!(unconstrained(look)).poll(cx).is_pending();
        inner.reusable = inner.watched;
        inner.watched
    }

    /// It would not be made like this today: too old, or its peer is not trusted any more.
    pub(crate) fn is_stale(&self) -> bool {
        self.0.mesh.as_ref().is_some_and(|mesh| mesh.is_stale(std::time::Instant::now()))
    }

    /// Requests sent on it.
    pub(crate) fn served(&self) -> u32 {
        self.0.served
    }

    pub(crate) fn idle_limit(&self) -> Option<Duration> {
        self.0.idle_limit
    }

    /// Sends the request of `x` and waits for the head of its answer.
    pub(crate) async fn send(
        &mut self,
        x: &State,
        route: &Route<'_>,
        wait: &Wait<'_>,
    ) -> Result<Head, Failure> {
        let inner = &mut *self.0;
        inner.served += 1;
        inner.reusable = false;
        let (written, read) = (inner.traffic.written.get(), inner.traffic.read.get());
        let method = x.forward.method.as_ref().unwrap_or(&x.request.method);
        let asked = Asked { method, switch: route.upgrade.is_some() };
        let mut sending = Sending::new(x, route, wait.outgoing, wait.started);
        let mut timer = inner.timer.take();
        let head = wait.head(&mut timer, poll_fn(|cx| inner.poll_head(cx, &mut sending, asked))).await;
        inner.timer = timer;
        let head = head.map_err(Error::new);
        match head.and_then(|head| head.map_err(|trouble| trouble.error(wait.outgoing))) {
            Ok(head) => {
                inner.idle_limit = head.idle_limit.or(inner.idle_limit);
                inner.reusable = head.keep_alive && head.upgrade.is_none();
                if !sending.is_done() {
                    let sending = Background::start(sending, Rc::clone(&inner.io), wait.timeouts.send);
                    inner.background = Some(sending);
                }
                Ok(head)
            }
            Err(error) => {
                let silent = inner.traffic.read.get() == read;
                if inner.traffic.refused.get() {
                    let error = Error::new(Reason::MeshRefused).because(error);
                    return Err(Failure { error, unsent: true, silent });
                }
                let unsent = inner.traffic.written.get() == written;
                Err(Failure { error, unsent, silent })
            }
        }
    }

    /// The whole body of the answer, if it is here already.
    pub(crate) fn whole_body(&mut self) -> Option<Bytes> {
        self.0.reader.whole()
    }

    /// The body of the answer was taken to its end.
    pub(crate) fn is_end(&self) -> bool {
        self.0.reader.body().is_end()
    }

    /// How much of the body is left, where that is known.
    pub(crate) fn left(&self) -> Option<u64> {
        self.0.reader.body().left()
    }

    /// The next piece of the answer's body; none at its end.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Trouble>>> {
        loop {
            if let Some(frame) = self.0.reader.frame()? {
                return Poll::Ready(Some(Ok(frame)));
            }
            if self.is_end() {
                return Poll::Ready(None);
            }
            let small = self.left().is_some_and(|left| left < LARGE);
            let bytes = ready!(self.0.poll_read(cx, if small { Size::Beginning } else { Size::More }))?;
            match bytes.is_empty() {
                true => self.0.reader.close()?,
                false => self.0.reader.push(bytes),
            }
        }
    }

    /// The answer has come whole, but nothing more will. What is still being sent goes on without anybody.
    pub(crate) fn part(mut self) {
        if let Some(background) = self.0.background.take() {
            background.detach();
        }
    }

    /// After a 101: the stream. None where the request was not sent to its end.
    pub(crate) fn upgraded(self) -> Option<Upgraded> {
        let Inner { io, reader, .. } = *self.0;
        let io = Rc::try_unwrap(io).ok()?.into_inner();
        Some(Upgraded { io, early: reader.into_rest() })
    }
}

impl Inner {
    fn poll_read(&mut self, cx: &mut Context<'_>, size: Size) -> Poll<io::Result<Bytes>> {
        buffers::poll_read(&mut *self.io.borrow_mut(), cx, size)
    }

    /// Sends, and reads the head of the answer.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        sending: &mut Sending,
        asked: Asked<'_>,
    ) -> Poll<Result<Head, Trouble>> {
        // What was looked at in the same breath cannot have changed, and its waker is in place.
        let watched = std::mem::take(&mut self.watched);
        // An upstream that takes no more may have answered why.
        let mut broken = None;
        if !sending.is_done() {
            match sending.poll(&self.io, cx) {
                Poll::Ready(Ok(())) if watched => return Poll::Pending,
                Poll::Ready(Ok(())) | Poll::Pending => {}
                Poll::Ready(Err(Broken::Io(error))) => broken = Some(error),
                Poll::Ready(Err(Broken::Body(error))) => return Poll::Ready(Err(Trouble::Request(error))),
            }
        }
        loop {
            if let Some(head) = self.reader.head(asked)? {
                let switches_early = head.upgrade.is_some() && !sending.is_done();
                return Poll::Ready(if switches_early { Err(Defect::Switch.into()) } else { Ok(head) });
            }
            match (self.poll_read(cx, Size::Beginning), broken) {
                (Poll::Pending, None) => return Poll::Pending,
                (Poll::Pending, Some(error)) => return Poll::Ready(Err(error.into())),
                (Poll::Ready(bytes), still) => {
                    let bytes = bytes?;
                    if bytes.is_empty() {
                        return Poll::Ready(Err(Trouble::Closed));
                    }
                    self.reader.push(bytes);
                    broken = still;
                }
            }
        }
    }
}

/// A request that goes on although its answer has begun. It must not wait for the client to take that answer, so it has
/// a task, which ends with the connection.
#[derive(Debug)]
struct Background {
    task: Option<JoinHandle<()>>,
    /// It was sent to its end.
    sent: Rc<Cell<bool>>,
}

impl Background {
    /// The upstream has to take something every `limit`.
    fn start(mut sending: Sending, io: Rc<RefCell<Io>>, limit: Duration) -> Self {
        let sent = Rc::<Cell<bool>>::default();
        let (told, traffic) = (Rc::clone(&sent), Rc::clone(io.borrow().traffic()));
        let task = tokio::task::spawn_local(async move {
            let mut timer = pin!(sleep_until(Instant::now() + limit));
            let mut written = None;
            let end = poll_fn(|cx| {
                if let Poll::Ready(end) = sending.poll(&io, cx) {
                    return Poll::Ready(end.is_ok());
                }
                // The client has deadlines of its own.
                let now = sending.is_stuck().then(|| traffic.written.get());
                if std::mem::replace(&mut written, now) != now {
                    timer.as_mut().reset(Instant::now() + limit);
                }
                match now {
                    Some(_) => timer.as_mut().poll(cx).map(|()| false),
                    None => Poll::Pending,
                }
            });
            told.set(end.await);
        });
        Self { task: Some(task), sent }
    }

    fn detach(mut self) {
        self.task = None;
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
