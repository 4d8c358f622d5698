//! When traffic returns to nodes of a better priority that were out of use.
//!
//! A tier that failed and stands again is held back until it has stood for a while and, where windows are written, the
//! time is inside one of them: so a site comes back when people are there to look. While nothing else can serve,
//! nothing is held back. Control side only; time is what the caller says it is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use config::upstream::discovery::{Day, Failover, Window as Wire};

/// Priorities that are remembered. More than anybody has.
const MAX_TIERS: usize = 64;
/// The clock on the wall may be set: it is looked at this often while a window is waited for.
const LOOK: Duration = Duration::from_secs(60);

const DAY: i64 = 24 * 3600;

/// When a tier may come back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    delay: Duration,
    windows: Box<[Window]>,
}

impl Rule {
    /// The rule as it was written.
    pub fn new(wire: &Failover) -> Self {
        Self {
            delay: wire.delay.0.duration(),
            windows: wire.windows.iter().flatten().map(Window::new).collect(),
        }
    }

    /// None where traffic may return at `wall`; otherwise how long to wait before looking again.
    fn closed(&self, wall: SystemTime) -> Option<Duration> {
        let since = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(since.as_secs()).unwrap_or(i64::MAX / 2);
        if self.windows.is_empty() || self.windows.iter().any(|window| window.contains(now)) {
            return None;
        }
        let seconds = self.windows.iter().filter_map(|window| window.opens_in(now)).min();
        Some(seconds.map_or(LOOK, Duration::from_secs).clamp(Duration::from_secs(1), LOOK))
    }
}

/// A time of the day on some days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    /// Seconds since the beginning of the day.
    from: i64,
    length: i64,
    /// The days on which it begins, Monday in the lowest bit.
    days: u8,
    /// Seconds ahead of UTC.
    offset: i64,
}

impl Window {
    fn new(wire: &Wire) -> Self {
        let (from, to) = (i64::from(wire.from.minutes()) * 60, i64::from(wire.to.minutes()) * 60);
        let days = wire.days.as_ref().map_or(0x7f, |days| {
            days.iter().fold(0, |days, day| {
                days | match day {
                    Day::Mon => 1,
                    Day::Tue => 2,
                    Day::Wed => 4,
                    Day::Thu => 8,
                    Day::Fri => 16,
                    Day::Sat => 32,
                    Day::Sun => 64,
                }
            })
        });
        Self {
            from,
            length: if to > from { to - from } else { to + DAY - from },
            days,
            offset: i64::from(wire.utc_offset.unwrap_or_default().minutes()) * 60,
        }
    }

    /// Its beginnings from the day before `now` on, as seconds since 1970.
    fn beginnings(self, now: i64) -> impl Iterator<Item = i64> {
        let today = (now + self.offset).div_euclid(DAY);
        (today - 1..=today + 7)
            // The first day of 1970 was a Thursday.
            .filter(move |day| self.days & 1 << (day + 3).rem_euclid(7) != 0)
            .map(move |day| day * DAY + self.from - self.offset)
    }

    fn contains(self, now: i64) -> bool {
        self.beginnings(now).any(|from| from <= now && now < from + self.length)
    }

    /// Seconds until it begins next.
    fn opens_in(self, now: i64) -> Option<u64> {
        self.beginnings(now).find(|from| *from > now).and_then(|from| u64::try_from(from - now).ok())
    }
}

/// What is remembered of the tiers of one upstream.
#[derive(Debug, Default)]
pub(crate) struct Tiers {
    by_priority: BTreeMap<i32, Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It gets requests when its turn comes.
    InUse,
    /// It has failed, and stands again since then, if it does.
    Away(Option<Instant>),
}

/// The tiers that have to wait, and when to look again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) priorities: Vec<i32>,
    pub(crate) again: Option<Duration>,
}

impl Tiers {
    /// Takes in how the tiers stand now: their priorities, and whether they stand.
    pub(crate) fn settle(
        &mut self,
        rule: &Rule,
        tiers: &[(i32, bool)],
        now: Instant,
        wall: SystemTime,
    ) -> Held {
        let mut held = Held::default();
        for (priority, place) in &mut self.by_priority {
            if !tiers.iter().any(|(known, _)| known == priority) {
                *place = Place::Away(None);
            }
        }
        for (priority, stands) in tiers {
            // A tier that is new has not failed.
            let place = self.by_priority.entry(*priority).or_insert(Place::InUse);
            *place = match *place {
                _ if !stands => Place::Away(None),
                Place::InUse => Place::InUse,
                Place::Away(since) => {
                    let since = since.unwrap_or(now);
                    let left = rule.delay.saturating_sub(now.saturating_duration_since(since));
                    let wait = if left.is_zero() { rule.closed(wall) } else { Some(left) };
                    match wait {
                        None => Place::InUse,
                        Some(wait) => {
                            held.priorities.push(*priority);
                            held.again = Some(held.again.map_or(wait, |again| again.min(wait)));
                            Place::Away(Some(since))
                        }
                    }
                }
            };
        }
        let in_use = |(priority, stands): &(i32, bool)| {
            *stands && self.by_priority.get(priority).is_none_or(|place| *place == Place::InUse)
        };
        if !tiers.iter().any(in_use) {
            for priority in held.priorities.drain(..) {
                self.by_priority.insert(priority, Place::InUse);
            }
            held.again = None;
        }
        while self.by_priority.len() > MAX_TIERS {
            self.by_priority.pop_first();
        }
        held
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn rule(wire: serde_json::Value) -> Rule {
        Rule::new(&serde_json::from_value(wire).unwrap())
    }

    /// Monday 2024-01-01 00:00 UTC, and so many seconds later.
    fn wall(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_704_067_200 + seconds)
    }

    const HOUR: u64 = 3600;

    #[test]
    fn windows_open_and_close() {
        let night = json!({"from": "22:00", "to": "02:00", "days": ["mon", "fri"]});
        let office = json!({"from": "09:00", "to": "17:30", "days": ["mon", "tue", "wed", "thu", "fri"]});
        let beijing = json!({"from": "00:00", "to": "01:00", "utc_offset": "+08:00"});
        let always = json!({"from": "07:00", "to": "07:00"});
        for (window, at, open) in [
            (&night, 21 * HOUR + 3599, false),
            (&night, 22 * HOUR, true),
            (&night, 26 * HOUR - 1, true),
            (&night, 26 * HOUR, false),
            (&night, 46 * HOUR, false),
            (&night, (4 * 24 + 23) * HOUR, true),
            (&night, (5 * 24 + 1) * HOUR, true),
            (&office, 9 * HOUR, true),
            (&office, 17 * HOUR + 1800, false),
            (&office, (5 * 24 + 12) * HOUR, false),
            (&beijing, 16 * HOUR, true),
            (&beijing, 17 * HOUR, false),
            (&beijing, 0, false),
            (&always, 0, true),
            (&always, 7 * HOUR, true),
            (&always, 8 * HOUR, true),
        ] {
            let rule = rule(json!({"windows": [window]}));
            assert_eq!(rule.closed(wall(at)).is_none(), open, "{window} after {at} s");
        }
        let weekly = Window::new(
            &serde_json::from_value(json!({"from": "12:00", "to": "13:00", "days": ["sun"]})).unwrap(),
        );
        let monday = 1_704_067_200;
        assert_eq!(weekly.opens_in(monday), Some((6 * 24 + 12) * HOUR));
        assert_eq!(weekly.opens_in(monday + 6 * DAY + 12 * 3600), Some(7 * 24 * HOUR), "a week later");
    }

    /// One moment: seconds, which tiers stand (`+2` stands, `-1` does not), which are held, when to look again.
    type Moment<'a> = (u64, &'a str, &'a [i32], Option<u64>);

    fn play(rule: &Rule, moments: &[Moment<'_>]) {
        let mut tiers = Tiers::default();
        let start = Instant::now();
        for (seconds, written, held, again) in moments {
            let list: Vec<(i32, bool)> = written
                .split_whitespace()
                .map(|tier| (tier[1..].parse().unwrap(), tier.starts_with('+')))
                .collect();
            let found = tiers.settle(rule, &list, start + Duration::from_secs(*seconds), wall(*seconds));
            let wanted = Held { priorities: held.to_vec(), again: again.map(Duration::from_secs) };
            assert_eq!(found, wanted, "after {seconds} s: {written}");
        }
    }

    #[test]
    fn a_tier_comes_back_when_it_has_stood_for_the_delay() {
        play(
            &rule(json!({"delay": 10})),
            &[
                (0, "+1 +0", &[], None),
                (1, "-1 +0", &[], None),
                (5, "+1 +0", &[1], Some(10)),
                (8, "+1 +0", &[1], Some(7)),
                (9, "-1 +0", &[], None),
                (12, "+1 +0", &[1], Some(10)),
                (21, "+1 +0", &[1], Some(1)),
                (22, "+1 +0", &[], None),
                (23, "+1 +0", &[], None),
            ],
        );
    }

    #[test]
    fn without_a_rule_it_comes_back_at_once() {
        play(
            &rule(json!({"delay": 0})),
            &[(0, "+1 +0", &[], None), (1, "-1 +0", &[], None), (2, "+1 +0", &[], None)],
        );
    }

    #[test]
    fn it_waits_for_a_window_too() {
        let rule = rule(json!({"delay": 10, "windows": [{"from": "02:00", "to": "03:00"}]}));
        play(
            &rule,
            &[
                (0, "-1 +0", &[], None),
                (100, "+1 +0", &[1], Some(10)),
                (110, "+1 +0", &[1], Some(60)),
                (2 * HOUR - 5, "+1 +0", &[1], Some(5)),
                (2 * HOUR, "+1 +0", &[], None),
                (4 * HOUR, "+1 +0", &[], None),
            ],
        );
    }

    #[test]
    fn nothing_is_held_back_while_nothing_else_can_serve() {
        play(
            &rule(json!({"delay": 1000})),
            &[
                (0, "+1 +0", &[], None),
                (1, "-1 +0", &[], None),
                (2, "+1 +0", &[1], Some(1000)),
                (3, "+1 -0", &[], None),
                (4, "+1 +0", &[0], Some(1000)),
                (5, "-1 +0", &[], None),
            ],
        );
    }

    #[test]
    fn a_tier_whose_nodes_were_gone_has_failed_and_one_that_is_new_has_not() {
        play(
            &rule(json!({"delay": 10})),
            &[
                (0, "+2 +0", &[], None),
                (1, "+0", &[], None),
                (2, "+2 +0", &[2], Some(10)),
                (3, "+5 +2 +0", &[2], Some(9)),
            ],
        );
    }
}
