//! gRPC on the wire: messages in their frames, and how a call ended.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode;

/// The most of one message, in bytes: what gRPC libraries take unless they are told otherwise.
pub const LARGEST: usize = 4 << 20;

/// Bytes before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// `grpc-status`
pub const STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc-message`
pub const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Why a stream of messages cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A message is longer than [`LARGEST`].
    #[error("a message is longer than 4 MiB")]
    TooLong,
    /// A message is compressed, which nobody asked for.
    #[error("a message is compressed")]
    Compressed,
    /// The stream ends within a message.
    #[error("the stream ends within a message")]
    Cut,
}

/// Finds messages in a stream of bytes.
#[derive(Debug, Default)]
pub struct Messages {
    held: BytesMut,
}

impl Messages {
    /// Takes a piece of the stream. Held are one message and what came with it at most.
    pub fn take(&mut self, piece: &Bytes) {
        self.held.extend_from_slice(piece);
    }

    /// The next message, if it is whole.
    ///
    /// # Errors
    /// It is too long or compressed.
    pub fn read(&mut self) -> Result<Option<Bytes>, Broken> {
        let Some(prefix) = self.held.first_chunk::<PREFIX>() else { return Ok(None) };
        let [compressed, length @ ..] = *prefix;
        if compressed != 0 {
            return Err(Broken::Compressed);
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > LARGEST {
            return Err(Broken::TooLong);
        }
        if self.held.len() < PREFIX + length {
            return Ok(None);
        }
        self.held.advance(PREFIX);
        Ok(Some(self.held.split_to(length).freeze()))
    }

    /// Whether nothing is left over.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// A message in its frame.
pub fn frame(flags: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX + message.len());
    frame.put_u8(flags);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

/// Whether a media type is gRPC's, and not that of its form for browsers.
pub fn is_grpc(kind: Option<&HeaderValue>) -> bool {
    kind.and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// How a call ended: its code, where the fields tell it.
pub fn status(fields: &HeaderMap) -> Option<u32> {
    fields.get(STATUS).map(|status| {
        // What is no number is UNKNOWN.
        status.to_str().ok().and_then(|status| status.trim().parse().ok()).unwrap_or(2)
    })
}

/// The words about the end of a call.
pub fn message(fields: &HeaderMap) -> String {
    let message = fields.get(MESSAGE).map(HeaderValue::as_bytes).unwrap_or_default();
    percent_decode(message).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let stream = [frame(0, b"one"), frame(0, b""), frame(0, b"three")].concat();
        for size in 1..=stream.len() {
            let mut messages = Messages::default();
            let mut found = Vec::new();
            for piece in stream.chunks(size) {
                messages.take(&Bytes::copy_from_slice(piece));
                while let Some(message) = messages.read().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, ["one", "", "three"], "{size}");
            assert!(messages.is_empty());
        }
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (stream, broken) in
            [(&b"\x01\0\0\0\x01x"[..], Broken::Compressed), (b"\0\xff\xff\xff\xff", Broken::TooLong)]
        {
            let mut messages = Messages::default();
            messages.take(&Bytes::from_static(stream));
            assert_eq!(messages.read(), Err(broken));
        }
    }

    #[test]
    fn media_types_are_told_apart() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; x=y", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(Some(&HeaderValue::from_static(kind))), expected, "{kind}");
        }
        assert!(!is_grpc(None));
    }
}
