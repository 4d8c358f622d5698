//! What a workload says of itself to Consul, and what is said of it when it is about to stop.
//!
//! Everything goes through an agent, never into the catalog, from which the agent of a node removes what it does not know. A
//! [`Registered`] keeps its promise: it renews the check, and registers again when the agent has lost the service.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::cluster::{escape, refusal};
use super::entry::Entry;
use crate::Backoff;
use crate::http::{Answer, Question, Server};
use crate::source::{Instance, Retire, SourceError};

/// How often an agent is asked whether it still knows a service that has no check to renew.
const LOOK: Duration = Duration::from_secs(5);
/// Pauses between attempts at an agent that fails.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// A service as it is registered.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Unique on the node.
    pub id: String,
    pub name: String,
    /// That of the node if it is absent.
    pub address: Option<String>,
    pub port: u16,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
    /// While its checks pass, and while one warns.
    pub weights: (u32, u32),
    pub check: Check,
    /// Consul takes the service out after its check has been critical for so long.
    pub forget_after: Option<Duration>,
}

/// How Consul knows that a service lives.
#[derive(Clone, Debug)]
pub enum Check {
    /// It is as its node.
    None,
    /// It has to be told again and again.
    Ttl(Duration),
    /// The agent asks this URL.
    Http { url: String, interval: Duration, timeout: Duration },
}

/// How a service is, for a check that has to be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    #[default]
    Passing,
    Warning,
    Critical,
}

impl Registration {
    fn body(&self, status: Status) -> Value {
        let seconds = |time: Duration| format!("{}ms", time.as_millis());
        let id = format!("service:{}", self.id);
        let forget = self.forget_after.map(seconds);
        let check = match &self.check {
            Check::None => None,
            Check::Ttl(ttl) => Some(json!({
                "CheckID": id, "TTL": seconds(*ttl), "Status": status, "DeregisterCriticalServiceAfter": forget,
            })),
            Check::Http { url, interval, timeout } => Some(json!({
                "CheckID": id, "HTTP": url, "Interval": seconds(*interval), "Timeout": seconds(*timeout),
                "DeregisterCriticalServiceAfter": forget,
            })),
        };
        json!({
            "ID": self.id, "Name": self.name, "Address": self.address.as_deref().unwrap_or_default(), "Port": self.port,
            "Tags": self.tags, "Meta": self.meta,
            "Weights": {"Passing": self.weights.0, "Warning": self.weights.1},
            "Checks": check.into_iter().collect::<Vec<_>>(),
        })
    }

    /// Between one sign of life and the next.
    fn pace(&self) -> Duration {
        match self.check {
            // Two may be lost.
            Check::Ttl(ttl) => ttl / 3,
            Check::None | Check::Http { .. } => LOOK,
        }
    }
}

/// An agent of Consul.
#[derive(Clone, Debug)]
pub struct Agent {
    server: Arc<Server>,
    deadline: Duration,
}

impl Agent {
    /// The agent at `server`; `deadline` is for each of its answers.
    pub fn of(server: Arc<Server>, deadline: Duration) -> Self {
        Self { server, deadline }
    }

    async fn call(&self, question: &Question<'_>) -> Result<Answer, SourceError> {
        Ok(self.server.connection().ask(question).await?)
    }

    async fn get(&self, target: &str) -> Result<Answer, SourceError> {
        self.call(&Question::get(target, self.deadline)).await
    }

    async fn put(&self, target: &str, body: String) -> Result<(), SourceError> {
        let answer = self.call(&Question::put(target, body, self.deadline)).await?;
        if answer.status.is_success() { Ok(()) } else { Err(refusal(&answer, &self.server)) }
    }

    /// Registers a service, or changes how it is registered.
    ///
    /// # Errors
    /// The agent did not take it.
    pub async fn register(&self, service: &Registration, status: Status) -> Result<(), SourceError> {
        self.put("/v1/agent/service/register?replace-existing-checks=true", service.body(status).to_string())
            .await
    }

    /// Takes a service out. One that is not there is out.
    ///
    /// # Errors
    /// The agent did not do it.
    pub async fn deregister(&self, id: &str) -> Result<(), SourceError> {
        match self.put(&format!("/v1/agent/service/deregister/{}", escape(id)), String::new()).await {
            Err(error) => match self.knows(id).await {
                Ok(false) => Ok(()),
                _ => Err(error),
            },
            done => done,
        }
    }

    /// A service in maintenance stays registered and takes no new requests.
    ///
    /// # Errors
    /// The agent did not do it.
    pub async fn maintenance(&self, id: &str, on: bool, reason: &str) -> Result<(), SourceError> {
        let (id, reason) = (escape(id), escape(reason));
        self.put(&format!("/v1/agent/service/maintenance/{id}?enable={on}&reason={reason}"), String::new())
            .await
    }

    /// Says how a service is whose check has to be told.
    ///
    /// # Errors
    /// The agent does not know of the check.
    pub async fn tell(&self, id: &str, status: Status, words: &str) -> Result<(), SourceError> {
        let target = format!("/v1/agent/check/update/{}", escape(&format!("service:{id}")));
        self.put(&target, json!({"Status": status, "Output": words}).to_string()).await
    }

    /// Whether the agent has the service.
    ///
    /// # Errors
    /// It did not say.
    pub async fn knows(&self, id: &str) -> Result<bool, SourceError> {
        let answer = self.get(&format!("/v1/agent/service/{}", escape(id))).await?;
        match answer.status {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(refusal(&answer, &self.server)),
        }
    }

    /// The name of the agent's node.
    async fn node(&self) -> Result<String, SourceError> {
        let answer = self.get("/v1/agent/self").await?;
        if !answer.status.is_success() {
            return Err(refusal(&answer, &self.server));
        }
        let own: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let name = own.pointer("/Config/NodeName").and_then(Value::as_str);
        name.map(str::to_owned)
            .ok_or_else(|| SourceError::new(format!("{}: not an answer of Consul", self.server.name())))
    }

    /// Says of an instance that it is about to stop, or takes that back, at the agent of its node.
    pub(super) async fn retire(
        &self,
        service: &str,
        parameters: &[(&str, Cow<'_, str>)],
        instance: &Instance,
        how: Retire,
        undo: bool,
    ) -> Result<(), SourceError> {
        let (maintenance, on) = match (how, undo) {
            (Retire::Keep, _) => return Ok(()),
            (Retire::Deregister, true) => {
                return Err(SourceError::new(
                    "Consul does not know any more how the instance was registered: it registers itself when it starts",
                ));
            }
            (Retire::Deregister, false) => (false, true),
            (Retire::Maintenance, undo) => (true, !undo),
        };
        let place: Vec<_> = parameters
            .iter()
            .filter(|(name, _)| matches!(*name, "dc" | "ns" | "partition"))
            .map(|(name, value)| format!("{name}={}", escape(value)))
            .collect();
        let answer = self.get(&format!("/v1/health/service/{}?{}", escape(service), place.join("&"))).await?;
        if !answer.status.is_success() {
            return Err(refusal(&answer, &self.server));
        }
        let entries: Vec<Entry<'_>> = serde_json::from_slice(&answer.body).map_err(|error| {
            SourceError::new(format!("{}: not an answer of Consul: {error}", self.server.name()))
        })?;
        let Some(entry) = entries.iter().find(|entry| entry.id() == *instance.id) else {
            return match maintenance {
                true => Err(SourceError::new(format!("`{}` is not registered", instance.id))),
                false => Ok(()),
            };
        };
        if !maintenance && entry.is_external() {
            let body = json!({"Node": entry.node.node, "ServiceID": entry.service.id});
            return self.put("/v1/catalog/deregister", body.to_string()).await;
        }
        let agent = self.agent_of(entry).await?;
        if maintenance {
            agent.maintenance(&entry.service.id, on, "drained by postern").await
        } else {
            agent.deregister(&entry.service.id).await
        }
    }

    /// The agent of the node of an instance: this one, or the one at the node's address and the same port.
    async fn agent_of(&self, entry: &Entry<'_>) -> Result<Agent, SourceError> {
        if self.node().await? == entry.node.node {
            return Ok(self.clone());
        }
        let address = entry.node.address.as_deref().unwrap_or_default();
        let server = self.server.beside(address).map_err(SourceError::new)?;
        Ok(Agent { server, deadline: self.deadline })
    }

    /// Registers a service and keeps it registered, in a task of the runtime that this is called in.
    pub fn keep(&self, service: Registration) -> Registered {
        let (say, said) =
            watch::channel(Said { status: Status::default(), words: String::new(), maintenance: None });
        let (tell, state) = watch::channel(None);
        let (agent, kept) = (self.clone(), service.clone());
        let task = tokio::spawn(async move { agent.stay(&kept, said, tell).await });
        Registered { agent: self.clone(), id: service.id, say, state, task }
    }

    /// For ever: register, give signs of life, and begin again when the agent has forgotten.
    async fn stay(
        &self,
        service: &Registration,
        mut said: watch::Receiver<Said>,
        tell: watch::Sender<Option<Result<(), SourceError>>>,
    ) {
        let mut pauses = Backoff::new(PAUSES.0, PAUSES.1);
        let mut registered = false;
        loop {
            let now = said.borrow_and_update().clone();
            let outcome = match registered {
                false => self.begin(service, &now).await,
                true => self.renew(service, &now).await,
            };
            let pause = match &outcome {
                Ok(found) => {
                    registered = *found;
                    pauses.reset();
                    if registered { service.pace() } else { Duration::ZERO }
                }
                Err(error) => {
                    tracing::warn!(service = service.id, %error, "the service is not registered as it should be");
                    pauses.pause()
                }
            };
            tell.send_replace(Some(outcome.map(drop)));
            tokio::select! {
                () = sleep(pause) => {}
                changed = said.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn begin(&self, service: &Registration, now: &Said) -> Result<bool, SourceError> {
        self.register(service, now.status).await?;
        if let Some(reason) = &now.maintenance {
            self.maintenance(&service.id, true, reason).await?;
        }
        Ok(true)
    }

    /// A sign of life; false when the agent does not know the service any more.
    async fn renew(&self, service: &Registration, now: &Said) -> Result<bool, SourceError> {
        if matches!(service.check, Check::Ttl(_)) {
            let told = self.tell(&service.id, now.status, &now.words).await;
            // Which error says that the check is unknown depends on the version of Consul.
            return match told {
                Ok(()) => Ok(true),
                Err(error) => match self.knows(&service.id).await? {
                    true => Err(error),
                    false => Ok(false),
                },
            };
        }
        self.knows(&service.id).await
    }
}

/// What is to be said of a service.
#[derive(Clone, Debug)]
struct Said {
    status: Status,
    words: String,
    maintenance: Option<String>,
}

/// A service that is kept registered until this is dropped, which leaves it to its check, or until it leaves.
#[derive(Debug)]
pub struct Registered {
    agent: Agent,
    id: String,
    say: watch::Sender<Said>,
    state: watch::Receiver<Option<Result<(), SourceError>>>,
    task: JoinHandle<()>,
}

impl Registered {
    /// Until the agent was asked for the first time.
    ///
    /// # Errors
    /// It did not take the service. It goes on being asked.
    pub async fn begun(&self) -> Result<(), SourceError> {
        let mut state = self.state.clone();
        let first = state.wait_for(Option::is_some).await;
        first.map_or(Ok(()), |first| first.clone().unwrap_or(Ok(())))
    }

    /// How the service is, from now on, with words for operators.
    pub fn tell(&self, status: Status, words: &str) {
        self.say.send_modify(|said| {
            said.status = status;
            words.clone_into(&mut said.words);
        });
    }

    /// Takes no new requests from now on, or takes them again.
    ///
    /// # Errors
    /// The agent did not do it.
    pub async fn maintenance(&self, on: bool, reason: &str) -> Result<(), SourceError> {
        self.say.send_modify(|said| said.maintenance = on.then(|| reason.to_owned()));
        self.agent.maintenance(&self.id, on, reason).await
    }

    /// Takes the service out.
    ///
    /// # Errors
    /// The agent did not do it.
    pub async fn leave(self) -> Result<(), SourceError> {
        self.task.abort();
        self.agent.deregister(&self.id).await
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.task.abort();
    }
}
