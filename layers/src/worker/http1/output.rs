//! What is to be written to a client: text that is made here, and pieces of bodies that are sent as they are.
//!
//! Small pieces are copied behind the text, because a list costs the kernel more than the copy costs us; large ones
//! never are. An answer with a small body leaves in one write, and over TLS in one record.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::io::AsyncWrite;

/// Text and small pieces together are at most this long, where a list would do as well. Measured: at 16 KiB the copy
/// is as dear as the list.
const SMALL: usize = 4 * 1024;
/// Bytes that wait for the client before no more are asked for.
const FULL: usize = 64 * 1024;
/// Pieces that wait for the client.
const PIECES: usize = 16;
/// What an unused output keeps of its memory.
const KEPT: usize = 8 * 1024;

/// Bytes on their way out, in order.
#[derive(Debug, Default)]
pub(crate) struct Output {
    text: Vec<u8>,
    /// Each stands behind so many bytes of the text.
    pieces: Vec<(usize, Bytes)>,
    /// Bytes of all pieces.
    shared: usize,
    /// Bytes that have been written.
    written: usize,
}

impl Output {
    /// Text goes behind what is there.
    pub fn text(&mut self) -> &mut Vec<u8> {
        &mut self.text
    }

    /// A piece of a body goes behind what is there.
    pub fn push(&mut self, piece: Bytes) {
        if self.text.len() + piece.len() <= SMALL {
            self.text.extend_from_slice(&piece);
        } else if !piece.is_empty() {
            self.shared += piece.len();
            self.pieces.push((self.text.len(), piece));
        }
    }

    /// Whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.pieces.is_empty()
    }

    /// Whether the client has to take something before more is asked for.
    pub fn is_full(&self) -> bool {
        self.text.len() + self.shared - self.written >= FULL || self.pieces.len() >= PIECES
    }

    /// Forgets what is there, and gives back what is large of its memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(KEPT);
        self.pieces.clear();
        (self.shared, self.written) = (0, 0);
    }

    /// Writes until nothing is left.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_write<W: AsyncWrite>(
        &mut self,
        mut stream: Pin<&mut W>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let all = self.text.len() + self.shared;
        while self.written < all {
            let written = if self.pieces.is_empty() {
                let rest = self.text.get(self.written..).unwrap_or_default();
                ready!(stream.as_mut().poll_write(cx, rest))?
            } else {
                ready!(stream.as_mut().poll_write_vectored(cx, &self.slices()))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        self.clear();
        Poll::Ready(Ok(()))
    }

    /// What is left, as a list.
    fn slices(&self) -> SmallVec<[IoSlice<'_>; 8]> {
        let mut slices = SmallVec::new();
        let mut skip = self.written;
        let mut add = |bytes| match skip_bytes(bytes, &mut skip) {
            [] => {}
            rest => slices.push(IoSlice::new(rest)),
        };
        let mut at = 0;
        for (end, piece) in &self.pieces {
            add(self.text.get(at..*end).unwrap_or_default());
            add(piece);
            at = *end;
        }
        add(self.text.get(at..).unwrap_or_default());
        slices
    }
}

/// `bytes` without as many of the first as are still to be skipped.
fn skip_bytes<'a>(bytes: &'a [u8], skip: &mut usize) -> &'a [u8] {
    let skipped = bytes.len().min(*skip);
    *skip -= skipped;
    bytes.get(skipped..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    /// Takes so many bytes at once, and notes each write.
    struct Writes {
        room: usize,
        all: Vec<u8>,
        lists: Vec<usize>,
    }

    impl AsyncWrite for Writes {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.lists.push(pieces.len());
            let mut left = self.room;
            for piece in pieces {
                let taken = piece.len().min(left);
                self.all.extend_from_slice(&piece[..taken]);
                left -= taken;
            }
            Poll::Ready(Ok(self.room - left))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn write(sizes: &[usize], room: usize) -> Vec<usize> {
        let mut output = Output::default();
        let mut expected = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            output.text().extend_from_slice(b"head");
            output.push(Bytes::from(vec![b'a' + n as u8; *size]));
            expected.extend_from_slice(b"head");
            expected.resize(expected.len() + size, b'a' + n as u8);
        }
        output.text().extend_from_slice(b"end");
        expected.extend_from_slice(b"end");
        let mut writes = pin!(Writes { room, all: Vec::new(), lists: Vec::new() });
        let written = output.poll_write(writes.as_mut(), &mut Context::from_waker(Waker::noop()));
        assert!(matches!(written, Poll::Ready(Ok(()))) && output.is_empty());
        assert_eq!(writes.all, expected, "{sizes:?} {room}");
        std::mem::take(&mut writes.lists)
    }

    #[test]
    fn small_pieces_are_joined_and_large_ones_are_not_copied() {
        for (sizes, lists) in [
            (&[200][..], &[1][..]),
            (&[SMALL - 4], &[1]),
            (&[SMALL - 3], &[3]),
            (&[10, SMALL * 4, 10], &[3]),
            (&[0, 0], &[1]),
        ] {
            assert_eq!(write(sizes, usize::MAX), lists, "{sizes:?}");
        }
    }

    #[test]
    fn what_the_client_does_not_take_at_once_follows() {
        for room in [1, 2, 3, 5, 4096, 5000, 9999] {
            write(&[3, 5000, 0, 7, 9000], room);
        }
    }

    #[test]
    fn no_more_is_asked_for_while_much_waits() {
        let mut output = Output::default();
        (0..PIECES).for_each(|_| output.push(Bytes::from(vec![0; SMALL + 1])));
        assert!(output.is_full());
        output.clear();
        output.push(Bytes::from(vec![0; FULL - 1]));
        assert!(!output.is_full());
        output.text().push(b'x');
        assert!(output.is_full());
    }
}
