//! Everything a worker needs to serve a request, as one immutable value.

use std::sync::Arc;

use layers::chain::Plan;
use layers::route::Table;
use layers::target::Target;

/// One version of the data plane.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Counts up with each publication.
    pub version: u64,
    /// The routes.
    pub routes: Table<Target>,
    /// The plugins of every request (`global_rules`).
    pub global: Option<Arc<Plan>>,
    /// Why no request may be served: a global rule was set aside and there is no former one to run.
    pub refused: Option<Arc<str>>,
    /// Some route looks into the request body, so it is read before routes are matched.
    pub reads_body: bool,
}
