//! One thread per core: accept, serve, keep time, take in new configuration, drain.
//!
//! The control side binds the sockets ([`Listen`](crate::transport::listen::Listen)), starts [`Workers`] with a
//! function that builds the stack of each, and keeps the handle: counters, failures, [`Drain`]. Everything a worker
//! reads later comes through [`Published`] values. Nothing of a worker leaves its thread but counters, and nothing
//! on a worker blocks.

pub mod accept;
pub mod context;
pub mod deadlines;
pub mod drain;
pub mod http1;
pub mod io;
pub mod runtime;
pub mod serve;
pub mod turns;
pub mod view;

#[cfg(test)]
mod tests;

pub use accept::{Arrival, Doorman, ListenOptions, Listening, Met, ProxyProtocol};
pub use context::{Stats, WorkerContext};
pub use deadlines::Timeouts;
pub use drain::{Casualty, Drain, Report};
pub use runtime::{WorkerFailure, WorkerSettings, Workers};
pub use serve::{Http2, ServeSettings};
pub use view::{Published, Retired, View};
