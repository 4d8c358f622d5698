//! A stream of messages as JSON: an array, lines, or events, as the client accepts.
//!
//! Each message leaves as it comes. A call that fails after its first message ends with `{"error": ...}`.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body::{Body as HttpBody, Frame};
use layers::body::{Body, BodyError};
use prost_reflect::{MessageDescriptor, SerializeOptions};
use serde_json::json;

use super::decode;
use crate::support::grpc::{self, Broken, Messages};

/// How a stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `[{...},{...}]`
    Array,
    /// A line for each message.
    Lines,
    /// A server-sent event for each message.
    Events,
}

impl Form {
    /// What the client accepts; an array unless it names one of the others.
    pub fn of(headers: &HeaderMap) -> Self {
        let accepts = |kind: &[u8]| {
            headers
                .get_all(header::ACCEPT)
                .iter()
                .any(|value| value.as_bytes().windows(kind.len()).any(|part| part.eq_ignore_ascii_case(kind)))
        };
        if accepts(b"text/event-stream") {
            Self::Events
        } else if accepts(b"application/x-ndjson") {
            Self::Lines
        } else {
            Self::Array
        }
    }

    /// The media type.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Array => "application/json",
            Self::Lines => "application/x-ndjson",
            Self::Events => "text/event-stream",
        }
    }
}

/// The body of `first` and what follows in `rest`.
pub fn body(
    form: Form,
    kind: MessageDescriptor,
    options: SerializeOptions,
    first: Option<Bytes>,
    rest: Option<(Body, Messages)>,
) -> Body {
    // Without a rest the call has ended well.
    let well = rest.is_none();
    let (body, messages) = rest.unwrap_or_default();
    Body::boxed(Streamed { form, kind, options, first, body, messages, end: None, well, begun: false, state: State::Reads })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Reads,
    /// The upstream has ended; what it has left is still written.
    Ends,
    Over,
}

struct Streamed {
    form: Form,
    kind: MessageDescriptor,
    options: SerializeOptions,
    first: Option<Bytes>,
    body: Body,
    messages: Messages,
    end: Option<HeaderMap>,
    /// It is known that the call has ended well.
    well: bool,
    begun: bool,
    state: State,
}

/// The stream cannot be read on.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("a message is not `{0}`")]
    NotMessage(String),
}

impl Streamed {
    fn next(&mut self) -> Result<Option<Bytes>, Failed> {
        let message = match self.first.take() {
            Some(message) => message,
            None => match self.messages.read()? {
                Some(message) => message,
                None => return Ok(None),
            },
        };
        let json = decode(&self.kind, &self.options, message);
        let json = json.ok_or_else(|| Failed::NotMessage(self.kind.full_name().to_owned()))?;
        Ok(Some(self.written(&json, "")))
    }

    fn written(&mut self, json: &[u8], event: &str) -> Bytes {
        let mut out = Vec::with_capacity(json.len() + 16);
        match self.form {
            Form::Array => {
                out.push(if self.begun { b',' } else { b'[' });
                out.extend_from_slice(json);
            }
            Form::Lines => {
                out.extend_from_slice(json);
                out.push(b'\n');
            }
            Form::Events => {
                out.extend_from_slice(event.as_bytes());
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(json);
                out.extend_from_slice(b"\n\n");
            }
        }
        self.begun = true;
        out.into()
    }

    /// What is written at the end.
    fn last(&mut self) -> Bytes {
        let end = self.end.take().unwrap_or_default();
        let failed = match grpc::status(&end) {
            Some(0) => None,
            Some(status) => Some((status, grpc::message(&end))),
            None if self.well => None,
            None => Some((2, "the answer has no status".to_owned())),
        };
        let mut out = Vec::new();
        if let Some((code, message)) = failed {
            let json = json!({"error": {"code": code, "message": message}}).to_string();
            out.extend_from_slice(&self.written(json.as_bytes(), "event: error\n"));
        }
        if self.form == Form::Array {
            out.extend_from_slice(if self.begun { b"]" } else { b"[]" });
        }
        out.into()
    }
}

impl HttpBody for Streamed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            if this.state == State::Over {
                return Poll::Ready(None);
            }
            match this.next() {
                Ok(Some(out)) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                Ok(None) => {}
                Err(error) => {
                    this.state = State::Over;
                    return Poll::Ready(Some(Err(error.into())));
                }
            }
            if this.state == State::Ends {
                if !this.messages.is_empty() {
                    this.state = State::Over;
                    return Poll::Ready(Some(Err(Broken::Cut.into())));
                }
                let last = this.last();
                this.state = State::Over;
                if !last.is_empty() {
                    return Poll::Ready(Some(Ok(Frame::data(last))));
                }
                continue;
            }
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => this.messages.take(&piece),
                    Err(frame) => {
                        this.end = frame.into_trailers().ok();
                        this.state = State::Ends;
                    }
                },
                Some(Err(error)) => {
                    this.state = State::Over;
                    return Poll::Ready(Some(Err(error)));
                }
                None => this.state = State::Ends,
            }
        }
    }
}
