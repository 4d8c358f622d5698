//! One thread per core: accept, serve, keep time, take in new configuration, drain.

pub mod accept;
pub mod context;
pub mod deadlines;
pub mod drain;
pub mod io;
pub mod runtime;
pub mod serve;
pub mod view;

#[cfg(test)]
mod tests;

pub use accept::{ListenOptions, Listening, ProxyProtocol};
pub use context::{Stats, WorkerContext};
pub use deadlines::Timeouts;
pub use drain::{Casualty, Drain, Report};
pub use runtime::{WorkerFailure, WorkerSettings, Workers};
pub use serve::{Http2, ServeSettings};
pub use view::{Published, Retired, View};
