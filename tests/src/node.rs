//! Node.js with the packages that `tests/needs.sh` installs into `.cache/npm`.

use std::path::PathBuf;
use std::process::Command;

/// The folder whose `node_modules` scripts see.
pub fn folder() -> PathBuf {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/npm"));
    assert!(folder.join("node_modules/oidc-provider").is_dir(), "run tests/needs.sh first");
    folder
}

/// Runs a script (CommonJS) with arguments and gives what it prints; panics when it fails.
pub async fn run(script: &str, args: &[&str]) -> String {
    let mut command = Command::new("node");
    command.args(["-e", script, "--"]).args(args).current_dir(folder());
    let output = tokio::process::Command::from(command).output().await.expect("node runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "node: {errors}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}
