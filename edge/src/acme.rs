//! Certificates that an ACME authority gives to `ssl` resources: from the settings to what handshakes show.
//!
//! The keeper of the crate `certs` orders and renews on the control runtime. What it has is put into the table of
//! certificates beside those of other resources; what the authority asks for is answered by workers from memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use certs::acme::{
    Challenge, ChallengeKind, Directory, ExternalAccount, Issued, Keeper, Parts, Seconds, Served, State,
    Vault, Want, alpn_config,
};
use certs::ca::store::Store;
use certs::ca::store::embedded::Embedded;
use certs::ca::store::etcd::{Etcd, Settings};
use certs::clock::SystemClock;
use certs::files;
use certs::sni::{CertPem, Change, SslObject, normal_name};
use config::process::{Acme, Process, Provider};
use config::ssl::{AcmeChallenge, Ssl};
use layers::http::acme_challenge::Pending;
use layers::telemetry::exposition::Exposition;
use layers::telemetry::metrics::Metrics;
use layers::telemetry::names;
use rustls::ServerConfig;
use tokio::sync::watch;

use crate::app::{StartError, etcd_settings};
use crate::running::Running;

/// How long it takes at most, unless something is wrong, until all replicas answer what one of them has written.
const VISIBLE: Duration = Duration::from_secs(1);

/// The resources whose certificate an authority gives, and what they show.
#[derive(Default)]
pub(crate) struct Managed {
    resources: BTreeMap<Arc<str>, Resource>,
    served: Arc<Served>,
    /// The handshakes that are pending, made once for each challenge.
    handshakes: Vec<(Challenge, Arc<ServerConfig>)>,
    tokens: Pending,
    wanted: watch::Sender<Vec<Want>>,
}

struct Resource {
    /// In their normal form, sorted.
    names: Vec<String>,
    challenge: Option<ChallengeKind>,
    /// Everything but the certificate.
    object: SslObject,
}

impl Managed {
    /// What answers are pending by HTTP.
    pub(crate) fn tokens(&self) -> &Pending {
        &self.tokens
    }

    /// What is wanted, as it changes.
    pub(crate) fn wanted(&self) -> watch::Receiver<Vec<Want>> {
        self.wanted.subscribe()
    }

    /// Takes in a resource that is new or different. Without a certificate for it nothing changes in the table: what was
    /// there under its id stays.
    pub(crate) fn put(&mut self, ssl: &Ssl, object: SslObject) -> Option<Change> {
        let mut names: Vec<String> = ssl.snis().filter_map(|name| normal_name(name)).collect();
        names.sort_unstable();
        names.dedup();
        let challenge = ssl.acme.and_then(|acme| acme.challenge).map(kind);
        let resource = Resource { names, challenge, object };
        let change = resource.shown(&self.served);
        self.resources.insert(resource.object.id.clone(), resource);
        change
    }

    /// Forgets a resource that is gone or has a certificate of its own.
    pub(crate) fn forget(&mut self, id: &str) {
        self.resources.remove(id);
    }

    /// Tells the keeper what is wanted by now.
    pub(crate) fn tell(&self) {
        let wants = self.resources.iter().map(|(id, resource)| Want {
            id: id.to_string(),
            names: resource.names.clone(),
            challenge: resource.challenge,
        });
        let wants: Vec<Want> = wants.collect();
        self.wanted.send_if_modified(|before| {
            let differs = *before != wants;
            *before = wants;
            differs
        });
    }

    /// Takes in what the keeper has: the changes of the table, in which those that stay the same do nothing.
    pub(crate) fn serve(&mut self, served: Arc<Served>) -> Vec<Change> {
        self.served = served;
        let tokens: HashMap<Box<str>, Bytes> = self
            .pending(ChallengeKind::Http01)
            .map(|challenge| (challenge.token.as_str().into(), challenge.authorization.clone().into()))
            .collect();
        self.tokens.store(Arc::new(tokens));
        let mut handshakes = Vec::new();
        for challenge in self.pending(ChallengeKind::TlsAlpn01) {
            match self.handshakes.iter().find(|(made, _)| made == challenge) {
                Some(made) => handshakes.push(made.clone()),
                None => match alpn_config(challenge) {
                    Ok(config) => handshakes.push((challenge.clone(), config)),
                    Err(error) => {
                        tracing::error!(error, name = challenge.name, "a challenge cannot be answered")
                    }
                },
            }
        }
        self.handshakes = handshakes;
        self.resources.values().filter_map(|resource| resource.shown(&self.served)).collect()
    }

    fn pending(&self, kind: ChallengeKind) -> impl Iterator<Item = &Challenge> {
        self.served.challenges.iter().filter(move |challenge| challenge.kind == kind)
    }

    /// The handshakes that are pending, by name.
    pub(crate) fn handshakes(&self) -> impl Iterator<Item = (Box<str>, Arc<ServerConfig>)> {
        let normal = |name: &str| normal_name(name).map(String::into_boxed_str);
        self.handshakes
            .iter()
            .filter_map(move |(challenge, config)| Some((normal(&challenge.name)?, config.clone())))
    }
}

impl Resource {
    /// The resource with the best certificate there is for it.
    fn shown(&self, served: &Served) -> Option<Change> {
        let (Issued { chain, key, .. }, names) = served.best(&self.names, now())?;
        let pairs = vec![CertPem { cert: chain.clone(), key: key.to_string() }];
        Some(Change::Put(SslObject { names, pairs, ..self.object.clone() }))
    }
}

fn now() -> Seconds {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).as_ref().map_or(0, Duration::as_secs)
}

fn kind(challenge: AcmeChallenge) -> ChallengeKind {
    match challenge {
        AcmeChallenge::Http01 => ChallengeKind::Http01,
        AcmeChallenge::TlsAlpn01 => ChallengeKind::TlsAlpn01,
    }
}

/// Starts to keep the certificates that `running` wants.
///
/// # Errors
/// A setting cannot work, or the folder cannot be used.
pub(crate) fn start(
    process: &Process,
    acme: &Acme,
    running: &Running,
    instance: &str,
    metrics: &Metrics,
) -> Result<Keeper, StartError> {
    let store = store(process, acme)?;
    let encryption = &process.data_encryption;
    let ring = encryption.keyring.iter().map(|key| key.reveal());
    let vault = Vault::new(encryption.enabled, ring)
        .map_err(|error| StartError::setting("apisix.data_encryption.keyring", error))?;
    let vault = Arc::new(vault);
    let settings = settings(process, acme)?;
    let publish = running.clone();
    let keeper = Keeper::start(Parts {
        authority: Arc::new(Directory::new(settings, store.kept.clone(), vault.clone())),
        directory: acme.directory.clone(),
        store: store.kept,
        vault,
        instance: instance.to_owned(),
        retry: acme.retry,
        visible: if store.is_shared { VISIBLE } else { Duration::ZERO },
        last_good: store.is_remote.then(|| process.in_data_dir("acme-last-good.json")),
        clock: SystemClock::new(),
        publish: Arc::new(move |served| publish.configuration().certificates.serve(served)),
    });
    let mut wanted = running.configuration().certificates.managed().wanted();
    let told = keeper.clone();
    tokio::spawn(async move {
        loop {
            let wants = wanted.borrow_and_update().clone();
            told.want(wants);
            if wanted.changed().await.is_err() {
                return;
            }
        }
    });
    let shown = keeper.clone();
    metrics.collector(move |out| collect(&shown, out));
    Ok(keeper)
}

struct Kept {
    kept: Arc<dyn Store>,
    /// Other processes use it too.
    is_shared: bool,
    /// It may be away while this process runs.
    is_remote: bool,
}

fn store(process: &Process, acme: &Acme) -> Result<Kept, StartError> {
    let unusable = |error: certs::ca::store::StoreError| StartError::setting("postern.acme", error);
    if let Some(folder) = &acme.folder {
        let kept = Arc::new(Embedded::open(folder).map_err(unusable)?);
        return Ok(Kept { kept, is_shared: true, is_remote: false });
    }
    let Provider::Etcd(settings) = &process.provider else {
        let kept = Arc::new(Embedded::open(&process.in_data_dir("acme")).map_err(unusable)?);
        return Ok(Kept { kept, is_shared: false, is_remote: false });
    };
    // Beside the keys of APISIX, which would take it for a resource; whoever may write all that begins with its prefix may
    // write this.
    let prefix = format!("{}-acme", settings.prefix);
    let kept = Etcd::new(Settings { prefix, ..etcd_settings(process, settings) });
    Ok(Kept { kept: Arc::new(kept.map_err(unusable)?), is_shared: true, is_remote: true })
}

fn settings(process: &Process, acme: &Acme) -> Result<certs::acme::Settings, StartError> {
    let (setting, file) = match &acme.ca_file {
        Some(file) => ("postern.acme.ca_file", Some(file)),
        None => ("apisix.ssl.ssl_trusted_certificate", process.tls.trusted_certificate.as_ref()),
    };
    let roots = file.map_or_else(files::system_roots, |file| files::trusted_roots(file));
    let external_account = match &acme.external_account {
        None => None,
        Some(external) => {
            let setting = "postern.acme.external_account.hmac_key";
            let key = external.key().ok_or_else(|| StartError::setting(setting, "not base64url"))?;
            Some(ExternalAccount { kid: external.kid.clone(), hmac_key: key.into() })
        }
    };
    Ok(certs::acme::Settings {
        directory: acme.directory.clone(),
        contact: acme.email.iter().map(|email| format!("mailto:{email}")).collect(),
        // No settings are read that say no.
        terms_agreed: true,
        external_account,
        roots: roots.map_err(|error| StartError::setting(setting, error))?,
        profile: acme.profile.clone(),
        challenge: kind(acme.challenge),
    })
}

fn collect(keeper: &Keeper, out: &mut Exposition) {
    const STATES: [State; 5] = [State::Valid, State::Expired, State::Ordering, State::Failed, State::Waiting];
    let status = keeper.status();
    out.family("", &names::ACME_CERTIFICATES);
    for state in STATES {
        let count = status.certificates.iter().filter(|certificate| certificate.state == state).count();
        out.sample("", names::ACME_CERTIFICATES.name, [("state", state.as_str())], count);
    }
    out.family("", &names::ACME_CERTIFICATE_ENDS);
    for certificate in &status.certificates {
        if let (Some(name), Some(end)) = (certificate.names.first(), certificate.not_after) {
            out.sample("", names::ACME_CERTIFICATE_ENDS.name, [("name", name.as_str())], end);
        }
    }
    out.family("", &names::ACME_FAILURES);
    for certificate in &status.certificates {
        if let Some(name) = certificate.names.first() {
            let failures = certificate.failure.as_ref().map_or(0, |failure| failure.count);
            out.sample("", names::ACME_FAILURES.name, [("name", name.as_str())], failures);
        }
    }
    out.family("", &names::ACME_ORDERS_TOTAL);
    for (result, count) in [("issued", status.orders.issued), ("failed", status.orders.failed)] {
        out.sample("", names::ACME_ORDERS_TOTAL.name, [("result", result)], count);
    }
}
