//! What workers read: services by the names under which they are asked for, and the ports of the workload. Immutable.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use config::mesh::Protocol;
use config::sidecar::Mode;
use hashbrown::HashMap;
use layers::error::{Error, Reason};
use layers::target::Target;
use layers::upstream::cluster::{Cluster, ClusterEnv};

use crate::door::To;
use crate::services;

/// A service that the workload calls.
#[derive(Debug)]
pub struct Service {
    /// Its name.
    pub name: Arc<str>,
    /// Other names under which it is asked for.
    pub hosts: Vec<String>,
    /// Where requests go.
    pub target: Arc<Target>,
    /// Its endpoints.
    pub cluster: Arc<Cluster>,
    /// What it speaks.
    pub protocol: Protocol,
}

/// A port of the workload.
#[derive(Debug)]
pub struct Port {
    /// Where the sidecar listens.
    pub listen: SocketAddr,
    /// Where the workload listens.
    pub forward: SocketAddr,
    /// Who may come.
    pub mode: Mode,
    /// What the workload speaks.
    pub protocol: Protocol,
    /// Where requests go that are sent as HTTP/1.
    pub http1: Arc<Target>,
    /// Where those go that are sent as HTTP/2.
    pub http2: Arc<Target>,
    /// The workload itself.
    pub cluster: Arc<Cluster>,
}

/// One version of what the file says.
pub struct Snapshot {
    by_name: HashMap<Box<str>, Arc<Service>>,
    /// `.a.com` for `*.a.com`.
    by_suffix: Vec<(Box<str>, Arc<Service>)>,
    services: Vec<Arc<Service>>,
    /// The ports of the workload, in the order of their listeners.
    pub ports: Vec<Arc<Port>>,
    /// The name of the service that the workload is.
    pub workload: Arc<str>,
    opaque: Vec<u16>,
    /// How long the client alone is waited for.
    pub detect: Duration,
    /// How long an opaque connection may be without a byte.
    pub idle: Duration,
}

/// What a snapshot is made of besides services and ports.
#[derive(Debug, Default)]
pub struct Rest {
    /// The name of the service that the workload is.
    pub workload: Arc<str>,
    /// Ports of destinations on which nothing is detected.
    pub opaque: Vec<u16>,
    /// How long the client alone is waited for.
    pub detect: Duration,
    /// How long an opaque connection may be without a byte.
    pub idle: Duration,
}

impl Snapshot {
    /// Of these services and ports.
    pub fn new(services: Vec<Arc<Service>>, ports: Vec<Arc<Port>>, rest: Rest) -> Self {
        let (mut by_name, mut by_suffix) = (HashMap::new(), Vec::new());
        for service in &services {
            by_name.insert(service.name.to_ascii_lowercase().into(), service.clone());
            for host in &service.hosts {
                match host.strip_prefix('*') {
                    Some(suffix) => by_suffix.push((suffix.to_ascii_lowercase().into(), service.clone())),
                    None => drop(by_name.insert(host.to_ascii_lowercase().into(), service.clone())),
                }
            }
        }
        // The longest suffix is the most that is said of a name.
        by_suffix.sort_by_key(|(suffix, _): &(Box<str>, _)| std::cmp::Reverse(suffix.len()));
        let Rest { workload, opaque, detect, idle } = rest;
        Self { by_name, by_suffix, services, ports, workload, opaque, detect, idle }
    }

    /// All services.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// The service of this name or host, in lower case and without port.
    pub fn named(&self, host: &str) -> Option<&Arc<Service>> {
        self.by_name.get(host).or_else(|| {
            let is_it = |(suffix, _): &&(Box<str>, _)| host.len() > suffix.len() && host.ends_with(&**suffix);
            self.by_suffix.iter().find(is_it).map(|(_, service)| service)
        })
    }

    /// The service that a host and port stand for: by its name, or as one of its endpoints.
    pub fn service(&self, host: &str, port: u16) -> Option<&Arc<Service>> {
        self.named(host).or_else(|| {
            let address = SocketAddr::new(discovery::literal(host)?, port);
            self.services.iter().find(|service| service.cluster.has_endpoint(address))
        })
    }

    /// The service where a connection goes, if it is one.
    pub fn service_of(&self, to: &To) -> Option<&Arc<Service>> {
        match to {
            To::Service(name) => self.by_name.get(&*name.to_ascii_lowercase()),
            To::Host(host, port) => self.service(host, *port),
            To::Asked => None,
        }
    }

    /// Whether nothing is detected on this port.
    pub fn is_opaque(&self, port: u16) -> bool {
        self.opaque.contains(&port)
    }
}

/// Destinations outside of the mesh, with what is remembered of them while they are in use.
pub struct Passthrough {
    env: ClusterEnv,
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    known: Mutex<HashMap<(Arc<str>, u16, bool), (Arc<Target>, Instant)>>,
}

/// Destinations that are remembered at the most; the one that was used the longest ago goes.
const DESTINATIONS: usize = 1024;

impl Passthrough {
    /// With connections and names as `env` has them, and never the mesh.
    pub fn new(env: &ClusterEnv) -> Self {
        Self { env: ClusterEnv { mesh: None, checks: false, ..env.clone() }, known: Mutex::default() }
    }

    /// Where requests and bytes for this host and port go.
    ///
    /// # Errors
    /// It is no host.
    pub fn target(&self, host: &str, port: u16, http2: bool) -> Result<Arc<Target>, Error> {
        let key = (Arc::from(host), port, http2);
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((target, used)) = known.get_mut(&key) {
            *used = now;
            return Ok(target.clone());
        }
        let bad = || Error::new(Reason::BadHost).detail("no host that can be connected");
        let upstream = services::plain(host, port, http2).ok_or_else(bad)?;
        let name = format!("passthrough/{host}:{port}");
        let cluster =
            Cluster::build(&name, &upstream, None, &self.env).map_err(|error| bad().because(error))?;
        let target = Arc::new(services::target("passthrough", "passthrough", None, &cluster));
        if known.len() >= DESTINATIONS
            && let Some(oldest) = known.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone())
        {
            known.remove(&oldest);
        }
        known.insert(key, (target.clone(), now));
        Ok(target)
    }
}
