//! Reading `config.yaml` piece by piece, with every error told.
//!
//! A [`Section`] is one object of the file. Each look-up says which keys exist, so what is left over is unknown, and the
//! nearest known name can be offered. A wrong value is noted and read as absent: the caller goes on with its default and
//! finds the next error.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::Notice;
use super::units::{parse_duration, parse_size};
use crate::document::Document;
use crate::error::{ConfigError, ErrorKind, escape, nearest};

/// What is collected while a file is read.
pub(super) struct Reader<'a> {
    document: &'a Document,
    errors: RefCell<Vec<ConfigError>>,
    notices: RefCell<Vec<Notice>>,
}

/// One object of the file, present or not.
pub(super) struct Section<'a> {
    reader: &'a Reader<'a>,
    members: Option<&'a Map<String, Value>>,
    pointer: String,
    known: RefCell<Vec<&'static str>>,
}

/// One element of an array, with its pointer.
pub(super) struct Element<'a> {
    pub(super) value: &'a Value,
    pub(super) pointer: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(document: &'a Document) -> Self {
        Reader { document, errors: RefCell::default(), notices: RefCell::default() }
    }

    /// The whole file.
    pub(super) fn root(&'a self) -> Section<'a> {
        let members = match self.document.value() {
            Value::Null => None,
            Value::Object(members) => Some(members),
            other => {
                self.wrong_type("", other, "an object with the keys `apisix`, `nginx_config`, `deployment`");
                None
            }
        };
        Section { reader: self, members, pointer: String::new(), known: RefCell::default() }
    }

    pub(super) fn error(&self, error: ConfigError) {
        self.errors.borrow_mut().push(error);
    }

    fn wrong_type(&self, pointer: &str, value: &Value, expected: &str) {
        let kind = ErrorKind::WrongType { found: type_name(value), expected: expected.to_owned() };
        self.error(ConfigError::new(pointer, kind));
    }

    fn notice(&self, pointer: String, reason: &'static str) {
        let (line, _) = self.document.locate(&pointer);
        self.notices.borrow_mut().push(Notice { pointer, line, reason });
    }

    pub(super) fn into_parts(self) -> (Vec<ConfigError>, Vec<Notice>) {
        (self.errors.into_inner(), self.notices.into_inner())
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl<'a> Section<'a> {
    /// The pointer of a member; of the object itself for no key.
    pub(super) fn at(&self, key: &str) -> String {
        if key.is_empty() {
            return self.pointer.clone();
        }
        format!("{}/{}", self.pointer, escape(key))
    }

    /// The value of a key that exists; null is as good as absent.
    pub(super) fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.known.borrow_mut().push(key);
        self.members?.get(key).filter(|value| !value.is_null())
    }

    /// The members, for what is kept as it is written.
    pub(super) fn members(&self) -> Option<&'a Map<String, Value>> {
        self.members
    }

    /// Whether the key is written, even as null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.members.is_some_and(|members| members.contains_key(key))
    }

    pub(super) fn is_present(&self) -> bool {
        self.members.is_some()
    }

    pub(super) fn error(&self, key: &str, kind: ErrorKind) {
        self.reader.error(ConfigError::new(self.at(key), kind));
    }

    pub(super) fn invalid(&self, key: &str, problem: impl Into<String>) {
        self.reader.error(ConfigError::invalid(self.at(key), problem));
    }

    /// An error somewhere below a key.
    pub(super) fn below(&self, key: &str, error: ConfigError) {
        self.reader.error(error.under(&self.at(key)));
    }

    fn wrong_type(&self, key: &str, value: &Value, expected: &str) {
        self.reader.wrong_type(&self.at(key), value, expected);
    }

    /// An object below this one.
    pub(super) fn section(&self, key: &'static str) -> Section<'a> {
        let members = match self.get(key) {
            Some(Value::Object(members)) => Some(members),
            // An empty Lua table has no type: `{}` and `[]` are the same to APISIX.
            Some(Value::Array(items)) if items.is_empty() => None,
            Some(other) => {
                self.wrong_type(key, other, "an object");
                None
            }
            None => None,
        };
        Section { reader: self.reader, members, pointer: self.at(key), known: RefCell::default() }
    }

    /// `true`, `false`, and nginx's `"on"`, `"off"`.
    pub(super) fn flag(&self, key: &'static str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(flag) => Some(*flag),
            Value::String(word) if word == "on" || word == "true" => Some(true),
            Value::String(word) if word == "off" || word == "false" => Some(false),
            other => {
                self.wrong_type(key, other, "true or false");
                None
            }
        }
    }

    pub(super) fn text(&self, key: &'static str) -> Option<&'a str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            other => {
                self.wrong_type(key, other, "text");
                None
            }
        }
    }

    /// Text that says something: `""` is as good as absent.
    pub(super) fn word(&self, key: &'static str) -> Option<&'a str> {
        self.text(key).filter(|text| !text.is_empty())
    }

    /// Text or a number as it is written: passwords and names of digits are numbers to YAML.
    pub(super) fn loose_text(&self, key: &'static str) -> Option<String> {
        match self.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            other => {
                self.wrong_type(key, other, "text");
                None
            }
        }
    }

    pub(super) fn path(&self, key: &'static str) -> Option<PathBuf> {
        self.word(key).map(PathBuf::from)
    }

    /// A whole number from `least` to `most`.
    pub(super) fn number(&self, key: &'static str, least: u64, most: u64) -> Option<u64> {
        let value = self.get(key)?;
        let expected = || {
            if most == u64::MAX {
                format!("a whole number from {least}")
            } else {
                format!("a number from {least} to {most}")
            }
        };
        let Value::Number(number) = value else {
            self.wrong_type(key, value, &expected());
            return None;
        };
        match number.as_u64() {
            Some(count) if (least..=most).contains(&count) => Some(count),
            _ => {
                let kind =
                    ErrorKind::OutOfRange { what: "value", found: number.to_string(), allowed: expected() };
                self.error(key, kind);
                None
            }
        }
    }

    /// As [`Section::number`], for numbers of 32 bits.
    pub(super) fn count(&self, key: &'static str, least: u32) -> Option<u32> {
        self.number(key, least.into(), u32::MAX.into()).and_then(|count| u32::try_from(count).ok())
    }

    pub(super) fn port(&self, key: &'static str) -> Option<u16> {
        self.number(key, 1, 65535).and_then(|port| u16::try_from(port).ok())
    }

    /// A number of bytes, or text with a unit: `16k`, `10m`, `1g`.
    pub(super) fn size(&self, key: &'static str) -> Option<u64> {
        let value = self.get(key)?;
        let size = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => parse_size(text),
            _ => None,
        };
        if size.is_none() {
            self.bad_format(key, value, "a size: a number of bytes, or one with the unit k, m or g (`16k`)");
        }
        size
    }

    /// A number of seconds, or text with units: `500ms`, `60s`, `1m30s`, `1h`.
    pub(super) fn duration(&self, key: &'static str) -> Option<Duration> {
        let value = self.get(key)?;
        let duration = match value {
            Value::Number(number) => {
                number.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            }
            Value::String(text) => parse_duration(text),
            _ => None,
        };
        if duration.is_none() {
            self.bad_format(
                key,
                value,
                "a time: a number of seconds, or one with the unit ms, s, m, h or d (`60s`)",
            );
        }
        duration
    }

    fn bad_format(&self, key: &str, value: &Value, expected: &str) {
        let found = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.error(key, ErrorKind::BadFormat { found, expected: expected.to_owned() });
    }

    pub(super) fn ip(&self, key: &'static str) -> Option<IpAddr> {
        let text = self.word(key)?;
        let ip = parse_ip(text);
        if ip.is_none() {
            let expected = "an IP address".to_owned();
            self.error(key, ErrorKind::BadFormat { found: text.to_owned(), expected });
        }
        ip
    }

    /// One of some words.
    pub(super) fn one_of<T: Copy>(&self, key: &'static str, words: &[(&'static str, T)]) -> Option<T> {
        let text = self.text(key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let allowed: Vec<String> = words.iter().map(|(word, _)| (*word).to_owned()).collect();
            let near = nearest(text, words.iter().map(|(word, _)| *word)).map(str::to_owned);
            self.error(key, ErrorKind::NotOneOf { found: text.to_owned(), allowed, nearest: near });
        }
        found
    }

    /// The elements of an array; a single value stands for an array of one if `or_single` says so.
    fn elements(&self, key: &'static str, or_single: bool) -> Option<Vec<Element<'a>>> {
        let value = self.get(key)?;
        match value {
            Value::Array(items) => {
                let element =
                    |(index, value)| Element { value, pointer: format!("{}/{index}", self.at(key)) };
                Some(items.iter().enumerate().map(element).collect())
            }
            Value::Object(members) if members.is_empty() => Some(Vec::new()),
            value if or_single => Some(vec![Element { value, pointer: self.at(key) }]),
            other => {
                self.wrong_type(key, other, "an array");
                None
            }
        }
    }

    pub(super) fn list(&self, key: &'static str) -> Option<Vec<Element<'a>>> {
        self.elements(key, false)
    }

    pub(super) fn list_or_single(&self, key: &'static str) -> Option<Vec<Element<'a>>> {
        self.elements(key, true)
    }

    pub(super) fn texts(&self, key: &'static str) -> Option<Vec<String>> {
        let elements = self.list(key)?;
        Some(
            elements
                .into_iter()
                .filter_map(|element| self.element_text(&element).map(str::to_owned))
                .collect(),
        )
    }

    pub(super) fn element_text(&self, element: &Element<'a>) -> Option<&'a str> {
        let text = element.value.as_str();
        if text.is_none() {
            self.reader.wrong_type(&element.pointer, element.value, "text");
        }
        text
    }

    pub(super) fn element_invalid(&self, element: &Element<'a>, problem: impl Into<String>) {
        self.reader.error(ConfigError::invalid(element.pointer.as_str(), problem));
    }

    /// An element that is an object.
    pub(super) fn element_section(&self, element: &Element<'a>, expected: &str) -> Option<Section<'a>> {
        let Value::Object(members) = element.value else {
            self.reader.wrong_type(&element.pointer, element.value, expected);
            return None;
        };
        let pointer = element.pointer.clone();
        Some(Section { reader: self.reader, members: Some(members), pointer, known: RefCell::default() })
    }

    /// Addresses and CIDRs. nginx's `unix:` names no address and is passed over.
    pub(super) fn networks(&self, key: &'static str) -> Option<Vec<IpNet>> {
        let elements = self.list(key)?;
        let mut networks = Vec::with_capacity(elements.len());
        for element in elements {
            let Some(text) = self.element_text(&element) else { continue };
            if text == "unix:" {
                continue;
            }
            match text.parse().ok().or_else(|| parse_ip(text).map(IpNet::from)) {
                Some(network) => networks.push(network),
                None => self.element_invalid(&element, format!("`{text}` is not an IP address or CIDR")),
            }
        }
        Some(networks)
    }

    /// `{ip, port}`.
    pub(super) fn socket(&self, key: &'static str, default: SocketAddr) -> SocketAddr {
        let section = self.section(key);
        let ip = section.ip("ip").unwrap_or(default.ip());
        let port = section.port("port").unwrap_or(default.port());
        section.finish();
        SocketAddr::new(ip, port)
    }

    /// A key of APISIX that changes nothing here: told once at start.
    pub(super) fn not_applicable(&self, key: &'static str, reason: &'static str) {
        if self.get(key).is_some() {
            self.reader.notice(self.at(key), reason);
        }
    }

    /// As [`Section::not_applicable`], said where something was asked for that is not done.
    pub(super) fn notice(&self, key: &str, reason: &'static str) {
        self.reader.notice(self.at(key), reason);
    }

    /// As [`Section::notice`], for a place in the file.
    pub(super) fn notice_at(&self, pointer: String, reason: &'static str) {
        self.reader.notice(pointer, reason);
    }

    /// A key of older releases.
    pub(super) fn moved(&self, key: &'static str, to: &'static str) {
        if self.get(key).is_some() {
            let kind = ErrorKind::Unsupported {
                what: format!("`{key}` in this place"),
                instead: format!("it belongs to APISIX 2; write `{to}`"),
            };
            self.error(key, kind);
        }
    }

    /// Everything that was not asked for is unknown.
    pub(super) fn finish(self) {
        self.report_unknown();
    }

    /// As [`Section::finish`], for a section that is borrowed.
    pub(super) fn report_unknown(&self) {
        self.finish_with(|section, key, near| {
            let nearest = near.map(str::to_owned);
            section.error(key, ErrorKind::UnknownField { field: key.to_owned(), nearest });
        });
    }

    /// As [`Section::finish`], but a key that resembles no known one is only noted.
    pub(super) fn finish_leniently(self, reason: &'static str) {
        self.finish_with(|section, key, near| match near {
            Some(near) => {
                let nearest = Some(near.to_owned());
                section.error(key, ErrorKind::UnknownField { field: key.to_owned(), nearest });
            }
            None => section.notice(key, reason),
        });
    }

    fn finish_with(&self, unknown: impl Fn(&Self, &str, Option<&'static str>)) {
        let known = self.known.borrow();
        for key in self.members.into_iter().flat_map(Map::keys) {
            if !known.iter().any(|name| name == key) {
                unknown(self, key, nearest(key, known.iter().copied()));
            }
        }
    }
}

/// An address, IPv6 also in brackets.
pub(super) fn parse_ip(text: &str) -> Option<IpAddr> {
    let text = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text);
    text.parse().ok()
}
