//! Server name to certificate: the table the edge asks at every handshake, built from `ssl` resources.
//! Exact names win over `*.example.com` (one label), that over `*`. A change copies one shard of 256,
//! keeps every entry that did not change, and is seen by the next handshake. A rustls configuration is
//! made when its entry is first used. Sessions are resumed only inside one client-certificate setting.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerSessionMemoryCache};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, ServerConfig, SignatureAlgorithm, SupportedProtocolVersion};

use crate::error::{CertError, Problem};
use crate::signer::{KeyAddress, Pool, Pools, RemoteKey};
use crate::verify::{ClientAuth, ClientIdentity, ClientPolicy, HandshakeVerifier};

const SHARDS: usize = 256;
/// Sessions remembered where tickets carry none: those of TLS 1.2 clients without tickets.
const SESSIONS_WITH_TICKETS: usize = 256;
/// Sessions remembered for a setting without tickets, about 1 KB each when full.
const SESSIONS_WITHOUT_TICKETS: usize = 4096;

/// The protocol by which an ACME authority asks for a challenge of the kind TLS-ALPN-01 (RFC 8737).
pub const ACME_TLS: &[u8] = b"acme-tls/1";

/// An `ssl` resource of type `server` with its secrets resolved.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SslObject {
    /// The id of the resource.
    pub id: Arc<str>,
    /// Where two resources claim one name, the smaller order serves it (the creation index).
    pub order: u64,
    /// `sni` and `snis`.
    pub names: Vec<String>,
    /// `cert` and `key` first, then `certs` and `keys` pairwise.
    pub pairs: Vec<CertPem>,
    /// The same where the keys are at the nodes of a pool, all of them at those of one.
    pub remote: Vec<RemotePair>,
    /// `client`, if client certificates are asked for.
    pub client: Option<ClientAuth>,
    /// `ssl_protocols`; empty means the listener's own.
    pub protocols: Vec<Protocol>,
}

/// A certificate chain and its key, both PEM.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CertPem {
    /// Leaf first.
    pub cert: String,
    /// PKCS#8, PKCS#1 or SEC1, not encrypted.
    pub key: String,
}

/// A certificate chain in PEM, and where its key is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RemotePair {
    /// Leaf first.
    pub cert: String,
    /// Who signs for it.
    pub key: KeyAddress,
}

impl fmt::Debug for CertPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertPem(..)")
    }
}

impl fmt::Debug for SslObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SslObject").field("id", &self.id).field("names", &self.names).finish_non_exhaustive()
    }
}

/// A TLS version that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tls12,
    Tls13,
}

impl Protocol {
    /// Reads nginx's word for a version; older ones are `None`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TLSv1.2" => Some(Self::Tls12),
            "TLSv1.3" => Some(Self::Tls13),
            _ => None,
        }
    }

    fn version(self) -> &'static SupportedProtocolVersion {
        match self {
            Self::Tls12 => &rustls::version::TLS12,
            Self::Tls13 => &rustls::version::TLS13,
        }
    }
}

/// What holds for every `ssl` resource: the `apisix.ssl` block of the process settings.
#[derive(Clone, Debug)]
pub struct TableSettings {
    provider: Arc<CryptoProvider>,
    protocols: Vec<Protocol>,
    tickets: bool,
    fallback: Option<Box<str>>,
    signers: Pools,
}

impl TableSettings {
    /// Checks the block. `protocols` empty means TLS 1.2 and 1.3; `ciphers` is an OpenSSL list of which
    /// the ECDHE AEAD names count (it never narrows TLS 1.3, as in nginx); `fallback_sni` is used for a
    /// client that names no server.
    ///
    /// # Errors
    /// The cipher list leaves nothing to offer in TLS 1.2 though TLS 1.2 is served.
    pub fn build(
        protocols: &[Protocol],
        ciphers: Option<&str>,
        tickets: bool,
        fallback_sni: Option<&str>,
    ) -> Result<Self, Problem> {
        let protocols =
            ordered(if protocols.is_empty() { &[Protocol::Tls12, Protocol::Tls13] } else { protocols });
        let mut provider = aws_lc_rs::default_provider();
        if let Some(ciphers) = ciphers {
            let wanted: Vec<_> = ciphers.split([':', ',', ' ']).filter_map(suite).collect();
            if wanted.is_empty() && protocols.contains(&Protocol::Tls12) {
                return Err(Problem::NoSuite(ciphers.to_owned()));
            }
            let tls13 = provider.cipher_suites.iter().copied().filter(|s| s.tls13().is_some());
            provider.cipher_suites = tls13.chain(wanted).collect();
        }
        Ok(Self {
            provider: Arc::new(provider),
            protocols,
            tickets,
            fallback: fallback_sni.and_then(normal_name).map(String::into_boxed_str),
            signers: Pools::default(),
        })
    }

    /// With pools of signers, for keys that are held there.
    #[must_use]
    pub fn with_signers(self, signers: Pools) -> Self {
        Self { signers, ..self }
    }

    /// The pools.
    #[must_use]
    pub fn signers(&self) -> &Pools {
        &self.signers
    }
}

impl Default for TableSettings {
    fn default() -> Self {
        Self {
            provider: Arc::new(aws_lc_rs::default_provider()),
            protocols: vec![Protocol::Tls12, Protocol::Tls13],
            tickets: true,
            fallback: None,
            signers: Pools::default(),
        }
    }
}

fn ordered(protocols: &[Protocol]) -> Vec<Protocol> {
    let mut all = protocols.to_vec();
    all.sort_unstable();
    all.dedup();
    all
}

fn suite(openssl: &str) -> Option<rustls::SupportedCipherSuite> {
    use aws_lc_rs::cipher_suite as suites;
    match openssl {
        "ECDHE-ECDSA-AES128-GCM-SHA256" => Some(suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
        "ECDHE-ECDSA-AES256-GCM-SHA384" => Some(suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
        "ECDHE-ECDSA-CHACHA20-POLY1305" => Some(suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
        "ECDHE-RSA-AES128-GCM-SHA256" => Some(suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
        "ECDHE-RSA-AES256-GCM-SHA384" => Some(suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
        "ECDHE-RSA-CHACHA20-POLY1305" => Some(suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
        _ => None,
    }
}

/// One change of the table.
#[derive(Clone, Debug)]
pub enum Change {
    /// A resource that is new or different.
    Put(SslObject),
    /// A resource that cannot be used and whose names must not fall to a less specific one, because it asks for client
    /// certificates: its id and names.
    Refuse(Arc<str>, Vec<String>),
    /// The id of a resource that is gone, switched off or no longer of type `server`.
    Remove(Arc<str>),
}

/// All server names and what they are answered with. Immutable; share it in an `ArcSwap`.
#[derive(Clone)]
pub struct SniTable {
    settings: TableSettings,
    by_id: Sharded<Arc<SslEntry>>,
    exact: Sharded<Claims>,
    /// Keyed by what follows `*.`.
    wildcard: Sharded<Claims>,
    any: Claims,
    refused: Arc<RefusedNames>,
    sessions: Arc<HashMap<SessionKey, Arc<SessionScope>>>,
    /// What answers challenges that are pending, by name.
    challenges: Arc<HashMap<Box<str>, Arc<ServerConfig>>>,
}

impl SniTable {
    /// A table without entries: every handshake is refused.
    #[must_use]
    pub fn new(settings: TableSettings) -> Self {
        Self {
            settings,
            by_id: Sharded::default(),
            exact: Sharded::default(),
            wildcard: Sharded::default(),
            any: Claims::default(),
            refused: Arc::default(),
            sessions: Arc::default(),
            challenges: Arc::default(),
        }
    }

    /// The table with these handshakes for [`ACME_TLS`] in the place of all former ones; names in their normal form.
    #[must_use]
    pub fn with_challenges(&self, pending: impl IntoIterator<Item = (Box<str>, Arc<ServerConfig>)>) -> Self {
        Self { challenges: Arc::new(pending.into_iter().collect()), ..self.clone() }
    }

    /// The handshake that answers a pending challenge, if the client asks for one: it offers [`ACME_TLS`] and nothing else.
    #[must_use]
    pub fn challenge(&self, hello: &ClientHello<'_>) -> Option<&Arc<ServerConfig>> {
        // Nearly always there is none.
        if self.challenges.is_empty() || !hello.alpn()?.eq([ACME_TLS]) {
            return None;
        }
        self.challenges.get(normal_name(hello.server_name()?)?.as_str())
    }

    /// A table of these resources, and what had to be left out.
    #[must_use]
    pub fn build(
        settings: TableSettings,
        objects: impl IntoIterator<Item = SslObject>,
    ) -> (Self, Vec<CertError>) {
        Self::new(settings).apply(objects.into_iter().map(Change::Put))
    }

    /// The table after these changes. A resource that cannot be used is reported and leaves its former
    /// self in service, or else, if it asks for client certificates, its names refused; one that did not change keeps
    /// its entry, its sessions and its compiled parts.
    #[must_use]
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> (Self, Vec<CertError>) {
        let mut next = self.clone();
        let mut errors = Vec::new();
        for change in changes {
            match change {
                Change::Put(object) => next.put(&object, &mut errors),
                Change::Refuse(id, names) => {
                    next.remove(&id);
                    next.refuse(&id, &names);
                }
                Change::Remove(id) => next.remove(&id),
            }
        }
        next.forget_unused_sessions();
        (next, errors)
    }

    /// The entry for a server name as a client sent it; for `None` the `fallback_sni` decides.
    #[must_use]
    pub fn find(&self, name: Option<&str>) -> Option<&Arc<SslEntry>> {
        let name = match name {
            Some(name) => name,
            None => self.settings.fallback.as_deref()?,
        };
        match self.look_up(name) {
            Found::Entry(entry) => Some(entry),
            Found::Refused | Found::Nothing => None,
        }
    }

    /// Whether `name` asks for client certificates, or would if its resource could be used.
    #[must_use]
    pub fn asks_client_certificate(&self, name: &str) -> bool {
        match self.look_up(name) {
            Found::Entry(entry) => entry.client().is_some(),
            Found::Refused => true,
            Found::Nothing => false,
        }
    }

    fn look_up(&self, name: &str) -> Found<'_> {
        if name.bytes().any(|b| b.is_ascii_uppercase()) || name.ends_with('.') {
            return normal_name(name).map_or(Found::Nothing, |name| self.look_up_normal(&name));
        }
        self.look_up_normal(name)
    }

    fn look_up_normal(&self, name: &str) -> Found<'_> {
        if let Some(entry) = self.exact.get(name).and_then(Claims::first) {
            return Found::Entry(entry);
        }
        if self.refused.exact.contains(name) {
            return Found::Refused;
        }
        if let Some((_, parent)) = name.split_once('.') {
            if let Some(entry) = self.wildcard.get(parent).and_then(Claims::first) {
                return Found::Entry(entry);
            }
            if self.refused.wildcard.contains(parent) {
                return Found::Refused;
            }
        }
        match self.any.first() {
            Some(entry) => Found::Entry(entry),
            None if self.refused.any => Found::Refused,
            None => Found::Nothing,
        }
    }

    /// The entry of a resource.
    #[must_use]
    pub fn entry(&self, id: &str) -> Option<&Arc<SslEntry>> {
        self.by_id.get(id)
    }

    /// All entries, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<SslEntry>> {
        self.by_id.values()
    }

    /// Whether no resource is served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.values().next().is_none()
    }

    fn put(&mut self, object: &SslObject, errors: &mut Vec<CertError>) {
        let fingerprint = fingerprint(object);
        if self.by_id.get(&object.id).is_some_and(|old| old.fingerprint == fingerprint) {
            return;
        }
        let entry = match self.compile(object, fingerprint) {
            Ok(entry) => entry,
            Err(found) => {
                if object.client.is_some() && self.by_id.get(&object.id).is_none() {
                    self.refuse(&object.id, &object.names);
                }
                return errors.extend(found);
            }
        };
        self.remove(&object.id);
        for name in &entry.names {
            let claims = match name {
                Name::Exact(name) => self.exact.entry(name),
                Name::Wildcard(parent) => self.wildcard.entry(parent),
                Name::Any => &mut self.any,
            };
            claims.add(entry.clone());
        }
        self.by_id.insert(&object.id, entry.clone());
    }

    fn refuse(&mut self, id: &Arc<str>, names: &[String]) {
        let names = names.iter().filter_map(|name| Name::parse(name)).collect();
        Arc::make_mut(&mut self.refused).put(id.clone(), names);
    }

    fn remove(&mut self, id: &str) {
        if self.refused.by_id.contains_key(id) {
            Arc::make_mut(&mut self.refused).remove(id);
        }
        let Some(entry) = self.by_id.remove(id) else { return };
        for name in &entry.names {
            match name {
                Name::Exact(name) => self.exact.drop_claim(name, id),
                Name::Wildcard(parent) => self.wildcard.drop_claim(parent, id),
                Name::Any => self.any.drop(id),
            }
        }
    }

    fn compile(&mut self, object: &SslObject, fingerprint: u64) -> Result<Arc<SslEntry>, Vec<CertError>> {
        let id = &object.id;
        let mut errors = Vec::new();
        let mut names = Vec::with_capacity(object.names.len());
        for (i, name) in object.names.iter().enumerate() {
            match Name::parse(name) {
                Some(name) => names.push(name),
                None => errors.push(CertError::new(id, format!("/snis/{i}"), Problem::ServerName)),
            }
        }
        if object.names.is_empty() {
            errors.push(CertError::new(id, "/snis", Problem::NoServerName));
        }
        if object.pairs.is_empty() && object.remote.is_empty() {
            errors.push(CertError::new(id, "/cert", Problem::NoCertificate));
        }
        let (mut keys, mut signer) = (Vec::with_capacity(object.pairs.len()), None);
        let mut wrong = |index: usize, (field, problem): (&str, Problem)| {
            let field = match index.checked_sub(1) {
                None => format!("/{field}"),
                Some(index) => format!("/{field}s/{index}"),
            };
            errors.push(CertError::new(id, field, problem));
        };
        for (i, pair) in object.pairs.iter().enumerate() {
            match certified_key(pair, &self.settings.provider) {
                Ok(key) => keys.push(key),
                Err(error) => wrong(i, error),
            }
        }
        for (i, pair) in object.remote.iter().enumerate() {
            match remote_key(pair, &self.settings.signers) {
                Ok((key, pool)) => {
                    keys.push(key);
                    signer = Some(pool);
                }
                Err(error) => wrong(i, error),
            }
        }
        // An ECDSA or Ed25519 signature costs a fraction of an RSA one: offered first to those who can.
        keys.sort_by_key(|key: &Arc<CertifiedKey>| key.key.algorithm() == SignatureAlgorithm::RSA);
        let client = match &object.client {
            None => None,
            Some(auth) => match ClientPolicy::build(auth, &self.settings.provider) {
                Ok(policy) => Some(Arc::new(policy)),
                Err((field, problem)) => {
                    errors.push(CertError::new(id, format!("/client/{field}"), problem));
                    None
                }
            },
        };
        if !errors.is_empty() {
            return Err(errors);
        }
        let protocols = match object.protocols.as_slice() {
            [] => self.settings.protocols.clone(),
            some => ordered(some),
        };
        let sessions = self
            .session_scope(object.client.as_ref(), client.as_ref(), protocols)
            .map_err(|problem| vec![CertError::new(id, "/ssl_protocols", problem)])?;
        Ok(Arc::new(SslEntry {
            id: id.clone(),
            order: object.order,
            fingerprint,
            names,
            certificates: Arc::new(Certificates(keys)),
            signer,
            client,
            sessions,
            with_h2: OnceLock::new(),
            without_h2: OnceLock::new(),
        }))
    }

    fn session_scope(
        &mut self,
        auth: Option<&ClientAuth>,
        policy: Option<&Arc<ClientPolicy>>,
        protocols: Vec<Protocol>,
    ) -> Result<Arc<SessionScope>, Problem> {
        let key = SessionKey { client: auth.cloned(), protocols };
        if let Some(scope) = self.sessions.get(&key) {
            return Ok(scope.clone());
        }
        let scope = Arc::new(SessionScope::build(&self.settings, policy, &key.protocols)?);
        Arc::make_mut(&mut self.sessions).insert(key, scope.clone());
        Ok(scope)
    }

    fn forget_unused_sessions(&mut self) {
        // The former table still holds the entries just replaced, so a scope may go one change late.
        if self.sessions.values().any(|scope| Arc::strong_count(scope) == 1) {
            Arc::make_mut(&mut self.sessions).retain(|_, scope| Arc::strong_count(scope) > 1);
        }
    }
}

impl fmt::Debug for SniTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SniTable").field("entries", &self.by_id.values().count()).finish_non_exhaustive()
    }
}

/// What there is for a name.
enum Found<'a> {
    Entry(&'a Arc<SslEntry>),
    Refused,
    Nothing,
}

/// The names of resources that cannot be used and ask for client certificates.
#[derive(Clone, Default)]
struct RefusedNames {
    by_id: HashMap<Arc<str>, Vec<Name>>,
    exact: HashSet<Box<str>>,
    /// What follows `*.`.
    wildcard: HashSet<Box<str>>,
    any: bool,
}

impl RefusedNames {
    fn put(&mut self, id: Arc<str>, names: Vec<Name>) {
        self.remove(&id);
        self.add(&names);
        self.by_id.insert(id, names);
    }

    fn remove(&mut self, id: &str) {
        if self.by_id.remove(id).is_none() {
            return;
        }
        let left = std::mem::take(&mut self.by_id);
        *self = Self::default();
        left.values().for_each(|names| self.add(names));
        self.by_id = left;
    }

    fn add(&mut self, names: &[Name]) {
        for name in names {
            match name {
                Name::Exact(name) => _ = self.exact.insert(name.clone()),
                Name::Wildcard(parent) => _ = self.wildcard.insert(parent.clone()),
                Name::Any => self.any = true,
            }
        }
    }
}

/// One `ssl` resource, ready for handshakes.
pub struct SslEntry {
    id: Arc<str>,
    order: u64,
    fingerprint: u64,
    names: Vec<Name>,
    certificates: Arc<Certificates>,
    signer: Option<Arc<Pool>>,
    client: Option<Arc<ClientPolicy>>,
    sessions: Arc<SessionScope>,
    with_h2: OnceLock<Arc<ServerConfig>>,
    without_h2: OnceLock<Arc<ServerConfig>>,
}

impl SslEntry {
    /// The id of the resource.
    #[must_use]
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// How client certificates are treated; `None` where they are not asked for.
    #[must_use]
    pub fn client(&self) -> Option<&Arc<ClientPolicy>> {
        self.client.as_ref()
    }

    /// Who signs, where the keys are not here: handshakes wait for them.
    #[must_use]
    pub fn signer(&self) -> Option<&Arc<Pool>> {
        self.signer.as_ref()
    }

    /// The names served, as configured but in lower case.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.names.iter().map(ToString::to_string)
    }

    /// The first moment one of the certificates is no longer valid, in seconds since 1970.
    #[must_use]
    pub fn expires(&self) -> Option<i64> {
        let leaves = self.certificates.0.iter().filter_map(|key| key.cert.first());
        leaves.filter_map(ClientIdentity::parse).map(|leaf| leaf.not_after).min()
    }

    /// The rustls configuration, with HTTP/2 offered or not.
    #[must_use]
    pub fn config(&self, http2: bool) -> &Arc<ServerConfig> {
        let (slot, alpn): (_, &[&[u8]]) =
            if http2 { (&self.with_h2, &[b"h2", b"http/1.1"]) } else { (&self.without_h2, &[b"http/1.1"]) };
        slot.get_or_init(|| {
            let mut config = self.sessions.base.clone();
            config.cert_resolver = self.certificates.clone();
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            Arc::new(config)
        })
    }
}

impl fmt::Debug for SslEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SslEntry").field("id", &self.id).field("names", &self.names).finish_non_exhaustive()
    }
}

/// Resources claiming one name; the first serves it.
#[derive(Clone, Default)]
struct Claims(Vec<Arc<SslEntry>>);

impl Claims {
    fn first(&self) -> Option<&Arc<SslEntry>> {
        self.0.first()
    }

    fn add(&mut self, entry: Arc<SslEntry>) {
        // A resource may list one name twice.
        if !self.0.iter().any(|other| other.id == entry.id) {
            self.0.push(entry);
            self.0.sort_by(|a, b| (a.order, &a.id).cmp(&(b.order, &b.id)));
        }
    }

    fn drop(&mut self, id: &str) {
        self.0.retain(|entry| &*entry.id != id);
    }
}

/// The certificates of one entry; the client's signature schemes and suites choose among them.
#[derive(Debug)]
struct Certificates(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let usable = self.0.iter().find(|key| key.key.choose_scheme(schemes).is_some());
        // With none usable the first lets rustls answer with the proper alert.
        usable.or(self.0.first()).cloned()
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct SessionKey {
    client: Option<ClientAuth>,
    protocols: Vec<Protocol>,
}

/// What may share resumed sessions: one client-certificate setting and one set of versions. Ticket keys
/// and remembered sessions exist once per scope, so a ticket of another setting cannot even be read.
struct SessionScope {
    base: ServerConfig,
}

impl SessionScope {
    fn build(
        settings: &TableSettings,
        policy: Option<&Arc<ClientPolicy>>,
        protocols: &[Protocol],
    ) -> Result<Self, Problem> {
        let versions: Vec<_> = protocols.iter().map(|p| p.version()).collect();
        let builder = ServerConfig::builder_with_provider(settings.provider.clone())
            .with_protocol_versions(&versions)
            .map_err(|error| match error {
                _ if versions.is_empty() => Problem::NoProtocol,
                error => Problem::NoSuite(error.to_string()),
            })?;
        let builder = match policy {
            None => builder.with_no_client_auth(),
            Some(policy) => builder.with_client_cert_verifier(Arc::new(HandshakeVerifier(policy.clone()))),
        };
        let mut base = builder.with_cert_resolver(Arc::new(Certificates(Vec::new())));
        if settings.tickets {
            base.ticketer = aws_lc_rs::Ticketer::new().map_err(|e| Problem::NoSuite(e.to_string()))?;
            base.session_storage = ServerSessionMemoryCache::new(SESSIONS_WITH_TICKETS);
        } else if policy.is_some() {
            // Without tickets a verified client is cheap to ask again, and nothing is to be kept.
            base.session_storage = Arc::new(NoServerSessionStorage {});
            base.send_tls13_tickets = 0;
        } else {
            base.session_storage = ServerSessionMemoryCache::new(SESSIONS_WITHOUT_TICKETS);
        }
        Ok(Self { base })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Exact(Box<str>),
    Wildcard(Box<str>),
    Any,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        let (wildcard, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let name = normal_name(rest)?.into_boxed_str();
        Some(if wildcard { Self::Wildcard(name) } else { Self::Exact(name) })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(parent) => write!(f, "*.{parent}"),
            Self::Any => f.write_str("*"),
        }
    }
}

/// A host name in the one form used for comparing: lower case, no trailing dot. `None` if it is none.
#[must_use]
pub fn normal_name(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let fits = !name.is_empty() && name.len() <= 253;
    let clean = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':' | b'[' | b']');
    (fits && name.bytes().all(clean)).then(|| name.to_ascii_lowercase())
}

/// A field of a pair, and what is wrong with it.
pub(crate) type Refused = (&'static str, Problem);

/// A chain in PEM, and the subject of its leaf.
fn chain_of(pem: &str) -> Result<(Vec<CertificateDer<'static>>, String), Refused> {
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| ("cert", Problem::Pem(e.to_string())))?;
    let Some(leaf) = chain.first() else { return Err(("cert", Problem::NoCertificateBlock)) };
    let Some(identity) = ClientIdentity::parse(leaf) else {
        return Err(("cert", Problem::Certificate("the first certificate is not valid X.509".to_owned())));
    };
    let subject = identity.subject;
    Ok((chain, subject))
}

/// A certificate whose key is at the nodes of a pool.
fn remote_key(pair: &RemotePair, signers: &Pools) -> Result<(Arc<CertifiedKey>, Arc<Pool>), Refused> {
    let (chain, _) = chain_of(&pair.cert)?;
    let pool = signers.get(&pair.key.pool).ok_or_else(|| {
        let pool = pair.key.pool.to_string();
        ("key", Problem::UnknownPool { pool, known: signers.names() })
    })?;
    let leaf = chain.first().ok_or(("cert", Problem::NoCertificateBlock))?;
    let key =
        RemoteKey::of(leaf, pool, &pair.key.name).map_err(|error| ("key", Problem::NotOffered(error)))?;
    Ok((Arc::new(CertifiedKey::new(chain, Arc::new(key))), Arc::clone(pool)))
}

pub(crate) fn certified_key(pair: &CertPem, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, Refused> {
    let (chain, subject) = chain_of(&pair.cert)?;
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(|error| match error {
        pem::Error::NoItemsFound => ("key", Problem::NoKeyBlock),
        error => ("key", Problem::Pem(error.to_string())),
    })?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| ("key", Problem::Key(error.to_string())))?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
        Err(Error::InconsistentKeys(_)) => Err(("key", Problem::KeyMismatch(subject))),
        Err(error) => Err(("cert", Problem::Certificate(error.to_string()))),
    }
}

fn fingerprint(object: &SslObject) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}

/// A map that is copied shard by shard, so that one change among 10,000 names copies about 40.
struct Sharded<V> {
    shards: Vec<Arc<HashMap<Box<str>, V>>>,
}

impl<V> Clone for Sharded<V> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone() }
    }
}

impl<V> Default for Sharded<V> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::new());
        Self { shards: vec![empty; SHARDS] }
    }
}

impl<V> Sharded<V> {
    fn shard(key: &str) -> usize {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        (hasher.finish() % SHARDS as u64) as usize
    }

    fn get(&self, key: &str) -> Option<&V> {
        self.shards.get(Self::shard(key))?.get(key)
    }

    fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }
}

impl<V: Clone> Sharded<V> {
    fn shard_mut(&mut self, key: &str) -> Option<&mut HashMap<Box<str>, V>> {
        self.shards.get_mut(Self::shard(key)).map(Arc::make_mut)
    }

    fn insert(&mut self, key: &str, value: V) {
        if let Some(shard) = self.shard_mut(key) {
            shard.insert(key.into(), value);
        }
    }

    fn remove(&mut self, key: &str) -> Option<V> {
        self.get(key)?;
        self.shard_mut(key)?.remove(key)
    }
}

impl Sharded<Claims> {
    fn entry(&mut self, key: &str) -> &mut Claims {
        let index = Self::shard(key);
        #[expect(clippy::indexing_slicing, reason = "a remainder by SHARDS, the fixed length")]
        Arc::make_mut(&mut self.shards[index]).entry(key.into()).or_default()
    }

    fn drop_claim(&mut self, key: &str, id: &str) {
        let Some(shard) = self.shard_mut(key) else { return };
        if let Some(claims) = shard.get_mut(key) {
            claims.drop(id);
            if claims.0.is_empty() {
                shard.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests;
