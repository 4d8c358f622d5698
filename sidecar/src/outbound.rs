//! Connections of the workload: where they want to go, what they speak, and the way there.
//!
//! Every way in ends at the same place: a destination is known (a listener stands for a service, a client of a proxy or of
//! SOCKS5 has said it, a redirected connection had it), or each request says it. Requests go through the stack; bytes that
//! nobody understands go to one endpoint of the service. What is no service is passed on as it is, if policy allows it.

use std::sync::Arc;

use bytes::Bytes;
use config::mesh::Protocol;
use layers::error::{Error, Reason};
use layers::exchange::{Conn, OwnDoor};
use layers::local::LocalBox;
use layers::target::Destination;
use layers::telemetry::metrics::Metrics;
use layers::transport::detect::{First, HelloRead, hello};
use layers::transport::tcp;
use layers::upstream::cluster::Cluster;
use layers::upstream::opaque::{self, OpaqueStream};
use layers::worker::io::{Socket, Stream};
use layers::worker::serve::Speaks;
use layers::worker::view::Published;
use layers::worker::{Arrival, Doorman, Met};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::connect::{self, Asked};
use crate::connections::{Begun, Connections, Direction, Tracked};
use crate::door::{SideDoor, To, Way};
use crate::egress;
use crate::policy::Sight;
use crate::snapshot::{Passthrough, Service, Snapshot};
use crate::socks5::{self, Reply};
use crate::speaks::{self, Spoken};

/// What the workload is told when a way that it asked for by `CONNECT` is open, or is not.
const OPENED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";
const FORBIDDEN: &[u8] = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
const UNREACHABLE: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// How the workload says where it wants to go.
#[derive(Clone, Debug)]
pub enum Kind {
    /// The listener stands for a service.
    Service(Arc<str>),
    /// As to a forward proxy.
    HttpProxy,
    /// As to a SOCKS5 proxy.
    Socks5,
}

/// What connections of the workload are carried with; shared by all listeners.
pub struct Carrier {
    /// What the file says.
    pub snapshot: Arc<Published<Snapshot>>,
    /// Ways out of the mesh.
    pub passthrough: Passthrough,
    /// Open connections.
    pub connections: Connections,
    /// What the policies say.
    pub policies: Arc<Published<Sight>>,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
}

/// Meets the connections of one listener.
pub struct Outbound {
    /// How they say where they go.
    pub kind: Kind,
    /// What they are carried with.
    pub carrier: Arc<Carrier>,
}

impl Doorman for Outbound {
    fn meet(self: Arc<Self>, socket: Socket, arrival: Arrival) -> LocalBox<'static, Met> {
        Box::pin(async move {
            let peer = arrival.ends.source;
            let met = match &self.kind {
                Kind::Service(name) => {
                    self.carrier
                        .clone()
                        .carry(socket, &arrival, To::Service(name.clone()), Answer::None)
                        .await
                }
                Kind::HttpProxy => self.proxy(socket, &arrival).await,
                Kind::Socks5 => self.socks5(socket, &arrival).await,
            };
            met.unwrap_or_else(|error| {
                tracing::info!(%peer, %error, "connection of the workload ended");
                Met::Over
            })
        })
    }
}

/// How the client hears whether its way could be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does not: the connection ends.
    None,
    /// As the answer to `CONNECT`.
    Connect,
    /// As SOCKS5 has it.
    Socks5,
}

impl Answer {
    async fn opened(self, socket: &mut Socket) -> std::io::Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Connect => socket.write_all(OPENED).await,
            Self::Socks5 => socks5::reply(socket, Reply::Succeeded).await,
        }
    }

    async fn refused(self, socket: &mut Socket, forbidden: bool) {
        // Best effort: a client that is gone needs no answer.
        let _ = match (self, forbidden) {
            (Self::None, _) => Ok(()),
            (Self::Connect, true) => socket.write_all(FORBIDDEN).await,
            (Self::Connect, false) => socket.write_all(UNREACHABLE).await,
            (Self::Socks5, true) => socks5::reply(socket, Reply::Forbidden).await,
            (Self::Socks5, false) => socks5::reply(socket, Reply::Failed).await,
        };
        let _ = socket.shutdown().await;
    }
}

impl Outbound {
    /// A client of a forward proxy: asks for a way, or sends requests with whole targets.
    async fn proxy(&self, mut socket: Socket, arrival: &Arrival) -> Result<Met, Error> {
        let mut read = Vec::new();
        loop {
            if socket.read_buf(&mut read).await.map_err(gone)? == 0 {
                return Ok(Met::Over);
            }
            match connect::read(&read) {
                Asked::Partial => {}
                Asked::Connect { host, port, length } => {
                    socket.put_back(read.get(length..).unwrap_or_default());
                    let to = To::Host(host.into(), port);
                    return self.carrier.clone().carry(socket, arrival, to, Answer::Connect).await;
                }
                Asked::Request => {
                    socket.put_back(&read);
                    let tracked = self.carrier.begin(arrival, 0);
                    return Ok(http(socket, arrival, To::Asked, tracked, Speaks::Either));
                }
            }
        }
    }

    async fn socks5(&self, mut socket: Socket, arrival: &Arrival) -> Result<Met, Error> {
        let (host, port) = socks5::destination(&mut socket)
            .await
            .map_err(|problem| Error::new(Reason::BadRequest).because(problem))?;
        self.carrier.clone().carry(socket, arrival, To::Host(host.into(), port), Answer::Socks5).await
    }
}

/// Where the bytes of a connection go, if nobody understands them.
struct Opaque {
    cluster: Arc<Cluster>,
    service: Option<Arc<Service>>,
}

impl Carrier {
    fn begin(&self, arrival: &Arrival, port: u16) -> Tracked {
        let tracked = self.connections.begin(Begun {
            direction: Direction::Outbound,
            peer: arrival.ends.source,
            local: arrival.ends.destination,
            port,
            identity: None,
        });
        tracked.watched(&arrival.watch);
        tracked
    }

    /// Carries a connection of the workload whose destination is known.
    ///
    /// # Errors
    /// Why it ends; whoever asked for the way has been told.
    pub async fn carry(
        self: Arc<Self>,
        mut socket: Socket,
        arrival: &Arrival,
        to: To,
        answer: Answer,
    ) -> Result<Met, Error> {
        let snapshot = self.snapshot.load();
        let service = snapshot.service_of(&to).cloned();
        let port = match &to {
            To::Host(_, port) => *port,
            _ => 0,
        };
        let tracked = self.begin(arrival, port);
        if let Some(service) = &service {
            tracked.goes_to(&service.name);
        }
        let allowed = match (&service, &to) {
            (Some(_), _) => Ok(()),
            (None, To::Host(..)) => self.may_leave(&to, None),
            (None, _) => {
                Err(Error::new(Reason::ServiceNotFound).detail("the service is not in the file any more"))
            }
        };
        if let Err(error) = allowed {
            answer.refused(&mut socket, true).await;
            return Err(error);
        }
        // The way is as good as open: whether the other side can be reached shows when it is known what is spoken. A
        // client that is asked for by `CONNECT` or SOCKS5 says nothing before it has heard.
        let declared = service.as_ref().map_or(Protocol::Auto, |service| service.protocol);
        let declared = match declared {
            Protocol::Auto if port > 0 && snapshot.is_opaque(port) => Protocol::Tcp,
            declared => declared,
        };
        let speaks = match declared {
            Protocol::Http1 => Some(Speaks::Http1),
            Protocol::Http2 | Protocol::Grpc => Some(Speaks::Either),
            Protocol::Auto | Protocol::Tcp => None,
        };
        if let Some(speaks) = speaks {
            answer.opened(&mut socket).await.map_err(gone)?;
            return Ok(http(socket, arrival, to, tracked, speaks));
        }
        let opaque = self.opaque(service, &to)?;
        if declared == Protocol::Tcp {
            return self.bytes(socket, arrival, &opaque, tracked, answer, None).await;
        }
        answer.opened(&mut socket).await.map_err(gone)?;
        let (cluster, metrics) = (opaque.cluster.clone(), self.metrics.clone());
        let dial = move || -> LocalBox<'static, _> {
            Box::pin(async move { opaque::dial(&cluster, 0, &metrics).await })
        };
        // From here on the other side may be the one that is waited for.
        let counted = arrival.opaque();
        let spoken = speaks::first(&mut socket, snapshot.detect, dial).await;
        drop(counted);
        match spoken.map_err(|silent| Error::new(Reason::ConnectFailed).because(silent))? {
            Spoken::Client(First::Http1, _) => Ok(http(socket, arrival, to, tracked, Speaks::Http1)),
            Spoken::Client(First::Http2, _) => Ok(http(socket, arrival, to, tracked, Speaks::Either)),
            Spoken::Client(First::Tls, dialled) => {
                if opaque.service.is_none() {
                    let name = server_name(&mut socket).await.map_err(gone)?;
                    self.may_leave(&to, name.as_deref())?;
                }
                tracked.speaks("tls");
                self.bytes(
                    socket,
                    arrival,
                    &opaque,
                    tracked,
                    Answer::None,
                    dialled.map(|it| (it, Bytes::new())),
                )
                .await
            }
            Spoken::Client(First::Opaque, dialled) => {
                let dialled = dialled.map(|stream| (stream, Bytes::new()));
                self.bytes(socket, arrival, &opaque, tracked, Answer::None, dialled).await
            }
            Spoken::Server(stream, early) => {
                self.bytes(socket, arrival, &opaque, tracked, Answer::None, Some((stream, early))).await
            }
        }
    }

    fn opaque(&self, service: Option<Arc<Service>>, to: &To) -> Result<Opaque, Error> {
        if let Some(service) = service {
            return Ok(Opaque { cluster: service.cluster.clone(), service: Some(service) });
        }
        let To::Host(host, port) = to else {
            return Err(Error::new(Reason::NoUpstream));
        };
        let target = self.passthrough.target(host, *port, false)?;
        match &target.destination {
            Destination::Cluster(cluster) => Ok(Opaque { cluster: cluster.clone(), service: None }),
            Destination::Nothing(reason) => Err(Error::new(*reason)),
        }
    }

    /// Whether the workload may go to what is no service. `name` is what TLS asks for.
    ///
    /// # Errors
    /// Why not.
    pub fn may_leave(&self, to: &To, name: Option<&str>) -> Result<(), Error> {
        let To::Host(host, port) = to else { return Ok(()) };
        let address = to.ip();
        let name = name.or(address.is_none().then_some(&**host));
        let verdict = self.policies.load().egress(&egress::Destination { name, address, port: *port });
        if verdict.audited {
            tracing::info!(host = %host, port, policy = %verdict.policy, "would be refused");
        }
        if verdict.allowed {
            return Ok(());
        }
        let why = format!("{host}:{port} by {}: {}", verdict.policy, verdict.why.unwrap_or_default());
        Err(Error::new(Reason::EgressDenied).detail(why))
    }

    /// Carries bytes to an endpoint, which may be connected already.
    async fn bytes(
        &self,
        mut socket: Socket,
        arrival: &Arrival,
        opaque: &Opaque,
        tracked: Tracked,
        answer: Answer,
        dialled: Option<(OpaqueStream, Bytes)>,
    ) -> Result<Met, Error> {
        let snapshot = self.snapshot.load();
        let _counted = arrival.opaque();
        tracked.speaks("tcp");
        let (stream, early) = match dialled {
            Some(dialled) => dialled,
            None => match opaque::dial(&opaque.cluster, 0, &self.metrics).await {
                Ok(stream) => (stream, Bytes::new()),
                Err(error) => {
                    answer.refused(&mut socket, false).await;
                    return Err(error);
                }
            },
        };
        answer.opened(&mut socket).await.map_err(gone)?;
        let revoked = stream.revoked();
        let copying = tcp::copy(socket, stream, early, snapshot.idle, &tracked.traffic);
        tokio::select! {
            ended = copying => tracing::debug!(peer = %arrival.ends.source, ?ended, "opaque connection ended"),
            () = revoked => tracing::info!(peer = %arrival.ends.source, "opaque connection cut: its peer was revoked"),
        }
        Ok(Met::Over)
    }
}

/// The connection goes on as HTTP.
fn http(socket: Socket, arrival: &Arrival, to: To, tracked: Tracked, speaks: Speaks) -> Met {
    tracked.speaks("http");
    let ends = arrival.ends;
    let mut conn = Conn::plain(ends.source, ends.destination);
    conn.door =
        Some(OwnDoor::new(std::rc::Rc::new(SideDoor { way: Way::Out(to), tracked, admission: None })));
    Met::Http { stream: Stream::Plain(socket), conn: Box::new(conn), speaks }
}

/// The name that a TLS client asks for; its bytes stay in the socket.
async fn server_name(socket: &mut Socket) -> std::io::Result<Option<Box<str>>> {
    let mut read = Vec::new();
    loop {
        if socket.read_buf(&mut read).await? == 0 {
            break;
        }
        match hello(&read) {
            HelloRead::Partial => {}
            HelloRead::Whole(hello) => {
                socket.put_back(&read);
                return Ok(hello.name);
            }
            HelloRead::Broken => break,
        }
    }
    socket.put_back(&read);
    Ok(None)
}

fn gone(error: std::io::Error) -> Error {
    Error::new(Reason::ClientClosed).because(error)
}
