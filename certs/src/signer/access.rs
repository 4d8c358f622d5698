//! Which clients may use which keys. A client is known by the names in its certificate, which the handshake has verified.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{IdentityError, IdentityPattern, SpiffeId};

/// One line of the list.
#[derive(Clone, Debug)]
pub struct Rule {
    name: Name,
    keys: Vec<Pattern>,
}

#[derive(Clone, Debug)]
enum Name {
    Identity(IdentityPattern),
    Dns(String),
}

#[derive(Clone, Debug)]
enum Pattern {
    Exact(String),
    Prefix(String),
}

impl Rule {
    /// `name` is a SPIFFE id, or one that ends with `/*`, or a DNS name; `keys` are names, or beginnings of names with `*`.
    ///
    /// # Errors
    /// The SPIFFE id is none.
    pub fn new<'a>(name: &str, keys: impl IntoIterator<Item = &'a str>) -> Result<Self, IdentityError> {
        let name = match name.starts_with("spiffe://") {
            true => Name::Identity(name.parse()?),
            false => Name::Dns(name.to_ascii_lowercase()),
        };
        let pattern = |key: &str| match key.strip_suffix('*') {
            Some(prefix) => Pattern::Prefix(prefix.to_owned()),
            None => Pattern::Exact(key.to_owned()),
        };
        Ok(Self { name, keys: keys.into_iter().map(pattern).collect() })
    }

    fn is_for(&self, shown: &GeneralName<'_>) -> bool {
        match (&self.name, shown) {
            (Name::Dns(name), GeneralName::DNSName(shown)) => name.eq_ignore_ascii_case(shown),
            (Name::Identity(pattern), GeneralName::URI(shown)) => {
                shown.parse::<SpiffeId>().is_ok_and(|id| pattern.matches(&id))
            }
            _ => false,
        }
    }

    fn lets_use(&self, key: &str) -> bool {
        self.keys.iter().any(|pattern| match pattern {
            Pattern::Exact(name) => name == key,
            Pattern::Prefix(prefix) => key.starts_with(prefix.as_str()),
        })
    }
}

/// The list.
#[derive(Clone, Debug, Default)]
pub struct Clients(Vec<Rule>);

/// A client that is on the list.
#[derive(Clone, Debug)]
pub struct Client<'a> {
    /// The name by which it is known.
    pub name: String,
    /// The place of its first rule.
    pub place: usize,
    rules: Vec<&'a Rule>,
}

impl Client<'_> {
    /// Whether it may use this key.
    #[must_use]
    pub fn may_use(&self, key: &str) -> bool {
        self.rules.iter().any(|rule| rule.lets_use(key))
    }
}

impl Clients {
    #[must_use]
    pub fn new(rules: Vec<Rule>) -> Self {
        Self(rules)
    }

    /// Who showed this chain.
    ///
    /// # Errors
    /// Nobody of the list: the names in the certificate, for the log.
    pub fn find(&self, chain: &[CertificateDer<'_>]) -> Result<Client<'_>, String> {
        let leaf = chain.first().and_then(|leaf| X509Certificate::from_der(leaf).ok());
        let extension = leaf.as_ref().and_then(|(_, leaf)| leaf.subject_alternative_name().ok().flatten());
        let names = extension.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let for_this = |rule: &&Rule| names.iter().any(|name| rule.is_for(name));
        let rules: Vec<&Rule> = self.0.iter().filter(for_this).collect();
        let first = self.0.iter().enumerate().find(|(_, rule)| for_this(rule));
        let shown = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
            _ => None,
        };
        let Some((place, rule)) = first else {
            let all: Vec<String> = names.iter().filter_map(shown).take(8).collect();
            return Err(if all.is_empty() {
                "a certificate without names".to_owned()
            } else {
                all.join(", ")
            });
        };
        let name = names.iter().filter(|name| rule.is_for(name)).find_map(shown).unwrap_or_default();
        Ok(Client { name, place, rules })
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn certificate(names: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        let san = |name: &&str| match name.starts_with("spiffe://") {
            true => SanType::URI((*name).try_into().unwrap()),
            false => SanType::DnsName((*name).try_into().unwrap()),
        };
        params.subject_alt_names = names.iter().map(san).collect();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn clients_are_known_by_the_names_of_their_certificates() {
        let clients = Clients::new(vec![
            Rule::new("gw.edge.test", ["shop", "bank-*"]).unwrap(),
            Rule::new("spiffe://mesh.local/ns/edge/*", ["*"]).unwrap(),
            Rule::new("GW.edge.test", ["extra"]).unwrap(),
        ]);
        type Case =
            (&'static [&'static str], Option<&'static str>, &'static [&'static str], &'static [&'static str]);
        let cases: [Case; 6] = [
            (&["gw.edge.test"], Some("gw.edge.test"), &["shop", "bank-a", "extra"], &["bank", "shop2", ""]),
            (&["GW.EDGE.test"], Some("GW.EDGE.test"), &["shop"], &[]),
            (&["spiffe://mesh.local/ns/edge/sa/gw"], Some("spiffe://mesh.local/ns/edge/sa/gw"), &["x"], &[]),
            (&["spiffe://mesh.local/ns/edger/sa/gw"], None, &[], &[]),
            (&["other.test"], None, &[], &[]),
            (&[], None, &[], &[]),
        ];
        for (shown, name, allowed, denied) in cases {
            let chain = [certificate(shown)];
            let found = clients.find(&chain);
            assert_eq!(found.as_ref().ok().map(|client| client.name.as_str()), name, "{shown:?}");
            let Ok(client) = found else { continue };
            assert!(allowed.iter().all(|key| client.may_use(key)), "{shown:?}");
            assert!(!denied.iter().any(|key| client.may_use(key)), "{shown:?}");
        }
        assert!(clients.find(&[]).is_err());
        assert!(clients.find(&[certificate(&["other.test"])]).unwrap_err().contains("other.test"));
        assert!(Rule::new("spiffe://", ["*"]).is_err());
    }
}
