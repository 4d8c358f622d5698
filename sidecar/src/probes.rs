//! Probes of the application by whoever runs it: requests without an identity, from known addresses, for known paths. They
//! pass where only the mesh is let in, and no policy has to know of them. Nothing else passes with them.

use std::net::IpAddr;

use config::sidecar::Probes as Written;
use http::Method;
use ipnet::IpNet;
use layers::exchange::State;

/// The path by which gRPC asks for health, which is a POST.
const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";

/// Which requests are probes.
#[derive(Debug, Default)]
pub struct Probes {
    from: Vec<IpNet>,
    paths: Vec<Box<str>>,
}

/// Stands on a request that is one.
pub struct Probe;

impl Probes {
    /// As they are written; none without.
    pub fn new(written: Option<&Written>) -> Self {
        let Some(Written { from, paths }) = written else { return Self::default() };
        Self {
            from: from.iter().map(|cidr| cidr.net()).collect(),
            paths: paths.iter().map(|path| path.as_str().into()).collect(),
        }
    }

    /// Whether probes come from this address.
    pub fn come_from(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.from.iter().any(|net| net.contains(&ip))
    }

    /// Whether a request is one, by where its connection comes from and what it asks for.
    pub fn is_one(&self, x: &State) -> bool {
        self.has(x.conn.peer.ip(), &x.request.method, x.path())
    }

    fn has(&self, from: IpAddr, method: &Method, path: &str) -> bool {
        let reads =
            matches!(*method, Method::GET | Method::HEAD) || (*method == Method::POST && path == GRPC_HEALTH);
        reads && self.paths.iter().any(|known| **known == *path) && self.come_from(from)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_probe_is_told_by_address_method_and_path() {
        let written: Written = serde_json::from_value(json!({
            "from": ["10.0.0.1", "fd00::/64"], "paths": ["/healthz", "/grpc.health.v1.Health/Check", "/submit"],
        }))
        .unwrap();
        let probes = Probes::new(Some(&written));
        for (from, method, path, told) in [
            ("10.0.0.1", "GET", "/healthz", true),
            ("::ffff:10.0.0.1", "HEAD", "/healthz", true),
            ("fd00::7", "POST", "/grpc.health.v1.Health/Check", true),
            ("10.0.0.2", "GET", "/healthz", false),
            ("10.0.0.1", "GET", "/healthz/", false),
            ("10.0.0.1", "GET", "/", false),
            ("10.0.0.1", "POST", "/submit", false),
        ] {
            let has = probes.has(from.parse().unwrap(), &method.parse().unwrap(), path);
            assert_eq!(has, told, "{from} {method} {path}");
        }
        assert!(!Probes::new(None).come_from("10.0.0.1".parse().unwrap()));
    }
}
