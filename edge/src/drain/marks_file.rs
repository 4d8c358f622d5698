//! Drains over a restart: one small file in the data directory, written whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Order;
use crate::store::keep;

/// Largest file that is read, in bytes.
const LARGEST: u64 = 4 << 20;

/// One drain as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) order: Order,
    /// Seconds since 1970.
    pub(super) since: u64,
}

/// Reads what was kept, by the ids of drains. None if there is no file.
///
/// # Errors
/// The file cannot be read, or is none of ours.
pub(super) fn read(path: &Path) -> io::Result<BTreeMap<String, Kept>> {
    let length = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        metadata => metadata?.len(),
    };
    if length > LARGEST {
        return Err(io::Error::other(format!("{length} bytes are too many")));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Replaces what is kept. Blocks.
pub(super) fn write(path: &Path, kept: &BTreeMap<String, Kept>) -> io::Result<()> {
    keep(path, &serde_json::to_vec_pretty(kept)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_again_and_what_is_no_such_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data/drains.json");
        assert!(read(&path).unwrap().is_empty(), "no file yet");
        let order: Order =
            serde_json::from_value(serde_json::json!({"service": "orders", "node": "10.0.0.3:80"})).unwrap();
        write(&path, &[("a".to_owned(), Kept { order, since: 7 })].into()).unwrap();
        let kept = read(&path).unwrap();
        let one = &kept["a"];
        assert_eq!((one.order.service.as_str(), one.since), ("orders", 7));
        fs::write(&path, b"{").unwrap();
        assert!(read(&path).is_err());
    }
}
