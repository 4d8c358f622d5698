//! The fixed stack of tower layers around a request.
//!
//! Nobody asks a service whether it is ready, so every layer here is always ready: what is full answers 503.

use tower::layer::util::{Identity, Stack as Pair};
use tower::{Layer, Service};

use crate::error::Fault;
use crate::exchange::Exchange;
use crate::local::LocalBox;

/// What every layer is and wraps: an exchange in, the same exchange with its answer out.
pub trait HttpService:
    Service<Exchange, Response = Exchange, Error = Fault, Future: 'static> + Clone + 'static
{
}

impl<S> HttpService for S where
    S: Service<Exchange, Response = Exchange, Error = Fault, Future: 'static> + Clone + 'static
{
}

/// A worker's whole stack, for requests that a plugin makes on a client's behalf.
pub trait Requests {
    /// Sends a request through the stack, as if the client of its connection had sent it. Not to be called within a
    /// step that does not wait: the stack is in use then, and the answer is that of a failure.
    fn send(&self, x: Exchange) -> LocalBox<'static, Exchange>;
}

/// Layers in the order in which a request meets them.
#[derive(Clone, Default)]
pub struct Stack<L = Identity>(L);

impl Stack {
    /// No layers yet.
    pub fn new() -> Self {
        Self(Identity::new())
    }
}

impl<L> Stack<L> {
    /// Adds the next layer inwards.
    pub fn push<N>(self, next: N) -> Stack<Pair<N, L>> {
        Stack(Pair::new(next, self.0))
    }

    /// Puts all layers around `service`.
    pub fn around<S>(self, service: S) -> L::Service
    where
        L: Layer<S>,
        L::Service: HttpService,
    {
        self.0.layer(service)
    }
}
