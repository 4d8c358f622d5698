//! Router semantics as a table, and the table of routes against a naive matcher.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::borrow::Cow;
use std::collections::BTreeMap;

use config::{Expr, Var};
use serde_json::{Value, json};

use super::*;

fn route(id: &str) -> Entry<String> {
    Entry {
        id: id.into(),
        hosts: Vec::new(),
        uris: Vec::new(),
        methods: None,
        remote_addrs: None,
        vars: None,
        priority: 0,
        order: 0,
        value: Arc::new(id.to_owned()),
    }
}

impl Entry<String> {
    fn uri(mut self, uri: &str) -> Self {
        self.uris.push(uri.to_owned());
        self
    }

    fn host(mut self, host: &str) -> Self {
        self.hosts.push(HostPattern::new(host));
        self
    }

    fn methods(mut self, names: &[&str]) -> Self {
        self.methods = Some(names.iter().copied().collect());
        self
    }

    fn from(mut self, networks: &[&str]) -> Self {
        self.remote_addrs = Some(networks.iter().map(|text| text.parse::<ipnet::IpNet>().unwrap()).collect());
        self
    }

    fn vars(mut self, vars: Value) -> Self {
        self.vars = Some(Expr::parse(&vars).unwrap());
        self
    }

    fn priority(mut self, priority: i64) -> Self {
        self.priority = priority;
        self
    }

    fn order(mut self, order: u64) -> Self {
        self.order = order;
        self
    }
}

/// A request that owns what [`Request`] borrows.
#[derive(Clone, Debug)]
struct Call {
    method: &'static str,
    host: &'static str,
    port: Option<u16>,
    path: String,
    peer: &'static str,
    vars: BTreeMap<&'static str, &'static str>,
}

fn get(path: &str) -> Call {
    Call {
        method: "GET",
        host: "foo.com",
        port: None,
        path: path.to_owned(),
        peer: "127.0.0.1",
        vars: BTreeMap::new(),
    }
}

impl Call {
    fn method(mut self, method: &'static str) -> Self {
        self.method = method;
        self
    }

    fn host(mut self, host: &'static str) -> Self {
        self.host = host;
        self
    }

    fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    fn peer(mut self, peer: &'static str) -> Self {
        self.peer = peer;
        self
    }

    fn var(mut self, name: &'static str, value: &'static str) -> Self {
        self.vars.insert(name, value);
        self
    }

    fn request(&self) -> Request<'_> {
        Request {
            host: self.host,
            port: self.port,
            path: self.path.as_bytes(),
            method: MethodSet::named(self.method),
            peer: self.peer.parse().unwrap(),
            vars: self,
        }
    }
}

impl Vars for Call {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        self.vars.get(&*var.to_string()).map(|value| Cow::Borrowed(*value))
    }
}

fn table(mode: Mode, routes: impl IntoIterator<Item = Entry<String>>) -> Table<String> {
    let mut table = Table::new(mode);
    for route in routes {
        table.insert(route);
    }
    table
}

const ALL: &[Mode] = &[Mode::Uri, Mode::HostUri, Mode::UriWithParameter];
const URI: &[Mode] = &[Mode::Uri, Mode::UriWithParameter];
const HOST: &[Mode] = &[Mode::HostUri];
const PARAMETER: &[Mode] = &[Mode::UriWithParameter];

struct Case {
    about: &'static str,
    modes: &'static [Mode],
    routes: Vec<Entry<String>>,
    calls: Vec<(Call, Option<&'static str>)>,
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            about: "an exact URI matches itself alone",
            modes: ALL,
            routes: vec![route("a").uri("/a")],
            calls: vec![
                (get("/a"), Some("a")),
                (get("/a/"), None),
                (get("/a/b"), None),
                (get("/"), None),
                (get("/A"), None),
            ],
        },
        Case {
            about: "a star matches everything that begins so, itself included",
            modes: ALL,
            routes: vec![route("a").uri("/a*")],
            calls: vec![
                (get("/a"), Some("a")),
                (get("/ab"), Some("a")),
                (get("/a/b/c"), Some("a")),
                (get("/b"), None),
            ],
        },
        Case {
            about: "behind a slash, a star needs the slash",
            modes: ALL,
            routes: vec![route("a").uri("/a/*")],
            calls: vec![(get("/a/"), Some("a")), (get("/a/b"), Some("a")), (get("/a"), None)],
        },
        Case {
            about: "exact beats prefix, whatever the priorities",
            modes: ALL,
            routes: vec![
                route("prefix").uri("/a*").priority(100),
                route("exact").uri("/a"),
                route("root").uri("/*").priority(1000),
            ],
            calls: vec![(get("/a"), Some("exact")), (get("/ab"), Some("prefix")), (get("/b"), Some("root"))],
        },
        Case {
            about: "a longer prefix beats a shorter one, whatever the priorities",
            modes: ALL,
            routes: vec![route("short").uri("/a/*").priority(100), route("long").uri("/a/b/*")],
            calls: vec![(get("/a/b/c"), Some("long")), (get("/a/c"), Some("short"))],
        },
        Case {
            about: "at one URI the higher priority wins; 0 is the default and negative ones are lower",
            modes: ALL,
            routes: vec![
                route("default").uri("/a").order(1),
                route("high").uri("/a").priority(1).order(2),
                route("low").uri("/b").priority(-1).order(3),
                route("middle").uri("/b").order(4),
            ],
            calls: vec![(get("/a"), Some("high")), (get("/b"), Some("middle"))],
        },
        Case {
            about: "with equal priority the one configured first wins",
            modes: ALL,
            routes: vec![
                route("second").uri("/a").uri("/b*").order(2),
                route("first").uri("/a").uri("/b*").order(1),
            ],
            calls: vec![(get("/a"), Some("first")), (get("/b/c"), Some("first"))],
        },
        Case {
            about: "a route whose predicates fail gives way to the next at its URI",
            modes: ALL,
            routes: vec![
                route("post").uri("/a").methods(&["POST", "PURGE"]).priority(9),
                route("get").uri("/a").methods(&["GET"]),
            ],
            calls: vec![
                (get("/a"), Some("get")),
                (get("/a").method("POST"), Some("post")),
                (get("/a").method("PURGE"), Some("post")),
                (get("/a").method("PUT"), None),
                (get("/a").method("BREW"), None),
            ],
        },
        Case {
            about: "and to a shorter prefix, from an exact URI too",
            modes: ALL,
            routes: vec![
                route("exact").uri("/a/b/c").methods(&["POST"]),
                route("long").uri("/a/b/*").from(&["10.0.0.0/8"]),
                route("short").uri("/a/*").vars(json!([["arg_v", "==", "1"]])),
                route("root").uri("/*"),
            ],
            calls: vec![
                (get("/a/b/c").method("POST"), Some("exact")),
                (get("/a/b/c").peer("10.1.2.3"), Some("long")),
                (get("/a/b/c").var("arg_v", "1"), Some("short")),
                (get("/a/b/c").var("arg_v", "2"), Some("root")),
            ],
        },
        Case {
            about: "without methods a route takes every method, also ones nobody knows",
            modes: ALL,
            routes: vec![route("a").uri("/a"), route("none").uri("/b").methods(&[])],
            calls: vec![
                (get("/a").method("TRACE"), Some("a")),
                (get("/a").method("CONNECT"), Some("a")),
                (get("/a").method("BREW"), Some("a")),
                (get("/b").method("GET"), Some("none")),
            ],
        },
        Case {
            about: "client addresses and networks, IPv4 in IPv6 included",
            modes: ALL,
            routes: vec![route("a").uri("/a").from(&["127.0.0.1/32", "192.168.0.0/16", "fd00::/8"])],
            calls: vec![
                (get("/a"), Some("a")),
                (get("/a").peer("127.0.0.2"), None),
                (get("/a").peer("192.168.7.7"), Some("a")),
                (get("/a").peer("::ffff:192.168.7.7"), Some("a")),
                (get("/a").peer("fd00::1"), Some("a")),
                (get("/a").peer("::1"), None),
            ],
        },
        Case {
            about: "vars: every comparison must hold, and OR takes one",
            modes: ALL,
            routes: vec![
                route("both")
                    .uri("/a")
                    .priority(2)
                    .vars(json!([["arg_x", "==", "1"], ["http_user", "~~", "^j"]])),
                route("either").uri("/a").priority(1).vars(json!([
                    "OR",
                    ["arg_x", "==", "1"],
                    ["cookie_c", "in", ["u", "v"]]
                ])),
            ],
            calls: vec![
                (get("/a").var("arg_x", "1").var("http_user", "jack"), Some("both")),
                (get("/a").var("arg_x", "1").var("http_user", "rose"), Some("either")),
                (get("/a").var("cookie_c", "v"), Some("either")),
                (get("/a"), None),
            ],
        },
        Case {
            about: "one route at several URIs",
            modes: ALL,
            routes: vec![route("a").uri("/a").uri("/b/*").uri("/a")],
            calls: vec![(get("/a"), Some("a")), (get("/b/c"), Some("a")), (get("/c"), None)],
        },
        Case {
            about: "bytes that are not ASCII are bytes like others",
            modes: ALL,
            routes: vec![route("a").uri("/\u{4e2d}\u{6587}/*")],
            calls: vec![(get("/\u{4e2d}\u{6587}/x"), Some("a")), (get("/\u{4e2d}/x"), None)],
        },
        Case {
            about: "host: exact, without regard to case and trailing dot",
            modes: ALL,
            routes: vec![route("a").uri("/a").host("Foo.com").host("bar.com")],
            calls: vec![
                (get("/a").host("foo.COM"), Some("a")),
                (get("/a").host("foo.com."), Some("a")),
                (get("/a").host("bar.com").port(9080), Some("a")),
                (get("/a").host("www.foo.com"), None),
                (get("/a").host(""), None),
            ],
        },
        Case {
            about: "host: a wildcard takes one label or more, but not none",
            modes: ALL,
            routes: vec![route("a").uri("/a*").host("*.foo.com")],
            calls: vec![
                (get("/a/b").host("www.foo.com"), Some("a")),
                (get("/a/b").host("www.bar.foo.com"), Some("a")),
                (get("/a/b").host("foo.com"), None),
                (get("/a/b").host("barfoo.com"), None),
            ],
        },
        Case {
            about: "host: a pattern with a port wants that port",
            modes: ALL,
            routes: vec![route("port").uri("/a").host("foo.com:9443").priority(1), route("any").uri("/a")],
            calls: vec![
                (get("/a").port(9443), Some("port")),
                (get("/a").port(9080), Some("any")),
                (get("/a"), Some("any")),
            ],
        },
        Case {
            about: "URI first: the longer URI wins over the better host",
            modes: URI,
            routes: vec![
                route("host").uri("/a/*").host("foo.com"),
                route("uri").uri("/a/b/*"),
                route("other").uri("/a/b/c/*").host("bar.com"),
            ],
            calls: vec![
                (get("/a/b/c/d"), Some("uri")),
                (get("/a/c"), Some("host")),
                (get("/a/c").host("bar.com"), None),
            ],
        },
        Case {
            about: "host first: the more specific host wins, and only then the URI counts",
            modes: HOST,
            routes: vec![
                route("exact").uri("/*").host("api.foo.com"),
                route("one label").uri("/a/*").host("*.foo.com"),
                route("wide").uri("/a/b/*").host("*.com").priority(100),
                route("none").uri("/a/b/c").priority(1000),
            ],
            calls: vec![
                (get("/a/b/c").host("api.foo.com"), Some("exact")),
                (get("/a/b/c").host("www.foo.com"), Some("one label")),
                (get("/a/b/c").host("foo.com"), Some("wide")),
                (get("/a/b/c").host("foo.org"), Some("none")),
            ],
        },
        Case {
            about: "host first: when no route of a host fits, the next host is tried, at last routes without one",
            modes: HOST,
            routes: vec![
                route("exact").uri("/only").host("api.foo.com"),
                route("wild").uri("/wild").host("*.foo.com").methods(&["POST"]),
                route("all").uri("/wild").host("*").methods(&["PUT"]),
                route("none").uri("/*"),
            ],
            calls: vec![
                (get("/only").host("api.foo.com"), Some("exact")),
                (get("/wild").host("api.foo.com").method("POST"), Some("wild")),
                (get("/wild").host("api.foo.com").method("PUT"), Some("all")),
                (get("/wild").host("api.foo.com"), Some("none")),
            ],
        },
        Case {
            about: "host first: of one route's hosts each leads to it",
            modes: HOST,
            routes: vec![
                route("a").uri("/a").host("*.foo.com").host("bar.com").host("BAR.com"),
                route("b").uri("/a").host("www.foo.com"),
            ],
            calls: vec![
                (get("/a").host("x.foo.com"), Some("a")),
                (get("/a").host("bar.com"), Some("a")),
                (get("/a").host("www.foo.com"), Some("b")),
            ],
        },
        Case {
            about: "parameters: segments that are not empty, and the rest",
            modes: PARAMETER,
            routes: vec![
                route("name").uri("/name/:name/foo"),
                route("rest").uri("/files/*path"),
                route("exact").uri("/name/json/foo"),
            ],
            calls: vec![
                (get("/name/xml/foo"), Some("name")),
                (get("/name/json/foo"), Some("exact")),
                (get("/name//foo"), None),
                (get("/name/a/b/foo"), None),
                (get("/name/xml"), None),
                (get("/files/a/b"), Some("rest")),
                (get("/files/"), Some("rest")),
            ],
        },
        Case {
            about: "parameters: the longer pattern first, whatever was configured first",
            modes: PARAMETER,
            routes: vec![
                route("short").uri("/api/:version/test/*subpath").order(1),
                route("medium").uri("/api/:version/test/api/projects/:project").order(2),
                route("long").uri("/api/:version/test/api/projects/:project/nodes/?").order(3),
            ],
            calls: vec![
                (get("/api/v4/test/api/projects/saas/nodes/"), Some("long")),
                (get("/api/v4/test/api/projects/saas/nodes"), Some("long")),
                (get("/api/v4/test/api/projects/saas"), Some("medium")),
                (get("/api/v4/test/api"), Some("short")),
            ],
        },
        Case {
            about: "parameters: priority before length, and the static front before both",
            modes: PARAMETER,
            routes: vec![
                route("rest").uri("/u/*").priority(1),
                route("id").uri("/u/:id/name"),
                route("front").uri("/u/me/*"),
            ],
            calls: vec![(get("/u/1/name"), Some("rest")), (get("/u/me/name"), Some("front"))],
        },
        Case {
            about: "without the parameter mode a colon is a colon, and a star in the middle still captures",
            modes: &[Mode::Uri, Mode::HostUri],
            routes: vec![route("colon").uri("/name/:name"), route("star").uri("/a/*/z")],
            calls: vec![
                (get("/name/:name"), Some("colon")),
                (get("/name/json"), None),
                (get("/a/b/c/z"), Some("star")),
                (get("/a/b/c"), None),
            ],
        },
    ]
}

#[test]
fn router_semantics() {
    for case in cases() {
        for &mode in case.modes {
            let forward = table(mode, case.routes.clone());
            let backward = table(mode, case.routes.iter().rev().cloned());
            for (call, expected) in &case.calls {
                for table in [&forward, &backward] {
                    let found = table.find(&call.request()).map(|found| &**found.id);
                    assert_eq!(found, *expected, "{}: {mode:?} {call:?}", case.about);
                    let tried = table.explain(&call.request());
                    let taken = tried.last().filter(|last| last.verdict == Verdict::Matched);
                    assert_eq!(taken.map(|last| &*last.id), *expected, "{}: {tried:?}", case.about);
                }
            }
        }
    }
}

#[test]
fn a_match_tells_pattern_host_and_parameters() {
    let routes = [
        route("param").uri("/v1/:id/list/*rest").host("*.Foo.com"),
        route("plain").uri("/plain").host("foo.com"),
    ];
    let by_uri = table(Mode::UriWithParameter, routes.clone());
    let call = get("/v1/7/list/a/b").host("www.foo.com");
    let found = by_uri.find(&call.request()).unwrap();
    assert_eq!(&**found.uri(), "/v1/:id/list/*rest");
    assert_eq!(found.host.map(|host| &**host), Some("*.Foo.com"));
    assert_eq!(found.value.as_str(), "param");
    let params = found.params(call.path.as_bytes());
    let params: Vec<_> = params.iter(call.path.as_bytes()).collect();
    assert_eq!(params, [("id", &b"7"[..]), ("rest", &b"a/b"[..])]);

    let by_host = table(Mode::HostUri, routes);
    let call = get("/plain");
    let found = by_host.find(&call.request()).unwrap();
    assert_eq!(found.host.map(|host| &**host), Some("foo.com"));
    assert!(found.params(call.path.as_bytes()).is_empty());
}

#[test]
fn explain_names_each_route_tried_and_why_it_was_not_taken() {
    let routes = [
        route("exact").uri("/v1/7").host("www.foo.com").methods(&["POST"]),
        route("param").uri("/v1/:id/x").host("*.foo.com"),
        route("addr").uri("/v1/*").host("*.foo.com").from(&["10.0.0.0/8"]).priority(-1),
        route("vars").uri("/*").host("*.foo.com").vars(json!([["arg_a", "==", "1"]])),
        route("taken").uri("/*").priority(-5),
        route("never").uri("/*").priority(-6),
    ];
    let call = get("/v1/7").host("www.foo.com").var("arg_a", "2");
    let tell = |mode, call: &Call| -> Vec<String> {
        let tried = table(mode, routes.clone()).explain(&call.request());
        tried
            .into_iter()
            .map(|candidate| match candidate.verdict {
                Verdict::Matched => format!("{}: matched", candidate.id),
                Verdict::Failed { predicate, detail } => format!("{}: {predicate}: {detail}", candidate.id),
            })
            .collect()
    };
    assert_eq!(
        tell(Mode::UriWithParameter, &call),
        [
            "exact: methods: GET is none of POST",
            "param: uri: \"/v1/7\" does not fit /v1/:id/x",
            "addr: remote_addr: 127.0.0.1 is outside the allowed addresses",
            "vars: vars: [\"arg_a\",\"==\",\"1\"] does not hold: arg_a is \"2\"",
            "taken: matched",
        ]
    );
    assert_eq!(
        tell(Mode::UriWithParameter, &call.clone().host("bar.com").port(80).method("POST").peer("10.0.0.1")),
        [
            "exact: host: \"bar.com:80\" is none of www.foo.com",
            "param: uri: \"/v1/7\" does not fit /v1/:id/x",
            "addr: host: \"bar.com:80\" is none of *.foo.com",
            "vars: host: \"bar.com:80\" is none of *.foo.com",
            "taken: matched",
        ]
    );
    // Host first: what hangs at other hosts is not tried at all.
    assert_eq!(tell(Mode::HostUri, &call.host("bar.com")), ["taken: matched"]);
}

#[test]
fn replacing_and_removing_leave_no_trace() {
    for &mode in ALL {
        let mut table = Table::new(mode);
        assert!(table.insert(route("1").uri("/a").host("foo.com")).is_none());
        let old = table.insert(route("1").uri("/b/*").host("*.foo.com"));
        assert_eq!(old.as_deref().map(String::as_str), Some("1"));
        assert_eq!(table.len(), 1);
        assert!(table.find(&get("/a").request()).is_none());
        assert!(table.find(&get("/b/c").host("x.foo.com").request()).is_some());
        assert!(table.remove("2").is_none());
        assert!(table.remove("1").is_some());
        assert!(table.is_empty());
        assert!(table.find(&get("/b/c").host("x.foo.com").request()).is_none());
        assert_eq!(table.iter().count(), 0);
    }
}

#[test]
fn older_versions_answer_as_before() {
    let mut table = Table::new(Mode::HostUri);
    let mut versions = vec![table.clone()];
    for number in 0..100 {
        table.insert(route(&format!("r{number}")).uri(&format!("/v/{number}/*")).host("*.foo.com"));
        versions.push(table.clone());
    }
    for number in 0..100 {
        table.remove(&format!("r{number}"));
        versions.push(table.clone());
    }
    for (version, table) in versions.iter().enumerate() {
        let there = if version <= 100 { 0..version } else { version - 100..100 };
        assert_eq!(table.len(), there.len());
        for number in 0..100 {
            let call = get(&format!("/v/{number}/x")).host("a.foo.com");
            let found = table.find(&call.request()).map(|found| found.id.to_string());
            assert_eq!(found, there.contains(&number).then(|| format!("r{number}")), "version {version}");
        }
    }
}

#[test]
fn thousands_of_routes_at_one_uri_are_told_apart_without_trying_them() {
    /// Counts how often a variable is asked for.
    struct Counted<'a>(&'a Call, std::cell::Cell<usize>);
    impl Vars for Counted<'_> {
        fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
            self.1.set(self.1.get() + 1);
            self.0.get(var)
        }
    }

    let mut table = Table::new(Mode::HostUri);
    for number in 0..3000_u64 {
        let method = MethodSet::NAMES[number as usize % 3];
        let vars = match number % 2 {
            0 => json!([["arg_v", "==", number.to_string()], ["http_x", "~=", "no"]]),
            _ => json!([["http_v", "in", [number.to_string(), "shared"]]]),
        };
        table.insert(route(&number.to_string()).uri("/one").methods(&[method]).vars(vars).order(number));
    }
    let find = |call: &Call| {
        let counted = Counted(call, std::cell::Cell::new(0));
        let request = Request { vars: &counted, ..call.request() };
        (table.find(&request).map(|found| found.id.to_string()), counted.1.get())
    };
    // 2000 % 3 is PUT's place, 2001 % 3 is GET's.
    let (found, asked) = find(&get("/one").method("PUT").var("arg_v", "2000"));
    assert_eq!(found.as_deref(), Some("2000"));
    assert!(asked <= 4, "{asked} look-ups");
    let (found, _) = find(&get("/one").var("arg_v", "2000"));
    assert_eq!(found, None);
    let (found, asked) = find(&get("/one").var("http_v", "2001"));
    assert_eq!(found.as_deref(), Some("2001"));
    assert!(asked <= 4, "{asked} look-ups");
    // Of those that share a value the first in order: 3 is odd and has GET.
    let (found, _) = find(&get("/one").var("http_v", "shared"));
    assert_eq!(found.as_deref(), Some("3"));

    for number in (0..3000).rev() {
        assert!(table.remove(&number.to_string()).is_some());
        if number == 2000 {
            assert!(table.find(&get("/one").method("PUT").var("arg_v", "2000").request()).is_none());
            assert!(table.find(&get("/one").method("PUT").var("arg_v", "1994").request()).is_some());
        }
    }
    assert!(table.find(&get("/one").var("arg_v", "0").request()).is_none());
}

#[test]
fn a_table_may_be_read_by_every_worker() {
    fn shared<S: Send + Sync>() {}
    shared::<Table<String>>();
}

/// A matcher that is slow and written another way: it tries every route and takes the best.
mod naive {
    use super::*;

    /// How good a match is; the least is best.
    type Rank = (HostRank, UriRank, i64, std::cmp::Reverse<usize>, u64, String, usize);
    /// No port, no exact host, length of the name from the longest.
    type HostRank = (bool, bool, std::cmp::Reverse<usize>);
    /// Not exact, static front from the longest.
    type UriRank = (bool, std::cmp::Reverse<usize>);

    /// Names and values of parameters.
    type Captures = Vec<(String, Vec<u8>)>;

    #[derive(Clone)]
    pub(super) struct Pattern {
        regex: regex::bytes::Regex,
        front: usize,
        exact: bool,
        names: Vec<String>,
    }

    pub(super) fn pattern(uri: &str, mode: Mode) -> Pattern {
        let mut front = 0;
        let mut regex = String::new();
        let mut names: Vec<String> = Vec::new();
        let mut is_static = true;
        let segments: Vec<&str> = uri.split('/').collect();
        for (at, segment) in segments.iter().enumerate() {
            let slash = if at == 0 { "" } else { "/" };
            let parameter =
                segment.starts_with(':') && (mode == Mode::UriWithParameter || !is_static) && at > 0;
            if at + 1 == segments.len() && *segment == "?" && !names.is_empty() {
                regex.push_str("/?");
                continue;
            }
            regex.push_str(slash);
            if is_static {
                front += slash.len();
            }
            if parameter {
                is_static = false;
                names.push(segment[1..].to_owned());
                regex.push_str("([^/]+)");
            } else if let Some(name) = segment.strip_prefix('*').filter(|_| at > 0) {
                is_static = false;
                names.push(if name.is_empty() { ":ext" } else { name }.to_owned());
                regex.push_str("(.*)");
            } else if let Some(star) = segment.find('*') {
                regex.push_str(&regex::escape(&segment[..star]));
                if is_static {
                    front += star;
                }
                is_static = false;
                regex.push_str(".*");
                break;
            } else {
                regex.push_str(&regex::escape(segment));
                if is_static {
                    front += segment.len();
                }
            }
        }
        let regex = regex::bytes::Regex::new(&format!("(?s-u)^{regex}$")).unwrap();
        Pattern { regex, front, exact: is_static, names }
    }

    fn hosts(route: &Entry<String>, call: &Call, mode: Mode) -> Option<HostRank> {
        let worst = (true, true, std::cmp::Reverse(0));
        if route.hosts.is_empty() {
            return Some(worst);
        }
        let host = call.host.trim_end_matches('.').to_lowercase();
        let matched = route.hosts.iter().filter_map(|pattern| {
            let text = pattern.text().to_lowercase();
            let (name, port) = match text.rsplit_once(':') {
                Some((name, port)) => (name.to_owned(), Some(port.parse::<u16>().unwrap())),
                None => (text, None),
            };
            let fits = match name.strip_prefix('*') {
                Some(end) => host.ends_with(end),
                None => host == name,
            };
            let rank = (port.is_none(), name.starts_with('*'), std::cmp::Reverse(name.len()));
            (fits && (port.is_none() || port == call.port)).then_some(rank)
        });
        // A route without host is after one whose host is `*`.
        let best = matched.min()?;
        Some(if mode == Mode::HostUri { best } else { worst })
    }

    /// The routes of a table by id, with their URIs read.
    pub(super) type Model = BTreeMap<String, (Entry<String>, Vec<Pattern>)>;

    pub(super) fn find(routes: &Model, mode: Mode, call: &Call) -> Option<(String, Captures)> {
        let mut best: Option<(Rank, Captures)> = None;
        for (route, patterns) in routes.values() {
            let methods = route.methods.filter(|methods| !methods.is_empty());
            let fits = methods.is_none_or(|set| set.to_string().split(", ").any(|name| name == call.method))
                && route.vars.as_ref().is_none_or(|vars| vars.eval(call));
            let Some(host) = hosts(route, call, mode).filter(|_| fits) else { continue };
            for (at, (uri, pattern)) in route.uris.iter().zip(patterns).enumerate() {
                let Some(groups) = pattern.regex.captures(call.path.as_bytes()) else { continue };
                let rank = (
                    host,
                    (!pattern.exact, std::cmp::Reverse(pattern.front)),
                    -route.priority,
                    std::cmp::Reverse(uri.len()),
                    route.order,
                    route.id.to_string(),
                    at,
                );
                let params = pattern.names.iter().zip(groups.iter().skip(1));
                let params = params.map(|(name, group)| (name.clone(), group.unwrap().as_bytes().to_vec()));
                if best.as_ref().is_none_or(|(known, _)| rank < *known) {
                    best = Some((rank, params.collect()));
                }
            }
        }
        best.map(|(rank, params)| (rank.5, params))
    }
}

mod random {
    use proptest::prelude::*;
    use proptest::sample::{Index, select, subsequence};

    use super::*;

    fn uri() -> impl Strategy<Value = String> {
        let segment = select(vec!["a", "b", "ab", ":x", ":y", "*", "*r", "a*", "a:b", "v1.0"]);
        let end = select(vec!["", "", "/", "/?"]);
        (proptest::collection::vec(segment, 1..5), end)
            .prop_map(|(segments, end)| format!("/{}{end}", segments.join("/")))
    }

    fn path() -> impl Strategy<Value = String> {
        let segment = select(vec!["a", "b", "ab", "aab", "a:b", "v1.0", "v1x0", ":x", "?", ""]);
        proptest::collection::vec(segment, 1..6).prop_map(|segments| format!("/{}", segments.join("/")))
    }

    fn vars() -> impl Strategy<Value = Option<Value>> {
        let number = || (0..4_u8).prop_map(|number| number.to_string());
        let name = || select(vec!["arg_v", "http_v", "cookie_v", "post_arg_v"]);
        let comparison = prop_oneof![
            3 => (name(), number()).prop_map(|(name, value)| json!([name, "==", value])),
            1 => (name(), number(), number()).prop_map(|(name, one, two)| json!([name, "in", [one, two]])),
            1 => (name(), number()).prop_map(|(name, value)| json!([name, "!", "==", value])),
            1 => (name(), number()).prop_map(|(name, value)| json!([name, "~~", value])),
            1 => (name(), 0..4_u8).prop_map(|(name, value)| json!([name, "==", value])),
        ];
        let comparisons = proptest::collection::vec(comparison, 2..4);
        proptest::option::weighted(
            0.6,
            (select(vec!["", "AND", "OR", "!AND"]), comparisons).prop_map(|(form, mut items)| {
                if !form.is_empty() {
                    items.insert(0, json!(form));
                }
                Value::Array(items)
            }),
        )
    }

    fn entry(places: usize) -> impl Strategy<Value = Entry<String>> {
        let hosts = vec!["a.com", "b.a.com", "*.a.com", "*.com", "*", "A.com", "a.com:80", "*.a.com:80"];
        let uris = if places == 1 {
            Just(vec!["/a/*".to_owned()]).boxed()
        } else {
            proptest::collection::vec(uri(), 1..3).boxed()
        };
        (
            0..40_u8,
            prop_oneof![Just(Vec::new()), subsequence(hosts, 1..4)],
            uris,
            proptest::option::of(subsequence(vec!["GET", "POST", "PURGE"], 0..3)),
            vars(),
            -1..2_i64,
            0..3_u64,
        )
            .prop_map(move |(id, hosts, uris, methods, vars, priority, order)| {
                let mut entry = route(&format!("r{id}")).priority(priority).order(order);
                if places != 1 {
                    entry.hosts = hosts.into_iter().map(HostPattern::new).collect();
                }
                entry.uris = uris;
                entry.methods = methods.map(|names| names.into_iter().collect());
                entry.vars = vars.map(|vars| Expr::parse(&vars).unwrap());
                entry
            })
    }

    fn call(places: usize) -> impl Strategy<Value = Call> {
        let path = if places == 1 { Just("/a/b".to_owned()).boxed() } else { path().boxed() };
        let value = || proptest::option::of(select(vec!["0", "1", "2", "3"]));
        (
            select(vec!["GET", "POST", "PURGE", "BREW"]),
            select(vec!["a.com", "b.a.com", "c.b.a.com", "x.com", "B.A.com.", "org", ""]),
            select(vec![None, Some(80), Some(81)]),
            path,
            [value(), value(), value(), value()],
        )
            .prop_map(|(method, host, port, path, values)| {
                let names = ["arg_v", "http_v", "cookie_v", "post_arg_v"];
                let vars = names.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?)));
                Call { port, vars: vars.collect(), ..get(&path).method(method).host(host) }
            })
    }

    /// A route to insert, or which of those there are to remove.
    type Step = Result<Entry<String>, Index>;

    /// `places`: 1 crowds every route at one URI, more spreads them.
    fn agree(mode: Mode, places: usize) -> impl Strategy<Value = (Mode, Vec<Step>, Vec<Call>)> {
        let step = prop_oneof![4 => entry(places).prop_map(Ok), 1 => any::<Index>().prop_map(Err)];
        let steps = proptest::collection::vec(step, 1..80);
        (Just(mode), steps, proptest::collection::vec(call(places), 20))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn finds_what_a_naive_matcher_finds(
            (mode, steps, calls) in (select(ALL), select(vec![1_usize, 2]))
                .prop_flat_map(|(mode, places)| agree(mode, places)),
        ) {
            let mut table = Table::new(mode);
            let mut model = naive::Model::new();
            let mut versions = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Ok(entry) => {
                        let id = entry.id.to_string();
                        let patterns = entry.uris.iter().map(|uri| naive::pattern(uri, mode)).collect();
                        let old = table.insert(entry.clone());
                        prop_assert_eq!(old.is_some(), model.insert(id, (entry, patterns)).is_some());
                    }
                    Err(index) if !model.is_empty() => {
                        let id = model.keys().nth(index.index(model.len())).unwrap().clone();
                        prop_assert!(table.remove(&id).is_some());
                        model.remove(&id);
                    }
                    Err(_) => prop_assert!(table.is_empty()),
                }
                if number % 8 == 0 {
                    versions.push((table.clone(), model.clone()));
                }
            }
            versions.push((table, model));
            for (table, model) in &versions {
                prop_assert_eq!(table.len(), model.len());
                for call in &calls {
                    let request = call.request();
                    let found = table.find(&request).map(|found| {
                        let params = found.params(request.path);
                        let params = params.iter(request.path).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                        (found.id.to_string(), params)
                    });
                    prop_assert_eq!(&found, &naive::find(model, mode, call), "{:?}", call);
                    let tried = table.explain(&request);
                    let taken = tried.iter().find(|tried| tried.verdict == Verdict::Matched);
                    prop_assert_eq!(taken.map(|taken| taken.id.to_string()), found.map(|(id, _)| id));
                }
            }
        }
    }
}
