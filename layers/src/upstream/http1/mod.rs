//! HTTP/1 towards upstreams: our own engine.
//!
//! A request is written straight from the exchange's fields, an answer is read straight into the fields that go on to
//! the client; what belongs to one connection is left out on the way. Nothing here has a task or a channel: whoever
//! waits for an answer, or for more of its body, reads. Reading an answer is apart from IO (`reader.rs`, `head.rs`,
//! `body.rs`), so that it can be tested byte by byte; an answer that two readers could understand differently is a
//! [`Defect`] and ends its connection.

pub mod body;
mod buffers;
pub(crate) mod connection;
pub mod head;
mod lines;
pub mod reader;
mod sending;
#[cfg(test)]
mod tests;
mod write;

/// What is wrong with an answer as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Defect {
    /// Not `HTTP/1.x` and a status of three digits.
    #[error("malformed status line")]
    StatusLine,
    /// A malformed name or value, a folded line, a control byte.
    #[error("malformed header field")]
    Field,
    /// The head is over its limit.
    #[error("the head is too large")]
    HeadTooLong,
    /// More fields than allowed.
    #[error("too many header fields")]
    TooManyFields,
    /// `Content-Length` is not one plain number.
    #[error("Content-Length is not one plain number")]
    ContentLength,
    /// `Transfer-Encoding` is not exactly `chunked`, stands twice, or stands in HTTP/1.0.
    #[error("Transfer-Encoding is not exactly chunked")]
    TransferEncoding,
    /// Both lengths at once.
    #[error("Transfer-Encoding with Content-Length")]
    BothLengths,
    /// 101 without a request for it, or without saying to what.
    #[error("a protocol switch that nobody asked for")]
    Switch,
    /// More heads that only inform than any upstream sends.
    #[error("too many informational answers")]
    Informational,
    /// A chunk size that is empty, no hexadecimal number or too large.
    #[error("malformed chunk size")]
    ChunkSize,
    /// A chunk extension with a control byte, or too many of them.
    #[error("malformed chunk extension")]
    ChunkExtension,
    /// A chunk that does not end with CR LF.
    #[error("a chunk does not end with CR LF")]
    ChunkEnd,
    /// Trailers that are malformed or over the limit.
    #[error("malformed trailers")]
    Trailers,
    /// The connection ended before the answer did.
    #[error("the answer is cut short")]
    CutShort,
}
