//! Levels of preference: endpoints of a level are used only when nothing of the ones before is left.
//!
//! "Left" means usable and not yet tried by this request, so a retry moves down a level only after the whole
//! level above was tried.

use std::sync::Arc;

use super::endpoint::EndpointState;
use super::picker::{Algorithm, Balancer, Peer, PickKey, Tried};
use super::round_robin::CursorCell;

/// One balancer per level, the preferred one first.
#[derive(Debug, Default)]
pub(crate) struct Levels(Box<[Balancer]>);

impl Levels {
    /// No level may be empty.
    pub(crate) fn new(
        algorithm: Algorithm,
        levels: Vec<Vec<Peer>>,
        cursor: &CursorCell,
        former: &Self,
    ) -> Self {
        let levels = levels.into_iter().enumerate();
        let level = |(place, peers)| Balancer::new(algorithm, peers, cursor, former.0.get(place));
        Self(levels.map(level).collect())
    }

    pub(crate) fn pick(&self, key: &PickKey, tried: &Tried) -> Option<&Arc<EndpointState>> {
        self.0.iter().find_map(|level| level.pick(key, tried))
    }
}
