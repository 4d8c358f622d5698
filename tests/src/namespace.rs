//! Network namespaces of a test's own: a machine each, which may be joined by a cable. They need root; where they cannot be
//! had a test says so and is skipped. Everything in one ends with it.

use std::fs::File;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getpid, gettid};
use tokio::task::LocalSet;

/// A network namespace with loopback up.
pub struct Namespace {
    path: PathBuf,
    /// The thread that keeps it ends with this.
    leave: Option<mpsc::Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A new one, or why there is none.
    pub fn new() -> Result<Namespace, String> {
        let (told, tell) = mpsc::channel();
        let (leave, left) = mpsc::channel();
        let keeper = std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET)
                .map(|()| format!("/proc/{}/task/{}/ns/net", getpid(), gettid()));
            let stays = made.is_ok();
            let _ = told.send(made);
            if stays {
                let _ = left.recv();
            }
        });
        let made = tell.recv().expect("the keeper's word");
        let path =
            made.map_err(|error| format!("network namespaces cannot be had here ({error}); they need root"))?;
        let namespace = Namespace { path: path.into(), leave: Some(leave), keeper: Some(keeper) };
        namespace.sh("ip link set lo up");
        Ok(namespace)
    }

    /// By which others enter it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` inside, on a thread and a runtime of its own, and gives what it gives.
    pub fn run<T, F>(&self, work: impl FnOnce() -> F + Send) -> T
    where
        T: Send,
        F: Future<Output = T>,
    {
        self.enter(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            LocalSet::new().block_on(&runtime, work())
        })
    }

    /// Runs `work` inside, on a thread of its own. Processes that it starts are inside too.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let file = File::open(&self.path).expect("the namespace");
                setns(file, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a command line inside, which has to succeed, and gives what it says.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let output = self.try_sh(line);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "`{line}`: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    /// Runs a command line inside.
    pub fn try_sh(&self, line: &str) -> Output {
        self.enter(|| Command::new("bash").args(["-c", line]).output().expect("bash"))
    }

    /// A cable to another machine: 10.9.0.1 and fd09::1 here, 10.9.0.2 and fd09::2 there, each the other's way out.
    pub fn join(&self, other: &Namespace) {
        self.sh(&format!("ip link add cable type veth peer name cable netns {}", other.path().display()));
        for (namespace, own, far) in [(self, 1, 2), (other, 2, 1)] {
            namespace.sh(&format!(
                "ip address add 10.9.0.{own}/24 dev cable && ip address add fd09::{own}/64 dev cable nodad && \
                 ip link set cable up && ip route add default via 10.9.0.{far} && ip -6 route add default via fd09::{far}"
            ));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.leave.take());
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}
