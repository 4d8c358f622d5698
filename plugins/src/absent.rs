//! Plugin names that people know from APISIX or from texts about it, and that are not offered here.
//!
//! An object with such a plugin is refused, because without it a request could get through that should not, or get
//! another answer. The few whose absence nobody can see are taken and do nothing.

/// Plugins whose work is done anyway, and why.
pub const HARMLESS: &[(&str, &str)] =
    &[("ai", "it caches route matches inside APISIX; looking up a route here needs no cache")];

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

const AUTHENTICATION: &str = "`key-auth`, `basic-auth`, `jwt-auth` and `hmac-auth` authenticate";
const ACCESS_LOG: &str = "the access log tells of every request (`nginx_config.http.access_log_format`)";
const METRICS: &str = "`prometheus` is the way to metrics that is";
const AI: &str = "route to the provider as to any upstream; server-sent events pass untouched";

/// Plugins of APISIX 3.18 that are not offered yet, with the nearest thing that is, where there is one.
const NOT_YET: &[(&str, &str)] = &[
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
    ("ai-rate-limiting", "`limit-count` limits requests"),
    ("ai-request-rewrite", AI),
    ("authz-casbin", ""),
    ("authz-casdoor", AUTHENTICATION),
    ("authz-keycloak", AUTHENTICATION),
    ("aws-lambda", ""),
    ("azure-functions", ""),
    ("cas-auth", AUTHENTICATION),
    ("chaitin-waf", ""),
    ("datadog", METRICS),
    ("degraphql", ""),
    ("dingtalk-auth", AUTHENTICATION),
    ("dubbo-proxy", ""),
    ("example-plugin", ""),
    ("exit-transformer", "`response-rewrite` with `vars` on `status` changes answers"),
    ("ext-plugin-post-req", ""),
    ("ext-plugin-post-resp", ""),
    ("ext-plugin-pre-req", ""),
    ("feishu-auth", AUTHENTICATION),
    ("gm", ""),
    ("google-cloud-logging", ACCESS_LOG),
    ("graphql-limit-count", "`limit-count` limits requests"),
    ("graphql-proxy-cache", ""),
    ("http-dubbo", ""),
    ("inspect", "`postern explain` tells what happens to a request"),
    ("jwe-decrypt", ""),
    ("kafka-proxy", ""),
    ("lago", ""),
    ("ldap-auth", AUTHENTICATION),
    ("ldap-auth-advanced", AUTHENTICATION),
    ("log-rotate", ""),
    ("mcp-bridge", ""),
    ("mqtt-proxy", ""),
    ("oas-validator", ""),
    ("ocsp-stapling", ""),
    ("openfunction", ""),
    ("openwhisk", ""),
    ("rocketmq-logger", ACCESS_LOG),
    ("saml-auth", AUTHENTICATION),
    ("serverless-post-function", "Lua does not run here"),
    ("serverless-pre-function", "Lua does not run here"),
    ("sls-logger", ACCESS_LOG),
    ("tencent-cloud-cls", ACCESS_LOG),
    ("wolf-rbac", AUTHENTICATION),
];

/// What to do about a name, if it is known.
pub fn advice(name: &str) -> Option<String> {
    let of = |list: &'static [(&str, &'static str)]| {
        list.iter().find(|(known, _)| *known == name).map(|(_, advice)| *advice)
    };
    of(MISNOMERS).map(str::to_owned).or_else(|| {
        of(NOT_YET).map(|instead| match instead {
            "" => "it exists in APISIX and is not offered yet; take it out".to_owned(),
            instead => format!("it exists in APISIX and is not offered yet; {instead}"),
        })
    })
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
    NOT_YET.iter().chain(HARMLESS).map(|(name, _)| *name)
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
