//! `postern endpoints`: what the gateway knows of the endpoints of its upstreams, and from whom.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::client;
use crate::output::{self, Colour, Format, line, painted};
use crate::runtime;

/// How long one question for a change may wait, in seconds.
const WAIT: u64 = 5;

/// Arguments of `postern endpoints`.
#[derive(Args)]
#[command(after_help = "Examples:\n  postern endpoints                      every upstream in a line\n  \
                        postern endpoints orders               every endpoint of the service `orders`, and why it is used or not\n  \
                        postern endpoints upstreams/7 -w       again whenever something changes\n  \
                        postern endpoints refresh orders       ask its registry now\n\n\
                        NAME is the name of a service in its registry, the id of an upstream, the object that holds one \
                        (routes/7), or a host.\n\
                        Verdicts: used, kept (used though its registry does not list it now), standby (others are preferred), \
                        unhealthy,\nbreaker_open, unused (weight 0), draining, gone (requests are under way), refused.\n\n\
                        Exit codes: 0 every upstream that was asked for has an endpoint that gets requests, 1 one has none, \
                        3 nobody to ask,\nor nothing of this name.")]
pub struct Endpoints {
    /// Which upstreams; all of them if it is absent. `refresh NAME` asks for new endpoints of NAME.
    #[arg(value_name = "[refresh] NAME", num_args = 0..=2)]
    name: Vec<String>,
    /// Go on, and tell again whenever something changes.
    #[arg(short, long)]
    watch: bool,
    /// The Control API of a running gateway.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    control: String,
    /// Text or JSON. With `--watch`, one JSON document for each change.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Endpoints {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let code = match self.name.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            [] => runtime::block_on(self.show(None))?,
            ["refresh"] => bail!("write what to ask for: `postern endpoints refresh NAME`"),
            ["refresh", name] => runtime::block_on(self.refresh(name))?,
            [name] => runtime::block_on(self.show(Some(name)))?,
            _ => bail!("one NAME at a time: `postern endpoints NAME`, `postern endpoints refresh NAME`"),
        };
        Ok(ExitCode::from(code))
    }

    async fn refresh(&self, name: &str) -> Result<u8> {
        let path = format!("/v1/endpoints/{}/refresh", path_of(name));
        let answer = client::ask(&self.control, &path, Some(&json!({}))).await?;
        match self.output {
            Format::Json => output::json(&answer),
            Format::Text => line(format_args!("asked for {name}")),
        }
        Ok(output::OK)
    }

    async fn show(&self, name: Option<&str>) -> Result<u8> {
        let path = name
            .map_or_else(|| "/v1/endpoints".to_owned(), |name| format!("/v1/endpoints/{}", path_of(name)));
        let answer = client::ask(&self.control, &path, None).await?;
        self.tell(&answer, name.is_some());
        if self.watch {
            return self.follow(&path, answer, name.is_some()).await;
        }
        let served = list(&answer, "upstreams").iter().all(serves);
        Ok(if served { output::OK } else { output::FOUND })
    }

    /// Tells every change, until the gateway is gone.
    async fn follow(&self, path: &str, mut answer: Value, in_detail: bool) -> Result<u8> {
        loop {
            let since = text(&answer, "version");
            let next = client::ask(&self.control, &format!("{path}?since={since}&wait={WAIT}"), None).await?;
            if text(&next, "version") != since {
                self.tell(&next, in_detail);
            }
            answer = next;
        }
    }

    fn tell(&self, answer: &Value, in_detail: bool) {
        match self.output {
            Format::Json => output::json(answer),
            Format::Text => {
                let upstreams = list(answer, "upstreams");
                if upstreams.is_empty() {
                    line(format_args!("no upstream has endpoints"));
                } else if in_detail {
                    upstreams.iter().for_each(detail);
                } else {
                    summaries(upstreams);
                }
            }
        }
    }
}

/// A name as a path; slashes stay.
fn path_of(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            path.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}

/// Whether an endpoint of this upstream gets requests.
fn serves(upstream: &Value) -> bool {
    let used = |verdict: &str| matches!(verdict, "used" | "kept" | "standby");
    match upstream.get("endpoints") {
        Some(Value::Array(endpoints)) => endpoints.iter().any(|endpoint| used(text(endpoint, "verdict"))),
        Some(Value::Object(counts)) => counts.keys().any(|verdict| used(verdict)),
        _ => false,
    }
}

/// Every upstream in a line.
fn summaries(upstreams: &[Value]) {
    let rows = upstreams.iter().map(|upstream| {
        let counts = upstream.get("endpoints").and_then(Value::as_object);
        let counts: Vec<String> =
            counts.into_iter().flatten().map(|(verdict, count)| format!("{count} {verdict}")).collect();
        let counts = if counts.is_empty() { "none".to_owned() } else { counts.join(", ") };
        let sources: Vec<String> = list(upstream, "sources").iter().map(source).collect();
        [text(upstream, "name").to_owned(), counts, notes(upstream), sources.join("; ")]
    });
    table(["UPSTREAM", "ENDPOINTS", "STATE", "SOURCES"], rows.collect());
}

/// One upstream with all its endpoints.
fn detail(upstream: &Value) {
    line(format_args!("{}  {}", text(upstream, "name"), notes(upstream)));
    for from in list(upstream, "sources") {
        line(format_args!("  from {}", source(from)));
    }
    let failures = upstream.get("failures").and_then(Value::as_object);
    for (name, why) in failures.into_iter().flatten() {
        line(format_args!(
            "  {} {name}: {}",
            painted("failed", Colour::Red),
            why.as_str().unwrap_or_default()
        ));
    }
    let endpoints = list(upstream, "endpoints");
    let rows = endpoints.iter().map(|endpoint| {
        let places = ["region", "zone", "machine"].map(|name| text(endpoint, name));
        let place: Vec<&str> = places.into_iter().filter(|name| !name.is_empty()).collect();
        let sources = list(endpoint, "sources").iter().map(|source| text(source, "kind"));
        let mut sources: Vec<&str> = sources.collect();
        sources.dedup();
        [
            text(endpoint, "address").to_owned(),
            text(endpoint, "verdict").to_owned(),
            number(endpoint, "in_flight"),
            number(endpoint, "weight"),
            number(endpoint, "priority"),
            place.join("/"),
            sources.join(","),
            ago(endpoint, "first_seen"),
            ago(endpoint, "last_confirmed"),
            text(endpoint, "why").to_owned(),
        ]
    });
    let heads = [
        "ADDRESS",
        "VERDICT",
        "IN FLIGHT",
        "WEIGHT",
        "PRIORITY",
        "PLACE",
        "SOURCES",
        "SEEN",
        "CONFIRMED",
        "WHY",
    ];
    table(heads, rows.collect());
    let history = list(upstream, "history");
    if !history.is_empty() {
        line(format_args!("\nlast changes:"));
    }
    for change in history.iter().rev().take(10).rev() {
        let some = |name| {
            let of = change.get(name)?;
            let names: Vec<&str> = list(of, "some").iter().filter_map(Value::as_str).collect();
            Some(format!(" {name} {} ({})", number(of, "count"), names.join(", ")))
        };
        let what: String = ["added", "changed", "removed"].into_iter().filter_map(some).collect();
        line(format_args!("  {:>8} ago {}:{what}", ago(change, "at"), text(change, "why")));
    }
    line(format_args!(""));
}

/// What is not as it should be.
fn notes(upstream: &Value) -> String {
    let flag =
        |name: &str| upstream.get(name).is_some_and(|value| !value.is_null() && *value != json!(false));
    let mut notes = Vec::new();
    if upstream.get("settled") == Some(&json!(false)) {
        notes.push("waiting for the first answer".to_owned());
    }
    let words = [("panic", "panic"), ("stale", "stale"), ("failures", "failures"), ("refused", "refused")];
    notes.extend(words.into_iter().filter(|(name, _)| flag(name)).map(|(_, word)| word.to_owned()));
    if flag("alarms") {
        notes.push(format!("{} alarms", number(upstream, "alarms")));
    }
    if notes.is_empty() { "ok".to_owned() } else { notes.join(", ") }
}

/// Where endpoints come from.
fn source(source: &Value) -> String {
    let mut told = match text(source, "service") {
        "" => text(source, "kind").to_owned(),
        service => format!("{} {service}", text(source, "kind")),
    };
    let registry = text(source, "registry");
    if !registry.is_empty() {
        let _ = write!(told, " at {registry}");
    }
    let state = source.get("freshness").map(|freshness| text(freshness, "state")).unwrap_or_default();
    if !matches!(state, "" | "fresh") {
        let why = source.get("freshness").map(|freshness| text(freshness, "why")).unwrap_or_default();
        let _ = write!(told, " ({state}{}{why})", if why.is_empty() { "" } else { ": " });
    }
    told
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, name: &str) -> String {
    value.get(name).filter(|value| value.is_number()).map(ToString::to_string).unwrap_or_default()
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// How long ago a time was that is told in seconds since 1970.
fn ago(value: &Value, name: &str) -> String {
    let Some(at) = value.get(name).and_then(Value::as_f64) else { return String::new() };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    time((now - at).max(0.0))
}

/// A length of time in its largest unit.
fn time(seconds: f64) -> String {
    for (unit, length) in [("d", 86_400.0), ("h", 3600.0), ("m", 60.0)] {
        if seconds >= length * 2.0 {
            return format!("{:.0}{unit}", seconds / length);
        }
    }
    format!("{seconds:.0}s")
}

/// Columns under their heads. A column that is empty everywhere is left out.
fn table<const N: usize>(heads: [&str; N], rows: Vec<[String; N]>) {
    let widths = std::array::from_fn::<usize, N, _>(|column| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        let widest = cells.max().unwrap_or_default();
        let head = heads.get(column).map_or(0, |head| head.len());
        if widest == 0 { 0 } else { widest.max(head) }
    });
    let row = |cells: &[&str]| {
        let cells = cells.iter().zip(widths).filter(|(_, width)| *width > 0);
        let line = cells.fold(String::new(), |mut line, (cell, width)| {
            let _ = write!(line, "{cell:<width$}  ");
            line
        });
        line.trim_end().to_owned()
    };
    line(format_args!("{}", painted(&row(&heads), Colour::Dim)));
    for cells in &rows {
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        line(format_args!("{}", row(&cells)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_times_are_written_as_they_are_read() {
        for (name, path) in
            [("upstreams/7", "upstreams/7"), ("prod/shop:http", "prod/shop:http"), ("a b?c", "a%20b%3Fc")]
        {
            assert_eq!(path_of(name), path);
        }
        for (seconds, told) in
            [(0.4, "0s"), (119.0, "119s"), (120.0, "2m"), (7200.0, "2h"), (200_000.0, "2d")]
        {
            assert_eq!(time(seconds), told);
        }
    }

    #[test]
    fn an_upstream_serves_while_an_endpoint_gets_requests() {
        for (upstream, serving) in [
            (json!({"endpoints": []}), false),
            (json!({"endpoints": {}}), false),
            (json!({"endpoints": {"unhealthy": 2}}), false),
            (json!({"endpoints": {"unhealthy": 2, "standby": 1}}), true),
            (json!({"endpoints": [{"verdict": "draining"}]}), false),
            (json!({"endpoints": [{"verdict": "draining"}, {"verdict": "kept"}]}), true),
        ] {
            assert_eq!(serves(&upstream), serving, "{upstream}");
        }
    }
}
