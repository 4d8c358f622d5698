//! What workers read: services by the names under which they are asked for, and the ports of the workload. Immutable.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use config::mesh::Protocol;
use config::sidecar::Mode;
use hashbrown::HashMap;
use layers::error::{Error, Reason};
use layers::target::Target;
use layers::upstream::cluster::{Cluster, ClusterEnv};

use crate::applications::{Application, Applications};
use crate::door::{Entrance, To};
use crate::probes::Probes;
use crate::recent::Recent;
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
    /// Where the workload listens.
    pub forward: SocketAddr,
    /// Who may come.
    pub mode: Mode,
    /// What the workload speaks.
    pub protocol: Protocol,
    /// The workload itself.
    pub application: Arc<Application>,
}

/// One version of what the file says.
pub struct Snapshot {
    by_name: HashMap<Box<str>, Arc<Service>>,
    /// `.a.com` for `*.a.com`.
    by_suffix: Vec<(Box<str>, Arc<Service>)>,
    /// Addresses that services are called by, as those of a balancer.
    by_address: HashMap<IpAddr, Arc<Service>>,
    services: Vec<Arc<Service>>,
    ports: Ports,
    /// The name of the service that the workload is.
    pub workload: Arc<str>,
    opaque: Vec<u16>,
    /// How long the client alone is waited for.
    pub detect: Duration,
    /// How long an opaque connection may be without a byte.
    pub idle: Duration,
}

/// The ports of the workload.
#[derive(Default)]
pub struct Ports {
    /// In the order of their listeners.
    pub listening: Vec<Arc<Port>>,
    /// What the file says of connections that are captured or come through a tunnel; the first of a port counts.
    pub named: Vec<Arc<Port>>,
    /// Who may come to the others.
    pub mode: Mode,
    /// How the others are reached.
    pub others: Option<Arc<Applications>>,
    /// What passes without an identity.
    pub probes: Probes,
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
    pub fn new(services: Vec<Arc<Service>>, ports: Ports, rest: Rest) -> Self {
        let (mut by_name, mut by_suffix, mut by_address) = (HashMap::new(), Vec::new(), HashMap::new());
        for service in &services {
            by_name.insert(service.name.to_ascii_lowercase().into(), service.clone());
            for host in &service.hosts {
                if let Some(address) = discovery::literal(host) {
                    by_address.insert(address.to_canonical(), service.clone());
                }
                match host.strip_prefix('*') {
                    Some(suffix) => by_suffix.push((suffix.to_ascii_lowercase().into(), service.clone())),
                    None => drop(by_name.insert(host.to_ascii_lowercase().into(), service.clone())),
                }
            }
        }
        // The longest suffix is the most that is said of a name.
        by_suffix.sort_by_key(|(suffix, _): &(Box<str>, _)| std::cmp::Reverse(suffix.len()));
        let Rest { workload, opaque, detect, idle } = rest;
        Self { by_name, by_suffix, by_address, services, ports, workload, opaque, detect, idle }
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
        self.named(host).or_else(|| self.with_endpoint(SocketAddr::new(discovery::literal(host)?, port)))
    }

    /// The service of which one endpoint is at this address.
    pub fn with_endpoint(&self, address: SocketAddr) -> Option<&Arc<Service>> {
        self.services.iter().find(|service| service.cluster.has_endpoint(address))
    }

    /// The service where a connection goes, if it is one.
    pub fn service_of(&self, to: &To) -> Option<&Arc<Service>> {
        match to {
            To::Service(name) => self.by_name.get(&*name.to_ascii_lowercase()),
            To::Host(host, port) => self.service(host, *port),
            To::Captured(address) => {
                self.by_address.get(&address.ip()).or_else(|| self.with_endpoint(*address))
            }
            To::Asked => None,
        }
    }

    /// The port of the workload that a connection has come for.
    ///
    /// # Errors
    /// There is none any more, or nothing can be connected there.
    pub fn port(&self, entrance: Entrance) -> Result<Arc<Port>, Error> {
        let Ports { listening, named, mode, others, .. } = &self.ports;
        let none = || Error::new(Reason::NoUpstream).detail("the workload has no such port");
        let (address, client) = match entrance {
            Entrance::Listener(number) => return listening.get(number).cloned().ok_or_else(none),
            Entrance::Captured { to, client } => (to, client),
        };
        let found = named.iter().find(|port| port.forward.port() == address.port());
        let forward = found.map_or(address, |port| port.forward);
        // What is on loopback cannot answer anybody else.
        let client = client.filter(|_| !forward.ip().is_loopback());
        if let Some(port) = found.filter(|_| client.is_none()) {
            return Ok(port.clone());
        }
        let application = others
            .as_ref()
            .ok_or_else(none)?
            .at(forward, client)
            .map_err(|error| Error::new(Reason::NoUpstream).detail(error.to_string()))?;
        let (mode, protocol) = match found {
            Some(port) => (port.mode, port.protocol),
            None if self.is_opaque(forward.port()) => (*mode, Protocol::Tcp),
            None => (*mode, Protocol::default()),
        };
        Ok(Arc::new(Port { forward, mode, protocol, application }))
    }

    /// What passes without an identity.
    pub fn probes(&self) -> &Probes {
        &self.ports.probes
    }

    /// Whether nothing is detected on this port.
    pub fn is_opaque(&self, port: u16) -> bool {
        self.opaque.contains(&port)
    }
}

/// Destinations outside of the mesh, with what is remembered of them while they are in use.
pub struct Passthrough {
    env: ClusterEnv,
    known: Recent<(Arc<str>, u16, bool), Arc<Target>>,
}

/// Destinations that are remembered at the most.
const DESTINATIONS: usize = 1024;

impl Passthrough {
    /// With connections and names as `env` has them, and never the mesh.
    pub fn new(env: &ClusterEnv) -> Self {
        let env = ClusterEnv { mesh: None, checks: false, ..env.clone() };
        Self { env, known: Recent::new(DESTINATIONS) }
    }

    /// Where requests and bytes for this host and port go.
    ///
    /// # Errors
    /// It is no host.
    pub fn target(&self, host: &str, port: u16, http2: bool) -> Result<Arc<Target>, Error> {
        self.known.find((host.into(), port, http2), || {
            let bad = || Error::new(Reason::BadHost).detail("no host that can be connected");
            let upstream = services::plain(host, port, http2).ok_or_else(bad)?;
            let name = format!("passthrough/{host}:{port}");
            let cluster =
                Cluster::build(&name, &upstream, None, &self.env).map_err(|error| bad().because(error))?;
            Ok(Arc::new(services::target("passthrough", "passthrough", None, &cluster)))
        })
    }
}
