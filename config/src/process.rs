//! Start-up settings: APISIX's own `config.yaml`, read into types.
//!
//! What APISIX means to nginx is taken over where it means something here, listed as not applicable where it does not,
//! and refused where leaving it out would change what is served (raw nginx snippets, xDS). All errors are told at once,
//! with file, line and pointer. Keys of our own are under `postern`. Everything has a default: no file is a valid file.

mod acme;
mod apisix;
mod deployment;
mod discovery_server;
mod nginx;
mod own;
mod section;
mod signers;
mod units;
mod wasm;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value};

pub use self::acme::{Acme, ExternalAccount};
pub use self::discovery_server::DiscoveryServer;
use self::section::Reader;
pub use self::signers::SignerPool;
pub use self::wasm::{WasmPhase, WasmPlugin};
use crate::discovery::Discovery;
use crate::document::{Document, LocatedError};
use crate::env::{self, Env, Typing};
use crate::error::ConfigError;
use crate::membership::Membership;
use crate::template::Template;

/// The settings a process starts with.
#[derive(Clone, Debug)]
pub struct Process {
    /// The name of this instance among others; one is made and kept in the data directory where none is written.
    pub id: Option<String>,
    /// `deployment.role`.
    pub role: Role,
    /// Where resources come from.
    pub provider: Provider,
    /// Sockets for clients: HTTP, HTTPS, and those that speak PROXY protocol.
    pub listeners: Vec<Listener>,
    /// TLS of the HTTPS listeners.
    pub tls: Tls,
    /// TCP and UDP listeners; none unless `proxy_mode` has `stream`.
    pub stream: StreamProxy,
    /// How routes are matched.
    pub routing: Routing,
    /// How upstream names are resolved.
    pub dns: Dns,
    /// The Admin API; none if it is switched off or the role has none.
    pub admin: Option<Admin>,
    /// The Control API, `127.0.0.1:9090`; none if it is switched off.
    pub control: Option<SocketAddr>,
    /// The status API, `127.0.0.1:7085`.
    pub status: SocketAddr,
    /// Peers whose `X-Forwarded-*` headers are believed.
    pub trusted_addresses: Vec<IpNet>,
    /// Encryption of sensitive fields in stores.
    pub data_encryption: DataEncryption,
    /// How long secrets from managers are kept.
    pub secret_cache: SecretCache,
    /// Whether spans are made for the phases of a request.
    pub tracing: bool,
    /// Whether upstreams are probed at all.
    pub upstream_health_checks: bool,
    /// Send `X-APISIX-Upstream-Status` always, and not only with answers of 5xx.
    pub show_upstream_status: bool,
    /// Whether the `Server` header tells the version.
    pub server_tokens: bool,
    /// Limits against hostile and careless clients.
    pub limits: Limits,
    /// Whether request headers with `_` in their names pass.
    pub underscores_in_headers: bool,
    /// Whose header gives the client address.
    pub real_ip: RealIp,
    /// Where requests are logged; none if they are not.
    pub access_log: Option<AccessLog>,
    /// Least important level of the error log.
    pub log_level: LogLevel,
    /// Pool of idle upstream connections, where an upstream does not say.
    pub upstream_keepalive: UpstreamKeepalive,
    /// Zones of the `proxy-cache` plugin.
    pub cache: Cache,
    /// Data path threads.
    pub workers: Workers,
    /// Whether each worker is bound to a core.
    pub cpu_affinity: bool,
    /// Where the embedded store, snapshots and generated keys are kept.
    pub data_dir: PathBuf,
    /// Control APIs of the gateways that serve the same configuration. A name stands for all addresses behind it.
    pub peers: Vec<HostPort>,
    /// Where `config.yaml` and `apisix.yaml` are.
    pub config_dir: PathBuf,
    /// `plugins`: those that may be used; none means all there are.
    pub plugins: Option<Vec<String>>,
    /// `stream_plugins`, likewise.
    pub stream_plugins: Option<Vec<String>>,
    /// `plugin_attr`: settings of plugins that need a restart, by plugin.
    pub plugin_attr: Map<String, Value>,
    /// Modules that are plugins. APISIX `wasm.plugins`.
    pub wasm: Vec<WasmPlugin>,
    /// `discovery`: the registries in which upstreams find their nodes.
    pub discovery: Discovery,
    /// What `postern discovery serve` listens on.
    pub discovery_server: Option<DiscoveryServer>,
    /// `postern.mesh`: how this gateway is of a mesh, if it is.
    pub mesh: Option<Membership>,
    /// Pools of signers, which hold private keys of certificates.
    pub signers: Vec<SignerPool>,
    /// Who gives certificates to `ssl` resources that ask for them.
    pub acme: Option<Acme>,
    /// `discovery` as written, for those who ask.
    pub discovery_written: Map<String, Value>,
    /// `postern.locality`: where this process runs.
    pub place: Place,
    /// Largest GraphQL body that is looked into, in bytes.
    pub graphql_max_size: u64,
    /// Settings that are known and change nothing here. Tell the operator once.
    pub not_applicable: Vec<Notice>,
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an address, an IPv6 one without brackets.
    pub host: String,
    /// From 1.
    pub port: u16,
}

impl HostPort {
    /// Reads `gw.example.com:9090`, `10.0.0.1:9090`, `[fd00::1]:9090`.
    fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let host = match bare {
            Some(bare) => bare.parse::<std::net::Ipv6Addr>().ok().map(|_| bare)?,
            None => (!host.is_empty() && host.chars().all(is_name)).then_some(host)?,
        };
        let port = port.parse().ok().filter(|port| *port > 0)?;
        Some(Self { host: host.to_owned(), port })
    }
}

/// `deployment.role`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves traffic and the Admin API.
    Traditional,
    /// Serves the Admin API only.
    ControlPlane,
    /// Serves traffic only.
    DataPlane,
}

/// Where resources come from.
#[derive(Clone, Debug)]
pub enum Provider {
    /// The store in [`Process::data_dir`], written by the Admin API.
    Embedded,
    /// `apisix.yaml` or `apisix.json`, watched for changes.
    File {
        /// The file, in [`Process::config_dir`].
        path: PathBuf,
    },
    /// In memory, the whole of it put by `/apisix/admin/configs`.
    Standalone,
    /// An etcd with APISIX's key layout.
    Etcd(Box<Etcd>),
}

/// `deployment.etcd`.
#[derive(Clone, Debug)]
pub struct Etcd {
    /// URLs of one cluster, at least one.
    pub hosts: Vec<String>,
    /// Start of every key, without a slash at the end.
    pub prefix: String,
    /// Name and password.
    pub user: Option<(String, Hidden)>,
    /// For connecting, and for each call but a watch.
    pub timeout: Duration,
    /// A watch without news is begun again after this.
    pub watch_timeout: Duration,
    /// Pause after a failed synchronisation, to which half is added at random.
    pub resync_delay: Duration,
    /// How long a member that failed is left alone.
    pub health_check_timeout: Duration,
    /// Attempts at start before the last-good snapshot is used.
    pub startup_retry: u32,
    pub tls: EtcdTls,
}

/// `deployment.etcd.tls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// Check the certificate of the server.
    pub verify: bool,
    /// Certificate and key to show to the server.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Roots to trust; those of `apisix.ssl.ssl_trusted_certificate` if there are none.
    pub ca: Option<PathBuf>,
    /// Name asked for; the host of the URL if there is none.
    pub sni: Option<String>,
}

/// A socket that accepts clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: SocketAddr,
    pub tls: bool,
    /// HTTP/2, by ALPN with TLS and by prior knowledge without.
    pub http2: bool,
    /// Every connection begins with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// The IPv6 twin of an IPv4 listener: a host without IPv6 goes without it.
    pub optional: bool,
}

/// `apisix.ssl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Versions offered, of those there are.
    pub protocols: Vec<TlsVersion>,
    /// Suites for TLS 1.2 by their OpenSSL names, best first.
    pub ciphers: Vec<String>,
    pub session_tickets: bool,
    /// Name to assume for clients that send none.
    pub fallback_sni: Option<String>,
    /// Roots for connections of our own; none means those of the system.
    pub trusted_certificate: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    Tls12,
    Tls13,
}

/// `apisix.stream_proxy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamProxy {
    pub tcp: Vec<StreamListener>,
    pub udp: Vec<StreamListener>,
    /// Whether `proxy_mode` leaves HTTP on.
    pub only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamListener {
    pub ip: IpAddr,
    /// One port, or the ends of a range.
    pub ports: RangeInclusive<u16>,
    pub tls: bool,
    /// Connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// Connections to upstreams begin with one.
    pub proxy_protocol_to_upstream: bool,
}

/// How routes are matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    pub router: HttpRouter,
    /// `/a/` is matched as `/a`.
    pub delete_uri_tail_slash: bool,
    /// Paths are normalised as the servlet specification says.
    pub normalize_uri_like_servlet: bool,
    /// `%2F` does not end a segment.
    pub match_uri_encoded_slash: bool,
    /// Largest body read for `post_arg.*`, in bytes; none means any.
    pub max_post_args_size: Option<u64>,
}

/// `apisix.router.http`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpRouter {
    /// `radixtree_host_uri`.
    HostUri,
    /// `radixtree_uri`.
    Uri,
    /// `radixtree_uri_with_parameter`.
    UriWithParameter,
}

/// How upstream names are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Servers to ask; those of `/etc/resolv.conf` if there are none.
    pub servers: Vec<SocketAddr>,
    /// Time to live in place of what the records say.
    pub valid: Option<Duration>,
    pub timeout: Duration,
    /// Use the search domains of `/etc/resolv.conf`.
    pub search: bool,
    /// Ask for IPv6 addresses too.
    pub ipv6: bool,
}

/// `deployment.admin`.
#[derive(Clone, Debug)]
pub struct Admin {
    pub address: SocketAddr,
    /// Keys that are configured; if there is none and one is needed, it is generated at start.
    pub keys: Vec<AdminKey>,
    /// Whether a key must be shown.
    pub key_required: bool,
    /// Who may connect; empty means everybody.
    pub allow: Vec<IpNet>,
    pub cors: bool,
    /// Certificate for HTTPS; none means plain HTTP.
    pub tls: Option<AdminTls>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminKey {
    pub name: String,
    pub key: Hidden,
    pub role: AdminRole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminRole {
    /// Everything.
    Admin,
    /// GET only.
    Viewer,
}

/// `deployment.admin.admin_api_mtls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminTls {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Clients must show a certificate from here.
    pub client_ca: Option<PathBuf>,
}

/// `apisix.data_encryption`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataEncryption {
    /// Whether fields are written encrypted.
    pub enabled: bool,
    /// AES keys of 16 or 32 bytes. The first writes, all read.
    pub keyring: Vec<Hidden>,
}

/// `apisix.lru.secret`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretCache {
    pub ttl: Duration,
    pub count: u32,
    /// For secrets that could not be fetched.
    pub negative_ttl: Duration,
    pub negative_count: u32,
}

/// Limits against hostile and careless clients. Zero in the file means no limit where `Option` says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All header fields of a request together.
    pub header_bytes: u32,
    pub header_count: u32,
    /// Path and query.
    pub uri_length: u32,
    /// Largest request body, in bytes.
    pub body_bytes: Option<u64>,
    /// Open client connections of the process; none means [`Limits::connections_per_worker`] times workers.
    pub connections: Option<u32>,
    /// `nginx_config.event.worker_connections`.
    pub connections_per_worker: u32,
    /// Requests at once on one HTTP/2 connection.
    pub concurrent_streams: u32,
    /// TLS, and the PROXY protocol header.
    pub handshake_timeout: Duration,
    /// From the first byte of a request to the end of its headers.
    pub header_timeout: Duration,
    /// Between two reads of a request body.
    pub body_timeout: Duration,
    /// Between two writes of a response.
    pub send_timeout: Duration,
    /// Between two requests of a connection.
    pub idle_timeout: Duration,
    /// How long requests may go on after SIGTERM.
    pub drain_timeout: Duration,
}

/// `real_ip_*` of nginx.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RealIp {
    /// Lower case; `proxy_protocol` stands for the PROXY protocol header.
    pub header: String,
    /// Take the last address that is not trusted, and not just the last.
    pub recursive: bool,
    /// Peers that are believed.
    pub from: Vec<IpNet>,
}

/// `nginx_config.http.access_log*`.
#[derive(Clone, Debug)]
pub struct AccessLog {
    /// Standard output if no file is named.
    pub path: Option<PathBuf>,
    /// Bytes gathered before a write.
    pub buffer: u32,
    pub format: Template,
    pub escape: Escape,
}

/// What is done with the values of variables in a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// `"`, `\` and bytes below 32 or above 126 as `\xHH`; missing values are `-`.
    Default,
    /// As in a JSON string; missing values are empty.
    Json,
    /// As they are; missing values are empty.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// `nginx_config.http.upstream`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamKeepalive {
    /// Idle connections kept.
    pub size: u32,
    /// Requests over one connection.
    pub requests: u32,
    pub idle_timeout: Duration,
}

/// `apisix.proxy_cache`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// How long an answer is kept that does not say.
    pub ttl: Duration,
    pub zones: Vec<CacheZone>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheZone {
    pub name: String,
    /// Bytes.
    pub memory_size: u64,
    /// None for a zone in memory only.
    pub disk: Option<CacheDisk>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheDisk {
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
}

/// Where a process runs, as far as it is known. Upstreams that prefer near nodes compare theirs with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub region: Option<String>,
    pub zone: Option<String>,
    pub machine: Option<String>,
}

/// Data path threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// One for each core this process may use.
    Auto,
    /// At least one.
    Count(u32),
}

/// Text that is not for logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden(String);

impl Hidden {
    /// The text itself. Mind where it goes.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Hidden {
    fn from(text: String) -> Self {
        Hidden(text)
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("...")
    }
}

/// A setting that is known and changes nothing here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Pointer into `config.yaml`.
    pub pointer: String,
    /// Its line, from 1.
    pub line: u32,
    /// Why, in a few words.
    pub reason: &'static str,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}: {}", self.line, self.pointer, self.reason)
    }
}

/// Name of the settings file in a configuration directory.
pub const CONFIG_FILE: &str = "config.yaml";

impl Process {
    /// Read `config.yaml`, given itself or by its directory. A directory without one gives all defaults.
    ///
    /// # Errors
    /// If the file cannot be read, or all that is wrong in it.
    pub fn load(path: &Path, env: &dyn Env) -> Result<Process, Vec<LocatedError>> {
        let is_dir = path.is_dir();
        let file = if is_dir { path.join(CONFIG_FILE) } else { path.to_owned() };
        let name = file.display().to_string();
        let dir = if is_dir { path } else { path.parent().unwrap_or(Path::new("")) };
        let document = match std::fs::read(&file) {
            Ok(bytes) => Document::parse_bytes(&name, &bytes),
            Err(error) if is_dir && error.kind() == std::io::ErrorKind::NotFound => {
                Document::parse(&name, "")
            }
            Err(error) => {
                let error = ConfigError::invalid("", format!("cannot be read: {error}"));
                return Err(vec![LocatedError { file: name.into(), line: 0, column: 0, error }]);
            }
        };
        let mut document = document.map_err(|error| vec![error.into()])?;
        Process::read(&mut document, dir, env)
    }

    /// Read a document that is a `config.yaml`, standing in `dir`.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn read(document: &mut Document, dir: &Path, env: &dyn Env) -> Result<Process, Vec<LocatedError>> {
        env::substitute(document, env, Typing::Guess)?;
        let document = &*document;
        let reader = Reader::new(document);
        let process = Process::from_reader(&reader, dir, env);
        let (errors, mut notices) = reader.into_parts();
        notices.sort_by_key(|notice| notice.line);
        if errors.is_empty() {
            return Ok(Process { not_applicable: notices, ..process });
        }
        let mut errors: Vec<LocatedError> = errors.into_iter().map(|error| document.error(error)).collect();
        errors.sort_by_key(|error| (error.line, error.column));
        Err(errors)
    }

    /// The settings of an empty file in `dir`.
    pub fn defaults(dir: &Path) -> Process {
        let document = Document::empty(CONFIG_FILE);
        let reader = Reader::new(&document);
        Process::from_reader(&reader, dir, &NoEnv)
    }

    fn from_reader(reader: &Reader<'_>, dir: &Path, env: &dyn Env) -> Process {
        let root = reader.root();
        let apisix = apisix::read(&root.section("apisix"));
        let nginx = nginx::read(root.section("nginx_config"), apisix.dev_mode, env);
        let deployment = deployment::read(root.section("deployment"), dir, &apisix, env);
        let own = own::read(root.section("postern"), &nginx, dir, env);
        let object = |key| match root.section(key).members() {
            Some(members) => members.clone(),
            None => Map::new(),
        };
        let discovery_written = object("discovery");
        let (discovery, wrong) = Discovery::read(&discovery_written);
        wrong.into_iter().for_each(|error| reader.error(error));
        for (key, reason) in discovery.not_applicable() {
            root.notice_at(key, reason);
        }
        let graphql = root.section("graphql");
        let graphql_max_size = graphql.size("max_size").unwrap_or(1 << 20);
        graphql.finish();
        let process = Process {
            id: apisix.id,
            role: deployment.role,
            provider: deployment.provider,
            listeners: apisix.listeners,
            tls: apisix.tls,
            stream: apisix.stream,
            routing: apisix.routing,
            dns: apisix.dns,
            admin: deployment.admin,
            control: apisix.control,
            status: apisix.status,
            trusted_addresses: apisix.trusted_addresses,
            data_encryption: apisix.data_encryption,
            secret_cache: apisix.secret_cache,
            tracing: apisix.tracing,
            upstream_health_checks: apisix.upstream_health_checks,
            show_upstream_status: apisix.show_upstream_status,
            server_tokens: apisix.server_tokens,
            limits: own.limits,
            underscores_in_headers: nginx.underscores_in_headers,
            real_ip: nginx.real_ip,
            access_log: nginx.access_log,
            log_level: nginx.log_level,
            upstream_keepalive: nginx.upstream_keepalive,
            cache: apisix.cache,
            workers: own.workers,
            cpu_affinity: nginx.cpu_affinity,
            data_dir: own.data_dir,
            peers: own.peers,
            config_dir: dir.to_owned(),
            plugins: root.texts("plugins"),
            stream_plugins: root.texts("stream_plugins"),
            wasm: wasm::read(root.section("wasm"), dir),
            plugin_attr: object("plugin_attr"),
            discovery,
            discovery_written,
            place: own.place,
            discovery_server: own.discovery_server,
            mesh: own.mesh,
            signers: own.signers,
            acme: own.acme,
            graphql_max_size,
            not_applicable: Vec::new(),
        };
        root.not_applicable("graphql", "GraphQL bodies are not looked into");
        root.not_applicable("stream_plugins", "TCP and UDP are not proxied yet");
        root.not_applicable("ext-plugin", "plugin runners over a unix socket do not exist here");
        root.not_applicable("xrpc", "xRPC protocols do not exist here");
        root.moved("etcd", "deployment.etcd");
        root.moved("config_center", "deployment.role_data_plane.config_provider");
        root.finish();
        process
    }

    /// Where the embedded store's and the generated admin key's files are, and whatever else outlives the process.
    pub fn in_data_dir(&self, name: &str) -> PathBuf {
        self.data_dir.join(name)
    }

    /// Whether clients are served.
    pub fn serves_traffic(&self) -> bool {
        self.role != Role::ControlPlane
    }
}

/// An environment without variables.
struct NoEnv;

impl Env for NoEnv {
    fn var(&self, _: &str) -> Option<String> {
        None
    }
}

const ANY_IPV4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

    use std::collections::BTreeMap;

    use super::*;

    fn env(vars: &[(&str, &str)]) -> BTreeMap<String, String> {
        vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn try_read(text: &str) -> Result<Process, Vec<LocatedError>> {
        let mut document = Document::yaml("config.yaml", text).unwrap();
        Process::read(&mut document, Path::new("conf"), &env(&[]))
    }

    fn read(text: &str) -> Process {
        try_read(text).unwrap_or_else(|errors| {
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            panic!("{text}\n{}", errors.join("\n"))
        })
    }

    fn addresses(process: &Process) -> Vec<String> {
        process.listeners.iter().filter(|it| !it.optional).map(|it| it.address.to_string()).collect()
    }

    #[test]
    fn an_empty_file_gives_the_defaults_of_apisix() {
        let process = read("");
        assert_eq!(process.role, Role::Traditional);
        assert!(matches!(process.provider, Provider::Embedded));
        assert_eq!(addresses(&process), ["0.0.0.0:9080", "0.0.0.0:9443"]);
        assert_eq!(process.listeners.len(), 4);
        assert!(process.listeners.iter().all(|it| it.http2 && !it.proxy_protocol));
        assert_eq!(process.admin.as_ref().unwrap().address.to_string(), "127.0.0.1:9180");
        assert!(process.admin.as_ref().unwrap().keys.is_empty());
        assert!(process.admin.as_ref().unwrap().key_required);
        assert_eq!(process.control.unwrap().to_string(), "127.0.0.1:9090");
        assert_eq!(process.status.to_string(), "127.0.0.1:7085");
        assert_eq!(process.tls.protocols, [TlsVersion::Tls12, TlsVersion::Tls13]);
        assert!(!process.tls.session_tickets);
        assert_eq!(process.routing.router, HttpRouter::HostUri);
        assert_eq!(process.limits.header_bytes, 32 << 10);
        assert_eq!(process.limits.header_count, 100);
        assert_eq!(process.limits.uri_length, 16 << 10);
        assert_eq!(process.limits.body_bytes, None);
        assert_eq!(process.limits.concurrent_streams, 128);
        assert_eq!(process.limits.header_timeout, Duration::from_secs(20));
        assert_eq!(process.limits.drain_timeout, Duration::from_secs(30));
        assert_eq!(process.workers, Workers::Auto);
        assert_eq!(process.data_dir, Path::new("./postern-data"));
        assert_eq!(process.config_dir, Path::new("conf"));
        assert_eq!(process.plugins, None);
        assert!(process.access_log.unwrap().path.is_none());
        assert_eq!(process.not_applicable, []);
        assert_eq!(Process::defaults(Path::new("x")).limits, process.limits);
    }

    #[test]
    fn an_acme_authority_is_read_and_its_errors_are_told_in_place() {
        let acme = read(
            "postern:\n  acme:\n    directory: https://ca.test/dir\n    email: [a@b.test, c@d.test]\n    \
             accept_terms: true\n    challenge: tls-alpn-01\n    ca_file: roots.pem\n    retry: 5s\n    \
             external_account: {kid: 7, hmac_key: c2VjcmV0}\n    profile: shortlived\n    folder: /var/lib/certs\n",
        );
        let acme = acme.acme.unwrap();
        assert_eq!(acme.directory, "https://ca.test/dir");
        assert_eq!(acme.email, ["a@b.test", "c@d.test"]);
        assert_eq!(acme.challenge, crate::ssl::AcmeChallenge::TlsAlpn01);
        assert_eq!(acme.retry, Duration::from_secs(5));
        let external = acme.external_account.unwrap();
        assert_eq!((external.kid.as_str(), external.key().unwrap()), ("7", b"secret".to_vec()));
        assert!(!format!("{external:?}").contains("c2Vj"));
        let short = read("postern: {acme: {directory: letsencrypt, accept_terms: true}}").acme.unwrap();
        assert!(short.directory.starts_with("https://acme-v02."));
        assert_eq!(short.retry, Duration::from_secs(60));
        assert_eq!(read("").acme, None);
        for (text, at, what) in [
            ("accept_terms: true", "/postern/acme/directory", "missing"),
            ("directory: letsencrypt", "/postern/acme/accept_terms", "terms"),
            ("directory: letsencrypt, accept_terms: false", "/postern/acme/accept_terms", "terms"),
            ("directory: 'http://ca.test/', accept_terms: true", "/postern/acme/directory", "https://"),
            ("directory: letsencrypt, accept_terms: true, email: ops", "/postern/acme/email", "`ops`"),
            (
                "directory: letsencrypt, accept_terms: true, challenge: dns-01",
                "/postern/acme/challenge",
                "`http-01`",
            ),
            ("directory: letsencrypt, accept_terms: true, retry: 10ms", "/postern/acme/retry", "a second"),
            ("directory: letsencrypt, accept_terms: true, emial: a", "/postern/acme/emial", "`email`"),
            (
                "directory: letsencrypt, accept_terms: true, external_account: {kid: a}",
                "/postern/acme/external_account",
                "together",
            ),
            (
                "directory: letsencrypt, accept_terms: true, external_account: {kid: a, hmac_key: '?'}",
                "/postern/acme/external_account/hmac_key",
                "base64url",
            ),
        ] {
            let errors = try_read(&format!("postern: {{acme: {{{text}}}}}")).unwrap_err();
            let told = errors.iter().map(ToString::to_string).collect::<Vec<_>>();
            assert_eq!(told.len(), 1, "{text}: {told:?}");
            assert!(told[0].contains(at) && told[0].contains(what), "{text}: {told:?}");
        }
    }

    #[test]
    fn listeners_are_written_in_many_ways() {
        let cases: &[(&str, &[&str])] = &[
            ("node_listen: 8080", &["0.0.0.0:8080", "0.0.0.0:9443"]),
            ("node_listen: [8080, 8081]\n  ssl: {enable: false}", &["0.0.0.0:8080", "0.0.0.0:8081"]),
            (
                "node_listen: [{port: 8080}, {ip: 127.0.0.2, port: 8081}, {ip: '[::1]', port: 8082}]\n  ssl: {listen: [{ip: 127.0.0.3, port: 9445}]}",
                &["0.0.0.0:8080", "127.0.0.2:8081", "[::1]:8082", "127.0.0.3:9445"],
            ),
            ("node_listen: []\n  ssl: {enable: no}", &[]),
            (
                "proxy_protocol: {listen_http_port: 9181, listen_https_port: 9182}",
                &["0.0.0.0:9080", "0.0.0.0:9443", "0.0.0.0:9181", "0.0.0.0:9182"],
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(addresses(&read(&format!("apisix:\n  {text}\n"))), *expected, "{text}");
        }
        let process = read(
            "apisix:\n  enable_ipv6: false\n  enable_http2: false\n  node_listen: [{port: 1, enable_http2: true}]\n",
        );
        let http2: Vec<bool> = process.listeners.iter().map(|it| it.http2).collect();
        assert_eq!(http2, [true, false]);
        let process = read("apisix:\n  node_listen: [{ip: 127.0.0.1, port: 1, proxy_protocol: true}]\n");
        assert!(process.listeners[0].proxy_protocol);
    }

    #[test]
    fn the_provider_follows_role_and_etcd() {
        let cases = [
            ("role: traditional", "Embedded"),
            ("role: traditional\n  role_traditional: {config_provider: etcd}", "Etcd"),
            ("etcd: {host: ['http://etcd:2379']}", "Etcd"),
            ("role_traditional: {config_provider: yaml}", "Standalone"),
            ("role_traditional: {config_provider: yaml}\n  etcd: {host: ['http://etcd:2379']}", "Standalone"),
            (
                "role_traditional: {config_provider: embedded}\n  etcd: {host: ['http://etcd:2379']}",
                "Embedded",
            ),
            ("role: control_plane", "Embedded"),
            ("role: control_plane\n  role_control_plane: {config_provider: etcd}", "Etcd"),
            ("role: data_plane\n  role_data_plane: {config_provider: etcd}", "Etcd"),
            (
                "role: data_plane\n  role_data_plane: {config_provider: yaml}",
                "File { path: \"conf/apisix.yaml\" }",
            ),
            (
                "role: data_plane\n  role_data_plane: {config_provider: json}",
                "File { path: \"conf/apisix.json\" }",
            ),
        ];
        for (text, expected) in cases {
            let process = read(&format!("deployment:\n  {text}\n"));
            let provider = format!("{:?}", process.provider);
            assert!(provider.starts_with(expected), "{text}: {provider}");
            assert_eq!(process.admin.is_some(), process.role != Role::DataPlane, "{text}");
        }
    }

    #[test]
    fn etcd_settings_are_read() {
        let process = read(
            "deployment:\n  etcd:\n    host: ['https://a:2379/', 'https://b:2379']\n    prefix: /gw/\n    user: root\n    \
             password: 123\n    timeout: 5\n    startup_retry: 0\n    tls: {cert: c.pem, key: k.pem, verify: off, sni: etcd}\n",
        );
        let Provider::Etcd(etcd) = process.provider else { panic!("{:?}", process.provider) };
        assert_eq!(etcd.hosts, ["https://a:2379", "https://b:2379"]);
        assert_eq!(etcd.prefix, "/gw");
        let (user, password) = etcd.user.as_ref().unwrap();
        assert_eq!((user.as_str(), password.reveal()), ("root", "123"));
        assert!(!format!("{etcd:?}").contains("123"));
        assert_eq!(etcd.timeout, Duration::from_secs(5));
        assert_eq!(etcd.startup_retry, 0);
        assert!(!etcd.tls.verify);
        assert_eq!(etcd.tls.identity, Some(("c.pem".into(), "k.pem".into())));

        let mut document = Document::yaml("config.yaml", "").unwrap();
        let vars = env(&[("APISIX_DEPLOYMENT_ETCD_HOST", r#"["http://etcd:2379"]"#)]);
        let process = Process::read(&mut document, Path::new(""), &vars).unwrap();
        let Provider::Etcd(etcd) = process.provider else { panic!("{:?}", process.provider) };
        assert_eq!(etcd.hosts, ["http://etcd:2379"]);
        assert_eq!(etcd.prefix, "/apisix");
    }

    #[test]
    fn the_admin_api_stays_on_loopback_until_others_are_let_in() {
        let cases = [
            ("{}", "127.0.0.1:9180"),
            ("{allow_admin: [127.0.0.0/24]}", "127.0.0.1:9180"),
            ("{allow_admin: [127.0.0.0/24, 10.0.0.0/8]}", "0.0.0.0:9180"),
            ("{allow_admin: [0.0.0.0/0]}", "0.0.0.0:9180"),
            ("{allow_admin: []}", "0.0.0.0:9180"),
            ("{allow_admin: }", "0.0.0.0:9180"),
            ("{allow_admin: [0.0.0.0/0], admin_listen: {ip: 127.0.0.1, port: 9181}}", "127.0.0.1:9181"),
            ("{admin_listen: {ip: 0.0.0.0}}", "0.0.0.0:9180"),
        ];
        for (text, expected) in cases {
            let admin = read(&format!("deployment:\n  admin: {text}\n")).admin.unwrap();
            assert_eq!(admin.address.to_string(), expected, "{text}");
        }
        let admin = read(
            "deployment:\n  admin:\n    admin_key:\n      - {name: admin, key: '', role: admin}\n      \
             - {name: a, key: 0815, role: admin}\n      - {name: v, key: vvv, role: viewer}\n    \
             https_admin: true\n    admin_api_mtls: {admin_ssl_cert: c, admin_ssl_cert_key: k}\n    admin_api_version: v3\n",
        );
        let admin = admin.admin.unwrap();
        let roles: Vec<AdminRole> = admin.keys.iter().map(|key| key.role).collect();
        assert_eq!(roles, [AdminRole::Admin, AdminRole::Viewer]);
        assert_eq!(admin.tls.unwrap().cert, Path::new("c"));
        assert!(read("apisix: {enable_admin: false}").admin.is_none());
    }

    #[test]
    fn what_nginx_limits_is_limited_here() {
        let process = read(
            "nginx_config:
  worker_processes: 3
  worker_shutdown_timeout: 240s
  error_log_level: notice
  event: {worker_connections: 100}
  http:
    client_max_body_size: 10m
    client_header_timeout: 5s
    client_body_timeout: 6
    send_timeout: 1m
    keepalive_timeout: 1h30m
    large_client_header_buffers: 4 8k
    underscores_in_headers: 'off'
    real_ip_header: X-Forwarded-For
    real_ip_recursive: on
    real_ip_from: [10.0.0.0/8, 'unix:', '::1']
    access_log: /dev/stdout
    access_log_format: \"{\\\"host\\\":\\\"$host\\\"}\\n\"
    access_log_format_escape: json
    upstream: {keepalive: 10, keepalive_requests: 20, keepalive_timeout: 30s}
",
        );
        assert_eq!(process.workers, Workers::Count(3));
        assert_eq!(process.log_level, LogLevel::Info);
        assert_eq!(
            process.limits,
            Limits {
                header_bytes: 32 << 10,
                header_count: 100,
                uri_length: 8 << 10,
                body_bytes: Some(10 << 20),
                connections: None,
                connections_per_worker: 100,
                concurrent_streams: 128,
                handshake_timeout: Duration::from_secs(10),
                header_timeout: Duration::from_secs(5),
                body_timeout: Duration::from_secs(6),
                send_timeout: Duration::from_secs(60),
                idle_timeout: Duration::from_secs(5400),
                drain_timeout: Duration::from_secs(240),
            }
        );
        assert!(!process.underscores_in_headers);
        assert_eq!(process.real_ip.header, "x-forwarded-for");
        assert!(process.real_ip.recursive);
        assert_eq!(process.real_ip.from.len(), 2);
        let log = process.access_log.unwrap();
        assert_eq!(log.path.as_deref(), Some(Path::new("/dev/stdout")));
        assert_eq!(log.escape, Escape::Json);
        assert_eq!(log.format.vars().count(), 1);
        assert_eq!(process.upstream_keepalive.requests, 20);
        assert_eq!(process.not_applicable, []);
        assert!(read("nginx_config: {http: {enable_access_log: false}}").access_log.is_none());
    }

    #[test]
    fn own_keys_win() {
        let text = "nginx_config: {worker_processes: 3, http: {client_header_timeout: 5}}
postern:
  data_dir: /var/lib/postern
  workers: 2
  peers: ['gw-2.example.com:9090', '[fd00::1]:9091']
  limits: {header_bytes: 64k, header_count: 50, uri_length: 4096, connections: 1000, header_timeout: 7s, drain_timeout: 1m}
";
        let process = read(text);
        assert_eq!(process.workers, Workers::Count(2));
        assert_eq!(process.data_dir, Path::new("/var/lib/postern"));
        let peers: Vec<_> = process.peers.iter().map(|peer| (peer.host.as_str(), peer.port)).collect();
        assert_eq!(peers, [("gw-2.example.com", 9090), ("fd00::1", 9091)]);
        assert_eq!(process.limits.header_bytes, 64 << 10);
        assert_eq!(process.limits.header_timeout, Duration::from_secs(7));
        assert_eq!(process.limits.connections, Some(1000));

        let mut document = Document::yaml("config.yaml", text).unwrap();
        let vars = env(&[("POSTERN_DATA_DIR", "/data"), ("APISIX_WORKER_PROCESSES", "8")]);
        let process = Process::read(&mut document, Path::new(""), &vars).unwrap();
        assert_eq!(process.in_data_dir("x"), Path::new("/data/x"));
        assert_eq!(process.workers, Workers::Count(2));
    }

    #[test]
    fn pools_of_signers_are_read() {
        let process = read(
            "postern:
  signers:
    - {name: main, nodes: ['s-1:7443', '10.0.0.2:7443'], server_name: signer.internal, cert_file: gw.pem, key_file: /etc/gw.key, ca_file: ca.pem}
    - {name: slow, nodes: ['s-3:7443'], cert_file: c, key_file: k, ca_file: r, timeout: 2s, deadline: 3s, in_flight: 8}
",
        );
        let [main, slow] = process.signers.as_slice() else { panic!("{:?}", process.signers) };
        assert_eq!((main.name.as_str(), main.nodes.len()), ("main", 2));
        assert_eq!(
            (main.certificate.as_path(), main.key.as_path()),
            (Path::new("conf/gw.pem"), Path::new("/etc/gw.key"))
        );
        assert_eq!((main.timeout, main.deadline), (Duration::from_millis(500), Duration::from_millis(1500)));
        assert_eq!((slow.deadline, slow.in_flight), (Duration::from_secs(3), 8));
        let files = "cert_file: c, key_file: k, ca_file: r";
        for (text, told) in [
            ("{nodes: ['a:1'], cert_file: c, key_file: k, ca_file: r}".to_owned(), "`name` is missing"),
            ("{name: m, nodes: ['a:1'], cert_file: c, key_file: k}".to_owned(), "`ca_file` is missing"),
            (format!("{{name: 'a b', nodes: ['a:1'], {files}}}"), "no name of a pool"),
            (format!("{{name: m, nodes: [], {files}}}"), "one node at least"),
            (format!("{{name: m, nodes: [a], {files}}}"), "no HOST:PORT"),
            (format!("{{name: m, nodes: ['a:1', 'a:1'], {files}}}"), "named twice"),
            (format!("{{name: m, nodes: ['a:1'], {files}, timeout: 1m}}"), "from 10ms to 10s"),
            (format!("{{name: m, nodes: ['a:1'], {files}, in_flight: 0}}"), "from 1 to 4096"),
            (format!("{{name: m, nodes: ['a:1'], {files}, timeuot: 1s}}"), "`timeout`"),
            (
                format!("{{name: m, nodes: ['a:1'], {files}}}, {{name: m, nodes: ['b:1'], {files}}}"),
                "another pool",
            ),
        ] {
            let errors = try_read(&format!("postern: {{signers: [{text}]}}\n")).unwrap_err();
            let told_all = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            assert!(told_all.contains(told), "{text}: {told_all}");
        }
    }

    #[test]
    fn stream_listeners_are_read() {
        let process = read(
            "apisix:
  proxy_mode: http&stream
  proxy_protocol: {enable_tcp_pp: true}
  stream_proxy:
    tcp: [9100, '127.0.0.1:9101', {addr: 9102-9110, tls: true, proxy_protocol: false}]
    udp: ['[::1]:9200']
",
        );
        let tcp: Vec<String> = process
            .stream
            .tcp
            .iter()
            .map(|it| format!("{} {:?} {} {}", it.ip, it.ports, it.tls, it.proxy_protocol))
            .collect();
        assert_eq!(
            tcp,
            [
                "0.0.0.0 9100..=9100 false true",
                "127.0.0.1 9101..=9101 false true",
                "0.0.0.0 9102..=9110 true false"
            ]
        );
        assert_eq!(process.stream.udp[0].ip.to_string(), "::1");
        assert!(!process.stream.udp[0].proxy_protocol);
        assert!(!process.stream.only);
    }

    #[test]
    fn what_means_nothing_here_is_listed_with_its_line() {
        let process = read(
            "apisix:
  enable_reuseport: true
  extra_lua_path: ''
  ssl:
    ssl_protocols: TLSv1.1 TLSv1.2
    listen: [{port: 9443, enable_http3: true}]
nginx_config:
  user: root
  max_pending_timers: 16384
  main_configuration_snippet: |
    # only a comment
  http:
    lua_shared_dict: {jwks: 1m}
    proxy_buffer_size: 16k
wasm: {plugins: []}
",
        );
        let notices: Vec<(u32, &str)> =
            process.not_applicable.iter().map(|it| (it.line, it.pointer.as_str())).collect();
        assert_eq!(
            notices,
            [
                (2, "/apisix/enable_reuseport"),
                (5, "/apisix/ssl/ssl_protocols"),
                (6, "/apisix/ssl/listen/0/enable_http3"),
                (8, "/nginx_config/user"),
                (9, "/nginx_config/max_pending_timers"),
                (13, "/nginx_config/http/lua_shared_dict"),
                (14, "/nginx_config/http/proxy_buffer_size"),
            ]
        );
    }

    #[test]
    fn a_registry_that_does_not_exist_and_a_place() {
        let errors =
            try_read("discovery:\n  zookeeper: {}\n  consul:\npostern: {locality: {zon: a}}\n").unwrap_err();
        let told: Vec<_> = errors.iter().map(|error| (error.line, error.error.pointer.as_str())).collect();
        assert_eq!(told, [(2, "/discovery/zookeeper"), (4, "/postern/locality/zon")]);
        let process = read("postern: {locality: {region: east, zone: 7}}\n");
        let place = Place { region: Some("east".to_owned()), zone: Some("7".to_owned()), machine: None };
        assert_eq!(process.place, place);
    }

    #[test]
    fn what_is_asked_for_and_not_done_is_listed() {
        let process = read(
            "apisix:
  tracing: true
  lru: {secret: {ttl: 1}}
  proxy_cache: {zones: []}
  proxy_mode: http&stream
  stream_proxy: {tcp: [9100]}
nginx_config:
  enable_cpu_affinity: true
  http: {access_log_buffer: 1}
graphql: {max_size: 1}
stream_plugins: [mqtt-proxy]
deployment:
  etcd: {host: ['http://etcd:2379'], watch_timeout: 1, startup_retry: 1}
",
        );
        let pointers: Vec<&str> = process.not_applicable.iter().map(|it| it.pointer.as_str()).collect();
        assert_eq!(
            pointers,
            [
                "/apisix/tracing",
                "/apisix/lru",
                "/apisix/proxy_mode",
                "/nginx_config/enable_cpu_affinity",
                "/nginx_config/http/access_log_buffer",
                "/graphql",
                "/stream_plugins",
                "/deployment/etcd/watch_timeout",
                "/deployment/etcd/startup_retry",
            ]
        );
        assert_eq!(
            read("apisix: {tracing: false}\nnginx_config: {enable_cpu_affinity: off}").not_applicable,
            []
        );
    }

    #[test]
    fn all_errors_are_told_at_once_with_their_places() {
        let errors = try_read(
            "apisix:
  node_listn: 9080
  node_listen: [0, {ip: nowhere, port: 1}, {ip: 127.0.0.1}]
  enable_ipv6: maybe
  router: {http: radixtree_ur}
  dns_resolver: [localhost]
  trusted_addresses: [10.0.0.0/33]
  data_encryption: {keyring: [short]}
  admin_key: []
  ssl: {ssl_protocols: TLSv1, ssl_protocol: x}
nginx_config:
  worker_process: 2
  http:
    client_max_body_sise: 1
    client_max_body_size: 10mb
    send_timeout: soon
    large_client_header_buffers: 4
  http_server_configuration_snippet: |
    # comment
    location /x { return 200; }
deployment:
  role: data_plane
  role_data_plane: {config_provider: xds}
  admin: {admin_key: [{name: a, key: k, role: root}], https_admin: true}
  etcd: {host: ['etcd:2379'], user: root}
postern:
  limits: {header_bytes: 10, drain: 5}
plugins: {}
plugin: []
",
        )
        .unwrap_err();
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let expected = [
            "config.yaml:2:3: /apisix/node_listn: unknown field `node_listn` (did you mean `node_listen`?)",
            "config.yaml:3:17: /apisix/node_listen/0: `0` is not a port",
            "config.yaml:3:21: /apisix/node_listen/1/ip: `nowhere` is not an IP address",
            "config.yaml:3:44: /apisix/node_listen/2: `port` is missing",
            "config.yaml:4:3: /apisix/enable_ipv6: found text, write true or false",
            "config.yaml:5:12: /apisix/router/http: `radixtree_ur` is not known here",
            "config.yaml:6:18: /apisix/dns_resolver/0: `localhost` is not an address",
            "config.yaml:7:23: /apisix/trusted_addresses/0: `10.0.0.0/33` is not an IP address or CIDR",
            "config.yaml:8:31: /apisix/data_encryption/keyring/0: a key has 16 or 32 bytes, this one 5",
            "config.yaml:9:3: /apisix/admin_key: `admin_key` in this place is not supported: it belongs to APISIX 2; \
             write `deployment.admin.admin_key`",
            "config.yaml:10:9: /apisix/ssl/ssl_protocols: no version is left",
            "config.yaml:10:31: /apisix/ssl/ssl_protocol: unknown field `ssl_protocol` (did you mean `ssl_protocols`?)",
            "config.yaml:12:3: /nginx_config/worker_process: unknown field `worker_process` (did you mean \
             `worker_processes`?)",
            "config.yaml:14:5: /nginx_config/http/client_max_body_sise: unknown field",
            "config.yaml:15:5: /nginx_config/http/client_max_body_size: `10mb` is not a size",
            "config.yaml:16:5: /nginx_config/http/send_timeout: `soon` is not a time",
            "config.yaml:17:5: /nginx_config/http/large_client_header_buffers: found a number, write text",
            "config.yaml:18:3: /nginx_config/http_server_configuration_snippet: raw nginx configuration is not \
             supported: use global rules",
            "config.yaml:23:21: /deployment/role_data_plane/config_provider: this provider with `role: data_plane` is \
             not supported: there is no xDS client",
            "config.yaml:24:41: /deployment/admin/admin_key/0/role: `root` is not known here",
            "config.yaml:24:55: /deployment/admin/https_admin: it needs `admin_api_mtls.admin_ssl_cert`",
            "config.yaml:25:17: /deployment/etcd/host/0: `etcd:2379` is no URL",
            "config.yaml:25:31: /deployment/etcd/user: `user` needs `password`",
            "config.yaml:27:12: /postern/limits/header_bytes: 10 bytes are too few",
            "config.yaml:27:30: /postern/limits/drain: unknown field `drain`",
            "config.yaml:29:1: /plugin: unknown field `plugin` (did you mean `plugins`?)",
        ];
        for (error, expected) in errors.iter().zip(expected) {
            assert!(error.starts_with(expected), "{error}\n{expected}");
        }
        assert_eq!(errors.len(), expected.len(), "{}", errors.join("\n"));
    }

    #[test]
    fn every_key_apisix_ships_is_known() {
        let process = read(
            "apisix:
  node_listen: [9080]
  enable_admin: true
  enable_dev_mode: false
  enable_reuseport: true
  show_upstream_status_in_response_header: false
  enable_ipv6: true
  enable_http2: true
  proxy_protocol: {listen_http_port: 9181, listen_https_port: 9182, enable_tcp_pp: true, enable_tcp_pp_to_upstream: true}
  enable_server_tokens: true
  extra_lua_path: ''
  extra_lua_cpath: ''
  lua_module_hook: my_project.my_hook
  proxy_cache:
    cache_ttl: 10s
    zones:
      - {name: disk, memory_size: 50m, disk_size: 1G, disk_path: /tmp/disk_cache_one, cache_levels: '1:2'}
      - {name: memory_cache, memory_size: 50m}
  delete_uri_tail_slash: false
  normalize_uri_like_servlet: false
  match_uri_encoded_slash: false
  max_post_args_readable_size: 64m
  router: {http: radixtree_host_uri, ssl: radixtree_sni}
  proxy_mode: http
  dns_resolver: [1.1.1.1, '[2001:db8::1]:53']
  dns_resolver_valid: 30
  resolver_timeout: 5
  enable_resolv_search_opt: true
  ssl:
    enable: true
    listen: [{port: 9443, enable_http3: false}]
    ssl_trusted_certificate: system
    ssl_protocols: TLSv1.2 TLSv1.3
    ssl_ciphers: ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256
    ssl_session_tickets: false
    fallback_sni: my.default.domain
  enable_control: true
  control: {ip: 127.0.0.1, port: 9090}
  disable_sync_configuration_during_start: false
  worker_startup_time_threshold: 60
  data_encryption: {enable_encrypt_fields: true, keyring: [qeddd145sfvddff3, edd1c9f0985e76a2]}
  events: {module: lua-resty-events}
  status: {ip: 127.0.0.1, port: 7085}
  disable_upstream_healthcheck: false
  trusted_addresses: [127.0.0.1, 172.18.0.0/16]
  lru: {secret: {ttl: 300, count: 512, neg_ttl: 60, neg_count: 512}}
  tracing: false
nginx_config:
  user: root
  error_log: logs/error.log
  error_log_level: warn
  worker_processes: auto
  enable_cpu_affinity: false
  worker_rlimit_nofile: 20480
  worker_shutdown_timeout: 240s
  max_pending_timers: 16384
  max_running_timers: 4096
  event: {worker_connections: 10620}
  envs: [TEST_ENV]
  meta: {lua_shared_dict: {prometheus-metrics: 15m}}
  stream: {enable_access_log: false, access_log: logs/access_stream.log}
  main_configuration_snippet: ''
  http_configuration_snippet: ''
  http_server_configuration_snippet: ''
  http_server_location_configuration_snippet: ''
  http_admin_configuration_snippet: ''
  http_end_configuration_snippet: ''
  stream_configuration_snippet: ''
  http:
    enable_access_log: true
    access_log: logs/access.log
    access_log_buffer: 16384
    access_log_format: $remote_addr
    access_log_format_escape: default
    keepalive_timeout: 60s
    client_header_timeout: 60s
    client_body_timeout: 60s
    client_max_body_size: 0
    send_timeout: 10s
    underscores_in_headers: 'on'
    real_ip_header: X-Real-IP
    real_ip_recursive: 'off'
    real_ip_from: [127.0.0.1, 'unix:']
    custom_lua_shared_dict: {ipc_shared_dict: 100m}
    proxy_ssl_server_name: true
    upstream: {keepalive: 320, keepalive_requests: 1000, keepalive_timeout: 60s}
    charset: utf-8
    variables_hash_max_size: 2048
    lua_shared_dict: {internal-status: 10m}
graphql: {max_size: 1048576}
ext-plugin: {cmd: [ls, -l]}
plugins: [real-ip, key-auth]
stream_plugins: [ip-restriction]
wasm: {plugins: [{name: wasm_log, priority: 7999, file: main.go.wasm}]}
xrpc: {protocols: [{name: pingpong}]}
plugin_attr: {prometheus: {export_addr: {ip: 127.0.0.1, port: 9091}}}
deployment:
  role: traditional
  role_traditional: {config_provider: etcd}
  role_data_plane: {config_provider: etcd}
  role_control_plane: {config_provider: etcd}
  admin:
    admin_key_required: true
    admin_key: [{name: admin, key: '', role: admin}]
    enable_admin_cors: true
    enable_admin_ui: true
    allow_admin: [127.0.0.0/24]
    admin_listen: {ip: 0.0.0.0, port: 9180}
    admin_api_version: v3
  etcd:
    host: ['http://127.0.0.1:2379']
    prefix: /apisix
    timeout: 30
    watch_timeout: 50
    resync_delay: 5
    health_check_timeout: 10
    startup_retry: 2
    user: root
    password: 5tHkHhYkjr6cQ
    tls: {cert: /path/to/cert, key: /path/to/key, verify: true, sni: etcd}
",
        );
        assert_eq!(process.plugins.as_deref(), Some(&["real-ip".to_owned(), "key-auth".to_owned()][..]));
        assert_eq!(process.dns.servers[0].to_string(), "1.1.1.1:53");
        assert_eq!(process.plugin_attr["prometheus"]["export_addr"]["port"], 9091);
        assert_eq!(process.cache.zones.len(), 2);
        assert_eq!(process.tls.ciphers.len(), 2);
        assert_eq!(process.tls.trusted_certificate, None);
        assert_eq!(process.limits.header_timeout, Duration::from_secs(60));
    }

    #[test]
    fn a_port_is_listened_on_once() {
        let errors =
            try_read("apisix:\n  node_listen: [9080, 9080]\n  ssl: {listen: [{port: 9080}]}\n").unwrap_err();
        assert_eq!(errors.len(), 2);
        assert!(errors[0].to_string().contains("0.0.0.0:9080 is listened on twice"));
    }

    #[test]
    fn files_are_found_by_directory_or_name() {
        let dir = tempfile::tempdir().unwrap();
        let none = env(&[("PORT", "8080")]);
        let process = Process::load(dir.path(), &none).unwrap();
        assert_eq!(process.config_dir, dir.path());
        let file = dir.path().join(CONFIG_FILE);
        let missing = Process::load(&file, &none).unwrap_err();
        assert!(missing[0].to_string().contains("config.yaml: cannot be read"), "{}", missing[0]);
        std::fs::write(&file, "apisix:\n  node_listen: ${{PORT}}\n").unwrap();
        for path in [dir.path(), &file] {
            let process = Process::load(path, &none).unwrap();
            assert_eq!(process.listeners[0].address.port(), 8080);
            assert_eq!(process.config_dir, dir.path());
        }
        std::fs::write(&file, "apisix:\n  node_listen: ${{NONE}}\n").unwrap();
        let error = Process::load(dir.path(), &none).unwrap_err().remove(0).to_string();
        assert!(error.contains("config.yaml:2:3: /apisix/node_listen: environment variable NONE"), "{error}");
    }
}
