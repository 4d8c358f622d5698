//! The registries of `config.yaml` as sources of discovery.
//!
//! One arm for each kind, in the order in which they are listed in `config`. DNS is there whether it is configured or
//! not, with the servers that resolve the names of nodes.

use std::fmt;
use std::sync::Arc;

use config::env::{Env, ProcessEnv};
use config::process::Process;
use discovery::dns::Dns;
use discovery::eureka::Eureka;
use discovery::file::File;
use discovery::nacos::Nacos;
use discovery::rpc::{client, proto};
use discovery::{Source, consul, consul_kv, kubernetes};
use layers::vars::hostname;

use crate::instance::Instance;

/// A setting of `config.yaml` that cannot work here.
#[derive(Debug)]
pub struct BadSetting {
    /// Its key.
    pub setting: String,
    /// What is wrong and what to write instead.
    pub problem: String,
}

impl fmt::Display for BadSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.problem)
    }
}

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
    let written = &process.discovery;
    let bad = |setting: &str| {
        let setting = format!("discovery.{setting}");
        move |problem| BadSetting { setting, problem }
    };
    let mut sources: Vec<Arc<dyn Source>> = Vec::new();
    if let Some(settings) = &written.consul {
        sources.extend(consul::sources(settings).map_err(bad("consul"))?);
    }
    if let Some(settings) = &written.consul_kv {
        sources.extend(consul_kv::sources(settings).map_err(bad("consul_kv"))?);
    }
    let dns = match written.dns.as_deref() {
        Some(written) => discovery::dns::Settings { ipv6: process.dns.ipv6, ..written.into() },
        None => names(process),
    };
    sources.push(Arc::new(Dns::services(dns)));
    if let Some(settings) = &written.eureka {
        sources.push(Arc::new(Eureka::new(settings).map_err(bad("eureka"))?));
    }
    if let Some(settings) = &written.file {
        sources.push(Arc::new(File::new(settings)));
    }
    if let Some(settings) = &written.kubernetes {
        let clusters = kubernetes::sources(settings, |name| ProcessEnv.var(name));
        sources.extend(clusters.map_err(|(index, problem)| bad(&format!("kubernetes.{index}"))(problem))?);
    }
    if let Some(settings) = &written.nacos {
        sources.push(Arc::new(Nacos::new(settings).map_err(bad("nacos"))?));
    }
    if let Some(settings) = &written.postern {
        let hello = proto::Hello {
            name: Instance::starting(process).id,
            node: process.place.machine.clone().unwrap_or_else(|| hostname().to_owned()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let servers = client::Settings::new(settings, hello).map_err(bad("postern"))?;
        sources.extend(client::sources(servers));
    }
    Ok(sources)
}
