//! The registries of a configuration as sources.
//!
//! One arm for each kind, in the order in which they are listed in `config`. DNS is there whether it is configured or
//! not, with the servers that resolve the names of nodes.

use std::fmt;
use std::sync::Arc;

use config::discovery::Discovery as Written;
use config::env::{Env, ProcessEnv};

use crate::dns::{self, Dns};
use crate::eureka::Eureka;
use crate::file::File;
use crate::nacos::Nacos;
use crate::rpc::{client, proto};
use crate::{Source, consul, consul_kv, kubernetes};

/// A setting that cannot work here.
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

/// The sources that can be asked; `names` says how names are resolved, `hello` who asks a discovery server, and
/// `gate` when what it told is in use. Nothing is asked yet.
///
/// # Errors
/// A file or a variable that the settings name cannot be read.
pub fn sources(
    written: &Written,
    names: &dns::Settings,
    hello: impl FnOnce() -> proto::Hello,
    gate: Option<Arc<dyn client::Gate>>,
) -> Result<Vec<Arc<dyn Source>>, BadSetting> {
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
        Some(written) => dns::Settings { ipv6: names.ipv6, ..written.into() },
        None => names.clone(),
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
        let servers = client::Settings::new(settings, hello()).map_err(bad("postern"))?;
        sources.extend(client::sources(client::Settings { gate, ..servers }));
    }
    Ok(sources)
}
