//! How a process is of the mesh: `ca` in `sidecar.yaml`, `postern.mesh` in `config.yaml`.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Seconds, Text};
use crate::typed;

/// A gateway of the mesh: `postern.mesh`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Membership {
    /// The trust domain of the mesh: `mesh.local`.
    pub trust_domain: Text<1, 255>,
    /// Where certificate and trust bundle come from.
    pub ca: Ca,
    /// The gateway's identity: `spiffe://mesh.local/ns/default/sa/edge`. What the certificate says if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Text<1, 2048>>,
    /// The name of its service, for a CA that goes by services.
    #[serde(default = "edge")]
    pub service: Text<1, 256>,
    /// How old a connection to a sidecar gets, in seconds; less where the certificate ends before.
    #[serde(default = "an_hour")]
    pub connection_age: Seconds,
}

fn edge() -> Text<1, 256> {
    Text::of_constant("edge")
}

fn an_hour() -> Seconds {
    Seconds::whole(3600)
}

impl Membership {
    /// Reads `value`, with paths that are relative to `dir`.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn read(value: &Value, dir: &Path) -> Result<Membership, Vec<ConfigError>> {
        let mut read: Membership = typed::parse(value)?;
        let mut errors: Vec<_> = read.ca.check().into_iter().map(|error| error.under("/ca")).collect();
        let identity = read.identity.as_deref();
        errors
            .extend(identity.and_then(|identity| check_identity(identity, &read.trust_domain, "/identity")));
        if !errors.is_empty() {
            return Err(errors);
        }
        read.ca.resolve(dir);
        Ok(read)
    }
}

/// Where certificate and trust bundle come from: one of `address`, `files`, `workload_api`, `consul`, `istio`, `vault`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ca {
    /// The CA of the mesh, `host:port`; several with commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Text<1, 1024>>,
    /// What the CA has to show: `sha256/` and the hash of its public key, base64, as `postern ca run` prints it. Several
    /// with commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<Text<1, 1024>>,
    /// A file with the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin_file: Option<PathBuf>,
    /// A file with a join token, or with the token of a service account of Kubernetes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// A file with an ACL token of Consul: the proof for the CA of the mesh, and what `consul` is asked with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul_token_file: Option<PathBuf>,
    /// This process among those with its identity, the same after a restart. The service and the name of the machine if it
    /// is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_id: Option<Text<1, 256>>,
    /// How long certificates are asked for, in seconds; what the CA gives if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Seconds>,
    /// PEM files, which are watched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<CaFiles>,
    /// The SPIFFE Workload API: `unix:/run/spire/agent.sock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload_api: Option<Text<1, 1024>>,
    /// Consul's own CA, at this agent: `http://127.0.0.1:8500`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul: Option<Text<1, 1024>>,
    /// PEM of the authorities of an agent with `https`; those of the system if it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consul_ca_file: Option<PathBuf>,
    /// istiod, or what speaks its `CreateCertificate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub istio: Option<Istio>,
    /// The PKI engine of Vault or OpenBao.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vault: Option<Vault>,
}

/// An authority with Istio's API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Istio {
    /// `host:port`: `istiod.istio-system.svc:15012`.
    pub address: Text<1, 1024>,
    /// The name in the authority's certificate, where it is not the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<Text<1, 253>>,
    /// PEM of the roots that the authority's own certificate is from: this, or `pin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The hash of the authority's key: `sha256/` and base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Text<1, 256>>,
    /// The token of the service account, with the audience of the authority.
    pub token_file: PathBuf,
    /// How long certificates are asked for, in seconds; what the authority gives if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Seconds>,
}

/// A PKI engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vault {
    /// The server: `https://vault.example.com:8200`.
    pub address: Text<1, 1024>,
    /// Where the engine is mounted; `pki` if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<Text<1, 256>>,
    /// The role that signs.
    pub role: Text<1, 256>,
    /// A token that somebody else keeps alive: this, or `approle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// An AppRole, by which a new token is got for each certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approle: Option<AppRole>,
    /// The namespace, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Text<1, 256>>,
    /// PEM of the authorities of an `https` server; those of the system if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// PEM of the roots to believe, where the engine does not hold its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots_file: Option<PathBuf>,
    /// How long certificates are asked for, in seconds; what the role gives if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Seconds>,
}

/// An AppRole of Vault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AppRole {
    /// Its id.
    pub role_id: Text<1, 256>,
    /// A file with the secret id.
    pub secret_id_file: PathBuf,
    /// Where the method is mounted; `approle` if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<Text<1, 256>>,
}

/// PEM files of an identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaFiles {
    /// The certificate, and those between it and the root.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The roots of the trust domain.
    pub trust: PathBuf,
    /// Revocation lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
}

impl Ca {
    /// What the types do not say and is wrong.
    #[must_use]
    pub fn check(&self) -> Vec<ConfigError> {
        let sources = [
            self.address.is_some(),
            self.files.is_some(),
            self.workload_api.is_some(),
            self.consul.is_some(),
            self.istio.is_some(),
            self.vault.is_some(),
        ];
        match sources.iter().filter(|is_there| **is_there).count() {
            1 => {}
            0 => {
                let fields = vec!["address", "files", "workload_api", "consul", "istio", "vault"];
                return vec![ConfigError::new("", ErrorKind::NoneOf { fields })];
            }
            _ => {
                let problem = "certificates come from one place: keep one of address, files, workload_api, consul, \
                               istio, vault";
                return vec![ConfigError::invalid("", problem)];
            }
        }
        let mut errors = Vec::new();
        let pinned = self.pin.is_some() || self.pin_file.is_some();
        if self.address.is_some() && !pinned {
            errors.push(ConfigError::invalid(
                "",
                "the CA is known by its key: write `pin`, which `postern ca run` prints, or `pin_file`",
            ));
        }
        for server in self.servers() {
            let port = server.rsplit_once(':').and_then(|(host, port)| {
                (!host.is_empty()).then(|| port.parse::<u16>().ok())?.filter(|port| *port > 0)
            });
            if port.is_none() {
                errors.push(ConfigError::invalid(
                    "/address",
                    format!("`{server}` is not a host with a port: write ca.mesh.local:15012"),
                ));
            }
        }
        let ours = [
            ("pin", self.pin.is_some()),
            ("pin_file", self.pin_file.is_some()),
            ("token_file", self.token_file.is_some()),
            ("proxy_id", self.proxy_id.is_some()),
            ("ttl", self.ttl.is_some()),
        ];
        for (key, _) in ours.into_iter().filter(|(_, written)| *written && self.address.is_none()) {
            errors.push(ConfigError::invalid(format!("/{key}"), "this needs `address`, the CA of the mesh"));
        }
        if self.consul_token_file.is_some() && self.address.is_none() && self.consul.is_none() {
            errors.push(ConfigError::invalid("/consul_token_file", "this needs `address` or `consul`"));
        }
        if self.consul_token_file.is_some() && self.token_file.is_some() {
            errors.push(ConfigError::invalid("/token_file", "one proof is enough: keep one of both files"));
        }
        if self.istio.as_ref().is_some_and(|istio| istio.ca_file.is_some() == istio.pin.is_some()) {
            errors.push(ConfigError::invalid(
                "/istio",
                "the authority is known by `ca_file` or by `pin`: write one",
            ));
        }
        if self.vault.as_ref().is_some_and(|vault| vault.token_file.is_some() == vault.approle.is_some()) {
            errors.push(ConfigError::invalid("/vault", "the proof is `token_file` or `approle`: write one"));
        }
        if self.consul_ca_file.is_some() && self.consul.is_none() {
            errors.push(ConfigError::invalid("/consul_ca_file", "this needs `consul`"));
        }
        errors
    }

    /// The addresses of the CA of the mesh.
    pub fn servers(&self) -> impl Iterator<Item = &str> {
        let list = self.address.as_deref().unwrap_or_default();
        list.split(',').map(str::trim).filter(|server| !server.is_empty())
    }

    /// Makes paths of those that are relative to the file.
    pub fn resolve(&mut self, dir: &Path) {
        let own = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = dir.join(&*path);
            }
        };
        let Ca { pin_file, token_file, consul_token_file, consul_ca_file, files, istio, vault, .. } = self;
        [pin_file, token_file, consul_token_file, consul_ca_file].into_iter().flatten().for_each(own);
        if let Some(Istio { ca_file, token_file, .. }) = istio {
            ca_file.iter_mut().chain([token_file]).for_each(own);
        }
        if let Some(Vault { token_file, approle, ca_file, roots_file, .. }) = vault {
            [token_file, ca_file, roots_file].into_iter().flatten().for_each(own);
            approle.iter_mut().map(|approle| &mut approle.secret_id_file).for_each(own);
        }
        if let Some(CaFiles { cert, key, trust, crl }) = files {
            [cert, key, trust].into_iter().chain(crl).for_each(own);
        }
    }
}

/// Whether `identity` is one of `domain`.
pub(crate) fn check_identity(identity: &str, domain: &str, pointer: &str) -> Option<ConfigError> {
    let own = format!("spiffe://{domain}/");
    let is_one = identity.starts_with(&own) && identity.len() > own.len() && !identity.contains('*');
    (!is_one).then(|| {
        let problem = format!("`{identity}` is no identity of `{domain}`: write {own}ns/default/sa/NAME");
        ConfigError::invalid(pointer, problem)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn a_membership_is_read_with_its_paths_and_everything_wrong_is_told() {
        let good = json!({"trust_domain": "mesh.local", "identity": "spiffe://mesh.local/ns/a/sa/edge",
            "ca": {"address": "ca-1:15012, ca-2:15012", "pin_file": "pin", "token_file": "/run/token"}});
        let read = Membership::read(&good, Path::new("/etc/postern")).unwrap();
        assert_eq!(read.ca.servers().collect::<Vec<_>>(), ["ca-1:15012", "ca-2:15012"]);
        assert_eq!(read.ca.pin_file.as_deref(), Some(Path::new("/etc/postern/pin")));
        assert_eq!(read.ca.token_file.as_deref(), Some(Path::new("/run/token")));
        assert_eq!((&*read.service, read.connection_age.duration().as_secs()), ("edge", 3600));
        for (ca, at, told) in [
            (json!({}), "/ca", "workload_api"),
            (json!({"consul": "http://a", "workload_api": "unix:/a"}), "/ca", "from one place"),
            (json!({"address": "ca:15012"}), "/ca", "`postern ca run` prints"),
            (json!({"address": "ca", "pin": "x"}), "/ca/address", "`ca` is not a host with a port"),
            (json!({"address": ":1", "pin": "x"}), "/ca/address", "not a host with a port"),
            (json!({"consul": "http://a", "pin": "x"}), "/ca/pin", "needs `address`"),
            (json!({"workload_api": "unix:/a", "consul_token_file": "x"}), "/ca/consul_token_file", "needs"),
            (json!({"addres": "ca:15012"}), "/ca/addres", "address"),
            (json!({"istio": {"address": "a:1", "token_file": "t"}}), "/ca/istio", "`ca_file` or by `pin`"),
            (
                json!({"vault": {"address": "http://a", "role": "r"}}),
                "/ca/vault",
                "`token_file` or `approle`",
            ),
        ] {
            let errors = Membership::read(&json!({"trust_domain": "mesh.local", "ca": ca}), Path::new(""))
                .unwrap_err();
            let [error] = &*errors else { panic!("{errors:?}") };
            assert!(error.pointer == at && error.to_string().contains(told), "{error}");
        }
        let other = json!({"trust_domain": "mesh.local", "identity": "spiffe://other/a",
            "ca": {"workload_api": "unix:/run/agent.sock"}});
        let [error] = &*Membership::read(&other, Path::new("")).unwrap_err() else { panic!("one") };
        assert!(error.to_string().contains("no identity of `mesh.local`"), "{error}");
    }
}
