//! The data path that the edge and the sidecar share.
//!
//! A request passes, in this order: `worker::accept`, `transport` (PROXY protocol, TLS), `worker::serve`, the layers of
//! `http`, the route table of `route`, the plugins in `chain`, and `upstream`. Everything here runs on one worker's
//! current-thread runtime: nothing is `Send`, nothing blocks, no borrow is held across an await.

pub mod assembly;
pub mod body;
pub mod carry;
pub mod chain;
pub mod consumer;
pub mod endpoint;
pub mod error;
pub mod exchange;
pub mod http;
pub mod limits;
pub mod local;
pub mod lookup;
pub mod plugin;
pub mod plugin_layer;
pub mod rescue;
pub mod route;
mod spare;
pub mod stack;
pub mod target;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod upgrade;
pub mod upstream;
pub mod vars;
pub mod worker;

pub use stack::HttpService;
