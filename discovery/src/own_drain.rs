//! What an instance that is about to end, or is back, tells gateways.
//!
//! By their Control API (`/v1/drains`), in the name of whoever keeps the instance: its sidecar, or `postern register`. The
//! registry is left alone, for that one tells it itself.

use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::http::{Connection, Options, Question, Server};

/// What one answer of a gateway may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often gateways that did not answer are told again that the instance may be used.
const AGAIN: Duration = Duration::from_secs(5);

/// The drains of one instance that it orders itself.
#[derive(Clone, Debug)]
pub struct OwnDrain {
    /// As in the upstreams of the gateways; `*` means every service.
    pub service: String,
    /// `HOST:PORT`, as gateways know it.
    pub node: String,
    /// By this its drains are known from those of operators.
    pub reason: &'static str,
}

/// A drain at the gateway that was told of it.
#[derive(Debug)]
pub struct Ordered {
    connection: Connection,
    path: String,
    stage: String,
}

impl OwnDrain {
    /// Has the gateway with its Control API at `HOST:PORT`, and those that it speaks with, send nothing here any more.
    ///
    /// # Errors
    /// It cannot be asked, or refuses: what it said, with its address.
    pub async fn order(&self, gateway: &str) -> Result<Ordered, String> {
        let mut connection = connection(gateway)?;
        let order = json!({
            "service": self.service, "node": self.node, "registry": "keep", "reason": self.reason,
        });
        let body = order.to_string().into();
        let question = Question { method: Method::POST, body, ..Question::get("/v1/drains", DEADLINE) };
        let drain = answer(&mut connection, &question).await?;
        let id = text(&drain, "id").ok_or_else(|| format!("{gateway} gave the drain no id"))?;
        Ok(Ordered { path: format!("/v1/drains/{id}"), stage: stage(&drain), connection })
    }

    /// Has gateways use this instance again that an earlier process of it had told not to: one that knows it from its
    /// configuration, or has not seen it leave, cannot see that there is another one. Each is asked until it answers; `told`
    /// gets how many drains a gateway ended, or why it does not answer.
    pub async fn take_back(
        &self,
        gateways: impl IntoIterator<Item = &str>,
        mut told: impl FnMut(&str, Result<usize, String>),
    ) {
        let mut gateways: Vec<&str> = gateways.into_iter().collect();
        loop {
            let mut silent = Vec::new();
            for gateway in gateways {
                let outcome = self.taken_back_by(gateway).await;
                if outcome.is_err() {
                    silent.push(gateway);
                }
                told(gateway, outcome);
            }
            if silent.is_empty() {
                return;
            }
            gateways = silent;
            sleep(AGAIN).await;
        }
    }

    async fn taken_back_by(&self, gateway: &str) -> Result<usize, String> {
        let mut connection = connection(gateway)?;
        let drains = answer(&mut connection, &Question::get("/v1/drains", DEADLINE)).await?;
        let own = [("service", &*self.service), ("node", &*self.node), ("reason", self.reason)];
        let is_own = |drain: &&Value| own.iter().all(|(key, value)| text(drain, key) == Some(*value));
        let mut count = 0;
        for drain in drains.as_array().into_iter().flatten().filter(is_own) {
            let path = format!("/v1/drains/{}", text(drain, "id").unwrap_or_default());
            let undo = Question { method: Method::DELETE, ..Question::get(&path, DEADLINE) };
            match connection.ask(&undo).await.map_err(|error| error.to_string())?.status {
                // Another gateway may have told it in the meantime.
                status if status.is_success() || status == StatusCode::NOT_FOUND => count += 1,
                status => return Err(format!("{gateway} answered {status}")),
            }
        }
        Ok(count)
    }
}

impl Ordered {
    /// How far it was when it was last asked: `confirming` until nobody chooses the instance, `drained` when nothing is under
    /// way on it.
    pub fn stage(&self) -> &str {
        &self.stage
    }

    /// Asks how far it is.
    ///
    /// # Errors
    /// The gateway does not answer, or does not know the drain any more.
    pub async fn look(&mut self) -> Result<(), String> {
        let drain = answer(&mut self.connection, &Question::get(&self.path, DEADLINE)).await?;
        self.stage = stage(&drain);
        Ok(())
    }
}

fn connection(gateway: &str) -> Result<Connection, String> {
    let url = if gateway.contains("://") { gateway.to_owned() } else { format!("http://{gateway}") };
    Ok(Server::new(&url, Options::default())?.connection())
}

async fn answer(connection: &mut Connection, question: &Question<'_>) -> Result<Value, String> {
    let answer = connection.ask(question).await.map_err(|error| error.to_string())?;
    let server = connection.server();
    if !answer.status.is_success() {
        return Err(answer.refusal(server).reason.to_string());
    }
    serde_json::from_slice(&answer.body)
        .map_err(|_| format!("{} is no Control API: it does not answer with JSON", server.name()))
}

fn text<'a>(drain: &'a Value, key: &str) -> Option<&'a str> {
    drain.get(key).and_then(Value::as_str)
}

fn stage(drain: &Value) -> String {
    text(drain, "stage").unwrap_or_default().to_owned()
}
