//! HBONE: a byte tunnel inside HTTP/2 `CONNECT` inside mutual TLS, as Istio's ambient mesh speaks it on port 15008. One
//! connection carries many tunnels of one identity to one peer. Here is what both ends share: the stream, and the sizes.
//! Who may open one is decided by whoever serves it.

pub mod receiver;
pub mod server;
mod stream;
#[cfg(test)]
mod tests;

pub use stream::{Lease, Open, Tunnel};

/// Where peers listen.
pub const PORT: u16 = 15008;

/// What the handshake has to agree on.
pub const ALPN: &[u8] = b"h2";

/// What a peer may send ahead on one tunnel before it is taken.
pub const STREAM_WINDOW: u32 = 256 * 1024;

/// Tunnels on one connection; another is opened for more.
pub const MAX_STREAMS: u32 = 100;

/// What a peer may send ahead on all tunnels of a connection: enough for each, so that one that nobody reads cannot
/// stop the others.
pub const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS;

/// Bytes in one frame.
pub const FRAME: u32 = 32 * 1024;

/// All header fields of one request or answer.
pub const HEAD: u32 = 16 * 1024;

/// What waits in one tunnel for its window.
pub const SEND_BUFFER: usize = 128 * 1024;
