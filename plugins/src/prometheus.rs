//! `prometheus`: counts requests by route, service and consumer, under the names that APISIX dashboards ask for.
//!
//! Phase: `log`. Where both a global rule and the route have the plugin, the route's counts. Labels come from the
//! configuration; the address of the upstream node is told only where `plugin_attr.prometheus.node_label` asks for it,
//! because addresses that come and go make series without end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::Kind;
use config::error::ConfigError;
use config::template::Template;
use http::{HeaderValue, Method, Response, StatusCode, header};
use layers::body::Body;
use layers::endpoint::{Endpoint, Offers};
use layers::exchange::Exchange;
use layers::plugin::{BuildEnv, Definition, Extras, Hooks, OnLog};
use layers::telemetry::metrics::Metrics;
use layers::telemetry::requests::{
    DisabledLabels, ExtraLabel, Family, Label, Observation, RequestSettings,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::runtime::Handle;

use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Tell routes and services by their names instead of their ids, where they have one.
    #[serde(default)]
    prefer_name: bool,
}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// Labels whose values are left empty, by metric, so that series that differ only there become one.
    #[serde(default)]
    disabled_labels: Disabled,
}

/// Labels by metric.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disabled {
    /// Of `http_status`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    http_status: Vec<StatusLabel>,
    /// Of `http_latency`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    http_latency: Vec<TrafficLabel>,
    /// Of `bandwidth`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    bandwidth: Vec<TrafficLabel>,
}

/// A label of `http_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum StatusLabel {
    Code,
    Route,
    MatchedUri,
    MatchedHost,
    Service,
    Consumer,
    Node,
    RequestType,
    RequestLlmModel,
    LlmModel,
}

impl StatusLabel {
    fn label(self) -> Label {
        match self {
            Self::Code => Label::Code,
            Self::Route => Label::Route,
            Self::MatchedUri => Label::MatchedUri,
            Self::MatchedHost => Label::MatchedHost,
            Self::Service => Label::Service,
            Self::Consumer => Label::Consumer,
            Self::Node => Label::Node,
            Self::RequestType => Label::RequestType,
            Self::RequestLlmModel => Label::RequestLlmModel,
            Self::LlmModel => Label::LlmModel,
        }
    }
}

/// A label of `http_latency` and `bandwidth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum TrafficLabel {
    Type,
    Route,
    Service,
    Consumer,
    Node,
    RequestType,
    RequestLlmModel,
    LlmModel,
}

impl TrafficLabel {
    fn label(self) -> Label {
        match self {
            Self::Type => Label::Type,
            Self::Route => Label::Route,
            Self::Service => Label::Service,
            Self::Consumer => Label::Consumer,
            Self::Node => Label::Node,
            Self::RequestType => Label::RequestType,
            Self::RequestLlmModel => Label::RequestLlmModel,
            Self::LlmModel => Label::LlmModel,
        }
    }
}

impl Metadata {
    fn disabled(&self) -> DisabledLabels {
        let mut labels = DisabledLabels::default();
        let Disabled { http_status, http_latency, bandwidth } = &self.disabled_labels;
        http_status.iter().for_each(|label| labels.disable(Family::Status, label.label()));
        http_latency.iter().for_each(|label| labels.disable(Family::Latency, label.label()));
        bandwidth.iter().for_each(|label| labels.disable(Family::Bandwidth, label.label()));
        labels
    }
}

/// `plugin_attr.prometheus` of `config.yaml`. What APISIX has there for its own inner life is passed over.
#[derive(Clone, Debug, Deserialize)]
struct Attr {
    #[serde(default = "export_uri")]
    export_uri: String,
    #[serde(default = "yes")]
    enable_export_server: bool,
    #[serde(default)]
    export_addr: ExportAddr,
    #[serde(default = "metric_prefix")]
    metric_prefix: String,
    #[serde(default)]
    default_buckets: Option<Vec<f64>>,
    #[serde(default)]
    metrics: BTreeMap<String, MetricAttr>,
    /// Not of APISIX: whether `node` tells the upstream node's address.
    #[serde(default)]
    node_label: bool,
    /// Not of APISIX: label sets that are told apart.
    #[serde(default = "series_limit")]
    series_limit: usize,
}

#[derive(Clone, Debug, Deserialize)]
struct ExportAddr {
    #[serde(default = "loopback")]
    ip: IpAddr,
    #[serde(default = "port")]
    port: u16,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct MetricAttr {
    #[serde(default)]
    extra_labels: Vec<BTreeMap<String, String>>,
    #[serde(default)]
    expire: u64,
}

fn export_uri() -> String {
    "/apisix/prometheus/metrics".into()
}

fn yes() -> bool {
    true
}

fn metric_prefix() -> String {
    "apisix_".into()
}

fn series_limit() -> usize {
    RequestSettings::default().series_limit
}

fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

fn port() -> u16 {
    9091
}

impl Default for ExportAddr {
    fn default() -> Self {
        Self { ip: loopback(), port: port() }
    }
}

/// Where metrics are exported, and how they are kept.
#[derive(Clone, Debug)]
pub struct Export {
    /// Where to listen; nothing when `enable_export_server` is false.
    pub addr: Option<SocketAddr>,
    /// The path under which the text is served.
    pub uri: String,
    /// For [`Metrics::new`].
    pub settings: RequestSettings,
}

/// Reads `plugin_attr.prometheus` of `config.yaml`.
///
/// # Errors
/// What cannot be used, with pointers inside `attr`.
pub fn export(attr: Option<&Value>) -> Result<Export, Vec<ConfigError>> {
    let empty = Value::Object(serde_json::Map::new());
    let attr = attr.filter(|attr| !attr.is_null()).unwrap_or(&empty);
    let attr = Attr::deserialize(attr).map_err(|error| vec![ConfigError::invalid("", error.to_string())])?;
    let mut errors = Vec::new();
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    if !attr.metric_prefix.is_empty() && !is_name(&attr.metric_prefix) {
        errors.push(ConfigError::invalid("/metric_prefix", "write letters, digits and `_`, no digit first"));
    }
    if !attr.export_uri.starts_with('/') {
        errors.push(ConfigError::invalid("/export_uri", "a path begins with `/`"));
    }
    let mut settings = RequestSettings {
        prefix: attr.metric_prefix.into(),
        node_label: attr.node_label,
        series_limit: attr.series_limit,
        ..RequestSettings::default()
    };
    if let Some(buckets) = attr.default_buckets {
        if buckets.is_empty() || !buckets.is_sorted_by(|a, b| a < b) {
            errors.push(ConfigError::invalid("/default_buckets", "write bounds in milliseconds, ascending"));
        }
        settings.buckets = buckets.into();
    }
    for family in Family::ALL {
        let Some(of) = attr.metrics.get(family.name()) else { continue };
        let place = format!("/metrics/{}/extra_labels", family.name());
        let mut extra = Vec::new();
        for (index, pair) in of.extra_labels.iter().enumerate() {
            for (name, value) in pair {
                let taken = family.labels().iter().any(|label| label.name() == name);
                if !is_name(name) || taken || name == "le" {
                    let problem = format!("`{name}` cannot be the name of a further label");
                    errors.push(ConfigError::invalid(format!("{place}/{index}"), problem));
                }
                extra.push(ExtraLabel { name: name.as_str().into(), value: Template::parse(value) });
            }
        }
        if let Some(slot) = settings.extra.get_mut(family as usize) {
            *slot = extra;
        }
        if let Some(slot) = settings.expire.get_mut(family as usize) {
            *slot = (of.expire > 0).then(|| Duration::from_secs(of.expire));
        }
    }
    let addr = attr.enable_export_server.then(|| SocketAddr::new(attr.export_addr.ip, attr.export_addr.port));
    if errors.is_empty() { Ok(Export { addr, uri: attr.export_uri, settings }) } else { Err(errors) }
}

/// The plugin.
pub struct Prometheus {
    metrics: Arc<Metrics>,
    prefer_name: bool,
    /// Held by a global rule: gives way to the same plugin of the route.
    global: bool,
}

impl Definition for Prometheus {
    const NAME: &'static str = "prometheus";
    const PRIORITY: i32 = 500;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.metadata::<Metadata>();
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        env.metrics.by_route.disable_labels(metadata.disabled());
        hooks.log(&Arc::new(Self {
            metrics: env.metrics.clone(),
            prefer_name: config.prefer_name,
            global: env.owner.kind == Kind::GlobalRule,
        }));
        Ok(())
    }

    fn offer(env: &BuildEnv<'_>, offers: &mut Offers) -> Result<(), ConfigError> {
        // The start has refused what cannot be used.
        let Ok(Export { uri, .. }) = export(env.attr) else { return Ok(()) };
        let page = Page { metrics: env.metrics.clone(), control: env.control.clone() };
        offers.serve(Method::GET, &uri, &Arc::new(page));
        Ok(())
    }
}

/// The metrics, for `public-api`.
struct Page {
    metrics: Arc<Metrics>,
    control: Handle,
}

/// The form of the text that Prometheus reads.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How long summing up may take before the scrape is given up.
const SCRAPE: Duration = Duration::from_secs(10);

impl Endpoint for Page {
    async fn answer(&self, _: &mut Exchange) -> Response<Body> {
        let metrics = self.metrics.clone();
        // Thousands of series take milliseconds, which no worker has.
        let text = self.control.spawn_blocking(move || metrics.render());
        let Ok(Ok(text)) = tokio::time::timeout(SCRAPE, text).await else {
            return Canned::status(StatusCode::SERVICE_UNAVAILABLE).response();
        };
        let mut response = Response::new(Body::from(text));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(TEXT));
        response
    }
}

impl OnLog for Prometheus {
    fn log(&self, x: &Exchange) {
        if self.global && x.route_runs(Self::NAME) {
            return;
        }
        let now = Instant::now();
        let settings = self.metrics.by_route.settings();
        let target = x.target.as_deref();
        let route = target.map_or("", |target| match &target.route_name {
            Some(name) if self.prefer_name => name,
            _ => &target.route_id,
        });
        let service = target.map_or("", |target| match (&target.service_name, &target.service_id) {
            (Some(name), _) if self.prefer_name => name,
            (_, Some(id)) => id,
            (_, None) => "",
        });
        let node = match x.attempts.last() {
            Some(attempt) if settings.node_label => attempt.address.ip().to_string(),
            _ => String::new(),
        };
        let observation = Observation {
            route,
            matched_uri: x.matched_uri.as_deref().unwrap_or_default(),
            matched_host: x.matched_host.as_deref().unwrap_or_default(),
            service,
            consumer: x.consumer.as_ref().map_or("", |consumer| &consumer.name),
            node: &node,
            code: x.status(),
            total: now.saturating_duration_since(x.started),
            upstream: x.upstream_time(now),
            ingress: x.request_length(),
            egress: x.response_length(),
        };
        self.metrics.by_route.observe(&observation, &**x, now);
    }
}

#[cfg(test)]
mod tests {
    use layers::chain::Plan;
    use layers::target::{Destination, Target};
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    fn target() -> Arc<Target> {
        Arc::new(Target {
            route_id: "r1".into(),
            route_name: Some("shop".into()),
            route: None,
            service: None,
            service_id: Some("s1".into()),
            service_name: None,
            plan: None,
            destination: Destination::Nothing(layers::error::Reason::NoUpstream),
            timeout: None,
            websocket: false,
            refused: None,
        })
    }

    async fn count(env: &TestEnv, config: Value, matched: bool) {
        let mut chain = env.chain::<Prometheus, _>(&config, |_| Ok(())).unwrap();
        let mut x = exchange("GET", "http://a.com/x").build();
        if matched {
            x.target = Some(target());
            x.matched_uri = Some("/x*".into());
        }
        drop(chain.run(x).await);
    }

    #[tokio::test]
    async fn a_request_is_counted_when_it_is_over() {
        let env = TestEnv::default();
        count(&env, json!({}), true).await;
        count(&env, json!({}), true).await;
        count(&env, json!({"prefer_name": true}), true).await;
        count(&env, json!({}), false).await;
        let text = env.metrics.render();
        for (labels, value) in [
            (r#"code="200",route="r1",matched_uri="/x*",matched_host="",service="s1",consumer="",node="""#, 2),
            (r#"code="200",route="shop",matched_uri="/x*",matched_host="",service="s1",consumer="",node="""#, 1),
            (r#"code="200",route="",matched_uri="",matched_host="",service="",consumer="",node="""#, 1),
        ] {
            let line = text.lines().find(|line| line.starts_with(&format!("apisix_http_status{{{labels}")));
            assert!(line.is_some_and(|line| line.ends_with(&format!(" {value}"))), "{labels}\n{text}");
        }
        assert!(text.contains(r#"apisix_http_latency_count{type="request",route="r1""#));
        assert!(!text.contains(r#"type="upstream",route="r1""#), "no upstream was asked");
    }

    #[tokio::test]
    async fn a_global_rule_gives_way_to_the_route() {
        let env = TestEnv::default();
        let mut global = env.build::<Prometheus>(&json!({})).unwrap();
        let (metrics, prefer_name) = (env.metrics.clone(), false);
        global.hooks = Hooks::default();
        global.hooks.log(&Arc::new(Prometheus { metrics, prefer_name, global: true }));
        let mut x = exchange("GET", "http://a.com/x").build();
        x.global_plan = Some(Arc::new(Plan::new(vec![Arc::new(global)])));
        let mut chain = env.chain::<Prometheus, _>(&json!({}), |_| Ok(())).unwrap();
        drop(chain.run(x).await);
        let once = r#"apisix_http_latency_count{type="request",route="",service="",consumer="",node="",request_type="traditional_http",request_llm_model="",llm_model=""} 1"#;
        assert!(env.metrics.render().contains(once));
    }

    #[tokio::test]
    async fn a_global_rule_counts_where_the_plugin_of_the_route_is_disabled() {
        let env = TestEnv::default();
        let instance = |settings: Value| env.build::<Prometheus>(&settings).unwrap();
        let (metrics, prefer_name) = (env.metrics.clone(), false);
        let mut global = instance(json!({}));
        global.hooks = Hooks::default();
        global.hooks.log(&Arc::new(Prometheus { metrics, prefer_name, global: true }));
        let mut disabled = instance(json!({}));
        disabled.hooks = Hooks::default();
        let mut x = exchange("GET", "http://a.com/x").build();
        x.global_plan = Some(Arc::new(Plan::new(vec![Arc::new(global)])));
        x.plan = Some(Arc::new(Plan::new(vec![Arc::new(disabled)])));
        let mut chain = layers::chain::PluginChain::new(layers::testing::service(|_| Ok(())));
        drop(tower::Service::call(&mut chain, x).await.unwrap());
        assert!(env.metrics.render().contains("apisix_http_latency_count{type=\"request\""));
    }

    #[tokio::test]
    async fn the_page_can_be_exposed_on_a_route() {
        let env = TestEnv { attr: Some(json!({"export_uri": "/told"})), ..TestEnv::default() };
        env.offer::<Prometheus>().unwrap();
        assert!(env.endpoints.find(&Method::GET, "/apisix/prometheus/metrics").is_none());
        let page = env.endpoints.find(&Method::GET, "/told").unwrap();
        count(&env, json!({}), true).await;
        let mut response = page.answer(&mut exchange("GET", "http://a/").build()).await;
        assert_eq!(response.headers()["content-type"], TEXT);
        let text = response.body_mut().collect_up_to(1 << 20).await.unwrap();
        assert!(String::from_utf8_lossy(&text).contains(r#"apisix_http_status{code="200",route="r1""#));
    }

    #[tokio::test]
    async fn disabled_labels_come_from_metadata() {
        let metadata = Some(json!({"disabled_labels": {"http_status": ["route", "matched_uri"]}}));
        let mut env = TestEnv { metadata, ..TestEnv::default() };
        count(&env, json!({}), true).await;
        let text = env.metrics.render();
        assert!(text.contains(r#"apisix_http_status{code="200",route="",matched_uri="",matched_host="",service="s1""#), "{text}");
        assert!(text.contains(r#"apisix_bandwidth{type="egress",route="r1""#));
        env.metadata = None;
        count(&env, json!({}), true).await;
        assert!(env.metrics.render().contains(r#"code="200",route="r1""#));
    }

    #[test]
    fn attributes_of_config_yaml_are_read() {
        let defaults = export(None).unwrap();
        assert_eq!(defaults.addr.unwrap().to_string(), "127.0.0.1:9091");
        assert_eq!((&*defaults.uri, &*defaults.settings.prefix), ("/apisix/prometheus/metrics", "apisix_"));
        let attr = json!({
            "export_uri": "/metrics", "export_addr": {"ip": "0.0.0.0", "port": 9092}, "metric_prefix": "gw_",
            "default_buckets": [10, 50.5], "node_label": true, "series_limit": 5,
            "metrics": {
                "http_status": {"extra_labels": [{"up": "$upstream_addr"}, {"st": "$upstream_status"}], "expire": 60},
                "llm_latency": {"expire": 1},
            },
            "fetch_metric_timeout": 5,
        });
        let export = export(Some(&attr)).unwrap();
        assert_eq!(export.addr.unwrap().to_string(), "0.0.0.0:9092");
        let RequestSettings { prefix, buckets, extra, expire, node_label, series_limit } = export.settings;
        assert_eq!((&*prefix, &*buckets, node_label, series_limit), ("gw_", &[10.0, 50.5][..], true, 5));
        assert_eq!(extra[0].iter().map(|label| &*label.name).collect::<Vec<_>>(), ["up", "st"]);
        assert_eq!(expire, [Some(Duration::from_secs(60)), None, None]);
    }

    #[test]
    fn attributes_are_checked() {
        let cases = [
            (json!({"metric_prefix": "1a"}), "/metric_prefix"),
            (json!({"export_uri": "metrics"}), "/export_uri"),
            (json!({"default_buckets": [2, 1]}), "/default_buckets"),
            (json!({"export_addr": {"port": 70000}}), ""),
            (json!({"metrics": {"bandwidth": {"extra_labels": [{"route": "$uri"}]}}}), "/metrics/bandwidth/extra_labels/0"),
        ];
        for (attr, pointer) in cases {
            assert_eq!(export(Some(&attr)).unwrap_err()[0].pointer, pointer, "{attr}");
        }
        assert!(export(Some(&json!({"enable_export_server": false}))).unwrap().addr.is_none());
    }

    #[test]
    fn metadata_knows_the_labels_of_each_metric() {
        let check = |value: Value| {
            let mut extras = Extras::default();
            Prometheus::extend(&mut extras);
            extras.check_metadata(&value).unwrap()
        };
        assert!(check(json!({"disabled_labels": {"http_latency": ["node"], "http_status": ["code"]}})).is_ok());
        let errors = check(json!({"disabled_labels": {"bandwidth": ["code"]}})).unwrap_err();
        assert_eq!(errors[0].pointer, "/disabled_labels/bandwidth/0", "{errors:?}");
    }
}
