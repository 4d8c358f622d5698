//! A master that sentinels watch: who it is, and the connection to it.
//!
//! A task asks all sentinels now and then, and at once when the master fails or says that it is none any more. What most
//! of them say counts: one that is cut off from the others may still name the master of yesterday.

use std::sync::Arc;

use redis::{Cmd, ErrorKind, ServerErrorKind, Value};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::found::{Found, settled};
use super::node::{CONNECT, Node};
use super::{AGAIN, Address, Failure, REFRESH, Sentinels, Settings};

/// How often one command is sent to somebody who may have become a replica in the meantime.
const ATTEMPTS: usize = 4;

/// A master behind its sentinels.
pub(super) struct Sentinel {
    state: watch::Receiver<Found<Arc<Node>>>,
    /// Wakes the task: there may be another master.
    moved: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Sentinel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sentinel").finish_non_exhaustive()
    }
}

impl Sentinel {
    /// A master that a task asks the sentinels for from now on.
    pub(super) fn start(settings: &Settings, sentinels: &Sentinels, control: &Handle) -> Self {
        let moved = Arc::new(Notify::new());
        let (tell, state) = watch::channel(Found::Asking);
        let watching = watch_over(settings.clone(), sentinels.clone(), tell, moved.clone(), control.clone());
        Self { state, moved, task: control.spawn(watching).abort_handle() }
    }

    /// Sends a command to the master.
    pub(super) async fn send(&self, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        let mut failure = Failure::TimedOut;
        for _ in 0..ATTEMPTS {
            let master =
                timeout_at(deadline, settled(&self.state)).await.map_err(|_| Failure::TimedOut)??;
            let error = match master.send(command, deadline).await {
                Err(Failure::Refused(error)) => error,
                Err(other) => {
                    self.moved.notify_one();
                    return Err(other);
                }
                answered => return answered,
            };
            match error.kind() {
                ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown) => {
                    self.moved.notify_one();
                    sleep(AGAIN.min(deadline.saturating_duration_since(Instant::now()))).await;
                }
                ErrorKind::Server(_) => return Err(Failure::Refused(error)),
                _ => {
                    self.moved.notify_one();
                    return Err(Failure::Refused(error));
                }
            }
            failure = Failure::Refused(error);
        }
        Err(failure)
    }
}

/// Asks for the master until it is stopped.
async fn watch_over(
    settings: Settings,
    sentinels: Sentinels,
    tell: watch::Sender<Found<Arc<Node>>>,
    moved: Arc<Notify>,
    control: Handle,
) {
    let own = sentinels.settings(&settings);
    let asked: Vec<_> = sentinels
        .addresses
        .iter()
        .map(|(host, port)| Arc::new(Node::start(&own, host, *port, &control)))
        .collect();
    let limit = settings.timeout.max(CONNECT);
    let mut master: Option<Address> = None;
    loop {
        match ask(&asked, &sentinels.master, limit).await {
            Ok(found) if master.as_ref() == Some(&found) => {}
            Ok(found) => {
                let (host, port) = &found;
                if master.is_some() {
                    tracing::info!(
                        name = sentinels.master,
                        host,
                        port,
                        "redis: the sentinels name another master"
                    );
                }
                tell.send_replace(Found::Known(Arc::new(Node::start(&settings, host, *port, &control))));
                master = Some(found);
            }
            Err(why) if master.is_none() => {
                if !matches!(&*tell.borrow(), Found::Unknown(_)) {
                    tracing::warn!(name = sentinels.master, %why, "redis: no sentinel names the master");
                }
                tell.send_replace(Found::Unknown(why));
            }
            // Who was it last may still be it.
            Err(_) => {}
        }
        sleep(REFRESH.0).await;
        let pause = if master.is_some() { REFRESH.1 } else { CONNECT };
        let _ = timeout(pause, moved.notified()).await;
    }
}

/// Whom most of the sentinels name that answer.
async fn ask(sentinels: &[Arc<Node>], master: &str, limit: std::time::Duration) -> Result<Address, Arc<str>> {
    let mut asking = JoinSet::new();
    let deadline = Instant::now() + limit;
    for node in sentinels {
        let node = Arc::clone(node);
        let mut command = redis::cmd("SENTINEL");
        command.arg("GET-MASTER-ADDR-BY-NAME").arg(master);
        asking.spawn(async move {
            let answer = node.send(&command, deadline).await.map_err(|error| error.to_string())?;
            read(&answer).ok_or_else(|| "it does not know that name".to_owned())
        });
    }
    let mut told = Vec::new();
    let mut why = "there is none".to_owned();
    while let Some(answer) = asking.join_next().await {
        match answer {
            Ok(Ok(address)) => told.push(address),
            Ok(Err(error)) => why = error,
            Err(error) => why = error.to_string(),
        }
    }
    most(told).ok_or_else(|| why.into())
}

/// What is said most often; of what is said as often, what was said first.
fn most(told: Vec<Address>) -> Option<Address> {
    let votes = |address: &Address| told.iter().filter(|other| *other == address).count();
    told.iter().rev().max_by_key(|address| votes(address)).cloned()
}

/// Reads host and port.
fn read(answer: &Value) -> Option<Address> {
    let Value::Array(parts) = answer else { return None };
    let [host, port] = parts.as_slice() else { return None };
    let text = |value: &Value| match value {
        Value::BulkString(text) => String::from_utf8(text.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    };
    let port = text(port)?.parse().ok().filter(|port| *port > 0)?;
    Some((text(host).filter(|host| !host.is_empty())?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_most_sentinels_say_counts() {
        let (a, b) = (("a".to_owned(), 1), ("b".to_owned(), 1));
        for (told, expected) in [
            (vec![], None),
            (vec![&a], Some(&a)),
            (vec![&a, &b], Some(&a)),
            (vec![&a, &b, &b], Some(&b)),
            (vec![&b, &a, &b], Some(&b)),
        ] {
            assert_eq!(
                most(told.iter().map(|&address| address.clone()).collect()).as_ref(),
                expected,
                "{told:?}"
            );
        }
    }

    #[test]
    fn answers_of_sentinels_are_read() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let good = Value::Array(vec![text("10.0.0.1"), text("6379")]);
        assert_eq!(read(&good), Some(("10.0.0.1".to_owned(), 6379)));
        for wrong in [
            Value::Nil,
            Value::Array(vec![text("10.0.0.1")]),
            Value::Array(vec![text("10.0.0.1"), text("0")]),
            Value::Array(vec![text(""), text("6379")]),
            Value::Array(vec![text("a"), Value::Int(6379)]),
        ] {
            assert_eq!(read(&wrong), None, "{wrong:?}");
        }
    }
}
