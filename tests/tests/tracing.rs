//! Traces: what collectors are told of a request, and what its upstream is.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use e2e::client::Call;
use e2e::origin::{Origin, echo};
use e2e::{Edge, Value, eventually, json};
use http::{Request, Response};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

/// Keeps the requests it got.
struct Collector {
    origin: Origin,
    got: Arc<Mutex<Vec<Request<Bytes>>>>,
}

impl Collector {
    async fn start() -> Collector {
        let got = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&got);
        let origin = Origin::http(move |request| {
            kept.lock().expect("requests").push(request);
            async { Response::new(Bytes::new()) }
        })
        .await;
        Collector { origin, got }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.origin.addr)
    }

    /// Everything that `read` finds in what came so far.
    fn read<T>(&self, read: impl Fn(&Request<Bytes>) -> Vec<T>) -> Vec<T> {
        self.got.lock().expect("requests").iter().flat_map(read).collect()
    }

    async fn json(&self, count: usize) -> Vec<Value> {
        eventually("spans come", async || {
            let found = self.read(|request| match request.uri().path() {
                path if path.contains("/management/") => Vec::new(),
                _ => serde_json::from_slice::<Vec<Value>>(request.body()).expect("a list"),
            });
            (found.len() >= count).then_some(found)
        })
        .await
    }
}

fn spans(request: &ExportTraceServiceRequest) -> Vec<Span> {
    let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    scopes.flat_map(|scope| scope.spans.clone()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Span, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    found
        .and_then(|attribute| attribute.value.as_ref())
        .map_or_else(String::new, |value| format!("{:?}", value.value))
}

async fn gateway(plugins: Value, metadata: Option<Value>, origin: &Origin) -> Edge {
    let dead = e2e::ports::Port::free();
    let upstream = json!({"type": "roundrobin", "retries": 2, "nodes": [
        {"host": "127.0.0.1", "port": dead.number(), "weight": 1, "priority": 1},
        {"host": "127.0.0.1", "port": origin.addr.port(), "weight": 1, "priority": 0},
    ]});
    let mut resources = json!({"routes": [{"id": "r", "name": "traced", "uri": "/a/*", "plugins": plugins, "upstream": upstream}]});
    if let Some(metadata) = metadata {
        resources["plugin_metadata"] = json!([metadata]);
    }
    Edge::file().resources(resources).start().await
}

/// A request span under the caller's, and a span for each of the two attempts under that.
fn check_otlp(spans: &[Span], seen: &Value) {
    let request = spans.iter().find(|span| span.name == "GET /a/*").expect("the span of the request");
    assert_eq!((hex(&request.trace_id), hex(&request.parent_span_id)), (TRACE.to_owned(), SPAN.to_owned()));
    assert!(request.end_time_unix_nano >= request.start_time_unix_nano);
    for (key, value) in [
        ("http.method", "GET"),
        ("http.target", "/a/b?c=d"),
        ("apisix.route_id", "r"),
        ("apisix.route_name", "traced"),
        ("http.status_code", "200"),
        ("arg_c", "d"),
        ("x-team", "blue"),
    ] {
        assert!(attribute(request, key).contains(value), "{key}: {request:?}");
    }
    let attempts: Vec<_> = spans.iter().filter(|span| span.name == "upstream").collect();
    assert_eq!(attempts.len(), 2, "{spans:?}");
    assert!(attempts.iter().all(|span| span.parent_span_id == request.span_id));
    assert!(attribute(attempts[0], "error.type").contains("connect"), "{attempts:?}");
    assert!(attribute(attempts[1], "http.response.status_code").contains("200"), "{attempts:?}");
    let told = seen["headers"]["traceparent"][0].as_str().expect("a traceparent");
    assert_eq!(told, format!("00-{TRACE}-{}-01", hex(&request.span_id)));
}

async fn ask(edge: &Edge) -> Value {
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let call = Call::get("/a/b?c=d").header("traceparent", &parent).header("x-team", "blue");
    let answer = edge.send(call).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(answer.text().as_ref()).expect("an account")
}

fn otlp_plugin() -> Value {
    json!({"opentelemetry": {
        "sampler": {"name": "parent_base"},
        "additional_attributes": ["arg_c"],
        "additional_header_prefix_attributes": ["x-te*"],
    }})
}

fn otlp_metadata(collector: Value) -> Value {
    json!({
        "id": "opentelemetry",
        "resource": {"service.name": "shop"},
        "collector": collector,
        "batch_span_processor": {"inactive_timeout": 0.1, "batch_timeout": 0.2},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opentelemetry_tells_a_collector_over_http() {
    let (collector, origin) = (Collector::start().await, echo::start().await);
    let address =
        json!({"address": collector.origin.addr.to_string(), "request_headers": {"Authorization": "token"}});
    let edge = gateway(otlp_plugin(), Some(otlp_metadata(address)), &origin).await;
    let seen = ask(&edge).await;
    let found = eventually("three spans come", async || {
        let found = collector.read(|request| {
            assert_eq!(request.uri().path(), "/v1/traces");
            assert_eq!(request.headers()["authorization"], "token");
            assert_eq!(request.headers()["content-type"], "application/x-protobuf");
            let export = ExportTraceServiceRequest::decode(request.body().clone()).expect("an export");
            let resource = format!("{:?}", export.resource_spans[0].resource);
            assert!(resource.contains("service.name") && resource.contains("shop"), "{resource}");
            spans(&export)
        });
        (found.len() >= 3).then_some(found)
    })
    .await;
    check_otlp(&found, &seen);
}

#[derive(Clone, Default)]
struct Grpc(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().expect("spans").extend(spans(&request.into_inner()));
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opentelemetry_tells_a_collector_over_grpc() {
    let (got, origin) = (Grpc::default(), echo::start().await);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let service = TraceServiceServer::new(got.clone());
    let server =
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let metadata = otlp_metadata(json!({"address": address, "protocol": "grpc"}));
    let edge = gateway(otlp_plugin(), Some(metadata), &origin).await;
    let seen = ask(&edge).await;
    let found = eventually("three spans come", async || {
        let found = got.0.lock().expect("spans").clone();
        (found.len() >= 3).then_some(found)
    })
    .await;
    check_otlp(&found, &seen);
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zipkin_is_told_by_spans_and_the_upstream_by_b3() {
    let (server, origin) = (Collector::start().await, echo::start().await);
    let plugins = json!({"zipkin": {"endpoint": server.url("/api/v2/spans"), "sample_ratio": 0.00001}});
    let edge = gateway(plugins, None, &origin).await;
    let b3 = format!("{TRACE}-{SPAN}-1");
    let answer = edge.send(Call::get("/a/b").header("b3", &b3)).await;
    let seen: Value = serde_json::from_str(answer.text().as_ref()).expect("an account");
    let found = server.json(3).await;
    let request =
        found.iter().find(|span| span["name"] == "apisix.request").expect("the span of the request");
    assert_eq!((request["traceId"].as_str(), request["parentId"].as_str()), (Some(TRACE), Some(SPAN)));
    assert_eq!((&request["kind"], &request["tags"]["http.status_code"]), (&json!("SERVER"), &json!("200")));
    assert_eq!(request["localEndpoint"]["serviceName"], "APISIX");
    let attempts: Vec<_> = found.iter().filter(|span| span["name"] == "apisix.proxy").collect();
    assert_eq!(attempts.len(), 2);
    assert!(attempts.iter().all(|span| span["parentId"] == request["id"]), "{found:?}");
    assert_eq!(seen["headers"]["x-b3-traceid"][0], TRACE);
    assert_eq!(seen["headers"]["x-b3-spanid"][0], request["id"]);
    assert_eq!(seen["headers"]["x-b3-sampled"][0], "1");
    assert!(seen["headers"].get("b3").is_none());

    let unsampled = edge.send(Call::get("/a/b").header("b3", "0")).await;
    assert!(unsampled.text().contains("x-b3-sampled"), "the upstream does not sample either: {unsampled:?}");
    assert_eq!(edge.send(Call::get("/a/b").header("b3", "nonsense")).await.status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skywalking_is_told_by_segments_and_the_upstream_by_sw8() {
    let (server, origin) = (Collector::start().await, echo::start().await);
    let upstream = origin.upstream();
    let edge = Edge::file()
        .config(json!({"plugin_attr": {"skywalking": {
            "endpoint_addr": server.url("/"), "service_name": "shop", "report_interval": 1,
        }}}))
        .resources(json!({
            "global_rules": [{"id": "g", "plugins": {"skywalking": {}}}],
            "routes": [{"id": "r", "uri": "/*", "plugins": {"skywalking": {}}, "upstream": upstream}],
        }))
        .start()
        .await;
    let first: Value = serde_json::from_str(edge.get("/first").await.text().as_ref()).expect("an account");
    let sw8 = first["headers"]["sw8"][0].as_str().expect("sw8").to_owned();
    edge.send(Call::get("/second").header("sw8", &sw8)).await;
    let found = server.json(2).await;
    let segment = |path: &str| {
        found
            .iter()
            .find(|segment| segment["spans"][0]["operationName"] == path)
            .expect("the segment")
            .clone()
    };
    let (first, second) = (segment("/first"), segment("/second"));
    assert_eq!(first["service"], "shop");
    assert_eq!(first["spans"][0]["refs"], json!([]), "the global rule gives way to the route");
    assert_eq!(first["spans"].as_array().map(Vec::len), Some(2));
    assert_eq!(first["spans"][1]["spanType"], "Exit");
    assert_eq!(first["spans"][1]["peer"], origin.addr.to_string());
    let refs = &second["spans"][0]["refs"][0];
    assert_eq!(second["traceId"], first["traceId"], "one trace");
    assert_eq!(refs["parentTraceSegmentId"], first["traceSegmentId"]);
    assert_eq!(refs["parentSpanId"], 1);
    let told = server.read(|request| {
        let is_it = request.uri().path() == "/v3/management/reportProperties";
        is_it.then(|| serde_json::from_slice::<Value>(request.body()).expect("JSON")).into_iter().collect()
    });
    assert_eq!(told.len(), 1, "once a minute: {told:?}");
    assert_eq!(
        (&told[0]["service"], &told[0]["serviceInstance"]),
        (&first["service"], &first["serviceInstance"])
    );
    assert_eq!(told[0]["properties"][0], json!({"key": "language", "value": "rust"}));
}
