//! Programs of the system that change the network: found, run with a deadline, and what they say understood. They get
//! arguments and standard input, never a shell.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::CaptureError;

/// Longer than any of them takes, a lock of iptables included.
const LIMIT: Duration = Duration::from_secs(10);

/// Where they are, also for those whose PATH has no programs of the system.
const SYSTEM: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// A program that is there.
#[derive(Clone, Debug)]
pub struct Tool {
    name: &'static str,
    path: PathBuf,
}

impl Tool {
    /// Finds `name` on the PATH, and where the system has its programs.
    pub fn find(name: &'static str) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(SYSTEM.iter().map(PathBuf::from));
        let found = folders.filter(|folder| folder.is_absolute()).map(|folder| folder.join(name));
        found.into_iter().find(|path| is_program(path)).map(|path| Self { name, path })
    }

    /// Finds `name`, or says that it has to be installed.
    ///
    /// # Errors
    /// It is not there.
    pub fn need(name: &'static str, package: &'static str) -> Result<Self, CaptureError> {
        Self::find(name).ok_or(CaptureError::Missing { tool: name, package })
    }

    /// Runs it with `input` and gives what it said.
    ///
    /// # Errors
    /// It cannot be run, does not end, or refuses; what it said then is told.
    pub async fn run(&self, arguments: &[&str], input: &str) -> Result<String, CaptureError> {
        let failed = |error| CaptureError::Run { tool: self.name, error };
        let mut child = Command::new(&self.path)
            .args(arguments)
            // Messages are read: they have to be in one language.
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let work = async {
            if let Some(mut stdin) = child.stdin.take() {
                // A program that ends before it has read everything says why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let output = match timeout(LIMIT, work).await {
            Ok(output) => output.map_err(failed)?,
            Err(_) => return Err(CaptureError::TimedOut { tool: self.name, limit: LIMIT }),
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(CaptureError::Refused { tool: self.name, next: advice(&said), said })
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// What to do about what a tool said.
fn advice(said: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&["Operation not permitted", "Permission denied", "must be root"]) {
        super::NEED_PRIVILEGE
    } else if says(&[
        "cache initialization failed",
        "Protocol not supported",
        "not supported",
        "No such file",
    ]) {
        "the kernel lacks a part of netfilter: load nf_tables, nft_nat, nft_redir, nft_fib_inet (and nft_tproxy for TPROXY), \
         try `--with iptables`, or use explicit mode, which needs none of it"
    } else if says(&["xtables lock"]) {
        "another program changes iptables: try again"
    } else {
        "nothing was changed; `postern sidecar capture print` shows what was asked for"
    }
}
