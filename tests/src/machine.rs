//! Machines with a network of their own (see [`Namespace`]): what runs on one listens and connects there. A process that is
//! started there is there too.

use std::fs::File;

use nix::sched::{CloneFlags, setns};
use tokio::runtime::{Builder, Runtime};

use crate::namespace::Namespace;

/// One machine.
pub struct Machine {
    runtime: Option<Runtime>,
    pub namespace: Namespace,
}

impl Machine {
    /// Two that are joined by a cable: 10.9.0.1 and fd09::1, 10.9.0.2 and fd09::2. A word and none where that may not be.
    pub fn pair() -> Option<[Machine; 2]> {
        let made = Machine::new().and_then(|one| Ok([one, Machine::new()?]));
        match made {
            Ok([one, two]) => {
                one.namespace.join(&two.namespace);
                Some([one, two])
            }
            Err(why) => {
                eprintln!("skipped: {why}");
                None
            }
        }
    }

    fn new() -> Result<Machine, String> {
        let namespace = Namespace::new()?;
        let path = namespace.path().to_owned();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || {
                let file = File::open(&path).expect("the namespace");
                setns(file, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
            })
            .build()
            .expect("a runtime");
        Ok(Machine { runtime: Some(runtime), namespace })
    }

    /// Runs `work` on this machine, and gives what it gives.
    pub async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let runtime = self.runtime.as_ref().expect("a machine that runs");
        runtime.spawn(work).await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("{error}"),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting is not for a thread that runs tests.
            runtime.shutdown_background();
        }
    }
}
