//! TCP connections that this process opens. Where the sidecar's connections are told by a mark on their packets, every one
//! of them has to bear it, or it would be captured like the application's; so they are all opened here.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream, ToSocketAddrs, lookup_host};

/// One for the process: what captures its connections knows nothing smaller. 0 is none.
static MARK: AtomicU32 = AtomicU32::new(0);

/// Marks every connection that is opened from now on.
///
/// # Errors
/// It is not permitted: that takes `CAP_NET_ADMIN`.
pub fn set_mark(mark: NonZeroU32) -> io::Result<()> {
    // Tried once, so that it is found out here and not by the first request.
    SockRef::from(&TcpSocket::new_v4()?).set_mark(mark.get())?;
    MARK.store(mark.get(), Ordering::Relaxed);
    Ok(())
}

/// The mark, if there is one.
#[must_use]
pub fn mark() -> Option<NonZeroU32> {
    NonZeroU32::new(MARK.load(Ordering::Relaxed))
}

/// Opens a connection.
///
/// # Errors
/// As `TcpStream::connect`.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let Some(mark) = mark() else { return TcpStream::connect(address).await };
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    SockRef::from(&socket).set_mark(mark.get())?;
    socket.connect(address).await
}

/// Opens a connection to the first address of a name that can be reached.
///
/// # Errors
/// The name has no address, or none can be reached: what became of the last one.
pub async fn connect_to(host: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host(host).await? {
        match connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}
