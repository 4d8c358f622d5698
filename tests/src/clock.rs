//! A wall clock that a test moves, for processes that are started with it: the library of Debian's `faketime`.

use std::path::PathBuf;

use tempfile::TempDir;

/// A clock that runs as that of the machine, so much ahead or behind.
pub struct WallClock {
    folder: TempDir,
    library: PathBuf,
}

impl WallClock {
    /// None where the library is not installed.
    pub fn new() -> Option<WallClock> {
        let libraries = std::fs::read_dir("/usr/lib").ok()?.flatten();
        let library = libraries
            .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"))
            .find(|library| library.exists())?;
        let clock = WallClock { folder: tempfile::tempdir().expect("a folder"), library };
        clock.set("+0d");
        Some(clock)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("offset")
    }

    /// The difference to the clock of the machine: `+1d`, `-2h`, `+3650d`.
    pub fn set(&self, offset: &str) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, format!("{offset}\n")).expect("a file");
        std::fs::rename(new, self.file()).expect("a file");
    }

    /// What a process has to be started with. Time that only grows is left alone.
    pub fn env(&self) -> Vec<(String, String)> {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_CACHE_DURATION", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}
