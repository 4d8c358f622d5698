//! A second look at how HTTP/1 requests are delimited, in front of the engine. It passes only complete, well-formed
//! heads on, follows bodies and chunks to know where the next head begins, and replaces a head that two readers
//! could understand differently by a harmless one, so that the gateway answers it with a reason and closes.
//! It copies nothing unless a head arrives in pieces, and never decides anything about content.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use memchr::memchr;
use tokio::io::{AsyncRead, ReadBuf};

use crate::error::Reason;

/// Empty lines that may stand before a request line; old clients end a body with one.
const LEADING_LINES: u8 = 4;
/// Hexadecimal digits of a chunk size: as many as 64 bits have.
const CHUNK_DIGITS: u8 = 16;
/// Bytes of chunk extensions in one body.
const EXTENSIONS: u32 = 8 * 1024;

/// How large a request head may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// Bytes of the request line; more gives 414.
    pub line: usize,
    /// Bytes of the whole head, and of the trailers; more gives 431.
    pub head: usize,
    /// Number of fields; more gives 431.
    pub fields: usize,
}

impl Default for HeadLimits {
    /// As nginx's `large_client_header_buffers 4 8k`; fields as the engine takes without an allocation.
    fn default() -> Self {
        Self { line: 8 * 1024, head: 32 * 1024, fields: 100 }
    }
}

/// What is wrong with a request as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    /// LF without CR, or CR without LF.
    LineEnd,
    /// NUL or another control byte.
    Control,
    /// More empty lines before the request than any client sends.
    LeadingLines,
    /// Not `method SP target SP HTTP/1.x`.
    RequestLine,
    /// A fragment in the target: some readers cut it off, some do not.
    Target,
    /// The request line is over its limit.
    LineTooLong,
    /// The head is over its limit.
    HeadTooLong,
    /// More fields than allowed.
    TooManyFields,
    /// An empty name, a space before the colon, a folded line, or no colon.
    FieldName,
    /// `Content-Length` is not one plain number.
    ContentLength,
    /// `Transfer-Encoding` is not exactly `chunked`, stands twice, or stands in HTTP/1.0.
    TransferEncoding,
    /// Both lengths at once.
    BothLengths,
    /// HTTP/1.1 without `Host`, or two of them.
    Host,
    /// A chunk size that is empty, no hexadecimal number or too large.
    ChunkSize,
    /// A chunk extension with a control byte, or too many of them.
    ChunkExtension,
    /// A chunk that does not end with CR LF.
    ChunkEnd,
    /// Trailers that are malformed or over the limit.
    Trailers,
    /// The head was not complete in time.
    Slow,
}

impl Violation {
    /// The reason the client's answer carries.
    pub fn reason(self) -> Reason {
        match self {
            Self::Target => Reason::BadUri,
            Self::LineTooLong => Reason::UriTooLong,
            Self::HeadTooLong | Self::TooManyFields => Reason::HeadersTooLarge,
            Self::Host => Reason::BadHost,
            Self::Slow => Reason::RequestTimeout,
            _ => Reason::BadRequest,
        }
    }

    /// Words for the log.
    pub fn text(self) -> &'static str {
        match self {
            Self::LineEnd => "a line of the head does not end with CR LF",
            Self::Control => "a control byte in the head",
            Self::LeadingLines => "empty lines before the request",
            Self::RequestLine => "malformed request line",
            Self::Target => "a fragment in the target",
            Self::LineTooLong => "the request line is too long",
            Self::HeadTooLong => "the head is too large",
            Self::TooManyFields => "too many header fields",
            Self::FieldName => "malformed field name",
            Self::ContentLength => "Content-Length is not one plain number",
            Self::TransferEncoding => "Transfer-Encoding is not exactly chunked",
            Self::BothLengths => "Content-Length together with Transfer-Encoding",
            Self::Host => "Host is missing or repeated",
            Self::ChunkSize => "malformed chunk size",
            Self::ChunkExtension => "malformed chunk extension",
            Self::ChunkEnd => "a chunk does not end with CR LF",
            Self::Trailers => "malformed trailers",
            Self::Slow => "the head was not complete in time",
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for Violation {}

/// Where in a request the connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Between requests: no byte of the next one has come.
    Between,
    /// Inside a head.
    Head,
    /// Inside a body.
    Body,
    /// After a request that asked to switch protocols; what follows waits for the answer.
    Waiting,
    /// The bytes are not looked at: a tunnel, or the connection is past a violation.
    Blind,
}

/// Why a scan stopped before the end of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// What is left is the beginning of a head.
    Partial,
    /// What is left follows a request that asked to switch protocols.
    Waiting,
    /// What is left is a head that is refused.
    Head(Violation),
    /// What is left is a broken body.
    Body(Violation),
    /// What is left begins with a good head of this length, whose target has bytes that are to be encoded.
    Encode(usize),
}

/// What the fields of a head say about its framing.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    length: Option<u64>,
    chunked: bool,
    hosts: u8,
    http10: bool,
    switches: bool,
    encode: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Length(u64),
    Chunk(Chunk),
    Waiting,
    Blind,
}

/// Inside a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size { value: u64, digits: u8 },
    Extension(u64),
    SizeEnd(u64),
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    End,
}

/// The parser: no buffer of its own, no IO.
#[derive(Debug)]
pub struct Framing {
    limits: HeadLimits,
    state: State,
    facts: Facts,
    /// Offset in the current head of the line being read.
    line: usize,
    /// Offset in the current head up to which no line end was found.
    searched: usize,
    /// Lines of the current head that are read, the request line included.
    lines: usize,
    leading: u8,
    /// The request line's place in the current head, once it is known to be good.
    request_line: (usize, usize),
    extensions: u32,
    trailers: usize,
    heads: u32,
}

impl Framing {
    /// At the beginning of a connection.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            limits,
            state: State::Head,
            facts: Facts::default(),
            line: 0,
            searched: 0,
            lines: 0,
            leading: 0,
            request_line: (0, 0),
            extensions: 0,
            trailers: 0,
            heads: 0,
        }
    }

    /// Complete heads seen so far.
    pub fn heads(&self) -> u32 {
        self.heads
    }

    fn position(&self) -> Position {
        match self.state {
            State::Head if self.searched == 0 => Position::Between,
            State::Head => Position::Head,
            State::Length(_) | State::Chunk(_) => Position::Body,
            State::Waiting => Position::Waiting,
            State::Blind => Position::Blind,
        }
    }

    /// Follows `bytes`, which begin where the last scan's taken bytes ended. Returns how many may go on.
    fn scan(&mut self, bytes: &[u8]) -> (usize, Option<Stop>) {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.get(at..).unwrap_or_default();
            match self.state {
                State::Head => match self.head(rest) {
                    Ok(Some(length)) if std::mem::take(&mut self.facts.encode) => {
                        return (at, Some(Stop::Encode(length)));
                    }
                    Ok(Some(length)) => at += length,
                    Ok(None) => return (at, Some(Stop::Partial)),
                    Err(violation) => {
                        self.state = State::Blind;
                        return (at, Some(Stop::Head(violation)));
                    }
                },
                State::Length(left) => {
                    let taken = left.min(rest.len() as u64);
                    at += taken as usize;
                    self.state = if taken == left { self.after_body() } else { State::Length(left - taken) };
                }
                State::Chunk(chunk) => match self.chunk(chunk, rest) {
                    Ok((taken, state)) => {
                        at += taken;
                        self.state = state;
                    }
                    Err(violation) => {
                        self.state = State::Blind;
                        return (at, Some(Stop::Body(violation)));
                    }
                },
                State::Waiting => return (at, Some(Stop::Waiting)),
                State::Blind => return (bytes.len(), None),
            }
        }
        (at, None)
    }

    /// Reads lines of a head that begins at `bytes`; its length once it is complete.
    fn head(&mut self, bytes: &[u8]) -> Result<Option<usize>, Violation> {
        loop {
            let from = self.searched.max(self.line);
            let Some(offset) = bytes.get(from..).and_then(|rest| memchr(b'\n', rest)) else {
                self.searched = bytes.len();
                self.within_limits(bytes.len())?;
                return Ok(None);
            };
            let lf = from + offset;
            self.searched = lf + 1;
            self.within_limits(lf + 1)?;
            let line = bytes.get(self.line..lf).and_then(|line| line.strip_suffix(b"\r"));
            let line = line.ok_or(Violation::LineEnd)?;
            let start = std::mem::replace(&mut self.line, lf + 1);
            if self.lines == 0 {
                if line.is_empty() {
                    self.leading += 1;
                    if self.leading > LEADING_LINES {
                        return Err(Violation::LeadingLines);
                    }
                    continue;
                }
                self.facts = request_line(line)?;
                self.request_line = (start, start + line.len());
                self.lines = 1;
            } else if line.is_empty() {
                self.lines += 1;
                self.end_of_head(bytes.get(..=lf).unwrap_or_default())?;
                return Ok(Some(lf + 1));
            } else {
                if self.lines > self.limits.fields {
                    return Err(Violation::TooManyFields);
                }
                self.lines += 1;
                self.field(line)?;
            }
        }
    }

    fn within_limits(&self, length: usize) -> Result<(), Violation> {
        if self.lines == 0 && length > self.limits.line + usize::from(LEADING_LINES) * 2 {
            return Err(Violation::LineTooLong);
        }
        if length > self.limits.head {
            return Err(Violation::HeadTooLong);
        }
        Ok(())
    }

    fn field(&mut self, line: &[u8]) -> Result<(), Violation> {
        let end = line.iter().position(|b| !is_token(*b)).unwrap_or(line.len());
        let (Some(name), Some(b':')) = (line.get(..end), line.get(end)) else {
            return Err(Violation::FieldName);
        };
        // The length of a name tells most fields apart without looking at a letter.
        match end {
            0 => return Err(Violation::FieldName),
            4 if name.eq_ignore_ascii_case(b"host") => {
                self.facts.hosts = self.facts.hosts.saturating_add(1);
            }
            // The engine knows no upgrade in HTTP/1.0 either.
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.facts.switches |= !self.facts.http10,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let length = number(value(line, end)).ok_or(Violation::ContentLength)?;
                // Even the same number twice: whoever reads it next may not take it so calmly.
                if self.facts.length.replace(length).is_some() {
                    return Err(Violation::ContentLength);
                }
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.facts.chunked || !value(line, end).eq_ignore_ascii_case(b"chunked") {
                    return Err(Violation::TransferEncoding);
                }
                self.facts.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    fn end_of_head(&mut self, head: &[u8]) -> Result<(), Violation> {
        let facts = self.facts;
        // Every line ends with CR LF, which is known; one control byte more stands where none may.
        if controls(head) != 2 * (self.lines + usize::from(self.leading)) {
            let bare = head.iter().zip(head.iter().skip(1)).any(|(a, b)| *a == b'\r' && *b != b'\n');
            return Err(if bare { Violation::LineEnd } else { Violation::Control });
        }
        if facts.chunked && facts.length.is_some() {
            return Err(Violation::BothLengths);
        }
        if facts.chunked && facts.http10 {
            return Err(Violation::TransferEncoding);
        }
        if facts.hosts > 1 || (facts.hosts == 0 && !facts.http10) {
            return Err(Violation::Host);
        }
        self.heads = self.heads.wrapping_add(1);
        self.forget_head();
        self.state = match facts.length {
            _ if facts.chunked => State::Chunk(Chunk::Size { value: 0, digits: 0 }),
            Some(length @ 1..) => State::Length(length),
            _ => self.after_body(),
        };
        Ok(())
    }

    fn forget_head(&mut self) {
        (self.line, self.searched, self.lines, self.leading) = (0, 0, 0, 0);
        (self.extensions, self.trailers) = (0, 0);
    }

    fn after_body(&self) -> State {
        if self.facts.switches { State::Waiting } else { State::Head }
    }

    /// One step in a chunked body: bytes used and the state after them.
    fn chunk(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<(usize, State), Violation> {
        let Some(&byte) = bytes.first() else { return Ok((0, State::Chunk(chunk))) };
        let next = match chunk {
            Chunk::Data(left) => {
                let taken = left.min(bytes.len() as u64);
                let next = if taken == left { Chunk::DataCr } else { Chunk::Data(left - taken) };
                return Ok((taken as usize, State::Chunk(next)));
            }
            Chunk::Size { value, digits } => match (hex(byte), byte) {
                (Some(_), _) if digits == CHUNK_DIGITS => return Err(Violation::ChunkSize),
                (Some(digit), _) => {
                    let value = value.checked_mul(16).ok_or(Violation::ChunkSize)? + u64::from(digit);
                    Chunk::Size { value, digits: digits + 1 }
                }
                (None, _) if digits == 0 => return Err(Violation::ChunkSize),
                (None, b';') => Chunk::Extension(value),
                (None, b'\r') => Chunk::SizeEnd(value),
                (None, _) => return Err(Violation::ChunkSize),
            },
            Chunk::Extension(value) => match byte {
                b'\r' => Chunk::SizeEnd(value),
                _ if is_control(byte) || self.extensions >= EXTENSIONS => {
                    return Err(Violation::ChunkExtension);
                }
                _ => {
                    self.extensions += 1;
                    Chunk::Extension(value)
                }
            },
            Chunk::SizeEnd(value) => match (byte, value) {
                (b'\n', 0) => Chunk::TrailerStart,
                (b'\n', value) => Chunk::Data(value),
                _ => return Err(Violation::ChunkSize),
            },
            Chunk::DataCr if byte == b'\r' => Chunk::DataLf,
            Chunk::DataLf if byte == b'\n' => Chunk::Size { value: 0, digits: 0 },
            Chunk::DataCr | Chunk::DataLf => return Err(Violation::ChunkEnd),
            Chunk::TrailerStart if byte == b'\r' => Chunk::End,
            // A trailer line begins with its name: no space (folding) and no colon.
            Chunk::TrailerStart if !is_token(byte) => return Err(Violation::Trailers),
            Chunk::TrailerStart | Chunk::Trailer => {
                self.trailers += 1;
                match byte {
                    b'\r' => Chunk::TrailerLf,
                    _ if is_control(byte) || self.trailers > self.limits.head => {
                        return Err(Violation::Trailers);
                    }
                    _ => Chunk::Trailer,
                }
            }
            Chunk::TrailerLf if byte == b'\n' => Chunk::TrailerStart,
            Chunk::End if byte == b'\n' => return Ok((1, self.after_body())),
            Chunk::TrailerLf | Chunk::End => return Err(Violation::Trailers),
        };
        Ok((1, State::Chunk(next)))
    }
}

fn request_line(line: &[u8]) -> Result<Facts, Violation> {
    let method_end = line.iter().position(|b| !is_token(*b)).ok_or(Violation::RequestLine)?;
    let (method, rest) = line.split_at_checked(method_end).ok_or(Violation::RequestLine)?;
    let rest = rest.strip_prefix(b" ").ok_or(Violation::RequestLine)?;
    let end = rest.len().checked_sub(b" HTTP/1.1".len()).ok_or(Violation::RequestLine)?;
    let (target, version) = rest.split_at_checked(end).ok_or(Violation::RequestLine)?;
    let http10 = match version {
        b" HTTP/1.1" => false,
        b" HTTP/1.0" => true,
        _ => return Err(Violation::RequestLine),
    };
    if method.is_empty() || target.is_empty() {
        return Err(Violation::RequestLine);
    }
    let kinds = target.iter().fold(0, |kinds, byte| kinds | kind(*byte));
    if kinds & NOWHERE != 0 {
        return Err(Violation::RequestLine);
    }
    if kinds & FRAGMENT != 0 {
        return Err(Violation::Target);
    }
    Ok(Facts { http10, switches: method == b"CONNECT", encode: kinds & ODD != 0, ..Facts::default() })
}

/// A head whose request line is at `start..end`, with the odd bytes of its target encoded.
fn encoded(head: &[u8], start: usize, end: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(head.len() + 64);
    for (at, byte) in head.iter().enumerate() {
        if (start..end).contains(&at) && kind(*byte) & ODD != 0 {
            let digit = |value: u8| {
                char::from_digit(u32::from(value), 16).map_or(b'0', |c| c.to_ascii_uppercase() as u8)
            };
            out.extend([b'%', digit(byte >> 4), digit(byte & 15)]);
        } else {
            out.push(*byte);
        }
    }
    out
}

/// Digits only, and it fits: no sign, no list, no space inside, not empty.
fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| {
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// The value behind the colon at `colon`, without the space around it.
fn value(line: &[u8], colon: usize) -> &[u8] {
    let mut value = line.get(colon + 1..).unwrap_or_default();
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

fn is_control(byte: u8) -> bool {
    (byte < b' ' && byte != b'\t') || byte == 0x7f
}

/// How many control bytes there are. In blocks that a byte can count, so that the compiler looks at sixteen at once.
fn controls(bytes: &[u8]) -> usize {
    let block = |block: &[u8]| {
        block
            .iter()
            .fold(0u8, |count, byte| count + u8::from(((*byte < b' ') & (*byte != b'\t')) | (*byte == 0x7f)))
    };
    bytes.chunks(128).map(|bytes| usize::from(block(bytes))).sum()
}

/// A byte that a method or field name may have (`tchar` of RFC 9110).
const TOKEN: u8 = 1;
/// A byte that a request target may not have: controls and the space.
const NOWHERE: u8 = 2;
/// What begins a fragment.
const FRAGMENT: u8 = 4;
/// A byte that may not stand in a URI but that clients send, as `?filter={"a":1}`. It goes on percent-encoded.
const ODD: u8 = 8;

#[expect(clippy::indexing_slicing, reason = "a byte is below 256, and the compiler runs this")]
const KINDS: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0u8;
    loop {
        table[byte as usize] = match byte {
            b'#' => TOKEN | FRAGMENT,
            b'`' => TOKEN | ODD,
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => TOKEN,
            b'!' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'|' | b'~' => {
                TOKEN
            }
            b'"' | b'<' | b'>' | 0x80.. => ODD,
            0..=b' ' | 0x7f => NOWHERE,
            _ => 0,
        };
        if byte == 255 {
            break table;
        }
        byte += 1;
    }
};

fn kind(byte: u8) -> u8 {
    KINDS.get(usize::from(byte)).copied().unwrap_or(NOWHERE)
}

fn is_token(byte: u8) -> bool {
    kind(byte) & TOKEN != 0
}

/// What the reader behind the guard gets to know, once a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which request of the connection is refused, counted from 1.
    pub request: u32,
    /// Why.
    pub violation: Violation,
}

/// The framing parser with what it holds back, between a transport and the engine.
#[derive(Debug)]
pub struct Guard {
    framing: Framing,
    /// Bytes that are not passed on yet: the beginning of a head, or what follows a switch of protocols.
    held: Vec<u8>,
    /// Bytes that are to be passed on before anything else, from `sent` on.
    ready: Vec<u8>,
    sent: usize,
    refusal: Option<Refusal>,
    broken: Option<Violation>,
}

impl Guard {
    /// At the beginning of a connection.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            framing: Framing::new(limits),
            held: Vec::new(),
            ready: Vec::new(),
            sent: 0,
            refusal: None,
            broken: None,
        }
    }

    /// Where in a request the connection stands, seen from the client's side.
    pub fn position(&self) -> Position {
        self.framing.position()
    }

    /// The request that was replaced because it is refused, if there was one.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal
    }

    /// Whether the bytes belong to another protocol by now.
    pub fn is_tunnel(&self) -> bool {
        self.position() == Position::Blind && self.refusal.is_none() && self.broken.is_none()
    }

    /// Whether every byte that came has been passed on.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.sent >= self.ready.len()
    }

    /// Whether there is something to pass on without reading.
    pub fn is_ready(&self) -> bool {
        self.sent < self.ready.len() || self.broken.is_some()
    }

    /// Takes bytes that somebody else read from the transport.
    pub fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
        self.rescan();
    }

    /// Takes back bytes that were passed on and not used.
    pub fn put_back(&mut self, bytes: &[u8]) {
        let rest = self.ready.get(self.sent..).unwrap_or_default();
        (self.ready, self.sent) = ([bytes, rest].concat(), 0);
    }

    /// Gives up on a head that is not complete: it is refused as it stands.
    pub fn expire(&mut self) {
        if self.framing.position() == Position::Head && self.refusal.is_none() {
            let line = self.refused_line(&self.held);
            self.framing.state = State::Blind;
            self.held = Vec::new();
            self.refuse(Violation::Slow, &line);
        }
    }

    /// The answer to a request that asked to switch protocols: from here on a tunnel, or the next request.
    pub fn switched(&mut self, tunnel: bool) {
        if self.framing.state != State::Waiting {
            return;
        }
        self.framing.state = if tunnel { State::Blind } else { State::Head };
        self.rescan();
    }

    /// Reads from `io` what may go on.
    ///
    /// # Errors
    /// Those of `io`, and `InvalidData` with the [`Violation`] for a body that is broken.
    pub fn poll_read<T: AsyncRead>(
        &mut self,
        mut io: Pin<&mut T>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if let Some(ready) = self.ready.get(self.sent..).filter(|ready| !ready.is_empty()) {
                let taken = ready.len().min(buf.remaining());
                buf.put_slice(ready.get(..taken).unwrap_or_default());
                self.sent += taken;
                if self.sent == self.ready.len() {
                    (self.ready, self.sent) = (Vec::new(), 0);
                }
                return Poll::Ready(Ok(()));
            }
            if let Some(violation) = self.broken {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
            }
            if self.refusal.is_some() || (self.framing.state == State::Waiting && !self.held.is_empty()) {
                // Past a refused request nothing is read; behind a switch, what came waits for its answer, and
                // whoever gives it wakes the connection.
                return Poll::Pending;
            }
            let before = buf.filled().len();
            ready!(io.as_mut().poll_read(cx, buf))?;
            if buf.filled().len() == before {
                return Poll::Ready(Ok(()));
            }
            self.take(buf, before);
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Judges what was just read into `buf`, and leaves only what may go on.
    fn take(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let fresh = buf.filled().get(before..).unwrap_or_default();
        if !self.held.is_empty() {
            self.held.extend_from_slice(fresh);
            buf.set_filled(before);
            return self.rescan();
        }
        let (taken, stop) = self.framing.scan(fresh);
        let Some(stop) = stop else { return };
        let rest = fresh.get(taken..).unwrap_or_default();
        match stop {
            Stop::Partial | Stop::Waiting => self.held.extend_from_slice(rest),
            Stop::Head(violation) => {
                let line = self.refused_line(rest);
                self.refuse(violation, &line);
            }
            Stop::Body(violation) => self.broken = Some(violation),
            Stop::Encode(length) => {
                let (start, end) = self.framing.request_line;
                self.ready.extend(encoded(rest.get(..length).unwrap_or_default(), start, end));
                self.held.extend_from_slice(rest.get(length..).unwrap_or_default());
                buf.set_filled(before + taken);
                return self.rescan();
            }
        }
        buf.set_filled(before + taken);
    }

    /// Judges what is held, and moves to `ready` what may go on.
    fn rescan(&mut self) {
        let held = std::mem::take(&mut self.held);
        let mut at = 0;
        while at < held.len() {
            let left = held.get(at..).unwrap_or_default();
            let (taken, stop) = self.framing.scan(left);
            if self.ready.is_empty() && taken == held.len() {
                // The usual case: one head in pieces, and all of it may go on.
                self.ready = held;
                return;
            }
            let (good, rest) = left.split_at_checked(taken).unwrap_or((left, &[]));
            self.ready.extend_from_slice(good);
            match stop {
                None => return,
                Some(Stop::Partial | Stop::Waiting) => {
                    self.held = if at + taken == 0 { held } else { rest.to_vec() };
                    return;
                }
                Some(Stop::Head(violation)) => {
                    let line = self.refused_line(rest);
                    return self.refuse(violation, &line);
                }
                Some(Stop::Body(violation)) => {
                    self.broken = Some(violation);
                    return;
                }
                Some(Stop::Encode(length)) => {
                    let (start, end) = self.framing.request_line;
                    self.ready.extend(encoded(rest.get(..length).unwrap_or_default(), start, end));
                    at += taken + length;
                }
            }
        }
    }

    /// Method and target of a refused head, for the log, as far as they are good.
    fn refused_line(&self, head: &[u8]) -> Vec<u8> {
        let (start, end) = self.framing.request_line;
        let line = head.get(start..end).filter(|_| self.framing.lines > 0 && !self.framing.facts.switches);
        let words = line.and_then(|line| line.strip_suffix(b" HTTP/1.1").or(line.strip_suffix(b" HTTP/1.0")));
        words.unwrap_or(b"GET /").to_vec()
    }

    fn refuse(&mut self, violation: Violation, line: &[u8]) {
        self.refusal = Some(Refusal { request: self.framing.heads.wrapping_add(1), violation });
        self.ready.extend_from_slice(line);
        // Without Host: whoever looks no further refuses it for that.
        self.ready.extend_from_slice(b" HTTP/1.1\r\nConnection: close\r\n\r\n");
    }
}

#[cfg(test)]
mod tests;
