//! The `apisix` group: listeners, TLS, routing, DNS, the small servers, encryption.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use super::section::{Element, Section, parse_ip};
use super::{
    ANY_IPV4, Cache, CacheDisk, CacheZone, DataEncryption, Dns, Hidden, HttpRouter, LOOPBACK, Listener,
    Routing, SecretCache, StreamListener, StreamProxy, Tls, TlsVersion,
};

const NODE_PORT: u16 = 9080;
const TLS_PORT: u16 = 9443;
const CONTROL_PORT: u16 = 9090;
const STATUS_PORT: u16 = 7085;

/// Suites APISIX offers for TLS 1.2 by default, without those over finite fields, which rustls does not have.
const CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
];

/// Keys APISIX ships. They protect nothing, but stores of APISIX are written with them.
const KEYRING: [&str; 2] = ["qeddd145sfvddff3", "edd1c9f0985e76a2"];

pub(super) struct Apisix {
    pub(super) id: Option<String>,
    pub(super) listeners: Vec<Listener>,
    pub(super) tls: Tls,
    pub(super) stream: StreamProxy,
    pub(super) routing: Routing,
    pub(super) dns: Dns,
    pub(super) control: Option<SocketAddr>,
    pub(super) status: SocketAddr,
    pub(super) trusted_addresses: Vec<IpNet>,
    pub(super) data_encryption: DataEncryption,
    pub(super) secret_cache: SecretCache,
    pub(super) tracing: bool,
    pub(super) upstream_health_checks: bool,
    pub(super) show_upstream_status: bool,
    pub(super) server_tokens: bool,
    pub(super) cache: Cache,
    pub(super) enable_admin: bool,
    pub(super) dev_mode: bool,
}

pub(super) fn read(apisix: &Section<'_>) -> Apisix {
    let ipv6 = apisix.flag("enable_ipv6").unwrap_or(true);
    let http2 = apisix.flag("enable_http2").unwrap_or(true);
    let mut listeners = node_listeners(apisix, http2, ipv6);
    let tls = tls(apisix, http2, ipv6, &mut listeners);
    proxy_protocol(apisix, http2, ipv6, &mut listeners);
    refuse_doubles(apisix, &listeners);
    let stream = stream_proxy(apisix);
    let control = apisix.flag("enable_control").unwrap_or(true);
    let control_address = apisix.socket("control", SocketAddr::new(LOOPBACK, CONTROL_PORT));
    let result = Apisix {
        id: apisix.loose_text("id").filter(|id| !id.is_empty()),
        listeners,
        tls,
        stream,
        routing: routing(apisix),
        dns: dns(apisix, ipv6),
        control: control.then_some(control_address),
        status: apisix.socket("status", SocketAddr::new(LOOPBACK, STATUS_PORT)),
        trusted_addresses: apisix.networks("trusted_addresses").unwrap_or_default(),
        data_encryption: data_encryption(apisix),
        secret_cache: secret_cache(apisix),
        tracing: tracing(apisix),
        upstream_health_checks: !apisix.flag("disable_upstream_healthcheck").unwrap_or(false),
        show_upstream_status: apisix.flag("show_upstream_status_in_response_header").unwrap_or(false),
        server_tokens: apisix.flag("enable_server_tokens").unwrap_or(true),
        cache: cache(apisix),
        enable_admin: apisix.flag("enable_admin").unwrap_or(true),
        dev_mode: apisix.flag("enable_dev_mode").unwrap_or(false),
    };
    apisix.not_applicable("enable_reuseport", "every worker has its own socket on each port");
    for key in ["extra_lua_path", "extra_lua_cpath", "lua_module_hook"] {
        if apisix.get(key).is_some_and(|value| value.as_str() != Some("")) {
            apisix.notice(key, "there is no Lua here");
        }
    }
    for key in ["disable_sync_configuration_during_start", "worker_startup_time_threshold", "events"] {
        apisix.not_applicable(key, "the configuration is in before the listeners open");
    }
    apisix.moved("config_center", "deployment.role_data_plane.config_provider");
    apisix.moved("admin_key", "deployment.admin.admin_key");
    apisix.moved("allow_admin", "deployment.admin.allow_admin");
    apisix.moved("admin_listen", "deployment.admin.admin_listen");
    apisix.moved("port_admin", "deployment.admin.admin_listen.port");
    apisix.moved("https_admin", "deployment.admin.https_admin");
    apisix.moved("admin_api_mtls", "deployment.admin.admin_api_mtls");
    apisix.moved("enable_admin_cors", "deployment.admin.enable_admin_cors");
    apisix.report_unknown();
    result
}

fn tracing(apisix: &Section<'_>) -> bool {
    let tracing = apisix.flag("tracing").unwrap_or(false);
    if tracing {
        apisix.notice("tracing", "spans are not made yet");
    }
    tracing
}

/// A listener and, if no address was asked for, its IPv6 twin.
fn listen(into: &mut Vec<Listener>, ip: Option<IpAddr>, port: u16, ipv6: bool, kind: Listener) {
    into.push(Listener { address: SocketAddr::new(ip.unwrap_or(ANY_IPV4), port), optional: false, ..kind });
    if ip.is_none() && ipv6 {
        let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        into.push(Listener { address: SocketAddr::new(any, port), optional: true, ..kind });
    }
}

fn kind(tls: bool, http2: bool, proxy_protocol: bool) -> Listener {
    let address = SocketAddr::new(ANY_IPV4, 0);
    Listener { address, tls, http2, proxy_protocol, optional: false }
}

fn node_listeners(apisix: &Section<'_>, http2: bool, ipv6: bool) -> Vec<Listener> {
    let mut listeners = Vec::new();
    let Some(elements) = apisix.list_or_single("node_listen") else {
        listen(&mut listeners, None, NODE_PORT, ipv6, kind(false, http2, false));
        return listeners;
    };
    for element in elements {
        if element.value.is_number() {
            if let Some(port) = element_port(apisix, &element) {
                listen(&mut listeners, None, port, ipv6, kind(false, http2, false));
            }
            continue;
        }
        let Some(entry) = apisix.element_section(&element, "a port or an object with `ip` and `port`") else {
            continue;
        };
        let port = entry.port("port");
        if port.is_none() && entry.get("port").is_none() {
            entry.invalid("", "`port` is missing: add it");
        }
        let http2 = entry.flag("enable_http2").unwrap_or(http2);
        let proxy_protocol = entry.flag("proxy_protocol").unwrap_or(false);
        let ip = entry.ip("ip");
        if let Some(port) = port {
            listen(&mut listeners, ip, port, ipv6, kind(false, http2, proxy_protocol));
        }
        to_upstream(&entry);
        entry.finish();
    }
    listeners
}

fn to_upstream(entry: &Section<'_>) {
    if entry.flag("proxy_protocol_to_upstream").unwrap_or(false) {
        entry.notice("proxy_protocol_to_upstream", "the PROXY protocol is not sent to HTTP upstreams");
    }
}

fn element_port(section: &Section<'_>, element: &Element<'_>) -> Option<u16> {
    let port = element.value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    if port.is_none() {
        section.element_invalid(
            element,
            format!("`{}` is not a port: write a number from 1 to 65535", element.value),
        );
    }
    port
}

fn tls(apisix: &Section<'_>, http2: bool, ipv6: bool, listeners: &mut Vec<Listener>) -> Tls {
    let ssl = apisix.section("ssl");
    let enabled = ssl.flag("enable").unwrap_or(true);
    let http2 = ssl.flag("enable_http2").unwrap_or(http2);
    let mut found = Vec::new();
    match ssl.list("listen") {
        None => listen(&mut found, None, TLS_PORT, ipv6, kind(true, http2, false)),
        Some(elements) => {
            for element in elements {
                let Some(entry) = ssl.element_section(&element, "an object with `ip` and `port`") else {
                    continue;
                };
                let ip = entry.ip("ip");
                let port = entry.port("port").unwrap_or(TLS_PORT);
                let http2 = entry.flag("enable_http2").unwrap_or(http2);
                let proxy_protocol = entry.flag("proxy_protocol").unwrap_or(false);
                for key in ["enable_http3", "enable_quic"] {
                    if entry.flag(key).unwrap_or(false) {
                        entry.notice(key, "HTTP/3 is not served");
                    }
                }
                to_upstream(&entry);
                listen(&mut found, ip, port, ipv6, kind(true, http2, proxy_protocol));
                entry.finish();
            }
        }
    }
    if enabled {
        listeners.append(&mut found);
    }
    let trusted = ssl.word("ssl_trusted_certificate").filter(|path| *path != "system");
    let ciphers = match ssl.word("ssl_ciphers") {
        Some(list) => list.split([':', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        None => CIPHERS.map(str::to_owned).to_vec(),
    };
    let tls = Tls {
        protocols: protocols(&ssl),
        ciphers,
        session_tickets: ssl.flag("ssl_session_tickets").unwrap_or(false),
        fallback_sni: ssl.word("fallback_sni").map(str::to_ascii_lowercase),
        trusted_certificate: trusted.map(Into::into),
    };
    ssl.moved("listen_port", "apisix.ssl.listen");
    ssl.moved("key_encrypt_salt", "apisix.data_encryption.keyring");
    ssl.finish();
    tls
}

fn protocols(ssl: &Section<'_>) -> Vec<TlsVersion> {
    let Some(list) = ssl.word("ssl_protocols") else {
        return vec![TlsVersion::Tls12, TlsVersion::Tls13];
    };
    let mut versions = Vec::new();
    let mut old = false;
    for word in list.split_ascii_whitespace() {
        match word {
            "TLSv1.2" => versions.push(TlsVersion::Tls12),
            "TLSv1.3" => versions.push(TlsVersion::Tls13),
            "TLSv1" | "TLSv1.1" | "SSLv3" | "SSLv2" => old = true,
            _ => {
                ssl.invalid("ssl_protocols", format!("`{word}` is no TLS version: write TLSv1.2 or TLSv1.3"))
            }
        }
    }
    versions.sort_unstable();
    versions.dedup();
    if versions.is_empty() {
        ssl.invalid("ssl_protocols", "no version is left that is offered: write TLSv1.2 TLSv1.3");
    } else if old {
        ssl.notice("ssl_protocols", "versions before TLS 1.2 are not offered");
    }
    versions
}

fn proxy_protocol(apisix: &Section<'_>, http2: bool, ipv6: bool, listeners: &mut Vec<Listener>) {
    let section = apisix.section("proxy_protocol");
    if let Some(port) = section.port("listen_http_port") {
        listen(listeners, None, port, ipv6, kind(false, http2, true));
    }
    if let Some(port) = section.port("listen_https_port") {
        listen(listeners, None, port, ipv6, kind(true, http2, true));
    }
    // Read again by `stream_proxy`, to which they belong.
    section.flag("enable_tcp_pp");
    section.flag("enable_tcp_pp_to_upstream");
    section.finish();
}

/// Two sockets on one address would each get some of the connections.
fn refuse_doubles(apisix: &Section<'_>, listeners: &[Listener]) {
    for (index, listener) in listeners.iter().enumerate() {
        let twice = listeners.iter().take(index).any(|other| other.address == listener.address);
        if twice && !listener.optional {
            let key = match (listener.proxy_protocol, listener.tls) {
                (true, _) => "proxy_protocol",
                (false, true) => "ssl",
                (false, false) => "node_listen",
            };
            apisix.invalid(key, format!("{} is listened on twice", listener.address));
        }
    }
}

fn stream_proxy(apisix: &Section<'_>) -> StreamProxy {
    let mode = apisix.one_of(
        "proxy_mode",
        &[("http", (true, false)), ("stream", (false, true)), ("http&stream", (true, true))],
    );
    let (http, stream) = mode.unwrap_or((true, false));
    let pp = apisix.section("proxy_protocol");
    let default = StreamListener {
        ip: ANY_IPV4,
        ports: 0..=0,
        tls: false,
        proxy_protocol: pp.flag("enable_tcp_pp").unwrap_or(false),
        proxy_protocol_to_upstream: pp.flag("enable_tcp_pp_to_upstream").unwrap_or(false),
    };
    let section = apisix.section("stream_proxy");
    let plain =
        StreamListener { proxy_protocol: false, proxy_protocol_to_upstream: false, ..default.clone() };
    let tcp = stream_listeners(&section, "tcp", &default);
    let udp = stream_listeners(&section, "udp", &plain);
    section.moved("only", "apisix.proxy_mode: stream");
    let present = section.is_present();
    section.finish();
    if !stream {
        if present && mode.is_some() {
            apisix.notice("stream_proxy", "proxy_mode leaves it off");
        } else if present {
            apisix.notice("stream_proxy", "it needs `proxy_mode: http&stream`");
        }
        return StreamProxy::default();
    }
    apisix.notice("proxy_mode", "TCP and UDP are not proxied yet; stream routes are checked and stored");
    StreamProxy { tcp, udp, only: !http }
}

fn stream_listeners(
    section: &Section<'_>,
    key: &'static str,
    default: &StreamListener,
) -> Vec<StreamListener> {
    let mut listeners = Vec::new();
    for element in section.list(key).unwrap_or_default() {
        if !element.value.is_object() {
            if let Some((ip, ports)) = stream_address(section, &element) {
                listeners.push(StreamListener { ip, ports, ..default.clone() });
            }
            continue;
        }
        let Some(entry) = section.element_section(&element, "an object") else { continue };
        let address = match entry.get("addr") {
            Some(value) => stream_address(section, &Element { value, pointer: entry.at("addr") }),
            None => {
                section.element_invalid(&element, "`addr` is missing: add it");
                None
            }
        };
        let tls = entry.flag("tls").unwrap_or(false);
        let proxy_protocol = entry.flag("proxy_protocol").unwrap_or(default.proxy_protocol);
        let proxy_protocol_to_upstream =
            entry.flag("proxy_protocol_to_upstream").unwrap_or(default.proxy_protocol_to_upstream);
        if let Some((ip, ports)) = address {
            listeners.push(StreamListener { ip, ports, tls, proxy_protocol, proxy_protocol_to_upstream });
        }
        entry.finish();
    }
    listeners
}

/// `9100`, `"9100-9110"`, `"127.0.0.1:9100"`, `"[::1]:9100-9110"`.
fn stream_address(
    section: &Section<'_>,
    element: &Element<'_>,
) -> Option<(IpAddr, std::ops::RangeInclusive<u16>)> {
    if element.value.is_number() {
        return element_port(section, element).map(|port| (ANY_IPV4, port..=port));
    }
    let text = section.element_text(element)?;
    let parsed = || {
        let (ip, ports) = match text.rsplit_once(':') {
            Some((ip, ports)) => (parse_ip(ip)?, ports),
            None => (ANY_IPV4, text),
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first > 0 && first <= last).then_some((ip, first..=last))
    };
    let address = parsed();
    if address.is_none() {
        let problem = format!("`{text}` is no listening address: write a port, IP:PORT or IP:FIRST-LAST");
        section.element_invalid(element, problem);
    }
    address
}

fn routing(apisix: &Section<'_>) -> Routing {
    let section = apisix.section("router");
    let router = section.one_of(
        "http",
        &[
            ("radixtree_host_uri", HttpRouter::HostUri),
            ("radixtree_uri", HttpRouter::Uri),
            ("radixtree_uri_with_parameter", HttpRouter::UriWithParameter),
        ],
    );
    section.one_of("ssl", &[("radixtree_sni", ())]);
    section.finish();
    let max = apisix.size("max_post_args_readable_size").unwrap_or(64 << 20);
    Routing {
        router: router.unwrap_or(HttpRouter::HostUri),
        delete_uri_tail_slash: apisix.flag("delete_uri_tail_slash").unwrap_or(false),
        normalize_uri_like_servlet: apisix.flag("normalize_uri_like_servlet").unwrap_or(false),
        match_uri_encoded_slash: apisix.flag("match_uri_encoded_slash").unwrap_or(false),
        max_post_args_size: (max > 0).then_some(max),
    }
}

fn dns(apisix: &Section<'_>, ipv6: bool) -> Dns {
    let mut servers = Vec::new();
    for element in apisix.list("dns_resolver").unwrap_or_default() {
        let Some(text) = apisix.element_text(&element) else { continue };
        match text.parse().ok().or_else(|| parse_ip(text).map(|ip| SocketAddr::new(ip, 53))) {
            Some(server) => servers.push(server),
            None => apisix.element_invalid(&element, format!("`{text}` is not an address of a DNS server")),
        }
    }
    Dns {
        servers,
        valid: apisix.duration("dns_resolver_valid"),
        timeout: apisix.duration("resolver_timeout").unwrap_or(Duration::from_secs(5)),
        search: apisix.flag("enable_resolv_search_opt").unwrap_or(true),
        ipv6,
    }
}

fn data_encryption(apisix: &Section<'_>) -> DataEncryption {
    let section = apisix.section("data_encryption");
    let enabled = section.flag("enable_encrypt_fields").or(section.flag("enable")).unwrap_or(true);
    let keyring = match section.list_or_single("keyring") {
        None => KEYRING.map(|key| Hidden::from(key.to_owned())).to_vec(),
        Some(elements) => {
            let key = |element: Element<'_>| {
                let text = match element.value {
                    Value::Number(number) => number.to_string(),
                    _ => section.element_text(&element)?.to_owned(),
                };
                if !matches!(text.len(), 16 | 32) {
                    let problem = format!("a key has 16 or 32 bytes, this one {}", text.len());
                    section.element_invalid(&element, problem);
                }
                Some(Hidden::from(text))
            };
            elements.into_iter().filter_map(key).collect()
        }
    };
    section.finish();
    DataEncryption { enabled: enabled && !keyring.is_empty(), keyring }
}

fn secret_cache(apisix: &Section<'_>) -> SecretCache {
    let lru = apisix.section("lru");
    let section = lru.section("secret");
    let cache = SecretCache {
        ttl: section.duration("ttl").unwrap_or(Duration::from_secs(300)),
        count: section.count("count", 1).unwrap_or(512),
        negative_ttl: section.duration("neg_ttl").unwrap_or(Duration::from_secs(60)),
        negative_count: section.count("neg_count", 1).unwrap_or(512),
    };
    section.finish();
    if lru.is_present() {
        apisix.notice("lru", "secrets are asked for again every five minutes");
    }
    lru.finish();
    cache
}

fn cache(apisix: &Section<'_>) -> Cache {
    let section = apisix.section("proxy_cache");
    let ttl = section.duration("cache_ttl").unwrap_or(Duration::from_secs(10));
    let zones = match section.list("zones") {
        Some(elements) => elements.iter().filter_map(|element| cache_zone(&section, element)).collect(),
        None => vec![
            CacheZone {
                name: "disk_cache_one".into(),
                memory_size: 50 << 20,
                disk: Some(CacheDisk { path: "/tmp/disk_cache_one".into(), size: 1 << 30 }),
            },
            CacheZone { name: "memory_cache".into(), memory_size: 50 << 20, disk: None },
        ],
    };
    section.finish();
    Cache { ttl, zones }
}

fn cache_zone(section: &Section<'_>, element: &Element<'_>) -> Option<CacheZone> {
    let entry = section.element_section(element, "an object with `name` and `memory_size`")?;
    let name = entry.word("name");
    let memory_size = entry.size("memory_size");
    let path = entry.path("disk_path");
    let size = entry.size("disk_size");
    entry.not_applicable("cache_levels", "files of the cache are laid out otherwise");
    if name.is_none() || !entry.has("memory_size") {
        section.element_invalid(element, "a zone needs `name` and `memory_size`");
    }
    if path.is_some() != entry.has("disk_size") {
        section.element_invalid(element, "a zone on disk needs `disk_path` and `disk_size`");
    }
    entry.finish();
    let disk = path.zip(size).map(|(path, size)| CacheDisk { path, size });
    Some(CacheZone { name: name?.to_owned(), memory_size: memory_size?, disk })
}
