//! The head of an answer: its bytes become a status and the fields that go on to the client.
//!
//! Fields of the upstream's connection, and those that its `Connection` names, are understood and left out here. How
//! the body is delimited follows RFC 9112, section 6.3, and where that leaves a choice, the answer is refused.

use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use hyper::ext::ReasonPhrase;
use smallvec::SmallVec;

use super::Defect;
use super::lines::{self, Lines};
use crate::spare;
use crate::upstream::fields::{self, Own};

/// Fields of one head at most.
pub const MAX_FIELDS: usize = 100;
/// Bytes of one head at most.
pub const MAX_HEAD: usize = 64 * 1024;

/// How a body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    Empty,
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
    /// It ends with the connection.
    UntilClose,
}

/// The request that is answered, as far as its answer depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its method.
    pub method: &'a Method,
    /// It asked to switch protocols.
    pub switch: bool,
}

/// The head of an answer.
#[derive(Debug)]
pub struct Head {
    /// The status.
    pub status: StatusCode,
    /// What stands behind the status, where that is not the usual.
    pub reason: Option<ReasonPhrase>,
    /// The fields for the client.
    pub headers: HeaderMap,
    /// How the body is delimited.
    pub framing: Framing,
    /// The connection may be used again.
    pub keep_alive: bool,
    /// How long the peer keeps an idle connection, if it says so.
    pub idle_limit: Option<Duration>,
    /// The protocol that is switched to.
    pub upgrade: Option<HeaderValue>,
}

/// What the fields of the connection say.
#[derive(Default)]
struct Said {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    idle_limit: Option<Duration>,
    upgrade: Option<HeaderValue>,
    named: SmallVec<[HeaderName; 2]>,
}

/// Reads the head that `bytes` begin with, and how long it is; none while it is not complete. Values share `bytes`.
/// `room` is the number of fields that are expected.
///
/// # Errors
/// What makes it no answer that can be trusted.
pub fn parse(bytes: &Bytes, asked: Asked<'_>, room: usize) -> Result<Option<(Head, usize)>, Defect> {
    let mut lines = Lines::new(bytes);
    let Some(line) = lines.next() else { return unfinished(bytes) };
    let (status, http10, reason) = status_line(line)?;
    let mut said = Said::default();
    let mut headers = spare::fields(room);
    let mut fields = 0;
    loop {
        let Some(line) = lines.next() else { return unfinished(bytes) };
        if line.is_empty() {
            break;
        }
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(Defect::TooManyFields);
        }
        let (name, text) = lines::field(line)?;
        let value = || HeaderValue::from_maybe_shared(bytes.slice_ref(text)).map_err(|_| Defect::Field);
        let name = match fields::own(name) {
            Some(Own::ContentLength) => {
                said.length(text)?;
                header::CONTENT_LENGTH
            }
            Some(own) => {
                said.note(own, value()?)?;
                continue;
            }
            None => match usual(name) {
                Some(name) => name,
                None => HeaderName::from_bytes(name).map_err(|_| Defect::Field)?,
            },
        };
        headers.append(name, value()?);
    }
    if lines.read() > MAX_HEAD {
        return Err(Defect::HeadTooLong);
    }
    said.named.iter().for_each(|name| drop(headers.remove(name)));
    let framing = said.framing(status, http10, asked)?;
    let keep_alive = !said.close
        && (!http10 || said.keep_alive)
        && framing != Framing::UntilClose
        && !(*asked.method == Method::CONNECT && status.is_success());
    let upgrade = said.upgrade.filter(|_| status == StatusCode::SWITCHING_PROTOCOLS);
    let head = Head { status, reason, headers, framing, keep_alive, idle_limit: said.idle_limit, upgrade };
    Ok(Some((head, lines.read())))
}

/// More may come, unless it is too much or no answer already.
fn unfinished(bytes: &[u8]) -> Result<Option<(Head, usize)>, Defect> {
    const BEGINNING: &[u8] = b"HTTP/1.";
    if bytes.iter().zip(BEGINNING).any(|(byte, wanted)| byte != wanted) {
        return Err(Defect::StatusLine);
    }
    if bytes.len() > MAX_HEAD { Err(Defect::HeadTooLong) } else { Ok(None) }
}

/// The status, whether it is HTTP/1.0, and what stands behind the status if that is not the usual.
fn status_line(line: &[u8]) -> Result<(StatusCode, bool, Option<ReasonPhrase>), Defect> {
    let http10 = match line.first_chunk() {
        Some(b"HTTP/1.1 ") => false,
        Some(b"HTTP/1.0 ") => true,
        _ => return Err(Defect::StatusLine),
    };
    let (status, rest) = line.get(9..).and_then(|rest| rest.split_at_checked(3)).ok_or(Defect::StatusLine)?;
    let status = StatusCode::from_bytes(status).map_err(|_| Defect::StatusLine)?;
    let reason = match rest {
        [] => rest,
        [b' ', reason @ ..] => reason,
        _ => return Err(Defect::StatusLine),
    };
    let reason = match status.canonical_reason() {
        Some(usual) if usual.as_bytes() == reason => None,
        _ => Some(ReasonPhrase::try_from(reason).map_err(|_| Defect::StatusLine)?),
    };
    Ok((status, http10, reason))
}

/// Names as nearly all answers have them, without a search through all names there are.
fn usual(name: &[u8]) -> Option<HeaderName> {
    Some(match name {
        b"Date" | b"date" => header::DATE,
        b"ETag" | b"etag" => header::ETAG,
        b"Vary" | b"vary" => header::VARY,
        b"Server" | b"server" => header::SERVER,
        b"Set-Cookie" | b"set-cookie" => header::SET_COOKIE,
        b"Content-Type" | b"content-type" => header::CONTENT_TYPE,
        b"Accept-Ranges" | b"accept-ranges" => header::ACCEPT_RANGES,
        b"Cache-Control" | b"cache-control" => header::CACHE_CONTROL,
        b"Last-Modified" | b"last-modified" => header::LAST_MODIFIED,
        _ => return None,
    })
}

impl Said {
    /// Takes note of a field that does not go on.
    fn note(&mut self, own: Own, value: HeaderValue) -> Result<(), Defect> {
        let text = value.as_bytes();
        match own {
            Own::TransferEncoding => {
                // Another coding would be taken off the head and left on the body.
                if self.chunked || !text.eq_ignore_ascii_case(b"chunked") {
                    return Err(Defect::TransferEncoding);
                }
                self.chunked = true;
            }
            Own::Connection => {
                for option in text.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    if option.eq_ignore_ascii_case(b"close") {
                        self.close = true;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") {
                        self.keep_alive = true;
                    } else if let Some(name) = fields::droppable(option) {
                        self.named.push(name);
                    }
                }
            }
            Own::KeepAlive => {
                if let Some(seconds) = fields::keep_alive_timeout(text) {
                    // Closing first by a margin avoids the race with the peer's own timer.
                    let (margin, year) = (Duration::from_millis(500), 365 * 86_400);
                    self.idle_limit = Some(Duration::from_secs(seconds.min(year)).saturating_sub(margin));
                }
            }
            Own::Upgrade => self.upgrade = Some(value),
            Own::Hop | Own::ContentLength => {}
        }
        Ok(())
    }

    /// Only digits, and only once: two readers could take two of them differently.
    fn length(&mut self, text: &[u8]) -> Result<(), Defect> {
        let digit = |length: u64, byte: &u8| {
            let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
            length.checked_mul(10)?.checked_add(digit)
        };
        let length = if text.is_empty() { None } else { text.iter().try_fold(0, digit) };
        match (self.length, length) {
            (None, Some(length)) => self.length = Some(length),
            _ => return Err(Defect::ContentLength),
        }
        Ok(())
    }

    fn framing(&self, status: StatusCode, http10: bool, asked: Asked<'_>) -> Result<Framing, Defect> {
        if status == StatusCode::SWITCHING_PROTOCOLS && !(asked.switch && self.upgrade.is_some()) {
            return Err(Defect::Switch);
        }
        match (self.chunked, self.length) {
            // Which one the peer means cannot be known.
            (true, Some(_)) => return Err(Defect::BothLengths),
            (true, None) if http10 => return Err(Defect::TransferEncoding),
            _ => {}
        }
        let bodiless = matches!(status.as_u16(), ..200 | 204 | 304)
            || *asked.method == Method::HEAD
            || (*asked.method == Method::CONNECT && status.is_success());
        Ok(match (self.chunked, self.length) {
            _ if bodiless => Framing::Empty,
            (true, _) => Framing::Chunked,
            (false, Some(0)) => Framing::Empty,
            (false, Some(length)) => Framing::Length(length),
            (false, None) => Framing::UntilClose,
        })
    }
}

/// The trailer fields of an answer, without those that have no business there. `bytes` are whole lines.
///
/// # Errors
/// They are malformed.
pub(super) fn trailers(bytes: &Bytes) -> Result<HeaderMap, Defect> {
    let mut trailers = HeaderMap::new();
    for (number, line) in Lines::new(bytes).enumerate() {
        let (name, value) = lines::field(line).map_err(|_| Defect::Trailers)?;
        let name = HeaderName::from_bytes(name).map_err(|_| Defect::Trailers)?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(value)).map_err(|_| Defect::Trailers)?;
        if number >= MAX_FIELDS {
            return Err(Defect::Trailers);
        }
        if fields::is_trailer(&name) {
            trailers.append(name, value);
        }
    }
    Ok(trailers)
}
