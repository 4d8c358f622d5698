//! Secret managers: where `$secret://MANAGER/ID/...` references are looked up.
//!
//! The first part of the id names the manager and so decides which fields there are. Their own credentials may
//! be references to the environment.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fields::{OwnId, Timestamp, Url};
use crate::rules::{Rule, Rules};
use crate::secret_ref::Literals;
use crate::sensitive::Sensitive;

/// A secret manager.
#[derive(Clone, Debug, PartialEq)]
pub enum Secret {
    /// HashiCorp Vault.
    Vault(Box<Vault>),
    /// AWS Secrets Manager.
    Aws(Box<Aws>),
    /// Google Cloud Secret Manager.
    Gcp(Box<Gcp>),
}

/// The secret managers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Manager {
    /// HashiCorp Vault.
    Vault,
    /// AWS Secrets Manager.
    Aws,
    /// Google Cloud Secret Manager.
    Gcp,
}

impl Manager {
    /// Every manager once.
    pub const ALL: [Manager; 3] = [Manager::Vault, Manager::Aws, Manager::Gcp];

    /// The name in ids and paths.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Manager::Vault => "vault",
            Manager::Aws => "aws",
            Manager::Gcp => "gcp",
        }
    }

    /// The manager of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Manager> {
        Manager::ALL.into_iter().find(|manager| manager.name() == name)
    }
}

/// HashiCorp Vault, KV engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vault {
    /// The id, if the object carries it: `vault/ID` or `ID`.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    #[schemars(schema_with = "own_id")]
    pub id: OwnId,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// The address of Vault: `https://vault.internal:8200`.
    pub uri: Url,
    /// The path before the name of a secret, beginning with that of the engine.
    pub prefix: Box<str>,
    /// The token requests are made with.
    pub token: Sensitive,
    /// The namespace, for Vault Enterprise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Box<str>>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

/// AWS Secrets Manager.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Aws {
    /// The id, if the object carries it: `aws/ID` or `ID`.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    #[schemars(schema_with = "own_id")]
    pub id: OwnId,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// The access key.
    pub access_key_id: Box<str>,
    /// The secret of the access key.
    pub secret_access_key: Sensitive,
    /// The token of a temporary access key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_token: Option<Sensitive>,
    /// The region.
    #[serde(default = "us_east_1")]
    pub region: Box<str>,
    /// The address of the service. That of the region if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<Url>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

/// Google Cloud Secret Manager. Either `auth_config` or `auth_file`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(GCP_RULES))]
pub struct Gcp {
    /// The id, if the object carries it: `gcp/ID` or `ID`.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    #[schemars(schema_with = "own_id")]
    pub id: OwnId,
    /// When the object was created, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<Timestamp>,
    /// When the object was last changed, in seconds since 1970; set by the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_time: Option<Timestamp>,

    /// The service account, written here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_config: Option<Box<GcpAuth>>,
    /// The service account, in a JSON file on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_file: Option<Box<str>>,
    /// Whether the certificate of the service is verified.
    #[serde(default = "yes")]
    pub ssl_verify: bool,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

pub(crate) const GCP_RULES: &[Rule] = &[Rule::ExactlyOne("auth_config", "auth_file")];

/// A service account of Google Cloud.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GcpAuth {
    /// The e-mail address of the service account.
    pub client_email: Box<str>,
    /// Its private key, in PEM.
    pub private_key: Sensitive,
    /// The project.
    pub project_id: Box<str>,
    /// Where access tokens are asked for.
    #[serde(default = "google_token_uri")]
    pub token_uri: Url,
    /// The rights that are asked for.
    #[serde(default = "google_scope")]
    pub scope: Vec<Box<str>>,
    /// Where secrets are asked for.
    #[serde(default = "google_entries_uri")]
    pub entries_uri: Url,
}

impl Secret {
    /// Which manager it is.
    #[must_use]
    pub fn manager(&self) -> Manager {
        match self {
            Secret::Vault(_) => Manager::Vault,
            Secret::Aws(_) => Manager::Aws,
            Secret::Gcp(_) => Manager::Gcp,
        }
    }
}

fn us_east_1() -> Box<str> {
    "us-east-1".into()
}

fn yes() -> bool {
    true
}

fn google_token_uri() -> Url {
    Url::constant("https://oauth2.googleapis.com/token")
}

fn google_entries_uri() -> Url {
    Url::constant("https://secretmanager.googleapis.com/v1")
}

fn google_scope() -> Vec<Box<str>> {
    vec!["https://www.googleapis.com/auth/cloud-platform".into()]
}

fn own_id(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "anyOf": [
            {
                "type": "string", "minLength": 1, "maxLength": 70,
                "pattern": "^((vault|aws|gcp)/)?[a-zA-Z0-9_.-]+$",
            },
            {"type": "integer", "minimum": 1},
        ],
    })
}
