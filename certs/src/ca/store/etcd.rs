//! The store in etcd: keys below a prefix, compared by their `mod_revision`.
//!
//! One endpoint at a time, and the next after a failure: the client library would spread questions over all of them, those
//! that are down included.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, ConnectOptions, GetOptions, Txn, TxnOp, WatchOptions};
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::{Store, StoreError, Stored, SwapError, Version};
pub use crate::etcd::{Settings, Tls};

/// Keys in etcd.
pub struct Etcd {
    settings: Settings,
    options: ConnectOptions,
    name: String,
    member: Mutex<Member>,
}

#[derive(Default)]
struct Member {
    turn: usize,
    client: Option<Client>,
}

impl Etcd {
    /// A store that connects when it is asked. Reads the files of TLS.
    ///
    /// # Errors
    /// There is no endpoint, or a file cannot be read.
    pub fn new(settings: Settings) -> Result<Self, StoreError> {
        let name = format!("etcd {}", settings.endpoints.join(", "));
        let unusable = |reason: String| StoreError::Unavailable { store: name.clone(), reason };
        if settings.endpoints.is_empty() {
            return Err(unusable("no endpoint is given".to_owned()));
        }
        let options = settings.options().map_err(unusable)?;
        let options = options.with_timeout(settings.timeout).with_connect_timeout(settings.timeout);
        let prefix = settings.prefix.trim_end_matches('/').to_owned();
        Ok(Self { settings: Settings { prefix, ..settings }, options, name, member: Mutex::default() })
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.settings.prefix)
    }

    fn unavailable(&self, reason: impl ToString) -> StoreError {
        StoreError::Unavailable { store: self.name.clone(), reason: reason.to_string() }
    }

    async fn client(&self) -> Result<Client, StoreError> {
        let mut member = self.member.lock().await;
        if let Some(client) = &member.client {
            return Ok(client.clone());
        }
        let mut problem = None;
        for _ in 0..self.settings.endpoints.len() {
            let turn = member.turn % self.settings.endpoints.len();
            let endpoint = self.settings.endpoints.get(turn).map(String::as_str).unwrap_or_default();
            let connect = Client::connect([endpoint], Some(self.options.clone()));
            match timeout(self.settings.timeout, connect).await {
                Ok(Ok(client)) => {
                    member.client = Some(client.clone());
                    return Ok(client);
                }
                Ok(Err(error)) => problem = Some(error.to_string()),
                Err(_) => problem = Some(format!("{endpoint} does not answer")),
            }
            member.turn += 1;
        }
        Err(self.unavailable(problem.unwrap_or_default()))
    }

    /// Asks; after a failure the next question goes to the next member.
    async fn ask<T>(
        &self,
        limit: Duration,
        question: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error>,
    ) -> Result<T, StoreError> {
        let client = self.client().await?;
        let problem = match timeout(limit, question(client)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} ms", limit.as_millis()),
        };
        let mut member = self.member.lock().await;
        member.client = None;
        member.turn += 1;
        Err(self.unavailable(problem))
    }

    /// One transaction: `change`, if the key is what was seen.
    async fn commit(&self, name: &str, seen: Option<Version>, change: TxnOp) -> Result<Version, SwapError> {
        let revision = seen.map_or(0, |seen| i64::try_from(seen.0).unwrap_or(i64::MAX));
        let compare = Compare::mod_revision(self.key(name), CompareOp::Equal, revision);
        let txn = Txn::new().when([compare]).and_then([change]);
        let ask = async |mut client: Client| client.txn(txn).await;
        let answer = self.ask(self.settings.timeout, ask).await?;
        if !answer.succeeded() {
            return Err(SwapError::Conflict);
        }
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(Version(u64::try_from(revision).unwrap_or_default()))
    }
}

impl Store for Etcd {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Stored>, StoreError>> {
        Box::pin(async move {
            let key = self.key(name);
            let ask = async |mut client: Client| client.get(key, None).await;
            let answer = self.ask(self.settings.timeout, ask).await?;
            Ok(answer.kvs().first().map(|pair| Stored {
                version: Version(u64::try_from(pair.mod_revision()).unwrap_or_default()),
                value: pair.value().to_vec(),
            }))
        })
    }

    fn list<'a>(&'a self, start: &'a str) -> BoxFuture<'a, Result<Vec<(String, Stored)>, StoreError>> {
        Box::pin(async move {
            let key = self.key(start);
            let names = {
                let options = GetOptions::new().with_prefix().with_keys_only();
                let ask = async |mut client: Client| client.get(key, Some(options)).await;
                self.ask(self.settings.timeout, ask).await?
            };
            let own = format!("{}/", self.settings.prefix);
            let mut found = Vec::new();
            // One by one: together they may be larger than what an answer may be.
            for pair in names.kvs() {
                let Some(name) = pair.key_str().ok().and_then(|key| key.strip_prefix(&own)) else { continue };
                if let Some(stored) = self.load(name).await? {
                    found.push((name.to_owned(), stored));
                }
            }
            found.sort_by(|one, other| one.0.cmp(&other.0));
            Ok(found)
        })
    }

    fn swap<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        value: &'a [u8],
    ) -> BoxFuture<'a, Result<Version, SwapError>> {
        Box::pin(self.commit(name, seen, TxnOp::put(self.key(name), value, None)))
    }

    fn remove<'a>(&'a self, name: &'a str, seen: Version) -> BoxFuture<'a, Result<(), SwapError>> {
        Box::pin(
            async move { self.commit(name, Some(seen), TxnOp::delete(self.key(name), None)).await.map(drop) },
        )
    }

    fn changed<'a>(
        &'a self,
        name: &'a str,
        seen: Option<Version>,
        at_most: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            if self.load(name).await?.map(|stored| stored.version) != seen {
                return Ok(());
            }
            let key = self.key(name);
            let since = seen.and_then(|seen| i64::try_from(seen.0 + 1).ok());
            let limit = at_most + self.settings.timeout;
            self.ask(limit, async |mut client: Client| {
                let options = since.map(|since| WatchOptions::new().with_start_revision(since));
                let mut stream = client.watch(key, options).await?;
                let wait = async {
                    while let Some(answer) = stream.message().await? {
                        if answer.canceled() || !answer.events().is_empty() {
                            break;
                        }
                    }
                    Ok(())
                };
                timeout(at_most, wait).await.unwrap_or(Ok(()))
            })
            .await
        })
    }
}
