//! Counts HTTP/2 frames in front of the engine, to end a connection that only makes work: floods of PING, SETTINGS,
//! PRIORITY, WINDOW_UPDATE, empty DATA, CONTINUATION, and streams opened to be reset. It reads frame headers and
//! skips what they announce; it changes nothing.

/// Length of the client's connection preface.
const PREFACE: u64 = 24;
/// Frames without use that a client may send at once, and how many more each tick of 100 ms allows.
const IDLE_FRAMES: i64 = 10_000;
const IDLE_FRAMES_PER_TICK: i64 = 100;
/// What a frame of use (HEADERS, DATA with bytes) gives back: its window updates and pings.
const WORTH: i64 = 4;
/// Streams that a client may reset at once, and how many more each tick allows.
const RESETS: i64 = 1_000;
const RESETS_PER_TICK: i64 = 5;
/// Frames that continue one header block.
const CONTINUATIONS: u32 = 64;

/// What a client floods with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Flood {
    #[error("too many HTTP/2 frames without use")]
    Frames,
    #[error("too many HTTP/2 streams reset by the client")]
    Resets,
    #[error("too many CONTINUATION frames in one header block")]
    Continuations,
}

/// The counter of one connection.
#[derive(Debug)]
pub struct Frames {
    /// Bytes of the preface or of a payload that are still to be skipped.
    skip: u64,
    header: [u8; 9],
    have: usize,
    idle: i64,
    resets: i64,
    continuations: u32,
    ticked: u32,
}

impl Frames {
    /// Before the preface; `now` is the worker's tick.
    pub fn new(now: u32) -> Self {
        Self {
            skip: PREFACE,
            header: [0; 9],
            have: 0,
            idle: IDLE_FRAMES,
            resets: RESETS,
            continuations: 0,
            ticked: now,
        }
    }

    /// Follows bytes from the client.
    ///
    /// # Errors
    /// The client floods; the connection is to end.
    pub fn scan(&mut self, mut bytes: &[u8], now: u32) -> Result<(), Flood> {
        let ticks = i64::from(now.saturating_sub(self.ticked));
        if ticks > 0 {
            self.ticked = now;
            self.idle = (self.idle + ticks * IDLE_FRAMES_PER_TICK).min(IDLE_FRAMES);
            self.resets = (self.resets + ticks * RESETS_PER_TICK).min(RESETS);
        }
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len() as u64);
                self.skip -= skipped;
                bytes = bytes.get(skipped as usize..).unwrap_or_default();
                continue;
            }
            let missing = self.header.len() - self.have;
            let part = bytes.get(..missing.min(bytes.len())).unwrap_or_default();
            if let Some(room) = self.header.get_mut(self.have..self.have + part.len()) {
                room.copy_from_slice(part);
            }
            self.have += part.len();
            bytes = bytes.get(part.len()..).unwrap_or_default();
            if self.have == self.header.len() {
                self.have = 0;
                self.count()?;
            }
        }
        Ok(())
    }

    /// Bytes went to the client, for which it may send window updates.
    pub fn sent(&mut self, bytes: usize) {
        self.idle = (self.idle + (bytes / 512) as i64).min(IDLE_FRAMES);
    }

    fn count(&mut self) -> Result<(), Flood> {
        let [high, middle, low, kind, flags, ..] = self.header;
        let length = u64::from(u32::from_be_bytes([0, high, middle, low]));
        self.skip = length;
        let continues = kind == 0x9;
        self.continuations = if continues { self.continuations + 1 } else { 0 };
        if self.continuations > CONTINUATIONS {
            return Err(Flood::Continuations);
        }
        let ends_stream = flags & 0x1 != 0;
        match kind {
            0x0 if length > 0 || ends_stream => self.idle = (self.idle + WORTH).min(IDLE_FRAMES),
            0x1 => self.idle = (self.idle + WORTH).min(IDLE_FRAMES),
            0x3 => {
                self.resets -= 1;
                if self.resets < 0 {
                    return Err(Flood::Resets);
                }
            }
            _ => {
                self.idle -= 1;
                if self.idle < 0 {
                    return Err(Flood::Frames);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let [_, high, middle, low] = (payload as u32).to_be_bytes();
        let mut bytes = vec![high, middle, low, kind, flags, 0, 0, 0, 1];
        bytes.resize(9 + payload, 0xaa);
        bytes
    }

    /// How many rounds of these frames pass before the connection ends.
    fn rounds(frames: &[Vec<u8>], limit: usize, piece: usize) -> (usize, Option<Flood>) {
        let mut counter = Frames::new(0);
        assert_eq!(counter.scan(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0), Ok(()));
        for round in 0..limit {
            for part in frames.concat().chunks(piece) {
                if let Err(flood) = counter.scan(part, 0) {
                    return (round, Some(flood));
                }
            }
        }
        (limit, None)
    }

    #[test]
    fn floods_end_and_work_does_not() {
        type Case<'a> = (&'a str, Vec<Vec<u8>>, usize, Option<Flood>);
        let cases: &[Case<'_>] = &[
            ("ping", vec![frame(6, 0, 8)], 10_000, Some(Flood::Frames)),
            ("settings", vec![frame(4, 0, 0)], 10_000, Some(Flood::Frames)),
            ("priority", vec![frame(2, 0, 5)], 10_000, Some(Flood::Frames)),
            ("window update", vec![frame(8, 0, 4)], 10_000, Some(Flood::Frames)),
            ("empty data", vec![frame(0, 0, 0)], 10_000, Some(Flood::Frames)),
            ("unknown", vec![frame(0x77, 0, 3)], 10_000, Some(Flood::Frames)),
            ("rapid reset", vec![frame(1, 5, 20), frame(3, 0, 4)], 1_000, Some(Flood::Resets)),
            ("continuation", vec![frame(1, 0, 20), frame(9, 0, 0)], 20_000, None),
            ("requests", vec![frame(1, 5, 20), frame(8, 0, 4), frame(6, 0, 8)], 50_000, None),
            ("upload", vec![frame(0, 0, 100), frame(8, 0, 4)], 50_000, None),
        ];
        for (what, frames, count, flood) in cases {
            for piece in [1, 7, 4096] {
                let limit =
                    if piece == 1 { count.min(&11_000) } else { count } + usize::from(flood.is_some());
                let expected = if flood.is_some() { (*count, *flood) } else { (limit, None) };
                assert_eq!(rounds(frames, limit, piece), expected, "{what} in {piece}");
            }
        }
    }

    #[test]
    fn an_endless_header_block_ends() {
        let mut frames = vec![frame(1, 0, 20)];
        frames.extend((0..CONTINUATIONS + 1).map(|_| frame(9, 0, 10)));
        assert_eq!(rounds(&frames, 1, 4096), (0, Some(Flood::Continuations)));
    }

    #[test]
    fn time_and_answers_give_credit() {
        let mut counter = Frames::new(0);
        let preface = [0; PREFACE as usize];
        assert_eq!(counter.scan(&preface, 0), Ok(()));
        for tick in 0..2_000u32 {
            for _ in 0..IDLE_FRAMES_PER_TICK {
                assert_eq!(counter.scan(&frame(6, 0, 8), tick + 1), Ok(()), "a steady rate is kept up");
            }
        }
        for _ in 0..50_000 {
            counter.sent(512);
            assert_eq!(counter.scan(&frame(8, 0, 4), 2_001), Ok(()));
        }
    }
}
