//! A line of the access log for each connection that carried no requests: who, where to, how much, how long, and why it
//! ended. In nginx's words for streams, with those of the mesh.

use std::borrow::Cow;

use certs::mesh::MeshIdentity;
use config::var::{Var, Vars};
use layers::http::access_log::AccessLog;
use layers::telemetry::time;

use crate::connections::Connection;

/// A line where nothing is written.
pub const FORMAT: &str = "$remote_addr [$time_local] $mesh_direction $protocol $peer_identity $mesh_service $server_port \
                          $bytes_received $bytes_sent $session_time $upstream_addr $reason";

/// Why a connection ended that nobody has said anything about: it was ended from outside.
const CUT: &str = "cut";

/// Where the lines go.
pub struct ConnectionLog {
    log: AccessLog,
    identity: MeshIdentity,
}

impl ConnectionLog {
    /// To `log`; `identity` is our own.
    pub fn new(log: AccessLog, identity: MeshIdentity) -> Self {
        Self { log, identity }
    }

    /// Writes the line of a connection that has ended.
    pub fn write(&self, connection: &Connection) {
        let own = self.identity.svid();
        let own = own.as_ref().map(|svid| svid.id().as_str());
        self.log.write(&Line { connection, own });
    }
}

struct Line<'a> {
    connection: &'a Connection,
    own: Option<&'a str>,
}

impl Vars for Line<'_> {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        let connection = self.connection;
        let owned = |text: String| Some(Cow::Owned(text));
        match var {
            Var::RemoteAddr | Var::RealipRemoteAddr => owned(connection.peer.ip().to_canonical().to_string()),
            Var::RemotePort | Var::RealipRemotePort => owned(connection.peer.port().to_string()),
            Var::ServerAddr => owned(connection.local.ip().to_canonical().to_string()),
            Var::ServerPort => owned(connection.port.to_string()),
            Var::Connection => owned(connection.id.to_string()),
            Var::TimeLocal => owned(time::common_log(std::time::SystemTime::now())),
            Var::TimeIso8601 => owned(time::iso8601(std::time::SystemTime::now())),
            Var::SessionTime => {
                owned(format!("{:.3}", connection.since.elapsed().unwrap_or_default().as_secs_f64()))
            }
            Var::BytesReceived => owned(connection.traffic.received().to_string()),
            Var::BytesSent => owned(connection.traffic.sent().to_string()),
            Var::Protocol => connection.protocol().map(Cow::Borrowed),
            Var::UpstreamAddr => owned(connection.upstream()?.to_string()),
            Var::Other(name) => match &**name {
                "mesh_direction" => Some(Cow::Borrowed(connection.direction.as_str())),
                "peer_identity" => connection.identity().map(|peer| Cow::Borrowed(peer.id.as_str())),
                "own_identity" => self.own.map(Cow::Borrowed),
                "mesh_service" => connection.service().map(|service| Cow::Borrowed(&**service)),
                "reason" => Some(Cow::Borrowed(connection.reason().unwrap_or(CUT))),
                _ => None,
            },
            _ => None,
        }
    }
}
