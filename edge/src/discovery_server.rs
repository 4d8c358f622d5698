//! A discovery server as a process: the registries of `config.yaml`, watched for many clients.
//!
//! A process of its own, so that thousands of clients that come back at once cost no gateway a request, and gateways
//! come and go without them. It keeps nothing but the last good endpoints, in the data directory.

use std::net::SocketAddr;
use std::time::Duration;

use certs::grpc;
use config::process::Process;
use discovery::Discovery;
use discovery::rpc::server::{Limits, Server};
use tokio::net::TcpListener;
use tokio::runtime::Builder;

use crate::app::{StartError, Stop, harden};
use crate::registries;

/// Serves until it is told to stop. `ready` is told the address, once.
///
/// # Errors
/// A setting cannot work, or the address is taken.
pub fn run(process: Process, ready: impl FnOnce(SocketAddr)) -> Result<(), StartError> {
    harden();
    let runtime = Builder::new_multi_thread()
        .thread_name("discovery")
        .enable_all()
        .build()
        .map_err(StartError::system("the runtime cannot be started"))?;
    let result = runtime.block_on(serve(&process, ready));
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

async fn serve(process: &Process, ready: impl FnOnce(SocketAddr)) -> Result<(), StartError> {
    const KEY: &str = "postern.discovery_server";
    let Some(settings) = &process.discovery_server else {
        return Err(StartError::setting(KEY, "missing: write `listen: 127.0.0.1:7900` below it"));
    };
    let mut stop = Stop::listen()?;
    let sources =
        registries::sources(process, None).map_err(|bad| StartError::setting(bad.setting, bad.problem))?;
    let tls = match &settings.identity {
        None => None,
        Some((certificate, key)) => {
            let config = grpc::server_tls(certificate, key, settings.client_ca.as_deref());
            Some(config.map_err(|problem| StartError::setting(format!("{KEY}.tls"), problem))?)
        }
    };
    let listener = TcpListener::bind(settings.listen).await;
    let listener = listener.map_err(StartError::system(format!("cannot listen on {}", settings.listen)))?;
    let address = listener.local_addr().map_err(StartError::system("a socket without an address"))?;
    let discovery = Discovery::new(
        tokio::runtime::Handle::current(),
        discovery::Settings {
            dns: registries::names(process),
            sources,
            data_dir: Some(process.data_dir.clone()),
            ..discovery::Settings::default()
        },
    );
    let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    let limits = Limits {
        clients: count(settings.clients),
        subscriptions: count(settings.services),
        drains: settings.drains,
        ..Limits::default()
    };
    ready(address);
    tokio::select! {
        () = Server::new(discovery, limits).serve(listener, tls) => {}
        // Clients go to another server, or wait for this one with what they have.
        () = stop.told() => {}
    }
    Ok(())
}
