//! Proof by an ACL token of Consul: Consul says which services it is for (`GET /v1/acl/token/self`).
//!
//! Service identities of the token itself count; what its roles and policies allow does not say who somebody is.

use std::path::PathBuf;

use bytes::Bytes;
use http::{HeaderName, Method, StatusCode};
use serde::Deserialize;

use super::call::Server;
use super::{Grant, Refusal};
use crate::identity::{SpiffeId, TrustDomain};

/// The kind of this proof.
pub const KIND: &str = "consul";
const PATH: &str = "/v1/acl/token/self";
const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");

/// Where Consul is.
#[derive(Clone, Debug)]
pub struct Settings {
    pub server: String,
    pub ca: Option<PathBuf>,
    /// Where the identities of services are: `/ns/default/sa/{service}`.
    pub path: String,
    /// Service identities that are for other datacenters only do not count, where this is set.
    pub datacenter: Option<String>,
}

/// Asks Consul.
pub struct Consul {
    server: Server,
    settings: Settings,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Own {
    #[serde(rename = "AccessorID", default)]
    accessor: String,
    #[serde(default)]
    service_identities: Option<Vec<ServiceIdentity>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceIdentity {
    service_name: String,
    #[serde(default)]
    datacenters: Option<Vec<String>>,
}

impl Consul {
    /// # Errors
    /// The URL is none, or the path has no place for the service.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let sample: TrustDomain = "example".parse().map_err(|_| String::new())?;
        if !settings.path.starts_with('/')
            || !settings.path.contains("{service}")
            || SpiffeId::new(&sample, &settings.path.replace("{service}", "a")).is_err()
        {
            return Err(format!("`{}` is not a path like /ns/default/sa/{{service}}", settings.path));
        }
        Ok(Self { server: Server::new(&settings.server, settings.ca.clone())?, settings })
    }

    /// Judges a token. `service` is the one that is wanted, where it is for several.
    ///
    /// # Errors
    /// It is not good, or Consul cannot be asked.
    pub async fn attest(&self, token: &str, service: &str, domain: &TrustDomain) -> Result<Grant, Refusal> {
        if token.is_empty() || token.len() > 256 || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Refusal::Malformed("this is not an ACL token".to_owned()));
        }
        let asked = self.server.ask(Method::GET, PATH, (TOKEN, token), Bytes::new()).await;
        let (status, body) = asked.map_err(Refusal::Unavailable)?;
        match status {
            StatusCode::OK => {}
            StatusCode::FORBIDDEN => {
                return Err(Refusal::Proof("Consul does not know the ACL token".to_owned()));
            }
            other => return Err(Refusal::Unavailable(format!("Consul answered {other}"))),
        }
        let own: Own = serde_json::from_slice(&body)
            .map_err(|_| Refusal::Unavailable("Consul's answer is not what was asked for".to_owned()))?;
        let service = self.service(&own, service)?;
        let path = self.settings.path.replace("{service}", &service);
        let identity = SpiffeId::new(domain, &path).map_err(|error| Refusal::Identity(error.to_string()))?;
        Ok(Grant {
            identity,
            dns_names: Vec::new(),
            longest_ttl: None,
            attestor: KIND,
            evidence: format!("ACL token {}", own.accessor),
            process: None,
        })
    }

    fn service(&self, own: &Own, wanted: &str) -> Result<String, Refusal> {
        let here = |identity: &&ServiceIdentity| {
            let only = identity.datacenters.as_deref().unwrap_or_default();
            let here = self.settings.datacenter.as_ref();
            here.is_none_or(|here| only.is_empty() || only.contains(here))
        };
        let identities = own.service_identities.iter().flatten().filter(here);
        let names: Vec<&str> = identities.map(|identity| identity.service_name.as_str()).collect();
        match names.as_slice() {
            [] => {
                Err(Refusal::Proof("the ACL token is for no service (it has no service identity)".to_owned()))
            }
            names if names.contains(&wanted) => Ok(wanted.to_owned()),
            [only] if wanted.is_empty() => Ok((*only).to_owned()),
            names if wanted.is_empty() => Err(Refusal::Identity(format!(
                "the ACL token is for {}: say which service",
                names.join(", ")
            ))),
            names => Err(Refusal::Identity(format!(
                "the ACL token is for {} and not for {wanted}",
                names.join(", ")
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_for_the_services_it_names() {
        let settings = Settings {
            server: "http://127.0.0.1:8500".to_owned(),
            ca: None,
            path: "/ns/default/sa/{service}".to_owned(),
            datacenter: Some("dc1".to_owned()),
        };
        let consul = Consul::new(settings.clone()).unwrap();
        let own = |text: &str| serde_json::from_str::<Own>(text).unwrap();
        let two = r#"{"AccessorID":"a","ServiceIdentities":[{"ServiceName":"web"},{"ServiceName":"db","Datacenters":["dc1"]}]}"#;
        let cases = [
            (r#"{"AccessorID":"a"}"#, "", None),
            (r#"{"AccessorID":"a","ServiceIdentities":null}"#, "web", None),
            (r#"{"ServiceIdentities":[{"ServiceName":"web"}]}"#, "", Some("web")),
            (r#"{"ServiceIdentities":[{"ServiceName":"web"}]}"#, "web", Some("web")),
            (r#"{"ServiceIdentities":[{"ServiceName":"web"}]}"#, "db", None),
            (r#"{"ServiceIdentities":[{"ServiceName":"web","Datacenters":["dc2"]}]}"#, "web", None),
            (two, "", None),
            (two, "db", Some("db")),
        ];
        for (text, wanted, expected) in cases {
            assert_eq!(consul.service(&own(text), wanted).ok().as_deref(), expected, "{text} {wanted}");
        }
        for path in ["/ns/default", "ns/{service}", "/{service}/", "/a b/{service}"] {
            assert!(Consul::new(Settings { path: path.to_owned(), ..settings.clone() }).is_err(), "{path}");
        }
    }
}
