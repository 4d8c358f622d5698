//! `root` of `ca.yaml`: who has the key of the root, where that is not the authority.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::Text;
use crate::membership::AppRole;

const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Who has the key of the root and signs issuers: one of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Root {
    /// The PKI engine of Vault or OpenBao.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vault: Option<Vault>,
    /// An issuer of cert-manager.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_manager: Option<CertManager>,
    /// Somebody who signs by hand: PEM of an issuer, those above it, the root, and the issuer's key; or of a root and its
    /// key. Read at the first start alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// A PKI engine that signs issuers (`sign-intermediate`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vault {
    /// The server: `https://vault.example.com:8200`.
    pub address: Text<1, 1024>,
    /// Where the engine is mounted; `pki` if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<Text<1, 256>>,
    /// Which issuer of the engine signs, by its name or id; its default one if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<Text<1, 256>>,
    /// A file with a token that somebody else keeps alive: this, `token_env` or `approle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The environment variable with such a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<Text<1, 256>>,
    /// An AppRole, by which a new token is got each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approle: Option<AppRole>,
    /// The namespace, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Text<1, 256>>,
    /// PEM of the authorities of an `https` server; those of the system if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// PEM of the root, where the engine does not hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots_file: Option<PathBuf>,
    /// For one question, in seconds.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 60))]
    pub timeout: u32,
}

/// An issuer of cert-manager that signs authorities: a CA issuer, or one of another controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CertManager {
    /// Where CertificateRequests are made.
    pub namespace: Text<1, 63>,
    /// Who signs them.
    pub issuer: IssuerRef,
    /// The API server.
    #[serde(default = "cluster")]
    pub server: Text<1, 1024>,
    /// Its authorities in PEM.
    #[serde(default = "mounted_ca")]
    pub ca_file: PathBuf,
    /// The token of the service account that may create and get CertificateRequests.
    #[serde(default = "mounted_token")]
    pub token_file: PathBuf,
    /// PEM of the root, where the issuer does not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots_file: Option<PathBuf>,
    /// How long a request is waited for, in seconds. It stays: the next attempt goes on with it.
    #[serde(default = "a_minute")]
    #[schemars(range(min = 1, max = 600))]
    pub wait: u32,
}

/// `issuerRef` of a CertificateRequest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IssuerRef {
    /// Its name.
    pub name: Text<1, 253>,
    /// `Issuer`, `ClusterIssuer`, or that of another controller.
    #[serde(default = "issuer")]
    pub kind: Text<1, 63>,
    /// The group of the kind.
    #[serde(default = "group")]
    pub group: Text<1, 253>,
}

fn ten() -> u32 {
    10
}

fn a_minute() -> u32 {
    60
}

fn cluster() -> Text<1, 1024> {
    Text::of_constant("https://kubernetes.default.svc")
}

fn issuer() -> Text<1, 63> {
    Text::of_constant("Issuer")
}

fn group() -> Text<1, 253> {
    Text::of_constant("cert-manager.io")
}

fn mounted_ca() -> PathBuf {
    Path::new(ACCOUNT).join("ca.crt")
}

fn mounted_token() -> PathBuf {
    Path::new(ACCOUNT).join("token")
}

impl Root {
    pub(super) fn check(&self, wrong: &mut impl FnMut(&str, String)) {
        let given = [self.vault.is_some(), self.cert_manager.is_some(), self.file.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            let words = "who has the key of the root: one of `vault`, `cert_manager` and `file`";
            wrong("/root", words.to_owned());
        }
        let is_url = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        if let Some(vault) = &self.vault {
            if !is_url(&vault.address) {
                let words = format!("`{}` is not of the form http(s)://HOST:PORT", vault.address);
                wrong("/root/vault/address", words);
            }
            let proofs = [vault.token_file.is_some(), vault.token_env.is_some(), vault.approle.is_some()];
            if proofs.iter().filter(|given| **given).count() != 1 {
                wrong(
                    "/root/vault",
                    "the proof is one of `token_file`, `token_env` and `approle`".to_owned(),
                );
            }
            if !(1..=60).contains(&vault.timeout) {
                wrong("/root/vault/timeout", "from 1 to 60 seconds".to_owned());
            }
        }
        if let Some(given) = &self.cert_manager {
            if !is_url(&given.server) {
                let words = format!("`{}` is not of the form http(s)://HOST:PORT", given.server);
                wrong("/root/cert_manager/server", words);
            }
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            if !given.issuer.name.bytes().all(|byte| plain(byte) || byte == b'.') {
                let words = format!("`{}` is not the name of an issuer", given.issuer.name);
                wrong("/root/cert_manager/issuer/name", words);
            }
            if !given.namespace.bytes().all(plain) {
                let words = format!("`{}` is not the name of a namespace", given.namespace);
                wrong("/root/cert_manager/namespace", words);
            }
            if !(1..=600).contains(&given.wait) {
                wrong("/root/cert_manager/wait", "from 1 to 600 seconds".to_owned());
            }
        }
    }

    pub(super) fn resolve(&mut self, dir: &Path) {
        let mut paths: Vec<&mut PathBuf> = self.file.iter_mut().collect();
        if let Some(vault) = &mut self.vault {
            paths.extend(&mut vault.token_file);
            paths.extend(&mut vault.ca_file);
            paths.extend(&mut vault.roots_file);
            paths.extend(vault.approle.as_mut().map(|approle| &mut approle.secret_id_file));
        }
        if let Some(given) = &mut self.cert_manager {
            paths.extend([&mut given.ca_file, &mut given.token_file]);
            paths.extend(&mut given.roots_file);
        }
        for path in paths {
            *path = dir.join(&*path);
        }
    }
}
