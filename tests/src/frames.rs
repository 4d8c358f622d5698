//! HTTP/2 frames by hand, for what no decent client would send.

use bytes::{BufMut, Bytes, BytesMut};

/// What every HTTP/2 client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// One frame with its nine bytes of head.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(9 + payload.len());
    let length = u32::try_from(payload.len()).expect("a payload of a test fits");
    bytes.put_uint(u64::from(length), 3);
    bytes.put_u8(kind);
    bytes.put_u8(flags);
    bytes.put_u32(stream);
    bytes.put_slice(payload);
    bytes.freeze()
}

/// Preface and empty SETTINGS.
pub fn hello() -> Bytes {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat().into()
}

/// A header block of literal fields without indexing, exactly as given and never checked.
pub fn block(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.put_u8(0);
        string(&mut bytes, name.as_bytes());
        string(&mut bytes, value);
    }
    bytes
}

fn string(bytes: &mut Vec<u8>, text: &[u8]) {
    // RFC 7541 5.1: seven bits of prefix, the rest in groups of seven; no Huffman code.
    let mut rest = text.len();
    if rest < 127 {
        bytes.put_u8(u8::try_from(rest).expect("below 127"));
    } else {
        bytes.put_u8(127);
        rest -= 127;
        while rest >= 128 {
            bytes.put_u8(u8::try_from(rest % 128 + 128).expect("below 256"));
            rest /= 128;
        }
        bytes.put_u8(u8::try_from(rest).expect("below 128"));
    }
    bytes.put_slice(text);
}

/// The pseudo-headers of a plain GET.
pub fn get<'a>(path: &'a str, authority: &'a str) -> Vec<(&'a str, &'a [u8])> {
    vec![
        (":method", b"GET"),
        (":scheme", b"http"),
        (":path", path.as_bytes()),
        (":authority", authority.as_bytes()),
    ]
}

/// A frame as it was received.
#[derive(Clone, Debug)]
pub struct Received {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Bytes,
}

/// Splits received bytes into frames; an incomplete last one is left out.
pub fn parse(mut bytes: &[u8]) -> Vec<Received> {
    let mut frames = Vec::new();
    while let [a, b, c, kind, flags, s0, s1, s2, s3, rest @ ..] = bytes {
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        let Some(payload) = rest.get(..length) else { break };
        let stream = u32::from_be_bytes([*s0, *s1, *s2, *s3]) & 0x7fff_ffff;
        let payload = Bytes::copy_from_slice(payload);
        frames.push(Received { kind: *kind, flags: *flags, stream, payload });
        bytes = &rest[length..];
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_way_there_and_back() {
        let bytes = [frame(PING, ACK, 0, &[1; 8]), frame(DATA, END_STREAM, 3, b"hello")].concat();
        let frames = parse(&bytes);
        assert_eq!(frames.len(), 2);
        assert_eq!((frames[1].kind, frames[1].stream, &frames[1].payload[..]), (DATA, 3, &b"hello"[..]));
    }

    #[test]
    fn a_long_string_has_a_long_length() {
        let block = block(&[("a", &[b'x'; 300])]);
        assert_eq!(&block[..6], &[0, 1, b'a', 127, 173, 1]);
    }
}
