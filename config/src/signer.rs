//! `signer.yaml`: the settings of `postern signer`.
//!
//! Paths are taken from the directory of the file. All errors are told at once, with file and line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ca::{Seal, address_or_off};
use crate::document::{Document, LocatedError};
use crate::env::Env;
use crate::error::ConfigError;
use crate::typed;

/// The name of the file.
pub const SIGNER_FILE: &str = "signer.yaml";

/// The settings of a signer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signer {
    /// Where gateways call.
    #[serde(default = "listen")]
    pub listen: String,
    /// Where status and metrics are read; nowhere if it is `off`.
    #[serde(default = "status", deserialize_with = "address_or_off")]
    pub status: String,
    /// The directory of the keys: `NAME.pem`, `NAME.key` or `NAME.sealed`. It is looked at every second.
    #[serde(default = "keys_dir")]
    pub keys_dir: PathBuf,
    /// What opens `NAME.sealed`. Without it keys are in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
    /// The log of what was signed and refused.
    #[serde(default = "audit_log")]
    pub audit_log: PathBuf,
    /// How gateways and this process know each other.
    pub tls: Tls,
    /// Which gateways may use which keys.
    #[schemars(length(min = 1))]
    pub clients: Vec<Client>,
    /// How much is signed.
    #[serde(default)]
    pub limits: Limits,
}

/// Certificates of a signer. Its own and the authorities of gateways are read again when they change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificate that gateways are shown, with its chain, in PEM.
    pub cert_file: PathBuf,
    /// Its key, in PEM.
    pub key_file: PathBuf,
    /// What certificates of gateways have to be signed by, in PEM.
    pub client_ca_file: PathBuf,
}

/// A gateway, and the keys it may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// A name in its certificate: a DNS name, or a SPIFFE id, which may end with `/*`.
    #[schemars(length(min = 1, max = 2048))]
    pub name: String,
    /// Names of keys, or beginnings of names with a `*`; a `*` alone is all of them.
    #[schemars(length(min = 1))]
    pub keys: Vec<String>,
}

/// Limits of a signer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Signatures a second for each of `clients`.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub signatures_per_second: u32,
    /// Signatures at a time; as many as there are cores if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub at_once: Option<u32>,
    /// Requests that wait for one.
    #[schemars(range(min = 1, max = 100_000))]
    pub queue: u32,
    /// Connections at a time.
    #[schemars(range(min = 1, max = 100_000))]
    pub connections: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { signatures_per_second: 10_000, at_once: None, queue: 1024, connections: 1024 }
    }
}

fn listen() -> String {
    "127.0.0.1:7443".to_owned()
}

fn status() -> String {
    "127.0.0.1:7445".to_owned()
}

fn keys_dir() -> PathBuf {
    "keys".into()
}

fn audit_log() -> PathBuf {
    "signer-audit.log".into()
}

impl Signer {
    /// Reads the file, given itself or by its directory.
    ///
    /// # Errors
    /// It cannot be read, or all that is wrong in it.
    pub fn load(path: &Path, env: &dyn Env) -> Result<Signer, Vec<LocatedError>> {
        let file = if path.is_dir() { path.join(SIGNER_FILE) } else { path.to_owned() };
        let name = file.display().to_string();
        let bytes = std::fs::read(&file).map_err(|error| {
            let error = ConfigError::invalid("", format!("cannot be read: {error}"));
            vec![LocatedError { file: name.as_str().into(), line: 0, column: 0, error }]
        })?;
        let mut document = Document::parse_bytes(&name, &bytes).map_err(|error| vec![error.into()])?;
        Signer::read(&mut document, file.parent().unwrap_or(Path::new("")), env)
    }

    /// Reads a document that stands in `dir`.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn read(document: &mut Document, dir: &Path, env: &dyn Env) -> Result<Signer, Vec<LocatedError>> {
        let mut signer =
            typed::settings(document, env, Value::Object(Map::new()), |signer: &mut Signer| signer.check())?;
        signer.resolve(dir);
        Ok(signer)
    }

    /// Where gateways call. What is wrong with it was told when the file was read.
    pub fn listen(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    /// Where status is read, if anywhere.
    pub fn status(&self) -> Option<SocketAddr> {
        self.status.parse().ok()
    }

    fn check(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let mut wrong = |pointer: &str, words: String| errors.push(ConfigError::invalid(pointer, words));
        if self.listen().is_none() {
            let words = format!("`{}` is not an address with a port: write 0.0.0.0:7443", self.listen);
            wrong("/listen", words);
        }
        if self.status != "off" && self.status().is_none() {
            wrong("/status", format!("`{}` is neither an address with a port nor `off`", self.status));
        }
        if self.clients.is_empty() {
            wrong(
                "/clients",
                "nobody may sign: write `[{name: gateway.internal, keys: [\"*\"]}]`".to_owned(),
            );
        }
        for (index, client) in self.clients.iter().enumerate() {
            if client.name.is_empty() || client.name.starts_with('*') {
                let words =
                    "a DNS name or a SPIFFE id in the certificate of the gateway, not everybody".to_owned();
                wrong(&format!("/clients/{index}/name"), words);
            }
            if client.keys.is_empty() {
                wrong(&format!("/clients/{index}/keys"), "names of keys, or [\"*\"] for all".to_owned());
            }
        }
        if let Some(seal) = &self.seal {
            let given =
                [seal.key_file.is_some(), seal.passphrase_file.is_some(), seal.passphrase_env.is_some()];
            if given.iter().filter(|given| **given).count() != 1 {
                wrong("/seal", "one of `key_file`, `passphrase_file` and `passphrase_env`".to_owned());
            }
        }
        let limits = &self.limits;
        let counts = [
            ("signatures_per_second", limits.signatures_per_second, 1_000_000),
            ("at_once", limits.at_once.unwrap_or(1), 1024),
            ("queue", limits.queue, 100_000),
            ("connections", limits.connections, 100_000),
        ];
        for (name, value, most) in counts {
            if value == 0 || value > most {
                wrong(&format!("/limits/{name}"), format!("from 1 to {most}"));
            }
        }
        errors
    }

    fn resolve(&mut self, dir: &Path) {
        let tls = &mut self.tls;
        let mut paths = vec![
            &mut self.keys_dir,
            &mut self.audit_log,
            &mut tls.cert_file,
            &mut tls.key_file,
            &mut tls.client_ca_file,
        ];
        if let Some(seal) = &mut self.seal {
            paths.extend(&mut seal.key_file);
            paths.extend(&mut seal.passphrase_file);
        }
        for path in paths {
            *path = dir.join(&*path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoEnv;

    impl Env for NoEnv {
        fn var(&self, _: &str) -> Option<String> {
            None
        }
    }

    const TLS: &str = "tls: {cert_file: s.pem, key_file: s.key, client_ca_file: /ca.pem}\n";
    const CLIENTS: &str = "clients: [{name: gw.test, keys: ['*']}]\n";

    fn read(text: &str) -> Result<Signer, Vec<String>> {
        let mut document = Document::parse("signer.yaml", text).unwrap();
        let told = |errors: Vec<LocatedError>| errors.iter().map(ToString::to_string).collect();
        Signer::read(&mut document, Path::new("/etc/postern"), &NoEnv).map_err(told)
    }

    #[test]
    fn what_has_no_default_is_asked_for() {
        let signer = read(&format!("{TLS}{CLIENTS}status: off\nseal: {{key_file: k}}\n")).unwrap();
        assert_eq!(signer.listen(), Some("127.0.0.1:7443".parse().unwrap()));
        assert_eq!(signer.status(), None);
        assert_eq!(signer.keys_dir, Path::new("/etc/postern/keys"));
        assert_eq!(
            (&*signer.tls.cert_file, &*signer.tls.client_ca_file),
            (Path::new("/etc/postern/s.pem"), Path::new("/ca.pem"))
        );
        assert_eq!(signer.seal.unwrap().key_file, Some(PathBuf::from("/etc/postern/k")));
        let errors = read("").unwrap_err().join("\n");
        assert!(errors.contains("`tls` is missing") && errors.contains("`clients` is missing"), "{errors}");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let cases = [
            (format!("{CLIENTS}tls: {{cert_file: a, key_file: b}}"), "`client_ca_file` is missing"),
            (format!("{TLS}clients: []"), "clients"),
            (format!("{TLS}clients: [{{name: '*', keys: ['*']}}]"), "not everybody"),
            (format!("{TLS}clients: [{{name: a, keys: []}}]"), "keys"),
            (format!("{TLS}{CLIENTS}listen: 7443"), "listen"),
            (format!("{TLS}{CLIENTS}status: nowhere"), "status"),
            (format!("{TLS}{CLIENTS}seal: {{}}"), "one of `key_file`"),
            (format!("{TLS}{CLIENTS}seal: {{key_file: a, passphrase_env: B}}"), "one of `key_file`"),
            (format!("{TLS}{CLIENTS}limits: {{queue: 0}}"), "queue"),
            (format!("{TLS}{CLIENTS}limits: {{at_once: 5000}}"), "at_once"),
            (format!("{TLS}{CLIENTS}key_dir: keys"), "`keys_dir`"),
        ];
        for (text, told) in cases {
            let errors = read(&text).unwrap_err().join("\n");
            assert!(errors.contains("signer.yaml:") && errors.contains(told), "{text}: {errors}");
        }
    }
}
