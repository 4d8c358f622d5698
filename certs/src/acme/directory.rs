//! An authority by the address of its directory: what is said to it for one certificate (RFC 8555, section 7.4).

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use instant_acme::{
    Account, AuthorizationStatus, CertificateIdentifier, ChallengeType, Error, Identifier, NewOrder, Order,
    OrderStatus, Problem, RetryPolicy,
};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::account::{Accounts, Refused};
use super::transport::Transport;
use super::{Ask, Authority, Challenge, ChallengeKind, Failure, Hints, Present, Vault};
use crate::ca::authority::pem_certificates;
use crate::ca::store::Store;
use crate::grpc::chain;

/// How long the authority may look at the names, and take to issue.
const PATIENCE: RetryPolicy = RetryPolicy::new()
    .initial_delay(Duration::from_millis(250))
    .backoff(1.5)
    .timeout(Duration::from_secs(180));

/// Problems that say nothing about the order, and go by themselves.
const PASSING: [&str; 2] = ["badNonce", "serverInternal"];

/// Where the authority is, and who asks.
#[derive(Clone)]
pub struct Settings {
    /// The URL of its directory.
    pub directory: String,
    /// `mailto:` URLs.
    pub contact: Vec<String>,
    /// The terms of service are agreed to.
    pub terms_agreed: bool,
    /// The account at the authority's operator that the ACME account belongs to.
    pub external_account: Option<ExternalAccount>,
    /// Whom its certificate may be from.
    pub roots: Arc<RootCertStore>,
    /// Which kind of certificate, where the authority offers several.
    pub profile: Option<String>,
    /// How names are shown to be ours.
    pub challenge: ChallengeKind,
}

/// External account binding (RFC 8555, section 7.3.4).
#[derive(Clone)]
pub struct ExternalAccount {
    pub kid: String,
    pub hmac_key: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for ExternalAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalAccount").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// The authority.
pub struct Directory {
    settings: Settings,
    accounts: Accounts,
}

impl Directory {
    /// By these settings; its account is kept in `store`.
    #[must_use]
    pub fn new(settings: Settings, store: Arc<dyn Store>, vault: Arc<Vault>) -> Self {
        let accounts = Accounts::new(&settings, store, vault);
        Self { settings, accounts }
    }

    async fn account(&self, transport: &Transport) -> Result<Account, Failure> {
        match self.accounts.open(&self.settings, transport).await {
            Ok(account) => Ok(account),
            Err(Refused::Failure(failure)) => Err(failure),
            Err(Refused::Authority(error)) => Err(self.failed(error, transport).await),
        }
    }

    /// What an error of the library means for the order.
    async fn failed(&self, error: Error, transport: &Transport) -> Failure {
        let failure = match &error {
            Error::Api(problem) => {
                let kind = kind(problem);
                if kind == "accountDoesNotExist" {
                    self.accounts.forget().await;
                    Failure::unreached(words(problem))
                } else if PASSING.contains(&kind) {
                    Failure::unreached(words(problem))
                } else {
                    Failure::refused(words(problem))
                }
            }
            Error::Timeout(_) => Failure::refused("the authority did not decide in time"),
            error => Failure::unreached(chain(error)),
        };
        Failure { not_before: transport.paused(), ..failure }
    }

    async fn order(
        &self,
        ask: Ask<'_>,
        present: &dyn Present,
        transport: &Transport,
    ) -> Result<String, Failure> {
        let account = self.account(transport).await?;
        let failed = async |error| self.failed(error, transport).await;
        let identifiers: Vec<Identifier> = ask.names.iter().cloned().map(Identifier::Dns).collect();
        let replaced = ask.replaces.map(leaf).transpose().map_err(Failure::unreached)?;
        let mut new = NewOrder::new(&identifiers);
        if let Some(profile) = &self.settings.profile {
            new = new.profile(profile);
        }
        if let Some(replaced) = &replaced
            && let Ok(id) = CertificateIdentifier::try_from(replaced)
        {
            new = new.replaces(id);
        }
        let mut order = match account.new_order(&new).await {
            Ok(order) => order,
            Err(error) => return Err(failed(error).await),
        };
        let kind = ask.challenge.unwrap_or(self.settings.challenge);
        let challenges = match challenges(&mut order, kind).await {
            Ok(challenges) => challenges,
            Err(Refused::Failure(failure)) => return Err(failure),
            Err(Refused::Authority(error)) => return Err(failed(error).await),
        };
        if !challenges.is_empty() {
            present.present(challenges).await?;
            if let Err(error) = ready(&mut order, kind).await {
                return Err(failed(error).await);
            }
            match order.poll_ready(&PATIENCE).await {
                Ok(OrderStatus::Invalid) => return Err(refused(&mut order).await),
                Ok(_) => {}
                Err(error) => return Err(failed(error).await),
            }
        }
        if let Err(error) = order.finalize_csr(ask.csr).await {
            return Err(failed(error).await);
        }
        match order.poll_certificate(&PATIENCE).await {
            Ok(chain) => Ok(chain),
            Err(error) => Err(failed(error).await),
        }
    }

    async fn renewal(&self, chain: &str, transport: &Transport) -> Result<Option<Hints>, Failure> {
        let leaf = leaf(chain).map_err(Failure::unreached)?;
        let Ok(id) = CertificateIdentifier::try_from(&leaf) else { return Ok(None) };
        let account = self.account(transport).await?;
        match account.renewal_info(&id).await {
            Ok((info, again)) => Ok(Some(Hints {
                start: info.suggested_window.start.into(),
                end: info.suggested_window.end.into(),
                again: SystemTime::now() + again,
            })),
            Err(Error::Unsupported(_)) => Ok(None),
            Err(error) => Err(self.failed(error, transport).await),
        }
    }

    fn transport(&self) -> Result<Transport, Failure> {
        Transport::new(self.settings.roots.clone()).map_err(Failure::unreached)
    }
}

impl Authority for Directory {
    fn obtain<'a>(
        &'a self,
        ask: Ask<'a>,
        present: &'a dyn Present,
    ) -> BoxFuture<'a, Result<String, Failure>> {
        Box::pin(async move { self.order(ask, present, &self.transport()?).await })
    }

    fn hints<'a>(&'a self, chain: &'a str) -> BoxFuture<'a, Result<Option<Hints>, Failure>> {
        Box::pin(async move { self.renewal(chain, &self.transport()?).await })
    }
}

fn asked(kind: ChallengeKind) -> ChallengeType {
    match kind {
        ChallengeKind::Http01 => ChallengeType::Http01,
        ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
    }
}

/// What has to be answered before the order is ready. Names that were shown to be ours a short time ago ask for nothing.
async fn challenges(order: &mut Order, kind: ChallengeKind) -> Result<Vec<Challenge>, Refused> {
    let mut found = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(next) = authorizations.next().await {
        let mut authorization = next?;
        let name = authorization.identifier().to_string();
        match authorization.status {
            AuthorizationStatus::Pending => {}
            AuthorizationStatus::Valid => continue,
            status => {
                let reason = format!("{name}: the authorization is {status:?} already");
                return Err(Failure::refused(reason).into());
            }
        }
        let Some(challenge) = authorization.challenge(asked(kind)) else {
            return Err(
                Failure::refused(format!("{name}: the authority does not offer {}", kind.as_str())).into()
            );
        };
        found.push(Challenge {
            kind,
            name,
            token: challenge.token.clone(),
            authorization: challenge.key_authorization().as_str().to_owned(),
        });
    }
    Ok(found)
}

/// The authority may look.
async fn ready(order: &mut Order, kind: ChallengeKind) -> Result<(), Error> {
    let mut authorizations = order.authorizations();
    while let Some(next) = authorizations.next().await {
        let mut authorization = next?;
        if authorization.status == AuthorizationStatus::Pending
            && let Some(mut challenge) = authorization.challenge(asked(kind))
        {
            challenge.set_ready().await?;
        }
    }
    Ok(())
}

/// What the authority saw when it looked.
async fn refused(order: &mut Order) -> Failure {
    let mut seen = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let name = authorization.identifier().to_string();
        if let Ok(state) = authorization.refresh().await {
            let problems = state.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
            seen.extend(problems.map(|problem| format!("{name}: {}", words(problem))));
        }
    }
    match seen.is_empty() {
        true => Failure::refused("the authority refuses the order, and does not say why"),
        false => Failure::refused(seen.join("; ")),
    }
}

/// The last part of a problem's type.
fn kind(problem: &Problem) -> &str {
    problem.r#type.as_deref().and_then(|kind| kind.rsplit(':').next()).unwrap_or_default()
}

fn words(problem: &Problem) -> String {
    let mut text = problem.detail.clone().unwrap_or_else(|| "no reason is given".to_owned());
    for part in &problem.subproblems {
        if let Some(detail) = &part.detail {
            text = format!("{text}; {detail}");
        }
    }
    match kind(problem) {
        "" => text,
        kind => format!("{text} ({kind})"),
    }
}

fn leaf(chain: &str) -> Result<CertificateDer<'static>, String> {
    let all = pem_certificates(chain.as_bytes()).map_err(|error| error.to_string())?;
    all.into_iter().next().ok_or_else(|| "the chain is empty".to_owned())
}
