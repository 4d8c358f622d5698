//! Plugin names that people know from APISIX or from texts about it, and that are not offered here.
//!
//! An object with such a plugin is refused, because without it a request could get through that should not, or get
//! another answer. The few whose absence nobody can see are taken and do nothing.

/// Plugins whose work is done anyway, and why.
pub const HARMLESS: &[(&str, &str)] =
    &[("ai", "it caches route matches inside APISIX; looking up a route here needs no cache")];

/// Plugins that APISIX does not have.
pub const OURS: &[&str] = &["jwt-issue", "upstream-lookup"];

/// Names that are no plugin of APISIX either, and what is meant.
const MISNOMERS: &[(&str, &str)] = &[
    ("uri-rewrite", "use `proxy-rewrite`"),
    ("request-rewrite", "use `proxy-rewrite`"),
    (
        "coraza",
        "no web application firewall is offered; `uri-blocker` and `request-validation` refuse some of what one would",
    ),
    ("debug-logger", "ask `postern explain` what happens to a request, and take it out"),
    ("chash", "write `type: chash` into the upstream"),
    ("oauth", "use `openid-connect`"),
];

/// Plugins of APISIX whose work something else does, and what.
pub const REPLACED: &[(&str, &str)] = &[
    ("ai-rate-limiting", "`limit-count` limits requests"),
    ("authz-casbin", "`opa` asks a policy engine, `consumer-restriction` and `acl` decide by lists"),
    ("authz-casdoor", "`openid-connect` and `opa`"),
    ("authz-keycloak", "`openid-connect` for who calls, `opa` or `forward-auth` for what they may"),
    ("aws-lambda", "a route to the function's URL, and a WASM plugin where requests are signed"),
    ("azure-functions", "a route to the function's URL, with the key set by `proxy-rewrite`"),
    ("cas-auth", "`forward-auth` in front of the CAS server, or `openid-connect`"),
    ("chaitin-waf", "`forward-auth` in front of the firewall, or a WASM plugin that asks it"),
    ("datadog", "`prometheus`, which Datadog's agent reads, or `opentelemetry`"),
    ("degraphql", "`proxy-rewrite` with a body made by `body-transformer`"),
    ("dingtalk-auth", "`openid-connect` or `forward-auth`"),
    ("exit-transformer", "`response-rewrite` with `vars` on `status`, or `error-page`"),
    ("ext-plugin-post-req", "a WASM plugin (`wasm.plugins` of config.yaml)"),
    ("ext-plugin-post-resp", "a WASM plugin (`wasm.plugins` of config.yaml)"),
    ("ext-plugin-pre-req", "a WASM plugin (`wasm.plugins` of config.yaml)"),
    ("feishu-auth", "`openid-connect` or `forward-auth`"),
    ("google-cloud-logging", "`http-logger`, or `opentelemetry` with a collector"),
    ("graphql-limit-count", "`limit-count` limits requests"),
    ("graphql-proxy-cache", "`proxy-cache` with `cache_key`"),
    ("inspect", "`postern explain` tells what happens to a request"),
    ("lago", "`http-logger` with a `log_format`"),
    ("ldap-auth", "`forward-auth` in front of the directory, or `openid-connect`"),
    ("ldap-auth-advanced", "`forward-auth` in front of the directory, or `openid-connect`"),
    ("log-rotate", "the system's logrotate: SIGUSR1 opens log files again"),
    ("oas-validator", "`request-validation` with the JSON schemas of the operation"),
    ("ocsp-stapling", "certificates that live shortly"),
    ("openfunction", "a route to the function's URL, with the key set by `proxy-rewrite`"),
    ("openwhisk", "a route to the function's URL, with the key set by `proxy-rewrite`"),
    ("rocketmq-logger", "`kafka-logger` or `http-logger`"),
    ("saml-auth", "`openid-connect`, which a SAML identity provider can be put behind"),
    ("serverless-post-function", "a WASM plugin (`wasm.plugins` of config.yaml): Lua does not run here"),
    ("serverless-pre-function", "a WASM plugin (`wasm.plugins` of config.yaml): Lua does not run here"),
    ("sls-logger", "`syslog` or `kafka-logger`, which the service reads"),
    ("tencent-cloud-cls", "`kafka-logger`, which the service reads"),
    ("wolf-rbac", "`forward-auth` in front of the wolf server, or `opa`"),
];

const AI: &str = "route to the provider as to any upstream: server-sent events pass untouched";

/// Plugins of APISIX that will not be offered, and why.
pub const NOT_PLANNED: &[(&str, &str)] = &[
    ("ai-aliyun-content-moderation", AI),
    ("ai-aws-content-moderation", AI),
    ("ai-cache", AI),
    ("ai-lakera-guard", AI),
    ("ai-prompt-decorator", AI),
    ("ai-prompt-guard", AI),
    ("ai-prompt-template", AI),
    ("ai-proxy", AI),
    ("ai-proxy-multi", AI),
    ("ai-rag", AI),
    ("ai-request-rewrite", AI),
    ("dubbo-proxy", "few speak Dubbo through a gateway, and it needs an engine of its own"),
    ("example-plugin", "it is a sample; CONTRIBUTING.md has one"),
    ("gm", "Chinese cipher suites need another TLS library"),
    ("http-dubbo", "few speak Dubbo through a gateway, and it needs an engine of its own"),
    ("jwe-decrypt", "encrypted tokens are rare; `jwt-auth` verifies signed ones"),
    ("kafka-proxy", "a broker is better reached directly"),
    ("mcp-bridge", "it starts programs on the gateway's machine"),
    ("mqtt-proxy", "it balances TCP connections, which are not proxied"),
];

/// What to do about a name, if it is known.
pub fn advice(name: &str) -> Option<String> {
    let of = |list: &'static [(&str, &'static str)]| {
        list.iter().find(|(known, _)| *known == name).map(|(_, advice)| *advice)
    };
    let misnomer = || of(MISNOMERS).map(str::to_owned);
    let replaced = || of(REPLACED).map(|by| format!("it exists in APISIX and is replaced here; use {by}"));
    let not_planned = || {
        of(NOT_PLANNED).map(|why| format!("it exists in APISIX and is not planned here ({why}); take it out"))
    };
    misnomer().or_else(replaced).or_else(not_planned)
}

/// Whether leaving the plugin out changes nothing that anybody can see.
pub fn is_harmless(name: &str) -> bool {
    HARMLESS.iter().any(|(known, _)| *known == name)
}

/// Why leaving the plugin out changes nothing.
pub fn why_harmless(name: &str) -> Option<&'static str> {
    HARMLESS.iter().find(|(known, _)| *known == name).map(|(_, why)| *why)
}

/// Every name that APISIX has and this gateway has not.
pub fn names() -> impl Iterator<Item = &'static str> {
    [REPLACED, NOT_PLANNED, HARMLESS].into_iter().flatten().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_once_and_not_beside_the_plugin_itself() {
        let mut all: Vec<_> = names().chain(MISNOMERS.iter().map(|(name, _)| *name)).collect();
        all.extend(crate::registrations().iter().map(|registration| registration.name));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
