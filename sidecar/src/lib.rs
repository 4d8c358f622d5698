//! What stands beside one workload and speaks for it.

pub mod capture;
