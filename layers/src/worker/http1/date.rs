//! The `Date` of answers, written out once per tick of the worker's clock.

use std::time::SystemTime;

use crate::worker::deadlines::Clock;

/// The moment as a `Date` field has it.
#[derive(Debug)]
pub(crate) struct Date {
    clock: Clock,
    tick: Option<u32>,
    text: String,
}

impl Date {
    /// By the worker's clock.
    pub fn new(clock: Clock) -> Self {
        Self { clock, tick: None, text: String::new() }
    }

    /// Not older than a tick of a worker that keeps up.
    pub fn text(&mut self) -> &str {
        let now = self.clock.now();
        if self.tick != Some(now) {
            self.tick = Some(now);
            self.text = httpdate::fmt_http_date(SystemTime::now());
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::worker::deadlines::{Deadlines, Timeouts};

    #[test]
    fn it_is_read_again_after_a_tick() {
        let deadlines = Deadlines::new(&Timeouts::default());
        let mut date = Date::new(deadlines.clock().clone());
        let first = httpdate::parse_http_date(date.text()).unwrap();
        assert!(first.elapsed().unwrap() < Duration::from_secs(60));
        date.text = "Sun, 06 Nov 1994 08:49:37 GMT".to_owned();
        assert_eq!(date.text(), "Sun, 06 Nov 1994 08:49:37 GMT", "as long as the clock stands still");
        deadlines.tick();
        assert!(httpdate::parse_http_date(date.text()).unwrap() >= first);
    }
}
