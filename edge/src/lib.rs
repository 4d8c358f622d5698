//! The edge gateway: configuration in, a data plane out, and the interfaces that look after it.
//!
//! A store tells what there is, `compile` turns it into a snapshot change by change, workers serve from the snapshot.
//! The Admin, Control and status APIs run beside it on the control runtime and never touch a worker.

mod acme;
pub mod admin;
pub mod app;
mod certificates;
mod compile;
pub mod control;
pub mod discovery_server;
pub mod drain;
pub mod endpoint;
pub mod explain;
mod in_use;
mod instance;
mod interfaces;
mod inventory;
pub mod live;
mod lookup;
pub mod lookup_tables;
pub mod merge;
pub mod offline;
mod registries;
mod running;
pub mod secrets;
pub mod seed;
pub mod settings;
mod signers;
pub mod snapshot;
mod stack;
pub mod status;
pub mod store;
