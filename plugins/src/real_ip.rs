//! `real-ip`: takes the client's address from a variable, as proxies in front of the gateway tell it.
//!
//! Phase: `rewrite`, before everything that asks who the client is. An address that is missing or cannot be read
//! changes nothing. What the upstream is told (`X-Real-IP`, `X-Forwarded-For`) follows.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use config::error::{ConfigError, ErrorKind};
use config::fields::{Cidr, WideText};
use config::var::{Var, Vars};
use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use layers::exchange::{Exchange, State};
use layers::http::forwarded::{SetApart, tell_client};
use layers::plugin::{BuildEnv, Definition, Flow, Hooks, Rewrite};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The variable that tells the address, such as `http_x_forwarded_for` or `arg_realip`. A port may follow it.
    source: WideText<1, 256>,
    /// Addresses and networks of proxies that are believed. Without them everybody is, except in
    /// `http_x_forwarded_for` and `http_x_real_ip`: there it takes `apisix.trusted_addresses`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    trusted_addresses: Option<Vec<Cidr>>,
    /// With `http_x_forwarded_for`: look past trusted addresses, from the right. Otherwise the last one counts.
    #[serde(default)]
    recursive: bool,
}

/// The plugin.
pub struct RealIp {
    source: Source,
    trusted: Option<Box<[IpNet]>>,
    recursive: bool,
}

enum Source {
    ForwardedFor,
    RealIp,
    Var(Var),
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

impl Definition for RealIp {
    const NAME: &'static str = "real-ip";
    const PRIORITY: i32 = 23000;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let empty = config.trusted_addresses.as_ref().is_some_and(Vec::is_empty);
        let kind = ErrorKind::OutOfRange {
            what: "the number of elements",
            found: "0".into(),
            allowed: "1 or more elements".into(),
        };
        empty.then(|| ConfigError::new("/trusted_addresses", kind)).into_iter().collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let trusted = config.trusted_addresses.as_deref();
        hooks.rewrite(&Arc::new(Self {
            source: match &*config.source {
                "http_x_forwarded_for" => Source::ForwardedFor,
                "http_x_real_ip" => Source::RealIp,
                name => Source::Var(Var::parse(name)),
            },
            trusted: trusted.map(|list| list.iter().map(Cidr::net).collect()),
            recursive: config.recursive,
        }));
        Ok(())
    }
}

impl Rewrite for RealIp {
    fn rewrite(&self, x: &mut Exchange) -> Flow {
        if self.trusted.is_some() && !self.trusts(x.remote_addr) {
            return Flow::Next;
        }
        let before = self.forwarded_for(x);
        let Some((address, port)) = self.told(x, before.as_ref()) else {
            tracing::debug!(peer = %x.conn.peer, "real-ip: no address is told");
            return Flow::Next;
        };
        if let Some(port) = port {
            x.remote_port = port;
        }
        tell_client(x, address, before.as_ref());
        Flow::Next
    }
}

impl RealIp {
    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().flatten().any(|net| net.contains(&address))
    }

    /// What `X-Forwarded-For` said when the request came, if who sent it is believed.
    fn forwarded_for(&self, x: &State) -> Option<HeaderValue> {
        if self.trusted.is_some()
            && let Some(apart) = x.slot::<SetApart>().and_then(|apart| apart.forwarded_for.clone())
        {
            return Some(apart);
        }
        // The last of the list is what we have put there.
        let list = x.request.headers.get(&X_FORWARDED_FOR)?.as_bytes();
        let end = list.iter().rposition(|byte| *byte == b',')?;
        HeaderValue::from_bytes(list.get(..end)?).ok()
    }

    fn told(&self, x: &State, forwarded_for: Option<&HeaderValue>) -> Option<(IpAddr, Option<u16>)> {
        match &self.source {
            Source::ForwardedFor => self.client_of(forwarded_for?.to_str().ok()?),
            Source::RealIp => {
                // Our own word for a peer that is not believed would tell nothing new.
                let apart = x.slot::<SetApart>().filter(|apart| self.trusted.is_some() || apart.trusted)?;
                parse(apart.real_ip.as_ref()?.to_str().ok()?)
            }
            Source::Var(var) => parse(&x.get(var)?),
        }
    }

    fn client_of(&self, list: &str) -> Option<(IpAddr, Option<u16>)> {
        let mut client = None;
        for part in list.rsplit(',') {
            // What stands left of nonsense was written by nobody who is known.
            let Some(told) = parse(part) else { break };
            client = Some(told);
            if !self.recursive || !self.trusts(told.0) {
                break;
            }
        }
        client
    }
}

/// An address with or without port: `10.0.0.1`, `10.0.0.1:80`, `::1`, `[::1]:80`.
fn parse(text: &str) -> Option<(IpAddr, Option<u16>)> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Some((address.to_canonical(), None));
    }
    let with_port: SocketAddr = text.parse().ok()?;
    (with_port.port() != 0).then(|| (with_port.ip().to_canonical(), Some(with_port.port())))
}

#[cfg(test)]
mod tests {
    use layers::http::forwarded::{Forwarding, settle};
    use layers::testing::{TestEnv, exchange};
    use serde_json::{Value, json};

    use super::*;

    struct Case {
        config: Value,
        peer: &'static str,
        /// `apisix.trusted_addresses`
        gateway_trusts: &'static str,
        target: &'static str,
        fields: &'static [(&'static str, &'static str)],
        client: &'static str,
        port: u16,
        forwarded_for: &'static str,
    }

    async fn run(case: &Case) -> Exchange {
        let mut x = exchange("GET", case.target).peer(case.peer);
        for (name, value) in case.fields {
            x = x.header(name, value);
        }
        let mut x = x.build();
        let trusted = case.gateway_trusts.split_whitespace().map(|net| net.parse().unwrap()).collect();
        settle(&mut x, &Forwarding { trusted, ..Forwarding::default() });
        TestEnv::default().chain::<RealIp, _>(&case.config, |_| Ok(())).unwrap().run(x).await
    }

    #[tokio::test]
    async fn the_address_is_taken_from_where_the_settings_say() {
        const PLAIN: Case = Case {
            config: Value::Null,
            peer: "127.0.0.1",
            gateway_trusts: "",
            target: "http://a/",
            fields: &[],
            client: "127.0.0.1",
            port: 40_000,
            forwarded_for: "127.0.0.1",
        };
        let xff = |trusted: Value| json!({"source": "http_x_forwarded_for", "trusted_addresses": trusted});
        let recursive = json!({
            "source": "http_x_forwarded_for", "trusted_addresses": ["192.128.0.0/16", "127.0.0.0/24"], "recursive": true
        });
        let arg = json!({"source": "arg_realip"});
        let own_field = json!({"source": "http_xx", "trusted_addresses": ["192.128.0.0/16", "127.0.0.0/24"]});
        let cases = [
            ("an argument", Case { config: arg.clone(), target: "http://a/?realip=1.2.3.4:9080", client: "1.2.3.4", port: 9080, forwarded_for: "1.2.3.4", ..PLAIN }),
            ("without a port", Case { config: arg.clone(), target: "http://a/?realip=1.2.3.4", client: "1.2.3.4", forwarded_for: "1.2.3.4", ..PLAIN }),
            ("IPv6", Case { config: arg.clone(), target: "http://a/?realip=[::2]:80", client: "::2", port: 80, forwarded_for: "::2", ..PLAIN }),
            ("IPv6 without port", Case { config: arg.clone(), target: "http://a/?realip=[::2]", client: "::2", forwarded_for: "::2", ..PLAIN }),
            ("nonsense", Case { config: arg.clone(), target: "http://a/?realip=apisix.apache.org", ..PLAIN }),
            ("port 0", Case { config: arg.clone(), target: "http://a/?realip=1.2.3.4:0", ..PLAIN }),
            ("port too high", Case { config: arg.clone(), target: "http://a/?realip=1.2.3.4:65536", ..PLAIN }),
            ("missing", Case { config: arg, ..PLAIN }),
            ("the last of a list", Case { config: xff(json!(["127.0.0.0/24"])), fields: &[("x-forwarded-for", "6.6.6.6, 1.2.3.4")], client: "1.2.3.4", forwarded_for: "6.6.6.6, 1.2.3.4, 1.2.3.4", ..PLAIN }),
            ("the last of several fields", Case { config: xff(json!(["127.0.0.0/24"])), fields: &[("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "1.2.3.4:77")], client: "1.2.3.4", port: 77, forwarded_for: "6.6.6.6, 1.2.3.4:77, 1.2.3.4", ..PLAIN }),
            ("a peer that is not believed", Case { config: xff(json!(["10.0.0.0/8"])), fields: &[("x-forwarded-for", "1.2.3.4")], ..PLAIN }),
            ("nobody is named and the peer is a stranger", Case { config: json!({"source": "http_x_forwarded_for"}), fields: &[("x-forwarded-for", "1.2.3.4")], ..PLAIN }),
            ("nobody is named and the gateway trusts the peer", Case { config: json!({"source": "http_x_forwarded_for"}), gateway_trusts: "127.0.0.1/32", fields: &[("x-forwarded-for", "6.6.6.6,1.2.3.4")], client: "1.2.3.4", forwarded_for: "6.6.6.6,1.2.3.4, 1.2.3.4", ..PLAIN }),
            ("no list at all", Case { config: xff(json!(["127.0.0.0/24"])), ..PLAIN }),
            ("past trusted ones", Case { config: recursive.clone(), fields: &[("x-forwarded-for", "6.6.6.6, 1.2.3.4, 192.128.1.1, 127.0.0.1")], client: "1.2.3.4", forwarded_for: "6.6.6.6, 1.2.3.4, 192.128.1.1, 127.0.0.1, 1.2.3.4", ..PLAIN }),
            ("past trusted ones only", Case { config: recursive.clone(), fields: &[("x-forwarded-for", "192.128.1.1, 127.0.0.1")], client: "192.128.1.1", forwarded_for: "192.128.1.1, 127.0.0.1, 192.128.1.1", ..PLAIN }),
            ("up to nonsense", Case { config: recursive, fields: &[("x-forwarded-for", "1.2.3.4, x, 192.128.1.1")], client: "192.128.1.1", forwarded_for: "1.2.3.4, x, 192.128.1.1, 192.128.1.1", ..PLAIN }),
            ("a field of their own", Case { config: own_field.clone(), fields: &[("xx", "1.2.3.4")], client: "1.2.3.4", forwarded_for: "1.2.3.4", ..PLAIN }),
            ("a field of their own, from a stranger", Case { config: own_field, peer: "9.9.9.9", fields: &[("xx", "1.2.3.4")], client: "9.9.9.9", forwarded_for: "9.9.9.9", ..PLAIN }),
            ("X-Real-IP", Case { config: json!({"source": "http_x_real_ip", "trusted_addresses": ["127.0.0.1"]}), fields: &[("x-real-ip", "1.2.3.4")], client: "1.2.3.4", forwarded_for: "1.2.3.4", ..PLAIN }),
            ("X-Real-IP from whom the gateway trusts", Case { config: json!({"source": "http_x_real_ip"}), gateway_trusts: "127.0.0.1/32", fields: &[("x-real-ip", "1.2.3.4")], client: "1.2.3.4", forwarded_for: "1.2.3.4", ..PLAIN }),
            ("X-Real-IP of a stranger", Case { config: json!({"source": "http_x_real_ip"}), fields: &[("x-real-ip", "1.2.3.4"), ("x-forwarded-for", "1.2.3.4")], ..PLAIN }),
        ];
        for (name, case) in &cases {
            let x = run(case).await;
            assert_eq!((x.remote_addr.to_string(), x.remote_port), (case.client.to_owned(), case.port), "{name}");
            let told = |field: &str| x.request.headers[field].to_str().unwrap().to_owned();
            assert_eq!(told("x-real-ip"), case.client, "{name}");
            assert_eq!(told("x-forwarded-for"), case.forwarded_for, "{name}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let cases = [
            (json!({}), ""),
            (json!({"source": ""}), "/source"),
            (json!({"source": "arg_a", "trusted_addresses": []}), "/trusted_addresses"),
            (json!({"source": "arg_a", "trusted_addresses": ["127.0.0.1/33"]}), "/trusted_addresses/0"),
            (json!({"source": "arg_a", "recursive": 1}), "/recursive"),
            (json!({"source": "arg_a", "trusted": []}), "/trusted"),
        ];
        for (config, pointer) in cases {
            let errors = TestEnv::default().build::<RealIp>(&config).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{config}: {errors:?}");
        }
    }
}
