//! `ca.yaml`: the settings of `postern ca run`. Everything has a default, and no file is a valid file.
//!
//! Paths are taken from the directory of the file. All errors are told at once, with file and line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::document::{Document, LocatedError};
use crate::env::{self, Env, Typing};
use crate::error::ConfigError;
use crate::typed;

/// The name of the file.
pub const CA_FILE: &str = "ca.yaml";

/// The settings of an authority.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ca {
    /// The name of the trust domain, with which all identities begin. It cannot be changed later.
    #[schemars(regex(pattern = "^[a-z0-9._-]{1,255}$"))]
    pub trust_domain: String,
    /// Where workloads call.
    pub listen: String,
    /// Where status and metrics are read; nowhere if it is `off`.
    #[serde(deserialize_with = "address_or_off")]
    pub status: String,
    /// Keys, tokens, the audit log and the socket for operators.
    pub data_dir: PathBuf,
    /// What seals keys on disk.
    pub seal: Seal,
    /// The longest life of certificates, in seconds.
    #[schemars(range(min = 60, max = 7_776_000))]
    pub longest_ttl: u64,
    /// Proof by service-account tokens of Kubernetes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Proof by ACL tokens of Consul.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul: Option<Consul>,
    /// How much is signed.
    pub limits: Limits,
}

/// What seals keys on disk: one of these, or a key file in the data directory, which is made at the first start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Seal {
    /// A file with 64 hexadecimal digits that nobody else may read; made if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// A file with a passphrase of at least 12 characters that nobody else may read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<PathBuf>,
    /// The environment variable with the passphrase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_env: Option<String>,
}

/// A cluster that is asked whose a token is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Kubernetes {
    /// The API server.
    pub server: String,
    /// Its authorities in PEM; those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The token of the service account that may create TokenReviews.
    pub token_file: PathBuf,
    /// What tokens of workloads have to be for.
    pub audience: String,
}

impl Default for Kubernetes {
    fn default() -> Self {
        let mounted = Path::new("/var/run/secrets/kubernetes.io/serviceaccount");
        Self {
            server: "https://kubernetes.default.svc".to_owned(),
            ca_file: Some(mounted.join("ca.crt")),
            token_file: mounted.join("token"),
            audience: "postern-ca".to_owned(),
        }
    }
}

/// A Consul that is asked whose a token is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Consul {
    /// An agent or a server.
    pub server: String,
    /// Its authorities in PEM; those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The path of identities, with `{service}` in it.
    pub path: String,
    /// Service identities for other datacenters only do not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datacenter: Option<String>,
}

impl Default for Consul {
    fn default() -> Self {
        Self {
            server: "http://127.0.0.1:8500".to_owned(),
            ca_file: None,
            path: "/ns/default/sa/{service}".to_owned(),
            datacenter: None,
        }
    }
}

/// Limits of an authority.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Certificates for one process, a second. All processes of an identity together get fifty times as much.
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub certificates_per_second: f64,
    /// How many of them at once.
    #[schemars(range(min = 1, max = 1000))]
    pub certificates_burst: u32,
    /// Proofs of one kind, a second.
    #[schemars(range(min = 1, max = 100_000))]
    pub proofs_per_second: u32,
    /// Requests that wait for a signature.
    #[schemars(range(min = 1, max = 100_000))]
    pub queue: u32,
    /// Connections at a time.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            certificates_per_second: 0.1,
            certificates_burst: 5,
            proofs_per_second: 50,
            queue: 1024,
            connections: 20_000,
        }
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self {
            trust_domain: "mesh.local".to_owned(),
            listen: "127.0.0.1:15012".to_owned(),
            status: "127.0.0.1:15014".to_owned(),
            data_dir: PathBuf::from("postern-ca"),
            seal: Seal::default(),
            longest_ttl: 24 * 3600,
            kubernetes: None,
            consul: None,
            limits: Limits::default(),
        }
    }
}

impl Ca {
    /// Reads the file, given itself or by its directory; a directory without one has the defaults.
    ///
    /// # Errors
    /// It cannot be read, or all that is wrong in it.
    pub fn load(path: &Path, env: &dyn Env) -> Result<Ca, Vec<LocatedError>> {
        let is_dir = path.is_dir();
        let file = if is_dir { path.join(CA_FILE) } else { path.to_owned() };
        let name = file.display().to_string();
        let document = match std::fs::read(&file) {
            Ok(bytes) => Document::parse_bytes(&name, &bytes),
            Err(error) if is_dir && error.kind() == std::io::ErrorKind::NotFound => {
                Document::parse(&name, "")
            }
            Err(error) => {
                let error = ConfigError::invalid("", format!("cannot be read: {error}"));
                return Err(vec![LocatedError { file: name.into(), line: 0, column: 0, error }]);
            }
        };
        let mut document = document.map_err(|error| vec![error.into()])?;
        let dir = file.parent().unwrap_or(Path::new(""));
        Ca::read(&mut document, dir, env)
    }

    /// Reads a document that stands in `dir`.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn read(document: &mut Document, dir: &Path, env: &dyn Env) -> Result<Ca, Vec<LocatedError>> {
        env::substitute(document, env, Typing::Quotes)?;
        let mut value = document.value().clone();
        match &mut value {
            Value::Null => value = Value::Object(serde_json::Map::new()),
            // A key without a value is as good as absent.
            Value::Object(members) => members.retain(|_, member| !member.is_null()),
            _ => {}
        }
        let checked = typed::parse::<Ca>(&value).and_then(|ca| {
            let errors = ca.check();
            if errors.is_empty() { Ok(ca) } else { Err(errors) }
        });
        match checked {
            Ok(mut ca) => {
                ca.resolve(dir);
                Ok(ca)
            }
            Err(errors) => {
                let mut errors: Vec<_> = errors.into_iter().map(|error| document.error(error)).collect();
                errors.sort_by_key(|error| (error.line, error.column));
                Err(errors)
            }
        }
    }

    /// The JSON Schema of the file.
    pub fn schema() -> Value {
        typed::schema_of::<Ca>()
    }

    /// Where workloads call. What is wrong with it was told when the file was read.
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
        let domain = self.trust_domain.as_bytes();
        let allowed = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if domain.is_empty() || domain.len() > 255 || !domain.iter().all(allowed) {
            wrong(
                "/trust_domain",
                format!("`{}` is not a trust domain: write mesh.local", self.trust_domain),
            );
        }
        if self.listen().is_none() {
            wrong(
                "/listen",
                format!("`{}` is not an address with a port: write 127.0.0.1:15012", self.listen),
            );
        }
        if self.status != "off" && self.status().is_none() {
            wrong("/status", format!("`{}` is neither an address with a port nor `off`", self.status));
        }
        if !(60..=7_776_000).contains(&self.longest_ttl) {
            wrong("/longest_ttl", "certificates live for 60 seconds to 90 days".to_owned());
        }
        let seals = [
            self.seal.key_file.is_some(),
            self.seal.passphrase_file.is_some(),
            self.seal.passphrase_env.is_some(),
        ];
        if seals.iter().filter(|given| **given).count() > 1 {
            wrong(
                "/seal",
                "one of `key_file`, `passphrase_file` and `passphrase_env`, not several".to_owned(),
            );
        }
        if let Some(consul) = &self.consul
            && !consul.path.contains("{service}")
        {
            wrong("/consul/path", "it has no `{service}` in it: write /ns/default/sa/{service}".to_owned());
        }
        let limits = &self.limits;
        if !(0.001..=1000.0).contains(&limits.certificates_per_second) {
            wrong("/limits/certificates_per_second", "from 0.001 to 1000".to_owned());
        }
        let counts = [
            ("certificates_burst", limits.certificates_burst, 1000),
            ("proofs_per_second", limits.proofs_per_second, 100_000),
            ("queue", limits.queue, 100_000),
            ("connections", limits.connections, 1_000_000),
        ];
        for (name, value, most) in counts {
            if value == 0 || value > most {
                wrong(&format!("/limits/{name}"), format!("from 1 to {most}"));
            }
        }
        errors
    }

    fn resolve(&mut self, dir: &Path) {
        let mut paths = vec![&mut self.data_dir];
        paths.extend(&mut self.seal.key_file);
        paths.extend(&mut self.seal.passphrase_file);
        if let Some(kubernetes) = &mut self.kubernetes {
            paths.extend(&mut kubernetes.ca_file);
            paths.push(&mut kubernetes.token_file);
        }
        if let Some(consul) = &mut self.consul {
            paths.extend(&mut consul.ca_file);
        }
        for path in paths {
            *path = dir.join(&*path);
        }
    }
}

/// YAML reads a bare `off` as false.
fn address_or_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "an address with a port, or `off`")]
    enum Written {
        Switch(bool),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Switch(false) => Ok("off".to_owned()),
        Written::Switch(true) => Err(serde::de::Error::custom("write an address with a port, or `off`")),
        Written::Text(text) => Ok(text),
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

    fn read(text: &str) -> Result<Ca, Vec<String>> {
        let mut document = Document::parse("ca.yaml", text).unwrap();
        let told = |errors: Vec<LocatedError>| errors.iter().map(ToString::to_string).collect();
        Ca::read(&mut document, Path::new("/etc/postern"), &NoEnv).map_err(told)
    }

    #[test]
    fn no_file_is_a_file_with_the_defaults() {
        let ca = read("").unwrap();
        assert_eq!(ca, Ca { data_dir: PathBuf::from("/etc/postern/postern-ca"), ..Ca::default() });
        assert_eq!(ca.listen(), Some("127.0.0.1:15012".parse().unwrap()));
        let given =
            read("kubernetes: {}\nconsul: {datacenter: dc1}\nstatus: off\nseal: {key_file: k}\n").unwrap();
        assert_eq!(given.kubernetes.unwrap().audience, "postern-ca");
        assert_eq!(given.consul.unwrap().datacenter.as_deref(), Some("dc1"));
        assert_eq!(given.seal.key_file, Some(PathBuf::from("/etc/postern/k")));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let cases = [
            ("trust_domain: Mesh", "trust_domain"),
            ("a: 1\nlisten: 15012", "listen"),
            ("listen: nowhere", "listen"),
            ("status: nowhere", "status"),
            ("longest_ttl: 5", "longest_ttl"),
            ("seal: {key_file: a, passphrase_env: B}", "seal"),
            ("consul: {path: /ns/default}", "path"),
            ("limits: {queue: 0}", "queue"),
            ("limits: {certificates_per_second: -1}", "certificates_per_second"),
            ("kubernetes: {audiences: [a]}", "audiences"),
        ];
        for (text, place) in cases {
            let errors = read(text).unwrap_err().join("\n");
            assert!(errors.contains("ca.yaml:") && errors.contains(place), "{text}: {errors}");
        }
    }
}
