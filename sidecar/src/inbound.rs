//! Connections to the application: who it is, whether it may, what it speaks, and the way in.
//!
//! A sidecar tells by ALPN that it is one, and shows who it is. Where a port is strict nobody else is let in; where it is
//! permissive plain connections are too, and TLS that is the application's own passes as it is. Policies are asked before a
//! byte reaches the application.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use certs::mesh::{Connected, MeshIdentity, verify_error};
use certs::trust::{Fingerprint, Peer};
use config::mesh::Protocol;
use config::sidecar::Mode;
use layers::error::{Error, Reason};
use layers::exchange::{Conn, OwnDoor, Tls};
use layers::local::LocalBox;
use layers::telemetry::metrics::Metrics;
use layers::transport::detect::{First, HelloRead, detect, hello};
use layers::transport::tcp;
use layers::upstream::cluster::Cluster;
use layers::upstream::mesh::Carries;
use layers::upstream::opaque::{self, OpaqueStream};
use layers::worker::deadlines::Phase;
use layers::worker::io::{Socket, Stream};
use layers::worker::serve::Speaks;
use layers::worker::view::Published;
use layers::worker::{Arrival, Doorman, Met};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use crate::captured::Captures;
use crate::connections::{Begun, Connections, Direction, HTTP, Tracked};
use crate::door::{Entrance, OwnLive, SideDoor, Way};
use crate::live::{self, Admission};
use crate::matcher::What;
use crate::policy::Sight;
use crate::snapshot::{Port, Snapshot};
use crate::speaks::{self, Spoken};

/// What a peer gets to read why its handshake failed.
const LINGER: Duration = Duration::from_secs(1);

/// What connections to the application are taken with; shared by all ports.
pub struct Receiver {
    /// What the file says.
    pub snapshot: Arc<Published<Snapshot>>,
    /// What the policies say.
    pub policies: Arc<Published<Sight>>,
    /// Who this is.
    pub identity: MeshIdentity,
    /// Which captured connections are taken.
    pub captures: Captures,
    /// How hands are shaken with other sidecars.
    pub tls: Arc<ServerConfig>,
    /// Open connections.
    pub connections: Connections,
    /// Shared metrics.
    pub metrics: Arc<Metrics>,
    /// Handshakes.
    pub handshakes: Handshakes,
}

/// What became of connections to the application before they were served.
#[derive(Debug, Default)]
pub struct Handshakes {
    /// With other sidecars.
    pub done: AtomicU64,
    /// The peer's certificate, or something else about the handshake, was refused.
    pub failed: AtomicU64,
    /// Plain where only the mesh is let in.
    pub plain: AtomicU64,
    /// TLS that is not the mesh's, where only the mesh is let in.
    pub foreign: AtomicU64,
    /// A policy forbids it.
    pub denied: AtomicU64,
}

impl Handshakes {
    /// By what became of them.
    pub fn read(&self) -> [(&'static str, u64); 5] {
        [
            ("done", &self.done),
            ("failed", &self.failed),
            ("plain", &self.plain),
            ("foreign", &self.foreign),
            ("denied", &self.denied),
        ]
        .map(|(word, count)| (word, count.load(Ordering::Relaxed)))
    }
}

impl Receiver {
    /// Asks the policies about a connection that carries bytes to `port`. Requests are asked about one by one, so that who may
    /// not ask is answered, with the name of the policy.
    ///
    /// # Errors
    /// A policy forbids it.
    pub fn admit(
        &self,
        arrival: &Arrival,
        shown: Shown,
        port: u16,
        carries_bytes: bool,
    ) -> Result<Admission, Error> {
        let Shown { peer, authorities, connected } = shown;
        let from = arrival.ends.source;
        let judged = live::Arrival { peer, authorities, connected, from, port };
        if carries_bytes {
            self.may_send_bytes(&judged)?;
        }
        let Some(own) = arrival.context.find_slot::<OwnLive>() else {
            return Err(Error::new(Reason::Internal).detail("the worker admits nobody"));
        };
        Ok(own.0.admit(judged))
    }

    fn may_send_bytes(&self, arrival: &live::Arrival) -> Result<(), Error> {
        let sight = self.policies.load();
        let verdict = sight.decide(&arrival.caller(), &What::Bytes);
        if verdict.audited {
            tracing::info!(peer = %arrival.from, policy = %verdict.policy, "would be refused");
        }
        if !verdict.allowed {
            self.handshakes.denied.fetch_add(1, Ordering::Relaxed);
            let reason =
                if sight.in_force().is_some() { Reason::PolicyDenied } else { Reason::PolicyPending };
            return Err(Error::new(reason).detail(verdict.why.unwrap_or_default()));
        }
        Ok(())
    }
}

/// Which connections come by a listener.
#[derive(Clone, Copy, Debug)]
pub enum By {
    /// Those for the port with this number in the snapshot.
    Port(usize),
    /// Those that the kernel has led here.
    Capture,
}

/// Meets the connections of one listener.
pub struct Inbound {
    /// Which they are.
    pub by: By,
    /// What connections are taken with.
    pub receiver: Arc<Receiver>,
}

impl Doorman for Inbound {
    fn meet(self: Arc<Self>, socket: Socket, arrival: Arrival) -> LocalBox<'static, Met> {
        Box::pin(async move {
            self.visit(socket, &arrival).await.unwrap_or_else(|error| {
                let refused = matches!(error.reason(), Reason::MeshPeer | Reason::TlsFailed);
                tracing::info!(peer = %arrival.ends.source, %error, "connection refused");
                if refused { Met::Failed } else { Met::Over }
            })
        })
    }
}

impl Inbound {
    async fn visit(&self, socket: Socket, arrival: &Arrival) -> Result<Met, Error> {
        let receiver = &self.receiver;
        let entrance = match self.by {
            By::Port(number) => Entrance::Listener(number),
            By::Capture => {
                let client = arrival.ends.source.ip().to_canonical();
                let client = Some(client).filter(|_| receiver.captures.keeps_client());
                Entrance::Captured { to: receiver.captures.inbound(&socket)?, client }
            }
        };
        let snapshot = receiver.snapshot.load();
        let port = snapshot.port(entrance)?;
        let tracked = receiver.connections.begin(Begun {
            direction: Direction::Inbound,
            peer: arrival.ends.source,
            local: arrival.ends.destination,
            port: port.forward.port(),
        });
        tracked.goes_to(&snapshot.workload);
        tracked.watched(&arrival.watch);
        let visit = Visit { receiver, arrival, entrance, port, snapshot, tracked: Rc::new(tracked) };
        let met = visit.take(socket).await;
        met.inspect_err(|error| visit.tracked.ends(error.reason().code()))
    }
}

/// One connection on its way in.
struct Visit<'a> {
    receiver: &'a Arc<Receiver>,
    arrival: &'a Arrival,
    entrance: Entrance,
    port: Arc<Port>,
    snapshot: Arc<Snapshot>,
    tracked: Rc<Tracked>,
}

/// What the other end has shown.
#[derive(Default)]
pub struct Shown {
    /// Who it is.
    pub peer: Option<Arc<Peer>>,
    /// Those above it.
    pub authorities: Arc<[Fingerprint]>,
    /// Counts the connection under the bundle that it was made under.
    pub connected: Option<Arc<Connected>>,
}

/// What a connection was told apart as.
enum Told {
    Mesh,
    Plain(First, Option<(OpaqueStream, Bytes)>),
}

impl Visit<'_> {
    fn admit(&self, shown: Shown, carries_bytes: bool) -> Result<Admission, Error> {
        self.receiver.admit(self.arrival, shown, self.port.forward.port(), carries_bytes)
    }

    fn cluster(&self) -> &Arc<Cluster> {
        &self.port.application.cluster
    }

    async fn take(&self, mut socket: Socket) -> Result<Met, Error> {
        match self.tell(&mut socket).await? {
            Told::Mesh => self.mesh(socket).await,
            Told::Plain(first, dialled) => self.plain(socket, first, dialled).await,
        }
    }

    /// Looks at the first bytes, which stay in the socket.
    async fn tell(&self, socket: &mut Socket) -> Result<Told, Error> {
        let handshakes = &self.receiver.handshakes;
        let declared = self.port.protocol;
        let waits = match self.port.mode {
            // Whoever is let in at all speaks first.
            Mode::Strict => true,
            Mode::Permissive | Mode::Disabled => {
                matches!(declared, Protocol::Http1 | Protocol::Http2 | Protocol::Grpc)
            }
        };
        let (first, dialled) = if waits {
            (client_first(socket).await.map_err(gone)?, None)
        } else {
            let (cluster, metrics) = (self.cluster().clone(), self.receiver.metrics.clone());
            let dial = move || -> LocalBox<'static, _> {
                Box::pin(async move { opaque::dial(&cluster, 0, &metrics).await })
            };
            let counted = self.arrival.opaque();
            let spoken = speaks::first(socket, self.snapshot.detect, dial).await;
            drop(counted);
            match spoken.map_err(|silent| Error::new(Reason::ConnectFailed).because(silent))? {
                Spoken::Client(first, dialled) => (first, dialled.map(|stream| (stream, Bytes::new()))),
                Spoken::Server(stream, early) => (First::Opaque, Some((stream, early))),
            }
        };
        if first == First::Tls && self.port.mode != Mode::Disabled {
            if asks_for_mesh(socket).await.map_err(gone)? {
                return Ok(Told::Mesh);
            }
            if self.port.mode == Mode::Strict {
                handshakes.foreign.fetch_add(1, Ordering::Relaxed);
                return Err(Error::new(Reason::TlsFailed)
                    .detail("TLS of somebody who is not of the mesh, at a port that is strict"));
            }
        } else if self.port.mode == Mode::Strict && !self.may_be_probe(first) {
            handshakes.plain.fetch_add(1, Ordering::Relaxed);
            return Err(Error::new(Reason::TlsFailed)
                .detail("a plain connection, at a port that is strict: only the mesh is let in"));
        }
        // Declared protocols are what they are said to be, as far as the bytes can be that.
        let first = match (declared, first) {
            (Protocol::Tcp, _) => First::Opaque,
            (_, first) => first,
        };
        Ok(Told::Plain(first, dialled))
    }

    /// Whether probes may come by this connection; each request is looked at then.
    fn may_be_probe(&self, first: First) -> bool {
        matches!(first, First::Http1 | First::Http2)
            && self.snapshot.probes().come_from(self.arrival.ends.source.ip())
    }

    /// Shakes hands with another sidecar.
    async fn mesh(&self, socket: Socket) -> Result<Met, Error> {
        let handshakes = &self.receiver.handshakes;
        // Whatever was waited for before, from here on hands are shaken in time.
        self.arrival.watch.enter(Phase::Handshake);
        let accepting = TlsAcceptor::from(self.receiver.tls.clone()).accept(socket).into_fallible();
        let stream = match accepting.await {
            Ok(stream) => stream,
            Err((error, socket)) => {
                handshakes.failed.fetch_add(1, Ordering::Relaxed);
                linger(socket).await;
                let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
                let reason = match cause.and_then(verify_error) {
                    Some(_) => Reason::MeshPeer,
                    None => Reason::TlsFailed,
                };
                return Err(Error::new(reason).because(error));
            }
        };
        let (_, session) = stream.get_ref();
        let carries = session.alpn_protocol().and_then(Carries::of);
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let peer = leaf.and_then(|leaf| Peer::read(leaf).ok()).map(Arc::new);
        let (Some(carries), Some(peer)) = (carries, peer) else {
            handshakes.failed.fetch_add(1, Ordering::Relaxed);
            return Err(Error::new(Reason::MeshPeer).detail("the peer has shown nobody"));
        };
        handshakes.done.fetch_add(1, Ordering::Relaxed);
        let cipher = session.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        let tls = Tls {
            version: "TLSv1.3",
            cipher: cipher.unwrap_or_default(),
            peer: Some(peer.clone()),
            ..Tls::default()
        };
        let above = session.peer_certificates().into_iter().flatten().skip(1);
        let shown = Shown {
            peer: Some(peer.clone()),
            authorities: above.map(|authority| Fingerprint::of(authority)).collect(),
            connected: Some(Arc::new(self.receiver.identity.connected())),
        };
        self.tracked.shows(peer);
        let admission = self.admit(shown, carries == Carries::Opaque)?;
        let stream = Stream::Tls(Box::new(stream));
        Ok(match carries {
            Carries::Opaque => return self.bytes(stream, None, admission).await,
            Carries::Requests => self.http(stream, Some(tls), Speaks::Http2, Some(carries), admission),
            Carries::Upgrades => self.http(stream, Some(tls), Speaks::Http1, Some(carries), admission),
        })
    }

    /// Takes a connection of nobody in particular.
    async fn plain(
        &self,
        socket: Socket,
        first: First,
        dialled: Option<(OpaqueStream, Bytes)>,
    ) -> Result<Met, Error> {
        let speaks = match first {
            First::Http1 => Some(Speaks::Http1),
            First::Http2 => Some(Speaks::Either),
            First::Tls | First::Opaque => None,
        };
        let admission = self.admit(Shown::default(), speaks.is_none())?;
        if self.may_be_probe(first) {
            admission.carries_probes();
        }
        let stream = Stream::Plain(socket);
        match speaks {
            Some(speaks) => Ok(self.http(stream, None, speaks, None, admission)),
            None => self.bytes(stream, dialled, admission).await,
        }
    }

    fn http(
        &self,
        stream: Stream,
        tls: Option<Tls>,
        speaks: Speaks,
        carries: Option<Carries>,
        admission: Admission,
    ) -> Met {
        self.tracked.speaks(HTTP);
        let ends = self.arrival.ends;
        let mut conn = Conn::new(ends.source, ends.destination, tls);
        let door = SideDoor {
            way: Way::In(self.entrance, carries),
            tracked: self.tracked.clone(),
            admission: Some(admission),
        };
        conn.door = Some(OwnDoor::new(Rc::new(door)));
        Met::Http { stream, conn: Box::new(conn), speaks }
    }

    /// Carries bytes to the application, which may be connected already.
    async fn bytes(
        &self,
        stream: Stream,
        dialled: Option<(OpaqueStream, Bytes)>,
        admission: Admission,
    ) -> Result<Met, Error> {
        let _counted = self.arrival.opaque();
        self.tracked.speaks("tcp");
        admission.carries_bytes();
        let (upstream, early) = match dialled {
            Some(dialled) => dialled,
            None => (opaque::dial(self.cluster(), 0, &self.receiver.metrics).await?, Bytes::new()),
        };
        self.tracked.reaches(&upstream);
        let copying = tcp::copy(stream, upstream, early, self.snapshot.idle, &self.tracked.traffic);
        let why = tokio::select! {
            ended = copying => ended.as_str(),
            why = admission.revoked() => why,
        };
        self.tracked.ends(why);
        Ok(Met::Over)
    }
}

/// Waits for the client's first bytes, which stay in the socket.
async fn client_first(socket: &mut Socket) -> io::Result<First> {
    let mut read = Vec::new();
    loop {
        if socket.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(first) = detect(&read) {
            socket.put_back(&read);
            return Ok(first);
        }
    }
}

/// Whether a TLS client is a sidecar; its bytes stay in the socket.
async fn asks_for_mesh(socket: &mut Socket) -> io::Result<bool> {
    let mut read = Vec::new();
    let asks = loop {
        if socket.read_buf(&mut read).await? == 0 {
            break false;
        }
        match hello(&read) {
            HelloRead::Partial => {}
            HelloRead::Whole(hello) => break hello.alpn.iter().any(|alpn| Carries::of(alpn).is_some()),
            HelloRead::Broken => break false,
        }
    };
    socket.put_back(&read);
    Ok(asks)
}

/// Lets the peer read why its handshake failed: closing over what it has sent would take that from it.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let reading = async {
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // Whoever does not close has had its time.
    let _ = tokio::time::timeout(LINGER, reading).await;
}

fn gone(error: io::Error) -> Error {
    Error::new(Reason::ClientClosed).because(error)
}
