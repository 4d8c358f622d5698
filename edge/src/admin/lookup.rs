//! Many entries of a lookup table in one request: `PATCH /apisix/admin/lookup_tables/ID/entries`.
//!
//! The body is an object of keys: an entry puts it, `null` deletes it. All of them are checked before the first is
//! written. They are written side by side, not as one: when the store fails half-way, the answer says how far it came,
//! and the same request may be sent again.

use std::collections::BTreeMap;

use config::{ConfigError, Kind, Resource, ResourceKey};
use futures_util::stream::{self, StreamExt};
use http::StatusCode;
use serde_json::{Value, json};

use super::Admin;
use super::auth::Identity;
use super::reply::Reply;
use crate::store::{DeleteOptions, PutOptions, StoreError};

/// Writes that are under way at the same time: stores that sync to disk take them together.
const AT_ONCE: usize = 128;

/// What is done to one entry.
enum Write {
    Put(ResourceKey, Value),
    Delete(ResourceKey),
}

/// What came of it.
#[derive(Default)]
struct Outcome {
    put: usize,
    deleted: usize,
    failed: Option<StoreError>,
}

impl Admin {
    pub(super) async fn lookup_entries(
        &self,
        table: &str,
        body: Option<Value>,
        identity: Identity<'_>,
    ) -> Result<Reply, Reply> {
        let Some(Value::Object(entries)) = body else {
            return Err(Reply::bad_request("write an object of keys: an entry puts it, null deletes it"));
        };
        let owner = ResourceKey::parse(Kind::LookupTable, table).map_err(|_| Reply::not_found())?;
        let _order = self.order.read().await;
        if self.store.get(&owner).await?.is_none() {
            return Err(Reply::error(StatusCode::NOT_FOUND, "lookup table not found"));
        }
        let (catalog, table) = (self.catalog.clone(), table.to_owned());
        let checked = tokio::task::spawn_blocking(move || {
            let mut errors = Vec::new();
            let mut references: BTreeMap<ResourceKey, String> = BTreeMap::new();
            let mut writes = Vec::with_capacity(entries.len());
            for (name, value) in entries {
                let at = format!("/{}", config::error::escape(&name));
                let key = ResourceKey::parse(Kind::LookupEntry, &format!("{table}/entries/{name}"));
                let key = match key {
                    Ok(key) => key,
                    Err(error) => {
                        errors.push(ConfigError::new(at, error.kind));
                        continue;
                    }
                };
                if value.is_null() {
                    writes.push(Write::Delete(key));
                    continue;
                }
                match Resource::parse(&key, &value, &*catalog) {
                    Ok(resource) => {
                        resource.visit_references(&mut |pointer, target| {
                            references.entry(target).or_insert_with(|| format!("{at}{pointer}"));
                        });
                        let value = super::resource::stored_value(&key, resource);
                        writes.push(Write::Put(key, value));
                    }
                    Err(found) => errors.extend(found.into_iter().map(|error| error.under(&at))),
                }
            }
            if errors.is_empty() { Ok((writes, references)) } else { Err(errors) }
        });
        let checked = checked
            .await
            .map_err(|error| Reply::error(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let (writes, references) = checked.map_err(|errors| Reply::invalid(Kind::LookupEntry, &errors))?;
        for (target, pointer) in &references {
            self.check_reference(Kind::LookupEntry, pointer, target).await?;
        }
        let outcome = stream::iter(writes)
            .map(|write| self.write_entry(write, identity.name))
            .buffer_unordered(AT_ONCE)
            .fold(Outcome::default(), |mut outcome, written| async move {
                match written {
                    Ok((put, deleted)) => {
                        outcome.put += put;
                        outcome.deleted += deleted;
                    }
                    Err(error) => outcome.failed = Some(error),
                }
                outcome
            })
            .await;
        match outcome.failed {
            None => Ok(Reply::json(StatusCode::OK, &json!({"put": outcome.put, "deleted": outcome.deleted}))),
            Some(error) => {
                tracing::warn!(%error, put = outcome.put, deleted = outcome.deleted, "many entries");
                Err(error.into())
            }
        }
    }

    async fn write_entry(&self, write: Write, author: &str) -> Result<(usize, usize), StoreError> {
        let author = author.to_owned();
        match write {
            Write::Put(key, value) => {
                let options = PutOptions { author, ..PutOptions::default() };
                self.store.put(&key, value, options).await.map(|_| (1, 0))
            }
            Write::Delete(key) => {
                let deleted = self.store.delete(&key, DeleteOptions { author }).await?;
                Ok((0, usize::from(deleted)))
            }
        }
    }
}
