//! A Redis cluster: which node serves which keys, and a connection to each.
//!
//! Every node is watched for itself, so that one which is down costs the others nothing. A task asks the nodes for the
//! slots now and then, and at once when an answer says that they have moved or a node fails.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use redis::{Arg, Cmd, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::found::{Found, settled};
use super::node::{CONNECT, Node};
use super::{AGAIN, Address, Failure, REFRESH, Servers, Settings};

/// Slots of a cluster.
const SLOTS: u16 = 16_384;
/// Nodes asked for one command: slots may be on the move.
const REDIRECTS: usize = 4;

/// Who serves what.
#[derive(Default)]
struct Map {
    /// First slot, last slot and who serves them, by the first.
    ranges: Vec<(u16, u16, Arc<Node>)>,
    nodes: HashMap<Address, Arc<Node>>,
}

impl Map {
    fn node(&self, slot: u16) -> Option<&Arc<Node>> {
        let after = self.ranges.partition_point(|(first, ..)| *first <= slot);
        let (_, last, node) = self.ranges.get(after.checked_sub(1)?)?;
        (slot <= *last).then_some(node)
    }
}

type State = Found<Arc<Map>>;

/// A cluster.
pub(super) struct Cluster {
    state: watch::Receiver<State>,
    /// Wakes the task: the slots may have moved.
    moved: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    /// A cluster that a task asks for its slots from now on.
    pub(super) fn start(settings: &Settings, control: &Handle) -> Self {
        let moved = Arc::new(Notify::new());
        let (tell, state) = watch::channel(State::Asking);
        let task = control.spawn(watch_over(settings.clone(), tell, moved.clone(), control.clone()));
        Self { state, moved, task: task.abort_handle() }
    }

    /// Sends a command to the node of its first key.
    pub(super) async fn send(&self, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        let slot = slot(first_key(command));
        let mut told: Option<(Address, bool)> = None;
        let mut failure = Failure::TimedOut;
        for _ in 0..REDIRECTS {
            let map = timeout_at(deadline, settled(&self.state)).await.map_err(|_| Failure::TimedOut)??;
            let node = match &told {
                // A node that nobody has heard of will be known soon.
                Some((address, _)) => map.nodes.get(address).or_else(|| map.node(slot)),
                None => map.node(slot),
            };
            let Some(node) = node else {
                self.moved.notify_one();
                return Err(Failure::Unreachable("no node of the cluster serves the key".into()));
            };
            let answer = match &told {
                Some((_, true)) => {
                    let mut commands = redis::pipe();
                    commands.cmd("ASKING").add_command(command.clone());
                    node.send_all(&commands, deadline).await
                }
                _ => node.send(command, deadline).await,
            };
            let error = match answer {
                Err(Failure::Refused(error)) => error,
                Err(other) => {
                    self.moved.notify_one();
                    return Err(other);
                }
                answered => return answered,
            };
            told = match error.kind() {
                ErrorKind::Server(ServerErrorKind::Moved) => {
                    self.moved.notify_one();
                    redirect(&error).map(|address| (address, false))
                }
                ErrorKind::Server(ServerErrorKind::Ask) => redirect(&error).map(|address| (address, true)),
                ErrorKind::Server(
                    ServerErrorKind::TryAgain | ServerErrorKind::ClusterDown | ServerErrorKind::MasterDown,
                ) => {
                    self.moved.notify_one();
                    sleep(AGAIN.min(deadline.saturating_duration_since(Instant::now()))).await;
                    None
                }
                _ => return Err(Failure::Refused(error)),
            };
            failure = Failure::Refused(error);
        }
        Err(failure)
    }
}

/// Where `MOVED` and `ASK` point to.
fn redirect(error: &RedisError) -> Option<Address> {
    error.redirect_node().and_then(|(address, _)| super::address(address))
}

/// The first key of a command: the first of a script's keys, otherwise the first argument.
fn first_key(command: &Cmd) -> &[u8] {
    let mut words = command.args_iter().map(|word| match word {
        Arg::Simple(word) => word,
        _ => b"",
    });
    let name = words.next().unwrap_or_default();
    let before = if name.starts_with(b"EVAL") { 2 } else { 0 };
    words.nth(before).unwrap_or_default()
}

/// The slot of a key: of what stands in its first braces, if anything does.
fn slot(key: &[u8]) -> u16 {
    let hashed = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = key.get(open + 1..)?;
        let close = rest.iter().position(|byte| *byte == b'}')?;
        rest.get(..close).filter(|tag| !tag.is_empty())
    });
    let crc =
        hashed.unwrap_or(key).iter().fold(0_u16, |crc, byte| {
            (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
            })
        });
    crc % SLOTS
}

/// Asks for the slots until it is stopped.
async fn watch_over(settings: Settings, tell: watch::Sender<State>, moved: Arc<Notify>, control: Handle) {
    let Servers::Cluster(seeds) = &settings.servers else { return };
    let limit = settings.timeout.max(CONNECT);
    let start = |(host, port): &Address| Arc::new(Node::start(&settings, host, *port, &control));
    let mut seeds: HashMap<Address, Option<Arc<Node>>> =
        seeds.iter().map(|seed| (seed.clone(), None)).collect();
    loop {
        let map = match &*tell.borrow() {
            State::Known(map) => map.clone(),
            _ => Arc::default(),
        };
        let known: Vec<_> = map.nodes.iter().map(|(address, node)| (address.clone(), node.clone())).collect();
        // The nodes at hand first; the seeds only where none of them answers.
        let mut found = ask_any(known, limit).await;
        if found.is_err() {
            let all = seeds
                .iter_mut()
                .map(|(address, node)| (address.clone(), node.get_or_insert_with(|| start(address)).clone()));
            found = ask_any(all.collect(), limit).await;
        }
        match found {
            Ok(ranges) => {
                let mut next = Map::default();
                for (first, last, address) in ranges {
                    let node = next.nodes.entry(address).or_insert_with_key(|address| {
                        let seed = || seeds.get(address).cloned().flatten();
                        map.nodes.get(address).cloned().or_else(seed).unwrap_or_else(|| start(address))
                    });
                    next.ranges.push((first, last, node.clone()));
                }
                next.ranges.sort_by_key(|(first, ..)| *first);
                seeds.values_mut().for_each(|node| *node = None);
                tell.send_replace(State::Known(Arc::new(next)));
            }
            Err(why) if map.nodes.is_empty() => {
                if !matches!(&*tell.borrow(), State::Unknown(_)) {
                    tracing::warn!(%why, "redis: no node of the cluster tells its slots");
                }
                tell.send_replace(State::Unknown(why));
            }
            // What was known last may still hold.
            Err(_) => {}
        }
        sleep(REFRESH.0).await;
        let _ = timeout(REFRESH.1, moved.notified()).await;
    }
}

type Ranges = Vec<(u16, u16, Address)>;

/// The slots as one of the nodes tells them; the first that answers.
async fn ask_any(nodes: Vec<(Address, Arc<Node>)>, limit: Duration) -> Result<Ranges, Arc<str>> {
    let mut asking = tokio::task::JoinSet::new();
    for (address, node) in nodes {
        asking.spawn(async move {
            let mut command = redis::cmd("CLUSTER");
            command.arg("SLOTS");
            let answer =
                node.send(&command, Instant::now() + limit).await.map_err(|error| error.to_string())?;
            let ranges = read(answer, &address.0).filter(|ranges| !ranges.is_empty());
            ranges.ok_or_else(|| "it serves no slots".to_owned())
        });
    }
    let mut why = "no node is known".to_owned();
    while let Some(answer) = asking.join_next().await {
        match answer {
            Ok(Ok(ranges)) => return Ok(ranges),
            Ok(Err(error)) => why = error,
            Err(error) => why = error.to_string(),
        }
    }
    Err(why.into())
}

/// Reads an answer to `CLUSTER SLOTS`. A node that does not know its own host means the one that was asked.
fn read(answer: Value, asked: &str) -> Option<Ranges> {
    let Value::Array(ranges) = answer else { return None };
    let number = |value: &Value| match value {
        Value::Int(number) => u16::try_from(*number).ok(),
        _ => None,
    };
    let ranges = ranges.into_iter().map(|range| {
        let Value::Array(range) = range else { return None };
        let (first, last) = (number(range.first()?)?, number(range.get(1)?)?);
        let Value::Array(master) = range.get(2)? else { return None };
        let host = match master.first()? {
            Value::BulkString(host) => std::str::from_utf8(host).ok()?,
            Value::SimpleString(host) => host,
            _ => "",
        };
        let host = if host.is_empty() || host == "?" { asked } else { host };
        Some((first, last, (host.to_owned(), number(master.get(1)?)?)))
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_slots_that_redis_gives_them() {
        // As CLUSTER KEYSLOT says.
        for (key, expected) in [
            ("123456789", 12_739),
            ("foo", 12_182),
            ("{foo}.bar", 12_182),
            ("a{foo}{b}", 12_182),
            ("{}foo", 9_500),
            ("", 0),
        ] {
            assert_eq!(slot(key.as_bytes()), expected, "{key}");
        }
    }

    #[test]
    fn a_command_goes_where_its_first_key_is() {
        let mut command = redis::cmd("EVALSHA");
        command.arg("hash").arg(1).arg("key").arg("argument");
        assert_eq!(first_key(&command), b"key");
        let mut command = redis::cmd("GET");
        assert_eq!(first_key(&command), b"");
        command.arg("key");
        assert_eq!(first_key(&command), b"key");
    }

    #[test]
    fn slots_are_read_as_redis_tells_them() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |first, last, host: Value, port| {
            let master = Value::Array(vec![host, Value::Int(port), text("id")]);
            Value::Array(vec![Value::Int(first), Value::Int(last), master])
        };
        let answer = Value::Array(vec![
            range(0, 5, text("a"), 1),
            range(6, 9, text(""), 2),
            range(10, 16_383, Value::Nil, 3),
        ]);
        let host = |host: &str, port| (host.to_owned(), port);
        let expected = vec![(0, 5, host("a", 1)), (6, 9, host("asked", 2)), (10, 16_383, host("asked", 3))];
        assert_eq!(read(answer, "asked"), Some(expected));
        for wrong in
            [Value::Nil, Value::Array(vec![Value::Int(1)]), Value::Array(vec![range(-1, 0, text("a"), 1)])]
        {
            assert_eq!(read(wrong, "asked"), None);
        }
    }
}
