//! Certificates: those shown to clients by server name, and those shown to upstreams.
//!
//! Whether a certificate and its key belong together is found out where TLS is, not here.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, ErrorKind};
use crate::fields::{Desc, Distinct, Host, Int, Labels, List, OwnId, Status, Text, Timestamp};
use crate::key_material::{KeyMaterial, SignerKey};
use crate::pattern;
use crate::rules::{Rule, Rules};
use crate::secret_ref::Literals;

/// A certificate in PEM: 128 bytes to 64 KiB.
pub type Certificate = Text<128, 65536>;

/// Certificates by server name, or a client certificate for upstreams.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(RULES))]
pub struct Ssl {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// A description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<Desc>,
    /// Attributes by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Box<Labels>>,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// Whom the certificate is shown to.
    #[serde(default, rename = "type")]
    pub kind: SslType,
    /// A certificate from the authority of `postern.acme` in `config.yaml`, in place of `cert` and `key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acme: Option<Acme>,
    /// The certificate with its chain, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert: Option<Certificate>,
    /// The private key of `cert`, in PEM; or `signer://POOL/KEY`, the name of one that nodes of `postern signer` hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyMaterial>,
    /// Further certificates for the same names, such as an ECDSA one beside an RSA one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certs: Vec<Certificate>,
    /// The private keys of `certs`, in the same order: all in PEM, or all at the pool of `key`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyMaterial>,
    /// The server name: exact, `*.foo.com` for one label more, or `*` for any. Either this or `snis`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sni: Option<Host>,
    /// Several server names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snis: Option<List<Host>>,
    /// Clients must show a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientAuth>,
    /// The versions of TLS that are spoken. All that the gateway speaks if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssl_protocols: Option<Distinct<TlsVersion, 0>>,
    /// 1 if the object is in use, 0 if it is switched off.
    #[serde(default)]
    pub status: Status,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

pub(crate) const RULES: &[Rule] = &[
    Rule::ExactlyOne("cert", "acme"),
    Rule::Needs { field: "cert", needs: "key" },
    Rule::AtMostOne("key", "acme"),
    Rule::Needs { field: "certs", needs: "cert" },
    Rule::AtMostOne("sni", "snis"),
    Rule::AnyOfUnless { field: "type", is: "client", of: &["sni", "snis"] },
];

/// A certificate that an ACME authority gives and the gateway renews.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Acme {
    /// How the names are shown to be ours; `postern.acme.challenge` if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge: Option<AcmeChallenge>,
}

/// How a name is shown to be ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AcmeChallenge {
    /// The authority asks `http://NAME/` on port 80.
    #[default]
    #[serde(rename = "http-01")]
    Http01,
    /// The authority shakes hands with port 443 of the name.
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
}

/// The most names that public authorities put into one certificate.
const ACME_NAMES: usize = 100;

/// Whom a certificate is shown to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SslType {
    /// To clients that ask for one of the server names.
    #[default]
    Server,
    /// To upstreams that refer to it.
    Client,
}

/// What clients must show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientAuth {
    /// The authorities that client certificates are verified against, in PEM.
    pub ca: Certificate,
    /// The longest chain between a client certificate and an authority.
    #[serde(default)]
    pub depth: Int<0, { u32::MAX }, 1>,
    /// Regular expressions over the path: where one matches, no client certificate is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_mtls_uri_regex: Option<Distinct<Box<str>>>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TlsVersion {
    /// Accepted in lists so that those of APISIX can be read; never spoken.
    #[serde(rename = "TLSv1.1")]
    V1_1,
    /// TLS 1.2.
    #[serde(rename = "TLSv1.2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "TLSv1.3")]
    V1_3,
}

impl Ssl {
    /// The server names, however they are written.
    pub fn snis(&self) -> impl Iterator<Item = &Host> {
        self.sni.iter().chain(self.snis.iter().flat_map(|snis| snis.iter()))
    }

    /// Certificates with their keys, the main one first.
    pub fn pairs(&self) -> impl Iterator<Item = (&Certificate, &KeyMaterial)> {
        self.cert.iter().zip(&self.key).chain(self.certs.iter().zip(&self.keys))
    }

    /// What is wrong with an object that asks for a certificate where no authority is configured.
    pub fn check_acme(&self, is_configured: bool) -> Option<ConfigError> {
        let told =
            "no authority is configured: write `postern.acme` in config.yaml, or `cert` and `key` here";
        (self.acme.is_some() && !is_configured).then(|| ConfigError::invalid("/acme", told))
    }

    /// Whether an authority can give a certificate for the names.
    fn check_names(&self, errors: &mut Vec<ConfigError>) {
        if self.acme.is_none() {
            return;
        }
        if self.kind == SslType::Client {
            let told =
                "client certificates for upstreams are not given by ACME authorities: write `cert` and `key`";
            errors.push(ConfigError::invalid("/acme", told));
        }
        if self.snis().count() > ACME_NAMES {
            let told = format!("a certificate has {ACME_NAMES} names at most: write several objects");
            errors.push(ConfigError::invalid("/snis", told));
        }
        for (index, name) in self.snis().enumerate() {
            let pointer = if self.sni.is_some() { "/sni".to_owned() } else { format!("/snis/{index}") };
            if name.is_wildcard() {
                let told = format!(
                    "`{}` needs the challenge DNS-01, which is not offered: write each name, or `cert` and `key`",
                    name.as_str()
                );
                errors.push(ConfigError::invalid(pointer, told));
            } else if !is_public(name) {
                let told = format!("`{}` is no DNS name that an authority could look at", name.as_str());
                errors.push(ConfigError::invalid(pointer, told));
            }
        }
    }

    /// The pool of signers that holds the keys, if they are not here.
    pub fn signers(&self) -> Option<&str> {
        self.key.as_ref()?.remote().map(|key| &*key.pool)
    }

    /// What is wrong where these are the pools of signers that are configured.
    pub fn check_signers<'a>(&self, pools: impl IntoIterator<Item = &'a str>) -> Option<ConfigError> {
        let pool = self.signers()?;
        let pools: Vec<&str> = pools.into_iter().collect();
        if pools.contains(&pool) {
            return None;
        }
        let known = match pools.as_slice() {
            [] => "`postern.signers` of config.yaml has none".to_owned(),
            some => format!("`postern.signers` of config.yaml has {}", some.join(", ")),
        };
        Some(ConfigError::invalid("/key", format!("there is no pool of signers `{pool}`: {known}")))
    }

    /// Where keys are.
    fn check_keys(&self, errors: &mut Vec<ConfigError>) {
        let pool = |key: &KeyMaterial| key.remote().map(|SignerKey { pool, .. }| pool.clone());
        let first = self.key.as_ref().and_then(pool);
        if first.is_some() && self.kind == SslType::Client {
            let words =
                "signers sign handshakes of servers alone: write the key of a client certificate in PEM";
            errors.push(ConfigError::invalid("/key", words));
        }
        for (index, _) in self.keys.iter().enumerate().filter(|(_, key)| pool(key) != first) {
            let words = match &first {
                Some(pool) => format!("`key` is at the pool `{pool}`: all keys of an object are at one pool"),
                None => {
                    "`key` is in PEM: the keys of an object are all in PEM, or all at one pool".to_owned()
                }
            };
            errors.push(ConfigError::invalid(format!("/keys/{index}"), words));
        }
    }

    /// The rules between values of fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        self.check_keys(errors);
        self.check_names(errors);
        let mut error = |pointer: &str, kind| errors.push(ConfigError::new(pointer, kind));
        if self.certs.len() != self.keys.len() {
            let kind = ErrorKind::OutOfRange {
                what: "the number of keys",
                found: self.keys.len().to_string(),
                allowed: format!("one key for each of the {} certificates in `certs`", self.certs.len()),
            };
            error("/keys", kind);
        }
        if let Some(protocols) = &self.ssl_protocols
            && protocols.iter().all(|version| *version == TlsVersion::V1_1)
            && !protocols.is_empty()
        {
            let kind = ErrorKind::Unsupported {
                what: "TLS 1.1 alone".to_owned(),
                instead: "write TLSv1.2, TLSv1.3 or both".to_owned(),
            };
            error("/ssl_protocols", kind);
        }
        let patterns = self.client.iter().flat_map(|client| client.skip_mtls_uri_regex.iter().flatten());
        for (index, text) in patterns.enumerate() {
            if let Err(problem) = pattern::compile(text, false) {
                let pointer = format!("/client/skip_mtls_uri_regex/{index}");
                error(&pointer, ErrorKind::Pattern(problem));
            }
        }
    }
}

/// A name of at least two labels, and no address.
fn is_public(name: &str) -> bool {
    let label = |label: &str| {
        let fits = (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-');
        fits && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|b| b.is_ascii_digit());
    name.len() <= 253 && name.contains('.') && !is_number && name.split('.').all(label)
}
