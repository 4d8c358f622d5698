//! The addresses of the workload as what requests and bytes go to. Those that the file names are made with it, others when
//! the first captured connection asks for them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use config::error::ConfigError;
use config::sidecar::Sidecar;
use layers::target::Target;
use layers::transport::original_dst::AsClient;
use layers::upstream::cluster::{Cluster, ClusterEnv};

use crate::recent::Recent;
use crate::services;

/// Addresses that are remembered at the most.
const MOST: usize = 1024;

/// One address of the workload.
#[derive(Debug)]
pub struct Application {
    /// Where requests go that are sent as HTTP/1.
    pub http1: Arc<Target>,
    /// Where those go that are sent as HTTP/2.
    pub http2: Arc<Target>,
    /// Where bytes go.
    pub cluster: Arc<Cluster>,
}

/// The addresses of the workload.
pub struct Applications {
    env: ClusterEnv,
    workload: Box<str>,
    /// Of connections that look as if their client had made them.
    mark: u32,
    known: Recent<(SocketAddr, Option<IpAddr>), Arc<Application>>,
}

impl Applications {
    /// Of the workload that the file names, with connections as `env` has them, and never the mesh.
    pub fn new(env: &ClusterEnv, config: &Sidecar) -> Self {
        Self {
            env: ClusterEnv { mesh: None, ..env.clone() },
            workload: (*config.workload.service).into(),
            mark: config.capture.tproxy_mark.get(),
            known: Recent::new(MOST),
        }
    }

    /// Where connections have come for the workload, besides the ports that the file names.
    pub fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.known.keys().into_iter().map(|(address, _)| address).collect()
    }

    /// The one at this address, connected as `client` if there is one.
    ///
    /// # Errors
    /// Nothing can be connected there.
    pub fn at(&self, address: SocketAddr, client: Option<IpAddr>) -> Result<Arc<Application>, ConfigError> {
        self.known.find((address, client), || {
            let as_client = client.map(|address| AsClient { address, mark: self.mark });
            let env = ClusterEnv { as_client, ..self.env.clone() };
            let cluster = |http2| {
                let upstream = services::plain(&address.ip().to_string(), address.port(), http2)
                    .ok_or_else(|| ConfigError::invalid("", format!("{address} is no address")))?;
                Cluster::build(&format!("inbound/{address}"), &upstream, None, &env)
            };
            let (one, two) = (cluster(false)?, cluster(true)?);
            let id = format!("inbound/{}", address.port());
            let target =
                |cluster: &Arc<Cluster>| Arc::new(services::target(&id, &self.workload, None, cluster));
            Ok(Arc::new(Application { http1: target(&one), http2: target(&two), cluster: one }))
        })
    }
}
