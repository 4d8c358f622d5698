//! Whether the capture stands, tried from inside: a connection to an address that no network has must end at the sidecar,
//! which says so. It needs no privilege, so a sidecar tries it when it starts, and an init container after installing.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::iptables::Family;
use super::rules::{PROBE_V4, PROBE_V6};

/// What an answer begins with; a word of this process follows.
const GREETING: &str = "postern-capture ";

/// How long an answer can be.
const LONGEST: u64 = 64;

/// Between two tries: the rules may be put there while we wait.
const PACE: Duration = Duration::from_millis(100);

/// The addresses that are tried, with `port`.
#[must_use]
pub fn is_probe(destination: SocketAddr) -> bool {
    matches!(destination.ip().to_canonical(), IpAddr::V4(ip) if ip == PROBE_V4)
        || matches!(destination.ip(), IpAddr::V6(ip) if ip == PROBE_V6)
}

/// Answers a connection whose destination [`is_probe`]. The caller bounds its time.
///
/// # Errors
/// Who asked is gone.
pub async fn answer(mut stream: impl AsyncWrite + Unpin) -> io::Result<()> {
    stream.write_all(format!("{GREETING}{}\n", word()).as_bytes()).await?;
    stream.shutdown().await
}

/// By which this process knows itself.
fn word() -> &'static str {
    static WORD: OnceLock<String> = OnceLock::new();
    WORD.get_or_init(|| format!("{:016x}", fastrand::u64(..)))
}

/// What became of a try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The connection ended at the sidecar.
    Captured,
    /// Nothing leaves this machine by this family, so there is nothing to capture.
    NoRoute,
    /// It did not, and what was seen.
    Missing(String),
}

/// Who has to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// This very process.
    Ourselves,
    /// A sidecar that runs, or this process if none does.
    Anybody,
}

/// Tries both families until they are captured, for at most `limit`.
pub async fn probe(outbound_port: u16, by: By, limit: Duration) -> [(Family, Outcome); 2] {
    let answering = async {
        // Nobody listens before the sidecar is there: then we do.
        match by {
            By::Anybody => answer_all(outbound_port).await,
            By::Ourselves => std::future::pending().await,
        }
    };
    let trying = async {
        tokio::join!(
            until_captured(SocketAddr::from((PROBE_V4, outbound_port)), by, limit),
            until_captured(SocketAddr::from((PROBE_V6, outbound_port)), by, limit)
        )
    };
    let (v4, v6) = tokio::select! {
        outcomes = trying => outcomes,
        never = answering => match never {},
    };
    [(Family::V4, v4), (Family::V6, v6)]
}

async fn answer_all(port: u16) -> std::convert::Infallible {
    let listen = |ip: IpAddr| async move {
        let Ok(listener) = TcpListener::bind((ip, port)).await else { return };
        while let Ok((stream, _)) = listener.accept().await {
            // A peer that is gone has its own end of it to judge by.
            let _ = answer(stream).await;
        }
    };
    tokio::join!(listen(Ipv4Addr::LOCALHOST.into()), listen(Ipv6Addr::LOCALHOST.into()));
    std::future::pending().await
}

async fn until_captured(address: SocketAddr, by: By, limit: Duration) -> Outcome {
    let mut last = Outcome::Missing(format!("no answer from {address} within {limit:?}"));
    let tries = async {
        loop {
            last = once(address, by).await;
            match last {
                Outcome::Missing(_) => sleep(PACE).await,
                Outcome::Captured | Outcome::NoRoute => break,
            }
        }
    };
    // What the last try saw says more than that time is over.
    let _ = timeout(limit, tries).await;
    last
}

async fn once(address: SocketAddr, by: By) -> Outcome {
    let mut stream = match TcpStream::connect(address).await {
        Ok(stream) => stream,
        Err(error) if is_no_route(&error) => return Outcome::NoRoute,
        Err(error) => return Outcome::Missing(format!("a connection to {address} failed: {error}")),
    };
    let mut said = String::new();
    let read = (&mut stream).take(LONGEST).read_to_string(&mut said).await;
    match (said.strip_prefix(GREETING).map(str::trim_end), by) {
        (Some(found), By::Ourselves) if found != word() => {
            Outcome::Missing(format!("another sidecar answers on port {}", address.port()))
        }
        (Some(_), _) => Outcome::Captured,
        (None, _) => Outcome::Missing(match read {
            Ok(_) => format!("something that is no sidecar answers for {address}"),
            Err(error) => format!("a connection to {address} broke: {error}"),
        }),
    }
}

fn is_no_route(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), NetworkUnreachable | HostUnreachable | AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documentation_addresses_are_probes_and_no_others_are() {
        for (address, told) in [
            ("192.0.2.1:15001", true),
            ("[::ffff:192.0.2.1]:15001", true),
            ("[2001:db8::1]:15001", true),
            ("192.0.2.2:15001", false),
            ("[2001:db8::2]:15001", false),
            ("127.0.0.1:15001", false),
        ] {
            assert_eq!(is_probe(address.parse().unwrap()), told, "{address}");
        }
    }

    #[tokio::test]
    async fn an_answer_names_the_process() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = |words: &'static [Option<&'static str>]| {
            let listener = &listener;
            async move {
                for word in words {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    match word {
                        None => answer(stream).await.unwrap(),
                        Some(word) => stream.write_all(word.as_bytes()).await.unwrap(),
                    }
                }
            }
        };
        let ask = async {
            assert_eq!(once(address, By::Ourselves).await, Outcome::Captured);
            assert_eq!(once(address, By::Anybody).await, Outcome::Captured);
            assert!(
                matches!(once(address, By::Ourselves).await, Outcome::Missing(why) if why.contains("another"))
            );
            assert!(
                matches!(once(address, By::Anybody).await, Outcome::Missing(why) if why.contains("no sidecar"))
            );
        };
        tokio::join!(serve(&[None, None, Some("postern-capture 1\n"), Some("SSH-2.0\r\n")]), ask);
    }
}
