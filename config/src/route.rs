//! Routes: which requests are meant, what is done with them and where they go.
//!
//! A route without its own upstream takes that of its service; settings of the route win over those of the
//! service. Lua in a route is refused: a gateway that leaves it out would serve what the Lua forbids.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::ConfigError;
use crate::fields::{
    Cidr, Desc, Distinct, Host, Labels, Method, Name, OwnId, Plugins, Status, Timeout, Timestamp, WideText,
};
use crate::id::Id;
use crate::rules::{Rule, Rules};
use crate::secret_ref::Literals;
use crate::upstream::Upstream;

/// Match conditions, plugins and where to send the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = Rules(RULES))]
pub struct Route {
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

    /// The path: exact (`/a`), a prefix (`/a*`), or with parameters (`/a/:id`, `/a/*rest`) where the router has
    /// them. Either this or `uris`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<Uri>,
    /// Several paths, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uris: Option<Box<Distinct<Uri>>>,
    /// The host: exact or `*.foo.com`. Either this or `hosts`; any host if both are absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// Several hosts, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Box<Distinct<Host>>>,
    /// The address or network of the client. Either this or `remote_addrs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_addr: Option<Box<Cidr>>,
    /// Several addresses or networks, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_addrs: Option<Box<Distinct<Cidr>>>,
    /// The methods; any if it is absent or empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub methods: Option<Box<Distinct<Method, 0>>>,
    /// Among routes of the same path the one with the higher priority is looked at first.
    #[serde(default)]
    pub priority: i32,
    /// An expression over variables of the request: `[["arg_a", "==", "1"], ["http_x", "~~", "^y"]]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Value>>")]
    pub vars: Option<Box<Value>>,

    /// Plugins by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins: Option<Box<Plugins>>,
    /// The plugin config whose plugins are added. The route's own win.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin_config_id: Option<Box<Id>>,
    /// The service whose plugins, hosts and upstream are added. The route's own win.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_id: Option<Id>,
    /// The upstream that requests go to. It wins over `upstream`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_id: Option<Id>,
    /// An upstream of this route alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Box<Upstream>>,
    /// Time limits that win over those of the upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Box<Timeout>>,
    /// Whether a connection may be upgraded to WebSocket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_websocket: Option<bool>,
    /// 1 if the route is in use, 0 if it is switched off.
    #[serde(default)]
    pub status: Status,

    /// References to secrets, as they were written.
    #[serde(skip)]
    pub literals: Literals,
}

pub(crate) const RULES: &[Rule] = &[
    Rule::ExactlyOne("uri", "uris"),
    Rule::AtMostOne("host", "hosts"),
    Rule::AtMostOne("remote_addr", "remote_addrs"),
    Rule::AnyOf(&["upstream", "upstream_id", "service_id", "plugins"]),
];

/// A path of 1 to 4096 characters.
pub type Uri = WideText<1, 4096>;

impl Route {
    /// The paths, however they are written.
    pub fn uris(&self) -> impl Iterator<Item = &str> {
        self.uri.iter().chain(self.uris.iter().flat_map(|uris| uris.iter())).map(|uri| &**uri)
    }

    /// The hosts, however they are written. None means any host, or those of the service.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.host.iter().chain(self.hosts.iter().flat_map(|hosts| hosts.iter()))
    }

    /// The client addresses, however they are written. None means any.
    pub fn remote_addrs(&self) -> impl Iterator<Item = &Cidr> {
        self.remote_addr
            .iter()
            .map(|addr| &**addr)
            .chain(self.remote_addrs.iter().flat_map(|addrs| addrs.iter()))
    }

    /// The methods. None means any.
    #[must_use]
    pub fn methods(&self) -> &[Method] {
        self.methods.as_deref().map_or(&[], |methods| methods)
    }

    /// The rules between values of fields.
    pub(crate) fn check(&self, errors: &mut Vec<ConfigError>) {
        if let Some(upstream) = &self.upstream {
            upstream.check("/upstream", errors);
        }
    }
}
