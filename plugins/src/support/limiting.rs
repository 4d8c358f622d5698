//! What the plugins that limit requests have in common: what is counted by, numbers that may be text with variables,
//! and what is answered.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use config::error::{ConfigError, ErrorKind};
use config::fields::{HttpStatus, WideText};
use config::template::{Piece, Template};
use config::var::{Var, Vars};
use http::StatusCode;
use layers::exchange::{Exchange, State};
use layers::limits::table::{Entry, Key, Owner, Table};
use layers::plugin::Flow;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Number, json};
use sha1::{Digest, Sha1};

use super::reply::{self, Canned};

/// How `key` is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyType {
    /// As the name of a variable.
    #[default]
    Var,
    /// As text with variables.
    VarCombination,
}

/// A text of a refusal.
pub type Message = WideText<1, 4096>;

/// 503, APISIX's status of refusals.
pub fn unavailable() -> HttpStatus {
    HttpStatus::new(503).unwrap_or_default()
}

/// What requests are counted by.
#[derive(Debug)]
pub enum KeySource {
    /// Nothing: all together.
    Constant(Box<str>),
    /// The client's address.
    RemoteAddr,
    /// A variable.
    Var(Var),
    /// Text with variables.
    Combination(Template),
    /// Text with variables; where none of them has a value, the rule does not apply.
    Optional(Template),
}

/// What a request is counted by.
pub enum Shown<'a> {
    /// The client's address.
    Address(std::net::IpAddr),
    /// Some text.
    Text(Cow<'a, str>),
}

impl KeySource {
    /// The `key` of a limit.
    pub fn new(key: &str, kind: KeyType) -> Self {
        match kind {
            KeyType::VarCombination => Self::Combination(Template::parse(key)),
            KeyType::Var => match Var::parse(key) {
                Var::RemoteAddr => Self::RemoteAddr,
                var => Self::Var(var),
            },
        }
    }

    /// The `key` of one of several `rules`.
    pub fn of_rule(key: &str) -> Self {
        Self::Optional(Template::parse(key))
    }

    /// What this request is counted by; nothing if the rule does not apply. The client's address stands for what has no
    /// value.
    pub fn shown<'a>(&'a self, x: &'a State) -> Option<Shown<'a>> {
        let found = match self {
            Self::Constant(key) => Some(Cow::Borrowed(&**key)),
            Self::RemoteAddr => None,
            Self::Var(var) => x.get(var),
            Self::Combination(template) => combined(template, x),
            Self::Optional(template) => return combined(template, x).map(Shown::Text),
        };
        Some(found.map_or(Shown::Address(x.remote_addr), Shown::Text))
    }
}

impl Shown<'_> {
    /// As a key of a table.
    pub fn key<E: Entry>(&self, table: &Table<E>, owner: Owner) -> Key {
        match self {
            Self::Address(address) => table.key(owner, address),
            Self::Text(text) => table.key(owner, &**text),
        }
    }

    /// As a key in Redis, behind the name of the limit.
    pub fn name(&self, prefix: &str) -> String {
        match self {
            Self::Address(address) => format!("{prefix}{address}"),
            Self::Text(text) => format!("{prefix}{text}"),
        }
    }
}

/// The text of a template of which at least one variable has a value.
fn combined<'t>(template: &'t Template, x: &State) -> Option<Cow<'t, str>> {
    let known = |piece: &Piece| match piece {
        Piece::Var(var, default) => default.is_some() || x.get(var).is_some(),
        Piece::Text(_) => false,
    };
    template.pieces().iter().any(known).then(|| template.to_text(x))
}

/// The name of a limit in Redis: the same for every gateway that has the same settings in the same place, and another
/// one as soon as they differ.
pub fn redis_prefix(plugin: &str, place: &str, settings: &str, rule: usize) -> String {
    let mut hash = Sha1::new();
    for part in [place, settings] {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    let hash = hash.finalize();
    let short = hash.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    format!("postern:{plugin}:{place}:{short:016x}:{rule}:")
}

/// A number, or text that gives one. `WHOLE` from 1, or any; `ZERO` may be.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Amount<const WHOLE: bool, const ZERO: bool> {
    /// A number.
    Number(Number),
    /// Text with variables.
    Text(String),
}

impl<const WHOLE: bool, const ZERO: bool> Amount<WHOLE, ZERO> {
    const RULE: &'static str = match (WHOLE, ZERO) {
        (true, false) => "a whole number from 1, or text that gives one",
        (true, true) => "a whole number from 0, or text that gives one",
        (false, false) => "a number above 0, or text that gives one",
        (false, true) => "a number from 0, or text that gives one",
    };

    fn fits(number: f64) -> bool {
        // Every JSON reader keeps whole numbers up to here.
        const LARGEST: f64 = 9_007_199_254_740_991.0;
        let whole = !WHOLE || (number.fract() == 0.0 && number <= LARGEST);
        number.is_finite() && whole && (number > 0.0 || (ZERO && number == 0.0))
    }

    fn read(text: &str) -> Option<f64> {
        text.trim().parse().ok().filter(|number| Self::fits(*number))
    }

    /// Made ready for requests.
    pub fn compile(&self) -> CompiledAmount<WHOLE, ZERO> {
        match self {
            Self::Number(number) => CompiledAmount::Known(number.as_f64().unwrap_or(1.0)),
            Self::Text(text) => {
                let template = Template::parse(text);
                match template.as_literal().and_then(Self::read) {
                    Some(number) => CompiledAmount::Known(number),
                    None => CompiledAmount::Asked(template),
                }
            }
        }
    }

    /// The number, if no request is asked for it.
    pub fn known(&self) -> Option<f64> {
        match self.compile() {
            CompiledAmount::Known(number) => Some(number),
            CompiledAmount::Asked(_) => None,
        }
    }
}

impl<'de, const WHOLE: bool, const ZERO: bool> Deserialize<'de> for Amount<WHOLE, ZERO> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Wire {
            Number(Number),
            Text(String),
        }
        match Wire::deserialize(deserializer) {
            Ok(Wire::Text(text)) => Ok(Self::Text(text)),
            Ok(Wire::Number(number)) if number.as_f64().is_some_and(Self::fits) => Ok(Self::Number(number)),
            _ => Err(de::Error::custom(format!("write {}", Self::RULE))),
        }
    }
}

impl<const WHOLE: bool, const ZERO: bool> JsonSchema for Amount<WHOLE, ZERO> {
    fn schema_name() -> Cow<'static, str> {
        format!("Amount{WHOLE}{ZERO}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let kind = if WHOLE { "integer" } else { "number" };
        if ZERO {
            return json_schema!({"type": [kind, "string"], "minimum": 0});
        }
        json_schema!({"type": [kind, "string"], "exclusiveMinimum": 0})
    }
}

/// An [`Amount`] for requests.
#[derive(Debug)]
pub enum CompiledAmount<const WHOLE: bool, const ZERO: bool> {
    /// The same for all.
    Known(f64),
    /// Each request is asked.
    Asked(Template),
}

impl<const WHOLE: bool, const ZERO: bool> CompiledAmount<WHOLE, ZERO> {
    /// The number for this request; nothing if there is none that fits.
    pub fn value(&self, x: &State) -> Option<f64> {
        match self {
            Self::Known(number) => Some(*number),
            Self::Asked(template) => Amount::<WHOLE, ZERO>::read(&template.to_text(x)),
        }
    }
}

/// What is answered when a request is not let through.
#[derive(Debug)]
pub struct Answers {
    plugin: &'static str,
    refusal: Canned,
    failure: Canned,
    degrades: bool,
    /// When a failure was told last, in seconds of the process, plus one.
    told: AtomicU64,
}

/// Seconds between two lines that tell of failures.
const BETWEEN_LINES: u64 = 10;

impl Answers {
    /// From the settings. `failure` is the text of the answer when nothing can be said about a request.
    pub fn new(
        plugin: &'static str,
        (code, message): (HttpStatus, Option<&Message>),
        failure: Option<&str>,
        degrades: bool,
    ) -> Self {
        let status = reply::status(code.get());
        let error = StatusCode::INTERNAL_SERVER_ERROR;
        Self {
            plugin,
            refusal: match message {
                Some(message) => Canned::json(status, &json!({ "error_msg": &**message })),
                None => Canned::status(status),
            },
            failure: match failure {
                Some(failure) => Canned::json(error, &json!({ "error_msg": failure })),
                None => Canned::status(error),
            },
            degrades,
            told: AtomicU64::new(0),
        }
    }

    /// Whether it is time for a line in the log: every request may fail.
    fn may_tell(&self) -> bool {
        static START: OnceLock<Instant> = OnceLock::new();
        let now = START.get_or_init(Instant::now).elapsed().as_secs() + 1;
        let told = self.told.load(Ordering::Relaxed);
        (told == 0 || now >= told + BETWEEN_LINES)
            && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The request is above the limit.
    pub fn refuse(&self) -> Flow {
        self.refusal.flow()
    }

    /// The limit does not know: `allow_degradation` decides.
    pub fn fail(&self, x: &Exchange, why: &dyn std::fmt::Display) -> Flow {
        if self.degrades {
            tracing::debug!(plugin = self.plugin, %why, "a request passes without its limit");
            return Flow::Next;
        }
        if self.may_tell() {
            tracing::warn!(plugin = self.plugin, host = %x.host, %why, "requests are refused because a limit says nothing about them");
        }
        self.failure.flow()
    }
}

/// An empty list where an element is needed: types of settings do not say so.
pub fn at_least_one(pointer: &str) -> ConfigError {
    ConfigError::invalid(pointer, "the list is empty: write at least one element")
}

/// Errors of settings that have both a limit of their own and `rules`, neither, or only parts. `own` are the fields of
/// the limit and whether they are there.
pub fn check_rules<'k>(
    own: &[(&'static str, bool)],
    rules: Option<impl Iterator<Item = &'k str>>,
) -> Vec<ConfigError> {
    let error = |kind| ConfigError::new("", kind);
    let Some(rules) = rules else {
        if own.iter().all(|(_, there)| !there) {
            let first = own.first().map_or("key", |(name, _)| name);
            return vec![error(ErrorKind::NoneOf { fields: vec![first, "rules"] })];
        }
        let missing = own.iter().filter(|(_, there)| !there);
        return missing.map(|(name, _)| error(ErrorKind::MissingField { field: (*name).into() })).collect();
    };
    let both = own.iter().filter(|(_, there)| *there);
    let mut errors: Vec<_> =
        both.map(|(one, _)| error(ErrorKind::Exclusive { one, other: "rules" })).take(1).collect();
    let mut seen = Vec::new();
    for (index, key) in rules.enumerate() {
        if seen.contains(&key) {
            errors.push(ConfigError::new(format!("/rules/{index}/key"), ErrorKind::Duplicate));
        }
        seen.push(key);
    }
    if seen.is_empty() {
        errors.push(at_least_one("/rules"));
    }
    errors
}
