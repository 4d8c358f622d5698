//! One thread per core: accept, serve, keep time, take in new configuration, drain.

pub mod deadlines;
pub mod view;
