//! The metrics of the process, shared by workers and the control side.

/// All metrics.
#[derive(Debug, Default)]
pub struct Metrics {}
