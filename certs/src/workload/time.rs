//! The time by which a process of the mesh judges certificates: its own wall clock, unless the authority's says otherwise.
//!
//! A clock that is wrong by a day makes every certificate look expired. What the authority said, and how much time has
//! passed since by a clock that only grows, is better while it is fresh; after that the wall clock counts again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

use crate::clock::Clock;

/// How long a word of the authority counts.
const FRESH: Duration = Duration::from_secs(15 * 60);
/// A difference that is left as it is: it is within what verification allows.
const TOLERATED: Duration = Duration::from_secs(15);
/// The share of a new measurement in the average.
const WEIGHT: f64 = 0.25;

/// The time of a process.
#[derive(Debug)]
pub struct MeshTime {
    clock: Arc<dyn Clock>,
    heard: Mutex<Heard>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    /// The authority's time, and when it was said by the clock that only grows.
    anchor: Option<(SystemTime, Duration)>,
    /// The wall clock against the authority's, in milliseconds, averaged.
    offset: Option<f64>,
}

impl MeshTime {
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, heard: Mutex::default() })
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time by which certificates are judged.
    pub fn now(&self) -> SystemTime {
        let (wall, elapsed) = (self.wall(), self.elapsed());
        let Some((said, at)) = self.heard().anchor else { return wall };
        let passed = elapsed.saturating_sub(at);
        let expected = said + passed;
        let difference = wall.duration_since(expected).unwrap_or_else(|error| error.duration());
        if passed <= FRESH && difference > TOLERATED { expected } else { wall }
    }

    /// The clock of the machine.
    pub fn wall(&self) -> SystemTime {
        self.clock.now()
    }

    /// See [`Clock::elapsed`].
    pub fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// See [`Clock::pause`].
    pub fn pause(&self, time: Duration) -> BoxFuture<'static, ()> {
        self.clock.pause(time)
    }

    /// The authority has said what time it is.
    pub(super) fn hear(&self, said: SystemTime) {
        let (wall, elapsed) = (self.wall(), self.elapsed());
        let difference = match wall.duration_since(said) {
            Ok(ahead) => ahead.as_secs_f64() * 1000.0,
            Err(behind) => behind.duration().as_secs_f64() * -1000.0,
        };
        let mut heard = self.heard();
        heard.anchor = Some((said, elapsed));
        // A clock that was set does not creep to its new difference.
        heard.offset = Some(match heard.offset {
            Some(before) if (before - difference).abs() < 5_000.0 => before + (difference - before) * WEIGHT,
            _ => difference,
        });
    }

    /// The wall clock against the authority's, in milliseconds.
    pub fn offset_ms(&self) -> i64 {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a difference of clocks, rounded; too large ones saturate"
        )]
        let offset = self.heard().offset.unwrap_or(0.0).round() as i64;
        offset
    }
}

impl TimeProvider for MeshTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

#[cfg(test)]
mod tests {
    use crate::clock::ManualClock;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    #[test]
    fn a_clock_that_is_wrong_is_corrected_while_the_authority_is_heard() {
        let clock = ManualClock::new(at(0));
        let time = MeshTime::new(Arc::new(clock.clone()));
        time.hear(at(2));
        assert_eq!(time.now(), at(0), "small differences are left as they are");
        let day = 86_400;
        clock.set(at(day));
        assert_eq!(time.now(), at(2), "somebody sets the clock");
        clock.advance(Duration::from_secs(60));
        assert_eq!(time.now(), at(62));
        time.hear(at(62));
        assert_eq!(time.offset_ms(), (i64::try_from(day).unwrap() - 2) * 1000);
        clock.advance(FRESH + Duration::from_secs(1));
        assert_eq!(time.now(), time.wall(), "what was said long ago does not count");
    }

    #[test]
    fn a_new_measurement_moves_the_average_by_its_share() {
        let clock = ManualClock::new(at(10));
        let time = MeshTime::new(Arc::new(clock));
        time.hear(at(10));
        time.hear(at(9));
        assert_eq!(time.offset_ms(), 250);
        time.hear(at(9));
        assert_eq!(time.offset_ms(), 438);
    }
}
