//! The other gateways: each is told of a drain that begins or is undone, and asked how far it is.
//!
//! They are found by `postern.peers`: addresses of their Control APIs. A name stands for all addresses behind it, and
//! a gateway that finds itself among them leaves itself out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use discovery::{Discovery, Endpoints, Node, Watch};
use futures_util::future::join_all;
use http::{Method, Request, StatusCode, header};
use layers::upstream::tls_client::TlsClients;
use plugins::support::http_call::{HttpClient, Settings};
use serde::Deserialize;
use tokio::runtime::Handle;

use super::{Led, Observer, Order};

/// The body by which a gateway knows that another one undoes a drain, and not an operator: it tells nobody then.
pub(crate) const AMONG_GATEWAYS: &[u8] = br#"{"among_gateways":true}"#;
/// What one call to another gateway may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// The other gateways.
pub(super) struct Peers {
    client: HttpClient,
    watch: Option<Watch>,
}

/// What another gateway tells of a drain, as far as it is needed here.
#[derive(Deserialize)]
struct Told {
    observers: Vec<Observer>,
}

impl Peers {
    pub(super) fn new(
        peers: &[Node],
        tls: &TlsClients,
        discovery: &Discovery,
        control: &Handle,
    ) -> Result<Self, config::error::ConfigError> {
        let settings =
            Settings { timeout: DEADLINE, connect_timeout: DEADLINE, in_flight: 4096, ..Settings::default() };
        let client = HttpClient::alone(&settings, tls, discovery, control)?;
        let watch = (!peers.is_empty()).then(|| discovery.watch_nodes(peers, None));
        Ok(Self { client, watch })
    }

    /// The others before they are asked.
    pub(super) fn not_asked(&self) -> Vec<Observer> {
        let unasked = |(address, host): (SocketAddr, Arc<str>)| Observer {
            name: name(&host, address),
            problem: Some("no answer yet".to_owned()),
            ..Observer::default()
        };
        self.addresses().into_iter().map(unasked).collect()
    }

    /// What the others say of the drain that `led` names; those that do not know it yet are told. Nothing where it was undone
    /// at one of them.
    pub(super) async fn observe(&self, order: &Order, led: &Led) -> Option<Vec<Observer>> {
        let own = &led.by;
        let asked = self.addresses().into_iter().map(|(address, host)| async move {
            match self.ask(address, order, led).await {
                Ok(observers) => observers,
                Err(problem) => {
                    let name = name(&host, address);
                    Some(vec![Observer { name, problem: Some(problem), ..Observer::default() }])
                }
            }
        });
        let told: Option<Vec<Vec<Observer>>> = join_all(asked).await.into_iter().collect();
        let mut all: Vec<Observer> = told?.into_iter().flatten().collect();
        all.retain(|observer| observer.name != *own);
        // A gateway may be listed by more than one address.
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all.dedup_by(|a, b| a.name == b.name);
        Some(all)
    }

    /// Tells the others that the drain is undone. Those that cannot be told are named.
    pub(super) async fn undo(&self, led: &Led) -> Vec<String> {
        let told = self.addresses().into_iter().map(|(address, host)| async move {
            let body = Bytes::from_static(AMONG_GATEWAYS);
            let outcome = self.call(address, Method::DELETE, &path(led), body).await;
            match outcome {
                Ok((status, _)) if status.is_success() || status == StatusCode::NOT_FOUND => None,
                Ok((status, _)) => Some(format!("{} answered {status}", name(&host, address))),
                Err(problem) => Some(format!("{}: {problem}", name(&host, address))),
            }
        });
        join_all(told).await.into_iter().flatten().collect()
    }

    fn addresses(&self) -> Vec<(SocketAddr, Arc<str>)> {
        let Some(watch) = &self.watch else { return Vec::new() };
        let endpoints: Arc<Endpoints> = watch.borrow().clone();
        endpoints.list.iter().map(|endpoint| (endpoint.addr, endpoint.host.clone())).collect()
    }

    async fn ask(
        &self,
        address: SocketAddr,
        order: &Order,
        led: &Led,
    ) -> Result<Option<Vec<Observer>>, String> {
        let (mut status, mut body) = self.call(address, Method::GET, &path(led), Bytes::new()).await?;
        if status == StatusCode::NOT_FOUND {
            let order = Order { led: Some(led.clone()), ..order.clone() };
            let order = serde_json::to_vec(&order).map_err(|error| error.to_string())?;
            (status, body) = self.call(address, Method::POST, "/v1/drains", order.into()).await?;
        }
        if status == StatusCode::GONE {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(format!("answered {status}: {}", String::from_utf8_lossy(&body).trim()));
        }
        let told: Told = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        Ok(Some(told.observers))
    }

    async fn call(
        &self,
        address: SocketAddr,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), String> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{path}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|error| error.to_string())?;
        let response = self.client.call(request).await.map_err(|error| error.to_string())?;
        Ok((response.status(), response.into_body()))
    }
}

/// How another gateway knows a drain that is led from here.
fn path(led: &Led) -> String {
    format!("/v1/drains/{}", led.id)
}

/// What a gateway is called until it has said it.
fn name(host: &str, address: SocketAddr) -> String {
    if discovery::literal(host).is_some() { address.to_string() } else { format!("{host} ({address})") }
}
