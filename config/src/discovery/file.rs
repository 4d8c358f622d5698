//! `discovery.file`: services in a file or a folder, which people and tools write. An extension: APISIX has none.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Registry;
use crate::error::ConfigError;
use crate::fields::Seconds;

/// A file of services, or a folder with a file for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Extension: a YAML or JSON file with the endpoints of each service under its name, or a folder in which
    /// `orders.yaml` has those of the service `orders`.
    pub path: PathBuf,
    /// Extension: how often it is looked at, in seconds, whatever the file system tells of changes.
    #[serde(default = "interval")]
    pub interval: Seconds,
}

fn interval() -> Seconds {
    Seconds::whole(1)
}

impl File {
    /// `interval`.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.interval.duration()
    }
}

impl Registry for File {
    const KIND: &'static str = "file";

    fn check(&self, errors: &mut Vec<ConfigError>) {
        if !self.path.is_absolute() {
            errors.push(ConfigError::invalid(
                "/path",
                "write the path from the root: `/etc/postern/services.yaml`",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::super::Discovery;

    #[test]
    fn the_path_is_all_that_is_needed() {
        for (written, told) in [
            (json!({"path": "/etc/postern/services.yaml"}), None),
            (json!({"path": "/etc/postern/services", "interval": 0.2}), None),
            (json!({}), Some("/discovery/file")),
            (json!({"path": "services.yaml"}), Some("/discovery/file/path: write the path from the root")),
            (json!({"path": "/a", "interval": 0}), Some("/discovery/file/interval")),
            (json!({"path": "/a", "poll": 1}), Some("/discovery/file/poll: unknown field")),
        ] {
            let (discovery, errors) = Discovery::read(json!({ "file": written }).as_object().unwrap());
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            match told {
                None => assert!(discovery.file.is_some() && errors.is_empty(), "{written}: {errors:?}"),
                Some(told) => {
                    assert!(errors.iter().any(|error| error.starts_with(told)), "{written}: {errors:?}")
                }
            }
        }
    }
}
