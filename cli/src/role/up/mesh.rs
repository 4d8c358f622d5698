//! The mesh of `postern up`: an authority and three sidecars, as processes of their own, and what they stand before.
//!
//! Their files are copied into the data directory, where they may be edited to try what happens; logs and process ids are
//! there too. All of them end when this process ends, however it ends.

use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::output;

/// The processes of the sample; sidecars with the admin interface of their sidecar.
const AUTHORITY: &str = "ca";
const SIDECARS: [(&str, u16); 3] = [("orders", 15121), ("payments-1", 15122), ("payments-2", 15123)];
/// Who gets a token.
const IDENTITIES: [&str; 3] = ["edge", "orders", "payments"];
/// A debug build on a busy machine may take this long to start.
const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(10);
const PACE: Duration = Duration::from_millis(50);

/// The processes.
pub(super) struct Mesh {
    dir: PathBuf,
    /// The authority, then the sidecars.
    children: Vec<(&'static str, Child)>,
}

impl Mesh {
    /// Starts everything that the files in `examples` describe, below `dir`.
    pub(super) fn start(examples: &Path, dir: &Path) -> Result<Self> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("{} cannot be made", dir.display()))?;
        let dir = fs::canonicalize(dir)?;
        let files = [AUTHORITY].into_iter().chain(SIDECARS.map(|(name, _)| name));
        for name in files {
            let file = format!("{name}.yaml");
            fs::copy(examples.join(&file), dir.join(&file))
                .with_context(|| format!("{} cannot be copied", examples.join(&file).display()))?;
        }
        let mut mesh = Self { dir, children: Vec::new() };
        mesh.spawn(AUTHORITY, &["ca", "run", "-c", "ca.yaml"])?;
        mesh.until(AUTHORITY, "the authority", || answers(15014, "/readyz"))?;
        for name in IDENTITIES {
            mesh.token(name)?;
        }
        for (name, _) in SIDECARS {
            mesh.spawn(name, &["sidecar", "-c", &format!("{name}.yaml")])?;
        }
        for (name, admin) in SIDECARS {
            mesh.until(name, "the sidecar", || answers(admin, "/status/ready"))?;
        }
        output::note(&format!(
            "an authority and {}, with their files and logs in {}",
            output::count(SIDECARS.len(), "sidecar"),
            mesh.dir.display()
        ));
        Ok(mesh)
    }

    /// Where the files are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    fn spawn(&mut self, name: &'static str, args: &[&str]) -> Result<()> {
        let log = fs::File::create(self.log(name)).context("a log cannot be written")?;
        let child = Command::new(std::env::current_exe()?)
            .args(args)
            .env(crate::ENDS_WITH_PARENT, "1")
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        fs::write(self.dir.join(format!("{name}.pid")), format!("{}\n", child.id()))?;
        self.children.push((name, child));
        Ok(())
    }

    /// Waits for one of them, and tells the end of its log where it ends instead.
    fn until(&mut self, name: &str, what: &str, is_ready: impl Fn() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !is_ready() {
            let child = self.children.iter_mut().find(|(known, _)| *known == name);
            let ended = child.map(|(_, child)| child.try_wait()).transpose()?.flatten();
            if ended.is_some() || begun.elapsed() > START {
                let log = fs::read_to_string(self.log(name)).unwrap_or_default();
                let told: Vec<_> = log.lines().rev().take(5).collect();
                let told: Vec<_> = told.into_iter().rev().collect();
                bail!(
                    "{what} {name} did not come up; the end of {}:\n{}",
                    self.log(name).display(),
                    told.join("\n")
                );
            }
            pause();
        }
        Ok(())
    }

    /// A token by which `name` joins.
    fn token(&self, name: &str) -> Result<()> {
        let identity = format!("spiffe://mesh.local/ns/default/sa/{name}");
        let made = Command::new(std::env::current_exe()?)
            .args(["ca", "token", "create", "-c", "ca.yaml", "--identity", &identity])
            .args(["--uses", "1000", "--ttl", "30d"])
            .current_dir(&self.dir)
            .output()?;
        if !made.status.success() {
            return Err(anyhow!("{}", String::from_utf8_lossy(&made.stderr).trim().to_owned()))
                .with_context(|| format!("no token for {identity}"));
        }
        let path = self.dir.join(format!("{name}.token"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        std::io::Write::write_all(&mut file.with_context(|| format!("{}", path.display()))?, &made.stdout)?;
        Ok(())
    }

    /// Ends them: sidecars first, which may still talk to the authority.
    pub(super) fn stop(self) {
        let (authority, sidecars): (Vec<_>, Vec<_>) =
            self.children.into_iter().partition(|(name, _)| *name == AUTHORITY);
        for mut group in [sidecars, authority] {
            for (_, child) in &group {
                let pid = i32::try_from(child.id()).ok().map(Pid::from_raw);
                // One that has ended by itself needs no signal.
                let _ = pid.map(|pid| kill(pid, Signal::SIGTERM));
            }
            for (name, child) in &mut group {
                let begun = Instant::now();
                while matches!(child.try_wait(), Ok(None)) {
                    if begun.elapsed() > END {
                        output::problem(&format!("{name} does not end and is killed"));
                        let _ = child.kill();
                    }
                    pause();
                }
                let _ = fs::remove_file(self.dir.join(format!("{name}.pid")));
            }
        }
    }
}

/// Between two looks at a process.
#[expect(clippy::disallowed_methods, reason = "no worker: this thread waits for processes")]
fn pause() {
    std::thread::sleep(PACE);
}

/// Whether somebody on loopback answers a GET with 200.
fn answers(port: u16, path: &str) -> bool {
    use std::io::{Read, Write};
    let ask = || {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        std::io::Result::Ok(head.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}
