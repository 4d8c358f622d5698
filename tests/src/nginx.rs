//! A real nginx as upstream, with a prefix folder and a port of its own.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::eventually;
use crate::ports::Port;
use crate::process::Process;

#[derive(Debug)]
pub struct Nginx {
    pub port: Port,
    process: Process,
    folder: TempDir,
}

impl Nginx {
    /// Starts nginx with `server` as the inside of its one server block (`location`s and settings).
    pub async fn start(server: &str) -> Nginx {
        let port = Port::free();
        let folder = tempfile::Builder::new().prefix("postern-nginx-").tempdir().expect("a folder");
        for name in ["logs", "html", "temp"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder of nginx");
        }
        let config = format!(
            "daemon off; master_process off; pid nginx.pid; error_log stderr;\n\
             events {{ worker_connections 1024; }}\n\
             http {{\n\
               access_log logs/access.log;\n\
               client_body_temp_path temp/body; proxy_temp_path temp/proxy; fastcgi_temp_path temp/fastcgi;\n\
               uwsgi_temp_path temp/uwsgi; scgi_temp_path temp/scgi;\n\
               server {{ listen {}; root html; {server} }}\n\
             }}\n",
            port.addr()
        );
        std::fs::write(folder.path().join("nginx.conf"), config).expect("the configuration of nginx");
        let prefix = folder.path().display().to_string();
        let args = ["-p", &prefix, "-c", "nginx.conf", "-e", "stderr"].map(str::to_owned);
        let process = Process::start(program(), &args, &[], folder.path(), &folder.path().join("output"));
        let nginx = Nginx { port, process, folder };
        eventually("nginx listens", || async {
            tokio::net::TcpStream::connect(nginx.port.addr()).await.ok().map(drop)
        })
        .await;
        nginx
    }

    /// Puts a file under the document root.
    pub fn file(&self, name: &str, content: &[u8]) {
        std::fs::write(self.folder.path().join("html").join(name), content).expect("a file for nginx");
    }

    pub fn upstream(&self) -> Value {
        json!({"type": "roundrobin", "nodes": {self.port.addr().to_string(): 1}})
    }

    /// What nginx wrote to its error log.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

fn program() -> &'static Path {
    // Not in the PATH of ordinary users on Debian.
    let debian = Path::new("/usr/sbin/nginx");
    if debian.exists() { debian } else { Path::new("nginx") }
}
