//! Steady load on keep-alive connections, with an exact account of what went wrong.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::client::Raw;
use crate::eventually_within;

/// What a load did.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Answers with the expected status.
    pub good: usize,
    /// One line for each answer with another status and each request without an answer.
    pub bad: Vec<String>,
    /// Connections that ended without the answer before having announced it: those that die on reuse.
    pub died: usize,
    /// Connections that were closed after `Connection: close`.
    pub announced: usize,
    /// Time from the first byte sent to the last byte received of each good answer.
    pub latencies: Vec<Duration>,
    /// What each origin answered, by the name it gives itself in `x-origin`.
    pub origins: BTreeMap<String, Served>,
}

/// The good answers of one origin.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    pub count: usize,
    /// When its first and its last answer had arrived.
    pub first: Instant,
    pub last: Instant,
}

impl Account {
    fn add(&mut self, other: Account) {
        self.good += other.good;
        self.bad.extend(other.bad);
        self.died += other.died;
        self.announced += other.announced;
        self.latencies.extend(other.latencies);
        for (name, theirs) in other.origins {
            let ours = self.origins.entry(name).or_insert(Served { count: 0, ..theirs });
            ours.count += theirs.count;
            ours.first = ours.first.min(theirs.first);
            ours.last = ours.last.max(theirs.last);
        }
    }

    /// Panics with what went wrong, if anything did.
    #[track_caller]
    pub fn expect_no_failure(&self) {
        let first: Vec<_> = self.bad.iter().take(10).collect();
        assert!(
            self.bad.is_empty(),
            "{} of {} requests failed: {first:#?}",
            self.bad.len(),
            self.good + self.bad.len()
        );
    }

    /// What an origin answered.
    #[track_caller]
    pub fn of(&self, origin: &str) -> Served {
        *self.origins.get(origin).unwrap_or_else(|| panic!("{origin} answered nothing: {:?}", self.origins))
    }

    /// The latency that `share` (0 to 1) of the good answers stayed below.
    pub fn latency(&self, share: f64) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index of a list of a test"
        )]
        let index = (sorted.len() as f64 * share) as usize;
        sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// A load that runs until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    ended: Arc<AtomicUsize>,
    clients: JoinSet<Account>,
}

impl Load {
    /// `connections` clients that together send `rate` requests a second, each the bytes of `request`, and
    /// expect `status`. A client connects again when its connection has ended.
    pub fn start(addr: SocketAddr, request: &str, status: u16, connections: u32, rate: u32) -> Load {
        let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let pause = Duration::from_secs(1) * connections / rate;
        let mut clients = JoinSet::new();
        for index in 0..connections {
            let (stop, ended) = (Arc::clone(&stop), Arc::clone(&ended));
            let request = request.to_owned();
            clients.spawn(async move {
                // Spread the clients evenly over one period.
                tokio::time::sleep(pause * index / connections).await;
                client(addr, &request, status, pause, &stop, &ended).await
            });
        }
        Load { stop, ended, clients }
    }

    /// Lets requests under way finish and gives the account.
    pub async fn finish(mut self) -> Account {
        self.stop.store(true, Ordering::Relaxed);
        let mut account = Account::default();
        while let Some(client) = self.clients.join_next().await {
            account.add(client.expect("a load client does not panic"));
        }
        account
    }

    /// [`Load::finish`] as soon as `requests` have ended, well or badly, so that it was a load on a slow machine too.
    pub async fn finish_after(self, requests: usize) -> Account {
        eventually_within(Duration::from_secs(60), "the load has sent what is wanted of it", || async {
            (self.ended.load(Ordering::Relaxed) >= requests).then_some(())
        })
        .await;
        self.finish().await
    }
}

async fn client(
    addr: SocketAddr,
    request: &str,
    status: u16,
    pause: Duration,
    stop: &AtomicBool,
    ended: &AtomicUsize,
) -> Account {
    let mut account = Account::default();
    let mut connection = None;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(next.into()).await;
        next += pause;
        let mut raw = match connection.take() {
            Some(raw) => raw,
            None => Raw::connect(addr).await,
        };
        let begin = Instant::now();
        raw.write(request).await;
        match raw.answer().await {
            Ok(answer) if answer.status == status => {
                account.good += 1;
                let now = Instant::now();
                account.latencies.push(now - begin);
                if let Some(name) = answer.header("x-origin") {
                    let new = Served { count: 0, first: now, last: now };
                    let served = account.origins.entry(name.to_owned()).or_insert(new);
                    served.count += 1;
                    served.last = now;
                }
                if answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                    account.announced += 1;
                } else {
                    connection = Some(raw);
                }
            }
            Ok(answer) => {
                account.bad.push(format!("{} {}", answer.status, answer.text()));
                connection = Some(raw);
            }
            Err(end) => {
                account.died += 1;
                account.bad.push(format!("no answer: {end:?}"));
            }
        }
        ended.fetch_add(1, Ordering::Relaxed);
    }
    account
}
