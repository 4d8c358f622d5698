//! Puts the objects of an `apisix.yaml` into the embedded store, those that are not there yet.

use std::path::Path;

use config::Change;
use config::apisix_yaml::ApisixYaml;
use config::env::ProcessEnv;
use config::process::Process;

use crate::store::embedded::Embedded;
use crate::store::{Condition, PutOptions, Store, StoreError};

/// The objects could not be added.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The file.
    #[error("{0}")]
    File(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Adds the objects of `file` to the embedded store of `process`; those that are there stay as they are. Says how many
/// were added.
///
/// # Errors
/// The file cannot be read or has errors, or the store cannot be written.
pub fn seed(process: &Process, file: &Path) -> Result<usize, SeedError> {
    let name = file.display().to_string();
    let bytes = std::fs::read(file).map_err(|error| SeedError::File(format!("{name}: {error}")))?;
    let told = |errors: &[config::LocatedError]| {
        SeedError::File(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    };
    let read = ApisixYaml::parse_bytes(&name, &bytes, &ProcessEnv).map_err(|errors| told(&errors))?;
    if !read.errors.is_empty() {
        return Err(told(&read.errors));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| SeedError::File(format!("no runtime: {error}")))?;
    runtime.block_on(async {
        let store = Embedded::open(&process.data_dir)?;
        let mut added = 0;
        for change in read.changes(0) {
            let Change::Put { key, value, .. } = change else { continue };
            let options = PutOptions {
                condition: Condition::Absent,
                author: "sample".to_owned(),
                ..PutOptions::default()
            };
            match store.put(&key, value, options).await {
                Ok(_) => added += 1,
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(added)
    })
}
