//! The registries of `config.yaml` as sources of discovery.

use std::sync::Arc;

use config::process::Process;
use discovery::Source;
pub use discovery::registries::BadSetting;
use discovery::rpc::client::Gate;
use discovery::rpc::proto;
use layers::vars::hostname;

use crate::instance::Instance;

/// How names are resolved.
pub fn names(process: &Process) -> discovery::dns::Settings {
    let dns = &process.dns;
    discovery::dns::Settings {
        servers: dns.servers.clone(),
        valid: dns.valid,
        timeout: dns.timeout,
        ipv6: dns.ipv6,
        search: dns.search,
        ..discovery::dns::Settings::default()
    }
}

/// The sources that can be asked. Nothing is asked yet. `gate` tells discovery servers what is in use here.
///
/// # Errors
/// A file or a variable that the settings name cannot be read.
pub fn sources(process: &Process, gate: Option<Arc<dyn Gate>>) -> Result<Vec<Arc<dyn Source>>, BadSetting> {
    let hello = || proto::Hello {
        name: Instance::starting(process).id,
        node: process.place.machine.clone().unwrap_or_else(|| hostname().to_owned()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    discovery::registries::sources(&process.discovery, &names(process), hello, gate)
}
