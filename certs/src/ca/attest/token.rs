//! Join tokens: secrets that an operator makes for somebody, good for a while and as a rule for one use.
//!
//! A token is kept as its hash with what it allows. A use is counted before its session is given, by a swap that only one of
//! several replicas wins; what was used up stays known until its end, so that a second use is told from a wrong token.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Grant, Refusal};
use crate::ca::store::{Store, SwapError};
use crate::identity::{IdentityPattern, SpiffeId, TrustDomain};
use crate::trust::Fingerprint;

/// The kind of this proof.
pub const KIND: &str = "join_token";
const PREFIX: &str = "pjt_";
/// What the names of tokens in a store begin with.
const TOKENS: &str = "tokens/";
const LONGEST_TTL: Duration = Duration::from_secs(365 * 86_400);
const MOST: usize = 10_000;
/// Somebody else may win a swap; so often in a row is not by chance.
const ATTEMPTS: usize = 8;

/// A token as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// SHA-256 of the secret, in hexadecimal.
    pub hash: String,
    pub identity: IdentityPattern,
    /// Seconds since 1970.
    pub expires: u64,
    pub uses_left: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_names: Vec<String>,
    /// Of certificates, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_ttl: Option<u64>,
}

/// What a new token allows.
#[derive(Clone, Debug)]
pub struct NewToken {
    pub identity: IdentityPattern,
    pub ttl: Duration,
    pub uses: u32,
    pub dns_names: Vec<String>,
    pub longest_ttl: Option<Duration>,
}

/// Makes and redeems tokens, which all replicas of an authority have in common.
pub struct JoinTokens(Arc<dyn Store>);

/// Whether somebody who shows this means a join token.
pub(crate) fn looks_like_one(secret: &str) -> bool {
    secret.starts_with(PREFIX)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn id_of(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

/// Where a token is kept.
fn name_of(id: &str) -> Result<String, String> {
    let plain = !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if plain { Ok(format!("{TOKENS}{id}")) } else { Err("this is not the id of a token".to_owned()) }
}

/// Whether a change was made; somebody else may have been faster.
fn won<T>(swapped: Result<T, SwapError>) -> Result<bool, String> {
    match swapped {
        Ok(_) => Ok(true),
        Err(SwapError::Conflict) => Ok(false),
        Err(SwapError::Store(error)) => Err(error.to_string()),
    }
}

impl JoinTokens {
    /// Kept in `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self(store)
    }

    /// Makes a token. The secret is told once.
    ///
    /// # Errors
    /// In words, what is wrong with it, or that it cannot be kept.
    pub async fn create(
        &self,
        new: NewToken,
        domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<(Zeroizing<String>, Token), String> {
        let inside = match &new.identity {
            IdentityPattern::Any => false,
            IdentityPattern::Under(prefix) => prefix.starts_with(&format!("spiffe://{domain}/")),
            IdentityPattern::Exact(id) => id.trust_domain() == domain.as_str(),
        };
        if !inside {
            return Err(format!(
                "`{}` is not of the trust domain {domain}: write spiffe://{domain}/ns/default/sa/NAME or spiffe://{domain}/ns/default/*",
                new.identity
            ));
        }
        if new.ttl.is_zero() || new.ttl > LONGEST_TTL {
            return Err("a token is good for 1 second to 365 days".to_owned());
        }
        if new.dns_names.len() > 16 {
            return Err("a certificate has at most 16 DNS names".to_owned());
        }
        let known = self.list(now).await?;
        if known.len() >= MOST {
            return Err(format!("there are {MOST} tokens already"));
        }
        let mut bytes = Zeroizing::new([0; 32]);
        rand::fill(&mut *bytes).map_err(|_| "there is no randomness".to_owned())?;
        let secret = Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(*bytes)));
        let token = Token {
            hash: Fingerprint::of(secret.as_bytes()).to_string(),
            identity: new.identity,
            expires: seconds(now) + new.ttl.as_secs(),
            uses_left: new.uses.max(1),
            dns_names: new.dns_names,
            longest_ttl: new.longest_ttl.map(|ttl| ttl.as_secs()),
        };
        let value = serde_json::to_vec(&token).map_err(|error| error.to_string())?;
        match won(self.0.swap(&name_of(id_of(&token.hash))?, None, &value).await)? {
            true => Ok((secret, token)),
            false => Err("try again".to_owned()),
        }
    }

    /// The tokens that are still good, by id. Those that have ended are taken away.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn list(&self, now: SystemTime) -> Result<BTreeMap<String, Token>, String> {
        let mut tokens = BTreeMap::new();
        for (name, stored) in self.0.list(TOKENS).await.map_err(|error| error.to_string())? {
            let id = name.strip_prefix(TOKENS).unwrap_or(&name);
            let Ok(token) = serde_json::from_slice::<Token>(&stored.value) else {
                return Err(format!("the token {id} cannot be read"));
            };
            if token.expires <= seconds(now) {
                won(self.0.remove(&name, stored.version).await)?;
            } else {
                tokens.insert(id.to_owned(), token);
            }
        }
        Ok(tokens)
    }

    /// Takes a token away. `false` if there is none of this id.
    ///
    /// # Errors
    /// It cannot be taken away.
    pub async fn delete(&self, id: &str) -> Result<bool, String> {
        let name = name_of(id)?;
        match self.0.load(&name).await.map_err(|error| error.to_string())? {
            Some(stored) => won(self.0.remove(&name, stored.version).await),
            None => Ok(false),
        }
    }

    /// Uses a token.
    ///
    /// # Errors
    /// It is not good, or not for who the caller wants to be.
    pub async fn redeem(
        &self,
        secret: &str,
        wanted: Option<&SpiffeId>,
        domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Grant, Refusal> {
        if !looks_like_one(secret) || secret.len() > 100 {
            return Err(Refusal::Malformed(format!("this is not a join token, which begins with {PREFIX}")));
        }
        let hash = Fingerprint::of(secret.as_bytes()).to_string();
        let id = id_of(&hash);
        let name = name_of(id).map_err(Refusal::Malformed)?;
        for _ in 0..ATTEMPTS {
            let unknown = || Refusal::Proof("the join token is not known".to_owned());
            let stored = self.0.load(&name).await;
            let stored = stored.map_err(|error| Refusal::Unavailable(error.to_string()))?;
            let stored = stored.ok_or_else(unknown)?;
            let mut token: Token = serde_json::from_slice(&stored.value)
                .map_err(|_| Refusal::Unavailable(format!("the token {id} cannot be read")))?;
            if constant_time::verify_slices_are_equal(token.hash.as_bytes(), hash.as_bytes()).is_err() {
                return Err(unknown());
            }
            if token.expires <= seconds(now) {
                return Err(Refusal::Proof("the join token has expired".to_owned()));
            }
            if token.uses_left == 0 {
                return Err(Refusal::Proof("the join token was used already".to_owned()));
            }
            let identity = match (&token.identity, wanted) {
                (IdentityPattern::Exact(id), _) => id.clone(),
                (pattern, Some(wanted))
                    if pattern.matches(wanted) && wanted.trust_domain() == domain.as_str() =>
                {
                    wanted.clone()
                }
                (pattern, Some(wanted)) => {
                    return Err(Refusal::Identity(format!(
                        "the join token is for {pattern} and not for {wanted}"
                    )));
                }
                (pattern, None) => {
                    return Err(Refusal::Identity(format!(
                        "the join token is for {pattern}: say which identity"
                    )));
                }
            };
            // A caller who wants to be somebody else does not use up a token that is not for him.
            if wanted.is_some_and(|wanted| *wanted != identity) {
                let words = format!("the join token is for {identity} and not for another identity");
                return Err(Refusal::Identity(words));
            }
            token.uses_left -= 1;
            let value =
                serde_json::to_vec(&token).map_err(|error| Refusal::Unavailable(error.to_string()))?;
            let swapped = self.0.swap(&name, Some(stored.version), &value).await;
            if won(swapped).map_err(Refusal::Unavailable)? {
                return Ok(Grant {
                    identity,
                    dns_names: token.dns_names,
                    longest_ttl: token.longest_ttl.map(Duration::from_secs),
                    attestor: KIND,
                    evidence: format!("join token {id}"),
                    process: None,
                });
            }
        }
        Err(Refusal::Unavailable("the join token is being used by others".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::store::embedded::Embedded;
    use crate::ca::store::memory::Memory;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn domain() -> TrustDomain {
        "mesh.local".parse().unwrap()
    }

    fn new(identity: &str, uses: u32) -> NewToken {
        NewToken {
            identity: identity.parse().unwrap(),
            ttl: Duration::from_secs(60),
            uses,
            dns_names: vec!["orders.test".to_owned()],
            longest_ttl: Some(Duration::from_secs(3600)),
        }
    }

    fn id(name: &str) -> SpiffeId {
        format!("spiffe://mesh.local/ns/default/sa/{name}").parse().unwrap()
    }

    #[tokio::test]
    async fn a_token_is_used_once_by_the_identity_it_is_for() {
        let dir = tempfile::tempdir().unwrap();
        let open = || JoinTokens::new(Arc::new(Embedded::open(dir.path()).unwrap()));
        let tokens = open();
        let (secret, token) = tokens
            .create(new("spiffe://mesh.local/ns/default/sa/orders", 1), &domain(), at(0))
            .await
            .unwrap();
        let kept = tokens.0.load(&name_of(id_of(&token.hash)).unwrap()).await.unwrap().unwrap().value;
        let kept = String::from_utf8(kept).unwrap();
        assert!(!kept.contains(secret.as_str()), "the secret is not kept");

        let other = tokens.redeem(&secret, Some(&id("billing")), &domain(), at(1)).await;
        assert!(matches!(other, Err(Refusal::Identity(_))), "{other:?}");
        let grant = tokens.redeem(&secret, None, &domain(), at(1)).await.unwrap();
        assert_eq!((grant.identity, grant.longest_ttl), (id("orders"), Some(Duration::from_secs(3600))));
        let again = tokens.redeem(&secret, None, &domain(), at(2)).await.unwrap_err();
        assert_eq!(again, Refusal::Proof("the join token was used already".to_owned()));
        let reopened = open();
        assert!(
            reopened.redeem(&secret, None, &domain(), at(2)).await.is_err(),
            "not after a restart either"
        );
        assert_eq!(reopened.list(at(3)).await.unwrap().len(), 1);
        assert!(reopened.list(at(61)).await.unwrap().is_empty(), "what has ended is taken away");
    }

    #[tokio::test]
    async fn a_token_of_a_pattern_is_for_whom_it_covers() {
        let tokens = JoinTokens::new(Arc::new(Memory::default()));
        let (secret, _) =
            tokens.create(new("spiffe://mesh.local/ns/default/*", 2), &domain(), at(0)).await.unwrap();
        let redeem = async |name: Option<&SpiffeId>, now| tokens.redeem(&secret, name, &domain(), now).await;
        assert!(matches!(redeem(None, at(1)).await, Err(Refusal::Identity(_))));
        let elsewhere = "spiffe://mesh.local/ns/other/sa/orders".parse().unwrap();
        assert!(matches!(redeem(Some(&elsewhere), at(1)).await, Err(Refusal::Identity(_))));
        assert!(redeem(Some(&id("orders")), at(1)).await.is_ok());
        assert!(redeem(Some(&id("billing")), at(60)).await.is_err(), "it has expired");
        assert!(redeem(Some(&id("billing")), at(59)).await.is_ok());
        assert!(redeem(Some(&id("third")), at(59)).await.is_err());
        for wrong in ["", "x", "pjt_AAAA", &"pjt_".repeat(30)] {
            assert!(tokens.redeem(wrong, None, &domain(), at(1)).await.is_err());
        }
    }

    #[tokio::test]
    async fn of_many_at_once_one_wins() {
        let tokens = JoinTokens::new(Arc::new(Memory::default()));
        let (secret, _) = tokens
            .create(new("spiffe://mesh.local/ns/default/sa/orders", 1), &domain(), at(0))
            .await
            .unwrap();
        let (tokens, secret) = (std::sync::Arc::new(tokens), secret.to_string());
        let tasks = (0..20).map(|_| {
            let (tokens, secret) = (tokens.clone(), secret.clone());
            tokio::spawn(async move { tokens.redeem(&secret, None, &domain(), at(1)).await.is_ok() })
        });
        let mut won = 0;
        for task in tasks.collect::<Vec<_>>() {
            won += u32::from(task.await.unwrap());
        }
        assert_eq!(won, 1);
    }

    #[tokio::test]
    async fn what_is_no_token_is_not_made() {
        let tokens = JoinTokens::new(Arc::new(Memory::default()));
        for identity in ["*", "spiffe://other.test/a", "spiffe://other.test/*", "spiffe://mesh.local.test/*"]
        {
            assert!(tokens.create(new(identity, 1), &domain(), at(0)).await.is_err(), "{identity}");
        }
        let mut never = new("spiffe://mesh.local/a", 1);
        never.ttl = Duration::ZERO;
        assert!(tokens.create(never, &domain(), at(0)).await.is_err());
        assert!(tokens.delete("../../etc/passwd").await.is_err());
        assert!(!tokens.delete("00").await.unwrap());
    }
}
