//! Who called, for the application: `x-forwarded-client-cert`.
//!
//! What arrives under that name is taken out, always and in every spelling, and so are the fields in which other meshes
//! tell applications of their callers. Then the field is set from the certificate that the handshake verified; a caller
//! without one leaves none.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll};

use certs::mesh::MeshIdentity;
use certs::trust::{Fingerprint, Peer};
use hashbrown::HashMap;
use http::{HeaderMap, HeaderName, HeaderValue};
use layers::HttpService;
use layers::error::Fault;
use layers::exchange::Exchange;
use tower::{Layer, Service};

use crate::authorize::AdmissionOf;

/// The field.
pub const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Values that a worker keeps, one for each certificate of a caller.
const KEPT: usize = 1024;

/// Makes [`ClientCert`].
#[derive(Clone)]
pub struct ClientCertLayer(Rc<Shared>);

struct Shared {
    mesh: MeshIdentity,
    admission: AdmissionOf,
    kept: RefCell<HashMap<Fingerprint, HeaderValue>>,
}

impl ClientCertLayer {
    /// For the application of this identity.
    pub fn new(mesh: MeshIdentity, admission: AdmissionOf) -> Self {
        Self(Rc::new(Shared { mesh, admission, kept: RefCell::default() }))
    }
}

impl<S> Layer<S> for ClientCertLayer {
    type Service = ClientCert<S>;

    fn layer(&self, inner: S) -> ClientCert<S> {
        ClientCert { inner, shared: self.0.clone() }
    }
}

/// Tells the application who calls.
#[derive(Clone)]
pub struct ClientCert<S> {
    inner: S,
    shared: Rc<Shared>,
}

impl Shared {
    fn value(&self, peer: &Peer) -> Option<HeaderValue> {
        if let Some(value) = self.kept.borrow().get(&peer.hash) {
            return Some(value.clone());
        }
        let own = self.mesh.svid()?;
        let value = value(own.id().as_str(), peer)?;
        let mut kept = self.kept.borrow_mut();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(peer.hash, value.clone());
        Some(value)
    }
}

/// The value of the field, in Envoy's form.
pub fn value(own: &str, peer: &Peer) -> Option<HeaderValue> {
    use std::fmt::Write;
    let mut hash = String::with_capacity(64);
    for byte in peer.hash.as_bytes() {
        // Writing to a string does not fail.
        let _ = write!(hash, "{byte:02x}");
    }
    // Identities have neither quotes nor separators in them.
    HeaderValue::try_from(format!("By={own};Hash={hash};Subject=\"\";URI={}", peer.id.as_str())).ok()
}

/// Takes out what only sidecars may say of a caller. `_` and `-` are the same to many servers behind us.
pub fn clean(headers: &mut HeaderMap) {
    let ours = |name: &HeaderName| {
        let name = name.as_str().as_bytes();
        let same = |a: &u8, b: u8| *a == b || (*a == b'_' && b == b'-');
        let is = |own: &str| name.len() == own.len() && name.iter().zip(own.bytes()).all(|(a, b)| same(a, b));
        let begins =
            |own: &str| name.len() >= own.len() && name.iter().zip(own.bytes()).all(|(a, b)| same(a, b));
        is("x-forwarded-client-cert") || begins("l5d-")
    };
    if !headers.keys().any(ours) {
        return;
    }
    let names: Vec<HeaderName> = headers.keys().filter(|name| ours(name)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

impl<S: HttpService> Service<Exchange> for ClientCert<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> S::Future {
        clean(&mut x.request.headers);
        let admission = (self.shared.admission)(&x.conn);
        let peer = admission.and_then(|admission| admission.arrival().peer.clone());
        if let Some(value) = peer.and_then(|peer| self.shared.value(&peer)) {
            x.request.headers.insert(X_FORWARDED_CLIENT_CERT, value);
        }
        self.inner.call(x)
    }
}
