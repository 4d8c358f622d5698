//! What start-up settings mean for the parts of the data plane.

use std::sync::Arc;

use config::process::{HttpRouter, Process, Workers};
use discovery::Discovery;
use hashbrown::HashMap;
use http::{HeaderName, HeaderValue};
use layers::http::forwarded::{Forwarding, RealIp};
use layers::http::normalize;
use layers::http::sanitize::Limits;
use layers::plugin::Definition;
use layers::route::Mode;
use layers::upstream::Keepalive;
use layers::upstream::cluster::ClusterEnv;
use layers::upstream::drains::Drains;
use layers::upstream::membership::{self, Membership};
use layers::upstream::sticky::{OwnKey, own_key};
use layers::upstream::tls_client::TlsClients;
use layers::worker::turns::Turns;
use plugins::proxy_cache::ProxyCache;
use plugins::redirect::Redirect;
use serde_json::Value;
use tokio::runtime::Handle;

use crate::admin::auth;
use crate::explain::Rules;
use crate::in_use::InUse;
use crate::registries::{self, BadSetting};

/// The most of a body that routes look into when nothing is configured: APISIX `max_post_args_readable_size`, 64 MiB.
const READABLE_BODY: u64 = 64 << 20;

/// Which part of a request is looked at first.
pub fn mode(process: &Process) -> Mode {
    match process.routing.router {
        HttpRouter::HostUri => Mode::HostUri,
        HttpRouter::Uri => Mode::Uri,
        HttpRouter::UriWithParameter => Mode::UriWithParameter,
    }
}

/// The rules that a request passes before routes are tried.
pub fn rules(process: &Process) -> Rules {
    let limits = &process.limits;
    let real_ip = &process.real_ip;
    Rules {
        limits: Limits {
            uri: limits.uri_length as usize,
            header_count: limits.header_count as usize,
            header_bytes: limits.header_bytes as usize,
            body: limits.body_bytes,
        },
        paths: normalize::Options {
            keep_encoded_slash: process.routing.match_uri_encoded_slash,
            servlet: process.routing.normalize_uri_like_servlet,
            delete_tail_slash: process.routing.delete_uri_tail_slash,
        },
        forwarding: Forwarding {
            trusted: process.trusted_addresses.clone(),
            // The PROXY protocol header is taken in when the connection begins.
            real_ip: (!real_ip.from.is_empty() && real_ip.header != "proxy_protocol")
                .then(|| HeaderName::try_from(real_ip.header.as_str()).ok())
                .flatten()
                .map(|header| RealIp { header, from: real_ip.from.clone(), recursive: real_ip.recursive }),
            underscores: process.underscores_in_headers,
        },
    }
}

/// The plugins that are offered, and what is checked of their settings.
pub fn catalog(process: &Process) -> plugins::Catalog {
    plugins::Catalog::new(process.plugins.as_deref())
        .with_wasm(&process.wasm)
        .with_attrs(plugin_attrs(process))
}

/// What plugins are told of `config.yaml`.
pub fn plugin_attrs(process: &Process) -> HashMap<String, Value> {
    let mut attrs: HashMap<String, Value> =
        process.plugin_attr.iter().map(|(name, attr)| (name.clone(), attr.clone())).collect();
    let https =
        process.listeners.iter().find(|listener| listener.tls).map(|listener| listener.address.port());
    if let Some(attr) = plugins::redirect::attr(attrs.get(Redirect::NAME), https) {
        attrs.insert(Redirect::NAME.to_owned(), attr);
    }
    // Its zones stand in a section of their own.
    attrs.insert(ProxyCache::NAME.to_owned(), plugins::proxy_cache::attr(&process.cache));
    // What a module is: found under its plugin's name.
    let wasm = process
        .wasm
        .iter()
        .filter_map(|plugin| Some((plugin.name.clone(), serde_json::to_value(plugin).ok()?)));
    attrs.extend(wasm);
    attrs
}

/// The `Server` field of every answer.
pub fn server(process: &Process) -> HeaderValue {
    if process.server_tokens {
        HeaderValue::from_static(concat!("postern/", env!("CARGO_PKG_VERSION")))
    } else {
        HeaderValue::from_static("postern")
    }
}

/// The most of a body that routes look into, in bytes.
pub fn readable_body(process: &Process) -> usize {
    usize::try_from(process.routing.max_post_args_size.unwrap_or(READABLE_BODY)).unwrap_or(usize::MAX)
}

/// How many workers run.
pub fn workers(process: &Process) -> usize {
    match process.workers {
        Workers::Count(count) => count.max(1) as usize,
        Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// Requests at work in all workers together: as many as there may be connections, for each of HTTP/2's streams is one.
pub fn in_flight_limit(process: &Process) -> usize {
    let limits = &process.limits;
    let each = limits.connections_per_worker as usize;
    limits.connections.map_or(each.saturating_mul(workers(process)), |all| all as usize)
}

/// The pool of upstreams that do not say.
fn keepalive(process: &Process) -> Keepalive {
    let settings = &process.upstream_keepalive;
    Keepalive {
        size: settings.size as usize,
        idle: (!settings.idle_timeout.is_zero()).then_some(settings.idle_timeout),
        requests: settings.requests,
    }
}

/// The key of session cookies: kept in the data directory, made when the first upstream needs it.
fn session_key(process: &Process) -> OwnKey {
    let path = process.data_dir.join("session.key");
    own_key(move || match auth::generated_key(&path) {
        Ok(key) => key.into_bytes(),
        Err(error) => {
            tracing::warn!(
                path = %path.display(), %error,
                "the key of session cookies cannot be kept: sessions end with this process; write `sticky.key`"
            );
            auth::random_key().unwrap_or_default().into_bytes()
        }
    })
}

/// The membership in the mesh, where there is one.
///
/// # Errors
/// A setting of it cannot be used.
pub fn membership(process: &Process) -> Result<Option<Membership>, BadSetting> {
    let Some(mesh) = &process.mesh else { return Ok(None) };
    let settings = membership::Settings {
        trust_domain: &mesh.trust_domain,
        identity: mesh.identity.as_deref(),
        service: &mesh.service,
        ca: &mesh.ca,
        connection_age: mesh.connection_age.duration(),
    };
    let started = Membership::start(settings);
    let bad = |error: membership::SettingError| BadSetting {
        setting: format!("postern.mesh.{}", error.key),
        problem: error.problem,
    };
    started.map(Some).map_err(bad)
}

/// What upstreams are made with.
///
/// # Errors
/// The trusted certificates, or a file of a registry, cannot be read.
pub fn clusters(
    process: &Process,
    mesh: Option<&Membership>,
    control: &Handle,
    turns: &Turns,
) -> Result<ClusterEnv, BadSetting> {
    let in_use = Arc::new(InUse::new(turns.clone()));
    let discovery = discovery::Settings {
        dns: registries::names(process),
        sources: registries::sources(process, Some(in_use.clone()))?,
        data_dir: Some(process.data_dir.clone()),
        ..discovery::Settings::default()
    };
    let roots = match &process.tls.trusted_certificate {
        Some(path) => certs::files::trusted_roots(path),
        None => certs::files::system_roots(),
    };
    let roots = roots.map_err(|error| BadSetting {
        setting: "apisix.ssl.ssl_trusted_certificate".to_owned(),
        problem: error.to_string(),
    })?;
    let discovery = Discovery::new(control.clone(), discovery);
    in_use.of(&discovery);
    Ok(ClusterEnv {
        discovery,
        tls: Arc::new(TlsClients::new(roots)),
        checks: process.upstream_health_checks,
        keepalive: keepalive(process),
        session_key: session_key(process),
        drains: Drains::default(),
        place: Arc::new(process.place.clone()),
        mesh: mesh.map(|membership| membership.mesh().clone()),
        as_client: None,
        control: control.clone(),
    })
}
