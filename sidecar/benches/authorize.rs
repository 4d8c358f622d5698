//! What a decision costs, by the number of rules.
//!
//! `cargo bench -p sidecar --bench authorize`. A decision must not allocate, and rules for single identities must not cost
//! those whom they are not about.

#![allow(clippy::unwrap_used, reason = "a bench")]

use std::borrow::Cow;
use std::hint::black_box;

use config::mesh::Policies;
use config::var::{Var, Vars};
use divan::{AllocProfiler, Bencher};
use serde_json::{Value, json};
use sidecar::matcher::{Asked, Caller, Matcher, What};

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 3] = [10, 100, 1000];

fn main() {
    divan::main();
}

struct NoVars;

impl Vars for NoVars {
    fn get<'a>(&'a self, _: &Var) -> Option<Cow<'a, str>> {
        None
    }
}

fn identity(n: usize) -> String {
    format!("spiffe://mesh.local/ns/n{}/sa/caller-{n}", n % 10)
}

fn matcher(count: usize, rule: impl Fn(usize) -> Value) -> Matcher {
    let rules: Vec<Value> = (0..count).map(rule).collect();
    let policies =
        json!({"default": "deny", "authorization": [{"name": "p", "action": "allow", "rules": rules}]});
    Matcher::new(&config::typed::parse::<Policies>(&policies).unwrap(), &["orders"])
}

fn decide(bencher: Bencher<'_, '_>, matcher: &Matcher, who: &str) {
    let asked = Asked { method: "GET", path: "/orders/17", host: "orders", vars: Some(&NoVars) };
    bencher.bench_local(|| {
        let caller = Caller::new(Some(black_box(who)), [10, 0, 0, 1].into(), 8080);
        matcher.decide(&caller, &What::Request(asked))
    });
}

/// Each rule is for one identity and one path; the caller's is the last.
#[divan::bench(args = SIZES)]
fn single_identities(bencher: Bencher<'_, '_>, count: usize) {
    let rule = |n| json!({"from": [{"identities": [identity(n)]}], "to": [{"paths": ["/orders/*"]}]});
    decide(bencher, &matcher(count, rule), &identity(count - 1));
}

/// Each rule is for a namespace and a path; all are looked at, and the last matches.
#[divan::bench(args = SIZES)]
fn namespaces_and_paths(bencher: Bencher<'_, '_>, count: usize) {
    let rule = |n: usize| {
        let path = if n + 1 == count { "/orders/*".to_owned() } else { format!("/service-{n}/*") };
        json!({"from": [{"namespaces": [format!("n{}", (count - 1) % 10)]}], "to": [{"paths": [path]}]})
    };
    decide(bencher, &matcher(count, rule), &identity(count - 1));
}

/// Each rule is for a beginning of identities and for none of them.
#[divan::bench(args = SIZES)]
fn beginnings_that_do_not_fit(bencher: Bencher<'_, '_>, count: usize) {
    let rule = |n| json!({"from": [{"identities": [format!("spiffe://mesh.local/ns/other-{n}/*")]}]});
    decide(bencher, &matcher(count, rule), &identity(3));
}
