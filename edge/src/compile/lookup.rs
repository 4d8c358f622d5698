//! Lookup tables from resources and fetched lists.
//!
//! Tables are found by whoever needs them through `carry`, so that an entry that changes compiles no route. What stays
//! the same keeps its entry; what is wrong is refused where it would have been found.

use std::sync::Arc;

use config::error::escape;
use config::graph::{Graph, Item};
use config::lookup_table::LookupEntry;
use config::{ConfigError, Kind, Resource, ResourceKey};
use layers::lookup::{Entry, Origin, Parts, Standing, Table};
use layers::upstream::cluster::Cluster;

use super::{Compiler, client_certificate};

impl Compiler {
    fn table(&self, id: &str) -> Arc<Table> {
        let table = self.carry.get_or(&Table::carried(id), || Table::new(id));
        self.env.lookups.keep(&table);
        table
    }

    /// The table and its list.
    pub(super) fn lookup_table(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        let table = self.table(&key.id);
        let lookups = self.env.lookups.clone();
        let Some(Resource::LookupTable(written)) = item.map(|item| &item.resource) else {
            lookups.follow(&key.id, None);
            table.replace(Origin::Table, Vec::new());
            table.replace(Origin::List, Vec::new());
            // One that is set aside has had entries that are not known now.
            let rejected = graph.rejected_at(key).is_some();
            let standing = if rejected { Standing::Incomplete } else { Standing::Missing };
            table.stand(standing, 300, &self.env.clusters);
            if !rejected {
                lookups.forget_empty(&table);
            }
            return;
        };
        lookups.follow(&key.id, written.source.as_deref());
        let fetched = written.source.as_ref().and_then(|_| lookups.fetched(&key.id));
        let complete = written.source.is_none() || fetched.is_some();
        let standing = if complete { Standing::Complete } else { Standing::Incomplete };
        // The clusters of entries are made with what is said here.
        table.stand(standing, written.idle.get(), &self.env.clusters);
        let mut errors = Vec::new();
        let entries = written.entries.iter().map(|(name, written)| {
            let entry = self.entry(graph, &table, Origin::Table, &name.as_str().into(), written);
            entry.unwrap_or_else(|error| {
                let refused = Entry::refused(&name.as_str().into(), error.to_string());
                errors.push(error.under(&format!("/entries/{}", escape(name))));
                refused
            })
        });
        let entries = entries.collect();
        table.replace(Origin::Table, entries);
        let mut wrong = Vec::new();
        let listed = fetched.iter().flat_map(|list| list.iter()).map(|(name, written)| {
            let entry = match written {
                Ok(written) => {
                    self.entry(graph, &table, Origin::List, name, written).map_err(|error| error.to_string())
                }
                Err(why) => Err(why.to_string()),
            };
            entry.unwrap_or_else(|why| {
                wrong.push((name.clone(), why.clone()));
                Entry::refused(name, why)
            })
        });
        let listed = listed.collect();
        table.replace(Origin::List, listed);
        lookups.refused(&key.id, wrong);
        if !errors.is_empty() {
            self.refuse(key, errors);
        }
    }

    /// An entry that is an object of its own.
    pub(super) fn lookup_entry(&mut self, graph: &Graph, key: &ResourceKey, item: Option<&Item>) {
        let Some(owner) = key.lookup_table() else { return };
        let (table, name) = (self.table(&owner.id), Arc::<str>::from(key.own_id()));
        let entry = match item.map(|item| &item.resource) {
            Some(Resource::LookupEntry(written)) => {
                match self.entry(graph, &table, Origin::Object, &name, written) {
                    Ok(entry) => Some(entry),
                    Err(error) => {
                        self.refuse(key, vec![error.clone()]);
                        Some(Entry::refused(&name, error.to_string()))
                    }
                }
            }
            _ => graph.rejected_at(key).map(|rejected| {
                let told: Vec<String> = rejected.errors.iter().map(ToString::to_string).collect();
                Entry::refused(&name, told.join("; "))
            }),
        };
        table.put(Origin::Object, &name, entry);
        self.env.lookups.forget_empty(&table);
    }

    /// An entry, seen to work: what would fail at its first request fails here.
    fn entry(
        &self,
        graph: &Graph,
        table: &Table,
        origin: Origin,
        key: &Arc<str>,
        written: &Arc<LookupEntry>,
    ) -> Result<Arc<Entry>, ConfigError> {
        let named = written.upstream_id.as_ref().map(|id| id.key(Kind::Upstream));
        let certificate = match &written.upstream {
            Some(upstream) => {
                client_certificate(upstream, graph).map_err(|error| error.under("/upstream"))?
            }
            None => None,
        };
        let known = || table.at(origin, key).filter(|entry| entry.written() == Some(written));
        if let (Some(upstream), None) = (&written.upstream, &certificate) {
            // Thousands of entries come again and again; only what is new is looked at.
            if let Some(entry) = known() {
                return Ok(entry);
            }
            Cluster::check(upstream, None, &self.env.clusters).map_err(|error| error.under("/upstream"))?;
        }
        if let (Some(upstream), Some(certificate)) = (&written.upstream, &certificate) {
            Cluster::check(upstream, Some(certificate.clone()), &self.env.clusters)
                .map_err(|error| error.under("/upstream"))?;
        }
        let named = named.and_then(|key| self.clusters.of(&key.to_string()));
        Ok(Entry::new(key, written, Parts { named, certificate }))
    }
}
