//! The buffers that the connections of one worker use in turn, so that an idle one holds none.
//!
//! What is read leaves as slices of the buffer. As long as nobody holds one of them the buffer is used again;
//! otherwise the next read has a new one.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// An answer that begins: most are here whole with one read. Some fit into the buffer one behind the other.
    Beginning,
    /// More of a large body.
    More,
}

impl Size {
    /// Bytes that must be free, and bytes of a new buffer.
    fn bytes(self) -> (usize, usize) {
        match self {
            Self::Beginning => (16 * 1024, 32 * 1024),
            Self::More => (64 * 1024, 64 * 1024),
        }
    }
}

/// A buffer for writing that became larger is not kept.
const WRITTEN: usize = 16 * 1024;

thread_local! {
    static BEGINNINGS: Cell<BytesMut> = Cell::default();
    static MORES: Cell<BytesMut> = Cell::default();
    static WRITES: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Reads what has come; nothing at the end.
pub(super) fn poll_read<R: AsyncRead + Unpin>(
    io: &mut R,
    cx: &mut Context<'_>,
    size: Size,
) -> Poll<io::Result<Bytes>> {
    let pool = if size == Size::More { &MORES } else { &BEGINNINGS };
    let (free, new) = size.bytes();
    let mut buffer = pool.take();
    if buffer.capacity() < free {
        buffer.reserve(new);
    }
    let read = pin!(io.read_buf(&mut buffer)).poll(cx);
    let bytes = if matches!(read, Poll::Ready(Ok(1..))) { buffer.split().freeze() } else { Bytes::new() };
    pool.set(buffer);
    ready!(read)?;
    Poll::Ready(Ok(bytes))
}

/// An empty buffer to write into.
pub(super) fn writing() -> Vec<u8> {
    WRITES.take()
}

/// Gives one back.
pub(super) fn written(mut buffer: Vec<u8>) {
    if buffer.capacity() <= WRITTEN {
        buffer.clear();
        WRITES.set(buffer);
    }
}
