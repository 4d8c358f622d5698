//! `ca.yaml`: the settings of `postern ca run`. Everything has a default, and no file is a valid file.
//!
//! Paths are taken from the directory of the file. All errors are told at once, with file and line.

pub mod root;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::document::{Document, LocatedError};
use crate::env::Env;
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
    /// Where the record, tokens and the key of the channel are kept: in the data directory, or where several replicas
    /// share them.
    pub store: Store,
    /// The name of this process among replicas: the same over a restart. Made at the first start if it is absent.
    #[schemars(regex(pattern = "^[A-Za-z0-9._-]{1,64}$"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// Whether those who renew first in a rotation are visited by handshakes at their mesh ports, if they have one.
    pub visits: bool,
    /// Files that are given the roots in PEM, for those who do not ask the authority.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bundle_files: Vec<PathBuf>,
    /// The longest life of certificates, in seconds.
    #[schemars(range(min = 60, max = 7_776_000))]
    pub longest_ttl: u64,
    /// Who has the key of the root, where that is somebody else. At the first start it is asked for an issuer; later
    /// `postern certs rotate root` goes over to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<root::Root>,
    /// Proof by service-account tokens of Kubernetes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Proof by ACL tokens of Consul.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul: Option<Consul>,
    /// A second door, for clients of Istio: they ask for certificates by `CreateCertificate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub istio: Option<Istio>,
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

/// What replicas share: one of these, or nothing, and then the data directory is that of a single process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// Keys in etcd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd: Option<EtcdStore>,
    /// Keys in the KV store of Consul.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul: Option<ConsulStore>,
    /// For so many seconds a replica goes on signing when it cannot read the store. Rotations wait twice as long for a
    /// replica that is silent.
    #[schemars(range(min = 5, max = 3600))]
    pub signs_unread: u32,
}

impl Default for Store {
    fn default() -> Self {
        Self { etcd: None, consul: None, signs_unread: 300 }
    }
}

impl Store {
    /// Whether other processes use it too.
    pub fn is_shared(&self) -> bool {
        self.etcd.is_some() || self.consul.is_some()
    }
}

/// An etcd that replicas share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdStore {
    /// `http://HOST:PORT` or `https://HOST:PORT`, one for each member.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// The user, where etcd asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A file with the password of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Its authorities in PEM; those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The certificate to show, in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<PathBuf>,
    /// The key of that certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// For one question, in seconds.
    #[schemars(range(min = 1, max = 60))]
    pub timeout: u32,
}

impl Default for EtcdStore {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "/postern/ca".to_owned(),
            user: None,
            password_file: None,
            ca_file: None,
            certificate_file: None,
            key_file: None,
            timeout: 5,
        }
    }
}

/// A Consul that replicas share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsulStore {
    /// An agent or a server.
    pub server: String,
    /// What all keys begin with.
    pub prefix: String,
    /// A file with the ACL token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// That of the agent if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datacenter: Option<String>,
    /// Its authorities in PEM; those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// For one question, in seconds.
    #[schemars(range(min = 1, max = 60))]
    pub timeout: u32,
}

impl Default for ConsulStore {
    fn default() -> Self {
        Self {
            server: "http://127.0.0.1:8500".to_owned(),
            prefix: "postern/ca".to_owned(),
            token_file: None,
            datacenter: None,
            ca_file: None,
            timeout: 5,
        }
    }
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

/// The door for clients of Istio. They know the authority by a DNS name and the roots of the mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Istio {
    /// Where they call.
    pub listen: String,
    /// DNS names in the certificate of this door, which the authority makes for itself.
    #[schemars(length(min = 1, max = 16))]
    pub names: Vec<String>,
    /// The certificate of this door in PEM, where it comes from elsewhere and not of `names`; read again when it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// The key of that certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// What tokens of Kubernetes have to be for. They are taken if `kubernetes` is there.
    pub audience: String,
    /// Service accounts, `NAMESPACE/NAME`, of proxies that may ask for the pods of their node: `istio-system/ztunnel`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub node_accounts: Vec<String>,
}

impl Default for Istio {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:15013".to_owned(),
            names: vec!["istiod.istio-system.svc".to_owned()],
            cert_file: None,
            key_file: None,
            audience: "istio-ca".to_owned(),
            node_accounts: Vec::new(),
        }
    }
}

impl Istio {
    /// Where clients of Istio call. What is wrong with it was told when the file was read.
    pub fn listen(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    fn check(&self, wrong: &mut impl FnMut(&str, String)) {
        if self.listen().is_none() {
            let words = format!("`{}` is not an address with a port: write 127.0.0.1:15013", self.listen);
            wrong("/istio/listen", words);
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            wrong("/istio", "`cert_file` and `key_file` go together".to_owned());
        }
        if self.names.is_empty() || self.names.len() > 16 {
            wrong("/istio/names", "from 1 to 16 names: write [istiod.istio-system.svc]".to_owned());
        }
        for (index, name) in self.names.iter().enumerate().filter(|(_, name)| !is_dns_name(name)) {
            wrong(&format!("/istio/names/{index}"), format!("`{name}` is not a DNS name"));
        }
        if self.audience.is_empty() {
            wrong("/istio/audience", "tokens are for somebody: write istio-ca".to_owned());
        }
        let is_account = |account: &str| {
            account
                .split_once('/')
                .is_some_and(|(namespace, name)| is_dns_name(namespace) && is_dns_name(name))
        };
        for (index, account) in self.node_accounts.iter().enumerate().filter(|(_, one)| !is_account(one)) {
            let words = format!("`{account}` is not NAMESPACE/NAME: write istio-system/ztunnel");
            wrong(&format!("/istio/node_accounts/{index}"), words);
        }
    }
}

/// Labels of letters, digits and hyphens with dots between them.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
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
            store: Store::default(),
            replica: None,
            visits: true,
            bundle_files: Vec::new(),
            longest_ttl: 24 * 3600,
            root: None,
            kubernetes: None,
            consul: None,
            istio: None,
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
        let mut ca = typed::settings(document, env, Value::Object(Map::new()), |ca: &mut Ca| ca.check())?;
        ca.resolve(dir);
        Ok(ca)
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
        self.check_store(&mut wrong, seals.contains(&true));
        if let Some(root) = &self.root {
            root.check(&mut wrong);
        }
        if let Some(consul) = &self.consul
            && !consul.path.contains("{service}")
        {
            wrong("/consul/path", "it has no `{service}` in it: write /ns/default/sa/{service}".to_owned());
        }
        if let Some(istio) = &self.istio {
            istio.check(&mut wrong);
            if !istio.node_accounts.is_empty() && self.kubernetes.is_none() {
                let words = "nobody can be asked what runs on a node: write kubernetes: {}";
                wrong("/istio/node_accounts", words.to_owned());
            }
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

    fn check_store(&self, wrong: &mut impl FnMut(&str, String), sealed: bool) {
        let Self { store, replica, .. } = self;
        if store.etcd.is_some() && store.consul.is_some() {
            wrong("/store", "one of `etcd` and `consul`, not both".to_owned());
        }
        if store.is_shared() && !sealed {
            let words = "replicas need the same sealing key: write seal: {key_file: FILE} with a file that all of them have";
            wrong("/store", words.to_owned());
        }
        if !(5..=3600).contains(&store.signs_unread) {
            wrong("/store/signs_unread", "from 5 seconds to an hour".to_owned());
        }
        let plain = |name: &String| {
            let byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
            (1..=64).contains(&name.len()) && name.bytes().all(byte)
        };
        if let Some(name) = replica.as_ref().filter(|name| !plain(name)) {
            wrong("/replica", format!("`{name}` is not a name of letters, digits and `._-`: write ca-1"));
        }
        let is_url = |url: &String| url.starts_with("http://") || url.starts_with("https://");
        if let Some(etcd) = &store.etcd {
            if etcd.endpoints.is_empty() {
                wrong("/store/etcd/endpoints", "no endpoint: write [http://127.0.0.1:2379]".to_owned());
            }
            for (index, endpoint) in etcd.endpoints.iter().enumerate().filter(|(_, url)| !is_url(url)) {
                let words = format!("`{endpoint}` is not of the form http(s)://HOST:PORT");
                wrong(&format!("/store/etcd/endpoints/{index}"), words);
            }
            if etcd.user.is_some() != etcd.password_file.is_some() {
                wrong("/store/etcd", "`user` and `password_file` go together".to_owned());
            }
            if etcd.certificate_file.is_some() != etcd.key_file.is_some() {
                wrong("/store/etcd", "`certificate_file` and `key_file` go together".to_owned());
            }
        }
        if let Some(consul) = store.consul.as_ref().filter(|consul| !is_url(&consul.server)) {
            let words = format!("`{}` is not of the form http(s)://HOST:PORT", consul.server);
            wrong("/store/consul/server", words);
        }
        let timeouts = [
            ("etcd", store.etcd.as_ref().map(|etcd| etcd.timeout)),
            ("consul", store.consul.as_ref().map(|consul| consul.timeout)),
        ];
        for (name, _) in
            timeouts.iter().filter(|(_, given)| given.is_some_and(|given| !(1..=60).contains(&given)))
        {
            wrong(&format!("/store/{name}/timeout"), "from 1 to 60 seconds".to_owned());
        }
    }

    fn resolve(&mut self, dir: &Path) {
        let mut paths = vec![&mut self.data_dir];
        paths.extend(&mut self.seal.key_file);
        paths.extend(&mut self.seal.passphrase_file);
        paths.extend(&mut self.bundle_files);
        if let Some(etcd) = &mut self.store.etcd {
            paths.extend(&mut etcd.password_file);
            paths.extend(&mut etcd.ca_file);
            paths.extend(&mut etcd.certificate_file);
            paths.extend(&mut etcd.key_file);
        }
        if let Some(consul) = &mut self.store.consul {
            paths.extend(&mut consul.token_file);
            paths.extend(&mut consul.ca_file);
        }
        if let Some(kubernetes) = &mut self.kubernetes {
            paths.extend(&mut kubernetes.ca_file);
            paths.push(&mut kubernetes.token_file);
        }
        if let Some(consul) = &mut self.consul {
            paths.extend(&mut consul.ca_file);
        }
        if let Some(istio) = &mut self.istio {
            paths.extend(&mut istio.cert_file);
            paths.extend(&mut istio.key_file);
        }
        for path in paths {
            *path = dir.join(&*path);
        }
        if let Some(root) = &mut self.root {
            root.resolve(dir);
        }
    }
}

/// YAML reads a bare `off` as false.
pub(crate) fn address_or_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
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
        let istio = read("istio: {cert_file: a.pem, key_file: b.pem}").unwrap().istio.unwrap();
        assert_eq!(
            (istio.names.as_slice(), istio.audience.as_str()),
            (&["istiod.istio-system.svc".to_owned()][..], "istio-ca")
        );
        assert!(istio.cert_file.is_some_and(|path| path != Path::new("a.pem") && path.ends_with("a.pem")));
        assert_eq!(given.consul.unwrap().datacenter.as_deref(), Some("dc1"));
        assert_eq!(given.seal.key_file, Some(PathBuf::from("/etc/postern/k")));
        let shared =
            read("seal: {key_file: k}\nstore: {etcd: {ca_file: e.pem}}\nbundle_files: [b.pem]\n").unwrap();
        assert_eq!(shared.bundle_files, [PathBuf::from("/etc/postern/b.pem")]);
        let outside =
            read("root: {vault: {address: 'http://v', approle: {role_id: r, secret_id_file: s}}}").unwrap();
        let vault = outside.root.unwrap().vault.unwrap();
        assert_eq!(vault.approle.unwrap().secret_id_file, PathBuf::from("/etc/postern/s"));
        let outside =
            read("root: {cert_manager: {namespace: mesh, issuer: {name: root}, roots_file: r}}").unwrap();
        let given = outside.root.unwrap().cert_manager.unwrap();
        assert_eq!((&*given.issuer.kind, given.wait), ("Issuer", 60));
        assert!(given.token_file.starts_with("/var/run/secrets"));
        assert_eq!(given.roots_file, Some(PathBuf::from("/etc/postern/r")));
        let etcd = shared.store.etcd.unwrap();
        assert_eq!((etcd.timeout, etcd.ca_file), (5, Some(PathBuf::from("/etc/postern/e.pem"))));
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
            ("seal: {key_file: a}\nstore: {etcd: {}, consul: {}}", "store"),
            ("store: {etcd: {}}", "store"),
            ("seal: {key_file: a}\nstore: {etcd: {endpoints: ['127.0.0.1:2379']}}", "endpoints"),
            ("seal: {key_file: a}\nstore: {etcd: {user: root}}", "etcd"),
            ("seal: {key_file: a}\nstore: {consul: {server: localhost}}", "server"),
            ("store: {signs_unread: 1}", "signs_unread"),
            ("store: {file: {}}", "file"),
            ("replica: a b", "replica"),
            ("limits: {certificates_per_second: -1}", "certificates_per_second"),
            ("kubernetes: {audiences: [a]}", "audiences"),
            ("istio: {listen: istiod}", "listen"),
            ("istio: {names: []}", "names"),
            ("istio: {names: ['*.svc']}", "`*.svc` is not a DNS name"),
            ("istio: {cert_file: a.pem}", "go together"),
            ("istio: {audience: ''}", "audience"),
            ("kubernetes: {}\nistio: {node_accounts: [ztunnel]}", "NAMESPACE/NAME"),
            ("istio: {node_accounts: [istio-system/ztunnel]}", "kubernetes: {}"),
            ("istio: {ca_file: a}", "ca_file"),
            ("root: {}", "who has the key of the root"),
            ("root: {file: a.pem, vault: {address: 'http://a', token_file: t}}", "one of `vault`"),
            (
                "root: {vault: {address: 'http://a', token_file: t}, cert_manager: {namespace: a, issuer: {name: b}}}",
                "one of `vault`, `cert_manager` and `file`",
            ),
            ("root: {vault: {address: 'http://a'}}", "token_env"),
            ("root: {vault: {address: 'http://a', token_file: t, token_env: T}}", "token_env"),
            ("root: {vault: {address: 'a:8200', token_file: t}}", "address"),
            ("root: {vault: {address: 'http://a', token_file: t, timeout: 0}}", "timeout"),
            ("root: {cert_manager: {namespace: A/b, issuer: {name: b}}}", "namespace"),
            ("root: {cert_manager: {namespace: a, issuer: {name: a/b}}}", "name"),
            ("root: {cert_manager: {namespace: a, issuer: {name: b}, wait: 601}}", "wait"),
        ];
        for (text, place) in cases {
            let errors = read(text).unwrap_err().join("\n");
            assert!(errors.contains("ca.yaml:") && errors.contains(place), "{text}: {errors}");
        }
    }
}
