//! HTTP/1 framing: no panic, and what passes does not depend on how the bytes are cut.

#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use layers::transport::framing::{Guard, HeadLimits, Position, Refusal};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, ReadBuf};

struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let taken = self.0.len().min(self.1).min(buf.remaining());
        buf.put_slice(&self.0[..taken]);
        self.0 = &self.0[taken..];
        Poll::Ready(Ok(()))
    }
}

fn run(bytes: &[u8], size: usize) -> (Vec<u8>, Option<Refusal>, Position, bool) {
    let mut guard = Guard::new(HeadLimits { line: 128, head: 512, fields: 8 });
    let mut io = Pieces(bytes, size);
    let mut cx = Context::from_waker(Waker::noop());
    let mut passed = Vec::new();
    let broken = loop {
        let mut space = [0; 256];
        let mut buf = ReadBuf::new(&mut space);
        match guard.poll_read(Pin::new(&mut io), &mut cx, &mut buf) {
            Poll::Ready(Ok(())) if buf.filled().is_empty() => break false,
            Poll::Ready(Ok(())) => passed.extend_from_slice(buf.filled()),
            Poll::Ready(Err(_)) => break true,
            Poll::Pending => break false,
        }
    };
    (passed, guard.refusal(), guard.position(), broken)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let whole = run(bytes, usize::MAX);
    assert_eq!(run(bytes, usize::from(size) + 1), whole);
    assert_eq!(run(bytes, 1), whole);
});
