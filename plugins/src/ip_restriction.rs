//! `ip-restriction`: lets in, or keeps out, addresses and networks.
//!
//! Phase: `access`. The address is the client's as `real_ip` settings and PROXY protocol tell it, not what any header
//! says.

use std::net::IpAddr;
use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::fields::{Cidr, Int, WideText};
use ipnet::IpNet;
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::reply::{self, Canned};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Addresses and networks that are let in; all others are refused. Excludes `blacklist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    whitelist: Option<Vec<Cidr>>,
    /// Addresses and networks that are refused. Excludes `whitelist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    blacklist: Option<Vec<Cidr>>,
    /// The message of a refusal.
    #[serde(default = "message")]
    message: WideText<1, 1024>,
    /// The status of a refusal.
    #[serde(default)]
    response_code: Int<403, 404>,
}

const MESSAGE: &str = "Your IP address is not allowed";

fn message() -> WideText<1, 1024> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new(MESSAGE).expect("1 to 1024 characters")
}

/// The plugin.
pub struct IpRestriction {
    list: Networks,
    /// Whether the list lets in; it keeps out otherwise.
    lets_in: bool,
    refusal: Canned,
}

/// Networks as ranges that neither overlap nor touch, in order.
#[derive(Debug, Default)]
struct Networks {
    v4: Box<[(u32, u32)]>,
    v6: Box<[(u128, u128)]>,
}

impl Networks {
    fn new(nets: impl Iterator<Item = IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(net) => v4.push((u128::from(net.network().to_bits()), u128::from(net.broadcast().to_bits()))),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits())),
            }
        }
        let narrow = |bits: u128| u32::try_from(bits).unwrap_or(u32::MAX);
        Self {
            v4: joined(v4).into_iter().map(|(first, last)| (narrow(first), narrow(last))).collect(),
            v6: joined(v6).into(),
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(address) => within(&self.v4, address.to_bits()),
            IpAddr::V6(address) => within(&self.v6, address.to_bits()),
        }
    }
}

fn joined(mut ranges: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    ranges.sort_unstable();
    let mut out: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match out.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

fn within<T: PartialOrd + Copy>(ranges: &[(T, T)], address: T) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= address);
    after.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|(_, last)| address <= *last)
}

impl Definition for IpRestriction {
    const NAME: &'static str = "ip-restriction";
    const PRIORITY: i32 = 3000;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let empty = |name: &str, list: &Option<Vec<Cidr>>| {
            list.as_ref().is_some_and(Vec::is_empty).then(|| {
                let kind = ErrorKind::OutOfRange {
                    what: "the number of elements",
                    found: "0".into(),
                    allowed: "1 or more elements".into(),
                };
                ConfigError::new(format!("/{name}"), kind)
            })
        };
        let which = match (&config.whitelist, &config.blacklist) {
            (Some(_), Some(_)) => Some(ErrorKind::Exclusive { one: "whitelist", other: "blacklist" }),
            (None, None) => Some(ErrorKind::NoneOf { fields: vec!["whitelist", "blacklist"] }),
            _ => None,
        };
        [empty("whitelist", &config.whitelist), empty("blacklist", &config.blacklist)]
            .into_iter()
            .flatten()
            .chain(which.map(|kind| ConfigError::new("", kind)))
            .collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let lets_in = config.whitelist.is_some();
        let list = config.whitelist.or(config.blacklist).unwrap_or_default();
        hooks.access(&Arc::new(Self {
            list: Networks::new(list.iter().map(Cidr::net)),
            lets_in,
            refusal: Canned::message(reply::status(config.response_code.get()), &config.message),
        }));
        Ok(())
    }
}

impl Access for IpRestriction {
    fn access(&self, x: &mut Exchange) -> Flow {
        if self.list.contains(x.remote_addr) == self.lets_in { Flow::Next } else { self.refusal.flow() }
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn addresses_are_let_in_or_kept_out() {
        let white = json!({"whitelist": ["127.0.0.1", "113.74.26.106/24", "fd00::/8"]});
        let black = json!({"blacklist": ["10.0.0.0/8", "2001:db8::1"]});
        let cases = [
            (&white, "127.0.0.1", 200),
            (&white, "127.0.0.2", 403),
            (&white, "113.74.26.1", 200),
            (&white, "113.74.27.1", 403),
            (&white, "fd12::1", 200),
            (&white, "fe80::1", 403),
            (&white, "::ffff:127.0.0.1", 200),
            (&black, "10.255.255.255", 403),
            (&black, "11.0.0.0", 200),
            (&black, "2001:db8::1", 403),
            (&black, "2001:db8::2", 200),
        ];
        for (config, address, status) in cases {
            let mut chain = TestEnv::default().chain::<IpRestriction, _>(config, |_| Ok(())).unwrap();
            let mut x = chain.run(exchange("GET", "http://a/").peer(address).build()).await;
            assert_eq!(x.response.status(), status, "{config} {address}");
            if status == 403 {
                assert_eq!(text(&mut x).await, "{\"message\":\"Your IP address is not allowed\"}\n");
            }
        }
    }

    #[tokio::test]
    async fn message_and_status_can_be_chosen() {
        let config = json!({"blacklist": ["127.0.0.1"], "message": "no", "response_code": 404});
        let mut chain = TestEnv::default().chain::<IpRestriction, _>(&config, |_| Ok(())).unwrap();
        let mut x = chain.run(exchange("GET", "http://a/").build()).await;
        assert_eq!((x.response.status().as_u16(), &*text(&mut x).await), (404, "{\"message\":\"no\"}\n"));
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"whitelist": ["1.1.1.1"], "blacklist": ["1.1.1.1"]}), ""),
            (json!({"whitelist": []}), "/whitelist"),
            (json!({"whitelist": ["1.1.1"]}), "/whitelist/0"),
            (json!({"blacklist": ["10.0.0.0/33"]}), "/blacklist/0"),
            (json!({"blacklist": ["10.0.0.0/8"], "response_code": 500}), "/response_code"),
            (json!({"blacklist": ["10.0.0.0/8"], "message": ""}), "/message"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<IpRestriction>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }

    #[test]
    fn ranges_that_overlap_become_one() {
        let nets = ["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16", "11.0.0.1"];
        let list = Networks::new(nets.iter().map(|net| Cidr::new(net).unwrap().net()));
        assert_eq!(list.v4.len(), 2);
        assert!(list.contains("10.200.0.1".parse().unwrap()) && !list.contains("11.0.0.2".parse().unwrap()));
    }
}
