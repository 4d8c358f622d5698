//! Commands that do one thing and end.

pub mod acme;
pub mod capture;
pub mod certs;
pub mod check;
pub mod docs;
pub mod drain;
pub mod endpoints;
pub mod explain;
pub mod import;
pub mod policy;
