//! Connections of the workload: where they want to go, what they speak, and the way there.
//!
//! Every way in ends at the same place: a destination is known (a listener stands for a service, a client of a proxy or of
//! SOCKS5 has said it, a redirected connection had it), or each request says it. Requests go through the stack; bytes that
//! nobody understands go to one endpoint of the service. What is no service is passed on as it is, if policy allows it.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
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

use crate::captured::Captures;
use crate::connect::{self, Asked};
use crate::connections::{Begun, Connections, Direction, HTTP, Tracked};
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
    /// It does not: the kernel has led it here.
    Capture,
}

/// What connections of the workload are carried with; shared by all listeners.
pub struct Carrier {
    /// What the file says.
    pub snapshot: Arc<Published<Snapshot>>,
    /// Ways out of the mesh.
    pub passthrough: Passthrough,
    /// Which captured connections are taken.
    pub captures: Captures,
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
                Kind::Capture => self.captured(socket, &arrival).await,
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
                    let tracked = Rc::new(self.carrier.begin(arrival, 0));
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
#[derive(Clone)]
struct Opaque {
    cluster: Arc<Cluster>,
    /// The one endpoint that was asked for.
    endpoint: Option<SocketAddr>,
}

impl Opaque {
    async fn dial(&self, metrics: &Metrics) -> Result<OpaqueStream, Error> {
        match self.endpoint {
            Some(endpoint) => opaque::dial_at(&self.cluster, endpoint).await,
            None => opaque::dial(&self.cluster, 0, metrics).await,
        }
    }
}

impl Outbound {
    async fn captured(&self, mut socket: Socket, arrival: &Arrival) -> Result<Met, Error> {
        match self.carrier.captures.outbound(&mut socket).await? {
            None => Ok(Met::Over),
            Some(to) => self.carrier.clone().carry(socket, arrival, To::Captured(to), Answer::None).await,
        }
    }
}

impl Carrier {
    fn begin(&self, arrival: &Arrival, port: u16) -> Tracked {
        let tracked = self.connections.begin(Begun {
            direction: Direction::Outbound,
            peer: arrival.ends.source,
            local: arrival.ends.destination,
            port,
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
        socket: Socket,
        arrival: &Arrival,
        to: To,
        answer: Answer,
    ) -> Result<Met, Error> {
        let port = to.host().map_or(0, |(_, port)| port);
        let tracked = Rc::new(self.begin(arrival, port));
        let mut passage =
            Passage { carrier: &self, arrival, to, address: None, port, answer, tracked: tracked.clone() };
        passage.carry(socket).await.inspect_err(|error| tracked.ends(error.reason().code()))
    }

    /// Whether the workload may go to an address by whatever name. Nothing is counted.
    fn would_leave(&self, to: &To) -> bool {
        let Some((_, port)) = to.host() else { return true };
        self.policies.load().would_leave(&egress::Destination { name: None, address: to.ip(), port })
    }

    /// The address at which a host that is no service is connected: one of those behind its name that the workload may go
    /// to, if it may go to any. What was judged is what is connected, whatever the name stands for a moment later.
    ///
    /// # Errors
    /// Nobody knows the name.
    pub async fn address(&self, host: &str, port: u16) -> Result<IpAddr, Error> {
        if let Some(address) = discovery::literal(host) {
            return Ok(address);
        }
        let target = self.passthrough.target(host, port, false)?;
        let cluster = match &target.destination {
            Destination::Cluster(cluster) => cluster,
            Destination::Nothing(reason) => return Err(Error::new(*reason)),
        };
        let mut all = cluster.addresses().await.map_err(Error::new)?;
        fastrand::shuffle(&mut all);
        let sight = self.policies.load();
        let may = |at: &SocketAddr| {
            let to = egress::Destination { name: Some(host), address: Some(at.ip()), port };
            self.captures.refuse_loop(*at).is_ok() && sight.would_leave(&to)
        };
        let at = all.iter().find(|at| may(at)).or(all.first());
        at.map(SocketAddr::ip).ok_or_else(|| Error::new(Reason::NoNodes))
    }

    /// Whether the workload may go to what is no service, which is at `address`. `name` is what TLS or a request asks for.
    ///
    /// # Errors
    /// Why not.
    pub fn may_leave(&self, to: &To, address: Option<IpAddr>, name: Option<&str>) -> Result<(), Error> {
        let Some((host, port)) = to.host() else { return Ok(()) };
        let is_name = to.ip().is_none();
        let address = address.or(to.ip());
        if let Some(ip) = address {
            self.captures.refuse_loop(SocketAddr::new(ip, port))?;
        }
        let name = name.or(is_name.then_some(&*host));
        let verdict = self.policies.load().egress(&egress::Destination { name, address, port });
        if verdict.audited {
            tracing::info!(host = %host, port, policy = %verdict.policy, "would be refused");
        }
        if verdict.allowed {
            return Ok(());
        }
        let why = format!("{host}:{port} by {}: {}", verdict.policy, verdict.why.unwrap_or_default());
        Err(Error::new(Reason::EgressDenied).detail(why))
    }
}

/// One connection on its way out.
struct Passage<'a> {
    carrier: &'a Carrier,
    arrival: &'a Arrival,
    to: To,
    /// Where that is, if it is a host that is no service.
    address: Option<IpAddr>,
    /// Of the destination; 0 where it is not known.
    port: u16,
    answer: Answer,
    tracked: Rc<Tracked>,
}

impl Passage<'_> {
    async fn carry(&mut self, mut socket: Socket) -> Result<Met, Error> {
        let snapshot = self.carrier.snapshot.load();
        let service = snapshot.service_of(&self.to).cloned();
        if let Some(service) = &service {
            self.tracked.goes_to(&service.name);
        }
        if let (None, To::Host(host, port)) = (&service, &self.to) {
            match self.carrier.address(host, *port).await {
                Ok(address) => self.address = Some(address),
                Err(error) => {
                    self.answer.refused(&mut socket, false).await;
                    return Err(error);
                }
            }
        }
        // A captured connection says only later by which name it wants to go there.
        let is_named = !matches!(self.to, To::Captured(_));
        let allowed = match (&service, &self.to) {
            (Some(_), _) => Ok(()),
            (None, To::Host(..)) => self.carrier.may_leave(&self.to, self.address, None),
            (None, To::Captured(_)) => Ok(()),
            (None, To::Service(_) | To::Asked) => {
                Err(Error::new(Reason::ServiceNotFound).detail("the service is not in the file any more"))
            }
        };
        if let Err(error) = allowed {
            self.answer.refused(&mut socket, true).await;
            return Err(error);
        }
        // The way is as good as open: whether the other side can be reached shows when it is known what is spoken. A
        // client that is asked for by `CONNECT` or SOCKS5 says nothing before it has heard.
        let declared = service.as_ref().map_or(Protocol::Auto, |service| service.protocol);
        let declared = match declared {
            Protocol::Auto if self.port > 0 && snapshot.is_opaque(self.port) => Protocol::Tcp,
            declared => declared,
        };
        let speaks = match declared {
            Protocol::Http1 => Some(Speaks::Http1),
            Protocol::Http2 | Protocol::Grpc => Some(Speaks::Either),
            Protocol::Auto | Protocol::Tcp => None,
        };
        if let Some(speaks) = speaks {
            self.answer.opened(&mut socket).await.map_err(gone)?;
            return Ok(self.http(socket, speaks));
        }
        let leaves = service.is_none() && !is_named;
        let opaque = self.opaque(service.as_ref())?;
        if declared == Protocol::Tcp {
            if leaves {
                self.carrier.may_leave(&self.to, None, None)?;
            }
            return self.bytes(socket, &opaque, self.answer, None).await;
        }
        self.answer.opened(&mut socket).await.map_err(gone)?;
        // Nobody is connected who may turn out to be forbidden.
        let waits = leaves && !self.carrier.would_leave(&self.to);
        let (to_dial, metrics) = (opaque.clone(), self.carrier.metrics.clone());
        let dial = move || -> LocalBox<'static, _> {
            Box::pin(async move {
                match waits {
                    true => std::future::pending().await,
                    false => to_dial.dial(&metrics).await,
                }
            })
        };
        // From here on the other side may be the one that is waited for.
        let counted = (!waits).then(|| self.arrival.opaque());
        let spoken = speaks::first(&mut socket, snapshot.detect, dial).await;
        drop(counted);
        let early = |dialled: Option<OpaqueStream>| dialled.map(|stream| (stream, Bytes::new()));
        let (dialled, is_tls) =
            match spoken.map_err(|silent| Error::new(Reason::ConnectFailed).because(silent))? {
                Spoken::Client(First::Http1, _) => return Ok(self.http(socket, Speaks::Http1)),
                Spoken::Client(First::Http2, _) => return Ok(self.http(socket, Speaks::Either)),
                Spoken::Client(First::Tls, dialled) => (early(dialled), true),
                Spoken::Client(First::Opaque, dialled) => (early(dialled), false),
                Spoken::Server(stream, early) => (Some((stream, early)), false),
            };
        if is_tls {
            self.tracked.speaks("tls");
        }
        if service.is_none() {
            let name = if is_tls { server_name(&mut socket).await.map_err(gone)? } else { None };
            let named = name.as_deref().filter(|_| leaves).and_then(|name| snapshot.named(name));
            if let Some(service) = named {
                self.tracked.goes_to(&service.name);
                let opaque = Opaque { cluster: service.cluster.clone(), endpoint: None };
                return self.bytes(socket, &opaque, Answer::None, None).await;
            }
            // What has said its name before was asked about then.
            if leaves || name.is_some() {
                self.carrier.may_leave(&self.to, self.address, name.as_deref())?;
            }
        }
        self.bytes(socket, &opaque, Answer::None, dialled).await
    }

    fn opaque(&self, service: Option<&Arc<Service>>) -> Result<Opaque, Error> {
        if let Some(service) = service {
            // Who has asked for one node of several may mean this one, as clients of databases do.
            let endpoint = match self.to {
                To::Captured(address) if service.cluster.has_endpoint(address) => Some(address),
                _ => None,
            };
            return Ok(Opaque { cluster: service.cluster.clone(), endpoint });
        }
        let Some((host, port)) = self.to.host() else {
            return Err(Error::new(Reason::NoUpstream));
        };
        let host = self.address.map_or(host, |address| address.to_string().into());
        let target = self.carrier.passthrough.target(&host, port, false)?;
        match &target.destination {
            Destination::Cluster(cluster) => Ok(Opaque { cluster: cluster.clone(), endpoint: None }),
            Destination::Nothing(reason) => Err(Error::new(*reason)),
        }
    }

    /// Carries bytes to an endpoint, which may be connected already.
    async fn bytes(
        &self,
        mut socket: Socket,
        opaque: &Opaque,
        answer: Answer,
        dialled: Option<(OpaqueStream, Bytes)>,
    ) -> Result<Met, Error> {
        let snapshot = self.carrier.snapshot.load();
        let _counted = self.arrival.opaque();
        self.tracked.speaks("tcp");
        let (stream, early) = match dialled {
            Some(dialled) => dialled,
            None => match opaque.dial(&self.carrier.metrics).await {
                Ok(stream) => (stream, Bytes::new()),
                Err(error) => {
                    answer.refused(&mut socket, false).await;
                    return Err(error);
                }
            },
        };
        self.tracked.reaches(&stream);
        answer.opened(&mut socket).await.map_err(gone)?;
        let revoked = stream.revoked();
        let copying = tcp::copy(socket, stream, early, snapshot.idle, &self.tracked.traffic);
        let why = tokio::select! {
            ended = copying => ended.as_str(),
            () = revoked => "revoked",
        };
        self.tracked.ends(why);
        Ok(Met::Over)
    }

    fn http(&self, socket: Socket, speaks: Speaks) -> Met {
        http(socket, self.arrival, self.to.clone(), self.tracked.clone(), speaks)
    }
}

/// The connection goes on as HTTP.
fn http(socket: Socket, arrival: &Arrival, to: To, tracked: Rc<Tracked>, speaks: Speaks) -> Met {
    tracked.speaks(HTTP);
    let ends = arrival.ends;
    let mut conn = Conn::plain(ends.source, ends.destination);
    conn.door = Some(OwnDoor::new(Rc::new(SideDoor { way: Way::Out(to), tracked, admission: None })));
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
