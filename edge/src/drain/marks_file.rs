//! Drains over a restart: one small file in the data directory, written whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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
    /// The registries have done what they were told.
    #[serde(default)]
    pub(super) told: bool,
    /// The node was seen to be gone.
    #[serde(default)]
    pub(super) gone: bool,
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

/// Where a file is put that cannot be read.
fn aside(path: &Path) -> PathBuf {
    path.with_extension("json.unreadable")
}

/// Reads what was kept. What cannot be read is put aside, so that the next list does not replace it, and what was lost is
/// told for as long as it lies there: a gateway that does not start helps nobody, and one that has forgotten silently which
/// nodes are about to be stopped sends requests there.
pub(super) fn restore(path: &Path) -> (BTreeMap<String, Kept>, Option<String>) {
    let aside = aside(path);
    let (kept, why) = match read(path) {
        Ok(kept) => (kept, None),
        Err(error) => (BTreeMap::new(), Some(error)),
    };
    let place = match &why {
        Some(_) if fs::rename(path, &aside).is_err() => path,
        Some(_) => &aside,
        None if aside.exists() => &aside,
        None => return (kept, None),
    };
    let why = why.map(|error| format!(" ({error})")).unwrap_or_default();
    let place = place.display();
    let warning = format!(
        "the drains of an earlier process could not be read{why} and are not in force: begin those anew whose nodes are to \
         stay out of use (`postern drain SERVICE/NODE`; they stand in {place}), then remove {place}"
    );
    (kept, Some(warning))
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
        write(&path, &[("a".to_owned(), Kept { order, since: 7, told: true, gone: false })].into()).unwrap();
        let kept = read(&path).unwrap();
        let one = &kept["a"];
        assert_eq!((one.order.service.as_str(), one.since, one.told), ("orders", 7, true));
        assert_eq!(restore(&path).1, None);
        fs::write(&path, b"{").unwrap();
        assert!(read(&path).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_put_aside_and_told_until_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drains.json");
        fs::write(&path, b"{").unwrap();
        let (kept, warning) = restore(&path);
        assert!(kept.is_empty() && warning.unwrap().contains("drains.json.unreadable"));
        write(&path, &BTreeMap::new()).unwrap();
        assert!(restore(&path).1.is_some(), "it lies there still");
        let aside = folder.path().join("drains.json.unreadable");
        assert_eq!(fs::read(&aside).unwrap(), b"{");
        fs::remove_file(aside).unwrap();
        assert_eq!(restore(&path).1, None);
    }
}
