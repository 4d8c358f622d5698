//! Questions to name servers: which of them is asked, over what, for how long, and what an answer says.
//!
//! Every server has a pool of its own, so that it is decided here and not in the library what a server that is silent or
//! out of order may cost: the next one is asked soon and beside it, the first that knows settles the question, and a
//! server that was slow comes last for a while. What failed over UDP is asked again over TCP. "There is no such record"
//! is only believed with the SOA of a zone that the name is in; whatever else is no answer.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::stream::{FuturesUnordered, StreamExt};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::{DnsHandle, FirstAnswer};
use hickory_resolver::net::{DnsError, NetError, NoRecords};
use hickory_resolver::proto::op::{DnsRequestOptions, DnsResponse, Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use hickory_resolver::system_conf::parse_resolv_conf;
use hickory_resolver::{Hosts, NameServerPool, PoolContext, TlsConfig};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};

use super::{Settings, lock};

/// Names whose records are being asked for at the same time, so that ten thousand names do not become one burst.
const MAX_CONCURRENT: usize = 64;
/// A server that says nothing for this long gets company.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long a server that said nothing is asked last.
const DEMOTED: Duration = Duration::from_secs(30);
/// Questions that a chain of aliases may take, and aliases in one answer.
const MAX_CHAIN: usize = 8;
/// What fits into a datagram on every path, by the DNS flag day of 2020.
const DATAGRAM: u16 = 1232;
/// Where addresses stand beside DNS.
const HOSTS: &str = "/etc/hosts";

/// Why there are no records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// The zone says so itself. How long that holds.
    Absent { ttl: Duration, reason: Arc<str> },
    /// Somebody says so who does not show the SOA of the zone, and may not know.
    Denied { reason: Arc<str> },
    /// There was no answer to this question.
    Failed { reason: Arc<str> },
}

impl Miss {
    pub fn failed(reason: impl Into<Arc<str>>) -> Self {
        Self::Failed { reason: reason.into() }
    }

    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent { .. })
    }

    pub fn is_failed(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// What two names, types or servers say together: absent is what is absent everywhere.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Absent { ttl, reason }, Self::Absent { ttl: second, .. }) => {
                Self::Absent { ttl: ttl.min(second), reason }
            }
            (Self::Absent { .. }, other) | (Self::Denied { .. }, other @ Self::Failed { .. }) => other,
            (first, _) => first,
        }
    }
}

/// The same with what was missed before.
pub(crate) fn also(former: Option<Miss>, miss: Miss) -> Miss {
    match former {
        Some(former) => former.and(miss),
        None => miss,
    }
}

/// Records of one type that a name or the end of its aliases has.
#[derive(Debug)]
pub(crate) struct Records {
    pub list: Vec<RData>,
    /// What else the server sent along, unasked.
    pub additionals: Vec<Record>,
    /// The shortest time to live on the way.
    pub ttl: Duration,
}

/// The name servers of one configuration.
#[derive(Debug)]
pub(crate) struct Resolver {
    settings: Settings,
    current: Mutex<Option<Arc<Current>>>,
    gate: Semaphore,
}

impl Resolver {
    pub fn new(settings: Settings) -> Self {
        Self { settings, current: Mutex::new(None), gate: Semaphore::new(MAX_CONCURRENT) }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Waits for its turn among the names that are asked for.
    pub async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.gate.acquire().await.ok()
    }

    /// The servers and files as they are now; read again when a file has changed. One that cannot be used while it is
    /// being written leaves things as they were.
    pub fn current(&self) -> Result<Arc<Current>, Miss> {
        let mut current = lock(&self.current);
        let files = Files::now(&self.settings);
        match current.as_ref() {
            Some(former) if former.files == files => Ok(Arc::clone(former)),
            former => match (Current::build(&self.settings, files), former) {
                (Ok(built), _) => {
                    let built = Arc::new(built);
                    *current = Some(Arc::clone(&built));
                    Ok(built)
                }
                (Err(reason), Some(former)) => {
                    tracing::debug!(reason, "the former name servers stay");
                    Ok(Arc::clone(former))
                }
                (Err(reason), None) => Err(Miss::failed(reason)),
            },
        }
    }
}

/// Name servers and what the files beside them say, as they were read at one moment.
#[derive(Debug)]
pub(crate) struct Current {
    files: Files,
    servers: Vec<Server>,
    hosts: Hosts,
    search: Vec<Name>,
    ndots: usize,
    timeout: Duration,
    attempts: usize,
}

impl Current {
    fn build(settings: &Settings, files: Files) -> Result<Self, String> {
        let (config, system) = if settings.servers.is_empty() {
            let path = settings.resolv_conf();
            let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            let text = std::fs::read(path).map_err(|error| told(&error))?;
            parse_resolv_conf(text).map_err(|error| told(&error))?
        } else {
            (ResolverConfig::default(), ResolverOpts::default())
        };
        let mut options = ResolverOpts::default();
        options.timeout = settings.timeout;
        options.edns0 = true;
        options.edns_payload_len = DATAGRAM;
        options.num_concurrent_reqs = 1;
        let context =
            Arc::new(PoolContext::new(options, TlsConfig::new().map_err(|error| error.to_string())?));
        let addresses: Vec<SocketAddr> = match settings.servers.as_slice() {
            [] => config.name_servers().iter().map(|server| SocketAddr::new(server.ip, 53)).collect(),
            servers => servers.to_vec(),
        };
        let mut search: Vec<Name> = Vec::new();
        if settings.search && settings.servers.is_empty() {
            for domain in config.domain().into_iter().chain(config.search()) {
                if !search.contains(domain) {
                    search.push(domain.clone());
                }
            }
        }
        Ok(Self {
            files,
            servers: addresses.into_iter().map(|address| Server::new(address, &context)).collect(),
            hosts: if settings.hosts { Hosts::from_system().unwrap_or_default() } else { Hosts::default() },
            search,
            ndots: system.ndots,
            timeout: settings.timeout,
            attempts: settings.attempts.max(1),
        })
    }

    /// The full names that `name` may stand for, in the order in which they are tried.
    pub fn candidates(&self, name: &str) -> Result<Vec<Name>, Miss> {
        let mut name = Name::from_str_relaxed(name)
            .map_err(|error| Miss::failed(format!("`{name}` is not a name: {error}")))?;
        if name.is_fqdn() || self.search.is_empty() {
            name.set_fqdn(true);
            return Ok(vec![name]);
        }
        let mut full = name.clone();
        full.set_fqdn(true);
        let listed = |kind| self.hosts.lookup_static_host(&Query::query(full.clone(), kind)).is_some();
        if listed(RecordType::A) || listed(RecordType::AAAA) {
            return Ok(vec![full]);
        }
        let searched = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let mut candidates: Vec<Name> = searched.filter(|candidate| *candidate != full).collect();
        let first = usize::from(name.num_labels()) > self.ndots || name.is_localhost();
        candidates.insert(if first { 0 } else { candidates.len() }, full);
        Ok(candidates)
    }

    /// The records of a full name. Aliases are followed.
    pub async fn ask(&self, name: &Name, kind: RecordType) -> Result<Records, Miss> {
        if let Some(known) = self.known(name, kind) {
            return known;
        }
        let mut name = name.clone();
        let mut ttl = Duration::MAX;
        for _ in 0..MAX_CHAIN {
            let response = self.exchange(&name, kind).await?;
            let (end, through) = alias_end(&response, &name)?;
            ttl = ttl.min(through);
            let records =
                response.answers.iter().filter(|record| record.name == end && record.record_type() == kind);
            let mut list = Vec::new();
            for record in records {
                ttl = ttl.min(seconds(record.ttl));
                list.push(record.data.clone());
            }
            if !list.is_empty() {
                return Ok(Records { list, additionals: response.additionals.clone(), ttl });
            }
            if end == name || response.response_code == ResponseCode::NXDomain || response.soa().is_some() {
                let soa = response.soa().map(|soa| soa.name().clone());
                let negative = response.negative_ttl();
                return Err(denial(&end, kind, response.response_code, soa.as_ref(), negative));
            }
            name = end;
        }
        Err(Miss::failed(format!("{name}: a chain of more than {MAX_CHAIN} aliases")))
    }

    /// What is known without a server: the hosts file, and the name that every machine has.
    fn known(&self, name: &Name, kind: RecordType) -> Option<Result<Records, Miss>> {
        let found = |list: Vec<RData>| Records { list, additionals: Vec::new(), ttl: Duration::MAX };
        if let Some(lookup) = self.hosts.lookup_static_host(&Query::query(name.clone(), kind)) {
            return Some(Ok(found(lookup.answers().iter().map(|record| record.data.clone()).collect())));
        }
        let address: IpAddr = match kind {
            _ if !name.is_localhost() => return None,
            RecordType::A => [127, 0, 0, 1].into(),
            RecordType::AAAA => [0, 0, 0, 0, 0, 0, 0, 1].into(),
            _ => {
                let reason = format!("{name} has no {kind} record");
                return Some(Err(Miss::Absent { ttl: Duration::MAX, reason: reason.into() }));
            }
        };
        Some(Ok(found(vec![address.into()])))
    }

    /// One question, put to as many servers as it takes, first over UDP and then over TCP.
    async fn exchange(&self, name: &Name, kind: RecordType) -> Result<DnsResponse, Miss> {
        let mut missed = None;
        for attempt in 0..self.attempts {
            match self.round(name, kind, attempt > 0).await {
                Err(miss) if miss.is_failed() => missed = Some(miss),
                settled => return settled,
            }
        }
        Err(missed.unwrap_or_else(no_server))
    }

    /// Asks the servers one after the other, each a little after the one before or as soon as that has failed.
    async fn round(&self, name: &Name, kind: RecordType, tcp: bool) -> Result<DnsResponse, Miss> {
        let mut servers: Vec<&Server> = self.servers.iter().collect();
        let now = Instant::now();
        servers.sort_by_key(|server| server.demoted(now));
        let mut waiting = servers.into_iter();
        let mut asked = FuturesUnordered::new();
        let mut slow: Vec<&Server> = Vec::new();
        let mut missed = None;
        loop {
            let next = waiting.next();
            match next {
                Some(server) => {
                    slow.push(server);
                    asked.push(async move { (server, server.ask(name, kind, tcp, self.timeout).await) });
                }
                None if asked.is_empty() => break,
                None => {}
            }
            tokio::select! {
                Some((server, outcome)) = asked.next() => match outcome {
                    Ok(response) => return Ok(response),
                    Err(miss) if !miss.is_failed() => return Err(miss),
                    Err(miss) => {
                        slow.retain(|other| !std::ptr::eq(*other, server));
                        missed = Some(also(missed.take(), miss));
                    }
                },
                () = sleep(PATIENCE), if waiting.len() > 0 => slow.iter().for_each(|server| server.demote()),
            }
        }
        Err(missed.unwrap_or_else(no_server))
    }
}

fn no_server() -> Miss {
    Miss::failed("there is no name server")
}

/// One name server.
struct Server {
    address: SocketAddr,
    /// UDP, and TCP for what UDP truncates.
    any: Pool,
    tcp: Pool,
    /// Until when it is asked last.
    demoted: Mutex<Option<Instant>>,
}

type Pool = NameServerPool<TokioRuntimeProvider>;

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.address)
    }
}

impl Server {
    fn new(address: SocketAddr, context: &Arc<PoolContext>) -> Self {
        let pool = |connections: Vec<ConnectionConfig>| {
            let connections = connections.into_iter().map(|mut connection| {
                connection.port = address.port();
                connection
            });
            let server = NameServerConfig::new(address.ip(), true, connections.collect());
            NameServerPool::from_config([server], Arc::clone(context), TokioRuntimeProvider::default())
        };
        Self {
            address,
            any: pool(vec![ConnectionConfig::udp(), ConnectionConfig::tcp()]),
            tcp: pool(vec![ConnectionConfig::tcp()]),
            demoted: Mutex::new(None),
        }
    }

    fn demoted(&self, now: Instant) -> bool {
        lock(&self.demoted).is_some_and(|until| now < until)
    }

    fn demote(&self) {
        *lock(&self.demoted) = Some(Instant::now() + DEMOTED);
    }

    async fn ask(
        &self,
        name: &Name,
        kind: RecordType,
        tcp: bool,
        limit: Duration,
    ) -> Result<DnsResponse, Miss> {
        let mut options = DnsRequestOptions::default();
        options.use_edns = true;
        options.edns_payload_len = DATAGRAM;
        let pool = if tcp { &self.tcp } else { &self.any };
        let answer = pool.lookup(Query::query(name.clone(), kind), options).first_answer();
        // The pool has its own time-out for each step; this one is for the steps together.
        let outcome = match timeout(limit.saturating_mul(2), answer).await {
            Ok(outcome) => outcome,
            Err(_) => Err(NetError::Timeout),
        };
        match &outcome {
            Err(NetError::Timeout | NetError::Io(_)) => self.demote(),
            _ => *lock(&self.demoted) = None,
        }
        outcome.map_err(|error| self.miss(name, kind, error))
    }

    fn miss(&self, name: &Name, kind: RecordType, error: NetError) -> Miss {
        let server = self.address;
        match error {
            NetError::Dns(DnsError::NoRecordsFound(NoRecords {
                soa, negative_ttl, response_code, ..
            })) => denial(name, kind, response_code, soa.as_ref().map(|soa| &soa.name), negative_ttl),
            NetError::Dns(DnsError::ResponseCode(code)) => {
                Miss::failed(format!("{name} {kind}: {server} answers {code}"))
            }
            error => Miss::failed(format!("{name} {kind}: {server}: {error}")),
        }
    }
}

/// A denial, as far as it is believed.
fn denial(name: &Name, kind: RecordType, code: ResponseCode, soa: Option<&Name>, ttl: Option<u32>) -> Miss {
    let what = match code {
        ResponseCode::NXDomain => format!("{name} does not exist (NXDOMAIN)"),
        _ => format!("{name} has no {kind} record"),
    };
    match soa {
        Some(zone) if zone.zone_of(name) => {
            Miss::Absent { ttl: seconds(ttl.unwrap_or(0)), reason: what.into() }
        }
        Some(zone) => {
            Miss::Denied { reason: format!("{what}, says the zone {zone}, which is another one").into() }
        }
        None => Miss::Denied { reason: format!("{what}, says an answer without the SOA of its zone").into() },
    }
}

/// Where the aliases of an answer lead from `name`, and how long they hold.
fn alias_end(response: &DnsResponse, name: &Name) -> Result<(Name, Duration), Miss> {
    let mut end = name.clone();
    let mut ttl = Duration::MAX;
    for _ in 0..=MAX_CHAIN {
        let alias = response.answers.iter().find_map(|record| match &record.data {
            RData::CNAME(alias) if record.name == end => Some((alias.0.clone(), seconds(record.ttl))),
            _ => None,
        });
        match alias {
            None => return Ok((end, ttl)),
            Some((target, holds)) => {
                end = target;
                ttl = ttl.min(holds);
            }
        }
    }
    Err(Miss::failed(format!("{name}: its aliases go in a circle")))
}

fn seconds(count: u32) -> Duration {
    Duration::from_secs(count.into())
}

/// Which state the files are in that resolution depends on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Files([Option<State>; 2]);

type State = (SystemTime, u64);

impl Files {
    fn now(settings: &Settings) -> Self {
        let state = |path: &Path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        let resolv = settings.servers.is_empty().then(|| state(settings.resolv_conf())).flatten();
        Self([resolv, settings.hosts.then(|| state(Path::new(HOSTS))).flatten()])
    }
}

impl Settings {
    fn resolv_conf(&self) -> &Path {
        self.resolv_conf.as_ref().map_or(Path::new("/etc/resolv.conf"), PathBuf::as_path)
    }
}
