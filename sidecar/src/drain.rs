//! How a sidecar ends: nothing new comes in before what is under way has ended, and the application can call others until
//! it has gone.
//!
//! Readiness turns false and the registry is told; callers get time to hear of it; then connections are told goodbye and
//! what is in flight ends; then the application; then what it still has open outwards. Gateways that were told to use the
//! node no more are told by the next process that they may.

use std::sync::Arc;
use std::time::Duration;

use config::sidecar::{DrainConsul, DrainHow, Observers};
use discovery::consul::register::Agent;
use discovery::http::{Connection, Options, Question, SecretFile, Server};
use http::{HeaderName, Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::watch;

/// What the agent of a registry gets to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a gateway is asked whether everybody has confirmed.
const PACE: Duration = Duration::from_millis(100);
/// How often gateways that did not answer are told again that the node may be used.
const AGAIN: Duration = Duration::from_secs(5);
/// By this the drains of a sidecar are known from those of operators.
const REASON: &str = "its sidecar drains";

/// How far a process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Starting,
    Serving,
    Draining,
}

/// How far the process has come, and the order to drain. Clones are the same.
#[derive(Clone, Debug)]
pub struct Stage(Arc<watch::Sender<At>>);

impl Default for Stage {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(At::Starting)))
    }
}

impl Stage {
    /// Why nothing should be sent here, as far as the stage says so.
    pub fn not_serving(&self) -> Option<&'static str> {
        match *self.0.borrow() {
            At::Starting => Some("starting"),
            At::Serving => None,
            At::Draining => Some("draining: the process is about to end"),
        }
    }

    /// It serves.
    pub fn serve(&self) {
        self.0.send_if_modified(|at| {
            let starts = *at == At::Starting;
            if starts {
                *at = At::Serving;
            }
            starts
        });
    }

    /// It is to drain.
    pub fn drain(&self) {
        self.0.send_replace(At::Draining);
    }

    /// Waits for the order to drain.
    pub async fn draining(&self) {
        // The sender is here.
        let _ = self.0.subscribe().wait_for(|at| *at == At::Draining).await;
    }
}

/// Tells the agent of Consul that nothing should be sent here any more.
///
/// # Errors
/// What it said, or why it cannot be asked.
pub async fn deregister(consul: &DrainConsul) -> Result<(), String> {
    let secret = consul.token_file.clone().map(|path| SecretFile {
        field: HeaderName::from_static("x-consul-token"),
        scheme: "",
        path,
    });
    let server = Server::new(&consul.agent, Options { secret, ..Options::default() })?;
    let agent = Agent::of(server, DEADLINE);
    let told = match consul.how {
        DrainHow::Deregister => agent.deregister(&consul.id).await,
        DrainHow::Maintenance => agent.maintenance(&consul.id, true, "drained by postern").await,
    };
    told.map_err(|error| error.to_string())
}

/// Has gateways send nothing here any more, and waits until all have confirmed.
///
/// # Errors
/// What they said, or why none can be asked.
pub async fn confirmed(observers: &Observers) -> Result<(), String> {
    // The registry is told from here.
    let order = json!({
        "service": service(observers), "node": &*observers.node, "registry": "keep", "reason": REASON,
    });
    let mut problems = Vec::new();
    for gateway in &observers.gateways {
        match confirmed_by(gateway, &order).await {
            Ok(()) => return Ok(()),
            Err(problem) => problems.push(format!("{}: {problem}", &**gateway)),
        }
    }
    Err(problems.join("; "))
}

async fn confirmed_by(gateway: &str, order: &Value) -> Result<(), String> {
    let mut connection = Server::new(&format!("http://{gateway}"), Options::default())?.connection();
    let body = order.to_string().into();
    let begin = Question { method: Method::POST, body, ..Question::get("/v1/drains", DEADLINE) };
    let mut drain = answer(&mut connection, &begin).await?;
    let id = drain.get("id").and_then(Value::as_str).ok_or("it gave the drain no id")?;
    let path = format!("/v1/drains/{id}");
    while drain.get("stage").and_then(Value::as_str) == Some("confirming") {
        tokio::time::sleep(PACE).await;
        drain = answer(&mut connection, &Question::get(&path, DEADLINE)).await?;
    }
    Ok(())
}

fn service(observers: &Observers) -> &str {
    observers.service.as_deref().unwrap_or("*")
}

/// Has gateways use this node again, where an earlier process of it had told them not to. A gateway that knows the node
/// from its configuration cannot see that there is another one. Each is asked until it answers.
pub async fn take_back(observers: &Observers) {
    let mut gateways: Vec<&str> = observers.gateways.iter().map(|gateway| &**gateway).collect();
    loop {
        let mut silent = Vec::new();
        for gateway in gateways {
            match taken_back_by(gateway, observers).await {
                Ok(0) => {}
                Ok(drains) => tracing::info!(gateway, drains, "the gateway uses this node again"),
                Err(problem) => {
                    tracing::warn!(gateway, problem, "the gateway may still believe that this node drains");
                    silent.push(gateway);
                }
            }
        }
        if silent.is_empty() {
            return;
        }
        gateways = silent;
        tokio::time::sleep(AGAIN).await;
    }
}

async fn taken_back_by(gateway: &str, observers: &Observers) -> Result<usize, String> {
    let mut connection = Server::new(&format!("http://{gateway}"), Options::default())?.connection();
    let drains = answer(&mut connection, &Question::get("/v1/drains", DEADLINE)).await?;
    let own = [("service", service(observers)), ("node", &*observers.node), ("reason", REASON)];
    let is_own =
        |drain: &&Value| own.iter().all(|(key, value)| drain.get(key).and_then(Value::as_str) == Some(value));
    let mut count = 0;
    for drain in drains.as_array().into_iter().flatten().filter(is_own) {
        let id = drain.get("id").and_then(Value::as_str).unwrap_or_default();
        let path = format!("/v1/drains/{id}");
        let undo = Question { method: Method::DELETE, ..Question::get(&path, DEADLINE) };
        match connection.ask(&undo).await.map_err(|error| error.to_string())?.status {
            // Another gateway may have told it in the meantime.
            status if status.is_success() || status == StatusCode::NOT_FOUND => count += 1,
            status => return Err(format!("it answered {status}")),
        }
    }
    Ok(count)
}

async fn answer(connection: &mut Connection, question: &Question<'_>) -> Result<Value, String> {
    let answer = connection.ask(question).await.map_err(|error| error.to_string())?;
    if !answer.status.is_success() {
        return Err(format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body).trim()));
    }
    serde_json::from_slice(&answer.body).map_err(|error| error.to_string())
}
