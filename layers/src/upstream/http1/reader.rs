//! The answers of one connection, read from its bytes as they come. No IO.

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::Frame;
use memchr::memchr;

use super::Defect;
use super::body::Body;
use super::head::{self, Asked, Head, MAX_HEAD};

/// Heads that only inform (1xx) before an answer.
const MAX_INFORMATIONAL: u32 = 16;

/// What has come and was not taken, and where in an answer that is.
#[derive(Debug, Default)]
pub struct Reader {
    /// Bytes that were not looked at.
    ahead: Bytes,
    /// The beginning of a head that is not complete.
    begun: BytesMut,
    informed: u32,
    /// Fields of the last answer: the next one will have about as many.
    fields: usize,
    body: Body,
}

impl Reader {
    /// Bytes that follow all those that came before. To be called when they are needed.
    pub fn push(&mut self, bytes: Bytes) {
        if self.ahead.is_empty() {
            self.ahead = bytes;
        } else {
            let mut joined = BytesMut::from(std::mem::take(&mut self.ahead));
            joined.extend_from_slice(&bytes);
            self.ahead = joined.freeze();
        }
    }

    /// Nothing is here: no byte, and no answer that goes on.
    pub fn is_clean(&self) -> bool {
        self.body.is_end() && self.ahead.is_empty() && self.begun.is_empty()
    }

    /// What is left of the current answer's body.
    pub fn body(&self) -> &Body {
        &self.body
    }

    /// The head of the answer to what was `asked`, when it has come; its body follows. Heads that only inform are
    /// passed over.
    ///
    /// # Errors
    /// What comes is no answer that can be trusted.
    pub fn head(&mut self, asked: Asked<'_>) -> Result<Option<Head>, Defect> {
        while let Some(bytes) = self.candidate()? {
            let Some((head, length)) = head::parse(&bytes, asked, self.fields + 1)? else {
                self.begun = BytesMut::from(bytes);
                return Ok(None);
            };
            if length < bytes.len() {
                self.ahead = bytes.slice(length..);
            }
            if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
                self.informed += 1;
                if self.informed > MAX_INFORMATIONAL {
                    return Err(Defect::Informational);
                }
                continue;
            }
            self.informed = 0;
            self.fields = head.headers.len();
            self.body = Body::new(head.framing);
            return Ok(Some(head));
        }
        Ok(None)
    }

    /// The bytes that a head may be read from now. One that has begun is read again only when its end is here:
    /// however small its pieces are, it is read twice.
    fn candidate(&mut self) -> Result<Option<Bytes>, Defect> {
        if self.ahead.is_empty() {
            return Ok(None);
        }
        let ahead = std::mem::take(&mut self.ahead);
        if self.begun.is_empty() {
            return Ok(Some(ahead));
        }
        // The end of a head is LF, LF or LF, CR, LF; it may have begun before.
        let searched = self.begun.len().saturating_sub(2);
        self.begun.extend_from_slice(&ahead);
        if has_empty_line(self.begun.get(searched..).unwrap_or_default()) {
            return Ok(Some(std::mem::take(&mut self.begun).freeze()));
        }
        if self.begun.len() > MAX_HEAD {
            return Err(Defect::HeadTooLong);
        }
        Ok(None)
    }

    /// The next piece of the current answer's body; none when more bytes are needed, or at its end.
    ///
    /// # Errors
    /// Its chunks or trailers are malformed.
    pub fn frame(&mut self) -> Result<Option<Frame<Bytes>>, Defect> {
        self.body.take(&mut self.ahead)
    }

    /// The whole body, if all of it is here and its length was known before.
    pub fn whole(&mut self) -> Option<Bytes> {
        let left = self.body.left()?;
        if left > self.ahead.len() as u64 {
            return None;
        }
        let frame = self.frame().ok()?;
        Some(frame.and_then(|frame| frame.into_data().ok()).unwrap_or_default())
    }

    /// The connection has ended.
    ///
    /// # Errors
    /// The current answer should have gone on.
    pub fn close(&mut self) -> Result<(), Defect> {
        self.body.close()
    }

    /// What came and was not taken, when the connection is given to another protocol.
    pub fn into_rest(self) -> Bytes {
        self.ahead
    }
}

/// Whether an LF follows another, with or without a CR between them.
fn has_empty_line(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(lf) = memchr(b'\n', rest) {
        rest = rest.get(lf + 1..).unwrap_or_default();
        if rest.starts_with(b"\n") || rest.starts_with(b"\r\n") {
            return true;
        }
    }
    false
}
