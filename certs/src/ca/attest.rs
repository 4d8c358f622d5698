//! Who asks: the proofs that somebody may have an identity, each in a file of its own, and the session that comes of them.
//!
//! A proof that cannot be judged now is refused. Nothing that a caller says about himself counts but what a proof allows.

mod call;
pub mod consul;
pub mod kubernetes;
pub mod node;
pub mod renewal;
pub mod session;
pub mod token;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Current;
use super::mark::Mark;
use super::proto::attest_request::Proof;
use crate::grpc::Caller;
use crate::identity::SpiffeId;
use consul::Consul;
use kubernetes::Kubernetes;
use token::JoinTokens;

/// What a proof allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub identity: SpiffeId,
    pub dns_names: Vec<String>,
    /// Of a certificate by this proof.
    pub longest_ttl: Option<Duration>,
    /// The kind of proof.
    pub attestor: &'static str,
    /// What it was, for the log; no secret.
    pub evidence: String,
    /// Which process of the identity this is, where the proof tells.
    pub process: Option<String>,
}

/// Why somebody is not who he says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The proof does not hold.
    #[error("{0}")]
    Proof(String),
    /// It holds, and is not for this.
    #[error("{0}")]
    Identity(String),
    /// It is none.
    #[error("{0}")]
    Malformed(String),
    /// Nobody can tell now.
    #[error("{0}")]
    Unavailable(String),
}

/// What a proof is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Judging<'a> {
    pub caller: &'a Caller,
    pub current: &'a Current,
    /// By which the authority knows its own work.
    pub mark: &'a Mark,
    pub now: SystemTime,
}

/// The kinds of proof that are taken.
#[derive(Default)]
pub struct Attestors {
    pub tokens: Option<Arc<JoinTokens>>,
    pub kubernetes: Option<Kubernetes>,
    pub consul: Option<Consul>,
}

impl fmt::Debug for Attestors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attestors").finish_non_exhaustive()
    }
}

/// The kind of a proof, as limits and metrics know it.
pub fn kind(proof: &Proof) -> &'static str {
    match proof {
        Proof::JoinToken(_) => "join_token",
        Proof::Kubernetes(_) => "kubernetes",
        Proof::Renewal(_) => "renewal",
        Proof::Consul(_) => "consul",
    }
}

impl Attestors {
    /// Judges one proof. `wanted` is who the caller wants to be, where he says so.
    ///
    /// # Errors
    /// Why it is refused.
    pub async fn attest(
        &self,
        proof: &Proof,
        wanted: Option<&SpiffeId>,
        judging: &Judging<'_>,
    ) -> Result<Grant, Refusal> {
        let Judging { current, now, .. } = *judging;
        let off = || Refusal::Proof(format!("proofs of the kind {} are not taken here", kind(proof)));
        let domain = &current.bundle().trust_domain;
        let grant = match proof {
            Proof::Renewal(_) => renewal::attest(judging)?,
            Proof::JoinToken(token) => {
                let tokens = self.tokens.as_ref().ok_or_else(off)?;
                tokens.redeem(&token.secret, wanted, domain, now).await?
            }
            Proof::Kubernetes(token) => {
                self.kubernetes.as_ref().ok_or_else(off)?.attest(&token.token, domain, now).await?
            }
            Proof::Consul(token) => {
                self.consul.as_ref().ok_or_else(off)?.attest(&token.token, &token.service, domain).await?
            }
        };
        if grant.identity.trust_domain() != domain.as_str() {
            return Err(Refusal::Identity(format!("{} is not of the trust domain {domain}", grant.identity)));
        }
        match wanted {
            Some(wanted) if *wanted != grant.identity => {
                Err(Refusal::Identity(format!("the proof is for {} and not for {wanted}", grant.identity)))
            }
            _ => Ok(grant),
        }
    }
}
