//! How the services of one registry share its failures.
//!
//! When a registry is gone, everybody who follows a service there fails. If each asked again every second, two thousand
//! of them would keep a struggling registry down; if each waited up to half a minute, it would be that long until its
//! return is seen. So a few of them, the scouts, ask every second, the others back off; the first one that is
//! answered again tells all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// How many ask a failing registry every second.
const SCOUTS: usize = 16;
/// After this many vain attempts a scout makes room for another service: what is wrong may be wrong with it alone.
const TURNS: u32 = 8;
/// The first attempt after a failure comes soon: most failures are a connection that was closed.
const FIRST: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(200));
/// Between attempts of a scout.
const SCOUT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(1));
/// The others draw from nothing to a step that grows between these.
const STEP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// The shortest pause of all.
const LEAST: Duration = Duration::from_millis(100);
/// Those who are told of a return come back within this.
const RETURN: Duration = Duration::from_millis(500);
/// A registry may ask to be left alone, but not for longer.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// What the services of one registry have in common.
#[derive(Debug)]
pub(super) struct Herd {
    scouts: AtomicUsize,
    /// Services that fail, the scouts among them.
    failing: AtomicUsize,
    returns: watch::Sender<u64>,
}

impl Default for Herd {
    fn default() -> Self {
        Self { scouts: AtomicUsize::new(0), failing: AtomicUsize::new(0), returns: watch::Sender::new(0) }
    }
}

impl Herd {
    /// Not all that fail can be scouts.
    fn is_crowded(&self) -> bool {
        self.failing.load(Ordering::Acquire) > SCOUTS
    }
}

/// One service's part in it.
#[derive(Debug)]
pub(super) struct Member {
    herd: Arc<Herd>,
    returns: watch::Receiver<u64>,
    /// Failures in a row.
    streak: u32,
    /// As a scout.
    turns: Option<u32>,
}

impl Member {
    pub(super) fn of(herd: &Arc<Herd>) -> Self {
        Self { herd: Arc::clone(herd), returns: herd.returns.subscribe(), streak: 0, turns: None }
    }

    pub(super) fn fails(&self) -> bool {
        self.streak > 0
    }

    pub(super) fn streak(&self) -> u32 {
        self.streak
    }

    /// The question was answered.
    pub(super) fn answered(&mut self) {
        if self.streak > 0 {
            self.recover();
            self.herd.returns.send_modify(|count| *count += 1);
            // Its own return is no news to it.
            self.returns.mark_unchanged();
        }
    }

    /// The question failed: how long to wait.
    pub(super) fn failed(&mut self, retry_after: Option<Duration>) -> Duration {
        self.streak = self.streak.saturating_add(1);
        if self.streak == 1 {
            self.herd.failing.fetch_add(1, Ordering::AcqRel);
            // What happened before is no news.
            self.returns.mark_unchanged();
        }
        if let Some(wish) = retry_after {
            self.resign();
            let wish = wish.clamp(SCOUT.0, MAX_RETRY_AFTER);
            return wish + wish.mul_f64(fastrand::f64() / 10.0);
        }
        match self.turns {
            Some(turns) if turns >= TURNS && self.herd.is_crowded() => self.resign(),
            Some(turns) => self.turns = Some(turns.saturating_add(1)),
            None => {
                let free = |count: usize| (count < SCOUTS).then_some(count + 1);
                let taken = self.herd.scouts.fetch_update(Ordering::AcqRel, Ordering::Acquire, free);
                self.turns = taken.is_ok().then_some(1);
            }
        }
        match (self.turns, self.streak) {
            (Some(_), 1) => between(FIRST),
            (Some(_), _) => between(SCOUT),
            (None, streak) => {
                let step = STEP.0.saturating_mul(1 << (streak - 1).min(5)).min(STEP.1);
                step.mul_f64(fastrand::f64()).max(LEAST)
            }
        }
    }

    /// Waits until another service is answered again after failures; how long to wait then.
    pub(super) async fn returned(&mut self) -> Duration {
        if self.returns.changed().await.is_err() {
            // The sender is in the herd, which this member holds.
            std::future::pending::<()>().await;
        }
        RETURN.mul_f64(fastrand::f64())
    }

    fn recover(&mut self) {
        self.resign();
        if std::mem::take(&mut self.streak) > 0 {
            self.herd.failing.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn resign(&mut self) {
        if self.turns.take().is_some() {
            self.herd.scouts.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.recover();
    }
}

fn between((least, most): (Duration, Duration)) -> Duration {
    least + (most - least).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_few_ask_often_and_the_others_back_off() {
        let herd = Arc::new(Herd::default());
        let mut members: Vec<Member> = (0..200).map(|_| Member::of(&herd)).collect();
        for round in 1..=40 {
            for member in &mut members {
                let pause = member.failed(None);
                let most = match (member.turns, round) {
                    (Some(_), 1) => FIRST.1,
                    (Some(_), _) => SCOUT.1,
                    (None, _) => STEP.1,
                };
                assert!(pause <= most, "{pause:?} in round {round}");
            }
            let scouts = members.iter().filter(|member| member.turns.is_some()).count();
            assert!(scouts <= SCOUTS, "{scouts}");
        }
        drop(members);
        assert_eq!(herd.scouts.load(Ordering::Acquire), 0);
    }

    #[test]
    fn a_scout_makes_room_where_others_wait() {
        for (others, makes_room) in [(0, false), (SCOUTS - 1, false), (SCOUTS, true)] {
            let herd = Arc::new(Herd::default());
            let mut scout = Member::of(&herd);
            scout.failed(None);
            let mut others: Vec<Member> = (0..others).map(|_| Member::of(&herd)).collect();
            others.iter_mut().for_each(|other| assert!(!other.failed(None).is_zero()));
            let resigned = (0..3 * TURNS).any(|_| scout.failed(None) > SCOUT.1 || scout.turns.is_none());
            assert_eq!(resigned, makes_room, "{} others", others.len());
            drop(others);
            drop(scout);
            assert_eq!(herd.failing.load(Ordering::Acquire), 0);
        }
    }

    #[test]
    fn a_return_is_told_to_all_who_fail_and_to_nobody_twice() {
        let herd = Arc::new(Herd::default());
        let (mut first, mut second) = (Member::of(&herd), Member::of(&herd));
        first.failed(None);
        second.failed(None);
        assert_eq!(second.returned().now_or_never(), None);
        first.answered();
        assert!(second.returned().now_or_never().is_some_and(|pause| pause <= RETURN));
        assert_eq!(second.returned().now_or_never(), None);
        assert_eq!(first.returned().now_or_never(), None);
        // An answer that ends no failure is no return: else one service that is broken for good would be asked all the time.
        first.answered();
        assert_eq!(second.returned().now_or_never(), None);
    }

    #[test]
    fn a_registry_that_asks_for_peace_gets_it() {
        let mut member = Member::of(&Arc::new(Herd::default()));
        for (wish, least, most) in [(7, 7, 8), (0, 0, 1), (86_400, 300, 330)] {
            let pause = member.failed(Some(Duration::from_secs(wish)));
            assert!((Duration::from_secs(least)..=Duration::from_secs(most)).contains(&pause), "{pause:?}");
        }
    }
}
