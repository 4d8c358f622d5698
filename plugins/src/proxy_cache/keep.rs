//! Keeps an answer while it passes to the client, and hands it to the zone when it was whole.
//!
//! Nothing is kept of a body that breaks off, that is longer than allowed, or for which there is no room.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, StatusCode, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use layers::body::{Body, BodyError};
use layers::exchange::Exchange;
use tokio::sync::OwnedSemaphorePermit;

use super::entry::{Entry, Key, Stored};
use super::zone::{Flight, Zone};

/// The names of an answer: of the request, of the answer, and the fields by which answers differ.
pub type Place = (Key, Key, Box<[HeaderName]>);

/// An answer on its way in.
pub struct Keep {
    zone: Arc<Zone>,
    place: Place,
    status: StatusCode,
    headers: HeaderMap,
    stored: SystemTime,
    ttl: Duration,
    longest: usize,
    body: BytesMut,
    room: Option<OwnedSemaphorePermit>,
    /// Those who ask for the same wait as long as it is here.
    flight: Option<Flight>,
}

/// Fields that belong to one exchange and not to the answer.
pub fn is_ours(name: &HeaderName) -> bool {
    let name = name.as_str();
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "content-length"
            | "apisix-cache-status"
            | "x-apisix-upstream-status"
            | "proxy-status"
    ) || name.contains("ratelimit-remaining")
}

impl Keep {
    /// Lets the answer of `x` pass and keeps it at `place` for `times` (since when, how long).
    pub fn answer(
        x: &mut Exchange,
        zone: &Arc<Zone>,
        place: Place,
        times: (SystemTime, Duration),
        longest: usize,
        set_cookie: bool,
        flight: Option<Flight>,
    ) {
        let mut room = None;
        let announced = x.response.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > longest || !zone.room(length, &mut room)) {
            zone.pass(place.0);
            return;
        }
        let mut headers = x.response.headers().clone();
        let names: Vec<HeaderName> = headers.keys().filter(|name| is_ours(name)).cloned().collect();
        for name in names {
            headers.remove(name);
        }
        if !set_cookie {
            headers.remove(header::SET_COOKIE);
        }
        let keep = Self {
            zone: zone.clone(),
            place,
            status: x.response.status(),
            headers,
            stored: times.0,
            ttl: times.1,
            longest,
            body: BytesMut::new(),
            room,
            flight,
        };
        let body = std::mem::take(x.response.body_mut());
        if body.is_empty() {
            keep.done();
        } else {
            *x.response.body_mut() = Body::boxed(Kept { body, keep: Some(keep) });
        }
    }

    /// Takes a piece; false if it is too much.
    fn take(&mut self, piece: &Bytes) -> bool {
        let length = self.body.len().saturating_add(piece.len());
        if length > self.longest || !self.zone.room(length, &mut self.room) {
            self.zone.pass(self.place.0);
            return false;
        }
        self.body.extend_from_slice(piece);
        true
    }

    /// The answer was whole.
    fn done(self) {
        let Self { zone, place, status, headers, stored, ttl, body, room, flight, .. } = self;
        let (primary, exact, names) = place;
        let entry = Entry { status, headers, body: body.freeze(), stored, ttl };
        zone.put(exact, Arc::new(Stored::Answer(entry)), room);
        if exact == primary {
            return;
        }
        // The list of variants is read and written by somebody who can wait; until then nobody finds the answer.
        let control = zone.control().clone();
        control.spawn(async move {
            zone.put_variant(primary, exact, names).await;
            drop(flight);
        });
    }
}

/// A body that is kept as it passes.
struct Kept {
    body: Body,
    keep: Option<Keep>,
}

impl Kept {
    fn end(&mut self) {
        if let Some(keep) = self.keep.take() {
            keep.done();
        }
    }
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(piece) => {
                    if this.keep.as_mut().is_some_and(|keep| !keep.take(piece)) {
                        this.keep = None;
                    }
                    // A reader that knows the length does not ask for the end.
                    if this.body.is_end_stream() {
                        this.end();
                    }
                }
                // Trailers cannot be given again.
                None => this.keep = None,
            },
            Some(Err(_)) => this.keep = None,
            None => this.end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.keep.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
