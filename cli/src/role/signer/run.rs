//! `postern signer run`: the signer as a process.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use certs::ca::audit::Audit;
use certs::ca::limits::Rate;
use certs::grpc;
use certs::signer::access::{Clients, Rule};
use certs::signer::service::Limits;
use certs::signer::tls::{Files, NodeTls};
use certs::signer::{Journal, KeyStore, Service};
use clap::Args;
use config::signer::Signer as Settings;
use tokio::net::TcpListener;

use super::status::Told;
use super::{Place, sealer, settings};
use crate::observed;
use crate::output;
use crate::runtime::{self, Stop};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(1);
/// Between two writes of the audit log.
const WRITE: Duration = Duration::from_secs(5);
/// What signatures under way get after a stop.
const LAST: Duration = Duration::from_secs(10);
/// What the last answers get to leave.
const LEAVE: Duration = Duration::from_millis(200);
/// Calls at a time on one connection; those of a gateway share a few.
const CALLS: u32 = 4096;

/// Arguments of `postern signer run`.
#[derive(Args)]
#[command(after_help = "signer.yaml, with files beside it:\n\n  \
    listen: 0.0.0.0:7443\n  \
    keys_dir: keys                      # shop.pem or shop.sealed is the key `shop`; nobody else may read it\n  \
    tls: {cert_file: signer.pem, key_file: signer.key, client_ca_file: gateways-ca.pem}\n  \
    clients: [{name: gateway.internal, keys: [\"*\"]}]\n\n\
    config.yaml of the gateway that has the certificate gateway.internal:\n\n  \
    postern:\n    \
      signers:\n      \
      - {name: main, nodes: [\"signer-1:7443\", \"signer-2:7443\"],\n         \
         cert_file: gateway.pem, key_file: gateway.key, ca_file: signers-ca.pem}\n\n\
    and its `ssl` resource:\n\n  \
    {\"snis\": [\"shop.example.com\"], \"cert\": \"-----BEGIN CERTIFICATE-----...\", \"key\": \"signer://main/shop\"}\n\n\
    SIGTERM finishes what is under way; gateways ask another node meanwhile.")]
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
        crate::logging::start_at("info");
        runtime::serve("signer", serve(settings))
    }
}

fn limits(settings: &Settings) -> Limits {
    let given = &settings.limits;
    let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    let rate = f64::from(given.signatures_per_second);
    Limits {
        signers: given
            .at_once
            .map_or_else(|| std::thread::available_parallelism().map_or(2, usize::from), count),
        queue: count(given.queue),
        rate: Rate { per_second: rate, burst: rate },
    }
}

fn service(settings: &Settings) -> Result<Service> {
    let rules = settings.clients.iter().enumerate().map(|(index, client)| {
        let rule = Rule::new(&client.name, client.keys.iter().map(String::as_str));
        rule.with_context(|| format!("clients[{index}].name: {}", client.name))
    });
    let clients = Clients::new(rules.collect::<Result<_>>()?);
    let sealer = sealer(settings).context("seal")?;
    let keys = KeyStore::open(&settings.keys_dir, sealer)
        .context("keys_dir: make the directory and put NAME.pem into it, mode 600")?;
    let audit = Audit::open(&settings.audit_log, SystemTime::now()).context("audit_log")?;
    Ok(Service::new(Arc::new(keys), clients, Arc::new(Journal::new(audit)), limits(settings)))
}

/// What there is to sign with, told at the start.
fn tell_keys(service: &Service) {
    let shown = service.keys().shown();
    let signing: Vec<&str> =
        shown.iter().filter(|key| key.public_key.is_some()).map(|key| key.name.as_str()).collect();
    for key in &shown {
        if let Some(problem) = &key.problem {
            output::problem(&format!("{}: {problem}", key.path.display()));
        }
    }
    let names =
        if signing.is_empty() { "none yet: put NAME.pem there".to_owned() } else { signing.join(", ") };
    output::note(&format!("{:<8} {names}", "keys"));
}

async fn serve(settings: Settings) -> Result<()> {
    let mut stop = Stop::listen()?;
    let files = Files {
        certificate: settings.tls.cert_file.clone(),
        key: settings.tls.key_file.clone(),
        client_ca: settings.tls.client_ca_file.clone(),
    };
    let tls = NodeTls::open(files).map_err(|error| anyhow!("tls: {error}"))?;
    let service = service(&settings)?;
    let bind = |address| async move {
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
    };
    let listener = bind(settings.listen().context("listen")?).await?;
    let watched = match settings.status() {
        None => None,
        Some(address) => Some(bind(address).await?),
    };
    service.journal().event("start", SystemTime::now())?;
    tell_keys(&service);
    output::note(&format!("{:<8} {}", "signer", listener.local_addr()?));
    if let Some(listener) = &watched {
        output::note(&format!("{:<8} http://{}/status", "status", listener.local_addr()?));
    }
    let connections = usize::try_from(settings.limits.connections).unwrap_or(usize::MAX);
    let limits = grpc::Limits { connections, calls: CALLS };
    let config = tls.config().map_err(|error| anyhow!("tls: {error}"))?;
    let serving = grpc::serve(listener, Some(config), limits, service.server());
    let observing = async {
        match watched {
            Some(listener) => observed::serve(listener, Told(service.clone())).await,
            None => std::future::pending().await,
        }
    };
    let stopping = async {
        stop.told().await;
        service.stop(LAST).await;
        tokio::time::sleep(LEAVE).await;
    };
    tokio::select! {
        () = serving => {}
        () = observing => {}
        () = looking(&service, &tls) => {}
        () = writing(&service) => {}
        () = stopping => {}
    }
    service.journal().event("stop", SystemTime::now())?;
    Ok(service.journal().write(SystemTime::now())?)
}

/// Reads files that change.
async fn looking(service: &Service, tls: &Arc<NodeTls>) {
    let mut told = false;
    loop {
        tokio::time::sleep(LOOK).await;
        let (keys, tls) = (Arc::clone(service.keys()), Arc::clone(tls));
        let looked = tokio::task::spawn_blocking(move || {
            tls.reload();
            keys.reload()
        });
        let wrong = looked.await.ok().and_then(Result::err);
        if let Some(error) = wrong.as_ref().filter(|_| !told) {
            tracing::warn!(%error, "the keys stay as they were");
        }
        told = wrong.is_some();
    }
}

/// Writes down what was signed and refused.
async fn writing(service: &Service) {
    loop {
        tokio::time::sleep(WRITE).await;
        let journal = Arc::clone(service.journal());
        let written = tokio::task::spawn_blocking(move || journal.write(SystemTime::now())).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%error, "signatures go on, and are written down when that is possible again");
        }
    }
}
