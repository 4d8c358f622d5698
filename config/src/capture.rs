//! What is captured of a workload's traffic: `capture` in sidecar.yaml and the options of `postern sidecar capture`.
//!
//! Everything is a number, a range or a network before it gets near a ruleset; nothing of it is ever text that a tool of
//! the system could read as something else.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::document::{Document, LocatedError};
use crate::error::ConfigError;
use crate::typed;

/// The uid of the sidecar where nothing else is said.
pub const UID: u32 = 2102;

/// What is captured, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Capture {
    /// How inbound connections are handed over.
    pub mode: Mode,
    /// The one direction that is captured; both if it is absent. For a sidecar, `inbound.transparent` and
    /// `outbound.transparent` say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only: Option<Direction>,
    /// Where the sidecar takes captured inbound connections.
    pub inbound_port: NonZeroU16,
    /// Where the sidecar takes captured outbound connections. It listens on loopback alone.
    pub outbound_port: NonZeroU16,
    /// Other ports the sidecar itself listens on; connections to them are not captured.
    pub own_ports: Vec<NonZeroU16>,
    /// The sidecar's own connections are told by this uid. With neither `uid` nor `mark` it is 2102.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The sidecar's own connections are told by this mark on their packets. The sidecar needs `CAP_NET_ADMIN` to set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// Connections to these ports of the workload are left alone.
    pub skip_inbound_ports: Vec<Ports>,
    /// Connections from these networks are left alone.
    #[schemars(with = "Vec<String>")]
    pub skip_inbound_cidrs: Vec<IpNet>,
    /// Connections of the workload to these ports are left alone. Port 53 always is: DNS is not captured.
    pub skip_outbound_ports: Vec<Ports>,
    /// Connections of the workload to these networks are left alone.
    #[schemars(with = "Vec<String>")]
    pub skip_outbound_cidrs: Vec<IpNet>,
    /// With `mode: tproxy`, the mark of packets that are handed over, and of replies on their way to the sidecar.
    pub tproxy_mark: Mark,
    /// With `mode: tproxy`, the routing table by which marked packets stay on this machine.
    pub tproxy_table: Table,
}

/// How inbound connections are handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The destination is rewritten and asked of the kernel afterwards. The application sees the sidecar as its client.
    #[default]
    Redirect,
    /// The destination stays, and the application sees the address of its client. The sidecar needs `CAP_NET_ADMIN`.
    Tproxy,
}

/// A direction of connections, as the workload sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Direction {
    /// Those that come to the workload.
    Inbound,
    /// Those of the workload.
    Outbound,
}

const INBOUND: NonZeroU16 = NonZeroU16::new(15006).unwrap();
const OUTBOUND: NonZeroU16 = NonZeroU16::new(15001).unwrap();
const HBONE: NonZeroU16 = NonZeroU16::new(15008).unwrap();
const STATUS: NonZeroU16 = NonZeroU16::new(15021).unwrap();

impl Default for Capture {
    fn default() -> Self {
        Self {
            mode: Mode::Redirect,
            only: None,
            inbound_port: INBOUND,
            outbound_port: OUTBOUND,
            own_ports: vec![HBONE, STATUS],
            uid: None,
            mark: None,
            skip_inbound_ports: Vec::new(),
            skip_inbound_cidrs: Vec::new(),
            skip_outbound_ports: Vec::new(),
            skip_outbound_cidrs: Vec::new(),
            tproxy_mark: Mark(0x506),
            tproxy_table: Table(506),
        }
    }
}

impl Capture {
    /// Reads `capture` of a document, whatever else is in it. Without it everything has its default.
    ///
    /// # Errors
    /// Whatever is wrong there, with its place.
    pub fn of(document: &Document) -> Result<Self, Vec<LocatedError>> {
        let Some(value) = document.value().get("capture") else { return Ok(Self::default()) };
        let read = typed::parse(value).and_then(|capture: Self| {
            let mut errors = Vec::new();
            capture.check(&mut errors);
            if errors.is_empty() { Ok(capture) } else { Err(errors) }
        });
        read.map_err(|errors| {
            errors.into_iter().map(|error| document.error(error.under("/capture"))).collect()
        })
    }

    /// By which uid the sidecar is told, if by any.
    #[must_use]
    pub fn bypass_uid(&self) -> Option<u32> {
        match (self.uid, self.mark) {
            (None, None) => Some(UID),
            (uid, _) => uid,
        }
    }

    /// Whether connections of this direction are captured.
    #[must_use]
    pub fn takes(&self, direction: Direction) -> bool {
        self.only.is_none_or(|only| only == direction)
    }

    /// Every port the sidecar listens on, ascending.
    #[must_use]
    pub fn listening(&self) -> Vec<u16> {
        let all = self.own_ports.iter().chain([&self.inbound_port, &self.outbound_port]);
        all.map(|port| port.get()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What the types do not tell.
    pub fn check(&self, errors: &mut Vec<ConfigError>) {
        let mut wrong = |pointer: &str, why: &str| errors.push(ConfigError::invalid(pointer, why));
        if self.inbound_port == self.outbound_port {
            wrong("/outbound_port", "inbound and outbound connections need a port each: 15006 and 15001");
        }
        if self.uid == Some(0) {
            wrong(
                "/uid",
                "everything that runs as root would pass by the sidecar; give it a uid of its own, such as 2102, or \
                 tell it by `mark`",
            );
        }
        if self.mode == Mode::Tproxy && self.mark == Some(self.tproxy_mark) {
            wrong("/mark", "it is the mark of packets that are handed over (`tproxy_mark`); choose another");
        }
    }
}

/// A port, or a range of them: `8080` or `9000-9010`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    first: u16,
    last: u16,
}

impl Ports {
    /// First and last, both included.
    #[must_use]
    pub fn bounds(self) -> (u16, u16) {
        (self.first, self.last)
    }
}

/// Text that is no port, mark or table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is {1}")]
pub struct Unreadable(String, &'static str);

impl FromStr for Ports {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || Unreadable(text.to_owned(), "no port; write 8080 or 9000-9010");
        let number = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse::<u16>().ok().filter(|port| digits && *port > 0).ok_or_else(wrong)
        };
        let (first, last) = match text.split_once('-') {
            None => (number(text)?, number(text)?),
            Some((first, last)) => (number(first)?, number(last)?),
        };
        if first > last {
            return Err(Unreadable(text.to_owned(), "a range that ends before it begins"));
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// A mark of packets: a number that is not 0, `1285` or `0x505`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark(u32);

impl Mark {
    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for Mark {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x") {
            Some(hex) if !hex.starts_with('+') => u32::from_str_radix(hex, 16).ok(),
            Some(_) => None,
            None => text.parse().ok(),
        };
        match number {
            Some(number) if number != 0 && !text.starts_with('+') => Ok(Self(number)),
            _ => Err(Unreadable(text.to_owned(), "no mark; write a number that is not 0, such as 0x505")),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A routing table of our own: 1 to 252, or above the system's 253 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Table(u32);

impl Table {
    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for Table {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<u32>() {
            Ok(number) if number > 0 && !(253..=255).contains(&number) && !text.starts_with('+') => {
                Ok(Self(number))
            }
            _ => Err(Unreadable(
                text.to_owned(),
                "no table of our own; write a number that is not 0 or 253 to 255",
            )),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Written as a number or as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

macro_rules! written {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = match Written::deserialize(deserializer)? {
                    Written::Number(number) => number.to_string(),
                    Written::Text(text) => text,
                };
                text.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": ["integer", "string"] })
            }
        }
    )*};
}

written!(Ports, Mark, Table);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn ports_marks_and_tables_are_numbers_and_nothing_else() {
        for (text, told) in [
            ("22", Some("22")),
            ("9000-9010", Some("9000-9010")),
            ("7-7", Some("7")),
            ("65535", Some("65535")),
            ("0", None),
            ("65536", None),
            ("+22", None),
            ("22 ", None),
            ("9010-9000", None),
            ("22-", None),
            ("-22", None),
            ("1-2-3", None),
            ("22; flush ruleset", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<Ports>().ok().map(|ports| ports.to_string()).as_deref(), told, "{text}");
        }
        for (text, told) in [
            ("0x505", Some("0x505")),
            ("1285", Some("0x505")),
            ("0xffffffff", Some("0xffffffff")),
            ("0", None),
            ("0x0", None),
            ("0x+5", None),
            ("+5", None),
            ("0x100000000", None),
            ("five", None),
        ] {
            assert_eq!(text.parse::<Mark>().ok().map(|mark| mark.to_string()).as_deref(), told, "{text}");
        }
        for (text, told) in [("506", true), ("1", true), ("0", false), ("254", false), ("main", false)] {
            assert_eq!(text.parse::<Table>().is_ok(), told, "{text}");
        }
    }

    #[test]
    fn settings_are_read_and_written() {
        let read: Capture = serde_json::from_value(json!({
            "mode": "tproxy", "mark": "0x505", "skip_inbound_ports": [22, "9000-9010"],
            "skip_outbound_cidrs": ["10.0.0.0/8", "fd00::/8"],
        }))
        .unwrap();
        assert_eq!(read.bypass_uid(), None, "who says a mark means the mark");
        assert_eq!(read.listening(), [15001, 15006, 15008, 15021]);
        let again = serde_json::from_value(serde_json::to_value(&read).unwrap()).unwrap();
        assert_eq!(read, again);
        assert_eq!(Capture::default().bypass_uid(), Some(UID));
        let both = Capture { uid: Some(7), ..read };
        assert_eq!(both.bypass_uid(), Some(7));
    }

    #[test]
    fn a_file_tells_where_it_is_wrong() {
        let read = |text: &str| {
            let document = Document::yaml("sidecar.yaml", text).unwrap();
            Capture::of(&document)
                .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(read("workload: {}\n"), Ok(Capture::default()));
        let read_all = read("capture:\n  mark: 0x505\n  skip_inbound_ports: [22, 9000-9010]\n").unwrap();
        assert_eq!(read_all.mark, Some("0x505".parse().unwrap()));
        assert_eq!(read_all.skip_inbound_ports.len(), 2);
        for (text, told) in [
            ("capture:\n  uid: 0\n", "sidecar.yaml:2:3: "),
            ("capture:\n  mode: redirect\n  skip_inbound_ports:\n    - nine\n", "sidecar.yaml:4:7: "),
            ("capture:\n  skip_outbound_cidrs: [10.0.0.0/40]\n", "sidecar.yaml:2:25: "),
            ("capture:\n  ports: [1]\n", "sidecar.yaml:2:3: "),
        ] {
            let errors = read(text).unwrap_err();
            assert!(errors.iter().any(|error| error.starts_with(told)), "{text}: {errors:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (written, told) in [
            (json!({ "inbound_port": 15001 }), "/outbound_port"),
            (json!({ "uid": 0 }), "/uid"),
            (json!({ "mode": "tproxy", "mark": "0x506" }), "/mark"),
        ] {
            let read: Capture = serde_json::from_value(written.clone()).unwrap();
            let mut errors = Vec::new();
            read.check(&mut errors);
            let places: Vec<_> = errors.iter().map(|error| &*error.pointer).collect();
            assert_eq!(places, [told], "{written}");
        }
        for written in [
            json!({ "skip_outbound_cidrs": ["10.0.0.0/33"] }),
            json!({ "skip_inbound_ports": [70000] }),
            json!({ "inbound_port": 0 }),
            json!({ "skip_ports": [1] }),
        ] {
            assert!(serde_json::from_value::<Capture>(written.clone()).is_err(), "{written}");
        }
    }
}
