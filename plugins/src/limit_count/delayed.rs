//! Counts in Redis that are told now and then: requests are counted here against what Redis said last.
//!
//! A key is asked for once and then told every `sync_interval` by a task of the control runtime. Between two times
//! several gateways may together let through more than the limit, each at most what was left for all. Keys that are
//! not asked for any more are forgotten; when there are too many, Redis is asked for each request.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use layers::limits::window::{Limit, Verdict};
use layers::plugin::BuildEnv;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::shared;
use crate::support::redis::{Failure, Redis};

/// Keys counted here.
const CAPACITY: usize = 1 << 16;
/// Keys that are told at a time.
const AT_ONCE: usize = 64;

/// What is known of a key.
struct Account {
    limit: Limit,
    /// What Redis said is left, before what was counted here since.
    left: u64,
    /// Counted here and not told yet.
    untold: u64,
    /// Being told.
    telling: u64,
    /// When what Redis said holds no more.
    end: Instant,
}

impl Account {
    fn new(limit: Limit, verdict: &Verdict, now: Instant) -> Self {
        Self { limit, left: verdict.remaining, untold: 0, telling: 0, end: end(now, verdict.reset) }
    }

    fn take(&mut self, now: Instant) -> Verdict {
        let used = self.untold + self.telling;
        let reset = self.end.saturating_duration_since(now);
        if used >= self.left {
            return Verdict { allowed: false, remaining: 0, reset };
        }
        self.untold += 1;
        Verdict { allowed: true, remaining: self.left - used - 1, reset }
    }
}

/// Tokio's clock ends in some hundred years; a window may not.
fn end(now: Instant, reset: Duration) -> Instant {
    now + reset.min(Duration::from_secs(365 * 24 * 3600))
}

/// The counts of one limit.
pub(super) struct Ledger {
    redis: Arc<Redis>,
    accounts: Mutex<HashMap<Box<str>, Account>>,
}

impl Ledger {
    /// The ledger called `name`, kept over reloads as long as a plugin holds it.
    pub(super) fn open(name: &str, redis: &Arc<Redis>, interval: Duration, env: &BuildEnv<'_>) -> Arc<Self> {
        let mut made = false;
        let ledger = env.carry.get_or(name, || {
            made = true;
            Self { redis: redis.clone(), accounts: Mutex::default() }
        });
        if made {
            let ledger = Arc::downgrade(&ledger);
            env.control.spawn(async move {
                loop {
                    sleep(interval).await;
                    let Some(ledger) = ledger.upgrade() else { return };
                    tell_all(ledger).await;
                }
            });
        }
        ledger
    }

    pub(super) fn redis(&self) -> &Arc<Redis> {
        &self.redis
    }

    /// Asks whether one more is within `limit`, and counts it if so.
    pub(super) async fn take(&self, key: String, limit: Limit, deadline: Instant) -> Result<Verdict, Failure> {
        let now = Instant::now();
        if let Some(verdict) = self.known(&key, limit, now) {
            return Ok(verdict);
        }
        let verdict = shared::take(&self.redis, &key, limit, 1, deadline).await?;
        let mut accounts = self.accounts();
        if accounts.len() < CAPACITY || accounts.contains_key(&*key) {
            accounts.insert(key.into(), Account::new(limit, &verdict, Instant::now()));
        }
        Ok(verdict)
    }

    /// What can be said without asking Redis.
    fn known(&self, key: &str, limit: Limit, now: Instant) -> Option<Verdict> {
        let mut accounts = self.accounts();
        let account = accounts.get_mut(key)?;
        let same = account.limit.count == limit.count && account.limit.window == limit.window;
        (same && now < account.end).then(|| account.take(now))
    }

    fn accounts(&self) -> std::sync::MutexGuard<'_, HashMap<Box<str>, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is over and takes out what is to be told.
    fn due(&self, now: Instant) -> Vec<(Box<str>, Limit, u64)> {
        let mut accounts = self.accounts();
        accounts.retain(|_, account| now < account.end);
        let mut due = Vec::new();
        for (key, account) in accounts.iter_mut().filter(|(_, account)| account.untold > 0) {
            account.telling = std::mem::take(&mut account.untold);
            due.push((key.clone(), account.limit, account.telling));
        }
        due
    }

    fn told(&self, key: &str, answer: Result<Verdict, Failure>) {
        let mut accounts = self.accounts();
        let Some(account) = accounts.get_mut(key) else { return };
        let telling = std::mem::take(&mut account.telling);
        match answer {
            Ok(verdict) => {
                account.left = verdict.remaining;
                account.end = end(Instant::now(), verdict.reset);
            }
            // It will be told next time.
            Err(_) => account.untold += telling,
        }
    }
}

async fn tell_all(ledger: Arc<Ledger>) {
    let mut due = ledger.due(Instant::now()).into_iter();
    let mut telling = JoinSet::new();
    loop {
        while telling.len() < AT_ONCE {
            let Some((key, limit, cost)) = due.next() else { break };
            let ledger = ledger.clone();
            telling.spawn(async move {
                let deadline = ledger.redis.deadline();
                let answer = shared::add(&ledger.redis, &key, limit, cost, deadline).await;
                ledger.told(&key, answer);
            });
        }
        if telling.join_next().await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use layers::limits::window::WindowKind;

    use super::*;

    fn limit(count: u64) -> Limit {
        Limit { count, window: Duration::from_secs(60), kind: WindowKind::Fixed }
    }

    fn verdict(remaining: u64) -> Verdict {
        Verdict { allowed: true, remaining, reset: Duration::from_secs(60) }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_left_is_given_out_once_whether_it_was_told_or_not() {
        let mut account = Account::new(limit(5), &verdict(3), Instant::now());
        let now = Instant::now();
        assert_eq!(account.take(now).remaining, 2);
        account.telling = std::mem::take(&mut account.untold);
        assert_eq!(account.take(now).remaining, 1);
        assert_eq!(account.take(now).remaining, 0);
        assert!(!account.take(now).allowed);
        assert_eq!((account.untold, account.telling), (2, 1));
    }
}
