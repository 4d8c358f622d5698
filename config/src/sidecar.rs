//! The file of a sidecar, `sidecar.yaml`: who the workload is, what comes in for it, where it may go.
//!
//! One file says everything that a sidecar needs. It is read like `config.yaml`: variables of the environment are put in,
//! everything that is wrong is told at once with its line, and a key that does not exist is an error. Paths are relative to
//! the folder of the file. What changes while the sidecar runs is taken over; [`Sidecar::needs_restart`] says what cannot be.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::capture::{Capture, Direction};
use crate::discovery::Discovery;
use crate::document::{Document, LocatedError};
use crate::env::Env;
use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Cidr, Distinct, Int, Seconds, Text};
use crate::membership::{self, Ca};
use crate::mesh::{Action, Authorization, Policies, Port, Protocol, Scope, ServiceName, ServicePolicy};
use crate::plugin_catalog::PluginCatalog;
use crate::typed;

/// Name of the file in a directory.
pub const SIDECAR_FILE: &str = "sidecar.yaml";

/// Ports whose servers speak first, or whose bytes are nobody's business: nothing is detected there.
pub const OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

/// Where redirected connections of others come.
const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
/// Where those of the workload itself do.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sidecar {
    /// The trust domain of the mesh: `mesh.local`.
    pub trust_domain: Text<1, 255>,
    /// Where certificate and trust bundle come from.
    pub ca: Ca,
    /// Whom the sidecar stands before.
    pub workload: Workload,
    /// The registries in which services are found: the keys of `discovery` in `config.yaml`.
    #[serde(default)]
    pub discovery: Map<String, Value>,
    /// How names are resolved.
    #[serde(default)]
    pub dns: Dns,
    /// What comes in.
    #[serde(default)]
    pub inbound: Inbound,
    /// What goes out.
    #[serde(default)]
    pub outbound: Outbound,
    /// What the kernel leads to the sidecar, where a direction is transparent. `postern sidecar capture` reads it too.
    #[serde(default)]
    pub capture: Capture,
    /// The services that the workload calls.
    #[serde(default)]
    pub services: Vec<ServicePolicy>,
    /// What is allowed.
    #[serde(default)]
    pub policies: Policies,
    /// The admin interface: status, metrics, what is known.
    #[serde(default)]
    pub admin: Admin,
    /// The identity for applications on the machine, by the SPIFFE Workload API; for none if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_api: Option<WorkloadApi>,
    /// How the sidecar ends.
    #[serde(default)]
    pub drain: Drain,
    /// Where requests and connections are logged; nowhere if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<AccessLog>,
    /// Threads for each direction.
    #[serde(default)]
    pub workers: Int<1, 64, 1>,
    /// Where the last known endpoints are kept for the next start; nowhere if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Limits.
    #[serde(default)]
    pub limits: Limits,
}

/// Whom a sidecar stands before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The name of its service.
    pub service: ServiceName,
    /// Its identity: `spiffe://mesh.local/ns/default/sa/orders`. What the certificate says if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Text<1, 2048>>,
    /// Region and zone, for services that prefer what is near.
    #[serde(default)]
    pub locality: WorkloadPlace,
}

/// Where a workload runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WorkloadPlace {
    /// The region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Text<1, 256>>,
    /// The zone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Text<1, 256>>,
    /// The machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Text<1, 256>>,
}

/// How names are resolved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// Servers; those of the system if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<Address>,
    /// Whether addresses of IPv6 are asked for.
    pub ipv6: bool,
}

/// How connections to the workload are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Mode {
    /// Those of the mesh alone.
    #[default]
    Strict,
    /// Also plain ones, and TLS that the workload itself speaks.
    Permissive,
    /// Plain ones alone: there is no mesh here.
    Disabled,
}

impl Mode {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::Strict => "strict",
            Mode::Permissive => "permissive",
            Mode::Disabled => "disabled",
        }
    }
}

/// What comes in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Inbound {
    /// How connections are taken, where a port does not say.
    pub mode: Mode,
    /// Whether connections to the workload are redirected to the sidecar, at `capture.inbound_port`.
    pub transparent: bool,
    /// Where tunnels of HBONE are taken, as Istio's ambient mesh opens them: `0.0.0.0:15008`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hbone: Option<Address>,
    /// Probes of whoever runs the workload: plain requests that pass where only the mesh is let in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes: Option<Probes>,
    /// The ports of the workload.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<InboundPort>,
}

/// Requests that pass without an identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Probes {
    /// Where they come from: the addresses of the machine that probes.
    pub from: Vec<Cidr>,
    /// What they ask for, exactly: `/healthz`, or `/grpc.health.v1.Health/Check`.
    pub paths: Vec<Text<1, 1024>>,
}

/// A port of the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InboundPort {
    /// Where the sidecar listens: `0.0.0.0:18080`. Without it, this is about redirected connections and tunnels to the port
    /// of `forward`, which go to `forward` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<Address>,
    /// Where the workload listens: `127.0.0.1:8080`.
    pub forward: Address,
    /// What it speaks.
    #[serde(default)]
    pub protocol: Protocol,
    /// How connections are taken; as `inbound.mode` if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// What goes out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Outbound {
    /// A forward proxy for `HTTP_PROXY`: requests with a whole target, and `CONNECT`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_proxy: Option<Address>,
    /// A SOCKS5 proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socks5: Option<Address>,
    /// Listeners that stand for one service each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub listeners: Vec<OutboundListener>,
    /// Ports of destinations on which nothing is detected. 25, 587, 3306, 4444, 5432, 6379, 9300 and 11211 if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opaque_ports: Option<Vec<Port>>,
    /// Whether connections of the workload are redirected to the sidecar, at `capture.outbound_port`.
    pub transparent: bool,
}

/// A listener that stands for a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutboundListener {
    /// Where the sidecar listens: `127.0.0.1:9001`.
    pub listen: Address,
    /// The name of the service.
    pub service: ServiceName,
}

/// The admin interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Where it listens.
    pub listen: Address,
}

impl Default for Admin {
    fn default() -> Admin {
        Admin { listen: Address(SocketAddr::from(([127, 0, 0, 1], 15021))) }
    }
}

/// The SPIFFE Workload API. Who may ask gets the key of the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadApi {
    /// The path of the socket, in a directory that is there.
    pub socket: PathBuf,
    /// Users, by number, whose processes may ask. The user of the sidecar alone if it is absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<u32>,
}

/// How a sidecar ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Drain {
    /// How long callers get to hear of it before anything is closed, in seconds.
    pub propagation: Seconds<true>,
    /// How long requests under way, and then the workload, get to end, in seconds.
    pub grace: Seconds,
    /// The agent of Consul that is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul: Option<DrainConsul>,
    /// Who confirms that nothing is sent here any more, so that `propagation` is not waited for to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observers: Option<Observers>,
}

impl Default for Drain {
    fn default() -> Drain {
        Drain { propagation: Seconds::whole(5), grace: Seconds::whole(30), consul: None, observers: None }
    }
}

/// Gateways that are asked to use this node no more, and confirm it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Observers {
    /// The Control API of a gateway: `10.0.0.11:9090`. The first that answers asks its peers, and the clients of its discovery
    /// servers; the others are for when it is away.
    #[schemars(length(min = 1))]
    pub gateways: Vec<Text<1, 1024>>,
    /// The service, as gateways know it: its name in the registry. Whatever has the node, if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Text<1, 1024>>,
    /// This node, as gateways know it: `10.0.0.3:8080`.
    pub node: Text<1, 256>,
}

/// What an agent of Consul is told when the sidecar drains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainConsul {
    /// The agent: `http://127.0.0.1:8500`.
    pub agent: Text<1, 1024>,
    /// The id of the service as it is registered.
    pub id: Text<1, 256>,
    /// A file with the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Whether it is taken out, or put into maintenance.
    #[serde(default)]
    pub how: DrainHow,
}

/// What becomes of a registration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum DrainHow {
    /// It is taken out.
    #[default]
    Deregister,
    /// It stays, and is not to be used.
    Maintenance,
}

/// The access log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AccessLog {
    /// The file; standard output if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A line, with variables as in `nginx_config.http.access_log_format`, and of the mesh `$peer_identity`,
    /// `$mesh_direction`, `$mesh_service`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Text<1, 4096>>,
    /// A line for each connection that carried no requests, with variables as nginx has them for streams
    /// (`$bytes_received`, `$bytes_sent`, `$session_time`, `$protocol`), and of the mesh those above, `$own_identity` and
    /// `$reason`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_format: Option<Text<1, 4096>>,
}

/// Limits of a sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections of one thread.
    pub connections: Int<1, { u32::MAX }, 10_620>,
    /// Requests at work in each direction.
    pub requests: Int<1, { u32::MAX }, 10_620>,
    /// How long an opaque connection may be without a byte, in seconds.
    pub idle: Seconds,
    /// How old a connection to another sidecar gets, in seconds; less where the certificate ends before.
    pub connection_age: Seconds,
    /// How long is waited for the first bytes of a connection before the other side is asked, in seconds.
    pub detect: Seconds,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: Int::default(),
            requests: Int::default(),
            idle: Seconds::whole(3600),
            connection_age: Seconds::whole(3600),
            detect: Seconds::new(0.1).unwrap_or(Seconds::whole(1)),
        }
    }
}

/// An address with a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

const ADDRESS: &str = "an address with a port: 127.0.0.1:8080, [::1]:8080";

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map(Address).map_err(|_| serde::de::Error::custom(format!("`{text}` is not {ADDRESS}")))
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": r"^(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-fA-F:.]+\]):\d{1,5}$", "x-expected": ADDRESS})
    }
}

impl Sidecar {
    /// Reads the file, given itself or by its directory.
    ///
    /// # Errors
    /// It cannot be read, or all that is wrong in it.
    pub fn load(
        path: &Path,
        catalog: &dyn PluginCatalog,
        env: &dyn Env,
    ) -> Result<Sidecar, Vec<LocatedError>> {
        let file = if path.is_dir() { path.join(SIDECAR_FILE) } else { path.to_owned() };
        let name = file.display().to_string();
        let bytes = std::fs::read(&file).map_err(|error| {
            let error = ConfigError::invalid("", format!("cannot be read: {error}"));
            vec![LocatedError { file: name.as_str().into(), line: 0, column: 0, error }]
        })?;
        let mut document = Document::parse_bytes(&name, &bytes).map_err(|error| vec![error.into()])?;
        let dir = file.parent().unwrap_or(Path::new(""));
        Sidecar::read(&mut document, dir, catalog, env)
    }

    /// Reads a document that stands in `dir`.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn read(
        document: &mut Document,
        dir: &Path,
        catalog: &dyn PluginCatalog,
        env: &dyn Env,
    ) -> Result<Sidecar, Vec<LocatedError>> {
        let check = |sidecar: &mut Sidecar| sidecar.check(catalog);
        let mut sidecar = typed::settings(document, env, Value::Null, check)?;
        sidecar.resolve(dir);
        Ok(sidecar)
    }

    /// The JSON Schema of the file.
    #[must_use]
    pub fn schema() -> Value {
        typed::schema_of::<Sidecar>()
    }

    /// The registries. What is wrong in them was told when the file was read.
    #[must_use]
    pub fn registries(&self) -> Discovery {
        Discovery::read(&self.discovery).0
    }

    /// What is in order, and may not be what was meant.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        if self.inbound.hbone.is_none() {
            return Vec::new();
        }
        let about = |policy: &&Authorization| {
            let ours =
                |names: &Distinct<Text<1, 256>>| names.iter().any(|name| **name == *self.workload.service);
            policy.services.as_ref().is_none_or(ours) && policy.is_of_requests()
        };
        let told = |policy: &Authorization| {
            let does = match policy.action {
                Action::Deny => "what asks for them refuses every tunnel that the rest of its rule is about",
                Action::Allow => "what asks for them lets no tunnel pass",
                Action::Audit => "what asks for them counts every tunnel that the rest of its rule is about",
            };
            format!(
                "policy {}: nobody looks into tunnels (`inbound.hbone`), so methods, paths, hosts and `when` are not known \
                 there: {does}",
                &*policy.name
            )
        };
        self.policies.authorization.iter().filter(about).map(told).collect()
    }

    /// Ports of destinations on which nothing is detected.
    #[must_use]
    pub fn opaque_ports(&self) -> Vec<u16> {
        match &self.outbound.opaque_ports {
            None => OPAQUE_PORTS.to_vec(),
            Some(ports) => ports.iter().filter_map(|port| u16::try_from(port.get()).ok()).collect(),
        }
    }

    /// Whether the kernel leads connections to the sidecar.
    #[must_use]
    pub fn is_transparent(&self) -> bool {
        self.inbound.transparent || self.outbound.transparent
    }

    /// What the kernel has to lead to the sidecar, with all ports of the sidecar among its own.
    #[must_use]
    pub fn captured(&self) -> Capture {
        let mut capture = self.capture.clone();
        capture.only = match (self.inbound.transparent, self.outbound.transparent) {
            (true, false) => Some(Direction::Inbound),
            (false, true) => Some(Direction::Outbound),
            (true, true) | (false, false) => None,
        };
        for port in self.ports().filter_map(NonZeroU16::new) {
            if !capture.own_ports.contains(&port) {
                capture.own_ports.push(port);
            }
        }
        capture
    }

    /// The ports the sidecar listens on, as far as the file says them.
    pub fn ports(&self) -> impl Iterator<Item = u16> + use<> {
        self.listeners().into_iter().map(|(_, address)| address.0.port()).filter(|port| *port != 0)
    }

    /// Where the sidecar listens, with the pointer to what says so.
    fn listeners(&self) -> Vec<(String, Address)> {
        let at = |ip: IpAddr, port: NonZeroU16| Address(SocketAddr::new(ip, port.get()));
        let both = |pointer: &str, ips: [IpAddr; 2], port| ips.map(|ip| (pointer.to_owned(), at(ip, port)));
        let mut all = vec![("/admin/listen".to_owned(), self.admin.listen)];
        for (index, port) in self.inbound.ports.iter().enumerate() {
            all.extend(port.listen.map(|listen| (format!("/inbound/ports/{index}/listen"), listen)));
        }
        all.extend(self.inbound.hbone.map(|address| ("/inbound/hbone".to_owned(), address)));
        if self.inbound.transparent {
            all.extend(both("/capture/inbound_port", ANY, self.capture.inbound_port));
        }
        all.extend(self.outbound.http_proxy.map(|address| ("/outbound/http_proxy".to_owned(), address)));
        all.extend(self.outbound.socks5.map(|address| ("/outbound/socks5".to_owned(), address)));
        for (index, listener) in self.outbound.listeners.iter().enumerate() {
            all.push((format!("/outbound/listeners/{index}/listen"), listener.listen));
        }
        if self.outbound.transparent {
            all.extend(both("/capture/outbound_port", LOOPBACK, self.capture.outbound_port));
        }
        all
    }

    /// The keys that differ from `other` and are taken over by a new start alone.
    #[must_use]
    pub fn needs_restart(&self, other: &Sidecar) -> Vec<&'static str> {
        let ports = |sidecar: &Sidecar| {
            let ports: Vec<_> = sidecar.inbound.ports.iter().filter_map(|port| port.listen).collect();
            (ports, sidecar.inbound.hbone)
        };
        let ways = |sidecar: &Sidecar| {
            let Outbound { listeners, http_proxy, socks5, .. } = &sidecar.outbound;
            (listeners.clone(), *http_proxy, *socks5)
        };
        let (limits, others) = (&self.limits, &other.limits);
        let differs = [
            ("trust_domain", self.trust_domain != other.trust_domain),
            ("ca", self.ca != other.ca),
            ("workload", self.workload != other.workload),
            ("discovery", self.discovery != other.discovery),
            ("dns", self.dns != other.dns),
            ("inbound.ports.listen", ports(self) != ports(other)),
            ("outbound.listeners", ways(self) != ways(other)),
            ("inbound.transparent", self.inbound.transparent != other.inbound.transparent),
            ("outbound.transparent", self.outbound.transparent != other.outbound.transparent),
            ("capture", self.is_transparent() && self.capture != other.capture),
            ("admin", self.admin != other.admin),
            ("workload_api", self.workload_api != other.workload_api),
            ("access_log", self.access_log != other.access_log),
            ("workers", self.workers != other.workers),
            ("data_dir", self.data_dir != other.data_dir),
            ("limits.connections", limits.connections != others.connections),
            ("limits.requests", limits.requests != others.requests),
            ("limits.idle", limits.idle != others.idle),
        ];
        differs.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect()
    }

    /// Everything that the types do not say and that is wrong. Fills in defaults of plugins.
    fn check(&mut self, catalog: &dyn PluginCatalog) -> Vec<ConfigError> {
        let (_, mut errors) = Discovery::read(&self.discovery);
        errors.extend(self.ca.check().into_iter().map(|error| error.under("/ca")));
        let identity = self.workload.identity.as_deref();
        errors.extend(identity.and_then(|identity| {
            membership::check_identity(identity, &self.trust_domain, "/workload/identity")
        }));
        if self.drain.observers.as_ref().is_some_and(|observers| observers.gateways.is_empty()) {
            let why = "nobody is asked: write the Control API of a gateway, as in [\"10.0.0.11:9090\"]";
            errors.push(ConfigError::invalid("/drain/observers/gateways", why));
        }
        if let Some(Probes { from, paths }) = &self.inbound.probes {
            let wrong =
                |member: &str, why: &str| ConfigError::invalid(format!("/inbound/probes{member}"), why);
            if from.is_empty() {
                errors.push(wrong("/from", "nobody probes: write the addresses of the machine that does"));
            }
            if paths.is_empty() {
                errors.push(wrong("/paths", "nothing is probed: write the paths, as in [/healthz]"));
            }
            for (index, path) in paths.iter().enumerate().filter(|(_, path)| !path.starts_with('/')) {
                let why = format!("`{}` is no path: write /{}", &**path, &**path);
                errors.push(wrong(&format!("/paths/{index}"), &why));
            }
        }
        self.check_services(catalog, &mut errors);
        self.check_ports(&mut errors);
        self.check_listeners(&mut errors);
        let mut wrong = Vec::new();
        self.capture.check(&mut wrong);
        if self.capture.only.is_some() {
            let why = "`inbound.transparent` and `outbound.transparent` say what a sidecar takes";
            wrong.push(ConfigError::invalid("/only", why));
        }
        errors.extend(wrong.into_iter().map(|error| error.under("/capture")));
        errors.extend(self.policies.check().into_iter().map(|error| error.under("/policies")));
        let services = [&*self.workload.service];
        let ports: Vec<u16> = self.inbound.ports.iter().map(|port| port.forward.0.port()).collect();
        let any_port = self.inbound.transparent || self.inbound.hbone.is_some();
        let scope = Scope { services: &services, ports: (!any_port).then_some(&ports) };
        errors.extend(self.policies.check_scope(scope).into_iter().map(|error| error.under("/policies")));
        errors
    }

    fn check_services(&mut self, catalog: &dyn PluginCatalog, errors: &mut Vec<ConfigError>) {
        let mut names = HashSet::new();
        for (index, service) in self.services.iter_mut().enumerate() {
            let at = format!("/services/{index}");
            errors.extend(service.check(catalog).into_iter().map(|error| error.under(&at)));
            if !names.insert(service.name.to_string()) {
                errors.push(ConfigError::new(format!("{at}/name"), ErrorKind::Duplicate));
            }
            for (place, host) in service.hosts.iter().flat_map(|hosts| hosts.iter()).enumerate() {
                if !names.insert(host.to_ascii_lowercase()) {
                    let pointer = format!("{at}/hosts/{place}");
                    errors.push(ConfigError::invalid(
                        pointer,
                        format!("another service is called `{}`", &**host),
                    ));
                }
            }
        }
    }

    fn check_ports(&self, errors: &mut Vec<ConfigError>) {
        let mut captured = HashSet::new();
        let takes_captured = self.inbound.transparent || self.inbound.hbone.is_some();
        for (index, port) in self.inbound.ports.iter().enumerate() {
            let at = format!("/inbound/ports/{index}");
            let mut wrong = |member: &str, why: &str| {
                errors.push(ConfigError::invalid(format!("{at}{member}"), why));
            };
            let to = port.forward.0;
            if to.port() == 0 || to.ip().is_unspecified() {
                wrong("/forward", "write where the workload listens: 127.0.0.1:8080");
                continue;
            }
            match port.listen {
                Some(Address(from)) => {
                    let reaches = from.ip().is_unspecified() || from.ip() == to.ip();
                    if from.port() == to.port() && reaches {
                        wrong(
                            "/forward",
                            "this is where the sidecar itself listens: write another port in `listen`",
                        );
                    }
                }
                None if !takes_captured => wrong(
                    "",
                    "nothing comes to this port: write where the sidecar listens (`listen`), or set \
                     `inbound.transparent` or `inbound.hbone`",
                ),
                None if !captured.insert(to.port()) => {
                    wrong("/forward", "another entry without `listen` is about this port");
                }
                None => {}
            }
        }
    }

    fn check_listeners(&self, errors: &mut Vec<ConfigError>) {
        let mut taken = HashSet::new();
        for (pointer, address) in self.listeners() {
            if address.0.port() != 0 && !taken.insert(address) {
                let why = format!("{address} is listened on already: write another port");
                errors.push(ConfigError::invalid(pointer, why));
            }
        }
        for (index, listener) in self.outbound.listeners.iter().enumerate() {
            if !self.services.iter().any(|service| service.name == listener.service) {
                let known: Vec<_> = self.services.iter().map(|service| service.name.to_string()).collect();
                errors.push(ConfigError::invalid(
                    format!("/outbound/listeners/{index}/service"),
                    format!(
                        "there is no service `{}` in `services`; there are: {}",
                        listener.service,
                        known.join(", ")
                    ),
                ));
            }
        }
    }

    /// Makes paths of those that are relative to the file.
    fn resolve(&mut self, dir: &Path) {
        self.ca.resolve(dir);
        let own = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = dir.join(&*path);
            }
        };
        self.data_dir.iter_mut().for_each(own);
        self.workload_api.iter_mut().map(|api| &mut api.socket).for_each(own);
        self.drain.consul.iter_mut().flat_map(|consul| consul.token_file.iter_mut()).for_each(own);
        if let Some(path) = self.access_log.iter_mut().find_map(|log| log.path.as_mut()) {
            own(path);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;

    use super::*;
    use crate::testing::TestCatalog;

    const GOOD: &str = "\
trust_domain: mesh.local
ca: {files: {cert: svid.pem, key: svid.key, trust: /etc/roots.pem}}
workload: {service: orders, identity: spiffe://mesh.local/ns/default/sa/orders}
inbound:
  ports:
    - {listen: \"0.0.0.0:18080\", forward: \"127.0.0.1:${{PORT}}\"}
outbound:
  http_proxy: 127.0.0.1:15080
  listeners:
    - {listen: 127.0.0.1:9001, service: payments}
services:
  - name: payments
    upstream: {type: roundrobin, nodes: {\"127.0.0.1:28080\": 1}}
    identities: [spiffe://mesh.local/ns/default/sa/payments]
";

    fn read(text: &str) -> Result<Sidecar, Vec<String>> {
        let mut document = Document::yaml("sidecar.yaml", text).unwrap();
        let env = BTreeMap::from([("PORT".to_owned(), "8080".to_owned())]);
        Sidecar::read(&mut document, Path::new("/srv/orders"), &TestCatalog, &env)
            .map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_file_says_everything_and_the_rest_has_defaults() {
        let sidecar = read(GOOD).unwrap();
        let files = sidecar.ca.files.as_ref().unwrap();
        assert_eq!(files.cert, Path::new("/srv/orders/svid.pem"));
        assert_eq!(files.trust, Path::new("/etc/roots.pem"));
        let [port] = &*sidecar.inbound.ports else { unreachable!("one port") };
        assert_eq!(
            (port.forward.to_string().as_str(), port.mode, port.protocol),
            ("127.0.0.1:8080", None, Protocol::Auto)
        );
        assert_eq!(sidecar.inbound.mode, Mode::Strict);
        assert_eq!(sidecar.admin.listen.to_string(), "127.0.0.1:15021");
        assert!(sidecar.opaque_ports().contains(&5432) && !sidecar.opaque_ports().contains(&80));
        assert_eq!(sidecar.limits.detect.duration().as_millis(), 100);
        assert_eq!(sidecar.workers.get(), 1);
    }

    #[test]
    fn everything_wrong_is_told_with_its_line() {
        let with = |from: &str, to: &str| read(&GOOD.replacen(from, to, 1)).unwrap_err().join("\n");
        for (from, to, told) in [
            ("trust_domain: mesh.local\n", "", "trust_domain"),
            ("inbound:", "inbuond: {}\ninbound:", "sidecar.yaml:4:1: /inbuond: "),
            ("0.0.0.0:18080", "18080", "sidecar.yaml:6:8: /inbound/ports/0/listen: "),
            (
                "service: payments",
                "service: payment",
                "sidecar.yaml:10:32: /outbound/listeners/0/service: there is no service",
            ),
            ("127.0.0.1:9001", "127.0.0.1:15080", "is listened on already"),
            ("0.0.0.0:18080", "0.0.0.0:8080", "where the sidecar itself listens"),
            (
                "spiffe://mesh.local/ns/default/sa/orders",
                "spiffe://other/a",
                "is no identity of `mesh.local`",
            ),
            ("spiffe://mesh.local/ns/default/sa/payments", "payments", "/services/0/identities/0"),
            ("{files: {cert: svid.pem, key: svid.key, trust: /etc/roots.pem}}", "{}", "/ca"),
            ("ca: {files", "ca: {consul: \"http://127.0.0.1:8500\", files", "from one place"),
            ("${{PORT}}", "${{NONE}}", "environment variable NONE is not set"),
            ("services:", "discovery: {consul: {servers: 1}}\nservices:", "/discovery/consul/servers"),
            (
                "services:",
                "capture: {skip_inbound_ports: [nine]}\nservices:",
                "/capture/skip_inbound_ports/0",
            ),
            ("services:", "capture: {uid: 0}\nservices:", "/capture/uid"),
            ("services:", "capture: {only: inbound}\nservices:", "/capture/only"),
            (
                "services:",
                "drain: {observers: {gateways: [], node: \"10.0.0.3:80\"}}\nservices:",
                "/drain/observers/gateways: nobody is asked",
            ),
            ("  ports:\n", "  probes: {from: [], paths: [healthz]}\n  ports:\n", "/inbound/probes/from"),
            ("  ports:\n", "  probes: {from: [10.0.0.1], paths: [healthz]}\n  ports:\n", "write /healthz"),
            ("listen: \"0.0.0.0:18080\", ", "", "nothing comes to this port"),
            (
                "  ports:\n",
                "  transparent: true\n  ports:\n    - {forward: \"127.0.0.1:1\"}\n    - {forward: \"127.0.0.2:1\"}\n",
                "another entry without `listen`",
            ),
            (
                "  http_proxy: 127.0.0.1:15080",
                "  transparent: true\n  http_proxy: 127.0.0.1:15001",
                "/capture/outbound_port: 127.0.0.1:15001 is listened on already",
            ),
        ] {
            let errors = with(from, to);
            assert!(errors.contains(told), "{told}\n{errors}");
        }
    }

    #[test]
    fn all_ports_of_the_sidecar_are_left_alone_by_the_capture() {
        let transparent = GOOD
            .replace("inbound:\n", "inbound:\n  transparent: true\n  hbone: 0.0.0.0:15008\n")
            .replace("outbound:\n", "outbound:\n  transparent: true\n");
        let sidecar = read(&transparent).unwrap();
        assert_eq!(sidecar.captured().listening(), [9001, 15001, 15006, 15008, 15021, 15080, 18080]);
        let explicit = read(GOOD).unwrap();
        assert!(sidecar.is_transparent() && !explicit.is_transparent());
        assert_eq!(sidecar.captured().only, None);
        for (one, only) in [("inbound", Direction::Inbound), ("outbound", Direction::Outbound)] {
            let text = GOOD.replace(&format!("\n{one}:\n"), &format!("\n{one}:\n  transparent: true\n"));
            assert_eq!(read(&text).unwrap().captured().only, Some(only));
        }
        assert_eq!(
            explicit.needs_restart(&sidecar),
            ["inbound.ports.listen", "inbound.transparent", "outbound.transparent"]
        );
    }

    #[test]
    fn it_is_told_that_nobody_looks_into_tunnels() {
        let policies = "policies:\n  authorization:\n    \
            - {name: paths, action: deny, rules: [{to: [{paths: [/admin]}]}]}\n    \
            - {name: claims, action: allow, rules: [{when: [[jwt_claim_sub, \"==\", a]]}]}\n    \
            - {name: ports, action: allow, rules: [{to: [{ports: [8080]}]}]}\n";
        let told = |text: &str| read(text).unwrap().warnings();
        let with = format!("{GOOD}{policies}  tokens: [{{issuer: a, jwks_uri: \"http://a/\"}}]\n");
        assert!(told(&with).is_empty());
        let told = told(&with.replace("inbound:\n", "inbound:\n  hbone: 0.0.0.0:15008\n"));
        let [paths, claims] = &told[..] else { unreachable!("{told:?}") };
        assert!(paths.contains("policy paths:") && paths.contains("refuses every tunnel"), "{paths}");
        assert!(claims.contains("policy claims:") && claims.contains("lets no tunnel pass"), "{claims}");
    }

    #[test]
    fn the_documentation_is_a_good_file() {
        let page = include_str!("../../docs/sidecar.md");
        let block = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let sidecar = read(block).unwrap();
        assert_eq!((sidecar.services.len(), sidecar.outbound.listeners.len()), (1, 1));
    }

    #[test]
    fn what_needs_a_restart_is_known() {
        let before = read(GOOD).unwrap();
        let after = read(&GOOD.replace("28080", "28081")).unwrap();
        assert!(before.needs_restart(&after).is_empty(), "services are taken over");
        let after = read(&GOOD.replace("15080", "15081")).unwrap();
        assert_eq!(before.needs_restart(&after), ["outbound.listeners"]);
        let limits = "limits: {connection_age: 60, detect: 1, requests: 5}\n";
        assert_eq!(before.needs_restart(&read(&format!("{GOOD}{limits}")).unwrap()), ["limits.requests"]);
    }
}
