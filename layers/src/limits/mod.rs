//! Counters that all workers share, because a limit holds for the process and not for a core.

pub mod window;
