use config::{Change, PluginCatalog};
use serde_json::json;

use super::*;

struct Bench {
    graph: Graph,
    compiler: Compiler,
    catalog: plugins::Catalog,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let process = Process::defaults(std::path::Path::new("."));
        let env = Env::new(
            &process,
            Arc::new(plugins::Catalog::default()),
            Arc::default(),
            runtime.handle().clone(),
            &Turns::default(),
        )
        .unwrap();
        Self {
            graph: Graph::new(),
            compiler: Compiler::new(env),
            catalog: plugins::Catalog::new(None),
            runtime,
        }
    }

    fn put(&mut self, path: &str, value: Value) -> Snapshot {
        let key = ResourceKey::from_path(path).unwrap();
        let index = self.graph.len() as u64 + 1;
        self.change(Change::Put { key, value, created_index: index, modified_index: index })
    }

    fn delete(&mut self, path: &str) -> Snapshot {
        self.change(Change::Delete { key: ResourceKey::from_path(path).unwrap(), modified_index: 99 })
    }

    fn change(&mut self, change: Change) -> Snapshot {
        let _context = self.runtime.enter();
        let catalog: &dyn PluginCatalog = &self.catalog;
        let changed = self.graph.apply(change, catalog);
        self.compiler.compile(&self.graph, changed)
    }
}

fn target(snapshot: &Snapshot, id: &str) -> Arc<Target> {
    snapshot.routes.value(id).unwrap_or_else(|| panic!("route {id} is not in the table")).clone()
}

fn cluster(target: &Target) -> Arc<Cluster> {
    match &target.destination {
        Destination::Cluster(cluster) => cluster.clone(),
        Destination::Nothing(reason) => panic!("no upstream: {reason:?}"),
    }
}

fn upstream(nodes: &[&str]) -> Value {
    let nodes: serde_json::Map<_, _> = nodes.iter().map(|node| ((*node).to_owned(), json!(1))).collect();
    json!({ "nodes": nodes })
}

#[test]
fn an_edit_of_an_upstream_touches_no_route() {
    let mut bench = Bench::new();
    bench.put("upstreams/1", upstream(&["127.0.0.1:1"]));
    let before = target(&bench.put("routes/1", json!({"uri": "/a", "upstream_id": "1"})), "1");
    let after = target(&bench.put("upstreams/1", upstream(&["127.0.0.1:2", "127.0.0.1:3"])), "1");
    assert!(Arc::ptr_eq(&before, &after));
    assert_eq!(cluster(&after).endpoints().len(), 2);
}

#[test]
fn an_upstream_that_comes_and_goes_is_noticed_by_its_routes() {
    let mut bench = Bench::new();
    let missing = target(&bench.put("routes/1", json!({"uri": "/a", "upstream_id": "1"})), "1");
    assert!(matches!(missing.destination, Destination::Nothing(Reason::UpstreamMissing)));
    cluster(&target(&bench.put("upstreams/1", upstream(&["127.0.0.1:1"])), "1"));
    let gone = target(&bench.delete("upstreams/1"), "1");
    assert!(matches!(gone.destination, Destination::Nothing(Reason::UpstreamMissing)));
}

#[test]
fn a_service_serves_all_its_routes_and_the_route_wins() {
    let mut bench = Bench::new();
    let plugins = json!({"cors": {}, "ip-restriction": {"whitelist": ["10.0.0.0/8"]}});
    bench.put("services/1", json!({"upstream": upstream(&["127.0.0.1:1"]), "plugins": plugins}));
    bench.put("routes/1", json!({"uri": "/a", "service_id": "1"}));
    let own = json!({"uri": "/b", "service_id": "1", "plugins": {"cors": {"max_age": 1}}});
    let snapshot = bench.put("routes/2", own);
    let told = |id| {
        let target = target(&snapshot, id);
        let sources: Vec<_> = target
            .plan
            .iter()
            .flat_map(|plan| plan.instances())
            .map(|i| format!("{} of {}", i.name, i.source.0))
            .collect();
        sources.join(", ")
    };
    assert_eq!(told("1"), "cors of services/1, ip-restriction of services/1");
    assert_eq!(told("2"), "cors of routes/2, ip-restriction of services/1");
    assert!(Arc::ptr_eq(&cluster(&target(&snapshot, "1")), &cluster(&target(&snapshot, "2"))));
    let after = bench.put("services/1", json!({"upstream": upstream(&["127.0.0.1:2"])}));
    assert!(target(&after, "1").plan.is_none(), "the edit of the service counts for its routes");
}

#[test]
fn a_route_that_is_refused_keeps_its_place_and_says_why() {
    let mut bench = Bench::new();
    let broken =
        json!({"uri": "/a", "plugins": {"no-such-plugin": {}}, "upstream": upstream(&["127.0.0.1:1"])});
    let refused = target(&bench.put("routes/1", broken), "1");
    assert!(refused.refused.as_deref().is_some_and(|why| why.contains("no-such-plugin")));
    let mended =
        target(&bench.put("routes/1", json!({"uri": "/a", "upstream": upstream(&["127.0.0.1:1"])})), "1");
    assert!(mended.refused.is_none());
}

#[test]
fn a_route_whose_conditions_cannot_be_read_is_refused_where_the_others_hold() {
    let look_around = json!(["arg_a", "~~", "(?!x)y"]);
    let plain = json!(["arg_b", "==", "1"]);
    let rows = [
        ("a regular expression", json!({"uri": "/a", "vars": [look_around]})),
        ("one comparison of two", json!({"uri": "/a", "vars": [plain, look_around]})),
        ("one of an alternative", json!({"uri": "/a", "vars": ["OR", plain, look_around]})),
        ("one inside a form", json!({"uri": "/a", "vars": ["AND", plain, ["OR", plain, look_around]]})),
        ("a comparison that is not wrapped", json!({"uri": "/a", "vars": ["arg_a", "==", "1"]})),
        ("an operator", json!({"uri": "/a", "vars": [["arg_a", "=~", "y"]]})),
        ("one method of two", json!({"uri": "/a", "methods": ["GET", "FETCH"]})),
        ("methods that are no list", json!({"uri": "/a", "methods": "GET"})),
        ("an address", json!({"uri": "/a", "remote_addr": "10.0.0.0/99"})),
        ("one address of two", json!({"uri": "/a", "remote_addrs": ["127.0.0.1", "near"]})),
        ("a priority", json!({"uri": "/a", "priority": "high"})),
        ("one host of two", json!({"uri": "/a", "hosts": ["a.com", "a b"]})),
        ("one path of two", json!({"uris": ["/a", 5]})),
        ("a path and a list of them", json!({"uri": "/a", "uris": ["/a", "/b"]})),
        ("a host and a list of them", json!({"uri": "/a", "host": "a.com", "hosts": ["b.com"]})),
        ("a service", json!({"uri": "/a", "service_id": {}, "vars": [look_around]})),
    ];
    for (what, mut route) in rows {
        route["upstream"] = upstream(&["127.0.0.1:1"]);
        let refused = target(&Bench::new().put("routes/1", route), "1");
        assert!(refused.refused.is_some(), "{what}");
    }
    for (what, mut route) in [
        ("a host that cannot be read", json!({"uri": "/*", "host": "a b"})),
        ("a path that cannot be read", json!({"uri": 5})),
        ("a route that is off", json!({"uri": "/a", "vars": 1, "status": 0})),
    ] {
        route["upstream"] = upstream(&["127.0.0.1:1"]);
        let snapshot = Bench::new().put("routes/1", route);
        assert!(snapshot.routes.value("1").is_none(), "{what} means no request");
    }
}

#[test]
fn a_route_does_not_serve_without_its_service() {
    let mut bench = Bench::new();
    let own = upstream(&["127.0.0.1:1"]);
    let good = json!({"plugins": {"cors": {}}, "upstream": own});
    let mut bad = good.clone();
    bad["no_such_field"] = json!(1);
    let routes = [
        ("1", json!({"uri": "/1", "service_id": "s", "upstream": own})),
        ("2", json!({"uri": "/2", "service_id": "s", "plugins": {"mocking": {"response_example": "x"}}})),
    ];
    bench.put("services/s", good.clone());
    for (id, route) in &routes {
        bench.put(&format!("routes/{id}"), route.clone());
    }
    let set_aside = bench.put("services/s", bad);
    let missing = bench.delete("services/s");
    let mended = bench.put("services/s", good);
    for (id, _) in routes {
        assert!(
            target(&set_aside, id).refused.as_deref().is_some_and(|why| why.contains("services/s")),
            "{id}"
        );
        let missing = target(&missing, id);
        assert!(matches!(missing.destination, Destination::Nothing(Reason::ServiceNotFound)), "{id}");
        let mended = target(&mended, id);
        assert!(mended.refused.is_none() && mended.plan.is_some(), "{id}");
        cluster(&mended);
    }
}

#[test]
fn a_global_rule_that_is_set_aside_does_not_open_the_gateway() {
    let mut bench = Bench::new();
    let good = json!({"plugins": {"ip-restriction": {"whitelist": ["10.0.0.1"]}}});
    let bad = json!({"plugins": {"ip-restriction": {"whitelist": ["10.0.0.1"]}, "no-such-plugin": {}}});
    let none_before = bench.put("global_rules/g", bad.clone());
    assert!(none_before.refused.as_deref().is_some_and(|why| why.contains("global_rules/g")));
    let mended = bench.put("global_rules/g", good);
    assert!(mended.refused.is_none() && mended.global.is_some());
    let broken = bench.put("global_rules/g", bad.clone());
    assert!(broken.refused.is_none() && broken.global.is_some(), "the last good one runs on");
    let gone = bench.delete("global_rules/g");
    assert!(gone.refused.is_none() && gone.global.is_none());
    let again = bench.put("global_rules/g", bad);
    assert!(again.refused.is_some(), "what was removed is not the last good one");
}

#[test]
fn routes_with_the_same_inline_upstream_of_one_address_share_it() {
    let mut bench = Bench::new();
    bench.put("routes/1", json!({"uri": "/a", "upstream": upstream(&["127.0.0.1:1"])}));
    bench.put("routes/2", json!({"uri": "/b", "upstream": upstream(&["127.0.0.1:1"])}));
    bench.put("routes/3", json!({"uri": "/c", "upstream": upstream(&["127.0.0.1:1", "127.0.0.1:2"])}));
    let snapshot =
        bench.put("routes/4", json!({"uri": "/d", "upstream": upstream(&["127.0.0.1:1", "127.0.0.1:2"])}));
    let of = |id| cluster(&target(&snapshot, id));
    assert!(Arc::ptr_eq(&of("1"), &of("2")));
    assert!(!Arc::ptr_eq(&of("3"), &of("4")), "a balance belongs to one route");
    let moved = bench.put("routes/1", json!({"uri": "/a", "upstream": upstream(&["127.0.0.1:9"])}));
    assert_eq!(cluster(&target(&moved, "1")).endpoints().first().unwrap().address.port(), 9);
    assert_eq!(cluster(&target(&moved, "2")).endpoints().first().unwrap().address.port(), 1);
}

#[test]
fn metadata_reaches_every_plugin_that_reads_it() {
    let mut bench = Bench::new();
    let limit = json!({"count": 1, "time_window": 60});
    let workflow = json!({"workflow": {"rules": [{"actions": [["limit-count", limit]]}]}});
    for (id, plugins) in
        [("own", json!({"limit-count": limit})), ("read", workflow), ("other", json!({"cors": {}}))]
    {
        bench.put(
            &format!("routes/{id}"),
            json!({"uri": "/a", "plugins": plugins, "upstream": upstream(&["127.0.0.1:1"])}),
        );
    }
    let plans = |snapshot: &Snapshot| ["own", "read", "other"].map(|id| target(snapshot, id));
    let before = plans(&bench.put("plugin_metadata/limit-count", json!({"limit_header": "X-A"})));
    let after = plans(&bench.put("plugin_metadata/limit-count", json!({"limit_header": "X-B"})));
    let same: Vec<_> = before.iter().zip(&after).map(|(before, after)| Arc::ptr_eq(before, after)).collect();
    assert_eq!(same, [false, false, true]);
}

#[test]
fn a_disabled_route_is_not_in_the_table() {
    let mut bench = Bench::new();
    bench.put("routes/1", json!({"uri": "/a", "upstream": upstream(&["127.0.0.1:1"])}));
    let snapshot =
        bench.put("routes/1", json!({"uri": "/a", "status": 0, "upstream": upstream(&["127.0.0.1:1"])}));
    assert!(snapshot.routes.is_empty());
}

#[test]
fn a_consumer_is_found_by_its_key_and_forgotten_with_it() {
    let mut bench = Bench::new();
    bench.put("consumers/jack", json!({"username": "jack", "plugins": {"key-auth": {"key": "k1"}}}));
    let consumers = bench.compiler.env.consumers.clone();
    assert_eq!(&*consumers.find("key-auth", "k1").unwrap().name, "jack");
    bench.put("consumers/jack/credentials/c", json!({"plugins": {"key-auth": {"key": "k2"}}}));
    assert_eq!(consumers.find("key-auth", "k2").unwrap().credential_id.as_deref(), Some("c"));
    bench.delete("consumers/jack");
    assert!(consumers.find("key-auth", "k1").is_none());
}

#[test]
fn a_plugin_that_is_placed_in_the_other_role_takes_part_in_no_phase() {
    let mut bench = Bench::new();
    let plugins = |placement: &str| json!({"limit-count": {"count": 1, "time_window": 1, "_meta": {"placement": placement}}});
    for (placement, phases) in [("sidecar", 0), ("edge", 1), ("both", 1)] {
        let snapshot = bench.put("routes/1", json!({"uri": "/", "plugins": plugins(placement)}));
        let plan = target(&snapshot, "1").plan.clone().unwrap();
        let instance = &plan.instances()[0];
        assert_eq!(usize::from(!instance.hooks.phases().is_empty()), phases, "{placement}");
    }
}

#[test]
fn a_sidecar_refuses_plugins_that_need_what_it_has_not() {
    let bench = Bench::new();
    let _context = bench.runtime.enter();
    let key = ResourceKey::from_path("services/orders").unwrap();
    let upstreams = UpstreamsOf {
        owner: &key,
        clusters: &bench.compiler.clusters,
        graph: &bench.graph,
        env: &bench.compiler.env.clusters,
        used: RefCell::default(),
    };
    let build = |role: Role, plugins: Value| {
        let plugins: Plugins =
            plugins.as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let built = Assembly { role, ..bench.compiler.assembly() }.build(&key, &plugins, &upstreams);
        built.map(|built| built.len()).map_err(|errors| errors[0].to_string())
    };
    let error = build(Role::Sidecar, json!({"key-auth": {}})).unwrap_err();
    assert!(error.starts_with("/plugins/key-auth: ") && error.contains("no consumers"), "{error}");
    assert_eq!(build(Role::Edge, json!({"key-auth": {}})), Ok(1));
    assert_eq!(build(Role::Sidecar, json!({"key-auth": {"_meta": {"placement": "edge"}}})), Ok(1));
    assert_eq!(build(Role::Sidecar, json!({"cors": {}, "request-id": {}})), Ok(2));
}
