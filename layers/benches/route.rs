//! Look-ups and changes of the route table, and path normalizing, with allocation counts.
//!
//! `cargo bench -p layers --bench route`. A look-up must not allocate and must cost about the same among 10 and
//! among 100,000 routes; `max alloc` of `build` is the memory of the finished table.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};

use config::{Expr, Var, Vars};
use divan::{AllocProfiler, Bencher, black_box};
use layers::http::normalize::{Options, normalize};
use layers::route::{Entry, HostPattern, MethodSet, Mode, Request, Table};
use serde_json::json;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 3] = [10, 1_000, 100_000];

fn main() {
    // Built before the first measurement, so that no sample pays for it.
    for tables in [&PLAIN, &PARAMETERS, &HOSTS] {
        LazyLock::force(tables);
    }
    divan::main();
}

fn entry(number: usize) -> Entry<usize> {
    Entry {
        id: number.to_string().into(),
        hosts: Vec::new(),
        uris: vec![format!("/api/v1/service-{number:05}/x")],
        methods: None,
        remote_addrs: None,
        vars: None,
        priority: 0,
        order: number as u64,
        value: Arc::clone(&VALUE),
    }
}

/// Shared, so that only the table is counted.
static VALUE: LazyLock<Arc<usize>> = LazyLock::new(Arc::default);

fn table(mode: Mode, size: usize, entry: impl Fn(usize) -> Entry<usize>) -> Table<usize> {
    let mut table = Table::new(mode);
    for number in 0..size {
        table.insert(entry(number));
    }
    table
}

type Tables = LazyLock<Vec<Table<usize>>>;

static PLAIN: Tables = LazyLock::new(|| SIZES.map(|size| table(Mode::HostUri, size, entry)).into());

static PARAMETERS: Tables = LazyLock::new(|| {
    let with_parameters = |number| Entry {
        uris: vec![format!("/api/v1/service-{number:05}/:user/item/:item")],
        ..entry(number)
    };
    SIZES.map(|size| table(Mode::UriWithParameter, size, with_parameters)).into()
});

static HOSTS: Tables = LazyLock::new(|| {
    let with_host = |number| Entry {
        hosts: vec![HostPattern::new(&format!("*.tenant-{number:05}.example.com"))],
        uris: vec!["/api/*".to_owned()],
        ..entry(number)
    };
    SIZES.map(|size| table(Mode::HostUri, size, with_host)).into()
});

fn of_size(tables: &'static Tables, size: usize) -> &'static Table<usize> {
    tables.iter().find(|table| table.len() == size).unwrap_or_else(|| unreachable!("one of SIZES"))
}

/// A request with one header.
struct Header(&'static str);

impl Vars for Header {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        match var {
            Var::Http(name) if name.as_str() == "x-version" => Some(Cow::Borrowed(self.0)),
            _ => None,
        }
    }
}

fn request(path: &'static str) -> Request<'static> {
    Request {
        host: "www.tenant-00007.example.com",
        port: Some(9080),
        path: path.as_bytes(),
        method: MethodSet::named("GET"),
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        vars: &Header("777"),
    }
}

fn measure(bencher: Bencher<'_, '_>, table: &Table<usize>, request: Request<'static>, is_hit: bool) {
    assert_eq!(table.find(&request).is_some(), is_hit);
    bencher.bench_local(|| table.find(black_box(&request)).map(|found| Arc::as_ptr(found.value)));
}

#[divan::bench(args = SIZES)]
fn find_hit(bencher: Bencher<'_, '_>, size: usize) {
    measure(bencher, of_size(&PLAIN, size), request("/api/v1/service-00007/x"), true);
}

#[divan::bench(args = SIZES)]
fn find_miss(bencher: Bencher<'_, '_>, size: usize) {
    measure(bencher, of_size(&PLAIN, size), request("/api/v1/service-00007/y"), false);
}

#[divan::bench(args = SIZES)]
fn find_parameters(bencher: Bencher<'_, '_>, size: usize) {
    let table = of_size(&PARAMETERS, size);
    let request = request("/api/v1/service-00007/jack/item/12");
    bencher.bench_local(|| table.find(black_box(&request)).map(|found| found.params(request.path)));
}

#[divan::bench(args = SIZES)]
fn find_host_wildcard(bencher: Bencher<'_, '_>, size: usize) {
    measure(bencher, of_size(&HOSTS, size), request("/api/v1/users"), true);
}

/// Every request another route, so that caches are as cold as with real traffic.
#[divan::bench(args = SIZES, sample_size = 1_000)]
fn find_scattered(bencher: Bencher<'_, '_>, size: usize) {
    let table = of_size(&PLAIN, size);
    let mut next = 0_usize;
    let paths: Vec<String> = (0..size).map(|number| format!("/api/v1/service-{number:05}/x")).collect();
    let request = request("");
    bencher.bench_local(|| {
        next = (next + 7_919) % size;
        let path = paths.get(next).map(String::as_bytes).unwrap_or_default();
        table.find(black_box(&Request { path, ..request })).map(|found| Arc::as_ptr(found.value))
    });
}

#[divan::bench(args = [100, 1_000, 10_000])]
fn find_among_many_at_one_uri_by_header(bencher: Bencher<'_, '_>, size: usize) {
    let table = table(Mode::HostUri, size, |number| Entry {
        uris: vec!["/one".to_owned()],
        vars: Expr::parse(&json!([["http_x_version", "==", (number + 700).to_string()]])).ok(),
        ..entry(number)
    });
    measure(bencher, &table, request("/one"), true);
}

/// What no index helps with: each route has to be tried.
#[divan::bench(args = [100, 1_000])]
fn find_among_many_at_one_uri_by_pattern(bencher: Bencher<'_, '_>, size: usize) {
    let table = table(Mode::HostUri, size, |number| Entry {
        uris: vec!["/one".to_owned()],
        vars: Expr::parse(&json!([["http_x_version", "~=", "777"]])).ok(),
        ..entry(number)
    });
    measure(bencher, &table, request("/one"), false);
}

/// One route more, while workers hold the version before; the drop of the version made is in it.
#[divan::bench(args = SIZES)]
fn insert_one(bencher: Bencher<'_, '_>, size: usize) {
    let table = of_size(&PLAIN, size);
    bencher.with_inputs(|| Entry { id: "new".into(), ..entry(size / 2 + 1) }).bench_local_values(|entry| {
        let mut next = table.clone();
        next.insert(entry);
        next.len()
    });
}

#[divan::bench(args = SIZES)]
fn remove_one(bencher: Bencher<'_, '_>, size: usize) {
    let table = of_size(&PLAIN, size);
    bencher.bench_local(|| {
        let mut next = table.clone();
        next.remove("7");
        next.len()
    });
}

#[divan::bench(args = [10_000, 100_000], sample_count = 5, sample_size = 1)]
fn build(bencher: Bencher<'_, '_>, size: usize) {
    bencher.bench_local(|| table(Mode::HostUri, size, entry));
}

#[divan::bench(args = [100_000], sample_count = 5, sample_size = 1)]
fn build_hosts(bencher: Bencher<'_, '_>, size: usize) {
    bencher.bench_local(|| {
        table(Mode::HostUri, size, |number| Entry {
            hosts: vec![HostPattern::new(&format!("tenant-{number:05}.example.com"))],
            uris: vec!["/api/*".to_owned()],
            ..entry(number)
        })
    });
}

#[divan::bench(args = ["/api/v1/users/12345/orders", "/a%20b/%E4%B8%AD/c", "/a//b/../c%2Fd"])]
fn normalize_path(bencher: Bencher<'_, '_>, path: &str) {
    bencher.bench_local(|| normalize(black_box(path.as_bytes()), Options::default()).is_ok());
}
