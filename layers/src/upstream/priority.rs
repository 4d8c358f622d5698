//! Priority levels: endpoints of a lower priority are used only when no higher one is left.
//!
//! "Left" means usable and not yet tried by this request, so a retry moves down a level only after the whole
//! level above was tried.

use std::sync::Arc;

use super::endpoint::EndpointState;
use super::picker::{Algorithm, Balancer, Peer, PickKey, Tried};
use super::round_robin::CursorCell;

/// One balancer per priority, highest first.
#[derive(Debug, Default)]
pub(crate) struct Levels(Box<[Balancer]>);

impl Levels {
    pub(crate) fn new(algorithm: Algorithm, mut peers: Vec<Peer>, cursor: &CursorCell) -> Self {
        // Stable, so that equal priorities keep the configured order.
        peers.sort_by_key(|peer| std::cmp::Reverse(peer.priority));
        let levels = peers
            .chunk_by(|a, b| a.priority == b.priority)
            .map(|level| Balancer::new(algorithm, level.to_vec(), cursor));
        Self(levels.collect())
    }

    pub(crate) fn pick(&self, key: &PickKey, tried: &Tried) -> Option<&Arc<EndpointState>> {
        self.0.iter().find_map(|level| level.pick(key, tried))
    }
}
