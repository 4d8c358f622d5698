//! Where an authority keeps what it must not lose: in its data directory, or where several replicas share it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use certs::ca::store::Store;
use certs::ca::store::consul_kv::{self, ConsulKv};
use certs::ca::store::embedded::Embedded;
use certs::ca::store::etcd::{self, Etcd};
use config::ca::{Ca as Settings, ConsulStore, EtcdStore};

/// The name of a process that shares with nobody.
const ALONE: &str = "local";
/// The file in the data directory with the name of this replica.
const REPLICA: &str = "replica";

/// The store of the settings.
pub(super) fn open(settings: &Settings) -> Result<Arc<dyn Store>> {
    Ok(match (&settings.store.etcd, &settings.store.consul) {
        (Some(given), _) => Arc::new(etcd(given)?),
        (None, Some(given)) => Arc::new(consul(given)?),
        (None, None) => Arc::new(Embedded::open(&settings.data_dir.join("store"))?),
    })
}

fn etcd(given: &EtcdStore) -> Result<Etcd> {
    let password =
        given.password_file.as_deref().map(secret).transpose().context("store.etcd.password_file")?;
    Ok(Etcd::new(etcd::Settings {
        endpoints: given.endpoints.clone(),
        prefix: given.prefix.clone(),
        user: given.user.clone().zip(password),
        timeout: Duration::from_secs(given.timeout.into()),
        tls: etcd::Tls {
            ca: given.ca_file.clone(),
            identity: given.certificate_file.clone().zip(given.key_file.clone()),
            server_name: None,
        },
    })?)
}

fn consul(given: &ConsulStore) -> Result<ConsulKv> {
    let token = given.token_file.as_deref().map(secret).transpose().context("store.consul.token_file")?;
    Ok(ConsulKv::new(consul_kv::Settings {
        server: given.server.clone(),
        prefix: given.prefix.clone(),
        token,
        datacenter: given.datacenter.clone(),
        timeout: Duration::from_secs(given.timeout.into()),
        ca: given.ca_file.clone(),
    })?)
}

fn secret(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(text.trim().to_owned())
}

/// The name of this process among replicas, which is the same over a restart.
pub(super) fn replica(settings: &Settings) -> Result<String> {
    if let Some(name) = &settings.replica {
        return Ok(name.clone());
    }
    if !settings.store.is_shared() {
        return Ok(ALONE.to_owned());
    }
    let path = settings.data_dir.join(REPLICA);
    let told = || format!("the name of this replica in {}", path.display());
    match fs::read_to_string(&path) {
        Ok(name) => Ok(name.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let host = nix::unistd::gethostname().unwrap_or_default();
            let host: String =
                host.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).take(40).collect();
            // Two on one machine have two names.
            let name = format!("{host}-{:06x}", fastrand::u32(..0x100_0000));
            fs::write(&path, &name).with_context(told)?;
            Ok(name)
        }
        Err(error) => Err(error).with_context(told),
    }
}
