//! How a sidecar ends: nothing new comes in before what is under way has ended, and the application can call others until
//! it has gone.
//!
//! Readiness turns false and the registry is told; callers get time to hear of it; then connections are told goodbye and
//! what is in flight ends; then the application; then what it still has open outwards. Gateways that were told to use the
//! node no more are told by the next process that they may.

use std::sync::Arc;
use std::time::Duration;

use config::sidecar::{DrainConsul, DrainHow, Observers};
use discovery::OwnDrain;
use discovery::consul::register::Agent;
use discovery::http::{Options, SecretFile, Server};
use http::HeaderName;
use tokio::sync::watch;

/// What the agent of a registry gets to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a gateway is asked whether everybody has confirmed.
const PACE: Duration = Duration::from_millis(100);

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
    let mut problems = Vec::new();
    for gateway in &observers.gateways {
        match confirmed_by(gateway, observers).await {
            Ok(()) => return Ok(()),
            Err(problem) => problems.push(problem),
        }
    }
    Err(problems.join("; "))
}

async fn confirmed_by(gateway: &str, observers: &Observers) -> Result<(), String> {
    let mut drain = own(observers).order(gateway).await?;
    while drain.stage() == "confirming" {
        tokio::time::sleep(PACE).await;
        drain.look().await?;
    }
    Ok(())
}

/// Has gateways use this node again, where an earlier process of it had told them not to.
pub async fn take_back(observers: &Observers) {
    let gateways = observers.gateways.iter().map(|gateway| &**gateway);
    let told = |gateway: &str, outcome| match outcome {
        Ok(0) => {}
        Ok(drains) => tracing::info!(gateway, drains, "the gateway uses this node again"),
        Err(problem) => {
            tracing::warn!(problem, "the gateway may still believe that this node drains");
        }
    };
    own(observers).take_back(gateways, told).await;
}

fn own(observers: &Observers) -> OwnDrain {
    let service = observers.service.as_deref().unwrap_or("*").to_owned();
    OwnDrain { service, node: observers.node.to_string(), reason: "its sidecar drains" }
}
