//! Values that several resources share: names, labels, hosts, addresses, time-outs, bounded numbers.
//!
//! Each type holds only what the rules of APISIX allow, so whoever gets one need not check it again, and each
//! describes its rule to the JSON Schema in the same place. What is rare in a resource is one pointer wide,
//! because a gateway keeps a hundred thousand of them.

use std::borrow::{Borrow, Cow};
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::ops::Deref;
use std::time::Duration;

use indexmap::IndexMap;
use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::id::Id;

/// Seconds since 1970, as a store writes them into an object.
pub type Timestamp = NonZeroU64;
/// A name people give to an object: 1 to 256 characters.
pub type Name = Text<1, 256>;
/// A description: up to 256 characters.
pub type Desc = Text<0, 256>;

/// Text of `MIN` to `MAX` characters, one pointer wide.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<const MIN: usize, const MAX: usize>(Box<Box<str>>);

impl<const MIN: usize, const MAX: usize> Text<MIN, MAX> {
    /// The text; nothing if its length is outside the limits.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let fits = (MIN..=MAX).contains(&text.chars().count());
        fits.then(|| Text(Box::new(text.into())))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A text that is written in the code and known to be right.
    pub(crate) fn of_constant(text: &'static str) -> Self {
        Text(Box::new(text.into()))
    }
}

impl<const MIN: usize, const MAX: usize> Deref for Text<MIN, MAX> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MIN: usize, const MAX: usize> fmt::Debug for Text<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self.0, f)
    }
}

impl<const MIN: usize, const MAX: usize> fmt::Display for Text<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const MIN: usize, const MAX: usize> Serialize for Text<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de, const MIN: usize, const MAX: usize> Deserialize<'de> for Text<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor {
            expected: format_args!("text of {MIN} to {MAX} characters"),
            parse: Text::new,
        })
    }
}

impl<const MIN: usize, const MAX: usize> JsonSchema for Text<MIN, MAX> {
    fn schema_name() -> Cow<'static, str> {
        format!("Text{MIN}To{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        if MIN == 0 {
            return json_schema!({"type": "string", "maxLength": MAX});
        }
        json_schema!({"type": "string", "minLength": MIN, "maxLength": MAX})
    }
}

/// Text of `MIN` to `MAX` characters, for fields that are usually there.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct WideText<const MIN: usize, const MAX: usize>(Box<str>);

impl<const MIN: usize, const MAX: usize> WideText<MIN, MAX> {
    /// The text; nothing if its length is outside the limits.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        (MIN..=MAX).contains(&text.chars().count()).then(|| WideText(text.into()))
    }
}

impl<const MIN: usize, const MAX: usize> Deref for WideText<MIN, MAX> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MIN: usize, const MAX: usize> fmt::Debug for WideText<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de, const MIN: usize, const MAX: usize> Deserialize<'de> for WideText<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor {
            expected: format_args!("text of {MIN} to {MAX} characters"),
            parse: WideText::new,
        })
    }
}

impl<const MIN: usize, const MAX: usize> JsonSchema for WideText<MIN, MAX> {
    fn schema_name() -> Cow<'static, str> {
        Text::<MIN, MAX>::schema_name()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Text::<MIN, MAX>::json_schema(generator)
    }
}

/// The address of a service: `https://host:port/path`, HTTP or HTTPS.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Url(Box<str>);

impl Url {
    /// The address; nothing if it has another scheme or no host.
    #[must_use]
    pub fn new(text: &str) -> Option<Url> {
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
        let host = rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[');
        let valid = host && !rest.contains(|c: char| c.is_whitespace() || c.is_control());
        valid.then(|| Url(text.into()))
    }

    /// An address that is written in the code and known to be right.
    pub(crate) fn constant(text: &'static str) -> Url {
        Url(text.into())
    }
}

impl Deref for Url {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

const URL_RULE: &str = "an address that begins with http:// or https://";

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor { expected: URL_RULE, parse: Url::new })
    }
}

impl JsonSchema for Url {
    fn schema_name() -> Cow<'static, str> {
        "Url".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "pattern": r"^https?://[0-9A-Za-z\[]\S*$", "x-expected": URL_RULE,
        })
    }
}

/// Attributes people attach to an object, for finding it and for access rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Labels(IndexMap<Box<str>, LabelValue>);

impl Deref for Labels {
    type Target = IndexMap<Box<str>, LabelValue>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl JsonSchema for Labels {
    fn schema_name() -> Cow<'static, str> {
        "Labels".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "additionalProperties": generator.subschema_for::<LabelValue>(),
        })
    }
}

/// The value of a label: 1 to 256 characters, no white space.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct LabelValue(Box<str>);

impl LabelValue {
    fn new(value: &str) -> Option<LabelValue> {
        let length = value.chars().count();
        let valid = (1..=256).contains(&length) && !value.contains(char::is_whitespace);
        valid.then(|| LabelValue(value.into()))
    }
}

impl Deref for LabelValue {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for LabelValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

const LABEL_RULE: &str = "a label value: 1 to 256 characters without white space";

impl<'de> Deserialize<'de> for LabelValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor { expected: LABEL_RULE, parse: LabelValue::new })
    }
}

impl JsonSchema for LabelValue {
    fn schema_name() -> Cow<'static, str> {
        "LabelValue".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^\S+$", "x-expected": LABEL_RULE,
        })
    }
}

/// A host name, an address, or a pattern of them: `foo.com`, `*.foo.com`, `*`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Host(Box<str>);

impl Host {
    /// The host; nothing if `text` has a character that no host has, or a `*` that is not at the start.
    #[must_use]
    pub fn new(text: &str) -> Option<Host> {
        let rest = text.strip_prefix('*').unwrap_or(text);
        let valid = !text.is_empty()
            && rest
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'[' | b']' | b':'));
        valid.then(|| Host(text.into()))
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it begins with `*`.
    #[must_use]
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with('*')
    }
}

impl Deref for Host {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Host {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const HOST_RULE: &str = "a host name or an address, with `*` at the start or not at all";

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor { expected: HOST_RULE, parse: Host::new })
    }
}

impl JsonSchema for Host {
    fn schema_name() -> Cow<'static, str> {
        "Host".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^(\*|\*?[0-9a-zA-Z_.\[\]:-]+)$",
            "x-expected": HOST_RULE,
        })
    }
}

/// An address or a network: `10.0.0.1`, `10.0.0.0/8`, `::1`, `fd00::/8`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    net: IpNet,
    /// Written without a prefix length, and printed so.
    bare: bool,
}

impl Cidr {
    /// The network; nothing if `text` is neither an address nor a network.
    #[must_use]
    pub fn new(text: &str) -> Option<Cidr> {
        if let Ok(addr) = text.parse::<IpAddr>() {
            return Some(Cidr { net: addr.into(), bare: true });
        }
        text.parse().ok().map(|net| Cidr { net, bare: false })
    }

    /// The network, of full length for a single address.
    #[must_use]
    pub fn net(&self) -> IpNet {
        self.net
    }

    /// Whether the address is in the network.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.net.contains(&addr)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bare {
            return write!(f, "{}", self.net.addr());
        }
        write!(f, "{}", self.net)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

const CIDR_RULE: &str = "an IPv4 or IPv6 address, or a network such as 10.0.0.0/8";

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StrVisitor { expected: CIDR_RULE, parse: Cidr::new })
    }
}

impl JsonSchema for Cidr {
    fn schema_name() -> Cow<'static, str> {
        "Cidr".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "x-expected": CIDR_RULE,
            "anyOf": [
                {"title": "IPv4", "format": "ipv4"},
                {"title": "IPv6", "format": "ipv6"},
                {"title": "IPv4 network", "pattern": r"^\d{1,3}(\.\d{1,3}){3}/([12]?\d|3[0-2])$"},
                {"title": "IPv6 network", "pattern": r"^[0-9a-fA-F:.]*:[0-9a-fA-F:.]*/(\d{1,2}|1[01]\d|12[0-8])$"},
            ],
        })
    }
}

/// A whole number from `MIN` to `MAX`, `DEFAULT` where nothing is written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Int<const MIN: u32, const MAX: u32, const DEFAULT: u32 = MIN>(u32);

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> Int<MIN, MAX, DEFAULT> {
    /// The number; nothing if it is outside the limits.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number < MIN || number > MAX { None } else { Some(Int(number)) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> Default for Int<MIN, MAX, DEFAULT> {
    fn default() -> Self {
        Int(DEFAULT)
    }
}

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> fmt::Debug for Int<MIN, MAX, DEFAULT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de, const MIN: u32, const MAX: u32, const DEFAULT: u32> Deserialize<'de> for Int<MIN, MAX, DEFAULT> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u32::deserialize(deserializer)?;
        Int::new(number).ok_or_else(|| {
            de::Error::invalid_value(Unexpected::Unsigned(number.into()), &&*format!("{MIN} to {MAX}"))
        })
    }
}

impl<const MIN: u32, const MAX: u32, const DEFAULT: u32> JsonSchema for Int<MIN, MAX, DEFAULT> {
    fn schema_name() -> Cow<'static, str> {
        format!("Int{MIN}To{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        if MAX == u32::MAX {
            return json_schema!({"type": "integer", "minimum": MIN});
        }
        json_schema!({"type": "integer", "minimum": MIN, "maximum": MAX})
    }
}

/// A length of time in seconds, fractions allowed; more than 0 unless `ZERO`.
#[derive(Clone, Copy, PartialEq)]
pub struct Seconds<const ZERO: bool = false>(f64);

/// The longest time that can be written: about 31 years.
const MAX_SECONDS: f64 = 1e9;

impl<const ZERO: bool> Seconds<ZERO> {
    /// The time; nothing if it is out of range or no number.
    #[must_use]
    pub fn new(seconds: f64) -> Option<Self> {
        let valid = seconds <= MAX_SECONDS && (seconds > 0.0 || (ZERO && seconds == 0.0));
        valid.then_some(Seconds(seconds))
    }

    /// As a number of seconds.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        self.0
    }

    /// As a duration.
    #[must_use]
    pub fn duration(self) -> Duration {
        // In range by construction.
        Duration::try_from_secs_f64(self.0).unwrap_or_default()
    }

    const RULE: &'static str =
        if ZERO { "a number of seconds from 0" } else { "a number of seconds, more than 0" };
}

impl<const ZERO: bool> Seconds<ZERO> {
    /// A default that is written in the code.
    pub(crate) const fn whole(seconds: u32) -> Self {
        Seconds(seconds as f64)
    }
}

impl<const ZERO: bool> fmt::Debug for Seconds<ZERO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0)
    }
}

impl<const ZERO: bool> Serialize for Seconds<ZERO> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Whole seconds are written back as people write them: 60, not 60.0.
        if self.0.fract() == 0.0 {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "whole, not negative and below the maximum"
            )]
            return serializer.serialize_u64(self.0 as u64);
        }
        serializer.serialize_f64(self.0)
    }
}

impl<'de, const ZERO: bool> Deserialize<'de> for Seconds<ZERO> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        Seconds::new(seconds).ok_or_else(|| de::Error::invalid_value(Unexpected::Float(seconds), &Self::RULE))
    }
}

impl<const ZERO: bool> JsonSchema for Seconds<ZERO> {
    fn schema_name() -> Cow<'static, str> {
        if ZERO { "SecondsFromZero".into() } else { "Seconds".into() }
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        if ZERO {
            return json_schema!({"type": "number", "minimum": 0, "maximum": 1_000_000_000});
        }
        json_schema!({"type": "number", "exclusiveMinimum": 0, "maximum": 1_000_000_000})
    }
}

/// Time limits of one attempt to reach an upstream node.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeout {
    /// Time to establish a connection, in seconds.
    pub connect: Seconds,
    /// Time between two successive writes to the upstream, in seconds.
    pub send: Seconds,
    /// Time between two successive reads from the upstream, in seconds.
    pub read: Seconds,
}

impl Default for Timeout {
    fn default() -> Timeout {
        Timeout { connect: Seconds::whole(60), send: Seconds::whole(60), read: Seconds::whole(60) }
    }
}

/// A list in which no element is written twice, of at least `MIN` elements.
pub type Distinct<T, const MIN: usize = 1> = List<T, MIN, true>;

/// A list of at least `MIN` elements, `UNIQUE` if none may be written twice.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct List<T, const MIN: usize = 1, const UNIQUE: bool = false>(Vec<T>);

impl<T: Eq + Hash, const MIN: usize, const UNIQUE: bool> List<T, MIN, UNIQUE> {
    /// The list; nothing if it is too short or has an element twice.
    #[must_use]
    pub fn new(list: Vec<T>) -> Option<Self> {
        (list.len() >= MIN && (!UNIQUE || is_distinct(&list))).then_some(List(list))
    }
}

impl<T, const MIN: usize, const UNIQUE: bool> List<T, MIN, UNIQUE> {
    /// A list that is written in the code and known to be right.
    pub fn of_constants(list: Vec<T>) -> Self {
        List(list)
    }
}

fn is_distinct<T: Eq + Hash>(list: &[T]) -> bool {
    // A look at all pairs is cheaper than hashing for the lists people write by hand.
    if list.len() <= 16 {
        return list.iter().enumerate().all(|(i, item)| !list.iter().take(i).any(|earlier| earlier == item));
    }
    let mut seen = HashSet::with_capacity(list.len());
    list.iter().all(|item| seen.insert(item))
}

impl<T, const MIN: usize, const UNIQUE: bool> Deref for List<T, MIN, UNIQUE> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<'a, T, const MIN: usize, const UNIQUE: bool> IntoIterator for &'a List<T, MIN, UNIQUE> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: fmt::Debug, const MIN: usize, const UNIQUE: bool> fmt::Debug for List<T, MIN, UNIQUE> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de, T, const MIN: usize, const UNIQUE: bool> Deserialize<'de> for List<T, MIN, UNIQUE>
where
    T: Deserialize<'de> + Eq + Hash,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut list = Vec::<T>::deserialize(deserializer)?;
        list.shrink_to_fit();
        if list.len() < MIN {
            return Err(de::Error::invalid_length(list.len(), &&*format!("at least {MIN}")));
        }
        List::new(list).ok_or_else(|| de::Error::custom("an element is written twice"))
    }
}

impl<T: JsonSchema, const MIN: usize, const UNIQUE: bool> JsonSchema for List<T, MIN, UNIQUE> {
    fn schema_name() -> Cow<'static, str> {
        format!("ListOf{MIN}{}{}", if UNIQUE { "Distinct" } else { "" }, T::schema_name()).into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = json_schema!({"type": "array", "items": generator.subschema_for::<T>()});
        if MIN > 0 {
            schema.insert("minItems".to_owned(), MIN.into());
        }
        if UNIQUE {
            schema.insert("uniqueItems".to_owned(), true.into());
        }
        schema
    }
}

/// An HTTP status of an answer, from 200 to 599.
pub type HttpStatus = Int<200, 599>;

/// A request method that a route can be limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Method {
    Get,
    Post,
    Put,
    Delete,
    Patch,
    Head,
    Options,
    Connect,
    Trace,
    Purge,
}

impl Method {
    /// As it stands in a request line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Delete => "DELETE",
            Method::Patch => "PATCH",
            Method::Head => "HEAD",
            Method::Options => "OPTIONS",
            Method::Connect => "CONNECT",
            Method::Trace => "TRACE",
            Method::Purge => "PURGE",
        }
    }
}

/// Whether an object is in use: 1, or switched off: 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Status {
    /// Kept, but not used.
    Off,
    /// In use.
    #[default]
    On,
}

impl Status {
    /// Whether the object is in use.
    #[must_use]
    pub fn is_on(self) -> bool {
        self == Status::On
    }
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(u8::from(self.is_on()))
    }
}

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u64::deserialize(deserializer)? {
            0 => Ok(Status::Off),
            1 => Ok(Status::On),
            other => Err(de::Error::invalid_value(Unexpected::Unsigned(other), &"1 or 0")),
        }
    }
}

impl JsonSchema for Status {
    fn schema_name() -> Cow<'static, str> {
        "Status".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "integer", "enum": [1, 0]})
    }
}

/// The place of `id` in an object. It is checked against the key the object is stored under and not kept, for
/// the key is the id; [`crate::Resource::to_value`] writes it back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct OwnId;

impl OwnId {
    /// For `skip_serializing_if`: an id is never written from here.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
    pub(crate) fn is_elsewhere(&self) -> bool {
        true
    }
}

impl<'de> Deserialize<'de> for OwnId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyId;

        impl Visitor<'_> for AnyId {
            type Value = OwnId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id: text, or an integer from 1")
            }

            fn visit_str<E: de::Error>(self, _: &str) -> Result<OwnId, E> {
                Ok(OwnId)
            }

            fn visit_u64<E: de::Error>(self, _: u64) -> Result<OwnId, E> {
                Ok(OwnId)
            }
        }

        deserializer.deserialize_any(AnyId)
    }
}

impl JsonSchema for OwnId {
    fn schema_name() -> Cow<'static, str> {
        "OwnId".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Id::json_schema(generator)
    }
}

/// Settings of plugins by the name of the plugin, in the order they were written.
///
/// Printing one for debugging shows the names only, because settings carry secrets.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Plugins(IndexMap<String, Value>);

impl Plugins {
    /// No plugin at all.
    #[must_use]
    pub fn new() -> Plugins {
        Plugins::default()
    }
}

impl Deref for Plugins {
    type Target = IndexMap<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl std::ops::DerefMut for Plugins {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl FromIterator<(String, Value)> for Plugins {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(plugins: I) -> Plugins {
        Plugins(plugins.into_iter().collect())
    }
}

impl<'a> IntoIterator for &'a Plugins {
    type Item = (&'a String, &'a Value);
    type IntoIter = indexmap::map::Iter<'a, String, Value>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl fmt::Debug for Plugins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl JsonSchema for Plugins {
    fn schema_name() -> Cow<'static, str> {
        "Plugins".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object"})
    }
}

/// Reads a string through a function that says whether it obeys the rule.
pub(crate) struct StrVisitor<E, F> {
    /// The rule in words.
    pub expected: E,
    /// Nothing if the text breaks the rule.
    pub parse: F,
}

impl<T, E: fmt::Display, F: Fn(&str) -> Option<T>> Visitor<'_> for StrVisitor<E, F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expected.fmt(f)
    }

    fn visit_str<R: de::Error>(self, text: &str) -> Result<T, R> {
        (self.parse)(text).ok_or_else(|| R::invalid_value(Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::size_of;

    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;

    fn reads<T: DeserializeOwned>(value: &Value) -> bool {
        T::deserialize(value).is_ok()
    }

    #[test]
    fn every_field_type_holds_only_what_its_rule_allows() {
        let long = |n: usize| json!("é".repeat(n));
        for (reads, value, valid) in [
            (reads::<Name> as fn(&Value) -> bool, long(256), true),
            (reads::<Name>, long(257), false),
            (reads::<Name>, json!(""), false),
            (reads::<Desc>, json!(""), true),
            (reads::<Labels>, json!({"a": "b"}), true),
            (reads::<Labels>, json!({"a": ""}), false),
            (reads::<Labels>, json!({"a": "b\tc"}), false),
            (reads::<Host>, json!("*.foo-bar_1.com"), true),
            (reads::<Host>, json!("*"), true),
            (reads::<Host>, json!("[::1]"), true),
            (reads::<Host>, json!("foo.*"), false),
            (reads::<Host>, json!("**"), false),
            (reads::<Host>, json!("a/b"), false),
            (reads::<Host>, json!(""), false),
            (reads::<Cidr>, json!("1.2.3.4"), true),
            (reads::<Cidr>, json!("1.2.3.4/0"), true),
            (reads::<Cidr>, json!("1.2.3.4/33"), false),
            (reads::<Cidr>, json!("::/0"), true),
            (reads::<Cidr>, json!("foo.com"), false),
            (reads::<Int<1, 3>>, json!(3), true),
            (reads::<Int<1, 3>>, json!(4), false),
            (reads::<Int<1, 3>>, json!(0), false),
            (reads::<Int<1, 3>>, json!(1.5), false),
            (reads::<Seconds>, json!(0.001), true),
            (reads::<Seconds>, json!(0), false),
            (reads::<Seconds>, json!(-1), false),
            (reads::<Seconds>, json!(1e10), false),
            (reads::<Seconds<true>>, json!(0), true),
            (reads::<Distinct<u8>>, json!([1, 2]), true),
            (reads::<Distinct<u8>>, json!([1, 1]), false),
            (reads::<Distinct<u8>>, json!([]), false),
            (reads::<Distinct<u8, 0>>, json!([]), true),
            (reads::<List<u8>>, json!([1, 1]), true),
            (reads::<List<u8>>, json!([]), false),
            (reads::<Distinct<u8>>, json!((0..100).collect::<Vec<_>>()), true),
            (reads::<Distinct<u8>>, json!((0..100).chain([50]).collect::<Vec<_>>()), false),
            (reads::<Status>, json!(1), true),
            (reads::<Status>, json!(true), false),
            (reads::<Url>, json!("https://[::1]:8200/v1"), true),
            (reads::<Url>, json!("ftp://a"), false),
            (reads::<Url>, json!("http://"), false),
        ] {
            assert_eq!(reads(&value), valid, "{value}");
        }
    }

    #[test]
    fn values_are_written_as_people_write_them() {
        for (value, written) in [(json!(60), "60"), (json!(60.0), "60"), (json!(0.5), "0.5")] {
            assert_eq!(
                serde_json::to_string(&Seconds::<false>::deserialize(&value).unwrap()).unwrap(),
                written
            );
        }
        for text in ["10.0.0.1", "10.1.2.3/8", "::1", "fd00::/8"] {
            assert_eq!(Cidr::new(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn absent_fields_are_small() {
        assert_eq!(size_of::<Option<Name>>(), 8);
        assert_eq!(size_of::<Option<Box<Plugins>>>(), 8);
        assert_eq!(size_of::<Option<Host>>(), 16);
        assert_eq!(size_of::<Option<Timestamp>>(), 8);
        assert_eq!(size_of::<OwnId>(), 0);
    }
}
