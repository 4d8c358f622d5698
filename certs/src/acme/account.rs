//! The account at an authority: made once by whichever replica is first, kept in the store, used by all.

use std::sync::Arc;

use instant_acme::{Account, AccountCredentials, Error, ExternalAccountKey, NewAccount};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::transport::Transport;
use super::{Failure, Settings, Vault, digest};
use crate::ca::store::{Store, SwapError, Version};

/// As it stands in the store.
#[derive(Serialize, Deserialize)]
struct Kept {
    directory: String,
    /// The credentials, as [`Vault`] keeps them.
    credentials: String,
}

/// The account of one directory.
pub(super) struct Accounts {
    store: Arc<dyn Store>,
    vault: Arc<Vault>,
    name: String,
    /// Orders of one process do not each make an account.
    one: Mutex<()>,
}

impl Accounts {
    pub(super) fn new(settings: &Settings, store: Arc<dyn Store>, vault: Arc<Vault>) -> Self {
        // Another external account is another account.
        let external = settings.external_account.as_ref().map(|external| external.kid.as_str());
        let name = format!("account/{}", digest(&settings.directory, external.into_iter()));
        Self { store, vault, name, one: Mutex::default() }
    }

    /// The account, made if there is none.
    pub(super) async fn open(&self, settings: &Settings, transport: &Transport) -> Result<Account, Refused> {
        let _one = self.one.lock().await;
        if let Some((_, account)) = self.load(transport).await? {
            return Ok(account);
        }
        let contact: Vec<&str> = settings.contact.iter().map(String::as_str).collect();
        let new = NewAccount {
            contact: &contact,
            terms_of_service_agreed: settings.terms_agreed,
            only_return_existing: false,
        };
        let external = settings
            .external_account
            .as_ref()
            .map(|it| ExternalAccountKey::new(it.kid.clone(), &it.hmac_key));
        let made = Account::builder_with_http(Box::new(transport.clone()))
            .create(&new, settings.directory.clone(), external.as_ref())
            .await;
        let (account, credentials) = made?;
        let text = Zeroizing::new(serde_json::to_string(&credentials)?);
        let sealed = self.vault.close(&self.purpose(), &text).map_err(Failure::unreached)?;
        let kept = Kept { directory: settings.directory.clone(), credentials: sealed };
        match self.store.swap(&self.name, None, &serde_json::to_vec(&kept)?).await {
            Ok(_) => {
                tracing::info!(
                    directory = settings.directory,
                    account = account.id(),
                    "an ACME account was made"
                );
                Ok(account)
            }
            Err(SwapError::Conflict) => {
                // Another replica was faster; its account is used, and this one is not left behind.
                if let Err(error) = account.deactivate().await {
                    tracing::debug!(%error, "an account that nobody uses stays");
                }
                let there = self.load(transport).await?;
                there.map(|(_, account)| account).ok_or_else(|| {
                    Refused::Failure(Failure::unreached("the account in the store was removed"))
                })
            }
            Err(SwapError::Store(error)) => Err(Refused::Failure(Failure::unreached(error))),
        }
    }

    /// The authority does not know the account any more: the next order makes another one.
    pub(super) async fn forget(&self) {
        let Ok(Some(stored)) = self.store.load(&self.name).await else { return };
        if self.store.remove(&self.name, stored.version).await.is_ok() {
            tracing::warn!("the authority does not know the ACME account any more: another one will be made");
        }
    }

    async fn load(&self, transport: &Transport) -> Result<Option<(Version, Account)>, Refused> {
        let Some(stored) = self.store.load(&self.name).await.map_err(Failure::unreached)? else {
            return Ok(None);
        };
        let kept: Kept = serde_json::from_slice(&stored.value)?;
        let text = self.vault.open(&self.purpose(), &kept.credentials).map_err(|error| {
            Failure::unreached(format!("the account in the store cannot be used: {error}"))
        })?;
        let credentials: AccountCredentials = serde_json::from_str(&text)?;
        let builder = Account::builder_with_http(Box::new(transport.clone()));
        Ok(Some((stored.version, builder.from_credentials(credentials).await?)))
    }

    fn purpose(&self) -> String {
        format!("acme {}", self.name)
    }
}

/// The account cannot be used: for a reason of ours, or one of the authority.
pub(super) enum Refused {
    Failure(Failure),
    Authority(Error),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Authority(error)
    }
}

impl From<serde_json::Error> for Refused {
    fn from(error: serde_json::Error) -> Self {
        Self::Failure(Failure::unreached(error))
    }
}
