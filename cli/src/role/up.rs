//! `postern up`: the gateway with sample routes and two sample upstreams, to try it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use config::env::ProcessEnv;
use config::process::{Process, Provider};

use crate::output;
use crate::role::{edge as role, sample};

/// The sample upstreams, at the ports that the sample configuration names.
const SAMPLES: [(&str, u16); 2] = [("one", 1980), ("two", 1981)];

/// Arguments of `postern up`.
#[derive(Args)]
pub struct Up {
    /// The directory of the sample configuration.
    #[arg(short, long, value_name = "DIR", default_value = "examples/quickstart")]
    config: PathBuf,
}

impl Up {
    /// Runs the role.
    pub fn run(self) -> Result<ExitCode> {
        if !self.config.join("apisix.yaml").exists() {
            bail!(
                "there is no sample in {}: run this in the repository, or name a directory with --config",
                self.config.display()
            );
        }
        let process = match Process::load(&self.config, &ProcessEnv) {
            Ok(process) => process,
            Err(errors) => bail!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        };
        if !matches!(process.provider, Provider::Embedded) {
            bail!("the sample needs the embedded store: write `deployment.role: traditional` and no etcd");
        }
        let added =
            edge::seed::seed(&process, &self.config.join("apisix.yaml")).context("the sample routes")?;
        output::note(&format!(
            "{} of {} added to the store",
            output::count(added, "object"),
            self.config.display()
        ));
        let upstreams = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        for (name, port) in SAMPLES {
            upstreams.block_on(sample::serve(name, SocketAddr::from((Ipv4Addr::LOCALHOST, port))))?;
        }
        role::serve(process, Some(Box::new(try_it)))
    }
}

/// Prints what to try.
fn try_it(addresses: &edge::app::Addresses) {
    let at = |address: Option<SocketAddr>| address.map_or_else(|| "127.0.0.1:9080".to_owned(), loopback);
    let http = at(addresses.http.first().copied());
    let admin = at(addresses.admin);
    let key =
        addresses.admin_key.as_deref().unwrap_or(Path::new("postern-data/admin.key")).display().to_string();
    output::line(format_args!(
        "\nTry, in another terminal:\n\n\
         # a route of the sample file: the path is rewritten, the answer gets a header\n\
         curl -i http://{http}/hello/postern\n\n\
         # a new route by the Admin API\n\
         curl -i -X PUT http://{admin}/apisix/admin/routes/new -H \"X-API-KEY: $(cat {key})\" -d '{{\"uri\": \"/new\", \"upstream_id\": \"samples\"}}' && curl -i http://{http}/new\n\n\
         # balancing: weights 3 and 1\n\
         for i in 1 2 3 4; do curl -s http://{http}/balance | grep '\"upstream\"'; done\n\n\
         Ctrl-C stops everything.\n"
    ));
}

/// An address that curl on this machine reaches.
fn loopback(address: SocketAddr) -> String {
    if address.ip().is_unspecified() { format!("127.0.0.1:{}", address.port()) } else { address.to_string() }
}
