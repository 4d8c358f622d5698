//! Server certificates: `ssl` resources on their way into the table that handshakes ask.
//!
//! A change counts from the next handshake on. A resource that cannot be used leaves its former self in service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use certs::Problem;
use certs::acme::Served;
use certs::signer::{KeyAddress, Pools};
use certs::sni::{CertPem, Change, Protocol, RemotePair, SniTable, SslObject, TableSettings};
use certs::verify::ClientAuth;
use config::ssl::{Ssl, SslType, TlsVersion};
use config::{ConfigError, ResourceKey};
use serde_json::Value;

use crate::acme::Managed;

/// How long a changed resource waits for its signers to tell which keys they have.
const SIGNERS: Duration = Duration::from_secs(1);

/// What has become of a resource.
#[derive(Clone, Copy, Debug)]
pub enum State<'a> {
    /// It is right in itself; with its creation index.
    Read(&'a Ssl, u64),
    /// It was set aside; as it was written.
    SetAside(&'a Value),
    Gone,
}

/// The published table, and what could not be used.
pub struct Certificates {
    table: Arc<ArcSwap<SniTable>>,
    signers: Pools,
    /// Those that an ACME authority gives, if one is configured.
    has_authority: bool,
    managed: Managed,
    refused: BTreeMap<ResourceKey, Vec<ConfigError>>,
}

impl Certificates {
    /// No certificates yet. `has_authority`: resources may leave theirs to an ACME authority.
    pub fn new(settings: TableSettings, has_authority: bool) -> Self {
        let signers = settings.signers().clone();
        let table = Arc::new(ArcSwap::from_pointee(SniTable::new(settings)));
        Self { table, signers, has_authority, managed: Managed::default(), refused: BTreeMap::new() }
    }

    /// Those that an ACME authority gives.
    pub(crate) fn managed(&self) -> &Managed {
        &self.managed
    }

    /// Takes in what an ACME authority has given and asks for.
    pub(crate) fn serve(&mut self, served: Arc<Served>) {
        let changes = self.managed.serve(served);
        for change in &changes {
            if let Change::Put(object) = change {
                self.refused.remove(&ResourceKey::new(config::Kind::Ssl, object.id.clone()));
            }
        }
        let table = self.apply(changes);
        self.table.store(Arc::new(table.with_challenges(self.managed.handshakes())));
    }

    /// The table that handshakes ask.
    pub fn table(&self) -> &Arc<ArcSwap<SniTable>> {
        &self.table
    }

    /// Pools of signers, which hold keys.
    pub fn signers(&self) -> &Pools {
        &self.signers
    }

    /// Resources that cannot be used, and why.
    pub fn refused(&self) -> &BTreeMap<ResourceKey, Vec<ConfigError>> {
        &self.refused
    }

    /// Takes in resources that are new, different or gone. Blocks, but not for long, where a key is at signers.
    pub fn update<'a>(&mut self, changed: impl IntoIterator<Item = (&'a ResourceKey, State<'a>)>) {
        let mut changes = Vec::new();
        for (key, state) in changed {
            self.refused.remove(key);
            let ssl = match state {
                State::Read(ssl, order) => Some((ssl, order)),
                State::SetAside(_) | State::Gone => None,
            };
            let ssl = ssl.filter(|(ssl, _)| ssl.status.is_on() && ssl.kind == SslType::Server);
            if ssl.is_none_or(|(ssl, _)| ssl.acme.is_none()) {
                self.managed.forget(&key.id);
            }
            changes.extend(match ssl {
                Some((ssl, order)) => match self.wrong(ssl) {
                    Some(error) => {
                        self.managed.forget(&key.id);
                        tracing::error!(object = %key, %error, "the certificate cannot be used");
                        self.refused.insert(key.clone(), vec![error]);
                        Some(unusable(key, ssl))
                    }
                    None if ssl.acme.is_some() => {
                        let given = self.managed.put(ssl, object(key, ssl, order));
                        let is_served = self.table.load().entry(&key.id).is_some();
                        given.or_else(|| (!is_served).then(|| unusable(key, ssl)))
                    }
                    None => Some(Change::Put(object(key, ssl, order))),
                },
                None => Some(match state {
                    State::SetAside(written) => set_aside(key, written),
                    State::Read(..) | State::Gone => Change::Remove(key.id.clone()),
                }),
            });
        }
        self.managed.tell();
        if !changes.is_empty() {
            self.ask_signers(&changes);
            let table = self.apply(changes);
            self.table.store(Arc::new(table));
        }
    }

    /// Why a resource that is right in itself cannot be used.
    fn wrong(&self, ssl: &Ssl) -> Option<ConfigError> {
        // No version left of those that are named must not become every version.
        let mut named = ssl.ssl_protocols.iter().flat_map(|versions| versions.iter()).peekable();
        if named.peek().is_some() && named.all(|version| protocol(version).is_none()) {
            let why = "none of these versions is spoken: write TLSv1.2 or TLSv1.3";
            return Some(ConfigError::invalid("/ssl_protocols", why));
        }
        ssl.check_acme(self.has_authority)
    }

    /// The table after these changes; notes what of them cannot be used.
    fn apply(&mut self, changes: Vec<Change>) -> SniTable {
        let (table, errors) = self.table.load().apply(changes);
        for error in errors {
            tracing::error!(object = %format_args!("ssls/{}", error.id), %error, "the certificate cannot be used");
            let key = ResourceKey::new(config::Kind::Ssl, error.id.clone());
            let refused = ConfigError::invalid(error.field, error.problem.to_string());
            self.refused.entry(key).or_default().push(refused);
        }
        table
    }
}

impl Certificates {
    /// A key may have been put on the nodes just before its resource was written here.
    fn ask_signers(&self, changes: &[Change]) {
        let remote = changes.iter().filter_map(|change| match change {
            Change::Put(object) => Some(object.remote.iter()),
            Change::Refuse(..) | Change::Remove(_) => None,
        });
        let names: BTreeSet<_> = remote.flatten().map(|pair| Arc::clone(&pair.key.pool)).collect();
        for pool in names.iter().filter_map(|name| self.signers.get(name)) {
            pool.handle().block_on(pool.look_again(SIGNERS));
        }
    }
}

/// What takes the place of a resource that has nothing to show: its names must not be open by the certificate of a
/// wildcard where they ask for one of the client.
fn unusable(key: &ResourceKey, ssl: &Ssl) -> Change {
    match &ssl.client {
        Some(_) => Change::Refuse(key.id.clone(), ssl.snis().map(|name| name.as_str().to_owned()).collect()),
        None => Change::Remove(key.id.clone()),
    }
}

/// The same for one that was set aside, by what of it is written.
fn set_aside(key: &ResourceKey, written: &Value) -> Change {
    let field = |name| written.get(name).filter(|value| !value.is_null());
    let serves =
        field("status").is_none_or(|status| status != 0) && field("type").is_none_or(|kind| kind != "client");
    if !serves || field("client").is_none() {
        return Change::Remove(key.id.clone());
    }
    let listed = field("snis").and_then(Value::as_array).into_iter().flatten();
    let names = field("sni").into_iter().chain(listed).filter_map(Value::as_str).map(str::to_owned);
    Change::Refuse(key.id.clone(), names.collect())
}

/// What of the PEM cannot be read. Whether a key belongs to its certificate is not asked: the two may come one after the
/// other, and until then the former pair serves.
pub(crate) fn unreadable(key: &ResourceKey, ssl: &Ssl) -> Vec<ConfigError> {
    // Of keys that are held elsewhere their signers tell; names and versions are checked before.
    let object = SslObject { names: vec!["*".to_owned()], remote: Vec::new(), ..object(key, ssl, 0) };
    if object.pairs.is_empty() {
        return Vec::new();
    }
    let (_, errors) = SniTable::build(TableSettings::default(), [object]);
    errors
        .into_iter()
        .filter(|error| !matches!(error.problem, Problem::KeyMismatch(_)))
        .map(|error| ConfigError::invalid(error.field, error.problem.to_string()))
        .collect()
}

fn object(key: &ResourceKey, ssl: &Ssl, order: u64) -> SslObject {
    let pairs = ssl.pairs().filter_map(|(cert, key)| {
        Some(CertPem { cert: cert.as_str().to_owned(), key: key.pem()?.reveal().to_owned() })
    });
    let remote = ssl.pairs().filter_map(|(cert, key)| {
        let key = key.remote()?;
        let key = KeyAddress { pool: (&*key.pool).into(), name: (&*key.name).into() };
        Some(RemotePair { cert: cert.as_str().to_owned(), key })
    });
    SslObject {
        id: key.id.clone(),
        order,
        names: ssl.snis().map(|name| name.as_str().to_owned()).collect(),
        pairs: pairs.collect(),
        remote: remote.collect(),
        client: ssl.client.as_ref().map(|client| ClientAuth {
            ca: client.ca.as_str().to_owned(),
            depth: client.depth.get(),
            skip_uri_regex: client
                .skip_mtls_uri_regex
                .iter()
                .flat_map(|patterns| patterns.iter())
                .map(|pattern| pattern.to_string())
                .collect(),
        }),
        protocols: ssl
            .ssl_protocols
            .iter()
            .flat_map(|versions| versions.iter())
            .filter_map(protocol)
            .collect(),
    }
}

/// TLS 1.1 and older are not spoken; a resource that names them serves what else it names.
fn protocol(version: &TlsVersion) -> Option<Protocol> {
    match version {
        TlsVersion::V1_1 => None,
        TlsVersion::V1_2 => Some(Protocol::Tls12),
        TlsVersion::V1_3 => Some(Protocol::Tls13),
    }
}

#[cfg(test)]
mod tests {
    use certs::acme::Issued;
    use config::Resource;
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use serde_json::json;

    use super::*;

    fn ssl(value: &Value) -> (ResourceKey, Ssl) {
        let key = ResourceKey::new(config::Kind::Ssl, "1");
        match Resource::parse(&key, value, &plugins::Catalog::default()).unwrap() {
            Resource::Ssl(ssl) => (key, *ssl),
            other => panic!("{other:?}"),
        }
    }

    fn served(names: &[&str]) -> Arc<Served> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names.clone()).unwrap();
        let issued = Issued {
            names,
            chain: cert.pem(),
            key: signing_key.serialize_pem().into(),
            not_after: u64::MAX,
            current: true,
        };
        Arc::new(Served { certificates: vec![issued], challenges: Vec::new() })
    }

    #[test]
    fn what_an_authority_gives_is_shown_for_the_names_that_it_is_for() {
        let mut certificates = Certificates::new(TableSettings::default(), true);
        let (key, ssl) = ssl(&json!({"snis": ["a.test", "B.Test."], "acme": {}}));
        certificates.update([(&key, State::Read(&ssl, 1))]);
        assert_eq!(certificates.managed().wanted().borrow()[0].names, ["a.test", "b.test"]);
        let shows =
            |certificates: &Certificates, name| certificates.table().load().find(Some(name)).is_some();
        assert!(!shows(&certificates, "a.test"), "there is none yet");
        certificates.serve(served(&["a.test"]));
        assert!(shows(&certificates, "a.test") && !shows(&certificates, "b.test"));
        certificates.serve(served(&["a.test", "b.test"]));
        assert!(shows(&certificates, "a.test") && shows(&certificates, "b.test"));
        certificates.update([(&key, State::Gone)]);
        assert!(!shows(&certificates, "a.test"));
        assert!(certificates.managed().wanted().borrow().is_empty());
        certificates.serve(served(&["a.test"]));
        assert!(!shows(&certificates, "a.test"), "nobody wants it");
    }

    #[test]
    fn what_is_wrong_beside_the_certificate_is_told_once() {
        let mut certificates = Certificates::new(TableSettings::default(), true);
        let (key, wrong) = ssl(&json!({"sni": "a.test", "acme": {}, "client": {"ca": "c".repeat(128)}}));
        certificates.update([(&key, State::Read(&wrong, 1))]);
        for _ in 0..3 {
            certificates.serve(served(&["a.test"]));
            assert_eq!(certificates.refused()[&key].len(), 1);
        }
        let (_, right) = ssl(&json!({"sni": "a.test", "acme": {}}));
        certificates.update([(&key, State::Read(&right, 1))]);
        assert!(certificates.refused().is_empty());
        let mut none = Certificates::new(TableSettings::default(), false);
        none.update([(&key, State::Read(&right, 1))]);
        assert_eq!(none.refused()[&key][0].pointer, "/acme");
    }

    #[test]
    fn names_that_ask_for_client_certificates_do_not_fall_to_a_wildcard() {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["*.test".to_owned()]).unwrap();
        let (pem, private) = (cert.pem(), signing_key.serialize_pem());
        let (key, wildcard) = ssl(&json!({"sni": "*.test", "cert": pem, "key": private}));
        let other = ResourceKey::new(config::Kind::Ssl, "2");
        let exact = json!({"snis": ["a.test"], "cert": pem, "key": private, "client": {"ca": pem}});
        let with = |field: &str, value: Value| {
            let mut written = exact.clone();
            written[field] = value;
            written
        };
        let mut certificates = Certificates::new(TableSettings::default(), true);
        certificates.update([(&key, State::Read(&wildcard, 1))]);
        let is_open = |certificates: &Certificates| {
            let table = certificates.table().load();
            assert!(table.find(Some("b.test")).is_some() && !table.asks_client_certificate("b.test"));
            let found = table.find(Some("a.test")).is_some();
            assert!(!found || !table.asks_client_certificate("a.test"), "found is open");
            found
        };
        for (what, written, open) in [
            ("an unknown field", with("clientt", json!(1)), false),
            ("another field that is wrong", with("client", json!({"ca": 5})), false),
            ("one name that is wrong", with("snis", json!([5, "A.test."])), false),
            ("no client certificates", with("client", Value::Null), true),
            ("it is off", with("status", json!(0)), true),
            ("it is for upstreams", with("type", json!("client")), true),
        ] {
            certificates.update([(&other, State::SetAside(&written))]);
            assert_eq!(is_open(&certificates), open, "{what}");
        }
        let (_, no_authority) = ssl(&with("client", json!({"ca": "c".repeat(128)})));
        certificates.update([(&other, State::Read(&no_authority, 2))]);
        assert!(!is_open(&certificates), "what is wrong in the PEM");
        let (_, no_certificate) = ssl(&json!({"sni": "a.test", "acme": {}, "client": {"ca": pem}}));
        certificates.update([(&other, State::Read(&no_certificate, 2))]);
        assert!(!is_open(&certificates), "the authority has given none yet");
        certificates.serve(served(&["a.test"]));
        assert!(
            certificates.table().load().find(Some("a.test")).is_some_and(|entry| entry.client().is_some())
        );
        certificates.update([(&other, State::Gone)]);
        assert!(is_open(&certificates), "nobody asks any more");
    }
}
