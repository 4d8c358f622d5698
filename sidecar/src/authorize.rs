//! Authorization of requests: a tower layer in front of the application.
//!
//! Runs when host and path are in their normal form, and before anything acts on the request. What is refused is answered
//! 403, over gRPC `PERMISSION_DENIED`, and the answer and the access log name the policy. A token is looked at only where
//! policies ask for claims; one that is shown and not good is answered 401.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use config::var::{Var, Vars};
use futures_util::future::{Either, Ready, ready};
use hashbrown::HashMap;
use layers::HttpService;
use layers::error::{Error, Fault, Reason};
use layers::exchange::{Conn, Exchange, State};
use layers::local::LocalBox;
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use tower::{Layer, Service};

use crate::live::{Admission, Live};
use crate::matcher::{Asked, What};
use crate::policy::{Sight, Verdict};
use crate::probes::Probe;
use crate::tokens::{self, TokenError};

/// Where the layer finds the admission of a connection.
pub type AdmissionOf = fn(&Conn) -> Option<&Admission>;

/// What stands in the log in place of a policy.
const PROBE: &str = "(probe)";
/// Tokens that a worker has seen verified.
const TOKENS: usize = 1024;
/// How long a verified token is believed without another look at the keys.
const BELIEVED: Duration = Duration::from_secs(60);

/// Makes [`Authorize`].
#[derive(Clone)]
pub struct AuthorizeLayer(Rc<Shared>);

struct Shared {
    live: Rc<Live>,
    admission: AdmissionOf,
    control: Handle,
    seen: RefCell<Seen>,
}

type Claims = Arc<Map<String, Value>>;

/// Tokens that were verified under one set of policies.
#[derive(Default)]
struct Seen {
    number: u64,
    tokens: HashMap<Box<str>, (Claims, Instant)>,
}

impl Seen {
    fn find(&mut self, number: u64, token: &str) -> Option<Claims> {
        if self.number != number {
            *self = Self { number, ..Self::default() };
        }
        let (claims, until) = self.tokens.get(token)?;
        (Instant::now() < *until).then(|| claims.clone())
    }

    fn keep(&mut self, number: u64, token: &str, claims: &Claims, now: SystemTime) {
        if self.number != number {
            return;
        }
        let ends = claims.get("exp").and_then(Value::as_f64).unwrap_or_default();
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let left = Duration::try_from_secs_f64(ends - since).unwrap_or_default().min(BELIEVED);
        if self.tokens.len() >= TOKENS {
            self.tokens.clear();
        }
        self.tokens.insert(token.into(), (claims.clone(), Instant::now() + left));
    }
}

impl AuthorizeLayer {
    /// By what `live` sees. A connection of which `admission` finds nothing is refused. Signatures are verified on
    /// `control`.
    pub fn new(live: Rc<Live>, admission: AdmissionOf, control: Handle) -> Self {
        Self(Rc::new(Shared { live, admission, control, seen: RefCell::default() }))
    }
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = Authorize<S>;

    fn layer(&self, inner: S) -> Authorize<S> {
        Authorize { inner, shared: self.0.clone() }
    }
}

/// Lets pass what policies allow.
#[derive(Clone)]
pub struct Authorize<S> {
    inner: S,
    shared: Rc<Shared>,
}

/// The variables of a request, of who makes it, and of its token.
struct RequestVars<'a> {
    x: &'a State,
    identity: Option<&'a str>,
    claims: Option<&'a Map<String, Value>>,
}

impl Vars for RequestVars<'_> {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        match var {
            Var::Other(name) => tokens::peer_variable(self.identity, name)
                .map(Cow::Borrowed)
                .or_else(|| tokens::claim_text(self.claims?, name))
                .or_else(|| self.x.get(var)),
            // Who the client is by what it says of itself decides nothing.
            Var::RemoteAddr => self.x.get(&Var::RealipRemoteAddr),
            Var::RemotePort => self.x.get(&Var::RealipRemotePort),
            _ => self.x.get(var),
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        match var {
            Var::Other(name) => tokens::claim(self.claims?, name),
            _ => self.x.value(var),
        }
    }
}

/// Decides about one request. What is told of the decision stands on the exchange afterwards.
///
/// # Errors
/// Why it is refused.
pub fn authorize(
    x: &mut Exchange,
    admission: &Admission,
    sight: &Sight,
    claims: Option<&Map<String, Value>>,
) -> Result<(), Error> {
    let caller = admission.arrival().caller();
    let vars = RequestVars { x, identity: caller.identity(), claims };
    let asked = Asked { method: x.request.method.as_str(), path: x.path(), host: &x.host, vars: Some(&vars) };
    let other = without_encoded_slashes(x.path());
    // The application may understand the path either way, so it may pass if it may both ways.
    let refused =
        other.as_deref().filter(|path| !sight.allows(&caller, &What::Request(Asked { path, ..asked })));
    let asked = Asked { path: refused.unwrap_or(asked.path), ..asked };
    let Verdict { allowed, policy, why, audited } = sight.decide(&caller, &What::Request(asked));
    if audited {
        let (identity, why) = (caller.identity().unwrap_or("-"), why.as_deref().unwrap_or_default());
        tracing::info!(
            peer = %x.conn.peer, identity, method = %x.request.method, path = x.path(), why, "would be refused"
        );
    }
    x.policy = Some(policy);
    if allowed {
        return Ok(());
    }
    let reason = if sight.in_force().is_some() { Reason::PolicyDenied } else { Reason::PolicyPending };
    Err(Error::new(reason).detail(why.unwrap_or_default()))
}

/// The other way to understand a path in which slashes were kept encoded: as slashes. Nothing where there are none, which
/// is nearly always.
pub(crate) fn without_encoded_slashes(path: &str) -> Option<String> {
    let encoded = |bytes: &[u8]| matches!(bytes, b"%2F" | b"%2f");
    if !path.as_bytes().windows(3).any(encoded) {
        return None;
    }
    // A percent sign that could be taken for the beginning of an escape is kept encoded with them.
    let path = path.replace("%2F", "/").replace("%2f", "/").replace("%25", "%");
    let mut plain = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !plain.ends_with('/') {
            plain.push(c);
        }
    }
    Some(plain)
}

fn not_good(error: TokenError) -> Error {
    Error::new(Reason::TokenRefused).detail(error.to_string())
}

impl Shared {
    /// Decides, and admits the request to those at work.
    fn settle(
        &self,
        x: &mut Exchange,
        sight: &Sight,
        claims: Option<&Map<String, Value>>,
    ) -> Result<(), Error> {
        let conn = x.conn.clone();
        let Some(admission) = (self.admission)(&conn) else {
            return Err(Error::new(Reason::PolicyDenied).detail("the connection was not admitted"));
        };
        if admission.is_revoked() {
            return Err(Error::new(Reason::PolicyDenied).detail("the connection is not admitted any more"));
        }
        authorize(x, admission, sight, claims)?;
        admission.works(x);
        Ok(())
    }
}

impl<S: HttpService> Service<Exchange> for Authorize<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future =
        Either<S::Future, Either<Ready<Result<Exchange, Fault>>, LocalBox<'static, Result<Exchange, Fault>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> Self::Future {
        if x.slot::<Probe>().is_some() {
            x.policy = Some(PROBE.into());
            return Either::Left(self.inner.call(x));
        }
        let refuse = |x, error| Either::Right(Either::Left(ready(Err(Fault { exchange: x, error }))));
        let sight = self.shared.live.view().current();
        let mut claims = None;
        if let Some(in_force) = sight.in_force().filter(|in_force| in_force.reads_claims()) {
            match tokens::bearer(&x.request.headers) {
                Err(error) => return refuse(x, not_good(error)),
                Ok(None) => {}
                Ok(Some(token)) => {
                    claims = self.shared.seen.borrow_mut().find(sight.number(), token);
                    if claims.is_none() {
                        let (issuers, token) = (in_force.issuers().clone(), token.to_owned());
                        let (mut inner, shared) = (self.inner.clone(), self.shared.clone());
                        let now = SystemTime::now();
                        return Either::Right(Either::Right(Box::pin(async move {
                            let verify = move || {
                                let verified = issuers.verify(&token, now);
                                (token, verified)
                            };
                            // A signature may take longer than a worker may be held up.
                            let verified =
                                match shared.control.spawn_blocking(verify).await {
                                    Ok((token, Ok(claims))) => {
                                        let claims = Arc::new(claims);
                                        shared.seen.borrow_mut().keep(sight.number(), &token, &claims, now);
                                        Ok(claims)
                                    }
                                    Ok((_, Err(error))) => Err(not_good(error)),
                                    Err(_) => Err(Error::new(Reason::Internal)
                                        .detail("the verification of a token failed")),
                                };
                            let settled =
                                verified.and_then(|claims| shared.settle(&mut x, &sight, Some(&claims)));
                            match settled {
                                Ok(()) => inner.call(x).await,
                                Err(error) => Err(Fault { exchange: x, error }),
                            }
                        })));
                    }
                }
            }
        }
        match self.shared.settle(&mut x, &sight, claims.as_deref()) {
            Ok(()) => Either::Left(self.inner.call(x)),
            Err(error) => refuse(x, error),
        }
    }
}

#[cfg(test)]
mod tests;
