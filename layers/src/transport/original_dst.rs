//! Captured connections: where they were going, which of them came to the proxy itself, and sockets that bear the address
//! of a client. The kernel is asked once for each connection, before anything of it is read.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

/// How connections were captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Captured {
    /// Their destination was rewritten; connection tracking knows the former one.
    Redirect,
    /// They have come with their destination.
    Tproxy,
}

/// Where `stream` was going. One that was not captured was going to the listener itself.
///
/// # Errors
/// The kernel does not tell.
pub fn original_dst(stream: &TcpStream, captured: Captured) -> io::Result<SocketAddr> {
    let local = canonical(stream.local_addr()?);
    if captured == Captured::Tproxy {
        return Ok(local);
    }
    let socket = SockRef::from(stream);
    let told = match local {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    match told {
        Ok(address) => address.as_socket().map(canonical).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        // Nobody tracks it, so nobody has rewritten it.
        Err(error) if is(&error, &[Errno::ENOENT, Errno::ENOPROTOOPT, Errno::EOPNOTSUPP]) => Ok(local),
        Err(error) => Err(error),
    }
}

fn is(error: &io::Error, any: &[Errno]) -> bool {
    error.raw_os_error().is_some_and(|code| any.contains(&Errno::from_raw(code)))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Lets a listener take connections whose destination is another address (TPROXY).
///
/// # Errors
/// It is not permitted: that takes `CAP_NET_ADMIN`.
pub fn accept_any_destination(listener: &TcpListener) -> io::Result<()> {
    // The one option is for both families, whatever its name says.
    SockRef::from(listener).set_ip_transparent_v4(true)
}

/// As whom connections are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsClient {
    /// The address of the client.
    pub address: IpAddr,
    /// The mark by which replies find back.
    pub mark: u32,
}

/// Opens a connection to `to` that bears the address of `client` and `mark`, by which replies find back.
///
/// # Errors
/// It is not permitted, no port is free, or nobody listens.
pub async fn connect_as(client: IpAddr, to: SocketAddr, mark: u32) -> io::Result<TcpStream> {
    // Below the ports that clients take for themselves: the very connection that is being served must not be met.
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    const TRIES: usize = 16;
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..TRIES {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_reuse_address(true)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_mark(mark)?;
        let from = SocketAddr::new(client, fastrand::u16(PORTS));
        let connected = match socket.bind(&SockAddr::from(from)) {
            Ok(()) => TcpSocket::from_std_stream(socket.into()).connect(to).await,
            Err(error) => Err(error),
        };
        match connected {
            Err(error) if is(&error, &[Errno::EADDRINUSE, Errno::EADDRNOTAVAIL]) => failure = error,
            done => return done,
        }
    }
    Err(failure)
}

/// The addresses of this machine, without loopback. They change seldom; one that is not known is looked for again.
pub struct LocalAddresses(ArcSwap<Read>);

struct Read {
    at: Instant,
    addresses: HashSet<IpAddr>,
}

impl Read {
    fn now() -> Arc<Self> {
        let addresses = match getifaddrs() {
            Ok(interfaces) => interfaces
                .filter_map(|interface| {
                    let address = interface.address?;
                    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
                    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
                })
                .filter(|address| !address.is_loopback())
                .collect(),
            Err(_) => HashSet::new(),
        };
        Arc::new(Self { at: Instant::now(), addresses })
    }
}

impl Default for LocalAddresses {
    fn default() -> Self {
        Self(ArcSwap::new(Read::now()))
    }
}

impl LocalAddresses {
    /// `ip` is one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        /// Strangers must not make us read the list for each of them.
        const FRESH: Duration = Duration::from_secs(1);
        let ip = ip.to_canonical();
        let read = self.0.load();
        if read.addresses.contains(&ip) {
            return true;
        }
        if read.at.elapsed() < FRESH {
            return false;
        }
        let again = Read::now();
        self.0.store(again.clone());
        again.addresses.contains(&ip)
    }
}

/// The proxy's own listeners. A connection that was going there would come back for ever.
pub struct Own {
    ports: Box<[u16]>,
    addresses: LocalAddresses,
}

impl Own {
    /// Those on `ports`.
    pub fn new(ports: impl IntoIterator<Item = u16>) -> Self {
        Self { ports: ports.into_iter().collect(), addresses: LocalAddresses::default() }
    }

    /// Those on `ports` of a machine with these addresses and no others.
    #[cfg(test)]
    pub(crate) fn at(
        ports: impl IntoIterator<Item = u16>,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        let at = Instant::now() + Duration::from_secs(24 * 3600);
        let read = Read { at, addresses: addresses.into_iter().collect() };
        Self { addresses: LocalAddresses(ArcSwap::new(Arc::new(read))), ..Self::new(ports) }
    }

    /// A connection to `destination` would reach the proxy itself.
    pub fn is_loop(&self, destination: SocketAddr) -> bool {
        let ip = destination.ip().to_canonical();
        self.ports.contains(&destination.port())
            && (ip.is_loopback() || ip.is_unspecified() || self.addresses.contains(ip))
    }

    /// `ip` belongs to this machine, and is not loopback.
    pub fn is_ours(&self, ip: IpAddr) -> bool {
        self.addresses.contains(ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_not_captured_was_going_to_the_listener() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = tokio::net::TcpListener::bind(address).await else { continue };
            let address = listener.local_addr().unwrap();
            let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (_client, (stream, _)) = (client.unwrap(), accepted.unwrap());
            for captured in [Captured::Redirect, Captured::Tproxy] {
                assert_eq!(original_dst(&stream, captured).unwrap(), address, "{captured:?}");
            }
            assert!(Own::new([address.port()]).is_loop(address));
        }
    }

    #[test]
    fn only_our_own_ports_at_our_own_addresses_are_loops() {
        let own = Own::new([15001, 15006]);
        for (destination, told) in [
            ("127.0.0.1:15001", true),
            ("127.9.9.9:15006", true),
            ("[::1]:15006", true),
            ("[::ffff:127.0.0.1]:15006", true),
            ("0.0.0.0:15006", true),
            ("127.0.0.1:8080", false),
            ("192.0.2.1:15006", false),
            ("[2001:db8::1]:15001", false),
        ] {
            assert_eq!(own.is_loop(destination.parse().unwrap()), told, "{destination}");
        }
        assert!(!own.is_ours("127.0.0.1".parse().unwrap()), "loopback is nobody's address");
    }
}
