//! Small writes go out as one piece.
//!
//! An answer is written as a head and a body. A list of pieces costs the kernel more than a copy of a few hundred bytes
//! costs us, so what is small is put together and sent whole; what is large goes out as the list it is.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// Pieces of up to this many bytes together are copied. Measured: at 16 KiB the copy is as dear as the list.
const SMALL: usize = 4 * 1024;

thread_local! {
    static WHOLE: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(SMALL));
}

/// Writes `pieces` as far as the stream takes them.
pub(crate) fn poll_write<W: AsyncWrite>(
    stream: Pin<&mut W>,
    cx: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [piece] = pieces {
        return stream.poll_write(cx, piece);
    }
    if pieces.iter().map(|piece| piece.len()).sum::<usize>() > SMALL {
        return stream.poll_write_vectored(cx, pieces);
    }
    WHOLE.with_borrow_mut(|whole| {
        whole.clear();
        pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
        stream.poll_write(cx, whole)
    })
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    /// Notes each write.
    #[derive(Default)]
    struct Writes(Vec<String>);

    impl AsyncWrite for Writes {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.push(format!("one of {}", bytes.len()));
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.0.push(format!("list of {}", pieces.len()));
            Poll::Ready(Ok(pieces.iter().map(|piece| piece.len()).sum()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn small_pieces_are_joined_and_large_ones_are_not_copied() {
        let cases: [(&[usize], &str); 5] = [
            (&[200], "one of 200"),
            (&[200, 1000], "one of 1200"),
            (&[96, SMALL - 96], "one of 4096"),
            (&[97, SMALL - 96], "list of 2"),
            (&[SMALL * 4], "one of 16384"),
        ];
        for (sizes, wanted) in cases {
            let bytes: Vec<Vec<u8>> = sizes.iter().map(|size| vec![b'a'; *size]).collect();
            let pieces: Vec<IoSlice<'_>> = bytes.iter().map(|bytes| IoSlice::new(bytes)).collect();
            let mut writes = pin!(Writes::default());
            let written = poll_write(writes.as_mut(), &mut Context::from_waker(Waker::noop()), &pieces);
            assert!(matches!(written, Poll::Ready(Ok(all)) if all == sizes.iter().sum::<usize>()));
            assert_eq!(writes.0, [wanted], "{sizes:?}");
        }
    }
}
