//! Ports that belong to one test.
//!
//! The gateway listens with `SO_REUSEPORT`, so two of them on one port would quietly share its connections
//! instead of failing. A port is therefore reserved by a lock file held until the [`Port`] is dropped, and is
//! taken from below the range the kernel gives to outgoing connections.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr};

use nix::fcntl::{Flock, FlockArg};
use tokio::net::TcpSocket;

/// First and last port ever handed out; the kernel's own ephemeral range starts at 32768.
const RANGE: std::ops::Range<u16> = 10_000..32_000;

/// A TCP port on 127.0.0.1 that no other test takes while this value lives.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: Flock<File>,
}

impl Port {
    /// Reserves a port nobody listens on.
    pub fn free() -> Port {
        let folder = std::env::temp_dir().join("postern-e2e-ports");
        std::fs::create_dir_all(&folder).expect("the folder for port locks");
        for _ in 0..10_000 {
            let number = fastrand::u16(RANGE);
            let path = folder.join(number.to_string());
            let Ok(file) = OpenOptions::new().create(true).truncate(false).write(true).open(path) else {
                continue;
            };
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            if is_free(number) {
                return Port { number, _lock: lock };
            }
        }
        panic!("no free port in {RANGE:?}");
    }

    pub fn number(&self) -> u16 {
        self.number
    }

    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.number))
    }
}

/// Whether nobody listens there. It is not listened for that: a process that another thread is just starting has what is open
/// here until it runs, and a listener would be in the way of whoever the port is for.
fn is_free(port: u16) -> bool {
    let bind = || {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv4Addr::UNSPECIFIED, port).into())
    };
    bind().is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_is_given_once() {
        let ports: Vec<Port> = (0..200).map(|_| Port::free()).collect();
        let numbers: HashSet<u16> = ports.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), ports.len());
    }

    #[test]
    fn a_port_at_which_somebody_listens_is_not_free() {
        let port = Port::free();
        assert!(is_free(port.number()));
        let _listener = TcpListener::bind(port.addr()).expect("a free port");
        assert!(!is_free(port.number()));
    }
}
