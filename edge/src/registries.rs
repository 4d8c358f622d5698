//! The registries of `config.yaml` as sources of discovery.

use std::sync::Arc;

use config::process::Process;
use discovery::Source;
pub use discovery::registries::BadSetting;
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

/// The sources that can be asked. Nothing is asked yet.
///
/// # Errors
/// A file or a variable that the settings name cannot be read.
pub fn sources(process: &Process) -> Result<Vec<Arc<dyn Source>>, BadSetting> {
    discovery::registries::sources(&process.discovery, &names(process), || proto::Hello {
        name: Instance::starting(process).id,
        node: process.place.machine.clone().unwrap_or_else(|| hostname().to_owned()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
