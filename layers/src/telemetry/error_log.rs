//! A second reader of the process's own log.
//!
//! There is one log in a process, and so there is one place for who reads along. Whoever sets up the log calls [`tell`]
//! for every line that it writes; the plugin `error-log-logger` listens where it is configured.

use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwapOption;
use tracing::Level;

/// Reads along.
pub trait Listener: Send + Sync {
    /// Whether lines of that level and from that part of the program are wanted.
    fn wants(&self, level: Level, target: &str) -> bool;

    /// Takes a line, without its end. Called on any thread: it must not wait.
    fn line(&self, line: String);
}

type Slot = ArcSwapOption<Box<dyn Listener>>;

static LISTENER: LazyLock<Slot> = LazyLock::new(ArcSwapOption::empty);

/// From now on `listener` reads along, or nobody.
pub fn listen(listener: Option<Box<dyn Listener>>) {
    LISTENER.store(listener.map(Arc::new));
}

/// Tells whoever reads along of a line, which is made only if it is wanted.
pub fn tell(level: Level, target: &str, line: impl FnOnce() -> String) {
    let listener = LISTENER.load();
    if let Some(listener) = listener.as_deref().filter(|listener| listener.wants(level, target)) {
        listener.line(line());
    }
}
