//! The PROXY protocol, versions 1 and 2: who the client is when a load balancer stands in front. A pure parser over
//! the first bytes of a connection, bounded in every direction; whatever is not exactly the protocol ends the
//! connection. Whether the addresses are believed is the listener's matter.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// What every version 2 header begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest version 1 line, with its CRLF, that the specification allows.
const MAX_V1: usize = 107;
/// The longest address block with its extensions that is read; the protocol would allow 64 KB.
const MAX_V2: usize = 4096;

/// The most bytes a header can take; a reader needs no larger buffer.
pub const MAX_HEADER: usize = 16 + MAX_V2;

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A header has begun well but is not complete.
    Partial,
    /// A header of this many bytes; what follows belongs to the client.
    Header {
        /// Bytes of the header.
        length: usize,
        /// The client's end and the end it connected to; `None` where the sender speaks for itself (`LOCAL`,
        /// `UNKNOWN`, a Unix socket).
        ends: Option<Ends>,
    },
}

/// Both ends of the connection that the load balancer accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The client.
    pub source: SocketAddr,
    /// What the client connected to.
    pub destination: SocketAddr,
}

/// The bytes are no PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the connection does not begin with a PROXY protocol header")]
    NoHeader,
    #[error("the PROXY protocol header is longer than allowed")]
    TooLong,
    #[error("the PROXY protocol line is malformed")]
    Line,
    #[error("the PROXY protocol header has an unknown version, command or family")]
    Unknown,
    #[error("the PROXY protocol header is shorter than its addresses")]
    Short,
    #[error("an extension of the PROXY protocol header does not fit its length")]
    Extension,
}

/// Reads a header from the first bytes of a connection.
///
/// # Errors
/// The bytes cannot become a header however many follow.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
    if begins(bytes, SIGNATURE) {
        return version2(bytes);
    }
    if begins(bytes, b"PROXY ") {
        return version1(bytes);
    }
    Err(Malformed::NoHeader)
}

/// Whether `bytes` begin with `start`, as far as either reaches.
fn begins(bytes: &[u8], start: &[u8]) -> bool {
    let shared = bytes.len().min(start.len());
    bytes.get(..shared) == start.get(..shared)
}

fn version1(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let window = bytes.get(..MAX_V1).unwrap_or(bytes);
    let Some(end) = memchr::memchr(b'\n', window) else {
        return if bytes.len() >= MAX_V1 { Err(Malformed::TooLong) } else { Ok(Parsed::Partial) };
    };
    let line = window.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(Malformed::Line)?;
    let line = std::str::from_utf8(line).map_err(|_| Malformed::Line)?;
    let length = end + 1;
    let mut words = line.split(' ').skip(1);
    let mut word = || words.next().ok_or(Malformed::Line);
    let ends = match word()? {
        // The rest of the line is to be ignored.
        "UNKNOWN" => return Ok(Parsed::Header { length, ends: None }),
        "TCP4" => line_ends::<Ipv4Addr>(word()?, word()?, word()?, word()?)?,
        "TCP6" => line_ends::<Ipv6Addr>(word()?, word()?, word()?, word()?)?,
        _ => return Err(Malformed::Line),
    };
    if words.next().is_some() {
        return Err(Malformed::Line);
    }
    Ok(Parsed::Header { length, ends: Some(ends) })
}

fn line_ends<T>(source: &str, destination: &str, from: &str, to: &str) -> Result<Ends, Malformed>
where
    T: FromStr + Into<IpAddr>,
{
    let address = |text: &str| text.parse::<T>().map(Into::into).map_err(|_| Malformed::Line);
    Ok(Ends {
        source: SocketAddr::new(address(source)?, port(from)?),
        destination: SocketAddr::new(address(destination)?, port(to)?),
    })
}

/// A decimal port without sign or leading zero, which `u16::from_str` would let pass.
fn port(text: &str) -> Result<u16, Malformed> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if !plain {
        return Err(Malformed::Line);
    }
    text.parse().map_err(|_| Malformed::Line)
}

fn version2(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let Some((head, rest)) = bytes.split_first_chunk::<16>() else { return Ok(Parsed::Partial) };
    let [.., command, family, high, low] = *head;
    let block_length = usize::from(u16::from_be_bytes([high, low]));
    if block_length > MAX_V2 {
        return Err(Malformed::TooLong);
    }
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(Malformed::Unknown),
    };
    let Some(block) = rest.get(..block_length) else { return Ok(Parsed::Partial) };
    let length = head.len() + block_length;
    let (ends, extensions) = match family {
        // Unspecified; and UDP or Unix sockets, whose addresses name no TCP client.
        0x00 => (None, &[][..]),
        0x11 => {
            let (addresses, extensions) = block.split_first_chunk::<12>().ok_or(Malformed::Short)?;
            let [a, b, c, d, e, f, g, h, ports @ ..] = *addresses;
            (Some(ends([a, b, c, d], [e, f, g, h], ports)), extensions)
        }
        0x21 => {
            let (source, rest) = block.split_first_chunk::<16>().ok_or(Malformed::Short)?;
            let (destination, rest) = rest.split_first_chunk::<16>().ok_or(Malformed::Short)?;
            let (ports, extensions) = rest.split_first_chunk::<4>().ok_or(Malformed::Short)?;
            (Some(ends(*source, *destination, *ports)), extensions)
        }
        0x12 => (None, block.get(12..).ok_or(Malformed::Short)?),
        0x22 => (None, block.get(36..).ok_or(Malformed::Short)?),
        0x31 | 0x32 => (None, block.get(216..).ok_or(Malformed::Short)?),
        _ if local => (None, &[][..]),
        _ => return Err(Malformed::Unknown),
    };
    if local {
        // A health check of the balancer itself: whatever it carries is not looked at.
        return Ok(Parsed::Header { length, ends: None });
    }
    check_extensions(extensions)?;
    Ok(Parsed::Header { length, ends })
}

fn ends<T: Into<IpAddr>>(source: T, destination: T, ports: [u8; 4]) -> Ends {
    let [from_high, from_low, to_high, to_low] = ports;
    Ends {
        source: SocketAddr::new(source.into(), u16::from_be_bytes([from_high, from_low])),
        destination: SocketAddr::new(destination.into(), u16::from_be_bytes([to_high, to_low])),
    }
}

/// Extensions are not used, but one that overruns its block means that the lengths cannot be trusted.
fn check_extensions(mut bytes: &[u8]) -> Result<(), Malformed> {
    while !bytes.is_empty() {
        let ([_, high, low], rest) = bytes.split_first_chunk::<3>().ok_or(Malformed::Extension)?;
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        bytes = rest.get(length..).ok_or(Malformed::Extension)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;

    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([command, family]);
        bytes.extend((block.len() as u16).to_be_bytes());
        bytes.extend(block);
        bytes
    }

    const INET: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0x01, 0xbb];

    fn tcp4() -> Ends {
        Ends { source: "192.0.2.7:12345".parse().unwrap(), destination: "10.0.0.1:443".parse().unwrap() }
    }

    #[test]
    fn headers_that_are_read() {
        let mut inet6 = [0u8; 36];
        inet6[15] = 1;
        inet6[31] = 2;
        inet6[33] = 80;
        inet6[35] = 90;
        let tcp6 = Ends { source: "[::1]:80".parse().unwrap(), destination: "[::2]:90".parse().unwrap() };
        let with_extension = [&INET[..], &[0x04, 0, 2, 1, 2]].concat();
        let cases: Vec<(&str, Vec<u8>, Option<Ends>)> = vec![
            ("v1 TCP4", b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 443\r\n".to_vec(), Some(tcp4())),
            ("v1 TCP6", b"PROXY TCP6 ::1 ::2 80 90\r\n".to_vec(), Some(tcp6)),
            ("v1 unknown", b"PROXY UNKNOWN\r\n".to_vec(), None),
            ("v1 unknown with words", b"PROXY UNKNOWN ffff::1 whatever\r\n".to_vec(), None),
            ("v2 TCP4", v2(0x21, 0x11, &INET), Some(tcp4())),
            ("v2 TCP4 with an extension", v2(0x21, 0x11, &with_extension), Some(tcp4())),
            ("v2 TCP6", v2(0x21, 0x21, &inet6), Some(tcp6)),
            ("v2 local", v2(0x20, 0x00, &[]), None),
            ("v2 local with addresses", v2(0x20, 0x11, &INET), None),
            ("v2 unspecified", v2(0x21, 0x00, &[9; 20]), None),
            ("v2 Unix socket", v2(0x21, 0x31, &[0; 216]), None),
        ];
        for (what, mut bytes, ends) in cases {
            let length = bytes.len();
            bytes.extend(b"GET / HTTP/1.1\r\n");
            assert_eq!(parse(&bytes), Ok(Parsed::Header { length, ends }), "{what}");
            for cut in 0..length {
                assert_eq!(parse(&bytes[..cut]), Ok(Parsed::Partial), "{what} cut at {cut}");
            }
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(200));
        let cases: Vec<(&str, Vec<u8>, Malformed)> = vec![
            ("HTTP", b"GET / HTTP/1.1\r\n".to_vec(), Malformed::NoHeader),
            ("TLS", vec![0x16, 3, 1], Malformed::NoHeader),
            ("lower case", b"proxy TCP4".to_vec(), Malformed::NoHeader),
            ("too long a line", long.into_bytes(), Malformed::TooLong),
            ("bare LF", b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\n".to_vec(), Malformed::Line),
            ("two spaces", b"PROXY TCP4  192.0.2.7 10.0.0.1 1 2\r\n".to_vec(), Malformed::Line),
            ("too few words", b"PROXY TCP4 192.0.2.7 10.0.0.1 1\r\n".to_vec(), Malformed::Line),
            ("too many words", b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2 3\r\n".to_vec(), Malformed::Line),
            ("signed port", b"PROXY TCP4 192.0.2.7 10.0.0.1 +1 2\r\n".to_vec(), Malformed::Line),
            ("port with a zero", b"PROXY TCP4 192.0.2.7 10.0.0.1 01 2\r\n".to_vec(), Malformed::Line),
            ("port over 65535", b"PROXY TCP4 192.0.2.7 10.0.0.1 65536 2\r\n".to_vec(), Malformed::Line),
            ("IPv6 as TCP4", b"PROXY TCP4 ::1 ::2 1 2\r\n".to_vec(), Malformed::Line),
            ("IPv6 zone", b"PROXY TCP6 fe80::1%eth0 ::2 1 2\r\n".to_vec(), Malformed::Line),
            ("octal IPv4", b"PROXY TCP4 192.0.2.07 10.0.0.1 1 2\r\n".to_vec(), Malformed::Line),
            ("unknown family word", b"PROXY UDP4 192.0.2.7 10.0.0.1 1 2\r\n".to_vec(), Malformed::Line),
            ("no UTF-8", b"PROXY TCP4 \xff\r\n".to_vec(), Malformed::Line),
            ("version 3", v2(0x31, 0x11, &INET), Malformed::Unknown),
            ("unknown command", v2(0x22, 0x11, &INET), Malformed::Unknown),
            ("unknown family", v2(0x21, 0x41, &INET), Malformed::Unknown),
            ("addresses cut", v2(0x21, 0x11, &INET[..11]), Malformed::Short),
            ("IPv6 addresses cut", v2(0x21, 0x21, &INET), Malformed::Short),
            (
                "extension overruns",
                v2(0x21, 0x11, &[&INET[..], &[4, 0, 9, 1]].concat()),
                Malformed::Extension,
            ),
            (
                "extension without length",
                v2(0x21, 0x11, &[&INET[..], &[4, 0]].concat()),
                Malformed::Extension,
            ),
            ("block over the bound", v2(0x21, 0x11, &vec![0; MAX_V2 + 1]), Malformed::TooLong),
        ];
        for (what, bytes, expected) in cases {
            assert_eq!(parse(&bytes), Err(expected), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut prefixed = SIGNATURE.to_vec();
            prefixed.extend(&bytes);
            for input in [&bytes, &prefixed] {
                if let Ok(Parsed::Header { length, .. }) = parse(input) {
                    prop_assert!(length <= input.len());
                }
            }
        }

        #[test]
        fn more_bytes_never_change_a_verdict(command in 0u8..4, family in any::<u8>(), block in prop::collection::vec(any::<u8>(), 0..64)) {
            let bytes = v2(0x20 | command, family, &block);
            let whole = parse(&bytes);
            for cut in 0..bytes.len() {
                match parse(&bytes[..cut]) {
                    Ok(Parsed::Partial) => {}
                    early => prop_assert_eq!(early, whole),
                }
            }
        }
    }
}
