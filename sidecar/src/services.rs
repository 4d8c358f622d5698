//! The services of a sidecar's file as what requests go to: plugins, upstream, protocol. On the control side.
//!
//! What did not change keeps its object, so that an edit forgets neither health nor connections. A file is taken over whole
//! or not at all: everything is checked before anything is changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use config::error::ConfigError;
use config::fields::{Distinct, Host, Seconds, Text, Timeout};
use config::mesh::{Protocol, ServicePolicy};
use config::upstream::{Node, Nodes, Scheme, Upstream};
use layers::target::{Destination, Target};
use layers::upstream::cluster::{Cluster, ClusterEnv};

use crate::snapshot::Service;

/// How long a connection may take, where nothing is written.
const CONNECT: u32 = 5;
/// How long one that was written to may say nothing: applications have time-outs of their own, and a stream may be quiet.
const QUIET: u32 = 3600;

/// The services that are in force.
#[derive(Default)]
pub struct Services {
    known: BTreeMap<String, (ServicePolicy, Arc<Service>)>,
}

impl Services {
    /// Takes over `wanted`, and says what they are now.
    ///
    /// # Errors
    /// What cannot work, with pointers into `services`; nothing has changed then.
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    pub fn settle(
        &mut self,
        wanted: &[ServicePolicy],
        env: &ClusterEnv,
        plans: &dyn Fn(&ServicePolicy) -> Result<Option<Arc<layers::chain::Plan>>, Vec<ConfigError>>,
    ) -> Result<Vec<Arc<Service>>, Vec<ConfigError>> {
        let mut errors = Vec::new();
        let mut ready = Vec::new();
        for (index, policy) in wanted.iter().enumerate() {
            let at = format!("/services/{index}");
            if self.known.get(&*policy.name).is_some_and(|(known, _)| known == policy) {
                ready.push(None);
                continue;
            }
            let upstream = upstream(policy);
            if let Err(error) = Cluster::check(&upstream, None, env) {
                errors.push(error.under("/upstream").under(&at));
            }
            match plans(policy) {
                Ok(plan) => ready.push(Some((upstream, plan))),
                Err(found) => errors.extend(found.into_iter().map(|error| error.under(&at))),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let mut next = BTreeMap::new();
        let mut services = Vec::new();
        for (index, (policy, ready)) in wanted.iter().zip(ready).enumerate() {
            let name = policy.name.to_string();
            let before = self.known.get(&name).map(|(_, service)| service.clone());
            let service = match (ready, before) {
                (None, Some(service)) => service,
                (None, None) => continue,
                (Some((upstream, plan)), before) => {
                    let under =
                        |error: ConfigError| vec![error.under(&format!("/services/{index}/upstream"))];
                    let cluster = match before {
                        Some(before) => {
                            before.cluster.update(&upstream, None, env).map_err(under)?;
                            before.cluster.clone()
                        }
                        None => {
                            let key = format!("services/{name}");
                            Cluster::build(&key, &upstream, None, env).map_err(under)?
                        }
                    };
                    Arc::new(Service {
                        name: name.as_str().into(),
                        hosts: policy
                            .hosts
                            .iter()
                            .flat_map(|hosts| hosts.iter())
                            .map(Host::to_string)
                            .collect(),
                        target: Arc::new(target(&format!("services/{name}"), &name, plan, &cluster)),
                        cluster,
                        protocol: policy.protocol,
                    })
                }
            };
            next.insert(name, (policy.clone(), service.clone()));
            services.push(service);
        }
        self.known = next;
        Ok(services)
    }

    /// The services in force.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.known.values().map(|(_, service)| service)
    }
}

/// What requests for a service go to.
pub fn target(
    id: &str,
    service: &str,
    plan: Option<Arc<layers::chain::Plan>>,
    cluster: &Arc<Cluster>,
) -> Target {
    Target {
        route_id: id.into(),
        route_name: None,
        route: None,
        service: None,
        service_id: Some(service.into()),
        service_name: Some(service.into()),
        plan,
        destination: Destination::Cluster(cluster.clone()),
        timeout: None,
        websocket: true,
        refused: None,
    }
}

/// The upstream of a service as the data path knows upstreams.
fn upstream(policy: &ServicePolicy) -> Upstream {
    let mut upstream = (*policy.upstream).clone();
    upstream.scheme = match (upstream.scheme, policy.protocol) {
        // Opaque connections and requests alike go over what is written for TCP.
        (Scheme::Tcp, _) => Scheme::Http,
        (Scheme::Tls, _) => Scheme::Https,
        (scheme, _) => scheme,
    };
    if matches!(policy.protocol, Protocol::Http2 | Protocol::Grpc) {
        upstream.http2 = true;
    }
    if let Some(identities) = &policy.identities {
        let texts = identities.iter().filter_map(|identity| Text::new(identity)).collect();
        upstream.identities = Distinct::new(texts).map(Box::new);
    }
    if upstream.timeout.is_none() {
        upstream.timeout = quiet_timeout();
    }
    upstream
}

fn quiet_timeout() -> Option<Box<Timeout>> {
    let seconds = |seconds: u32| Seconds::new(seconds.into());
    let (connect, quiet) = (seconds(CONNECT)?, seconds(QUIET)?);
    Some(Box::new(Timeout { connect, send: quiet, read: quiet }))
}

/// An upstream of one host and port, as it is.
pub fn plain(host: &str, port: u16, http2: bool) -> Option<Upstream> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let node = Node {
        host: Host::new(&host)?,
        port: std::num::NonZeroU16::new(port),
        weight: 1,
        priority: 0,
        metadata: None,
    };
    let mut upstream: Upstream =
        serde_json::from_value(serde_json::json!({"service_name": "a", "discovery_type": "a"})).ok()?;
    (upstream.service_name, upstream.discovery_type) = (None, None);
    upstream.nodes = Some(Nodes::new(vec![node]));
    upstream.http2 = http2;
    upstream.retries = Some(0);
    upstream.timeout = quiet_timeout();
    Some(upstream)
}

/// How long the workload itself may be connected for.
pub const LOCAL_CONNECT: Duration = Duration::from_secs(CONNECT as u64);
