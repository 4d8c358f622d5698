//! The head of an answer as it is written, and how its body is delimited. The gateway decides that by itself: what the
//! fields of an answer say of its length and of the connection counts only where nothing else is known.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{StatusCode, response};
use http_body::SizeHint;
use hyper::ext::ReasonPhrase;

use crate::transport::framing::Facts;
use crate::worker::http1::output::Output;

/// What of a request matters for its answer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    /// HTTP/1.0: no chunks, and the connection closes unless both sides say otherwise.
    pub http10: bool,
    /// `HEAD`: no body, whatever is said of it.
    pub head: bool,
    /// `TE: trailers`.
    pub trailers: bool,
    /// The connection may be used again.
    pub keep_alive: bool,
}

impl Asked {
    /// What a head with these fields asks for.
    pub fn new(facts: &Facts, head: bool) -> Self {
        let keep_alive = if facts.http10 { facts.keep_alive && !facts.close } else { !facts.close };
        Self { http10: facts.http10, head, trailers: facts.trailers && !facts.http10, keep_alive }
    }
}

/// How the body of an answer is delimited.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none to be sent.
    Nothing,
    /// So many bytes are left of it.
    Length(u64),
    /// Chunks, and behind them these trailers of those that come.
    Chunked(Vec<HeaderName>),
    /// It ends with the connection.
    UntilClose,
}

/// A body said that it is longer than what came of it.
#[derive(Debug, thiserror::Error)]
#[error("the body of the answer ended {0} bytes too early")]
pub(crate) struct TooShort(u64);

impl Framing {
    /// A piece of the body goes out. False if nothing more can.
    pub fn data(&mut self, piece: Bytes, out: &mut Output) -> bool {
        match self {
            Self::Nothing => false,
            Self::Length(left) => {
                let taken = usize::try_from(*left).map_or(piece.len(), |left| left.min(piece.len()));
                *left -= taken as u64;
                out.push(if taken == piece.len() { piece } else { piece.slice(..taken) });
                *left > 0
            }
            Self::Chunked(_) => {
                // An empty chunk would end the body.
                if !piece.is_empty() {
                    hexadecimal(piece.len(), out.text());
                    out.text().extend_from_slice(b"\r\n");
                    out.push(piece);
                    out.text().extend_from_slice(b"\r\n");
                }
                true
            }
            Self::UntilClose => {
                out.push(piece);
                true
            }
        }
    }

    /// The body has ended, with these trailers.
    ///
    /// # Errors
    /// More was promised.
    pub fn end(&mut self, trailers: Option<&HeaderMap>, out: &mut Output) -> Result<(), TooShort> {
        match std::mem::replace(self, Self::Nothing) {
            Self::Length(left @ 1..) => return Err(TooShort(left)),
            Self::Nothing | Self::Length(_) | Self::UntilClose => {}
            Self::Chunked(allowed) => {
                let text = out.text();
                text.extend_from_slice(b"0\r\n");
                let fields = trailers.into_iter().flatten().filter(|(name, _)| allowed.contains(name));
                fields.for_each(|(name, value)| field(text, name, value));
                text.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }
}

fn hexadecimal(number: usize, text: &mut Vec<u8>) {
    let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        let digit = (number >> (4 * place)) & 15;
        text.push(char::from_digit(digit as u32, 16).map_or(b'0', |digit| digit as u8));
    }
}

fn field(text: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    text.extend_from_slice(name.as_str().as_bytes());
    text.extend_from_slice(b": ");
    text.extend_from_slice(value.as_bytes());
    text.extend_from_slice(b"\r\n");
}

/// Fields that frame or route a message; a trailer cannot say anything of that any more.
fn may_trail(name: &HeaderName) -> bool {
    !matches!(
        *name,
        header::CONTENT_LENGTH
            | header::TRANSFER_ENCODING
            | header::HOST
            | header::CONNECTION
            | header::TRAILER
            | header::TE
            | header::UPGRADE
            | header::AUTHORIZATION
            | header::SET_COOKIE
            | header::CONTENT_TYPE
            | header::CONTENT_ENCODING
            | header::CONTENT_RANGE
            | header::CACHE_CONTROL
            | header::MAX_FORWARDS
    )
}

/// Writes the head of an answer whose body has this length, and settles how the body is delimited. `asked.keep_alive`
/// is false afterwards if the connection ends with this answer.
pub(crate) fn write_head(
    head: &response::Parts,
    length: &SizeHint,
    asked: &mut Asked,
    date: &str,
    text: &mut Vec<u8>,
) -> Framing {
    let status = head.status;
    let switching = status == StatusCode::SWITCHING_PROTOCOLS;
    let bodiless =
        status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let may_chunk = !asked.http10 && !asked.head && !bodiless;
    status_line(head, asked.http10, text);
    let mut dated = false;
    let mut said_close = false;
    let mut said_length = None;
    let mut trailers = Vec::new();
    for (name, value) in &head.headers {
        match *name {
            header::CONTENT_LENGTH => {
                said_length = said_length.or_else(|| value.to_str().ok()?.parse::<u64>().ok());
                continue;
            }
            header::TRANSFER_ENCODING => continue,
            header::CONNECTION => {
                said_close |= value.as_bytes().eq_ignore_ascii_case(b"close");
                if !switching {
                    continue;
                }
            }
            header::DATE => dated = true,
            header::TRAILER => {
                if !may_chunk {
                    continue;
                }
                if asked.trailers {
                    let names = value.as_bytes().split(|byte| *byte == b',');
                    let names = names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok());
                    trailers.extend(names.filter(may_trail));
                }
            }
            _ => {}
        }
        field(text, name, value);
    }
    let framing = match length.exact() {
        _ if bodiless => Framing::Nothing,
        // What is said of a body that is not sent is what its sender knows of it.
        Some(length) if asked.head => {
            if let Some(length) = said_length.or((length > 0).then_some(length)) {
                content_length(text, length);
            }
            Framing::Nothing
        }
        None if asked.head => {
            if let Some(length) = said_length {
                content_length(text, length);
            }
            Framing::Nothing
        }
        Some(length) => {
            content_length(text, length);
            Framing::Length(length)
        }
        None => match said_length {
            Some(length) => {
                content_length(text, length);
                Framing::Length(length)
            }
            None if may_chunk => {
                text.extend_from_slice(b"transfer-encoding: chunked\r\n");
                Framing::Chunked(trailers)
            }
            None => Framing::UntilClose,
        },
    };
    asked.keep_alive &= !said_close && framing != Framing::UntilClose;
    if switching {
        // The connection belongs to another protocol now.
    } else if !asked.keep_alive {
        text.extend_from_slice(b"connection: close\r\n");
    } else if asked.http10 {
        text.extend_from_slice(b"connection: keep-alive\r\n");
    }
    if !dated {
        text.extend_from_slice(b"date: ");
        text.extend_from_slice(date.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    framing
}

fn status_line(head: &response::Parts, http10: bool, text: &mut Vec<u8>) {
    let phrase = head.extensions.get::<ReasonPhrase>();
    if head.status == StatusCode::OK && !http10 && phrase.is_none() {
        return text.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
    }
    text.extend_from_slice(if http10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    text.extend_from_slice(head.status.as_str().as_bytes());
    text.push(b' ');
    match phrase {
        Some(phrase) => text.extend_from_slice(phrase.as_bytes()),
        // Without one some clients do not read the line.
        None => text.extend_from_slice(head.status.canonical_reason().unwrap_or("<none>").as_bytes()),
    }
    text.extend_from_slice(b"\r\n");
}

fn content_length(text: &mut Vec<u8>, length: u64) {
    text.extend_from_slice(b"content-length: ");
    text.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
    text.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

    /// `fields` as lines, the length of the body where it is known.
    fn write(status: u16, fields: &str, length: Option<u64>, mut asked: Asked) -> (String, Framing, bool) {
        let mut response = Response::builder().status(status);
        for line in fields.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            response = response.header(name, value);
        }
        let (head, ()) = response.body(()).unwrap().into_parts();
        let hint = length.map_or_else(SizeHint::default, SizeHint::with_exact);
        let mut text = Vec::new();
        let framing = write_head(&head, &hint, &mut asked, DATE, &mut text);
        (String::from_utf8(text).unwrap(), framing, asked.keep_alive)
    }

    const PLAIN: Asked = Asked { http10: false, head: false, trailers: false, keep_alive: true };

    #[test]
    fn an_answer_is_delimited_by_what_is_known_of_its_body() {
        let head = Asked { head: true, ..PLAIN };
        let old = Asked { http10: true, ..PLAIN };
        let older = Asked { keep_alive: false, ..old };
        let close = Asked { keep_alive: false, ..PLAIN };
        let chunked = || Framing::Chunked(Vec::new());
        let cases = [
            ("known", 200, "", Some(5), PLAIN, "content-length: 5\r\n", Framing::Length(5), true),
            ("nothing", 200, "", Some(0), PLAIN, "content-length: 0\r\n", Framing::Length(0), true),
            (
                "said otherwise",
                200,
                "content-length: 7",
                Some(5),
                PLAIN,
                "content-length: 5\r\n",
                Framing::Length(5),
                true,
            ),
            (
                "said twice",
                200,
                "content-length: 5\ncontent-length: 5",
                None,
                PLAIN,
                "content-length: 5\r\n",
                Framing::Length(5),
                true,
            ),
            (
                "said only",
                200,
                "content-length: 7",
                None,
                PLAIN,
                "content-length: 7\r\n",
                Framing::Length(7),
                true,
            ),
            ("unknown", 200, "", None, PLAIN, "transfer-encoding: chunked\r\n", chunked(), true),
            (
                "encoded already",
                200,
                "transfer-encoding: gzip",
                None,
                PLAIN,
                "transfer-encoding: chunked\r\n",
                chunked(),
                true,
            ),
            (
                "chunked for nobody",
                200,
                "transfer-encoding: chunked",
                Some(3),
                PLAIN,
                "content-length: 3\r\n",
                Framing::Length(3),
                true,
            ),
            ("unknown in 1.0", 200, "", None, old, "connection: close\r\n", Framing::UntilClose, false),
            (
                "kept in 1.0",
                200,
                "",
                Some(1),
                old,
                "content-length: 1\r\nconnection: keep-alive\r\n",
                Framing::Length(1),
                true,
            ),
            (
                "closed in 1.0",
                200,
                "",
                Some(1),
                older,
                "content-length: 1\r\nconnection: close\r\n",
                Framing::Length(1),
                false,
            ),
            (
                "asked to close",
                200,
                "",
                Some(1),
                close,
                "content-length: 1\r\nconnection: close\r\n",
                Framing::Length(1),
                false,
            ),
            (
                "told to close",
                200,
                "connection: close",
                Some(1),
                PLAIN,
                "content-length: 1\r\nconnection: close\r\n",
                Framing::Length(1),
                false,
            ),
            (
                "HEAD, length of its sender",
                200,
                "content-length: 9",
                Some(0),
                head,
                "content-length: 9\r\n",
                Framing::Nothing,
                true,
            ),
            (
                "HEAD, body that stays",
                200,
                "",
                Some(9),
                head,
                "content-length: 9\r\n",
                Framing::Nothing,
                true,
            ),
            ("HEAD, unknown", 200, "", None, head, "", Framing::Nothing, true),
            ("HEAD, nothing", 200, "", Some(0), head, "", Framing::Nothing, true),
            ("204", 204, "content-length: 0", Some(0), PLAIN, "", Framing::Nothing, true),
            ("204 with a body", 204, "", None, PLAIN, "", Framing::Nothing, true),
            ("304", 304, "content-length: 9", Some(0), PLAIN, "", Framing::Nothing, true),
            (
                "101",
                101,
                "connection: upgrade",
                Some(0),
                PLAIN,
                "connection: upgrade\r\n",
                Framing::Nothing,
                true,
            ),
        ];
        for (what, status, fields, length, asked, expected, framing, keep_alive) in cases {
            let (text, got, kept) = write(status, fields, length, asked);
            let (line, rest) = text.split_once("\r\n").unwrap();
            let version = if asked.http10 { "HTTP/1.0 " } else { "HTTP/1.1 " };
            assert!(
                line.starts_with(version) && line[9..].starts_with(&status.to_string()),
                "{what}: {line}"
            );
            assert_eq!(rest, format!("{expected}date: {DATE}\r\n\r\n"), "{what}");
            assert_eq!((got, kept), (framing, keep_alive), "{what}");
        }
    }

    #[test]
    fn fields_go_out_in_their_order_and_a_date_is_kept() {
        let (text, _, _) = write(299, "x-a: 1\ndate: then\nset-cookie: a\nset-cookie: b", Some(0), PLAIN);
        assert_eq!(
            text,
            "HTTP/1.1 299 <none>\r\nx-a: 1\r\ndate: then\r\nset-cookie: a\r\nset-cookie: b\r\ncontent-length: 0\r\n\r\n"
        );
    }

    fn body(mut framing: Framing, pieces: &[&'static str], trailers: &HeaderMap) -> (String, bool) {
        let mut out = Output::default();
        for piece in pieces {
            framing.data(Bytes::from_static(piece.as_bytes()), &mut out);
        }
        let whole = framing.end(Some(trailers), &mut out).is_ok();
        (String::from_utf8(out.text().clone()).unwrap(), whole)
    }

    #[test]
    fn a_body_is_written_as_it_was_announced() {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("1"));
        trailers.insert("x-other", HeaderValue::from_static("2"));
        let asked = Asked { trailers: true, ..PLAIN };
        let (_, framing, _) = write(200, "trailer: X-Sum, content-length", None, asked);
        assert_eq!(framing, Framing::Chunked(vec![HeaderName::from_static("x-sum")]));
        let (unasked, plain, _) = write(200, "trailer: X-Sum", None, PLAIN);
        assert!(unasked.contains("trailer: X-Sum\r\n"));
        let cases = [
            (framing, &["abc", "", "de"][..], "3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 1\r\n\r\n", true),
            (plain, &["0123456789abcdef0"], "11\r\n0123456789abcdef0\r\n0\r\n\r\n", true),
            (Framing::Length(5), &["abc", "de"], "abcde", true),
            (Framing::Length(5), &["abc", "defg"], "abcde", true),
            (Framing::Length(5), &["abc"], "abc", false),
            (Framing::UntilClose, &["abc"], "abc", true),
            (Framing::Nothing, &["abc"], "", true),
        ];
        for (framing, pieces, text, whole) in cases {
            let what = format!("{framing:?}");
            assert_eq!(body(framing, pieces, &trailers), (text.to_owned(), whole), "{what}");
        }
    }
}
