//! Finds the route of a request in the snapshot that its worker holds.
//!
//! A request sees one configuration from its start to its end. Without a route the global rules still run, and the
//! answer is APISIX's 404.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use certs::SniTable;
use futures_util::future::{Either, Ready, ready};
use http::header;
use layers::HttpService;
use layers::body::{Body, TooLarge};
use layers::error::{Error, Fault, Reason};
use layers::exchange::{Exchange, State};
use layers::local::LocalBox;
use layers::route::{MethodSet, Request};
use layers::target::Destination;
use layers::transport::tls_server::check_client_certificate;
use layers::vars::BufferedBody;
use layers::worker::view::View;
use tower::{Layer, Service};

use crate::snapshot::Snapshot;

/// Makes [`Lookup`].
#[derive(Clone)]
pub struct LookupLayer {
    view: Rc<View<Snapshot>>,
    certificates: Arc<ArcSwap<SniTable>>,
    body_limit: usize,
}

impl LookupLayer {
    /// Routes come from `view`; `certificates` say for which hosts a client certificate is asked; a body that routes
    /// look into is read up to `body_limit` bytes (`max_post_args_readable_size`).
    pub fn new(view: Rc<View<Snapshot>>, certificates: Arc<ArcSwap<SniTable>>, body_limit: usize) -> Self {
        Self { view, certificates, body_limit }
    }
}

impl<S> Layer<S> for LookupLayer {
    type Service = Lookup<S>;

    fn layer(&self, inner: S) -> Lookup<S> {
        Lookup {
            inner,
            view: self.view.clone(),
            certificates: self.certificates.clone(),
            body_limit: self.body_limit,
        }
    }
}

/// Settles the route of each exchange.
#[derive(Clone)]
pub struct Lookup<S> {
    inner: S,
    view: Rc<View<Snapshot>>,
    certificates: Arc<ArcSwap<SniTable>>,
    body_limit: usize,
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
        if x.conn.tls.is_some()
            && let Err(reason) =
                check_client_certificate(&x.conn, &x.host, x.path(), &self.certificates.load())
        {
            let fault = Fault { exchange: x, error: Error::new(reason) };
            return Either::Right(Either::Left(ready(Err(fault))));
        }
        let snapshot = self.view.current();
        if snapshot.reads_body && has_arguments(&x) {
            let (mut inner, limit) = (self.inner.clone(), self.body_limit);
            return Either::Right(Either::Right(Box::pin(async move {
                if let Err(error) = buffer_body(&mut x, limit).await {
                    return Err(Fault { exchange: x, error });
                }
                match settle(&mut x, &snapshot) {
                    Ok(()) => inner.call(x).await,
                    Err(error) => Err(Fault { exchange: x, error }),
                }
            })));
        }
        match settle(&mut x, &snapshot) {
            Ok(()) => Either::Left(self.inner.call(x)),
            Err(error) => Either::Right(Either::Left(ready(Err(Fault { exchange: x, error })))),
        }
    }
}

/// Whether the body can hold arguments that a `vars` predicate may ask for.
fn has_arguments(x: &State) -> bool {
    let kind = x.request.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    !x.request_body.is_empty()
        && kind.is_some_and(|kind| {
            kind.starts_with("application/x-www-form-urlencoded") || kind.contains("json")
        })
}

async fn buffer_body(x: &mut State, limit: usize) -> Result<(), Error> {
    let bytes = x.request_body.collect_up_to(limit).await.map_err(|error| {
        let reason = if error.is::<TooLarge>() { Reason::BodyTooLarge } else { Reason::RequestBody };
        Error::new(reason).because(error)
    })?;
    let kind = x.request.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let buffered = BufferedBody::new(bytes.clone(), kind);
    x.put_slot(buffered);
    x.request_body = Body::from(bytes);
    Ok(())
}

/// Looks up the route, and settles everything that follows from it.
///
/// # Errors
/// The route or a global rule was set aside, or the route's service is missing; it must not serve without the part that
/// is refused or missing.
pub(crate) fn settle(x: &mut Exchange, snapshot: &Snapshot) -> Result<(), Error> {
    x.global_plan.clone_from(&snapshot.global);
    if let Some(why) = &snapshot.refused {
        return Err(Error::new(Reason::RouteRefused).detail(why.to_string()));
    }
    let found = snapshot.routes.find(&request(x));
    let Some(found) = found else { return Ok(()) };
    let target = found.value.clone();
    let (uri, host) = (found.uri().clone(), found.host.cloned());
    x.uri_params = found.params(x.path().as_bytes());
    x.matched_uri = Some(uri);
    x.matched_host = host;
    let refused = target.refused.clone();
    let without_service = matches!(target.destination, Destination::Nothing(Reason::ServiceNotFound));
    x.plan.clone_from(&target.plan);
    x.target = Some(target);
    match refused {
        None if without_service => Err(Error::new(Reason::ServiceNotFound)),
        None => Ok(()),
        Some(why) => Err(Error::new(Reason::RouteRefused).detail(String::from(why))),
    }
}

/// What the route table looks at.
pub(crate) fn request(x: &Exchange) -> Request<'_> {
    Request {
        host: &x.host,
        port: x.port,
        path: x.path().as_bytes(),
        method: MethodSet::of(&x.request.method),
        peer: x.remote_addr,
        vars: &**x,
    }
}
