//! A file or a folder of services, written by people and tools.
//!
//! A file has the endpoints of each service under its name; in a folder, `orders.yaml` has those of `orders`. It is read when
//! the file system tells of a change, and looked at now and then for file systems that do not. A file that is broken is
//! an error with its place; a service that is not in it has no endpoints.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::discovery::file::File as Settings;
use config::document::Document;
use config::{LocatedError, typed};
use futures_util::future::BoxFuture;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::Node;
use crate::source::{
    Again, Details, Health, Instance, Listing, Query, Source, SourceError, Standing, Watcher,
};

/// A question is answered after this long though nothing has changed.
const WAIT: Duration = Duration::from_secs(30);
/// Which files of a folder are services.
const ENDINGS: [&str; 3] = ["yaml", "yml", "json"];

/// One endpoint as it is written.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Written {
    host: Arc<str>,
    port: u16,
    weight: Option<u32>,
    priority: Option<i32>,
    health: Option<Health>,
    details: Option<Arc<Details>>,
}

/// What tells two states of a file apart without reading it.
type Stamp = (i64, i64, u64, u64);
/// What a file says, and of which of its states.
type Read = (Stamp, HashMap<String, Vec<Instance>>);

/// A file or a folder.
#[derive(Debug)]
pub struct File(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    interval: Duration,
    told: Arc<watch::Sender<u64>>,
    /// What was read last of the one file, so that a thousand services in it are read once.
    read: Mutex<Option<Arc<Read>>>,
    _watcher: Option<RecommendedWatcher>,
}

impl File {
    pub fn new(settings: &Settings) -> Self {
        let told = Arc::new(watch::Sender::new(0));
        let tell = Arc::clone(&told);
        let touched = move |event: notify::Result<notify::Event>| {
            // Reading makes events too; they must not lead to reading.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                tell.send_modify(|count| *count += 1);
            }
        };
        // The folder is watched, so that a file that is replaced is noticed.
        let path = settings.path.clone();
        let folder = if path.is_dir() { Some(&*path) } else { path.parent() };
        let watch = |folder| {
            let mut watcher = notify::recommended_watcher(touched)?;
            watcher.watch(folder, RecursiveMode::NonRecursive).map(|()| watcher)
        };
        let watcher = folder.and_then(|folder| watch(folder).ok());
        let (interval, read) = (settings.interval(), Mutex::default());
        Self(Arc::new(Shared { path, interval, told, read, _watcher: watcher }))
    }
}

impl Source for File {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn open(&self, query: &Query) -> Result<Box<dyn Watcher>, String> {
        let service = &*query.service;
        if service.is_empty() || service.contains(['/', '\0']) || service.starts_with('.') {
            return Err(format!(
                "`{service}` is no name of a service: write it without `/` and leading dots"
            ));
        }
        let (shared, told, service) = (Arc::clone(&self.0), self.0.told.subscribe(), service.to_owned());
        Ok(Box::new(FileWatcher { shared, service, told, seen: None }))
    }
}

struct FileWatcher {
    shared: Arc<Shared>,
    service: String,
    told: watch::Receiver<u64>,
    seen: Option<Stamp>,
}

impl Watcher for FileWatcher {
    fn next(&mut self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let until = Instant::now() + WAIT;
            loop {
                self.told.mark_unchanged();
                let (shared, service, seen) = (Arc::clone(&self.shared), self.service.clone(), self.seen);
                let since = seen.filter(|_| Instant::now() < until);
                let read = tokio::task::spawn_blocking(move || shared.instances(&service, since)).await;
                let read = read.map_err(|error| SourceError::new(error.to_string()))?;
                if let Some((stamp, instances)) = read? {
                    self.seen = Some(stamp);
                    return Ok(Listing { instances, standing: Standing::Continued, again: Again::Now });
                }
                let _ = timeout(self.shared.interval, self.told.changed()).await;
            }
        })
    }

    fn restart(&mut self) {
        self.seen = None;
    }
}

impl Shared {
    /// The instances of a service, unless the file is as it was. Blocks.
    fn instances(
        &self,
        service: &str,
        seen: Option<Stamp>,
    ) -> Result<Option<(Stamp, Vec<Instance>)>, SourceError> {
        let folder = self.path.is_dir();
        let file = |ending: &&str| self.path.join(format!("{service}.{ending}"));
        let path = match folder {
            true => ENDINGS.iter().map(file).find(|path| path.exists()),
            false => Some(self.path.clone()),
        };
        let stamp = path.as_deref().map_or(Ok(Stamp::default()), stamp)?;
        if seen == Some(stamp) {
            return Ok(None);
        }
        if folder {
            let written = path.map_or_else(|| Ok(Vec::new()), |path| parse(&path))?;
            return Ok(Some((stamp, instances(written))));
        }
        // Who comes second finds what the first has read.
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let current = match read.as_ref().filter(|read| read.0 == stamp) {
            Some(current) => Arc::clone(current),
            None => {
                let written = parse::<HashMap<String, Vec<Written>>>(&self.path)?;
                let services = written.into_iter().map(|(name, list)| (name, instances(list))).collect();
                Arc::clone(read.insert(Arc::new((stamp, services))))
            }
        };
        Ok(Some((stamp, current.1.get(service).cloned().unwrap_or_default())))
    }
}

fn stamp(path: &Path) -> Result<Stamp, SourceError> {
    let metadata = fs::metadata(path).map_err(|error| failed(path, &error))?;
    Ok((metadata.mtime(), metadata.mtime_nsec(), metadata.size(), metadata.ino()))
}

fn instances(written: Vec<Written>) -> Vec<Instance> {
    let instance = |Written { host, port, weight, priority, health, details }| {
        let id = format!("{host}:{port}").into();
        let node = Node { host, port, weight: weight.unwrap_or(1), priority: priority.unwrap_or(0) };
        Instance { id, node, health: health.unwrap_or_default(), details }
    };
    written.into_iter().map(instance).collect()
}

/// What a file says, or what is wrong and where.
fn parse<T: serde::de::DeserializeOwned + JsonSchema + 'static>(path: &Path) -> Result<T, SourceError> {
    let bytes = fs::read(path).map_err(|error| failed(path, &error))?;
    let document = Document::parse_bytes(&path.display().to_string(), &bytes);
    let document = document.map_err(|error| SourceError::new(LocatedError::from(error).to_string()))?;
    typed::parse(document.value()).map_err(|errors| {
        let errors: Vec<String> = errors.into_iter().map(|error| document.error(error).to_string()).collect();
        SourceError::new(errors.join("; "))
    })
}

fn failed(path: &Path, error: &std::io::Error) -> SourceError {
    SourceError::new(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
