//! How HTTP/1 requests are delimited, by strict rules: a head or a body that two readers could understand differently is
//! refused, with a reason. [`HeadReader`] reads a head line by line and remembers where things stand in it, [`Chunks`]
//! follows a chunked body. Neither copies anything nor does any IO, and a verdict does not depend on how the bytes came.

use std::fmt;
use std::ops::Range;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use memchr::memchr;

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

/// What the fields of a head say about its message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// `Content-Length`.
    pub length: Option<u64>,
    /// `Transfer-Encoding: chunked`.
    pub chunked: bool,
    /// The request is of HTTP/1.0.
    pub http10: bool,
    /// A switch of protocols is asked for, by `Upgrade`. HTTP/1.0 has none.
    pub switches: bool,
    /// The method is `CONNECT`.
    pub connect: bool,
    /// `Connection: close`.
    pub close: bool,
    /// `Connection: keep-alive`.
    pub keep_alive: bool,
    /// `Expect: 100-continue`.
    pub expects: bool,
    /// `TE: trailers`.
    pub trailers: bool,
    /// The target has bytes that go on percent-encoded.
    pub encode: bool,
}

/// Where a field stands in its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    name: (u32, u32),
    value: (u32, u32),
}

impl Place {
    /// Its name.
    pub fn name(&self) -> Range<usize> {
        self.name.0 as usize..self.name.1 as usize
    }

    /// Its value, without the space around it.
    pub fn value(&self) -> Range<usize> {
        self.value.0 as usize..self.value.1 as usize
    }
}

/// Reads one head after the other.
#[derive(Debug)]
pub struct HeadReader {
    limits: HeadLimits,
    facts: Facts,
    hosts: u8,
    /// Offset of the line being read.
    line: usize,
    /// Offset up to which no line end was found.
    searched: usize,
    /// Lines that are read, the request line included.
    lines: usize,
    leading: u8,
    /// Where the method and the target stand, once the request line is known to be good.
    method: (usize, usize),
    target: (usize, usize),
    fields: Vec<Place>,
}

impl HeadReader {
    /// Before the first byte of a head.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            limits,
            facts: Facts::default(),
            hosts: 0,
            line: 0,
            searched: 0,
            lines: 0,
            leading: 0,
            method: (0, 0),
            target: (0, 0),
            fields: Vec::new(),
        }
    }

    /// Before the first byte of the next head.
    pub fn restart(&mut self) {
        (self.line, self.searched, self.lines, self.leading) = (0, 0, 0, 0);
        self.fields.clear();
    }

    /// What is known of the message so far.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Where the method and the target stand, if the request line has been read and is good.
    pub fn request_line(&self) -> Option<(Range<usize>, Range<usize>)> {
        (self.lines > 0).then_some((self.method.0..self.method.1, self.target.0..self.target.1))
    }

    /// Where the fields stand that have been read.
    pub fn fields(&self) -> &[Place] {
        &self.fields
    }

    /// Reads on in `bytes`, which begin with the head and may have grown since the last time. Gives its length once it is
    /// complete.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<usize>, Violation> {
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
                self.request(line, start)?;
                self.lines = 1;
            } else if line.is_empty() {
                self.lines += 1;
                self.end(bytes.get(..=lf).unwrap_or_default())?;
                return Ok(Some(lf + 1));
            } else {
                if self.lines > self.limits.fields {
                    return Err(Violation::TooManyFields);
                }
                self.lines += 1;
                self.field(line, start)?;
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

    fn request(&mut self, line: &[u8], start: usize) -> Result<(), Violation> {
        let RequestLine { method, target, facts } = request_line(line)?;
        self.method = (start, start + method);
        self.target = (start + method + 1, start + method + 1 + target);
        (self.facts, self.hosts) = (facts, 0);
        Ok(())
    }

    fn field(&mut self, line: &[u8], start: usize) -> Result<(), Violation> {
        let end = name_length(line).ok_or(Violation::FieldName)?;
        let name = line.get(..end).unwrap_or_default();
        let (from, to) = value_range(line, end);
        let value = line.get(from..to).unwrap_or_default();
        // The length of a name tells most fields apart without looking at a letter.
        match end {
            2 if name.eq_ignore_ascii_case(b"te") => {
                self.facts.trailers |= has_token(value, b"trailers");
            }
            4 if name.eq_ignore_ascii_case(b"host") => {
                self.hosts = self.hosts.saturating_add(1);
            }
            6 if name.eq_ignore_ascii_case(b"expect") => {
                self.facts.expects |= value.eq_ignore_ascii_case(b"100-continue");
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.facts.switches |= !self.facts.http10,
            10 if name.eq_ignore_ascii_case(b"connection") => {
                self.facts.close |= has_token(value, b"close");
                self.facts.keep_alive |= has_token(value, b"keep-alive");
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let length = number(value).ok_or(Violation::ContentLength)?;
                // Even the same number twice: whoever reads it next may not take it so calmly.
                if self.facts.length.replace(length).is_some() {
                    return Err(Violation::ContentLength);
                }
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.facts.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Violation::TransferEncoding);
                }
                self.facts.chunked = true;
            }
            _ => {}
        }
        let at = |offset: usize| u32::try_from(start + offset).map_err(|_| Violation::HeadTooLong);
        self.fields.push(Place { name: (at(0)?, at(end)?), value: (at(from)?, at(to)?) });
        Ok(())
    }

    fn end(&mut self, head: &[u8]) -> Result<(), Violation> {
        let facts = &self.facts;
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
        if self.hosts > 1 || (self.hosts == 0 && !facts.http10) {
            return Err(Violation::Host);
        }
        Ok(())
    }
}

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
    Over,
}

/// What the next bytes of a chunked body are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// So many are sizes, extensions and trailers.
    Framing(usize),
    /// So many are data.
    Data(usize),
    /// The body is over; none of them belong to it.
    Over,
}

/// Follows a chunked body.
#[derive(Debug)]
pub struct Chunks {
    limits: HeadLimits,
    state: Chunk,
    extensions: u32,
    /// The lines of the trailers.
    trailers: Vec<u8>,
}

impl Chunks {
    /// Before the first chunk.
    pub fn new(limits: HeadLimits) -> Self {
        Self { limits, state: Chunk::Size { value: 0, digits: 0 }, extensions: 0, trailers: Vec::new() }
    }

    /// Whether the body is over.
    pub fn is_over(&self) -> bool {
        self.state == Chunk::Over
    }

    /// Judges the bytes behind those that were taken so far. Never nothing of some bytes, unless the body is over.
    ///
    /// # Errors
    /// Why the body is refused.
    pub fn next(&mut self, bytes: &[u8]) -> Result<Part, Violation> {
        let mut framing = 0;
        for &byte in bytes {
            match self.state {
                Chunk::Data(_) | Chunk::Over => break,
                state => self.state = self.step(state, byte)?,
            }
            framing += 1;
        }
        match self.state {
            Chunk::Over if framing == 0 => Ok(Part::Over),
            Chunk::Data(left) if framing == 0 => {
                let taken = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
                let left = left - taken as u64;
                self.state = if left == 0 { Chunk::DataCr } else { Chunk::Data(left) };
                Ok(Part::Data(taken))
            }
            _ => Ok(Part::Framing(framing)),
        }
    }

    /// The fields behind the last chunk, once the body is over.
    ///
    /// # Errors
    /// They are malformed, or too many.
    pub fn trailers(&mut self) -> Result<Option<HeaderMap>, Violation> {
        if self.trailers.is_empty() {
            return Ok(None);
        }
        let lines = std::mem::take(&mut self.trailers);
        let mut fields = HeaderMap::new();
        for line in lines.split(|byte| *byte == b'\n') {
            let Some(line) = line.strip_suffix(b"\r") else { continue };
            let end = name_length(line).ok_or(Violation::Trailers)?;
            let (from, to) = value_range(line, end);
            let name = HeaderName::from_bytes(line.get(..end).unwrap_or_default());
            let value = HeaderValue::from_bytes(line.get(from..to).unwrap_or_default());
            let (Ok(name), Ok(value)) = (name, value) else { return Err(Violation::Trailers) };
            if fields.len() >= self.limits.fields {
                return Err(Violation::Trailers);
            }
            fields.append(name, value);
        }
        Ok(Some(fields))
    }

    fn step(&mut self, state: Chunk, byte: u8) -> Result<Chunk, Violation> {
        Ok(match state {
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
                let control = is_control(byte) && byte != b'\r';
                if control || self.trailers.len() >= self.limits.head {
                    return Err(Violation::Trailers);
                }
                self.trailers.push(byte);
                if byte == b'\r' { Chunk::TrailerLf } else { Chunk::Trailer }
            }
            Chunk::TrailerLf if byte == b'\n' => {
                self.trailers.push(byte);
                Chunk::TrailerStart
            }
            Chunk::End if byte == b'\n' => Chunk::Over,
            Chunk::TrailerLf | Chunk::End => return Err(Violation::Trailers),
            // Not asked for these.
            Chunk::Data(_) | Chunk::Over => state,
        })
    }
}

/// A good request line: how long its method and its target are, and what it says.
struct RequestLine {
    method: usize,
    target: usize,
    facts: Facts,
}

fn request_line(line: &[u8]) -> Result<RequestLine, Violation> {
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
    let facts = Facts { http10, connect: method == b"CONNECT", encode: kinds & ODD != 0, ..Facts::default() };
    Ok(RequestLine { method: method.len(), target: target.len(), facts })
}

/// A target with its odd bytes percent-encoded.
pub(crate) fn encoded(target: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(target.len() + 64);
    for byte in target {
        if kind(*byte) & ODD == 0 {
            out.push(*byte);
        } else {
            let digit = |value: u8| {
                char::from_digit(u32::from(value), 16).map_or(b'0', |c| c.to_ascii_uppercase() as u8)
            };
            out.extend([b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}

/// How long the name is that a line of a field begins with. None if there is none, or no colon right behind it.
fn name_length(line: &[u8]) -> Option<usize> {
    let end = line.iter().position(|b| !is_token(*b))?;
    (end > 0 && line.get(end) == Some(&b':')).then_some(end)
}

/// Whether a list has this word.
fn has_token(list: &[u8], token: &[u8]) -> bool {
    list.split(|byte| *byte == b',').any(|word| {
        let word = word.split(|byte| *byte == b';').next().unwrap_or_default();
        word.trim_ascii().eq_ignore_ascii_case(token)
    })
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

/// Where the value behind the colon at `colon` stands, without the space around it.
fn value_range(line: &[u8], colon: usize) -> (usize, usize) {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let (mut from, mut to) = (colon + 1, line.len());
    while line.get(from).is_some_and(blank) {
        from += 1;
    }
    while from < to && line.get(to - 1).is_some_and(blank) {
        to -= 1;
    }
    (from, to)
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

fn is_control(byte: u8) -> bool {
    (byte < b' ' && byte != b'\t') || byte == 0x7f
}

/// How many control bytes there are. In blocks that a byte can count and whose size is known, so that the compiler looks
/// at sixteen at once; the last one is filled up with spaces.
fn controls(bytes: &[u8]) -> usize {
    const BLOCK: usize = 32;
    fn count(block: &[u8; BLOCK]) -> usize {
        let count =
            |count, byte: &u8| count + u8::from(((*byte < b' ') & (*byte != b'\t')) | (*byte == 0x7f));
        usize::from(block.iter().fold(0u8, count))
    }
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    let mut last = [b' '; BLOCK];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    blocks.iter().map(count).sum::<usize>() + count(&last)
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

#[cfg(test)]
mod tests;
