//! Counters that all workers share, because a limit holds for the process and not for a core.

pub mod breaker;
pub mod bucket;
pub mod in_use;
pub mod table;
pub mod window;
