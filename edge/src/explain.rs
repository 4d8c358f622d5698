//! What the gateway does with a request, told in words by the code that does it.
//!
//! The request is built as a worker would see it and passes the same checks, the same route table and the same merged
//! plugins; only the plugins themselves and the upstream are not asked.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use http::{HeaderName, HeaderValue, Method, Request, Uri};
use layers::body::Body;
use layers::chain::{Instance, Plan};
use layers::exchange::{Conn, Exchange, Tls};
use layers::http::forwarded::{self, Forwarding};
use layers::http::normalize;
use layers::http::sanitize::{Limits, sanitize};
use layers::route::Verdict;
use layers::target::Destination;
use layers::vars::BufferedBody;
use serde::{Deserialize, Serialize};

use crate::lookup;
use crate::snapshot::Snapshot;

/// The request to explain.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// `GET` if it is absent.
    #[serde(default = "get")]
    pub method: String,
    /// `https://host/path?query`.
    pub url: String,
    /// Header fields, in order.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// The client's address; loopback if it is absent.
    #[serde(default)]
    pub remote_addr: Option<IpAddr>,
    /// The body, for routes that look into it.
    #[serde(default)]
    pub body: Option<String>,
}

fn get() -> String {
    "GET".to_owned()
}

/// What would happen.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The request as routes see it.
    pub request: Seen,
    /// Why it is refused before any route is tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Answer>,
    /// The routes that were tried, in order.
    pub candidates: Vec<Tried>,
    /// The route it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<Matched>,
    /// The plugins that run, in order; global ones first. A consumer that a plugin recognises may add some.
    pub plugins: Vec<PluginStep>,
    /// Where it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Goes>,
    /// The answer of the gateway itself, when no plugin decides and no upstream is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
}

/// A request in its one form.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// Method.
    pub method: String,
    /// Host, in lower case, without port.
    pub host: String,
    /// The path that is matched.
    pub path: String,
    /// Path and query as they are sent.
    pub sent: String,
    /// The client.
    pub remote_addr: IpAddr,
}

/// One route that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// The route.
    pub route: Arc<str>,
    /// Its pattern under which it was found.
    pub uri: Arc<str>,
    /// Its host pattern.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Arc<str>>,
    /// Its priority.
    pub priority: i64,
    /// Whether it matched.
    pub matched: bool,
    /// The first of its conditions that did not hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<&'static str>,
    /// Why not, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
}

/// The route a request takes.
#[derive(Clone, Debug, Serialize)]
pub struct Matched {
    /// Its id.
    pub id: Arc<str>,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    /// The id of its service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<Arc<str>>,
    /// Captured parameters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uri_params: Vec<(Box<str>, Box<str>)>,
    /// Why it was set aside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Box<str>>,
}

/// One plugin that runs.
#[derive(Clone, Debug, Serialize)]
pub struct PluginStep {
    /// Its name.
    pub name: &'static str,
    /// Its place in the order.
    pub priority: i32,
    /// The object it is configured in.
    pub source: Arc<str>,
    /// Whether it runs on every request.
    pub global: bool,
    /// The phases it takes part in.
    pub phases: Vec<&'static str>,
    /// What `_meta.filter` says to this request, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<bool>,
}

/// Where a request goes.
#[derive(Clone, Debug, Serialize)]
pub struct Goes {
    /// The object that holds the upstream.
    pub upstream: String,
    /// `http`, `grpc`, ...
    pub scheme: &'static str,
    /// Its nodes, and what is thought of them.
    pub nodes: Vec<serde_json::Value>,
}

/// An answer of the gateway itself.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// The code in the access log.
    pub reason: &'static str,
    /// More words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The rules that a request passes before routes are tried.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Limits.
    pub limits: Limits,
    /// How paths are read.
    pub paths: normalize::Options,
    /// Who is trusted.
    pub forwarding: Forwarding,
}

/// Explains.
///
/// # Errors
/// The question is no request: which part, and why.
pub fn explain(question: &Question, rules: &Rules, snapshot: &Snapshot) -> Result<Explanation, String> {
    let mut x = exchange(question)?;
    let passed = sanitize(&mut x, &rules.limits, rules.paths);
    forwarded::settle(&mut x, &rules.forwarding);
    let request = Seen {
        method: x.request.method.to_string(),
        host: x.host.to_string(),
        path: x.path().to_owned(),
        sent: x.request.uri.to_string(),
        remote_addr: x.remote_addr,
    };
    let mut explanation = Explanation {
        request,
        refused: None,
        candidates: Vec::new(),
        route: None,
        plugins: Vec::new(),
        upstream: None,
        answer: None,
    };
    if let Err(error) = passed {
        explanation.refused = Some(Answer {
            status: error.reason().status().as_u16(),
            reason: error.reason().code(),
            detail: error.detail_text().map(str::to_owned),
        });
        return Ok(explanation);
    }
    explanation.candidates = snapshot
        .routes
        .explain(&lookup::request(&x))
        .into_iter()
        .map(|candidate| {
            let (failed, because) = match candidate.verdict {
                Verdict::Matched => (None, None),
                Verdict::Failed { predicate, detail } => (Some(predicate.field()), Some(detail)),
            };
            Tried {
                route: candidate.id,
                uri: candidate.uri,
                host: candidate.host,
                priority: candidate.priority,
                matched: failed.is_none(),
                failed,
                because,
            }
        })
        .collect();
    let settled = lookup::settle(&mut x, snapshot);
    if let Some(global) = x.global_plan.clone() {
        explanation.plugins.extend(steps(&global, true, &x));
    }
    let Some(target) = x.target.clone() else {
        explanation.answer = Some(Answer { status: 404, reason: "route_not_found", detail: None });
        return Ok(explanation);
    };
    explanation.route = Some(Matched {
        id: target.route_id.clone(),
        name: target.route_name.clone(),
        service: target.service_id.clone(),
        uri_params: x
            .uri_params
            .iter(x.path().as_bytes())
            .map(|(name, value)| (name.into(), String::from_utf8_lossy(value).into()))
            .collect(),
        refused: target.refused.clone(),
    });
    explanation.plugins.extend(target.plan.iter().flat_map(|plan| steps(plan, false, &x)));
    if let Err(error) = settled {
        explanation.answer = Some(Answer {
            status: error.reason().status().as_u16(),
            reason: error.reason().code(),
            detail: error.detail_text().map(str::to_owned),
        });
        return Ok(explanation);
    }
    match &target.destination {
        Destination::Cluster(cluster) => {
            explanation.upstream = Some(Goes {
                upstream: cluster.key().to_string(),
                scheme: cluster.scheme(),
                nodes: cluster
                    .endpoints()
                    .iter()
                    .filter_map(|endpoint| serde_json::to_value(endpoint).ok())
                    .collect(),
            });
        }
        Destination::Nothing(reason) => {
            explanation.answer = Some(Answer {
                status: reason.status().as_u16(),
                reason: reason.code(),
                detail: Some(
                    "the route has no upstream; one of its plugins has to answer or to choose one".to_owned(),
                ),
            });
        }
    }
    Ok(explanation)
}

fn steps<'a>(plan: &'a Plan, global: bool, x: &'a Exchange) -> impl Iterator<Item = PluginStep> + 'a {
    plan.instances().iter().map(move |instance: &Arc<Instance>| PluginStep {
        name: instance.name,
        priority: instance.priority,
        source: instance.source.0.clone(),
        global,
        phases: instance.hooks.phases(),
        filter: instance.filter.as_ref().map(|filter| filter.eval(&**x)),
    })
}

/// The request as a worker would see it.
fn exchange(question: &Question) -> Result<Exchange, String> {
    let uri: Uri = question.url.parse().map_err(|error| format!("url {:?}: {error}", question.url))?;
    let Some(authority) = uri.authority().cloned() else {
        return Err(format!("url {:?}: write it with scheme and host, as http://host/path", question.url));
    };
    let method: Method =
        question.method.parse().map_err(|error| format!("method {:?}: {error}", question.method))?;
    let target = uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let mut request = Request::builder().method(method).uri(target);
    let own_host = question.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host"));
    if !own_host {
        request = request.header(http::header::HOST, authority.as_str());
    }
    for (name, value) in &question.headers {
        let name: HeaderName = name.parse().map_err(|error| format!("header {name:?}: {error}"))?;
        let value = HeaderValue::from_str(value).map_err(|error| format!("header {name}: {error}"))?;
        request = request.header(name, value);
    }
    let body = question.body.clone().map_or(Body::Empty, Body::from);
    let request = request.body(body).map_err(|error| error.to_string())?;
    let https = uri.scheme_str() == Some("https");
    let port = authority.port_u16().unwrap_or(if https { 443 } else { 80 });
    let tls =
        https.then(|| Tls { sni: Some(authority.host().to_ascii_lowercase().into()), ..Tls::default() });
    let peer = SocketAddr::new(question.remote_addr.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), 0);
    let local = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let mut x = Exchange::new(request, Rc::new(Conn::new(peer, local, tls)));
    if let Some(body) = &question.body {
        let kind = x.request.headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let buffered = BufferedBody::new(body.clone().into(), kind);
        x.put_slot(buffered);
    }
    Ok(x)
}
