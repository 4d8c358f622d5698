//! The loop of one connection: wait for a head, have it answered, write the answer, wait again.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName};
use http::{Method, Request, StatusCode};
use http_body::{Body as HttpBody, SizeHint};
use tokio::io::AsyncWrite;

use crate::body::Body;
use crate::error::{Error, Fault};
use crate::exchange::{Exchange, ResponseBody};
use crate::stack::HttpService;
use crate::transport::framing::{Chunks, Facts, HeadLimits, HeadReader, Violation};
use crate::upgrade::{self, Grant};
use crate::worker::deadlines::{Ended, Phase, Watched};
use crate::worker::http1::answer::{self, Asked, Framing};
use crate::worker::http1::body::ClientBody;
use crate::worker::http1::output::Output;
use crate::worker::http1::request;
use crate::worker::http1::wire::{BodyFailure, Length, Standing, Wire};
use crate::worker::io::Stream;
use crate::worker::serve::{PREFACE, QUIET, SCRATCH, Server, Shared, Speaks};
use crate::{rescue, spare};

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Requests of one connection that are answered before others have their turn.
const TURN: usize = 16;

/// What a connection has while a request is at work, and the worker keeps between requests.
pub(crate) struct Engine<F> {
    reader: HeadReader,
    /// The stack's answer to come.
    future: Pin<Box<Option<F>>>,
    asked: Asked,
    /// What goes out, and how.
    out: Output,
    framing: Framing,
    body: Option<ResponseBody>,
    /// The request asked for a switch of protocols: the client's side goes here if it is granted.
    grant: Option<Grant>,
    /// The head was refused: nothing is known of what is behind it.
    refused: bool,
}

impl<F> Engine<F> {
    /// For heads within these limits.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            reader: HeadReader::new(limits),
            future: Box::pin(None),
            asked: Asked::default(),
            out: Output::default(),
            framing: Framing::Nothing,
            body: None,
            grant: None,
            refused: false,
        }
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Between requests, or inside a head.
    Head,
    /// The stack is at work.
    Call,
    /// The answer is being written.
    Answer,
    /// The answer is complete, and not all of it is out.
    Flush,
    /// The answer is out, and somebody still reads the request's body.
    Rest,
}

/// How a connection leaves the engine.
#[derive(Debug)]
pub(crate) enum End {
    /// The client speaks HTTP/2; these are its first bytes.
    Http2(Vec<u8>),
    /// The last answer is out. While the client may still be sending, closing would take it from it: the kernel answers
    /// unread bytes with a reset.
    Close { sending: bool },
    /// The connection was handed over.
    Tunnel,
    /// There is nobody to say goodbye to.
    Gone,
}

/// What bytes of a client make.
enum Taken {
    More,
    Head(Bytes),
    Refused(Violation, Box<Request<Body>>),
    Over(End),
}

/// One connection over HTTP/1, or one that has not said what it speaks.
pub(crate) struct Connection<S: HttpService> {
    server: Rc<Server<S>>,
    shared: Rc<Shared>,
    watched: Watched,
    wire: Rc<Wire>,
    engine: Option<Box<Engine<S::Future>>>,
    stage: Stage,
    speaks: Speaks,
    /// What was read behind the last request has not been looked at.
    unseen: bool,
    /// A request is at work and counts.
    at_work: bool,
}

impl<S: HttpService> Connection<S> {
    /// A connection of which nothing was read.
    pub fn new(
        server: &Rc<Server<S>>,
        shared: &Rc<Shared>,
        stream: Stream,
        speaks: Speaks,
        watched: Watched,
    ) -> Self {
        watched.park(Phase::Head);
        Self {
            server: server.clone(),
            shared: shared.clone(),
            wire: Rc::new(Wire::new(stream, watched.watch().clone())),
            watched,
            engine: None,
            stage: Stage::Head,
            speaks,
            unseen: false,
            at_work: false,
        }
    }

    /// Its stream, when it has left the engine.
    pub fn take_stream(&mut self) -> Option<Stream> {
        self.wire.state().stream.take()
    }

    /// Its deadlines.
    pub fn watched(&self) -> &Watched {
        &self.watched
    }

    /// Serves until the connection leaves the engine.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.watched.attach(cx);
        for _ in 0..TURN {
            if let Some(cause) = self.watched.ended()
                && let Some(end) = self.ended(cause)
            {
                return Poll::Ready(end);
            }
            let end = match self.stage {
                Stage::Head => ready!(self.poll_head(cx)),
                _ => ready!(self.poll_request(cx)),
            };
            if let Some(end) = end {
                return Poll::Ready(end);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Its time is over. Some causes are answered.
    fn ended(&mut self, cause: Ended) -> Option<End> {
        match (cause, self.stage) {
            (Ended::IdleTimeout, Stage::Head) => return Some(End::Close { sending: true }),
            (Ended::HeaderTimeout, Stage::Head) if self.speaks == Speaks::Http1 && self.has_begun() => {
                self.watched.pardon();
                self.shared.context.count_ended(cause);
                let bytes = self.wire.state().input.split().freeze();
                let engine = self.engine.get_or_insert_with(|| self.server.engine());
                let line = request::refused(&engine.reader, &bytes);
                self.refuse(Violation::Slow, line);
            }
            (Ended::BodyTimeout, Stage::Call | Stage::Answer | Stage::Flush | Stage::Rest) => {
                self.watched.pardon();
                self.shared.context.count_ended(cause);
                self.wire.fail(BodyFailure::Slow);
            }
            _ => {
                self.shared.ended(cause);
                return Some(End::Gone);
            }
        }
        None
    }

    /// Whether a part of a head is here.
    fn has_begun(&self) -> bool {
        !self.wire.state().input.is_empty()
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        loop {
            let taken = if std::mem::take(&mut self.unseen) && self.has_begun() {
                self.read_input()
            } else {
                let read = SCRATCH.with_borrow_mut(|scratch| {
                    let read = ready!(self.wire.state().poll_some(cx, scratch));
                    Poll::Ready(self.take(scratch.get(..read).unwrap_or_default()))
                });
                match read {
                    Poll::Ready(taken) => taken,
                    Poll::Pending if self.waits() => return Poll::Ready(Some(End::Close { sending: false })),
                    Poll::Pending => return Poll::Pending,
                }
            };
            match taken {
                Taken::More => {}
                Taken::Head(bytes) => {
                    self.head(bytes);
                    return Poll::Ready(None);
                }
                Taken::Refused(violation, line) => {
                    self.refuse(violation, *line);
                    return Poll::Ready(None);
                }
                Taken::Over(end) => return Poll::Ready(Some(end)),
            }
        }
    }

    /// Nothing more has come. Whether that is enough of waiting.
    fn waits(&mut self) -> bool {
        if self.has_begun() {
            if self.watched.phase() != Phase::Head {
                // From here on the head is to be complete in time.
                self.watched.enter(Phase::Head);
                if self.watched.is_parked() {
                    self.watched.reschedule();
                }
            }
            return false;
        }
        if let Some(engine) = self.engine.take() {
            self.server.give_back(engine);
        }
        // The first head has its own time.
        if self.watched.phase() != Phase::Head {
            self.watched.stay(Phase::Idle);
            if self.watched.wants_parking() {
                self.shared.context.stats().parked.add(1);
                self.watched.park(Phase::Idle);
            }
        }
        self.shared.context.is_draining() && self.watched.waited() >= QUIET
    }

    /// Takes what was just read. Nothing is copied but the head, if it is whole.
    fn take(&mut self, bytes: &[u8]) -> Taken {
        if bytes.is_empty() {
            return Taken::Over(End::Gone);
        }
        if self.speaks != Speaks::Http1 || self.has_begun() {
            self.wire.state().input.extend_from_slice(bytes);
            return self.read_input();
        }
        let engine = self.engine.get_or_insert_with(|| self.server.engine());
        match engine.reader.read(bytes) {
            Ok(Some(length)) => {
                let (head, rest) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
                if !rest.is_empty() {
                    self.wire.state().input.extend_from_slice(rest);
                }
                Taken::Head(Bytes::copy_from_slice(head))
            }
            Ok(None) => {
                self.wire.state().input.extend_from_slice(bytes);
                Taken::More
            }
            Err(violation) => Taken::Refused(violation, Box::new(request::refused(&engine.reader, bytes))),
        }
    }

    /// Looks at what has come so far of a head.
    fn read_input(&mut self) -> Taken {
        let input = &mut self.wire.state().input;
        match self.speaks {
            Speaks::Http1 => {}
            Speaks::Http2 => return Taken::Over(End::Http2(input.split().to_vec())),
            Speaks::Either if input.starts_with(PREFACE) => {
                return Taken::Over(End::Http2(input.split().to_vec()));
            }
            Speaks::Either if PREFACE.starts_with(input) => return Taken::More,
            Speaks::Either if is_neither(input) => return Taken::Over(End::Gone),
            Speaks::Either => self.speaks = Speaks::Http1,
        }
        let engine = self.engine.get_or_insert_with(|| self.server.engine());
        match engine.reader.read(input) {
            Ok(Some(length)) => Taken::Head(input.split_to(length).freeze()),
            Ok(None) => Taken::More,
            Err(violation) => Taken::Refused(violation, Box::new(request::refused(&engine.reader, input))),
        }
    }

    /// A head is complete and well-formed.
    fn head(&mut self, bytes: Bytes) {
        let engine = self.engine.get_or_insert_with(|| self.server.engine());
        let facts = *engine.reader.facts();
        let request = request::request(&engine.reader, &bytes);
        match request {
            Ok(request) => self.begin(request, &facts, None),
            Err(violation) => {
                let line = request::refused(&engine.reader, &bytes);
                self.refuse(violation, line);
            }
        }
    }

    /// Has a head answered that is refused; nothing behind it is read.
    fn refuse(&mut self, violation: Violation, line: Request<Body>) {
        self.shared.context.stats().refused.add(1);
        let facts = Facts { close: true, ..Facts::default() };
        self.begin(line, &facts, Some(Error::new(violation.reason()).detail(violation.text())));
    }

    /// Passes a request on to the stack.
    fn begin(&mut self, mut request: Request<Body>, facts: &Facts, refused: Option<Error>) {
        let Self { server, shared, engine: Some(engine), wire, .. } = self else { return };
        engine.reader.restart();
        engine.asked = Asked::new(facts, request.method() == Method::HEAD);
        let length = match facts.length {
            _ if facts.chunked => Length::Chunked(Box::new(Chunks::new(server.limits()))),
            Some(length @ 1..) => Length::Exact(length),
            _ => Length::Nothing,
        };
        let has_body = !matches!(length, Length::Nothing);
        let number = wire.begin(length, facts.expects && !facts.http10);
        if has_body {
            *request.body_mut() = Body::Client(ClientBody::new(wire, number));
        }
        let mut asks = facts.switches;
        if asks && asks_for_http2(request.headers()) {
            asks = false;
            request.headers_mut().remove(header::UPGRADE);
            request.headers_mut().remove(HTTP2_SETTINGS);
        }
        let mut x = Exchange::new(request, shared.conn.clone());
        engine.refused = refused.is_some();
        x.refused = refused.map(Box::new);
        if asks {
            let (grant, upgrade) = upgrade::channel();
            engine.grant = Some(grant);
            x.upgrade = Some(upgrade);
        }
        self.watched.set_in_flight(1);
        self.watched.busy();
        if self.watched.is_parked() {
            self.watched.unpark();
            self.watched.allow_parking(true);
        }
        shared.begins();
        self.at_work = true;
        self.stage = Stage::Call;
        let future = server.call(x);
        engine.future.set(Some(future));
    }

    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        loop {
            let Some(engine) = &mut self.engine else { return Poll::Ready(Some(End::Gone)) };
            match self.stage {
                Stage::Head => return Poll::Ready(None),
                Stage::Call => {
                    let Some(future) = engine.future.as_mut().as_pin_mut() else {
                        return Poll::Ready(Some(End::Gone));
                    };
                    match future.poll(cx) {
                        Poll::Ready(result) => {
                            engine.future.set(None);
                            self.answer(result, cx);
                        }
                        Poll::Pending => {
                            if self.wire.take_continue() {
                                engine.out.text().extend_from_slice(CONTINUE);
                            }
                            return self.poll_waiting(cx);
                        }
                    }
                }
                Stage::Answer => {
                    let Some(body) = &mut engine.body else {
                        self.stage = Stage::Flush;
                        continue;
                    };
                    if engine.out.is_full()
                        && ready!(poll_write(&self.wire, &self.watched, &mut engine.out, cx)).is_err()
                    {
                        return Poll::Ready(Some(End::Gone));
                    }
                    let mut trailers = None;
                    let mut whole = true;
                    match Pin::new(&mut *body).poll_frame(cx) {
                        Poll::Pending => return self.poll_waiting(cx),
                        Poll::Ready(None) => {}
                        Poll::Ready(Some(Err(_))) => whole = false,
                        Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                            Ok(data) => {
                                let more = engine.framing.data(data, &mut engine.out);
                                if more && !body.is_end_stream() {
                                    continue;
                                }
                                if !more && !body.is_end_stream() {
                                    // All that was promised is there; its sender may want to see the end of it.
                                    let _ = Pin::new(&mut *body).poll_frame(cx);
                                }
                            }
                            Err(frame) => trailers = frame.into_trailers().ok(),
                        },
                    }
                    if whole && engine.framing.end(trailers.as_ref(), &mut engine.out).is_ok() {
                        self.over();
                    } else {
                        // What there is goes out, and its end is missing.
                        let _ = poll_write(&self.wire, &self.watched, &mut engine.out, cx);
                        return Poll::Ready(Some(End::Gone));
                    }
                }
                Stage::Flush => {
                    if ready!(poll_write(&self.wire, &self.watched, &mut engine.out, cx)).is_err() {
                        return Poll::Ready(Some(End::Gone));
                    }
                    let end = self.sent(cx);
                    if self.stage == Stage::Head || end.is_some() {
                        return Poll::Ready(end);
                    }
                }
                Stage::Rest => match self.wire.standing() {
                    Standing::Open if self.shared.context.is_draining() => {
                        return Poll::Ready(Some(End::Close { sending: true }));
                    }
                    Standing::Open => return Poll::Pending,
                    Standing::Read => {
                        self.next();
                        return Poll::Ready(None);
                    }
                    Standing::Dead if self.wire.drain(cx) => {
                        self.next();
                        return Poll::Ready(None);
                    }
                    Standing::Dead => return Poll::Ready(Some(End::Close { sending: true })),
                },
            }
        }
    }

    /// The answer is there: its head is written, and its body if that is known to be empty.
    fn answer(&mut self, result: Result<Exchange, Fault>, cx: &mut Context<'_>) {
        let Self { server, shared, engine: Some(engine), wire, .. } = self else { return };
        let mut x = result.unwrap_or_else(|Fault { mut exchange, error }| {
            // The stack answers its failures itself; this one came from outside of that layer.
            rescue::rescue(&mut exchange, error);
            exchange
        });
        // Who has not taken it by now does not want it.
        x.request_body = Body::Empty;
        let (head, mut body) = x.leave().into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            engine.asked.keep_alive = false;
        } else {
            engine.grant = None;
            if shared.context.is_draining() {
                engine.asked.keep_alive = false;
            }
        }
        if wire.standing() == Standing::Dead && !wire.drain(cx) {
            engine.asked.keep_alive = false;
        }
        wire.answer_begins();
        let empty = body.is_end_stream();
        let length = if empty { SizeHint::with_exact(0) } else { body.size_hint() };
        let before = engine.out.text().len();
        engine.framing = server
            .date(|date| answer::write_head(&head, &length, &mut engine.asked, date, engine.out.text()));
        body.head_left(engine.out.text().len() - before);
        spare::give_back(head.headers);
        if empty || engine.framing == Framing::Nothing {
            drop(body);
            let _ = engine.framing.end(None, &mut engine.out);
            self.over();
        } else {
            engine.body = Some(body);
            self.stage = Stage::Answer;
        }
    }

    /// Nothing can be done but wait. What is to be written goes out meanwhile.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        let Some(engine) = &mut self.engine else { return Poll::Ready(Some(End::Gone)) };
        if !engine.out.is_empty()
            && let Poll::Ready(Err(_)) = poll_write(&self.wire, &self.watched, &mut engine.out, cx)
        {
            return Poll::Ready(Some(End::Gone));
        }
        if !self.server.half_close() && self.wire.standing() == Standing::Read && !self.has_begun() {
            let gone = SCRATCH.with_borrow_mut(|scratch| {
                let mut state = self.wire.state();
                let read = ready!(state.poll_some(cx, scratch));
                state.input.extend_from_slice(scratch.get(..read).unwrap_or_default());
                Poll::Ready(read == 0)
            });
            if gone == Poll::Ready(true) {
                return Poll::Ready(Some(End::Gone));
            }
        }
        Poll::Pending
    }

    /// The answer is complete: the exchange ends, and what is not out yet is only bytes.
    fn over(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.body = None;
        }
        self.stage = Stage::Flush;
        self.not_at_work();
    }

    fn not_at_work(&mut self) {
        if std::mem::take(&mut self.at_work) {
            self.watched.set_in_flight(0);
            self.shared.ends();
        }
    }

    /// The answer is out.
    fn sent(&mut self, cx: &mut Context<'_>) -> Option<End> {
        let engine = self.engine.as_mut()?;
        if let Some(grant) = engine.grant.take() {
            let mut state = self.wire.state();
            let early = state.input.split().freeze();
            let stream = state.stream.take()?;
            let tunnel = upgrade::Switched::new(stream, early, self.watched.watch(), &self.shared.tunnel);
            drop(state);
            if let Some(engine) = self.engine.take() {
                self.server.give_back(engine);
            }
            return Some(if grant.send(tunnel).is_ok() { End::Tunnel } else { End::Gone });
        }
        let standing = self.wire.standing();
        if !engine.asked.keep_alive {
            let sending = engine.refused || standing != Standing::Read || self.has_begun();
            return Some(End::Close { sending });
        }
        match standing {
            Standing::Read => self.next(),
            Standing::Open => {
                self.wire.await_body();
                self.stage = Stage::Rest;
            }
            Standing::Dead if self.wire.drain(cx) => self.next(),
            Standing::Dead => return Some(End::Close { sending: true }),
        }
        None
    }

    /// The connection is free for its next request.
    fn next(&mut self) {
        let input = &mut self.wire.state().input;
        if input.is_empty() {
            *input = bytes::BytesMut::new();
        }
        self.stage = Stage::Head;
        self.unseen = true;
    }
}

impl<S: HttpService> Drop for Connection<S> {
    fn drop(&mut self) {
        self.not_at_work();
    }
}

/// Writes what is to go out, to the last byte.
fn poll_write(
    wire: &Wire,
    watched: &Watched,
    out: &mut Output,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<()>> {
    let mut state = wire.state();
    let Some(stream) = &mut state.stream else {
        return Poll::Ready(Err(std::io::ErrorKind::NotConnected.into()));
    };
    let mut written = out.poll_write(Pin::new(stream), cx);
    if let (Poll::Ready(Ok(())), Stream::Tls(_)) = (&written, &*stream) {
        written = Pin::new(stream).poll_flush(cx);
    }
    match written {
        Poll::Ready(_) => watched.unstuck(),
        Poll::Pending => watched.stuck(),
    }
    written
}

/// An upgrade to cleartext HTTP/2 is not offered: its bytes would pass every check unseen.
fn asks_for_http2(headers: &HeaderMap) -> bool {
    let starts_with_h2 =
        |part: &[u8]| part.trim_ascii().get(..2).is_some_and(|p| p.eq_ignore_ascii_case(b"h2"));
    headers
        .get_all(header::UPGRADE)
        .iter()
        .any(|value| value.as_bytes().split(|byte| *byte == b',').any(starts_with_h2))
}

/// Whether bytes begin neither protocol: an answer in the one would be noise in the other.
fn is_neither(bytes: &[u8]) -> bool {
    let begin = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
    let line = bytes.get(begin..).unwrap_or_default();
    memchr::memchr(b'\n', line)
        .and_then(|end| line.get(..end))
        .is_some_and(|line| memchr::memmem::find(line, b" HTTP/1.").is_none())
}
