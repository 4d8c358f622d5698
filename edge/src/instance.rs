//! What this process is called among others, and since when it runs.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use config::process::Process;

/// The file in the data directory that keeps an id which nobody has written.
const ID_FILE: &str = "instance.id";

/// This process.
#[derive(Clone, Debug)]
pub struct Instance {
    /// `apisix.id`, or what was made up at the first start.
    pub id: String,
    /// When it started.
    pub booted: SystemTime,
}

impl Instance {
    /// The process that starts now. Where its id cannot be kept the next start makes another one.
    pub fn starting(process: &Process) -> Self {
        let id = process.id.clone().unwrap_or_else(|| {
            let path = process.in_data_dir(ID_FILE);
            kept(&path).unwrap_or_else(|error| {
                tracing::warn!(%error, ?path, "the id of this instance cannot be kept");
                made()
            })
        });
        Self { id, booted: SystemTime::now() }
    }
}

fn made() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The id in the file, which is written if there is none.
fn kept(path: &Path) -> io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if let Some(folder) = path.parent() {
        crate::store::prepare_data_dir(folder)?;
    }
    let id = made();
    std::fs::write(path, &id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_what_is_written_or_stays_over_a_restart() {
        let data = tempfile::tempdir().unwrap();
        let mut process = Process::defaults(Path::new("."));
        process.data_dir = data.path().join("new");
        let first = Instance::starting(&process).id;
        assert_eq!(first.len(), 36);
        assert_eq!(Instance::starting(&process).id, first);
        process.id = Some("a".into());
        assert_eq!(Instance::starting(&process).id, "a");
        process.id = None;
        process.data_dir = data.path().join("new/instance.id");
        assert_ne!(Instance::starting(&process).id, first, "a folder that cannot be");
    }
}
