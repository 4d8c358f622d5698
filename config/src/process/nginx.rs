//! The `nginx_config` group: what of it means something without nginx.

use std::time::Duration;

use super::section::Section;
use super::{AccessLog, Env, Escape, LogLevel, RealIp, UpstreamKeepalive, Workers};
use crate::template::Template;

/// APISIX's access log line, and at its end why the gateway answered by itself.
const LOG_FORMAT: &str = "$remote_addr - $remote_user [$time_local] $http_host \"$request\" $status $body_bytes_sent \
    $request_time \"$http_referer\" \"$http_user_agent\" $upstream_addr $upstream_status $upstream_response_time \
    \"$upstream_scheme://$upstream_host$upstream_uri\" $reason";

/// What to use in place of raw nginx configuration.
const SNIPPETS: [(&str, &str); 7] = [
    ("main_configuration_snippet", "use the keys of `postern` and `nginx_config`"),
    ("http_configuration_snippet", "use `nginx_config.http`, `postern.limits`, or global rules"),
    (
        "http_server_configuration_snippet",
        "use global rules, for paths of your own routes with `mocking` or `redirect`",
    ),
    ("http_server_location_configuration_snippet", "use plugins on routes or global rules"),
    ("http_admin_configuration_snippet", "use `deployment.admin`"),
    ("http_end_configuration_snippet", "use routes and upstreams in place of `server` and `upstream` blocks"),
    ("stream_configuration_snippet", "use `apisix.stream_proxy` and stream routes"),
];

pub(super) struct Nginx {
    pub(super) workers: Option<Workers>,
    pub(super) cpu_affinity: bool,
    pub(super) worker_connections: u32,
    pub(super) drain_timeout: Option<Duration>,
    pub(super) body_bytes: Option<u64>,
    pub(super) header_timeout: Option<Duration>,
    pub(super) body_timeout: Option<Duration>,
    pub(super) send_timeout: Duration,
    pub(super) idle_timeout: Option<Duration>,
    /// Number and size of `large_client_header_buffers`.
    pub(super) header_buffers: Option<(u32, u32)>,
    pub(super) underscores_in_headers: bool,
    pub(super) real_ip: RealIp,
    pub(super) access_log: Option<AccessLog>,
    pub(super) log_level: LogLevel,
    pub(super) upstream_keepalive: UpstreamKeepalive,
}

pub(super) fn read(nginx: Section<'_>, dev_mode: bool, env: &dyn Env) -> Nginx {
    let http = nginx.section("http");
    let upstream = http.section("upstream");
    let event = nginx.section("event");
    let result = Nginx {
        workers: workers(&nginx, dev_mode, env),
        cpu_affinity: nginx.flag("enable_cpu_affinity").unwrap_or(false),
        worker_connections: event.count("worker_connections", 1).unwrap_or(10_620),
        drain_timeout: nginx.duration("worker_shutdown_timeout"),
        body_bytes: http.size("client_max_body_size").filter(|size| *size > 0),
        header_timeout: http.duration("client_header_timeout"),
        body_timeout: http.duration("client_body_timeout"),
        send_timeout: http.duration("send_timeout").unwrap_or(Duration::from_secs(10)),
        idle_timeout: http.duration("keepalive_timeout"),
        header_buffers: header_buffers(&http),
        underscores_in_headers: http.flag("underscores_in_headers").unwrap_or(true),
        real_ip: RealIp {
            header: http.word("real_ip_header").unwrap_or("X-Real-IP").to_ascii_lowercase(),
            recursive: http.flag("real_ip_recursive").unwrap_or(false),
            from: http.networks("real_ip_from").unwrap_or_else(|| vec![super::LOOPBACK.into()]),
        },
        access_log: access_log(&http),
        log_level: log_level(&nginx),
        upstream_keepalive: UpstreamKeepalive {
            size: upstream.count("keepalive", 1).unwrap_or(320),
            requests: upstream.count("keepalive_requests", 1).unwrap_or(1000),
            idle_timeout: upstream.duration("keepalive_timeout").unwrap_or(Duration::from_secs(60)),
        },
    };
    if result.cpu_affinity {
        nginx.notice("enable_cpu_affinity", "workers are not bound to cores");
    }
    refuse_snippets(&nginx);
    upstream.finish();
    event.finish_leniently("the event loop is not nginx's");
    for key in ["lua_shared_dict", "custom_lua_shared_dict", "lua_shared_dicts", "ipc_shared_dict"] {
        http.not_applicable(key, "there are no shared dictionaries to size");
    }
    http.not_applicable("access_log_buffer", "lines are gathered and written by a thread of their own");
    http.not_applicable("variables_hash_max_size", "there is no hash of variables to size");
    http.not_applicable("charset", "responses keep the charset the upstream gave them");
    http.not_applicable("client_header_buffer_size", "header buffers grow as needed, up to the limit");
    if http.flag("proxy_ssl_server_name") == Some(false) {
        http.notice("proxy_ssl_server_name", "the server name is always sent to TLS upstreams");
    }
    http.finish_leniently("a setting of nginx that has no counterpart here");
    nginx.not_applicable("user", "start the process as the user it shall run as");
    nginx.not_applicable("error_log", "messages go to standard error");
    nginx.not_applicable(
        "worker_rlimit_nofile",
        "the limit of open files is raised to what the system allows",
    );
    nginx.not_applicable("worker_rlimit_core", "set the limit where the process is started");
    nginx.not_applicable("max_pending_timers", "timers are not limited");
    nginx.not_applicable("max_running_timers", "timers are not limited");
    nginx.not_applicable("envs", "all variables of the environment can be used");
    nginx.not_applicable("meta", "there are no shared dictionaries to size");
    nginx.not_applicable("stream", "L4 connections are not logged by nginx formats");
    nginx.finish_leniently("a setting of nginx that has no counterpart here");
    result
}

fn workers(nginx: &Section<'_>, dev_mode: bool, env: &dyn Env) -> Option<Workers> {
    let written = match nginx.get("worker_processes") {
        Some(value) if value.as_str() == Some("auto") => Some(Workers::Auto),
        Some(_) => nginx.count("worker_processes", 1).map(Workers::Count),
        None => None,
    };
    if dev_mode {
        return Some(Workers::Count(1));
    }
    let from_env = env.var("APISIX_WORKER_PROCESSES").and_then(|count| count.trim().parse().ok());
    from_env.filter(|count| *count > 0).map(Workers::Count).or(written)
}

/// `large_client_header_buffers`: `4 8k`.
fn header_buffers(http: &Section<'_>) -> Option<(u32, u32)> {
    let text = http.text("large_client_header_buffers")?;
    let parsed = || {
        let (count, size) = text.trim().split_once(char::is_whitespace)?;
        let count: u32 = count.parse().ok().filter(|count| *count > 0)?;
        let size = super::units::parse_size(size).filter(|size| *size > 0)?;
        Some((count, u32::try_from(size).ok()?))
    };
    let buffers = parsed();
    if buffers.is_none() {
        http.invalid(
            "large_client_header_buffers",
            format!("`{text}` is not a number and a size, like `4 8k`"),
        );
    }
    buffers
}

fn access_log(http: &Section<'_>) -> Option<AccessLog> {
    let enabled = http.flag("enable_access_log").unwrap_or(true);
    let path = http.path("access_log");
    let buffer = http.size("access_log_buffer").unwrap_or(16 << 10);
    let format = http.text("access_log_format").unwrap_or(LOG_FORMAT);
    let words = [("default", Escape::Default), ("json", Escape::Json), ("none", Escape::None)];
    let escape = http.one_of("access_log_format_escape", &words).unwrap_or(Escape::Default);
    enabled.then(|| AccessLog {
        path,
        buffer: u32::try_from(buffer).unwrap_or(u32::MAX),
        format: Template::parse_log_format(format.trim_end_matches(['\n', '\r'])),
        escape,
    })
}

fn log_level(nginx: &Section<'_>) -> LogLevel {
    let words = [
        ("debug", LogLevel::Debug),
        ("info", LogLevel::Info),
        ("notice", LogLevel::Info),
        ("warn", LogLevel::Warn),
        ("error", LogLevel::Error),
        ("crit", LogLevel::Error),
        ("alert", LogLevel::Error),
        ("emerg", LogLevel::Error),
    ];
    nginx.one_of("error_log_level", &words).unwrap_or(LogLevel::Warn)
}

/// Raw nginx configuration would be left out silently, and with it rules of access and headers. Comments are nothing.
fn refuse_snippets(nginx: &Section<'_>) {
    for (key, instead) in SNIPPETS {
        let Some(snippet) = nginx.text(key) else { continue };
        let says_something =
            snippet.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#'));
        if says_something {
            let what = "raw nginx configuration".to_owned();
            nginx.error(key, crate::error::ErrorKind::Unsupported { what, instead: instead.to_owned() });
        }
    }
}
