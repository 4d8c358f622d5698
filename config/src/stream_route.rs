//! Stream routes: which TCP or UDP connections are meant and where they go.
//!
//! They are matched by server name first and by addresses then. Global rules do not hold for them.

use std::num::NonZeroU16;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ConfigError;
use crate::fields::{Cidr, Desc, Host, Labels, Name, OwnId, Plugins, Timestamp};
use crate::id::Id;
use crate::secret_ref::Literals;
use crate::upstream::Upstream;

/// Match conditions of a TCP or UDP connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamRoute {
    /// The id, if the object carries it.
    #[serde(default, skip_serializing_if = "OwnId::is_elsewhere")]
    pub id: OwnId,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
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

    /// The address or network of the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_addr: Option<Cidr>,
    /// The address or network the client connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_addr: Option<Cidr>,
    /// The port the client connected to, 1 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_port: Option<NonZeroU16>,
    /// The server name in the TLS handshake: exact or `*.foo.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sni: Option<Host>,
    /// Plugins by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins: Option<Box<Plugins>>,
    /// The service whose upstream is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_id: Option<Id>,
    /// The upstream that connections go to. It wins over `upstream`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_id: Option<Id>,
    /// An upstream of this stream route alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Box<Upstream>>,
    /// The application protocol, where it is taken apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Box<StreamProtocol>>,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

/// An application protocol over a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamProtocol {
    /// Its name.
    pub name: Box<str>,
    /// The stream route this one refines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superior_id: Option<Id>,
    /// Settings of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conf: Option<Map<String, Value>>,
    /// What is logged, and where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Vec<StreamLogger>>,
}

/// A log of calls inside a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamLogger {
    /// The plugin that writes it.
    pub name: Box<str>,
    /// An expression: which calls are logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Vec<Value>>,
    /// Settings of the plugin.
    pub conf: Map<String, Value>,
}

impl StreamRoute {
    /// The rules between fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        if let Some(upstream) = &self.upstream {
            upstream.check("/upstream", errors);
        }
    }
}
