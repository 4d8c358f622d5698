//! Sessions that stay at their node: a cookie names the node by a keyed hash, which tells nobody its address.
//!
//! The table is made with the endpoints on the control side. A request whose cookie names an endpoint that is still
//! there and usable goes to it, whatever the algorithm; any other is balanced, and the answer carries a new cookie.
//! A node of weight 0 keeps the sessions it has.

use std::fmt;
use std::sync::{Arc, LazyLock};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use config::upstream::extensions::{SameSite, Sticky as Wire};
use config::var::{Var, Vars};
use hashbrown::HashMap;
use http::HeaderValue;

use super::endpoint::EndpointState;
use super::picker::Peer;
use crate::exchange::State as Exchange;

/// Bytes of the hash that go into a cookie.
const HASH: usize = 16;

/// The key of the gateway itself, made when the first upstream asks for it.
pub type OwnKey = Arc<LazyLock<Vec<u8>, Box<dyn FnOnce() -> Vec<u8> + Send>>>;

/// A key that `make` makes or fetches when it is asked for.
pub fn own_key(make: impl FnOnce() -> Vec<u8> + Send + 'static) -> OwnKey {
    let make: Box<dyn FnOnce() -> Vec<u8> + Send> = Box::new(make);
    Arc::new(LazyLock::new(make))
}

/// How the cookie is made.
pub struct Rule {
    cookie: Var,
    key: hmac::Key,
    name: Box<str>,
    attributes: Box<str>,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=..{}", self.name, self.attributes)
    }
}

impl Rule {
    /// The rule as it was written.
    pub fn new(wire: &Wire, own: &OwnKey) -> Self {
        let mut attributes = format!("; Path={}", &*wire.path);
        if let Some(age) = wire.max_age {
            attributes.push_str(&format!("; Max-Age={}", age.get()));
        }
        let same_site = wire.same_site.map(|same_site| match same_site {
            SameSite::Strict => "; SameSite=Strict",
            SameSite::Lax => "; SameSite=Lax",
            SameSite::None => "; SameSite=None",
        });
        let flags = [wire.secure.then_some("; Secure"), wire.http_only.then_some("; HttpOnly"), same_site];
        flags.into_iter().flatten().for_each(|flag| attributes.push_str(flag));
        let key = wire.key.as_ref().map_or_else(|| own.as_slice(), |key| key.reveal().as_bytes());
        Self {
            cookie: Var::Cookie((&*wire.cookie).into()),
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
            name: (&*wire.cookie).into(),
            attributes: attributes.into(),
        }
    }

    /// What a cookie says of an endpoint. The same for every upstream that has it, so that a session that moves between
    /// routes stays at its node.
    fn token(&self, endpoint: &EndpointState) -> String {
        let text = format!("{}\0{}", endpoint.host(), endpoint.addr());
        let hash = hmac::sign(&self.key, text.as_bytes());
        URL_SAFE_NO_PAD.encode(hash.as_ref().get(..HASH).unwrap_or_default())
    }
}

/// The endpoints of a cluster by what cookies say of them.
#[derive(Debug)]
pub(crate) struct Sessions {
    rule: Arc<Rule>,
    by_token: HashMap<Arc<str>, Arc<EndpointState>>,
    cookies: HashMap<u64, Cookie>,
}

/// What is said of one endpoint.
#[derive(Clone, Debug)]
struct Cookie {
    token: Arc<str>,
    field: HeaderValue,
}

impl Sessions {
    /// The table of these endpoints. What the former one holds is taken over, all of it where nothing has changed: a hash
    /// for each of thousands of endpoints is no small thing.
    pub(crate) fn settle<'a>(
        before: Option<&Arc<Self>>,
        rule: &Arc<Rule>,
        peers: impl Iterator<Item = &'a Peer> + Clone,
    ) -> Arc<Self> {
        let before = before.filter(|before| Arc::ptr_eq(&before.rule, rule));
        if let Some(before) = before {
            let mut same = peers.clone().map(|peer| before.cookies.contains_key(&peer.state.id()));
            if same.clone().count() == before.cookies.len() && same.all(|known| known) {
                return Arc::clone(before);
            }
        }
        let mut sessions = Self { rule: Arc::clone(rule), by_token: HashMap::new(), cookies: HashMap::new() };
        for peer in peers {
            let id = peer.state.id();
            let known = before.and_then(|before| before.cookies.get(&id)).cloned();
            let cookie = known.or_else(|| {
                let token: Arc<str> = rule.token(&peer.state).into();
                // Name and path were checked when they were read.
                let field =
                    HeaderValue::try_from(format!("{}={token}{}", rule.name, rule.attributes)).ok()?;
                Some(Cookie { token, field })
            });
            if let Some(cookie) = cookie {
                sessions.by_token.insert(Arc::clone(&cookie.token), peer.state.clone());
                sessions.cookies.insert(id, cookie);
            }
        }
        Arc::new(sessions)
    }

    /// The endpoint that the request's cookie names, if it is one of ours.
    pub(crate) fn endpoint(&self, x: &Exchange) -> Option<&Arc<EndpointState>> {
        self.by_token.get(&*x.get(&self.rule.cookie)?)
    }

    /// The `Set-Cookie` that names an endpoint.
    pub(crate) fn cookie(&self, endpoint: &EndpointState) -> Option<&HeaderValue> {
        self.cookies.get(&endpoint.id()).map(|cookie| &cookie.field)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use serde_json::{Value, json};

    use super::super::picker::tests::peers;
    use super::*;
    use crate::testing::exchange;

    fn sessions(fields: Value, peers: &[Peer]) -> Arc<Sessions> {
        let wire: Wire = serde_json::from_value(fields).unwrap();
        Sessions::settle(None, &Arc::new(Rule::new(&wire, &own_key(|| b"own".to_vec()))), peers.iter())
    }

    #[test]
    fn the_cookie_says_what_was_configured() {
        let peers = peers(&[1]);
        for (fields, end) in [
            (json!({}), "; Path=/; HttpOnly"),
            (json!({"max_age": 60, "path": "/a"}), "; Path=/a; Max-Age=60; HttpOnly"),
            (
                json!({"secure": true, "http_only": false, "same_site": "none"}),
                "; Path=/; Secure; SameSite=None",
            ),
            (json!({"same_site": "lax"}), "; Path=/; HttpOnly; SameSite=Lax"),
        ] {
            let sessions = sessions(fields.clone(), &peers);
            let cookie = sessions.cookie(&peers[0].state).unwrap().to_str().unwrap();
            let (value, attributes) = cookie.split_at("postern_node=".len() + 22);
            assert_eq!(attributes, end, "{fields}");
            assert!(value.starts_with("postern_node="), "{cookie}");
        }
    }

    #[test]
    fn a_table_is_kept_while_its_endpoints_are_the_same() {
        let peers = peers(&[1, 1, 1]);
        let first = sessions(json!({}), &peers[..2]);
        let again = Sessions::settle(Some(&first), &first.rule, peers[..2].iter().rev());
        assert!(Arc::ptr_eq(&first, &again));
        let other = Sessions::settle(Some(&first), &first.rule, peers[1..].iter());
        assert_eq!(other.cookie(&peers[1].state), first.cookie(&peers[1].state));
        assert!(other.cookie(&peers[0].state).is_none() && other.cookie(&peers[2].state).is_some());
    }

    #[test]
    fn a_cookie_leads_back_to_its_endpoint_under_the_same_key_only() {
        let peers = peers(&[1, 1, 0]);
        let ours = sessions(json!({}), &peers);
        let others = sessions(json!({"key": "another key of us"}), &peers);
        for peer in &peers {
            let cookie = ours.cookie(&peer.state).unwrap().to_str().unwrap().to_owned();
            let cookie = format!("a=b; {}; c=d", cookie.split(';').next().unwrap());
            let x = exchange("GET", "http://a/").header("cookie", &cookie).build();
            assert_eq!(ours.endpoint(&x).unwrap().id(), peer.state.id());
            assert!(others.endpoint(&x).is_none());
        }
        for cookie in ["postern_node=", "postern_node=10.0.0.1:80", "other=x", ""] {
            let x = exchange("GET", "http://a/").header("cookie", cookie).build();
            assert!(ours.endpoint(&x).is_none(), "{cookie}");
        }
    }
}
