//! Listening sockets: one per worker and address, sharing the port by `SO_REUSEPORT`, so that the kernel spreads
//! connections and no worker wakes another. They are bound on the control side, before a worker starts, and every
//! failure names the address, the configuration key that asked for it and what to do.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

/// Connections that may wait to be accepted, per socket; the kernel caps it at `net.core.somaxconn`.
pub const BACKLOG: i32 = 8192;

/// A client that vanished without a word is noticed after this long plus a few probes.
const KEEPALIVE: Duration = Duration::from_secs(120);

/// An address to listen on.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Address and port; port 0 lets the kernel choose one.
    pub address: SocketAddr,
    /// The configuration key that asks for it, for messages.
    pub key: String,
}

impl Listen {
    /// Binds `sockets` sockets of this address, one for each worker.
    ///
    /// # Errors
    /// The address is taken (also by a process that shares ports), not ours, or not allowed.
    pub fn bind(&self, sockets: usize) -> Result<Vec<TcpListener>, ListenError> {
        let failed = |error| ListenError { address: self.address, key: self.key.clone(), error };
        // With SO_REUSEPORT a second process of the same user would silently get half of the connections.
        drop(self.open(self.address, false).map_err(failed)?);
        let mut bound: Vec<TcpListener> = Vec::with_capacity(sockets);
        for _ in 0..sockets.max(1) {
            let address = match bound.first() {
                Some(first) => first.local_addr().map_err(failed)?,
                None => self.address,
            };
            let socket = self.open(address, true).map_err(failed)?;
            socket.listen(BACKLOG).map_err(failed)?;
            bound.push(socket.into());
        }
        Ok(bound)
    }

    fn open(&self, address: SocketAddr, share: bool) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            // IPv4 has its own listener; a socket for both would clash with it.
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(share)?;
        socket.set_nonblocking(true)?;
        // Accepted sockets inherit both on Linux: no system call for each connection.
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
        socket.bind(&SockAddr::from(address))?;
        Ok(socket)
    }
}

/// An address that cannot be listened on.
#[derive(Debug)]
pub struct ListenError {
    address: SocketAddr,
    key: String,
    error: io::Error,
}

impl ListenError {
    /// The address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The machine does not have this family of addresses at all.
    pub fn is_missing_family(&self) -> bool {
        let code = self.error.raw_os_error().map(Errno::from_raw);
        matches!(code, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
    }

    /// What the kernel said.
    pub fn kind(&self) -> io::ErrorKind {
        self.error.kind()
    }
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, key, error } = self;
        write!(f, "cannot listen on {address} (from `{key}`): ")?;
        match error.kind() {
            io::ErrorKind::AddrInUse => {
                write!(
                    f,
                    "the address is in use; stop the process that holds it or set another port in `{key}`"
                )
            }
            io::ErrorKind::PermissionDenied => write!(
                f,
                "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE, or set a higher port in `{key}`"
            ),
            io::ErrorKind::AddrNotAvailable => {
                write!(f, "no interface of this machine has the address; correct it in `{key}`")
            }
            _ => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for ListenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

#[cfg(test)]
mod tests {

    use std::net::TcpStream;

    use super::*;

    fn listen(address: &str) -> Listen {
        Listen { address: address.parse().unwrap(), key: "apisix.node_listen".to_owned() }
    }

    #[test]
    fn every_worker_has_a_socket_of_one_port() {
        let sockets = listen("127.0.0.1:0").bind(3).unwrap();
        let ports: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap().port()).collect();
        assert_eq!(ports.len(), 3);
        assert!(ports[0] != 0 && ports.iter().all(|port| *port == ports[0]));
    }

    #[test]
    fn accepted_sockets_send_without_delay() {
        let sockets = listen("127.0.0.1:0").bind(1).unwrap();
        sockets[0].set_nonblocking(false).unwrap();
        let _client = TcpStream::connect(sockets[0].local_addr().unwrap()).unwrap();
        let (accepted, _) = sockets[0].accept().unwrap();
        assert!(accepted.nodelay().unwrap());
    }

    #[test]
    fn a_taken_port_is_told_with_its_key() {
        let held = listen("127.0.0.1:0").bind(2).unwrap();
        let address = held[0].local_addr().unwrap();
        let error = listen(&address.to_string()).bind(2).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "cannot listen on {address} (from `apisix.node_listen`): the address is in use; stop the process \
                 that holds it or set another port in `apisix.node_listen`"
            )
        );
    }

    #[test]
    fn an_address_of_another_machine_is_told() {
        let error = listen("192.0.2.1:0").bind(1).unwrap_err();
        assert!(error.to_string().contains("no interface of this machine"), "{error}");
    }

    #[test]
    fn ipv6_and_ipv4_share_a_port_number() {
        let Ok(v6) = listen("[::]:0").bind(1) else { return };
        let port = v6[0].local_addr().unwrap().port();
        listen(&format!("0.0.0.0:{port}")).bind(1).unwrap();
    }
}
