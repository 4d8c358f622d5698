//! The records as they were read last, in a file of this machine. A replica that starts while the shared store is away
//! serves the certificates that it had.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::Record;

/// A file of records. Keys in it are as the store has them.
#[derive(Clone, Debug)]
pub(super) struct LastGood(pub(super) PathBuf);

impl LastGood {
    /// The records; none where there is no file. Blocks.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub(super) fn read(&self) -> io::Result<Vec<Record>> {
        match fs::read(&self.0) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Writes the records whole beside the old file and over it. Blocks.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write(&self, records: &[Record]) -> io::Result<()> {
        if let Some(folder) = self.0.parent() {
            fs::create_dir_all(folder)?;
        }
        let new = self.0.with_extension("new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(records)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.0)?;
        sync(self.0.parent())
    }
}

fn sync(folder: Option<&Path>) -> io::Result<()> {
    folder.map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
}
