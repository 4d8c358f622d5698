//! `postern ca run`: the authority as a process.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use certs::ca::admin::Operator;
use certs::ca::attest::Attestors;
use certs::ca::attest::consul::{self, Consul};
use certs::ca::attest::kubernetes::{self, Kubernetes};
use certs::ca::attest::token::JoinTokens;
use certs::ca::audit::{Audit, Entry};
use certs::ca::authority::KeyKind;
use certs::ca::channel::{self, Pin};
use certs::ca::foundry::Foundry;
use certs::ca::istio::Front;
use certs::ca::istio::door::{Door, Origin};
use certs::ca::keeper::Keeper;
use certs::ca::limits::{Limits, Rate};
use certs::ca::operators::Operators;
use certs::ca::probe::Visitor;
use certs::ca::proto::join_tokens_server::JoinTokensServer;
use certs::ca::record::Lifetimes;
use certs::ca::rotation::driver::{self, BundleCopy, DriverError, PemFile};
use certs::ca::seal::Sealer;
use certs::ca::server;
use certs::ca::service::{Parts, Service};
use certs::ca::store::Store;
use certs::clock::{Clock, SystemClock};
use certs::identity::TrustDomain;
use clap::Args;
use config::ca::Ca as Settings;
use config::process::Process;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::service::Routes;

use super::status::Told;
use super::{AUDIT, Place, SOCKET, outside, settings, store};
use crate::observed;
use crate::runtime::{self, Stop};
use crate::{output, role};

/// What is said to the other replicas at the end is not waited for longer.
const FAREWELL: Duration = Duration::from_secs(5);
/// For how long the store may have been away before the process before this one was killed, and nobody is forgotten to whom
/// it gave a certificate.
const REMEMBERED: Duration = Duration::from_hours(1);

/// Arguments of `postern ca run`.
#[derive(Args)]
pub(super) struct Run {
    #[command(flatten)]
    place: Place,
}

impl Run {
    pub(super) fn run(self) -> Result<ExitCode> {
        let settings = match settings(&self.place.config) {
            Ok(settings) => settings,
            Err(code) => return Ok(code),
        };
        crate::logging::start(&Process::defaults(&settings.data_dir));
        runtime::serve("ca", serve(settings))
    }
}

fn sealer(settings: &Settings) -> Result<Sealer> {
    Ok(match role::sealer(&settings.seal)? {
        Some(sealer) => sealer,
        None => Sealer::key_file(&settings.data_dir.join("seal.key"))?,
    })
}

/// The cluster that is asked for tokens, if there is one; `audience` is whom they have to be for.
fn kubernetes(settings: &Settings, audience: Option<&str>) -> Result<Option<Kubernetes>> {
    let asked = settings.kubernetes.as_ref().map(|given| {
        Kubernetes::new(kubernetes::Settings {
            server: given.server.clone(),
            ca: given.ca_file.clone(),
            token: given.token_file.clone(),
            audience: audience.unwrap_or(&given.audience).to_owned(),
        })
    });
    asked.transpose().map_err(|problem| anyhow!("kubernetes: {problem}"))
}

/// The door for clients of Istio, with its certificate.
async fn istio(
    settings: &Settings,
    given: &config::ca::Istio,
    service: &Service,
    tokens: &Arc<JoinTokens>,
) -> Result<(Front, Door, TcpListener)> {
    let attestors = Attestors {
        tokens: Some(Arc::clone(tokens)),
        kubernetes: kubernetes(settings, Some(&given.audience))?,
        consul: None,
    };
    let front = Front::new(service.clone(), attestors, given.node_accounts.iter().cloned().collect());
    let origin = match (&given.cert_file, &given.key_file) {
        (Some(certificate), Some(key)) => {
            Origin::Files { certificate: certificate.clone(), key: key.clone() }
        }
        _ => Origin::Names(given.names.clone()),
    };
    let door = Door::open(origin, service.clone()).await.map_err(|problem| anyhow!("istio: {problem}"))?;
    let listen = given.listen().context("istio.listen")?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    Ok((front, door, listener))
}

fn attestors(settings: &Settings, tokens: &Arc<JoinTokens>) -> Result<Attestors> {
    let consul = settings.consul.as_ref().map(|given| {
        Consul::new(consul::Settings {
            server: given.server.clone(),
            ca: given.ca_file.clone(),
            path: given.path.clone(),
            datacenter: given.datacenter.clone(),
        })
    });
    Ok(Attestors {
        tokens: Some(Arc::clone(tokens)),
        kubernetes: kubernetes(settings, None)?,
        consul: consul.transpose().map_err(|problem| anyhow!("consul: {problem}"))?,
    })
}

fn limits(settings: &Settings) -> Limits {
    let given = &settings.limits;
    let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    Limits {
        identity: Rate {
            per_second: given.certificates_per_second,
            burst: f64::from(given.certificates_burst),
        },
        attestor: Rate {
            per_second: f64::from(given.proofs_per_second),
            burst: f64::from(given.proofs_per_second),
        },
        queue: count(given.queue),
        connections: count(given.connections),
        watchers: count(given.connections),
        ..Limits::default()
    }
}

/// Files of the data directory are nobody else's.
fn make_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("the data directory {} cannot be made", dir.display()))
}

async fn serve(settings: Settings) -> Result<()> {
    let mut stop = Stop::listen()?;
    let dir = &settings.data_dir;
    make_dir(dir)?;
    let clock: Arc<dyn Clock> = SystemClock::new();
    let now = clock.now();
    // The lock on the log keeps a second process off the directory; so it comes first.
    let audit = Arc::new(Audit::open(&dir.join(AUDIT), now)?);
    let sealer = Arc::new(sealer(&settings).context("keys cannot be sealed")?);
    let domain: TrustDomain = settings.trust_domain.parse()?;
    let shared = store::open(&settings)?;
    let keeper = open(&settings, &shared, &sealer, &audit, &domain, now).await?;
    keeper.remember(audit.signed_since(now.checked_sub(REMEMBERED).unwrap_or(UNIX_EPOCH))?);
    let key = channel::key(&*shared, &sealer).await?;
    let pin = Pin::of(&key);
    let tls = channel::server(&key, now)?;
    let tokens = Arc::new(JoinTokens::new(Arc::clone(&shared)));
    let service = Service::new(Parts {
        current: keeper.current(),
        acks: keeper.clone(),
        attestors: attestors(&settings, &tokens)?,
        audit: Arc::clone(&audit),
        limits: limits(&settings),
        sealer,
        clock: Arc::clone(&clock),
    })?;

    let listen = settings.listen().context("listen")?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let listen = listener.local_addr()?;
    let istio = match &settings.istio {
        None => None,
        Some(given) => Some(istio(&settings, given, &service, &tokens).await?),
    };
    let watched = match settings.status() {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.with_context(|| format!("cannot listen on {address}"))?)
        }
    };
    let socket = dir.join(SOCKET);
    let operators =
        server::socket(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let routes = Routes::new(JoinTokensServer::new(Operators {
        tokens,
        audit: Arc::clone(&audit),
        current: keeper.current(),
        clock: Arc::clone(&clock),
    }))
    .add_service(Operator::new(Arc::clone(&keeper), Some(Arc::clone(&audit))).server());
    std::fs::write(dir.join("pin"), format!("{pin}\n"))?;

    audit.write(&Entry::allowed("start", "authority").with("pin", pin.to_string()), clock.now())?;
    output::note(&format!("{:<10} {listen}", "workloads"));
    output::note(&format!("{:<10} {pin}", "pin"));
    output::note(&format!("{:<10} {}", "operators", socket.display()));
    if let Some((_, _, listener)) = &istio {
        output::note(&format!("{:<10} {}", "istio", listener.local_addr()?));
    }
    if let Some(listener) = &watched {
        output::note(&format!("{:<10} http://{}/status", "status", listener.local_addr()?));
    }
    output::note(&format!("{:<10} {domain}; a token for a workload:", "domain"));
    output::note(&format!(
        "  postern ca token create --socket {} --identity spiffe://{domain}/ns/default/sa/NAME --ttl 1h",
        socket.display()
    ));

    let told = Told { service: service.clone(), keeper: Arc::clone(&keeper), audit: Arc::clone(&audit), pin };
    let observing = async {
        match watched {
            Some(listener) => observed::serve(listener, told).await,
            None => std::future::pending().await,
        }
    };
    let (stopping, stopped) = watch::channel(false);
    tokio::spawn(async move {
        stop.told().await;
        stopping.send_replace(true);
        // Kept until the process ends: who waits is told once.
        std::future::pending::<()>().await;
    });
    let until = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let serving_istio = async {
        let Some((front, door, listener)) = istio else { return anyhow::Ok(()) };
        let tls = door.config().map_err(|problem| anyhow!("istio: {problem}"))?;
        tokio::select! {
            () = server::istio(front, listener, tls, until(stopped.clone())) => Ok(()),
            // The state that it follows has ended with everything.
            () = door.keep() => Ok(()),
        }
    };
    let serving = async {
        let (_, _, istio) = tokio::join!(
            server::workloads(service, listener, tls, until(stopped.clone())),
            server::operators(routes, operators, until(stopped.clone())),
            serving_istio,
        );
        istio
    };
    tokio::select! {
        served = serving => served?,
        () = Arc::clone(&keeper).run() => {}
        () = observing => {}
    }
    match timeout(FAREWELL, keeper.driver().leave()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the other replicas were not told of the end"),
        Err(_) => tracing::warn!("the other replicas were not told of the end: the store does not answer"),
    }
    audit.write(&Entry::allowed("stop", "authority"), SystemTime::now())?;
    audit.sync()?;
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// The authority in the store, or a new one.
async fn open(
    settings: &Settings,
    store: &Arc<dyn Store>,
    sealer: &Arc<Sealer>,
    audit: &Arc<Audit>,
    domain: &TrustDomain,
    now: SystemTime,
) -> Result<Arc<Keeper>> {
    let foundry = Arc::new(Foundry::new(Arc::clone(sealer), KeyKind::P256));
    let clock = SystemClock::new();
    let replica = store::replica(settings)?;
    let opened = async || {
        let (store, foundry, clock) = (Arc::clone(store), Arc::clone(&foundry), clock.clone());
        let copies = settings.bundle_files.iter().cloned();
        let copies = copies.map(|path| Arc::new(PemFile::new(path)) as Arc<dyn BundleCopy>).collect();
        let unread = Duration::from_secs(settings.store.signs_unread.into());
        let outside = outside::open(settings.root.as_ref(), &foundry)?;
        let prober = Arc::new(Visitor::new(Arc::clone(&foundry), Arc::clone(audit), clock.clone()));
        Keeper::open(store, foundry, clock, &replica, |driver| {
            let driver =
                driver.scheduled(true).with_copies(copies).signing_unread(unread).with_outside(outside);
            if settings.visits { driver.with_prober(prober) } else { driver }
        })
        .await
        .map_err(anyhow::Error::from)
    };
    let keeper = match opened().await? {
        Some(keeper) => keeper,
        None => {
            let lifetimes = Lifetimes { leaf_s: settings.longest_ttl, ..Lifetimes::default() };
            let file = settings.root.as_ref().and_then(|root| root.file.as_ref());
            let record = match outside::open(settings.root.as_ref(), &foundry)? {
                None if let Some(file) = file => {
                    let wrong = || format!("root.file: {}", file.display());
                    let pem = std::fs::read_to_string(file).with_context(wrong)?;
                    let found = foundry.found_with(domain.as_str(), lifetimes, &pem, now.into());
                    found.with_context(wrong)?
                }
                None => foundry.found(domain.as_str(), lifetimes, now.into())?,
                Some(outside) => {
                    output::note(&format!("{:<10} its key is at {}", "root", outside.name()));
                    let made = outside.found(&**store, domain, lifetimes, now.into()).await;
                    made.map_err(|error| anyhow!("the first issuer cannot be had: {error}"))?
                }
            };
            match driver::found(&**store, &record).await {
                // Another replica that began at the same time was faster.
                Ok(()) | Err(DriverError::Exists) => certs::ca::outside::forget(&**store).await,
                Err(error) => return Err(error.into()),
            }
            opened().await?.with_context(|| format!("{} is empty again", store.name()))?
        }
    };
    let held = keeper.current().borrow().bundle().trust_domain.clone();
    if held != *domain {
        return Err(anyhow!(
            "{} holds the authority of {held}, and `trust_domain` is {domain}",
            store.name()
        ));
    }
    Ok(keeper)
}
