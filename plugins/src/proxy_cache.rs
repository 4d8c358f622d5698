//! `proxy-cache`: keeps answers of the upstream, in memory or on disk, and gives them again.
//!
//! Around the upstream call. Requests for the same answer that come while it is fetched wait for it, for a bounded time.
//! An answer whose time is over is confirmed by its validators where it has some, and stands in for an upstream that
//! fails. Unlike APISIX, scheme, host and method are always part of the key, so is the body of a `POST`, and an answer to
//! a request with `Authorization` is kept only where it says so or the key tells users apart.

pub mod disk;
pub mod entry;
pub mod keep;
pub mod zone;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use config::error::ConfigError;
use config::fields::Int;
use config::var::{Var, Vars};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_cache_semantics::{BeforeRequest, CacheOptions, CachePolicy};
use layers::body::Body;
use layers::carry::Carry;
use layers::error::{Blame, Error, Fault, Reason};
use layers::exchange::{Answered, Exchange, State};
use layers::plugin::{Around, BuildEnv, Definition, Hooks, Next};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::entry::{Entry, Key, Stored};
use self::keep::Keep;
use self::zone::{Flight, Joined, Settings, User, ZoneSettings};
use crate::support::identity;
use crate::support::numbers::number;
use crate::support::reply::Canned;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where answers are kept.
    #[serde(default)]
    cache_strategy: Strategy,
    /// The zone, one of `apisix.proxy_cache.zones` in `config.yaml`.
    #[serde(default = "default_zone")]
    #[schemars(length(min = 1, max = 100))]
    cache_zone: String,
    /// What tells requests apart beside scheme, host and method: variables (`$arg_a`) and constants.
    #[serde(default = "default_key")]
    #[schemars(length(min = 1))]
    cache_key: Vec<String>,
    /// Statuses of answers that are kept.
    #[serde(default = "default_statuses")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    cache_http_status: Vec<Int<200, 599>>,
    /// Methods of requests whose answers are kept.
    #[serde(default = "default_methods")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    cache_method: Vec<CacheMethod>,
    /// Take `Expires` and `Cache-Control` out of answers.
    #[serde(default)]
    hide_cache_headers: bool,
    /// Follow `Cache-Control` of the client and the times of the answer (RFC 9111). In memory only.
    #[serde(default)]
    cache_control: bool,
    /// Variables and constants: where they give something else than nothing or `0`, the answer is not taken from the
    /// cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    cache_bypass: Option<Vec<String>>,
    /// Variables and constants: where they give something else than nothing or `0`, the answer is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    no_cache: Option<Vec<String>>,
    /// Seconds that an answer is kept in memory; with `cache_control` its own times count. On disk its own times count
    /// too, and `apisix.proxy_cache.cache_ttl` where it has none.
    #[serde(default)]
    cache_ttl: Int<1, { u32::MAX }, 300>,
    /// Keep answers for each consumer, and each user whom `openid-connect` knows, apart. Without effect where the key
    /// tells users apart by itself.
    #[serde(default = "yes")]
    consumer_isolation: bool,
    /// Keep answers with `Set-Cookie`.
    #[serde(default)]
    cache_set_cookie: bool,
    /// The longest body that is kept, in bytes. Longer ones pass.
    #[serde(default)]
    max_resp_body_size: Int<1, { u32::MAX }, 67_108_864>,
}

/// Where answers are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// In files, over restarts.
    #[default]
    Disk,
    /// In this process.
    Memory,
}

/// A method of requests whose answers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum CacheMethod {
    /// `GET`
    Get,
    /// `POST`; its body is part of the key.
    Post,
    /// `HEAD`, answered from what a `GET` has left.
    Head,
}

const DEFAULT_ZONE: &str = "disk_cache_one";

fn default_zone() -> String {
    DEFAULT_ZONE.into()
}

fn default_key() -> Vec<String> {
    vec!["$host".into(), "$request_uri".into()]
}

fn default_statuses() -> Vec<Int<200, 599>> {
    [200, 301, 404].into_iter().filter_map(Int::new).collect()
}

fn default_methods() -> Vec<CacheMethod> {
    vec![CacheMethod::Get, CacheMethod::Head]
}

fn yes() -> bool {
    true
}

/// The longest body of a `POST` that can be part of a key, in bytes.
const POST_BODY: usize = 64 << 10;
/// How long a request waits for another that fetches the same answer.
const WAIT: Duration = Duration::from_secs(5);
/// How long after its time an answer may stand in for an upstream that fails, unless it says so itself.
const STALE_FOR: Duration = Duration::from_secs(3600);

const CACHE_STATUS: HeaderName = HeaderName::from_static("apisix-cache-status");

/// Variables that tell users apart: with one of these in the key no consumer has to be added.
const IDENTITIES: [&str; 4] = ["$consumer_name", "$consumer_group_id", "$remote_user", "$http_authorization"];

/// The plugin.
pub struct ProxyCache {
    user: User,
    strategy: Strategy,
    key: Words,
    statuses: Box<[StatusCode]>,
    methods: Box<[CacheMethod]>,
    hide: bool,
    cache_control: bool,
    bypass: Option<Words>,
    no_cache: Option<Words>,
    ttl: Duration,
    isolated: bool,
    /// What of the key tells users apart.
    identities: Words,
    set_cookie: bool,
    longest: usize,
    purged: Canned,
    not_purged: Canned,
    only_if_cached: Canned,
}

/// Variables and constants.
struct Words(Box<[Word]>);

enum Word {
    Constant(Box<str>),
    Variable(Var),
}

impl Words {
    fn new(words: &[String]) -> Self {
        let word = |word: &String| match word.strip_prefix('$') {
            Some(name) => Word::Variable(Var::parse(name)),
            None => Word::Constant(word.as_str().into()),
        };
        Self(words.iter().map(word).collect())
    }

    /// The text of each, in order; nothing for a variable without a value.
    fn each(&self, x: &State, mut take: impl FnMut(&str)) {
        for word in &self.0 {
            match word {
                Word::Constant(text) => take(text),
                Word::Variable(var) => take(x.get(var).as_deref().unwrap_or_default()),
            }
        }
    }

    /// Whether they give something else than nothing or `0`.
    fn says_so(&self, x: &State) -> bool {
        let mut joined = String::new();
        self.each(x, |text| joined.push_str(text));
        !matches!(joined.as_str(), "" | "0")
    }
}

fn check_words(words: &[String], field: &str, errors: &mut Vec<ConfigError>) {
    if words.is_empty() {
        errors.push(ConfigError::invalid(format!("/{field}"), "the list is empty: write at least one element"));
    }
    for (index, word) in words.iter().enumerate() {
        let well = match word.strip_prefix('$') {
            Some(name) => !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'),
            None => word.chars().count() >= 2,
        };
        if !well {
            let problem = "write a variable, as `$host`, or a constant of two characters or more";
            errors.push(ConfigError::invalid(format!("/{field}/{index}"), problem));
        }
    }
}

fn is_distinct<T: PartialEq>(list: &[T]) -> bool {
    list.iter().enumerate().all(|(at, one)| list.iter().take(at).all(|before| before != one))
}

impl Definition for ProxyCache {
    const NAME: &'static str = "proxy-cache";
    const PRIORITY: i32 = 1085;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let mut wrong = |pointer: &str, problem: &str| errors.push(ConfigError::invalid(pointer, problem));
        if !(1..=100).contains(&config.cache_zone.chars().count()) {
            wrong("/cache_zone", "a zone has a name of 1 to 100 characters");
        }
        if config.cache_strategy == Strategy::Memory && config.cache_zone == DEFAULT_ZONE {
            wrong("/cache_zone", "`disk_cache_one` is on disk: name a zone in memory, such as `memory_cache`");
        }
        for (pointer, empty, distinct) in [
            ("/cache_http_status", config.cache_http_status.is_empty(), is_distinct(&config.cache_http_status)),
            ("/cache_method", config.cache_method.is_empty(), is_distinct(&config.cache_method)),
        ] {
            if empty {
                wrong(pointer, "the list is empty: write at least one element");
            } else if !distinct {
                wrong(pointer, "an element is written twice: write each one once");
            }
        }
        for (index, word) in config.cache_key.iter().enumerate() {
            if word == "$request_method" {
                wrong(&format!("/cache_key/{index}"), "`$request_method` is not taken: the method is always part of the key");
            }
        }
        check_words(&config.cache_key, "cache_key", &mut errors);
        for (field, words) in [("cache_bypass", &config.cache_bypass), ("no_cache", &config.no_cache)] {
            if let Some(words) = words {
                check_words(words, field, &mut errors);
            }
        }
        errors
    }

    fn check_attr(config: &Config, attr: Option<&serde_json::Value>) -> Vec<ConfigError> {
        zone_of(config, &settings(attr)).err().into_iter().collect()
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let settings = settings(env.attr);
        let zone = zone_of(&config, &settings)?;
        let user = zone::open(zone, env.carry, env.control)?;
        let identities: Vec<String> =
            config.cache_key.iter().filter(|word| IDENTITIES.contains(&word.as_str())).cloned().collect();
        let longest = usize::try_from(config.max_resp_body_size.get()).unwrap_or(usize::MAX);
        hooks.around(&Arc::new(Self {
            longest: longest.min(user.zone.longest()),
            user,
            strategy: config.cache_strategy,
            key: Words::new(&config.cache_key),
            statuses: config
                .cache_http_status
                .iter()
                .filter_map(|status| StatusCode::from_u16(u16::try_from(status.get()).ok()?).ok())
                .collect(),
            methods: config.cache_method.into(),
            hide: config.hide_cache_headers,
            cache_control: config.cache_control && config.cache_strategy == Strategy::Memory,
            bypass: config.cache_bypass.as_deref().map(Words::new),
            no_cache: config.no_cache.as_deref().map(Words::new),
            ttl: Duration::from_secs(match config.cache_strategy {
                Strategy::Memory => config.cache_ttl.get().into(),
                Strategy::Disk => settings.ttl,
            }),
            isolated: config.consumer_isolation,
            identities: Words::new(&identities),
            set_cookie: config.cache_set_cookie,
            purged: Canned::status(StatusCode::OK),
            not_purged: Canned::status(StatusCode::NOT_FOUND),
            only_if_cached: Canned::status(StatusCode::GATEWAY_TIMEOUT),
        }));
        Ok(())
    }
}

/// The zone that the settings name.
fn zone_of<'a>(config: &Config, settings: &'a Settings) -> Result<&'a ZoneSettings, ConfigError> {
    let Some(zone) = settings.zones.iter().find(|zone| zone.name == config.cache_zone) else {
        let names: Vec<_> = settings.zones.iter().map(|zone| format!("`{}`", zone.name)).collect();
        let problem = format!(
            "cache_zone {} not found: `apisix.proxy_cache.zones` in config.yaml has {}",
            config.cache_zone,
            names.join(", ")
        );
        return Err(ConfigError::invalid("/cache_zone", problem));
    };
    let fits = match config.cache_strategy {
        Strategy::Disk => zone.disk.is_some(),
        Strategy::Memory => zone.disk.is_none(),
    };
    if !fits {
        let place = if zone.disk.is_some() { "on disk" } else { "in memory" };
        let problem = format!("zone `{}` is {place}: choose a zone that fits `cache_strategy`", zone.name);
        return Err(ConfigError::invalid("/cache_zone", problem));
    }
    Ok(zone)
}

/// What the plugin gets of `apisix.proxy_cache`.
pub fn attr(cache: &config::process::Cache) -> serde_json::Value {
    let zones = cache.zones.iter().map(|zone| ZoneSettings {
        name: zone.name.clone(),
        memory: zone.memory_size,
        disk: zone.disk.as_ref().map(|disk| (disk.path.clone(), disk.size)),
    });
    let settings = Settings { ttl: cache.ttl.as_secs().max(1), zones: zones.collect() };
    serde_json::to_value(settings).unwrap_or_default()
}

/// Forgets everything in a zone. False if it is not in use.
pub fn purge_zone(carry: &Carry, name: &str) -> bool {
    zone::purge(carry, name)
}

/// What is in the zones in use, for people.
pub fn report(carry: &Carry, attr: Option<&serde_json::Value>) -> serde_json::Value {
    zone::report(carry, &settings(attr))
}

fn settings(attr: Option<&serde_json::Value>) -> Settings {
    attr.and_then(|attr| serde_json::from_value(attr.clone()).ok()).unwrap_or_default()
}

#[cfg(not(test))]
fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
use tests::now;

/// What a request is to the cache.
enum Asked {
    /// Nothing: the status to tell.
    Passes(&'static str),
    /// Not to be answered from the cache, but its answer may be kept.
    Refreshes(Names),
    /// Its answer may be in the cache.
    Looks(Names),
}

/// The names of an answer.
#[derive(Clone, Copy)]
struct Names {
    /// Of the request, whatever its fields.
    primary: Key,
    /// Of the answer itself: differs where answers vary.
    exact: Key,
}

impl ProxyCache {
    async fn asked(&self, x: &mut Exchange) -> Asked {
        let Some(method) = self.method(&x.request.method) else {
            // As APISIX tells it.
            return Asked::Passes(if self.strategy == Strategy::Memory { "MISS" } else { "BYPASS" });
        };
        let headers = &x.request.headers;
        // Parts are left to the upstream, and so is what must not be answered from a copy.
        let special = [header::RANGE, header::IF_MATCH, header::IF_UNMODIFIED_SINCE, header::IF_RANGE, header::UPGRADE];
        if special.iter().any(|name| headers.contains_key(name)) {
            return Asked::Passes("BYPASS");
        }
        if self.cache_control && (says(headers, "no-store") || says(headers, "no-cache") || pragma(headers)) {
            return Asked::Passes("BYPASS");
        }
        let refreshes = self.bypass.as_ref().is_some_and(|words| words.says_so(x));
        if refreshes && self.strategy == Strategy::Memory {
            return Asked::Passes("BYPASS");
        }
        if method == CacheMethod::Post && !hold_body(x).await {
            return Asked::Passes("BYPASS");
        }
        let primary = self.primary(x, x.conn.scheme(), if method == CacheMethod::Post { "POST" } else { "GET" });
        let names = Names { primary, exact: primary };
        if refreshes { Asked::Refreshes(names) } else { Asked::Looks(names) }
    }

    fn method(&self, method: &Method) -> Option<CacheMethod> {
        let method = match *method {
            Method::GET => CacheMethod::Get,
            Method::HEAD => CacheMethod::Head,
            Method::POST => CacheMethod::Post,
            _ => return None,
        };
        self.methods.contains(&method).then_some(method)
    }

    /// The name of a request. Every part is preceded by its length, so that no two lists give the same text.
    fn primary(&self, x: &State, scheme: &str, method: &str) -> Key {
        let mut digest = Sha256::new();
        let mut part = |text: &[u8]| {
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text);
        };
        part(scheme.as_bytes());
        part(x.host.as_bytes());
        part(method.as_bytes());
        let isolated = self.isolated && !self.is_identified(x);
        let consumer = x.consumer.as_ref().filter(|_| isolated);
        part(consumer.map_or(b"", |consumer| consumer.name.as_bytes()));
        // Who has logged in at an identity provider shows a cookie and nothing else that tells users apart.
        let user = x.slot::<identity::User>().filter(|_| isolated);
        part(user.map_or(b"", |user| user.0.as_bytes()));
        self.key.each(x, |text| part(text.as_bytes()));
        if method == "POST"
            && let Body::Full(body) = &x.request_body
        {
            part(body);
        }
        digest.finalize().into()
    }

    /// Looks a request up; where answers vary, `names` gets the exact one.
    async fn find(&self, x: &State, names: &mut Names) -> Option<Arc<Stored>> {
        let found = self.user.zone.get(&names.primary).await?;
        let Stored::Vary(variants) = &*found else { return Some(found) };
        names.exact = variant(&names.primary, &variants.names, &x.request.headers);
        let found = self.user.zone.get(&names.exact).await?;
        matches!(*found, Stored::Answer(_)).then_some(found)
    }

    /// Whether a kept answer may be given as it is.
    fn serves(&self, x: &State, entry: &Entry, now: SystemTime) -> bool {
        if !self.cache_control {
            return entry.is_fresh(now);
        }
        let policy = policy(x, entry.status, &entry.headers, entry.stored);
        matches!(policy.before_request(&HeadOf(x), now), BeforeRequest::Fresh(_))
    }

    /// How long an answer may be kept; nothing if it may not.
    fn keeps(&self, x: &State, now: SystemTime) -> Option<Duration> {
        let (status, headers) = (x.response.status(), x.response.headers());
        let ours = x.answered == Answered::Upstream
            && self.statuses.contains(&status)
            && status != StatusCode::PARTIAL_CONTENT
            && status != StatusCode::NOT_MODIFIED
            && !headers.contains_key(header::CONTENT_RANGE)
            && !headers.contains_key(header::TRAILER)
            && self.no_cache.as_ref().is_none_or(|words| !words.says_so(x));
        let forbidden = ["private", "no-store", "no-cache"].iter().any(|word| says(headers, word))
            || (headers.contains_key(header::SET_COOKIE) && !self.set_cookie)
            || varies_by_everything(headers);
        if !ours || forbidden || !self.may_share(x) {
            return None;
        }
        let ttl = if self.cache_control {
            let policy = policy(x, status, headers, now);
            policy.is_storable().then(|| policy.time_to_live(now))?
        } else if self.strategy == Strategy::Disk {
            own_time(headers, now).unwrap_or(self.ttl)
        } else {
            self.ttl
        };
        (!ttl.is_zero()).then_some(ttl)
    }

    /// Whether an answer to this request may be given to another (RFC 9111, 3.5): not if the client has shown who it is,
    /// unless the answer says so or the key tells users apart.
    fn may_share(&self, x: &State) -> bool {
        !x.request.headers.contains_key(header::AUTHORIZATION)
            || self.is_identified(x)
            || (self.isolated && x.consumer.is_some())
            || ["public", "s-maxage", "must-revalidate"].iter().any(|word| says(x.response.headers(), word))
    }

    /// Whether the key tells this request's user apart: a variable without a value tells nobody.
    fn is_identified(&self, x: &State) -> bool {
        let mut identified = false;
        self.identities.each(x, |text| identified |= !text.is_empty());
        identified
    }

    fn tell(&self, x: &mut Exchange, status: &'static str) {
        self.user.zone.count(status == "HIT");
        x.response_headers.push((CACHE_STATUS, HeaderValue::from_static(status)));
        if self.hide {
            x.response.headers_mut().remove(header::CACHE_CONTROL);
            x.response.headers_mut().remove(header::EXPIRES);
        }
    }

    /// Answers with what is kept.
    fn serve(&self, x: &mut Exchange, entry: &Entry, status: &'static str, now: SystemTime) {
        let mut response = Response::new(Body::Empty);
        *response.headers_mut() = entry.headers.clone();
        let before = number_of(&entry.headers, header::AGE).unwrap_or_default();
        let age = before.saturating_add(entry.age(now).as_secs());
        response.headers_mut().insert(header::AGE, number(age));
        if unchanged(&x.request.headers, entry) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            for name in [header::CONTENT_TYPE, header::CONTENT_ENCODING, header::CONTENT_LANGUAGE] {
                response.headers_mut().remove(name);
            }
        } else {
            *response.status_mut() = entry.status;
            response.headers_mut().insert(header::CONTENT_LENGTH, number(entry.body.len() as u64));
            if x.request.method != Method::HEAD {
                *response.body_mut() = entry.body.clone().into();
            }
        }
        x.response = response;
        x.answered = Answered::Upstream;
        x.error = None;
        self.tell(x, status);
    }

    fn reply(&self, x: &mut Exchange, answer: &Canned) {
        x.reply(answer.response(), Reason::Plugin);
        x.error = Some(Box::new(Error::new(Reason::Plugin).detail(Self::NAME)));
    }

    /// Forgets what is kept of this request, for both schemes and all methods.
    async fn purge(&self, x: &State) -> bool {
        let mut found = false;
        for scheme in ["http", "https"] {
            for method in ["GET", "POST"] {
                found |= self.user.zone.purge(&self.primary(x, scheme, method)).await;
            }
        }
        found
    }

    /// Asks the upstream, and keeps the answer or puts a kept one in its place.
    async fn fetch(
        &self,
        mut x: Exchange,
        next: Next,
        mut names: Names,
        old: Option<Arc<Stored>>,
        flight: Option<Flight>,
        status: &'static str,
    ) -> Result<Exchange, Fault> {
        let old = old.as_deref().and_then(|stored| match stored {
            Stored::Answer(entry) => Some(entry),
            Stored::Vary(_) => None,
        });
        let asks = x.request.method != Method::HEAD;
        let theirs = asks.then(|| conditions(&mut x.request.headers));
        let confirms = asks && confirm(&mut x.request.headers, old);
        let mut result = next.run(x).await;
        if let Some(theirs) = theirs {
            let x = match &mut result {
                Ok(x) => x,
                Err(fault) => &mut fault.exchange,
            };
            conditions(&mut x.request.headers);
            x.request.headers.extend(theirs);
        }
        let now = now();
        let mut x = match result {
            Ok(x) => x,
            Err(fault) => {
                let down = fault.error.reason().blame() == Blame::Upstream;
                let Some(old) = old.filter(|old| down && stands_in(old, now)) else {
                    let mut fault = fault;
                    self.tell(&mut fault.exchange, status);
                    return Err(fault);
                };
                tracing::warn!(error = %fault.error, host = %fault.exchange.host, "a kept answer stands in for the upstream");
                let mut x = fault.exchange;
                self.serve(&mut x, old, "STALE", now);
                return Ok(x);
            }
        };
        match (x.response.status(), old) {
            (StatusCode::NOT_MODIFIED, Some(old)) if confirms => {
                let mut entry = old.clone();
                let fields = std::mem::take(x.response.headers_mut());
                refresh(&mut entry.headers, &fields);
                entry.stored = now;
                // Its times may have changed with it.
                *x.response.headers_mut() = entry.headers.clone();
                *x.response.status_mut() = entry.status;
                match self.keeps(&x, now) {
                    Some(ttl) => {
                        entry.ttl = ttl;
                        let stored = Arc::new(Stored::Answer(entry.clone()));
                        self.user.zone.put(names.exact, stored, None);
                    }
                    None => entry.ttl = Duration::ZERO,
                }
                self.serve(&mut x, &entry, "REVALIDATED", now);
                return Ok(x);
            }
            (status, Some(old)) if is_failure(status) && says_stale(old, now) => {
                self.serve(&mut x, old, "STALE", now);
                return Ok(x);
            }
            _ => {}
        }
        match self.keeps(&x, now).filter(|_| asks) {
            Some(ttl) => {
                let vary = vary(x.response.headers());
                if !vary.is_empty() {
                    names.exact = variant(&names.primary, &vary, &x.request.headers);
                } else {
                    names.exact = names.primary;
                }
                self.user.zone.no_pass(&names.primary);
                Keep::answer(&mut x, &self.user.zone, (names.primary, names.exact, vary), (now, ttl), self.longest, self.set_cookie, flight);
            }
            None => {
                if asks {
                    self.user.zone.pass(names.primary);
                }
                drop(flight);
            }
        }
        self.tell(&mut x, status);
        Ok(x)
    }
}

impl Around for ProxyCache {
    async fn around(&self, mut x: Exchange, next: Next) -> Result<Exchange, Fault> {
        if x.request.method.as_str() == "PURGE" {
            let answer = if self.purge(&x).await { &self.purged } else { &self.not_purged };
            self.reply(&mut x, answer);
            return Ok(x);
        }
        let (mut names, looks) = match self.asked(&mut x).await {
            Asked::Looks(names) => (names, true),
            Asked::Refreshes(names) => (names, false),
            Asked::Passes(status) => return self.pass(x, next, status).await,
        };
        if !looks {
            return self.fetch(x, next, names, None, None, "BYPASS").await;
        }
        let only = self.cache_control && says(&x.request.headers, "only-if-cached");
        let mut waited = false;
        loop {
            let found = self.find(&x, &mut names).await;
            let now = now();
            if let Some(Stored::Answer(entry)) = found.as_deref()
                && self.serves(&x, entry, now)
            {
                self.serve(&mut x, entry, "HIT", now);
                return Ok(x);
            }
            if only {
                self.reply(&mut x, &self.only_if_cached);
                self.tell(&mut x, "MISS");
                return Ok(x);
            }
            let status = match found.as_deref() {
                // Still good by its own time, but not for this client.
                Some(Stored::Answer(entry)) if entry.is_fresh(now) => "STALE",
                Some(Stored::Answer(_)) => "EXPIRED",
                _ => "MISS",
            };
            let joined = if waited || x.request.method == Method::HEAD {
                Joined::Alone
            } else {
                self.user.zone.join(names.exact)
            };
            match joined {
                Joined::First(flight) => return self.fetch(x, next, names, found, Some(flight), status).await,
                Joined::Alone => return self.fetch(x, next, names, found, None, status).await,
                Joined::Waits(mut done) => {
                    // Ends when the other one has what it wanted, or has given up.
                    let _ = tokio::time::timeout(WAIT, done.changed()).await;
                    waited = true;
                }
            }
        }
    }
}

impl ProxyCache {
    /// A request that the cache has nothing to do with. One that changes something makes what is kept of it useless.
    async fn pass(&self, x: Exchange, next: Next, status: &'static str) -> Result<Exchange, Fault> {
        let unsafe_method = !x.request.method.is_safe() && x.request.method != Method::POST;
        match next.run(x).await {
            Ok(mut x) => {
                if unsafe_method && (200..400).contains(&x.response.status().as_u16()) {
                    self.user.zone.purge(&self.primary(&x, x.conn.scheme(), "GET")).await;
                }
                self.tell(&mut x, status);
                Ok(x)
            }
            Err(mut fault) => {
                self.tell(&mut fault.exchange, status);
                Err(fault)
            }
        }
    }
}

/// Takes conditions out of a request: the whole answer is wanted.
fn conditions(headers: &mut HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let names = [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE];
    names.into_iter().filter_map(|name| headers.remove(&name).map(|value| (name, value))).collect()
}

/// Puts conditions into a request that confirm `old`. True if it has validators.
fn confirm(headers: &mut HeaderMap, old: Option<&Entry>) -> bool {
    let mut confirms = false;
    for (validator, condition) in
        [(header::ETAG, header::IF_NONE_MATCH), (header::LAST_MODIFIED, header::IF_MODIFIED_SINCE)]
    {
        if let Some(value) = old.and_then(|old| old.headers.get(validator)) {
            headers.insert(condition, value.clone());
            confirms = true;
        }
    }
    confirms
}

/// Reads the body of a `POST`, if it says that it is short enough.
async fn hold_body(x: &mut Exchange) -> bool {
    if x.request_body.is_empty() {
        return true;
    }
    let announced = number_of(&x.request.headers, header::CONTENT_LENGTH);
    if announced.is_none_or(|length| length > POST_BODY as u64) {
        return false;
    }
    match x.request_body.collect_up_to(POST_BODY).await {
        Ok(body) => {
            x.request_body = body.into();
            true
        }
        Err(error) => {
            // What is left of it fails again where it is sent.
            tracing::debug!(%error, "the body of a request cannot be read");
            false
        }
    }
}

/// The request's head, for the rules of RFC 9111.
struct HeadOf<'a>(&'a State);

impl http_cache_semantics::RequestLike for HeadOf<'_> {
    fn uri(&self) -> http::Uri {
        self.0.request.uri.clone()
    }

    fn is_same_uri(&self, _: &http::Uri) -> bool {
        true
    }

    fn method(&self) -> &Method {
        // An answer to GET is one to HEAD.
        if self.0.request.method == Method::HEAD { &Method::GET } else { &self.0.request.method }
    }

    fn headers(&self) -> &HeaderMap {
        &self.0.request.headers
    }
}

/// A response's head.
struct AnswerOf<'a>(StatusCode, &'a HeaderMap);

impl http_cache_semantics::ResponseLike for AnswerOf<'_> {
    fn status(&self) -> StatusCode {
        self.0
    }

    fn headers(&self) -> &HeaderMap {
        self.1
    }
}

/// The rules for an answer. The request is the one at hand: which fields it is told apart by is settled by the key, and
/// whether users are is [`ProxyCache::may_share`].
fn policy(x: &State, status: StatusCode, headers: &HeaderMap, stored: SystemTime) -> CachePolicy {
    let options = CacheOptions { shared: true, ..CacheOptions::default() };
    CachePolicy::new_options(&HeadOf(x), &AnswerOf(status, headers), stored, options)
}

/// The words of `Cache-Control`, with their values.
fn directives(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    headers.get_all(header::CACHE_CONTROL).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(
        |word| {
            let mut parts = word.splitn(2, |byte| *byte == b'=').map(<[u8]>::trim_ascii);
            (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
        },
    )
}

fn says(headers: &HeaderMap, word: &str) -> bool {
    directives(headers).any(|(name, _)| name.eq_ignore_ascii_case(word.as_bytes()))
}

/// The seconds after a word of `Cache-Control`.
fn seconds(headers: &HeaderMap, word: &str) -> Option<Duration> {
    let (_, value) = directives(headers).find(|(name, _)| name.eq_ignore_ascii_case(word.as_bytes()))?;
    let value = std::str::from_utf8(value).ok()?.trim_matches('"');
    // What is no number is stale (RFC 9111, 4.2.1).
    Some(Duration::from_secs(value.parse::<u32>().unwrap_or_default().into()))
}

fn pragma(headers: &HeaderMap) -> bool {
    !headers.contains_key(header::CACHE_CONTROL)
        && headers.get(header::PRAGMA).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"no-cache"))
}

fn number_of(headers: &HeaderMap, name: HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The time that an answer gives itself, as nginx reads it.
fn own_time(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    if let Some(seconds) = number_of(headers, HeaderName::from_static("x-accel-expires")) {
        return Some(Duration::from_secs(seconds));
    }
    if let Some(time) = seconds(headers, "s-maxage").or_else(|| seconds(headers, "max-age")) {
        return Some(time);
    }
    let expires = headers.get(header::EXPIRES)?;
    let at = expires.to_str().ok().and_then(|text| httpdate::parse_http_date(text).ok());
    Some(at.and_then(|at| at.duration_since(now).ok()).unwrap_or_default())
}

/// The fields by which answers differ, in the order of their names.
fn vary(headers: &HeaderMap) -> Box<[HeaderName]> {
    let mut names: Vec<HeaderName> = headers
        .get_all(header::VARY)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect();
    names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    names.into()
}

/// `Vary: *`, or something that names no field.
fn varies_by_everything(headers: &HeaderMap) -> bool {
    headers.get_all(header::VARY).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).any(|name| {
        let name = name.trim_ascii();
        name == b"*" || (!name.is_empty() && HeaderName::from_bytes(name).is_err())
    })
}

/// The name of an answer that differs by `names`.
fn variant(primary: &Key, names: &[HeaderName], headers: &HeaderMap) -> Key {
    let mut digest = Sha256::new();
    digest.update(b"vary");
    digest.update(primary);
    for name in names {
        let values: Vec<&HeaderValue> = headers.get_all(name).iter().collect();
        digest.update((values.len() as u64).to_be_bytes());
        for value in values {
            digest.update((value.len() as u64).to_be_bytes());
            digest.update(value);
        }
    }
    digest.finalize().into()
}

/// Whether the client has what is kept (RFC 9110, 13.1.2 and 13.1.3).
fn unchanged(headers: &HeaderMap, entry: &Entry) -> bool {
    if entry.status != StatusCode::OK {
        return false;
    }
    let weak = |tag: &[u8]| -> Vec<u8> { tag.strip_prefix(b"W/").unwrap_or(tag).to_vec() };
    if headers.contains_key(header::IF_NONE_MATCH) {
        let Some(own) = entry.headers.get(header::ETAG).map(|tag| weak(tag.as_bytes())) else { return false };
        let all = headers.get_all(header::IF_NONE_MATCH).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
        return all.map(<[u8]>::trim_ascii).any(|tag| tag == b"*" || weak(tag) == own);
    }
    let date = |headers: &HeaderMap, name| {
        headers.get(name).and_then(|value: &HeaderValue| httpdate::parse_http_date(value.to_str().ok()?).ok())
    };
    match (date(headers, header::IF_MODIFIED_SINCE), date(&entry.headers, header::LAST_MODIFIED)) {
        (Some(since), Some(modified)) => modified <= since,
        _ => false,
    }
}

/// Takes over the fields of a 304 that tell of times and validators (RFC 9111, 3.2).
fn refresh(kept: &mut HeaderMap, fresh: &HeaderMap) {
    let untouched = [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_TYPE, header::CONTENT_RANGE, header::SET_COOKIE];
    kept.remove(header::AGE);
    for name in fresh.keys().filter(|name| !untouched.contains(name) && !keep::is_ours(name)) {
        kept.remove(name);
        for value in fresh.get_all(name) {
            kept.append(name, value.clone());
        }
    }
}

fn is_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502 | 503 | 504)
}

/// Whether an answer whose time is over may stand in for an upstream that cannot be reached.
fn stands_in(entry: &Entry, now: SystemTime) -> bool {
    let forbidden = says(&entry.headers, "must-revalidate") || says(&entry.headers, "proxy-revalidate");
    let longest = seconds(&entry.headers, "stale-if-error").unwrap_or(STALE_FOR);
    !forbidden && entry.age(now) < entry.ttl.saturating_add(longest)
}

/// Whether it says that it may stand in for an answer that tells of a failure (RFC 5861).
fn says_stale(entry: &Entry, now: SystemTime) -> bool {
    says(&entry.headers, "stale-if-error") && stands_in(entry, now)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use layers::testing::{TestChain, TestEnv, exchange, field, text};
    use serde_json::{Value, json};

    use super::*;

    thread_local! {
        static LATER: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// The time, later than it is by what a test says.
    pub(super) fn now() -> SystemTime {
        SystemTime::now() + LATER.get()
    }

    fn env() -> TestEnv {
        let zones = json!([{"name": "memory", "memory": 1 << 20}]);
        TestEnv { attr: Some(json!({"ttl": 10, "zones": zones})), ..TestEnv::default() }
    }

    fn memory(mut settings: Value) -> Value {
        settings["cache_strategy"] = "memory".into();
        settings["cache_zone"] = "memory".into();
        settings
    }

    type Fields<'a> = &'a [(&'static str, &'static str)];

    type Answer = Rc<dyn Fn(&mut Exchange) -> Result<(), Error>>;

    /// A cache around an upstream that counts its requests and answers with their number.
    struct Cached<F> {
        chain: TestChain<F>,
        asked: Rc<Cell<u32>>,
        answer: Rc<RefCell<Answer>>,
    }

    fn cached(settings: Value, fields: &[(&'static str, &'static str)]) -> Cached<impl Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static> {
        let asked = Rc::new(Cell::new(0));
        let answer = Rc::new(RefCell::new(answering(fields)));
        let (counts, answers) = (asked.clone(), answer.clone());
        let chain = env()
            .chain::<ProxyCache, _>(&memory(settings), move |x: &mut Exchange| {
                counts.set(counts.get() + 1);
                *x.response.body_mut() = Body::boxed(Body::from(format!("answer {}", counts.get())));
                let answer = answers.borrow().clone();
                answer(x)
            })
            .unwrap();
        Cached { chain, asked, answer }
    }

    fn answering(fields: &[(&'static str, &'static str)]) -> Answer {
        let fields = fields.to_vec();
        Rc::new(move |x| {
            for (name, value) in &fields {
                match *name {
                    "status" => *x.response.status_mut() = value.parse().unwrap(),
                    name => {
                        x.response.headers_mut().append(name, HeaderValue::from_static(value));
                    }
                }
            }
            Ok(())
        })
    }

    impl<F: Fn(&mut Exchange) -> Result<(), Error> + Clone + 'static> Cached<F> {
        /// Status of the cache, of the answer, and the body.
        async fn get(&mut self, uri: &str, fields: &[(&str, &str)]) -> (String, u16, String) {
            self.send("GET", uri, fields).await
        }

        async fn send(&mut self, method: &str, uri: &str, fields: &[(&str, &str)]) -> (String, u16, String) {
            let mut request = exchange(method, uri);
            for (name, value) in fields {
                request = request.header(name, value);
            }
            let mut x = self.chain.run(request.build()).await;
            let text = text(&mut x).await;
            (field(&x, "apisix-cache-status").to_owned(), x.response.status().as_u16(), text)
        }
    }

    fn told(status: &str, code: u16, text: &str) -> (String, u16, String) {
        (status.into(), code, text.into())
    }

    #[tokio::test]
    async fn an_answer_is_given_again_to_the_same_request_only() {
        let mut cache = cached(json!({}), &[]);
        assert_eq!(cache.get("http://a/x", &[]).await, told("MISS", 200, "answer 1"));
        assert_eq!(cache.get("http://a/x", &[]).await, told("HIT", 200, "answer 1"));
        assert_eq!(cache.send("HEAD", "http://a/x", &[]).await, told("HIT", 200, ""));
        assert_eq!(cache.get("http://a/y", &[]).await, told("MISS", 200, "answer 2"));
        assert_eq!(cache.get("http://b/x", &[]).await, told("MISS", 200, "answer 3"));
        assert_eq!(cache.send("POST", "http://a/x", &[]).await, told("MISS", 200, "answer 4"));
        assert_eq!(cache.send("HEAD", "http://a/z", &[]).await.0, "MISS");
        assert_eq!(cache.get("http://a/z", &[]).await.0, "MISS", "an answer without a body is no answer to GET");
    }

    #[tokio::test]
    async fn answers_that_are_not_for_everybody_are_not_kept() {
        let cases: [(Value, Fields<'static>, Fields<'_>, bool); 18] = [
            (json!({}), &[("set-cookie", "a=b")], &[], false),
            (json!({"cache_set_cookie": true}), &[("set-cookie", "a=b")], &[], true),
            (json!({}), &[("cache-control", "private")], &[], false),
            (json!({}), &[("cache-control", "max-age=5, No-Store")], &[], false),
            (json!({}), &[("cache-control", "no-cache")], &[], false),
            (json!({}), &[("vary", "accept, *")], &[], false),
            (json!({}), &[("vary", "a b")], &[], false),
            (json!({}), &[], &[("authorization", "Bearer x")], false),
            (json!({}), &[("cache-control", "public")], &[("authorization", "Bearer x")], true),
            (json!({"cache_key": ["$uri", "$http_authorization"]}), &[], &[("authorization", "Bearer x")], true),
            (json!({"cache_key": ["$uri", "$consumer_name"]}), &[], &[("authorization", "Bearer x")], false),
            (json!({}), &[("status", "500")], &[], false),
            (json!({"cache_http_status": [500]}), &[("status", "500")], &[], true),
            (json!({"cache_http_status": [206]}), &[("status", "206")], &[], false),
            (json!({"no_cache": ["$http_x_no"]}), &[], &[("x-no", "1")], false),
            (json!({"no_cache": ["$http_x_no"]}), &[], &[("x-no", "0")], true),
            (json!({}), &[], &[("range", "bytes=0-1")], false),
            (json!({"max_resp_body_size": 7}), &[], &[], false),
        ];
        for (settings, answer, request, kept) in cases {
            let what = format!("{settings} {answer:?} {request:?}");
            let mut cache = cached(settings, answer);
            cache.get("http://a/x", request).await;
            let again = cache.get("http://a/x", request).await;
            assert_eq!(again.0 == "HIT", kept, "{what}: {again:?}");
            assert_eq!(cache.asked.get(), if kept { 1 } else { 2 }, "{what}");
        }
    }

    #[tokio::test]
    async fn the_cache_is_passed_by_where_it_is_said() {
        let mut cache = cached(json!({"cache_bypass": ["$arg_bypass", "$http_x_bypass"], "cache_key": ["$uri"]}), &[]);
        for (uri, header, status) in [
            ("http://a/x", "", "MISS"),
            ("http://a/x?bypass=1", "", "BYPASS"),
            ("http://a/x?bypass=0", "", "HIT"),
            ("http://a/x", "yes", "BYPASS"),
        ] {
            assert_eq!(cache.get(uri, &[("x-bypass", header)]).await.0, status, "{uri} {header}");
        }
    }

    #[tokio::test]
    async fn answers_that_vary_are_kept_apart() {
        let mut cache = cached(json!({}), &[("vary", "Accept-Language, accept")]);
        let languages = [("de", "MISS", "answer 1"), ("en", "MISS", "answer 2"), ("de", "HIT", "answer 1"), ("en", "HIT", "answer 2")];
        for (language, status, text) in languages {
            assert_eq!(cache.get("http://a/x", &[("accept-language", language)]).await, told(status, 200, text));
            // The list of variants is written beside the answer.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(cache.send("PURGE", "http://a/x", &[]).await.1, 200);
        assert_eq!(cache.get("http://a/x", &[("accept-language", "de")]).await.0, "MISS");
    }

    #[tokio::test]
    async fn what_is_purged_is_gone() {
        let mut cache = cached(json!({}), &[]);
        assert_eq!(cache.send("PURGE", "http://a/x", &[]).await.1, 404);
        cache.get("http://a/x", &[]).await;
        assert_eq!(cache.send("PURGE", "http://a/x", &[]).await.1, 200);
        assert_eq!(cache.send("PURGE", "http://a/x", &[]).await.1, 404);
        assert_eq!(cache.get("http://a/x", &[]).await.0, "MISS");
        assert_eq!(cache.asked.get(), 2);
        cache.send("DELETE", "http://a/x", &[]).await;
        assert_eq!(cache.get("http://a/x", &[]).await.0, "MISS", "what was changed is asked for again");
    }

    #[tokio::test]
    async fn cache_control_of_both_sides_is_followed() {
        let mut cache = cached(json!({"cache_control": true}), &[("cache-control", "max-age=100")]);
        let steps = [
            ("only-if-cached", "MISS", 504),
            ("no-store", "BYPASS", 200),
            ("", "MISS", 200),
            ("", "HIT", 200),
            ("only-if-cached", "HIT", 200),
            ("no-cache", "BYPASS", 200),
            ("min-fresh=1000", "STALE", 200),
            ("max-age=10", "HIT", 200),
        ];
        for (directive, status, code) in steps {
            let fields: &[(&str, &str)] = if directive.is_empty() { &[] } else { &[("cache-control", directive)] };
            let got = cache.get("http://a/x", fields).await;
            assert_eq!((&*got.0, got.1), (status, code), "{directive}");
        }
        let mut cache = cached(json!({"cache_control": true}), &[]);
        cache.get("http://a/x", &[]).await;
        assert_eq!(cache.get("http://a/x", &[]).await.0, "MISS", "an answer without a time has none");
    }

    #[tokio::test]
    async fn a_client_that_has_the_answer_is_told_so() {
        let modified = "Wed, 21 Oct 2015 07:28:00 GMT";
        let mut cache = cached(json!({}), &[("etag", "\"v1\""), ("last-modified", modified)]);
        cache.get("http://a/x", &[("if-none-match", "\"v1\"")]).await;
        let cases: [(&str, &str, u16); 7] = [
            ("if-none-match", "\"v1\"", 304),
            ("if-none-match", "\"v0\", W/\"v1\"", 304),
            ("if-none-match", "*", 304),
            ("if-none-match", "\"v2\"", 200),
            ("if-modified-since", modified, 304),
            ("if-modified-since", "Wed, 21 Oct 2015 07:27:59 GMT", 200),
            ("if-modified-since", "nonsense", 200),
        ];
        for (name, value, code) in cases {
            let (status, got, body) = cache.get("http://a/x", &[(name, value)]).await;
            assert_eq!((&*status, got, body.is_empty()), ("HIT", code, code == 304), "{name}: {value}");
        }
        assert_eq!(cache.asked.get(), 1);
    }

    #[tokio::test]
    async fn an_old_answer_is_confirmed_or_stands_in_for_an_upstream_that_fails() {
        let fields = [("cache-control", "max-age=0, stale-if-error=60"), ("etag", "\"v1\"")];
        // In memory and without `cache_control` the answer's own time does not count: the plugin's does.
        let mut cache = cached(json!({"cache_ttl": 1}), &fields);
        cache.get("http://a/x", &[]).await;
        LATER.set(Duration::from_secs(2));
        *cache.answer.borrow_mut() = Rc::new(|_| Err(Error::new(Reason::ConnectFailed)));
        assert_eq!(cache.get("http://a/x", &[]).await, told("STALE", 200, "answer 1"));
        *cache.answer.borrow_mut() = answering(&[("status", "503")]);
        assert_eq!(cache.get("http://a/x", &[]).await, told("STALE", 200, "answer 1"));
        *cache.answer.borrow_mut() = Rc::new(|x| {
            assert_eq!(x.request.headers["if-none-match"], "\"v1\"");
            *x.response.status_mut() = StatusCode::NOT_MODIFIED;
            *x.response.body_mut() = Body::Empty;
            x.response.headers_mut().insert("x-new", HeaderValue::from_static("1"));
            Ok(())
        });
        assert_eq!(cache.get("http://a/x", &[]).await, told("REVALIDATED", 200, "answer 1"));
        assert_eq!(cache.get("http://a/x", &[]).await, told("HIT", 200, "answer 1"));
    }

    #[tokio::test]
    async fn consumers_have_answers_of_their_own() {
        for (settings, shared) in [(json!({}), false), (json!({"consumer_isolation": false}), true), (json!({"cache_key": ["$uri", "$consumer_name"]}), false)] {
            let mut cache = cached(settings.clone(), &[]);
            for (name, hit) in [("ann", false), ("bob", shared), ("ann", true)] {
                let mut x = exchange("GET", "http://a/x").build();
                x.consumer = Some(Arc::new(layers::consumer::Consumer::new(name)));
                let mut x = cache.chain.run(x).await;
                text(&mut x).await;
                assert_eq!(field(&x, "apisix-cache-status") == "HIT", hit, "{settings} {name}");
            }
        }
    }

    #[tokio::test]
    async fn users_of_an_identity_provider_have_answers_of_their_own() {
        let key = json!({"cache_key": ["$uri", "$consumer_name"]});
        for (settings, shared) in [(json!({}), false), (key, false), (json!({"consumer_isolation": false}), true)] {
            let mut cache = cached(settings.clone(), &[]);
            for (name, hit) in [("ann", false), ("bob", shared), ("ann", true)] {
                let mut x = exchange("GET", "http://a/x").build();
                x.put_slot(identity::User(name.into()));
                let mut x = cache.chain.run(x).await;
                text(&mut x).await;
                assert_eq!(field(&x, "apisix-cache-status") == "HIT", hit, "{settings} {name}");
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_not_kept() {
        let mut cache = cached(json!({}), &[]);
        let x = cache.chain.run(exchange("GET", "http://a/x").build()).await;
        drop(x);
        assert_eq!(cache.get("http://a/x", &[]).await.0, "MISS");
    }

    #[test]
    fn an_answer_tells_its_time() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        let cases: [(Fields<'_>, Option<u64>); 9] = [
            (&[], None),
            (&[("cache-control", "max-age=7")], Some(7)),
            (&[("cache-control", "max-age=7, s-maxage=\"9\"")], Some(9)),
            (&[("cache-control", "max-age=x")], Some(0)),
            (&[("cache-control", "public")], None),
            (&[("expires", "Wed, 21 Oct 2015 07:28:30 GMT")], Some(30)),
            (&[("expires", "Wed, 21 Oct 2015 07:27:00 GMT")], Some(0)),
            (&[("expires", "0")], Some(0)),
            (&[("x-accel-expires", "3"), ("cache-control", "max-age=7")], Some(3)),
        ];
        for (fields, expected) in cases {
            let headers = fields.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            assert_eq!(own_time(&headers, now), expected.map(Duration::from_secs), "{fields:?}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({"cache_strategy": "memory"}), "/cache_zone"),
            (json!({"cache_zone": ""}), "/cache_zone"),
            (json!({"cache_zone": "nowhere"}), "/cache_zone"),
            (json!({"cache_zone": "memory"}), "/cache_zone"),
            (json!({"cache_strategy": "redis"}), "/cache_strategy"),
            (memory(json!({"cache_key": []})), "/cache_key"),
            (memory(json!({"cache_key": ["$request_method"]})), "/cache_key/0"),
            (memory(json!({"cache_key": ["$uri-x"]})), "/cache_key/0"),
            (memory(json!({"cache_method": ["PUT"]})), "/cache_method/0"),
            (memory(json!({"cache_method": ["GET", "GET"]})), "/cache_method"),
            (memory(json!({"cache_http_status": [199]})), "/cache_http_status/0"),
            (memory(json!({"cache_http_status": []})), "/cache_http_status"),
            (memory(json!({"cache_ttl": 0})), "/cache_ttl"),
            (memory(json!({"no_cache": []})), "/no_cache"),
            (memory(json!({"cache_bypass": [""]})), "/cache_bypass/0"),
        ];
        for (settings, place) in cases {
            let errors = env().build::<ProxyCache>(&settings).err().unwrap_or_default();
            assert!(errors.iter().any(|error| error.pointer == place), "{settings}: {errors:?}");
        }
    }
}
