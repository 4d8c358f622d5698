//! Finds what a request goes to: the application, or a service that the application calls, or neither.
//!
//! A request sees one version of the file. What sidecars tell each other is taken off here, wherever it comes from, and
//! believed from the mesh alone.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use config::mesh::Protocol;
use config::sidecar::Mode;
use futures_util::future::{Either, Ready, ready};
use http::{Version, header};
use layers::HttpService;
use layers::error::{Error, Fault, Reason};
use layers::exchange::{Conn, Exchange, State};
use layers::local::LocalBox;
use layers::target::Target;
use layers::upstream::mesh::{Carries, SPOKEN, SPOKEN_HTTP1};
use layers::vars::OwnVars;
use layers::worker::view::View;
use tower::{Layer, Service};

use crate::applications::Application;
use crate::connections::Direction;
use crate::door::{SideDoor, To, Way};
use crate::outbound::Carrier;
use crate::probes::Probe;
use crate::snapshot::Snapshot;

/// Makes [`Lookup`].
#[derive(Clone)]
pub struct LookupLayer {
    view: Rc<View<Snapshot>>,
    carrier: Option<Arc<Carrier>>,
    /// The log asks for variables of the mesh.
    told: bool,
}

impl LookupLayer {
    /// Services and ports come from `view`, ways out of the mesh from `carrier`. Where `told`, the variables of the mesh are
    /// there for the log.
    pub fn new(view: Rc<View<Snapshot>>, carrier: Option<Arc<Carrier>>, told: bool) -> Self {
        Self { view, carrier, told }
    }
}

impl<S> Layer<S> for LookupLayer {
    type Service = Lookup<S>;

    fn layer(&self, inner: S) -> Lookup<S> {
        Lookup { inner, shared: self.clone() }
    }
}

/// Settles where each exchange goes.
#[derive(Clone)]
pub struct Lookup<S> {
    inner: S,
    shared: LookupLayer,
}

impl<S: HttpService> Service<Exchange> for Lookup<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future =
        Either<S::Future, Either<Ready<Result<Exchange, Fault>>, LocalBox<'static, Result<Exchange, Fault>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        match self.shared.settle(&mut x) {
            Ok(Leads::To(direction, target)) => {
                self.shared.take(&mut x, direction, target);
                Either::Left(self.inner.call(x))
            }
            Ok(Leads::Out(leaving)) => {
                let (mut inner, shared) = (self.inner.clone(), self.shared.clone());
                Either::Right(Either::Right(Box::pin(async move {
                    match leaving.target().await {
                        Ok(target) => {
                            shared.take(&mut x, Direction::Outbound, target);
                            inner.call(x).await
                        }
                        Err(error) => Err(Fault { exchange: x, error }),
                    }
                })))
            }
            Err(error) => Either::Right(Either::Left(ready(Err(Fault { exchange: x, error })))),
        }
    }
}

/// Where a request goes.
enum Leads {
    /// There.
    To(Direction, Arc<Target>),
    /// Out of the mesh, to a name of which it has to be known first where that is.
    Out(Leaving),
}

/// A request that leaves the mesh by a name.
struct Leaving {
    carrier: Arc<Carrier>,
    host: Arc<str>,
    port: u16,
    http2: bool,
}

impl Leaving {
    async fn target(self) -> Result<Arc<Target>, Error> {
        let Self { carrier, host, port, http2 } = self;
        let address = carrier.address(&host, port).await?;
        carrier.may_leave(&To::Host(host, port), Some(address), None)?;
        carrier.passthrough.target(&address.to_string(), port, http2)
    }
}

impl LookupLayer {
    fn settle(&self, x: &mut Exchange) -> Result<Leads, Error> {
        let spoken = x.request.headers.remove(SPOKEN);
        let snapshot = self.view.current();
        let conn = x.conn.clone();
        let lost = || Error::new(Reason::Internal).detail("nothing is known of the connection");
        let door = SideDoor::of(&conn).ok_or_else(lost)?;
        match &door.way {
            Way::In(entrance, carries) => {
                let port = snapshot.port(*entrance)?;
                if carries.is_none() {
                    plain(x, &snapshot, port.mode)?;
                }
                let http1 = match (port.protocol, carries) {
                    (Protocol::Http1, _) | (_, Some(Carries::Upgrades)) => true,
                    (Protocol::Http2 | Protocol::Grpc, _) => false,
                    (_, Some(_)) => spoken.is_some_and(|spoken| spoken == SPOKEN_HTTP1),
                    (_, None) => x.request.version < Version::HTTP_2,
                };
                let Application { http1: one, http2: two, .. } = &*port.application;
                Ok(Leads::To(Direction::Inbound, if http1 { one.clone() } else { two.clone() }))
            }
            Way::Out(to) => self.outward(x, &snapshot, to),
        }
    }

    /// From here on the request goes there.
    fn take(&self, x: &mut Exchange, direction: Direction, target: Arc<Target>) {
        let conn = x.conn.clone();
        if let Some(SideDoor { way: Way::Out(to), tracked, .. }) = SideDoor::of(&conn)
            && let Some(name) = target.service_name.as_ref().filter(|_| *to != To::Asked)
        {
            tracked.goes_to(name);
        }
        if self.told {
            tell(x, &conn, direction, &target);
        }
        x.plan.clone_from(&target.plan);
        x.target = Some(target);
    }

    /// Where a request of the application goes.
    fn outward(&self, x: &State, snapshot: &Snapshot, to: &To) -> Result<Leads, Error> {
        let there = |target| Ok(Leads::To(Direction::Outbound, target));
        // A captured connection had an address, which may stand for many services; a name says more.
        let named = matches!(to, To::Captured(_)).then(|| snapshot.named(&x.host)).flatten();
        if let Some(service) = named.or_else(|| snapshot.service_of(to)) {
            return there(service.target.clone());
        }
        let port = || x.request.headers.get(header::HOST).and_then(|host| port(host.as_bytes()));
        let to = match to {
            To::Service(_) => {
                let error = Error::new(Reason::ServiceNotFound);
                return Err(error.detail("the service is not in the file any more"));
            }
            To::Host(..) | To::Captured(_) => to.clone(),
            To::Asked => {
                // An address of IPv6 stands in brackets there.
                let host =
                    x.host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&x.host);
                let port = port().unwrap_or(80);
                if let Some(service) = snapshot.service(host, port) {
                    return there(service.target.clone());
                }
                To::Host(host.into(), port)
            }
        };
        let Some(carrier) = &self.carrier else { return Err(Error::new(Reason::ServiceNotFound)) };
        let http2 = x.request.version == Version::HTTP_2;
        if let (None, To::Host(host, port)) = (to.ip(), &to) {
            let (host, port) = (host.clone(), *port);
            return Ok(Leads::Out(Leaving { carrier: carrier.clone(), host, port, http2 }));
        }
        let asked = Some(&*x.host).filter(|host| discovery::literal(host).is_none());
        carrier.may_leave(&to, None, asked)?;
        match to.host() {
            Some((host, port)) => there(carrier.passthrough.target(&host, port, http2)?),
            None => Err(Error::new(Reason::ServiceNotFound)),
        }
    }
}

/// Lets a request of nobody in particular pass, if that may be.
fn plain(x: &mut Exchange, snapshot: &Snapshot, mode: Mode) -> Result<(), Error> {
    if snapshot.probes().is_one(x) {
        x.put_slot(Probe);
    } else if mode == Mode::Strict {
        let why = "a plain request at a port that is strict: only the mesh is let in, and probes";
        return Err(Error::new(Reason::PolicyDenied).detail(why));
    }
    Ok(())
}

/// The port behind the last colon of a `Host`.
fn port(host: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(host).ok()?;
    let (before, port) = text.rsplit_once(':')?;
    (!before.contains(':') || before.ends_with(']')).then(|| port.parse().ok()).flatten()
}

fn tell(x: &mut Exchange, conn: &Conn, direction: Direction, target: &Target) {
    let peer = conn.tls.as_ref().and_then(|tls| tls.peer.as_ref());
    let peer = peer.map(|peer| peer.id.as_str().to_owned());
    if let Some(vars) = x.slot_mut::<OwnVars>() {
        vars.0.push(("mesh_direction", direction.as_str().to_owned()));
        vars.0.extend(peer.map(|peer| ("peer_identity", peer)));
        vars.0.extend(target.service_name.as_ref().map(|name| ("mesh_service", name.to_string())));
    }
}
