//! `postern up`: the gateway with sample routes, and a small mesh behind it, to try them.

mod mesh;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use config::env::{Env, ProcessEnv};
use config::process::{Process, Provider};

use self::mesh::Mesh;
use crate::output;
use crate::role::{edge as role, sample};

/// The sample services at the ports that the sample files name, and what they ask.
const SAMPLES: [(&str, u16, Option<u16>); 2] = [("one", 1980, None), ("two", 1981, None)];
const MESHED: [(&str, u16, Option<u16>); 3] =
    [("orders", 1983, Some(15191)), ("payments-1", 1984, None), ("payments-2", 1985, None)];

/// The variable by which `config.yaml` finds the files of the mesh.
const MESH_DIR: &str = "POSTERN_MESH_DIR";

/// Arguments of `postern up`.
#[derive(Args)]
pub struct Up {
    /// The directory of the sample configuration. With `ca.yaml` in it there is a mesh too; `examples/quickstart` is the
    /// gateway alone.
    #[arg(short, long, value_name = "DIR", default_value = "examples/mesh")]
    config: PathBuf,
}

/// The environment, and where the mesh is.
struct Overlay(PathBuf);

impl Env for Overlay {
    fn var(&self, name: &str) -> Option<String> {
        if name == MESH_DIR { self.0.to_str().map(str::to_owned) } else { ProcessEnv.var(name) }
    }
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
        let mut process = self.load(&ProcessEnv)?;
        if !matches!(process.provider, Provider::Embedded) {
            bail!("the sample needs the embedded store: write `deployment.role: traditional` and no etcd");
        }
        let services = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let start = |samples: &[(&'static str, u16, Option<u16>)]| {
            let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            samples.iter().try_for_each(|(name, port, other)| {
                services.block_on(sample::serve(name, at(*port), other.map(at)))
            })
        };
        start(&SAMPLES)?;
        let mut running = None;
        if self.config.join("ca.yaml").exists() {
            start(&MESHED)?;
            let mesh = Mesh::start(&self.config, &process.data_dir.join("mesh"))?;
            process = self.load(&Overlay(mesh.dir().to_owned()))?;
            running = Some(mesh);
        }
        let result = self.serve(process, running.as_ref().map(|mesh| mesh.dir().to_owned()));
        // Sidecars end when their applications have gone.
        services.shutdown_timeout(Duration::ZERO);
        if let Some(mesh) = running {
            mesh.stop();
        }
        result
    }

    fn load(&self, env: &dyn Env) -> Result<Process> {
        match Process::load(&self.config, env) {
            Ok(process) => Ok(process),
            Err(errors) => bail!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        }
    }

    fn serve(&self, process: Process, mesh: Option<PathBuf>) -> Result<ExitCode> {
        let added =
            edge::seed::seed(&process, &self.config.join("apisix.yaml")).context("the sample routes")?;
        output::note(&format!(
            "{} of {} added to the store",
            output::count(added, "object"),
            self.config.display()
        ));
        role::serve(process, Some(Box::new(move |addresses| try_it(addresses, mesh.as_deref()))))
    }
}

/// Prints what to try.
fn try_it(addresses: &edge::app::Addresses, mesh: Option<&Path>) {
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
         for i in 1 2 3 4; do curl -s http://{http}/balance | grep '\"upstream\"'; done\n"
    ));
    if let Some(dir) = mesh {
        try_mesh(&http, dir);
    }
    output::line(format_args!("Ctrl-C stops everything."));
}

fn try_mesh(http: &str, dir: &Path) {
    let postern = std::env::current_exe().unwrap_or_else(|_| "postern".into());
    let (postern, dir) = (near(&postern), near(dir));
    let socket = format!("--socket {dir}/ca/operators.sock");
    output::line(format_args!(
        "# into the mesh: edge -> sidecar of orders -> orders -> its sidecar -> sidecar of payments -> payments, all of it\n\
         # mTLS between sidecars; the headers tell who called whom\n\
         curl -s http://{http}/orders\n\n\
         # deny by policy: payments lets nobody in but `nobody`; its answer is 403 now. Then take it back\n\
         sed -i 's|sa/orders|sa/nobody|' {dir}/payments-?.yaml && sleep 2 && curl -s http://{http}/orders | grep '\"status\"'\n\
         sed -i 's|sa/nobody|sa/orders|' {dir}/payments-?.yaml\n\n\
         # exchange every certificate, the root included, while requests go on\n\
         {postern} certs status {socket}\n\
         {postern} certs rotate root --soak 2s --spread 3s {socket}\n\n\
         # kill a node: the other one takes over\n\
         kill $(cat {dir}/payments-1.pid); for i in 1 2 3 4; do curl -s http://{http}/orders | grep payments-; done\n"
    ));
}

/// A path as it is typed here.
fn near(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

/// An address that curl on this machine reaches.
fn loopback(address: SocketAddr) -> String {
    if address.ip().is_unspecified() { format!("127.0.0.1:{}", address.port()) } else { address.to_string() }
}
