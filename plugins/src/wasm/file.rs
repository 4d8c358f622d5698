//! The file of a module: compiled when it is first used, and again when it changes.
//!
//! It is looked at once a second by the control side. A file that is broken or gone changes nothing: what runs goes on.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::runtime::Handle;

use super::vm::{Compiled, Limits};

const POLL: Duration = Duration::from_secs(1);
/// No module is larger, in bytes.
const LARGEST: u64 = 64 << 20;

/// A module's file and what is compiled of it.
pub struct ModuleFile {
    plugin: String,
    path: PathBuf,
    limits: Limits,
    current: ArcSwap<Result<Arc<Compiled>, String>>,
    compiled_from: Stamp,
    watched: AtomicBool,
}

/// What tells two states of a file apart.
type Stamp = Option<(SystemTime, u64)>;

fn stamp(path: &Path) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

fn compile(plugin: &str, path: &Path, limits: Limits) -> Result<Arc<Compiled>, String> {
    let told = |error: std::io::Error| format!("it cannot be read: {error}");
    if std::fs::metadata(path).map_err(told)?.len() > LARGEST {
        return Err(format!("it is larger than {LARGEST} bytes"));
    }
    let binary = std::fs::read(path).map_err(told)?;
    Compiled::new(plugin, &binary, limits).map(Arc::new)
}

impl ModuleFile {
    /// Compiles the file, which takes a while.
    pub fn new(plugin: &str, path: &Path, limits: Limits) -> Self {
        let compiled_from = stamp(path);
        Self {
            plugin: plugin.to_owned(),
            path: path.to_owned(),
            limits,
            current: ArcSwap::from_pointee(compile(plugin, path, limits)),
            compiled_from,
            watched: AtomicBool::new(false),
        }
    }

    /// Watches the file for as long as anybody holds this. The second time nothing happens.
    pub fn watch(self: &Arc<Self>, control: &Handle) {
        if !self.watched.swap(true, Ordering::Relaxed) {
            control.spawn(watch(Arc::downgrade(self), self.compiled_from));
        }
    }

    /// The module as it is now.
    ///
    /// # Errors
    /// It could never be compiled: why.
    pub fn current(&self) -> Result<Arc<Compiled>, String> {
        (**self.current.load()).clone()
    }

    fn compile_again(&self) {
        match compile(&self.plugin, &self.path, self.limits) {
            Ok(compiled) => {
                tracing::info!(plugin = self.plugin, file = %self.path.display(), "the module has changed");
                self.current.store(Arc::new(Ok(compiled)));
            }
            Err(why) => {
                tracing::error!(plugin = self.plugin, file = %self.path.display(), why, "the module stays as it was");
                if self.current.load().is_err() {
                    self.current.store(Arc::new(Err(why)));
                }
            }
        }
    }
}

async fn watch(file: Weak<ModuleFile>, mut seen: Stamp) {
    loop {
        tokio::time::sleep(POLL).await;
        let Some(held) = file.upgrade() else { return };
        let looked = tokio::task::spawn_blocking(move || {
            let now = stamp(&held.path);
            if now != seen && now.is_some() {
                held.compile_again();
            }
            now
        });
        match looked.await {
            Ok(now) => seen = now,
            Err(error) => tracing::error!(%error, "a module's file cannot be watched"),
        }
    }
}
