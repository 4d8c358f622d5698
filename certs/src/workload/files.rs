//! An identity from files: a chain, its key and a bundle in PEM, which somebody else replaces.
//!
//! They are read every second and compared by content, so it does not matter whether they are written in place, renamed or
//! swapped by a link. What does not fit together yet is looked at again; what is in use stays until something better is
//! there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::plan::Plan;
use super::time::MeshTime;
use super::{Phase, Status};
use crate::ca::authority::{pem_certificates, pem_key};
use crate::identity::TrustDomain;
use crate::mesh::MeshIdentity;
use crate::svid::Svid;
use crate::trust::Trust;

const PERIOD: Duration = Duration::from_secs(1);
const LARGEST: u64 = 4 << 20;

/// Where the files are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The certificate, and those between it and a root.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Roots.
    pub bundle: PathBuf,
    pub trust_domain: TrustDomain,
}

/// Follows files. The last clone that is dropped ends it.
#[derive(Clone, Debug)]
pub struct Files {
    status: watch::Receiver<Status>,
    _task: Arc<Task>,
}

#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Files {
    /// Begins to keep `identity`. It has to judge by `time`: [`MeshIdentity::with_clock`].
    #[must_use]
    pub fn start(settings: Settings, identity: MeshIdentity, time: Arc<MeshTime>) -> Self {
        let (sender, status) = watch::channel(Status::default());
        let task =
            Follow { settings, identity, time, status: sender, bundle: None, leaf: None, generation: 0 };
        let task = tokio::spawn(task.run()).abort_handle();
        Self { status, _task: Arc::new(Task(task)) }
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

struct Contents {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    bundle: Vec<u8>,
}

struct Follow {
    settings: Settings,
    identity: MeshIdentity,
    time: Arc<MeshTime>,
    status: watch::Sender<Status>,
    /// What was taken.
    bundle: Option<Vec<u8>>,
    leaf: Option<(Vec<u8>, Zeroizing<Vec<u8>>)>,
    generation: u64,
}

impl Follow {
    async fn run(mut self) {
        loop {
            let settings = self.settings.clone();
            let read = tokio::task::spawn_blocking(move || read(&settings)).await;
            let looked = match read {
                Ok(Ok(contents)) => self.take(contents),
                Ok(Err(problem)) => Err(problem),
                Err(error) => Err(error.to_string()),
            };
            self.tell(looked);
            self.time.pause(PERIOD).await;
        }
    }

    /// Takes what is new; whether anything was.
    fn take(&mut self, contents: Contents) -> Result<bool, String> {
        let words = |what: &PathBuf, problem: String| format!("{}: {problem}", what.display());
        let settings = &self.settings;
        let mut news = false;
        if self.bundle.as_ref() != Some(&contents.bundle) {
            let roots = pem_certificates(&contents.bundle);
            let roots = roots.map_err(|error| words(&settings.bundle, error.to_string()))?;
            let generation = self.generation + 1;
            let trust = Trust::new(settings.trust_domain.clone(), generation);
            let trust = trust.with_roots(&settings.trust_domain, roots).map_err(|error| error.to_string());
            let taken =
                trust.and_then(|trust| self.identity.set_trust(trust).map_err(|error| error.to_string()));
            taken.map_err(|problem| words(&settings.bundle, problem))?;
            self.generation = generation;
            self.bundle = Some(contents.bundle);
            news = true;
        }
        let leaf = (contents.certificate, contents.key);
        if self.leaf.as_ref() != Some(&leaf) {
            let chain = pem_certificates(&leaf.0);
            let chain = chain.map_err(|error| words(&settings.certificate, error.to_string()))?;
            let key = pem_key(&leaf.1).map_err(|error| words(&settings.key, error.to_string()))?;
            let svid =
                Svid::new(chain, &key).map_err(|error| words(&settings.certificate, error.to_string()))?;
            let taken = self.identity.install(svid);
            taken.map_err(|error| words(&settings.certificate, error.to_string()))?;
            self.leaf = Some(leaf);
            news = true;
        }
        Ok(news)
    }

    fn tell(&self, looked: Result<bool, String>) {
        let (now, wall) = (self.time.now(), self.time.wall());
        let svid = self.identity.svid();
        self.status.send_modify(|status| {
            status.ticks += 1;
            match looked {
                Ok(taken) => {
                    status.last_error = None;
                    status.refused = None;
                    if taken {
                        status.renewals += 1;
                        status.last_success = Some(wall);
                        info!(generation = self.generation, "identity and roots were read from files");
                    }
                }
                Err(problem) => {
                    if status.refused.as_ref() != Some(&problem) {
                        warn!(%problem, "the files of the identity are not taken; what is in use stays");
                        status.failures += 1;
                        status.last_error = Some((wall, problem.clone()));
                        status.refused = Some(problem);
                    }
                }
            }
            status.bundle_generation = self.generation;
            if let Some(svid) = svid {
                let leaf = svid.leaf();
                let plan = Plan::new(
                    leaf.not_before,
                    leaf.not_after,
                    Duration::ZERO,
                    &mut fastrand::Rng::with_seed(0),
                );
                status.phase = plan.phase(now);
                status.identity = Some(svid.id().clone());
                status.serial = Some(leaf.serial.clone());
                status.issuer = Some(leaf.issuer.clone());
                status.not_after = Some(leaf.not_after);
            } else {
                status.phase = Phase::Waiting;
            }
        });
    }
}

fn read(settings: &Settings) -> Result<Contents, String> {
    use std::io::Read;
    let read = |path: &PathBuf, into: &mut Vec<u8>| {
        let file = std::fs::File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        file.take(LARGEST)
            .read_to_end(into)
            .map(|_| ())
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    let mut contents = Contents { certificate: Vec::new(), key: Zeroizing::default(), bundle: Vec::new() };
    read(&settings.bundle, &mut contents.bundle)?;
    read(&settings.certificate, &mut contents.certificate)?;
    read(&settings.key, &mut contents.key)?;
    Ok(contents)
}
