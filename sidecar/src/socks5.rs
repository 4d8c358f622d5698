//! SOCKS5 (RFC 1928) as a client of the workload speaks it: no authentication, `CONNECT` alone, names and addresses.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::connect::is_name;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NONE_ACCEPTABLE: u8 = 0xff;
const CONNECT: u8 = 1;

/// What the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    /// The way is open.
    Succeeded = 0,
    /// It could not be made.
    Failed = 1,
    /// A policy forbids it.
    Forbidden = 2,
    /// The other end does not take the connection.
    Refused = 5,
    /// Only `CONNECT` is offered.
    Command = 7,
    /// The destination is of no form that is known.
    Address = 8,
}

/// Why there is no destination.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("the client does not speak SOCKS5")]
    Version,
    #[error("the client offers no way without authentication")]
    Authentication,
    #[error("the client asks for command {0}; only CONNECT is offered")]
    Command(u8),
    #[error("the client names its destination in a form that is not known")]
    Address,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads where the client wants to go. It is answered where that is a refusal; otherwise by [`reply`], once it is known
/// whether the way can be made.
///
/// # Errors
/// It does not say, or asks for what is not offered.
pub async fn destination<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<(String, u16), Problem> {
    if stream.read_u8().await? != VERSION {
        return Err(Problem::Version);
    }
    let mut methods = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NONE_ACCEPTABLE]).await?;
        return Err(Problem::Authentication);
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [version, command, _, kind] = head;
    if version != VERSION {
        return Err(Problem::Version);
    }
    let host = match kind {
        1 => {
            let mut octets = [0; 4];
            stream.read_exact(&mut octets).await?;
            Some(Ipv4Addr::from(octets).to_string())
        }
        3 => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            let name = String::from_utf8(name).ok().map(|name| name.to_ascii_lowercase());
            let bare = |name: String| name.strip_suffix('.').map(str::to_owned).unwrap_or(name);
            name.map(bare).filter(|name| is_name(name))
        }
        4 => {
            let mut octets = [0; 16];
            stream.read_exact(&mut octets).await?;
            Some(Ipv6Addr::from(octets).to_canonical().to_string())
        }
        _ => {
            reply(stream, Reply::Address).await?;
            return Err(Problem::Address);
        }
    };
    let port = stream.read_u16().await?;
    if command != CONNECT {
        reply(stream, Reply::Command).await?;
        return Err(Problem::Command(command));
    }
    match host.filter(|_| port > 0) {
        Some(host) => Ok((host, port)),
        None => {
            reply(stream, Reply::Address).await?;
            Err(Problem::Address)
        }
    }
}

/// Tells the client how it went. The address that is told is of no use to anybody.
///
/// # Errors
/// The client is gone.
pub async fn reply<S: AsyncWrite + Unpin>(stream: &mut S, reply: Reply) -> io::Result<()> {
    let unspecified = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let mut answer = vec![VERSION, reply as u8, 0, 1];
    answer.extend_from_slice(&Ipv4Addr::UNSPECIFIED.octets());
    answer.extend_from_slice(&unspecified.port().to_be_bytes());
    stream.write_all(&answer).await
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    async fn ask(bytes: &[u8]) -> (Result<(String, u16), String>, Vec<u8>) {
        let (mut client, mut server) = duplex(1024);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let asked = destination(&mut server).await.map_err(|problem| problem.to_string());
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        (asked, answer)
    }

    #[tokio::test]
    async fn destinations_of_every_form_are_read() {
        let hello = [5, 2, 2, 0];
        let cases: [(&[u8], &str, u16); 3] = [
            (&[5, 1, 0, 1, 10, 0, 0, 1, 0, 80], "10.0.0.1", 80),
            (b"\x05\x01\x00\x03\x09Api.Test.\x01\xbb", "api.test", 443),
            (&[5, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 22], "::1", 22),
        ];
        for (request, host, port) in cases {
            let (asked, answer) = ask(&[&hello, request].concat()).await;
            assert_eq!(asked, Ok((host.to_owned(), port)));
            assert_eq!(answer, [5, 0], "the way itself is not answered yet");
        }
    }

    #[tokio::test]
    async fn what_is_not_offered_is_refused_in_its_own_words() {
        let hello = [5, 1, 0];
        let refused = |code| vec![5, 0, 5, code, 0, 1, 0, 0, 0, 0, 0, 0];
        let cases: [(Vec<u8>, &str, Vec<u8>); 5] = [
            (vec![4, 1], "does not speak SOCKS5", vec![]),
            (vec![5, 1, 2], "no way without authentication", vec![5, 0xff]),
            ([&hello[..], &[5, 2, 0, 1, 1, 1, 1, 1, 0, 80]].concat(), "command 2", refused(7)),
            ([&hello[..], &[5, 1, 0, 9, 0]].concat(), "not known", refused(8)),
            ([&hello[..], b"\x05\x01\x00\x03\x03a/b\x00\x50"].concat(), "not known", refused(8)),
        ];
        for (bytes, words, answer) in cases {
            let (asked, told) = ask(&bytes).await;
            let error = asked.unwrap_err();
            assert!(error.contains(words), "{error}");
            assert_eq!(told, answer, "{words}");
        }
    }
}
