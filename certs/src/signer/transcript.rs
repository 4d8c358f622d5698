//! What a TLS server signs in a handshake. A node signs messages of these two forms alone: a key that would sign anything
//! else could be used to forge certificates, tokens, or handshakes of clients.

use rustls::SignatureScheme;

/// TLS 1.3 (RFC 8446, 4.4.3): 64 spaces, a text, a zero byte, the hash of the handshake.
const TLS13: &[u8] =
    b"                                                                TLS 1.3, server CertificateVerify\0";
/// The hashes of the cipher suites: SHA-256 and SHA-384.
const TLS13_HASHES: [usize; 2] = [32, 48];
/// TLS 1.2 (RFC 8422, 5.4): two random values, then the parameters of the key exchange.
const RANDOMS: usize = 64;
const NAMED_CURVE: u8 = 3;
/// The groups of TLS 1.2, and how long their public values are.
const GROUPS: [(u16, usize); 4] = [(23, 65), (24, 97), (25, 133), (29, 32)];

/// A handshake that waits for its signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    Tls12,
    Tls13,
}

/// A message that is not signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSigned {
    #[error("the message is no handshake of a TLS server")]
    Form,
    #[error("the scheme is none of TLS 1.3")]
    Scheme,
}

impl Handshake {
    /// Which handshake `message` belongs to.
    ///
    /// # Errors
    /// It is none of a TLS server, or one that is not signed by `scheme`.
    pub fn read(message: &[u8], scheme: SignatureScheme) -> Result<Self, NotSigned> {
        if let Some(hash) = message.strip_prefix(TLS13) {
            return match TLS13_HASHES.contains(&hash.len()) {
                false => Err(NotSigned::Form),
                true if is_pkcs1(scheme) => Err(NotSigned::Scheme),
                true => Ok(Self::Tls13),
            };
        }
        let (_, params) = message.split_at_checked(RANDOMS).ok_or(NotSigned::Form)?;
        let [NAMED_CURVE, high, low, length, point @ ..] = params else { return Err(NotSigned::Form) };
        let group = u16::from_be_bytes([*high, *low]);
        let fits = GROUPS.contains(&(group, point.len())) && usize::from(*length) == point.len();
        // A point is written uncompressed; x25519 has no such form.
        let written = group == 29 || point.first() == Some(&4);
        if fits && written { Ok(Self::Tls12) } else { Err(NotSigned::Form) }
    }
}

/// These are for TLS 1.2 alone.
fn is_pkcs1(scheme: SignatureScheme) -> bool {
    use SignatureScheme as S;
    matches!(scheme, S::RSA_PKCS1_SHA256 | S::RSA_PKCS1_SHA384 | S::RSA_PKCS1_SHA512)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PSS: SignatureScheme = SignatureScheme::RSA_PSS_SHA256;

    fn tls13(text: &str, hash: usize) -> Vec<u8> {
        [&[b' '; 64][..], text.as_bytes(), &[0], &vec![7; hash]].concat()
    }

    fn tls12(curve_type: u8, group: u16, point: &[u8]) -> Vec<u8> {
        let [high, low] = group.to_be_bytes();
        let length = u8::try_from(point.len()).unwrap();
        [&[9; 64][..], &[curve_type, high, low, length], point].concat()
    }

    fn point(length: usize) -> Vec<u8> {
        let mut point = vec![1; length];
        point[0] = 4;
        point
    }

    #[test]
    fn handshakes_of_servers_are_read() {
        let server = "TLS 1.3, server CertificateVerify";
        for hash in [32, 48] {
            assert_eq!(Handshake::read(&tls13(server, hash), PSS), Ok(Handshake::Tls13));
        }
        for (group, length) in [(23, 65), (24, 97), (25, 133), (29, 32)] {
            assert_eq!(Handshake::read(&tls12(3, group, &point(length)), PSS), Ok(Handshake::Tls12));
        }
        assert_eq!(Handshake::read(&tls12(3, 29, &[0; 32]), PSS), Ok(Handshake::Tls12));
    }

    #[test]
    fn nothing_else_is() {
        let mut longer = tls12(3, 23, &point(65));
        longer.push(0);
        let mut lies = tls12(3, 23, &point(65));
        lies[67] = 64;
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("nothing", vec![]),
            ("a text", b"sign this".to_vec()),
            ("a token", b"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhZG1pbiIsImlzcyI6InNob3AiLCJhdWQiOiJhcGkiLCJleHAiOjk5OTk5OTk5OTl9".to_vec()),
            ("a certificate", [&[0x30, 0x82, 1, 0, 0xa0, 3, 2, 1, 2][..], &[5; 247]].concat()),
            ("a client of TLS 1.3", tls13("TLS 1.3, client CertificateVerify", 32)),
            ("a short hash", tls13("TLS 1.3, server CertificateVerify", 20)),
            ("SHA-512", tls13("TLS 1.3, server CertificateVerify", 64)),
            ("another text", tls13("TLS 1.3, server certificateVerify", 32)),
            ("no hash", tls13("TLS 1.3, server CertificateVerify", 0)),
            ("63 spaces", tls13("TLS 1.3, server CertificateVerify", 32)[1..].to_vec()),
            ("two random values alone", vec![9; 64]),
            ("a curve of its own", tls12(1, 23, &point(65))),
            ("an unknown group", tls12(3, 30, &point(56))),
            ("a point of another group", tls12(3, 23, &point(97))),
            ("a compressed point", tls12(3, 23, &[2; 65])),
            ("something behind the point", longer),
            ("a length that lies", lies),
        ];
        for (what, message) in cases {
            assert_eq!(Handshake::read(&message, PSS), Err(NotSigned::Form), "{what}");
        }
        let message = tls13("TLS 1.3, server CertificateVerify", 32);
        assert_eq!(Handshake::read(&message, SignatureScheme::RSA_PKCS1_SHA256), Err(NotSigned::Scheme));
        let message = tls12(3, 29, &[0; 32]);
        assert_eq!(Handshake::read(&message, SignatureScheme::RSA_PKCS1_SHA256), Ok(Handshake::Tls12));
    }
}
