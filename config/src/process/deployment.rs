//! The `deployment` group: role, provider, Admin API, etcd.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::apisix::Apisix;
use super::section::Section;
use super::{
    ANY_IPV4, Admin, AdminKey, AdminRole, AdminTls, Env, Etcd, EtcdTls, Hidden, LOOPBACK, Provider, Role,
};
use crate::error::ErrorKind;

const ADMIN_PORT: u16 = 9180;

pub(super) struct Deployment {
    pub(super) role: Role,
    pub(super) provider: Provider,
    pub(super) admin: Option<Admin>,
}

/// `config_provider`, as written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    Etcd,
    Yaml,
    Json,
    Embedded,
    Xds,
    ControlPlane,
}

const PROVIDERS: [(&str, Named); 6] = [
    ("etcd", Named::Etcd),
    ("yaml", Named::Yaml),
    ("json", Named::Json),
    ("embedded", Named::Embedded),
    ("xds", Named::Xds),
    ("control_plane", Named::ControlPlane),
];

pub(super) fn read(deployment: Section<'_>, dir: &Path, apisix: &Apisix, env: &dyn Env) -> Deployment {
    let roles = [
        ("traditional", Role::Traditional),
        ("control_plane", Role::ControlPlane),
        ("data_plane", Role::DataPlane),
    ];
    let role = deployment.one_of("role", &roles).unwrap_or(Role::Traditional);
    let etcd = deployment.section("etcd");
    let settings = read_etcd(&etcd, env);
    let has_etcd = etcd.is_present() || env.var("APISIX_DEPLOYMENT_ETCD_HOST").is_some();
    etcd.finish();
    let provider = provider(&deployment, role, dir, has_etcd, settings);
    let admin = admin(&deployment);
    let wants_admin = match role {
        Role::Traditional => apisix.enable_admin,
        Role::ControlPlane => true,
        Role::DataPlane => false,
    };
    deployment.not_applicable("certs", "it belongs to the old connection between control and data plane");
    deployment.moved("config_provider", "deployment.role_traditional.config_provider");
    deployment.finish();
    Deployment { role, provider, admin: wants_admin.then_some(admin) }
}

fn provider(deployment: &Section<'_>, role: Role, dir: &Path, has_etcd: bool, etcd: Etcd) -> Provider {
    let mut chosen = None;
    for (of_role, key) in [
        (Role::Traditional, "role_traditional"),
        (Role::ControlPlane, "role_control_plane"),
        (Role::DataPlane, "role_data_plane"),
    ] {
        let section = deployment.section(key);
        let named = section.one_of("config_provider", &PROVIDERS);
        section.not_applicable("conf_server", "control and data plane meet in the store");
        section.not_applicable("control_plane", "control and data plane meet in the store");
        if of_role == role {
            chosen = named;
            if let Some(instead) = named.and_then(|named| refusal(role, named)) {
                let what = format!("this provider with `role: {}`", key.trim_start_matches("role_"));
                section.error("config_provider", ErrorKind::Unsupported { what, instead: instead.into() });
            } else if role == Role::DataPlane
                && named.is_none()
                && !has_etcd
                && !section.has("config_provider")
            {
                deployment.invalid(key, "`config_provider` is missing: write etcd, yaml or json");
            }
        }
        section.finish();
    }
    match (role, chosen) {
        (Role::Traditional, Some(Named::Yaml)) => Provider::Standalone,
        (Role::DataPlane, Some(Named::Yaml)) => Provider::File { path: dir.join("apisix.yaml") },
        (Role::DataPlane, Some(Named::Json)) => Provider::File { path: dir.join("apisix.json") },
        (_, Some(Named::Embedded)) => Provider::Embedded,
        (_, Some(Named::Etcd)) => Provider::Etcd(Box::new(etcd)),
        _ if has_etcd => Provider::Etcd(Box::new(etcd)),
        _ => Provider::Embedded,
    }
}

/// What to write in place of a provider a role cannot have.
fn refusal(role: Role, named: Named) -> Option<&'static str> {
    match (role, named) {
        (_, Named::Xds) => Some("there is no xDS client; write etcd, yaml or json"),
        (_, Named::ControlPlane) => Some("control and data plane meet in etcd; write etcd"),
        (Role::Traditional, Named::Json) => {
            Some("write yaml for the standalone Admin API, or use `role: data_plane`")
        }
        (Role::ControlPlane, Named::Yaml | Named::Json) => Some("write etcd or embedded"),
        (Role::DataPlane, Named::Embedded) => Some("nothing could write it; use `role: traditional`"),
        _ => None,
    }
}

fn admin(deployment: &Section<'_>) -> Admin {
    let section = deployment.section("admin");
    // APISIX listens everywhere and lets loopback in. Listening on loopback is the same, unless more may come in.
    let allow = section.networks("allow_admin");
    let everybody = section.has("allow_admin") && allow.as_ref().is_none_or(Vec::is_empty);
    let allow = match allow {
        Some(allow) => allow,
        None if everybody => Vec::new(),
        None => "127.0.0.0/24".parse().into_iter().collect(),
    };
    let open = everybody || allow.iter().any(|network| !network.network().is_loopback());
    let default = SocketAddr::new(if open { ANY_IPV4 } else { LOOPBACK }, ADMIN_PORT);
    let address = section.socket("admin_listen", default);
    let https = section.flag("https_admin").unwrap_or(false);
    let mtls = section.section("admin_api_mtls");
    let tls = admin_tls(&section, &mtls, https);
    mtls.finish();
    section.one_of("admin_api_version", &[("v3", ())]);
    section.not_applicable("enable_admin_ui", "there is no dashboard in the process");
    let admin = Admin {
        address,
        keys: admin_keys(&section),
        key_required: section.flag("admin_key_required").unwrap_or(true),
        allow,
        cors: section.flag("enable_admin_cors").unwrap_or(true),
        tls,
    };
    section.finish();
    admin
}

fn admin_tls(admin: &Section<'_>, mtls: &Section<'_>, https: bool) -> Option<AdminTls> {
    let cert = mtls.path("admin_ssl_cert");
    let key = mtls.path("admin_ssl_cert_key");
    let client_ca = mtls.path("admin_ssl_ca_cert");
    if !https {
        return None;
    }
    if cert.is_none() || key.is_none() {
        admin.invalid("https_admin", "it needs `admin_api_mtls.admin_ssl_cert` and `admin_ssl_cert_key`");
    }
    Some(AdminTls { cert: cert?, key: key?, client_ca })
}

fn admin_keys(admin: &Section<'_>) -> Vec<AdminKey> {
    let mut keys: Vec<AdminKey> = Vec::new();
    for element in admin.list("admin_key").unwrap_or_default() {
        let Some(entry) = admin.element_section(&element, "an object with `name`, `key` and `role`") else {
            continue;
        };
        let name = entry.loose_text("name").unwrap_or_default();
        let key = entry.loose_text("key").unwrap_or_default();
        let role = entry.one_of("role", &[("admin", AdminRole::Admin), ("viewer", AdminRole::Viewer)]);
        if role.is_none() && !entry.has("role") {
            admin.element_invalid(&element, "`role` is missing: write admin or viewer");
        }
        if keys.iter().any(|known| known.key.reveal() == key && !key.is_empty()) {
            admin.element_invalid(&element, "the key is the same as that of another entry");
        }
        entry.finish();
        // APISIX ships with an empty key, which stands for one that is generated.
        if let (Some(role), false) = (role, key.is_empty()) {
            keys.push(AdminKey { name, key: Hidden::from(key), role });
        }
    }
    keys
}

fn read_etcd(section: &Section<'_>, env: &dyn Env) -> Etcd {
    let mut hosts = Vec::new();
    for element in section.list_or_single("host").unwrap_or_default() {
        let Some(text) = section.element_text(&element) else { continue };
        if !is_url(text) {
            section.element_invalid(
                &element,
                format!("`{text}` is no URL: write http://HOST:2379 or https://HOST:2379"),
            );
        }
        hosts.push(text.trim_end_matches('/').to_owned());
    }
    // APISIX takes the hosts from here in containers, as a JSON array.
    if let Some(value) = env.var("APISIX_DEPLOYMENT_ETCD_HOST") {
        match serde_json::from_str::<Value>(&value) {
            Ok(Value::Array(items))
                if !items.is_empty() && items.iter().all(|it| it.as_str().is_some_and(is_url)) =>
            {
                hosts = items
                    .iter()
                    .filter_map(Value::as_str)
                    .map(|it| it.trim_end_matches('/').to_owned())
                    .collect();
            }
            _ => {
                section.invalid("host", "APISIX_DEPLOYMENT_ETCD_HOST is set, but not to a JSON array of URLs")
            }
        }
    }
    if hosts.is_empty() {
        hosts.push("http://127.0.0.1:2379".into());
    }
    let prefix = section.text("prefix").unwrap_or("/apisix").trim_end_matches('/').to_owned();
    if !prefix.is_empty() && !prefix.starts_with('/') {
        section.invalid("prefix", "the prefix begins with a slash: /apisix");
    }
    let seconds = Duration::from_secs;
    let etcd = Etcd {
        hosts,
        prefix,
        user: user(section),
        timeout: section.duration("timeout").filter(|time| !time.is_zero()).unwrap_or(seconds(30)),
        watch_timeout: section
            .duration("watch_timeout")
            .filter(|time| !time.is_zero())
            .unwrap_or(seconds(50)),
        resync_delay: section.duration("resync_delay").unwrap_or(seconds(5)),
        health_check_timeout: section.duration("health_check_timeout").unwrap_or(seconds(10)),
        startup_retry: section.count("startup_retry", 0).unwrap_or(2),
        tls: etcd_tls(section),
    };
    let pace = "a watch is kept alive, and contact is sought again after 100 ms, at last every 2 s";
    for key in ["watch_timeout", "resync_delay", "health_check_timeout", "startup_retry"] {
        section.not_applicable(key, pace);
    }
    section.not_applicable("use_grpc", "etcd is always spoken to by gRPC");
    section.not_applicable("health_check_retry", "members are tried in turn");
    etcd
}

fn user(section: &Section<'_>) -> Option<(String, Hidden)> {
    let user = section.loose_text("user").filter(|user| !user.is_empty());
    let password = section.loose_text("password");
    if user.is_some() != password.is_some() {
        let (there, missing) = if user.is_some() { ("user", "password") } else { ("password", "user") };
        section.invalid(there, format!("`{there}` needs `{missing}` beside it"));
    }
    user.zip(password.map(Hidden::from))
}

fn etcd_tls(section: &Section<'_>) -> EtcdTls {
    let tls = section.section("tls");
    let cert = tls.path("cert");
    let key = tls.path("key");
    if cert.is_some() != key.is_some() {
        let (there, missing) = if cert.is_some() { ("cert", "key") } else { ("key", "cert") };
        tls.invalid(there, format!("`{there}` needs `{missing}` beside it"));
    }
    let result = EtcdTls {
        verify: tls.flag("verify").unwrap_or(true),
        identity: cert.zip(key),
        ca: tls.path("ca").or_else(|| tls.path("ca_cert")),
        sni: tls.word("sni").map(str::to_owned),
    };
    tls.finish();
    result
}

fn is_url(text: &str) -> bool {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace))
}
