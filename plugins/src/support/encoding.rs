//! Content codings: which answers are compressed, and a body that is compressed as it passes.
//!
//! Runs in `encode`, on the answer as it leaves. Pieces that take long to compress go to the blocking pool, one at a
//! time. What has been taken is sent on as soon as the upstream pauses, so that streams of events stay streams.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use config::fields::{List, Text};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use http_body::{Body as HttpBody, Frame};
use layers::body::{Body, BodyError};
use layers::exchange::{Exchange, State};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use tokio::task::JoinHandle;

/// Which kinds of content are compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Types {
    /// These media types.
    These(List<Text<1, 256>>),
    /// Whatever has a type: `"*"`.
    All(All),
}

/// `"*"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum All {
    /// Every type.
    #[serde(rename = "*")]
    Star,
}

impl Default for Types {
    fn default() -> Self {
        let html = Text::new("text/html").into_iter().collect();
        List::new(html).map_or(Self::All(All::Star), Self::These)
    }
}

impl JsonSchema for Types {
    fn schema_name() -> Cow<'static, str> {
        "Types".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            {"enum": ["*"]},
        ]})
    }
}

/// The least version of HTTP that the client speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LeastVersion {
    /// `1.0`
    Http10,
    /// `1.1`
    #[default]
    Http11,
}

impl Serialize for LeastVersion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(if *self == Self::Http10 { 1.0 } else { 1.1 })
    }
}

impl<'de> Deserialize<'de> for LeastVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match f64::deserialize(deserializer)? {
            1.0 => Ok(Self::Http10),
            1.1 => Ok(Self::Http11),
            _ => Err(de::Error::custom("write 1.1 or 1.0")),
        }
    }
}

impl JsonSchema for LeastVersion {
    fn schema_name() -> Cow<'static, str> {
        "LeastVersion".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"enum": [1.1, 1.0]})
    }
}

/// Which answers are compressed.
#[derive(Debug)]
pub struct Rules {
    /// The coding's name in `Accept-Encoding` and `Content-Encoding`.
    pub coding: &'static str,
    /// Which kinds of content.
    pub types: Types,
    /// From this announced length on; an answer that announces none is compressed.
    pub min_length: u32,
    /// The least version of the client.
    pub http_version: LeastVersion,
    /// Name `Accept-Encoding` in `Vary`.
    pub vary: bool,
    /// The statuses of answers that are compressed; any if there are none.
    pub statuses: &'static [StatusCode],
}

/// Fields that are true of the body as it was.
const OF_THE_BODY: [HeaderName; 5] = [
    header::CONTENT_LENGTH,
    header::ACCEPT_RANGES,
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("digest"),
];

impl Rules {
    /// Whether the answer is to be compressed for this client. Sets `Vary` where another client would get another form.
    pub fn apply(&self, x: &mut Exchange) -> bool {
        if !self.takes(x) {
            return false;
        }
        if self.vary {
            vary(x.response.headers_mut());
        }
        let asked = x.slot::<Asked>().map(|asked| &asked.0);
        accepts([&x.request.headers].into_iter().chain(asked), self.coding)
    }

    fn takes(&self, x: &State) -> bool {
        let (head, status) = (x.response.headers(), x.response.status());
        let version = match self.http_version {
            LeastVersion::Http10 => Version::HTTP_10,
            LeastVersion::Http11 => Version::HTTP_11,
        };
        let whole = status.as_u16() >= 200
            && !matches!(
                status,
                StatusCode::NO_CONTENT
                    | StatusCode::RESET_CONTENT
                    | StatusCode::NOT_MODIFIED
                    | StatusCode::PARTIAL_CONTENT
            )
            && x.request.method != Method::HEAD
            && !head.contains_key(header::CONTENT_RANGE);
        whole
            && (self.statuses.is_empty() || self.statuses.contains(&status))
            && x.request.version >= version
            && !head.contains_key(header::CONTENT_ENCODING)
            && !no_transform(head)
            && self.fits_type(head)
            && length(head).is_none_or(|length| length >= u64::from(self.min_length))
            && !x.response.body().is_empty()
    }

    fn fits_type(&self, head: &HeaderMap) -> bool {
        let Some(kind) = head.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes) else { return false };
        let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        // A gRPC message is compressed by itself, or not at all.
        if kind.starts_with(b"application/grpc") {
            return false;
        }
        match &self.types {
            Types::All(_) => true,
            Types::These(types) => types.iter().any(|one| one.as_bytes().eq_ignore_ascii_case(kind)),
        }
    }

    /// Puts `coder` between the answer's body and the client, and sets the fields that tell of it.
    pub fn encode(&self, x: &mut Exchange, coder: Box<dyn Coder>) {
        let streams = length(x.response.headers()).is_none();
        let headers = x.response.headers_mut();
        for name in OF_THE_BODY {
            headers.remove(name);
        }
        weaken(headers);
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(self.coding));
        let body = std::mem::take(x.response.body_mut());
        *x.response.body_mut() = Body::boxed(Encoded::new(body, coder, streams));
    }
}

/// The length that the answer announces.
fn length(head: &HeaderMap) -> Option<u64> {
    head.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

fn no_transform(head: &HeaderMap) -> bool {
    head.get_all(header::CACHE_CONTROL).iter().any(|value| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .any(|word| word.trim_ascii().eq_ignore_ascii_case(b"no-transform"))
    })
}

/// A validator of the plain body is only weakly one of the compressed.
fn weaken(headers: &mut HeaderMap) {
    let Some(tag) = headers.get(header::ETAG).map(HeaderValue::as_bytes) else { return };
    if tag.starts_with(b"W/") {
        return;
    }
    let weak = [b"W/", tag].concat();
    match HeaderValue::from_bytes(&weak) {
        Ok(weak) if tag.starts_with(b"\"") => headers.insert(header::ETAG, weak),
        _ => headers.remove(header::ETAG),
    };
}

/// Adds `Accept-Encoding` to `Vary`, once.
pub fn vary(headers: &mut HeaderMap) {
    let named = headers.get_all(header::VARY).iter().any(|value| {
        value.as_bytes().split(|byte| *byte == b',').any(|name| {
            let name = name.trim_ascii();
            name == b"*" || name.eq_ignore_ascii_case(b"accept-encoding")
        })
    });
    if !named {
        headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
}

/// `Accept-Encoding` of the client, where the upstream does not get it.
#[derive(Default)]
struct Asked(HeaderMap);

/// Asks the upstream for a body that can be read. What the client takes still counts when the answer is compressed.
pub fn ask_plainly(x: &mut Exchange) {
    let http::header::Entry::Occupied(fields) = x.request.headers.entry(header::ACCEPT_ENCODING) else {
        return;
    };
    let (name, values) = fields.remove_entry_mult();
    let values: Vec<HeaderValue> = values.collect();
    if let Some(asked) = x.slot_mut::<Asked>() {
        for value in values {
            asked.0.append(name.clone(), value);
        }
    }
}

/// Whether the client takes the coding: named, or by `*`, with a quality above zero (RFC 9110, 12.5.3).
fn accepts<'a>(said: impl IntoIterator<Item = &'a HeaderMap>, coding: &str) -> bool {
    let mut star = false;
    for value in said.into_iter().flat_map(|headers| headers.get_all(header::ACCEPT_ENCODING)) {
        for offer in value.as_bytes().split(|byte| *byte == b',') {
            let mut parts = offer.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
            let name = parts.next().unwrap_or_default();
            let wanted = !parts.any(is_zero);
            if name.eq_ignore_ascii_case(coding.as_bytes()) {
                return wanted;
            }
            star |= name == b"*" && wanted;
        }
    }
    star
}

/// `q=0`, `q=0.0`.
fn is_zero(parameter: &[u8]) -> bool {
    match parameter.split_at_checked(2) {
        Some((name, value)) if name.eq_ignore_ascii_case(b"q=") => {
            !value.is_empty() && value.iter().all(|byte| matches!(byte, b'0' | b'.'))
        }
        _ => false,
    }
}

/// What a coder does with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// More will come.
    Continue,
    /// What was taken has to be readable now.
    Flush,
    /// That was all.
    Finish,
}

/// A compressor.
pub trait Coder: Send + 'static {
    /// Takes a piece and appends what is ready to `out`.
    ///
    /// # Errors
    /// The compressor refuses; the answer is broken off.
    fn code(&mut self, piece: &[u8], then: Then, out: &mut Vec<u8>) -> std::io::Result<()>;

    /// Bytes that take about 100 µs.
    fn quick(&self) -> usize;
}

enum Work {
    Idle(Box<dyn Coder>),
    Busy(JoinHandle<Coded>, Then),
    /// All is out but the trailers.
    Done,
}

type Coded = (Box<dyn Coder>, std::io::Result<Vec<u8>>);

/// A body that is compressed as it passes.
struct Encoded {
    body: Body,
    work: Work,
    /// Bytes taken since the coder was last emptied.
    held: usize,
    /// The body turned out long: the rest of the work is done elsewhere.
    heavy: bool,
    /// Empty the coder when the upstream pauses.
    streams: bool,
    trailers: Option<Frame<Bytes>>,
}

impl Encoded {
    fn new(body: Body, coder: Box<dyn Coder>, streams: bool) -> Self {
        Self { body, work: Work::Idle(coder), held: 0, heavy: false, streams, trailers: None }
    }

    /// Codes here if it is quick, else elsewhere; what is ready now.
    fn code(&mut self, piece: Bytes, then: Then) -> std::io::Result<Bytes> {
        let Work::Idle(mut coder) = std::mem::replace(&mut self.work, Work::Done) else {
            return Ok(Bytes::new());
        };
        self.held = self.held.saturating_add(piece.len());
        self.heavy |= self.held > coder.quick();
        if self.heavy {
            let job = tokio::task::spawn_blocking(move || {
                let mut out = Vec::new();
                let result = coder.code(&piece, then, &mut out);
                (coder, result.map(|()| out))
            });
            self.work = Work::Busy(job, then);
            return Ok(Bytes::new());
        }
        let mut out = Vec::new();
        coder.code(&piece, then, &mut out)?;
        self.coded(coder, then);
        Ok(out.into())
    }

    fn coded(&mut self, coder: Box<dyn Coder>, then: Then) {
        if then != Then::Continue {
            self.held = 0;
        }
        self.work = if then == Then::Finish { Work::Done } else { Work::Idle(coder) };
    }
}

impl HttpBody for Encoded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            let ready = match &mut this.work {
                Work::Done => return Poll::Ready(this.trailers.take().map(Ok)),
                Work::Busy(job, then) => {
                    let then = *then;
                    match ready!(Pin::new(job).poll(cx)) {
                        Ok((coder, result)) => {
                            this.coded(coder, then);
                            result.map(Bytes::from)
                        }
                        Err(error) => Err(std::io::Error::other(error)),
                    }
                }
                Work::Idle(_) => match Pin::new(&mut this.body).poll_frame(cx) {
                    Poll::Pending if this.streams && this.held > 0 => this.code(Bytes::new(), Then::Flush),
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(Err(error))) => {
                        // Not finished: a client must not take the part for the whole.
                        this.work = Work::Done;
                        return Poll::Ready(Some(Err(error)));
                    }
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(piece) => this.code(piece, Then::Continue),
                        Err(trailers) => {
                            this.trailers = Some(trailers);
                            this.code(Bytes::new(), Then::Finish)
                        }
                    },
                    Poll::Ready(None) => this.code(Bytes::new(), Then::Finish),
                },
            };
            match ready {
                Ok(out) if out.is_empty() => {}
                Ok(out) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                Err(error) => {
                    this.work = Work::Done;
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coding_is_taken_as_the_client_says() {
        let cases = [
            ("gzip", true),
            ("GZIP;q=0.5", true),
            ("br, gzip", true),
            ("*", true),
            ("gzip;q=0", false),
            ("gzip; q=0.000", false),
            ("*;q=0", false),
            ("gzip;q=0, *", false),
            ("*, gzip;q=0", false),
            ("identity", false),
            ("xgzip", false),
            ("", false),
        ];
        for (offer, expected) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_str(offer).unwrap());
            assert_eq!(accepts([&headers], "gzip"), expected, "{offer}");
        }
        assert!(!accepts([&HeaderMap::new()], "gzip"));
    }

    #[test]
    fn tags_become_weak() {
        for (before, after) in [("\"a\"", Some("W/\"a\"")), ("W/\"a\"", Some("W/\"a\"")), ("odd", None)] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ETAG, HeaderValue::from_static(before));
            weaken(&mut headers);
            assert_eq!(headers.get(header::ETAG).map(|tag| tag.to_str().unwrap()), after);
        }
    }

    #[test]
    fn vary_names_the_field_once() {
        for (before, after) in
            [("", 2), ("accept-encoding", 1), ("Origin, Accept-Encoding", 1), ("*", 1), ("Origin", 2)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(header::VARY, HeaderValue::from_static(before));
            vary(&mut headers);
            assert_eq!(headers.get_all(header::VARY).iter().count(), after, "{before}");
        }
    }
}
