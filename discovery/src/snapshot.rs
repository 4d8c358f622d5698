//! The last good instances of each service on disk, for a start while a registry is away.
//!
//! A file for each service, so that a change of one writes one and a start reads what it needs. Changes are collected
//! for a second and written on the blocking pool, beside the old file and renamed over it, readable by the owner alone.
//! A file that is damaged, of another version or of another service is set aside with a warning; nothing here is fatal.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::time::sleep;

use crate::follow::{Held, Service};
use crate::source::{Details, Health, Instance};
use crate::{Node, views};

/// Changes with the format.
const VERSION: u32 = 1;
/// A larger file is not one of ours, and one that would become larger is not written.
const MAX_FILE: u64 = 64 << 20;
/// How long changes are collected.
const DELAY: Duration = Duration::from_secs(1);
/// A service that nobody has followed for this long is forgotten.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Letters of a name that the name of its file shows.
const SHOWN: usize = 80;

/// The directory of all files.
#[derive(Debug)]
pub(crate) struct Snapshots {
    directory: PathBuf,
    runtime: Handle,
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    /// By file; the newest wins.
    jobs: HashMap<String, Job>,
    /// A task collects and writes.
    writing: bool,
    /// Old files were looked for.
    swept: bool,
}

#[derive(Debug)]
struct Job {
    service: Arc<Service>,
    instances: Arc<[Held]>,
    at: SystemTime,
}

#[derive(Serialize)]
struct Head<'a> {
    version: u32,
    kind: &'a str,
    registry: &'a str,
    service: &'a str,
    args: &'a BTreeMap<Arc<str>, Arc<str>>,
    confirmed: f64,
    instances: Vec<Entry>,
}

#[derive(Deserialize)]
struct Content {
    version: u32,
    kind: String,
    registry: String,
    service: String,
    args: BTreeMap<Arc<str>, Arc<str>>,
    confirmed: f64,
    instances: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    id: Arc<str>,
    host: Arc<str>,
    port: u16,
    weight: u32,
    priority: i32,
    health: Health,
    first_seen: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    details: Option<Arc<Details>>,
}

impl Entry {
    fn of(held: &Held) -> Self {
        let Instance { id, node, health, details } = &held.instance;
        Self {
            id: id.clone(),
            host: node.host.clone(),
            port: node.port,
            weight: node.weight,
            priority: node.priority,
            health: *health,
            first_seen: views::unix(held.first_seen),
            details: details.clone(),
        }
    }

    fn held(self) -> Held {
        let Self { id, host, port, weight, priority, health, first_seen, details } = self;
        let instance = Instance { id, node: Node { host, port, weight, priority }, health, details };
        Held::new(instance, time(first_seen))
    }
}

/// Seconds since 1970 as a time; what makes no sense is then.
fn time(seconds: f64) -> SystemTime {
    let since = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Snapshots {
    /// The files in `data_dir/discovery`. Nothing is read or written yet.
    pub(crate) fn new(runtime: Handle, data_dir: &Path) -> Self {
        Self { directory: data_dir.join("discovery"), runtime, pending: Mutex::default() }
    }

    /// What was kept of a service, and when it was last confirmed.
    pub(crate) async fn read(&self, service: Arc<Service>) -> Option<(Vec<Held>, SystemTime)> {
        let path = self.directory.join(file_name(&service));
        let read = self.runtime.spawn_blocking(move || match read(&path, &service) {
            Ok(found) => found,
            Err(error) => {
                let aside = path.with_extension("damaged");
                let moved = fs::rename(&path, &aside).is_ok();
                tracing::warn!(path = %path.display(), %error, moved, "kept endpoints cannot be used");
                None
            }
        });
        read.await.ok().flatten()
    }

    /// Has these written soon.
    pub(crate) fn write(self: &Arc<Self>, service: &Arc<Service>, instances: Arc<[Held]>) {
        let job = Job { service: Arc::clone(service), instances, at: SystemTime::now() };
        let mut pending = self.pending();
        pending.jobs.insert(file_name(service), job);
        if !std::mem::replace(&mut pending.writing, true) {
            self.runtime.spawn(Arc::clone(self).write_all());
        }
    }

    async fn write_all(self: Arc<Self>) {
        loop {
            sleep(DELAY).await;
            let (jobs, sweep) = {
                let mut pending = self.pending();
                if pending.jobs.is_empty() {
                    pending.writing = false;
                    return;
                }
                (std::mem::take(&mut pending.jobs), !std::mem::replace(&mut pending.swept, true))
            };
            let directory = self.directory.clone();
            let written = self.runtime.spawn_blocking(move || {
                if let Err(error) = write_jobs(&directory, jobs) {
                    tracing::warn!(path = %directory.display(), %error, "endpoints cannot be kept for the next start");
                }
                if sweep {
                    forget_old(&directory);
                }
            });
            // Only a panic of the writer or the end of the runtime comes here; the next change writes again.
            let _ = written.await;
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable, and one name for each service: a hash tells apart what the readable part does not.
fn file_name(service: &Service) -> String {
    let mut hash = Fnv::new();
    for text in [&*service.kind, &*service.registry, &*service.query.service] {
        hash.add(text);
    }
    for (key, value) in &service.query.args {
        hash.add(key);
        hash.add(value);
    }
    let safe = |letter: char| if letter.is_ascii_alphanumeric() || letter == '-' { letter } else { '_' };
    let shown: String = service.query.service.chars().map(safe).take(SHOWN).collect();
    format!("{}.{shown}.{:016x}.json", service.kind, hash.0)
}

/// FNV-1a: names of files have to be the same in every process and version.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, text: &str) {
        // The byte that no text holds keeps `ab` `c` and `a` `bc` apart.
        for byte in text.bytes().chain([0xff]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

fn read(path: &Path, service: &Service) -> Result<Option<(Vec<Held>, SystemTime)>, io::Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other("it is too large to be one of ours"));
    }
    let content: Content = serde_json::from_slice(&text)?;
    if content.version != VERSION {
        return Err(io::Error::other(format!("it is of version {}", content.version)));
    }
    let is_it = *content.kind == *service.kind
        && *content.registry == *service.registry
        && *content.service == *service.query.service
        && content.args == service.query.args;
    if !is_it {
        return Err(io::Error::other(format!("it is of {}", content.service)));
    }
    let held = content.instances.into_iter().map(Entry::held).collect();
    Ok(Some((held, time(content.confirmed))))
}

fn write_jobs(directory: &Path, jobs: HashMap<String, Job>) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    for (name, job) in jobs {
        let path = directory.join(&name);
        if job.instances.is_empty() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => continue,
            }
        }
        let new = directory.join(format!("{name}.new"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let service = &job.service;
        let head = Head {
            version: VERSION,
            kind: &service.kind,
            registry: &service.registry,
            service: &service.query.service,
            args: &service.query.args,
            confirmed: views::unix(job.at),
            instances: job.instances.iter().map(Entry::of).collect(),
        };
        let mut out = BufWriter::new(file);
        serde_json::to_writer(&mut out, &head)?;
        out.flush()?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        if file.metadata()?.len() > MAX_FILE {
            fs::remove_file(&new)?;
            continue;
        }
        // Not synced: what a power cut leaves half-written is set aside at the next start, and asked for anew.
        fs::rename(&new, &path)?;
    }
    Ok(())
}

/// Takes away what nobody has followed for long.
fn forget_old(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > MAX_AGE) {
            // The next start tries again.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests;
