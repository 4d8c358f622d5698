//! The route table: one immutable version of all routes, cheap to clone and to change.
//!
//! Three persistent trees share routes by `Arc`: by reversed host (each host with a tree of URIs), by URI for
//! routes that are not found by host, and by id for changes. The control thread clones the current table,
//! inserts and removes, and publishes the clone; see [`Table`] for the costs.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use super::bucket::{Bucket, Leaf};
use super::host::{HostKey, HostPattern};
use super::matcher::Route;
use super::radix::Radix;
use super::{Candidate, Entry, Found, Mode, Request, Verdict};

/// All enabled routes, as one version that does not change.
///
/// A clone is one reference count. A change to a table of which clones exist copies the nodes between root and
/// route (tens of microseconds among 100,000 routes) and leaves the clones as they were; a change to a table
/// without clones happens in place, so building needs no other interface. Dropping a version frees what no
/// other version has: little, unless it was the last one.
///
/// Order of trying, the first route whose predicates all hold being taken:
/// 1. in [`Mode::HostUri`], hosts: the exact one, then wildcards from the longest to the shortest; first those
///    with the request's port, then those without a port, at last routes without hosts;
/// 2. URIs that match exactly, then those that match as a prefix, from the longest static front to the
///    shortest;
/// 3. at one place: higher priority, then longer pattern, then lower [`Entry::order`], then id.
pub struct Table<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    mode: Mode,
    length: usize,
    by_id: Radix<Arc<Route<T>>>,
    /// By [`HostKey`]; empty unless the mode is [`Mode::HostUri`].
    by_host: Radix<Hosts<T>>,
    by_uri: Uris<T>,
}

/// What hangs at one host.
struct Hosts<T> {
    exact: Option<Site<T>>,
    /// The same bytes with a star in front.
    wildcard: Option<Site<T>>,
}

/// The routes of one host pattern.
struct Site<T> {
    pattern: Arc<str>,
    uris: Uris<T>,
}

type Uris<T> = Radix<Place<T>>;

/// What hangs at one path.
struct Place<T> {
    /// Routes that match this path only.
    exact: Bucket<T>,
    /// Routes that match all that begins with it.
    prefix: Bucket<T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Table { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Shared {
            mode: self.mode,
            length: self.length,
            by_id: self.by_id.clone(),
            by_host: self.by_host.clone(),
            by_uri: self.by_uri.clone(),
        }
    }
}

impl<T> Clone for Hosts<T> {
    fn clone(&self) -> Self {
        Hosts { exact: self.exact.clone(), wildcard: self.wildcard.clone() }
    }
}

impl<T> Default for Hosts<T> {
    fn default() -> Self {
        Hosts { exact: None, wildcard: None }
    }
}

impl<T> Clone for Site<T> {
    fn clone(&self) -> Self {
        Site { pattern: Arc::clone(&self.pattern), uris: self.uris.clone() }
    }
}

impl<T> Clone for Place<T> {
    fn clone(&self) -> Self {
        Place { exact: self.exact.clone(), prefix: self.prefix.clone() }
    }
}

impl<T> Default for Place<T> {
    fn default() -> Self {
        Place { exact: Bucket::None, prefix: Bucket::None }
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { mode, length, .. } = &*self.shared;
        f.debug_struct("Table").field("mode", mode).field("routes", length).finish()
    }
}

impl<T> Table<T> {
    pub fn new(mode: Mode) -> Self {
        let by_uri = Radix::default();
        let shared = Shared { mode, length: 0, by_id: Radix::default(), by_host: Radix::default(), by_uri };
        Table { shared: Arc::new(shared) }
    }

    pub fn mode(&self) -> Mode {
        self.shared.mode
    }

    /// How many routes there are.
    pub fn len(&self) -> usize {
        self.shared.length
    }

    pub fn is_empty(&self) -> bool {
        self.shared.length == 0
    }

    pub fn value(&self, id: &str) -> Option<&Arc<T>> {
        self.shared.by_id.get(id.as_bytes()).map(|route| &route.value)
    }

    /// Ids and values, ordered by id.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<T>)> {
        self.shared.by_id.values().map(|route| (&route.id, &route.value))
    }

    /// Adds a route, in place of the one with its id if there is one, whose value is given back.
    pub fn insert(&mut self, entry: Entry<T>) -> Option<Arc<T>> {
        let shared = Arc::make_mut(&mut self.shared);
        let route = Arc::new(Route::new(entry, shared.mode));
        let old = shared.by_id.insert(route.id.as_bytes(), Arc::clone(&route));
        if let Some(old) = &old {
            shared.unlink(old);
        } else {
            shared.length += 1;
        }
        shared.link(&route);
        old.map(|old| Arc::clone(&old.value))
    }

    /// Removes a route; gives its value.
    pub fn remove(&mut self, id: &str) -> Option<Arc<T>> {
        // Nothing is copied for a route that is not there.
        self.shared.by_id.get(id.as_bytes())?;
        let shared = Arc::make_mut(&mut self.shared);
        let old = shared.by_id.remove(id.as_bytes())?;
        shared.unlink(&old);
        shared.length -= 1;
        Some(Arc::clone(&old.value))
    }

    /// The route for a request.
    pub fn find(&self, request: &Request<'_>) -> Option<Found<'_, T>> {
        self.visit(request, |pattern, bucket| {
            bucket.first(request, |leaf| {
                let uri = leaf.uri()?;
                let route = leaf.route();
                route.admits(uri, request).ok()?;
                let host = pattern.or_else(|| route.matched_host(request).map(HostPattern::text));
                Some(Found { id: &route.id, value: &route.value, host, uri })
            })
        })
    }

    /// The routes that are tried for a request, in order, up to and with the one that is taken; for each, the
    /// first predicate that does not hold. Routes whose URI or host lead elsewhere are not tried.
    ///
    /// For operators: unlike [`Table::find`], it looks at every route of a place and allocates.
    pub fn explain(&self, request: &Request<'_>) -> Vec<Candidate> {
        let mut tried = Vec::new();
        self.visit(request, |pattern, bucket| {
            for leaf in bucket.leaves() {
                let Some(uri) = leaf.uri() else { continue };
                let route = leaf.route();
                let verdict = match route.admits(uri, request) {
                    Ok(()) => Verdict::Matched,
                    Err(predicate) => {
                        Verdict::Failed { predicate, detail: route.refusal(predicate, uri, request) }
                    }
                };
                let matched = verdict == Verdict::Matched;
                tried.push(Candidate {
                    id: Arc::clone(&route.id),
                    uri: Arc::clone(uri.text()),
                    host: pattern.cloned(),
                    priority: route.priority,
                    verdict,
                });
                if matched {
                    return Some(());
                }
            }
            None
        });
        tried
    }

    /// Shows `attempt` the places for a request in the order of trying, with the host pattern that led there,
    /// until it makes something of one.
    fn visit<'t, R>(
        &'t self,
        request: &Request<'_>,
        mut attempt: impl FnMut(Option<&'t Arc<str>>, &'t Bucket<T>) -> Option<R>,
    ) -> Option<R> {
        let shared = &*self.shared;
        if !shared.by_host.is_empty() {
            let mut key = HostKey::new(request.host, request.port);
            if request.port.is_some() {
                let found = shared.visit_host(&key, request, &mut attempt);
                if found.is_some() {
                    return found;
                }
                key.clear_port();
            }
            let found = shared.visit_host(&key, request, &mut attempt);
            if found.is_some() {
                return found;
            }
        }
        visit_uris(&shared.by_uri, request, |bucket| attempt(None, bucket))
    }
}

fn visit_uris<'t, T, R>(
    uris: &'t Uris<T>,
    request: &Request<'_>,
    attempt: impl FnMut(&'t Bucket<T>) -> Option<R>,
) -> Option<R> {
    let path = request.path;
    let mut exact = None;
    let mut prefixes: SmallVec<[&'t Bucket<T>; 8]> = SmallVec::new();
    uris.prefixes(path, |length, place| {
        if length == path.len() {
            exact = Some(&place.exact);
        }
        if !place.prefix.is_empty() {
            prefixes.push(&place.prefix);
        }
    });
    exact.into_iter().chain(prefixes.into_iter().rev()).find_map(attempt)
}

impl<T> Shared<T> {
    fn visit_host<'t, R>(
        &'t self,
        host: &HostKey,
        request: &Request<'_>,
        attempt: &mut impl FnMut(Option<&'t Arc<str>>, &'t Bucket<T>) -> Option<R>,
    ) -> Option<R> {
        let mut exact = None;
        let mut wildcards: SmallVec<[&'t Site<T>; 8]> = SmallVec::new();
        self.by_host.prefixes(host.as_bytes(), |length, hosts| {
            if length == host.as_bytes().len() {
                exact = hosts.exact.as_ref();
            }
            wildcards.extend(&hosts.wildcard);
        });
        exact
            .into_iter()
            .chain(wildcards.into_iter().rev())
            .find_map(|site| visit_uris(&site.uris, request, |bucket| attempt(Some(&site.pattern), bucket)))
    }

    fn link(&mut self, route: &Arc<Route<T>>) {
        for leaf in Leaf::all(route) {
            self.change(&leaf, |bucket| bucket.insert(leaf.clone()));
        }
    }

    fn unlink(&mut self, route: &Arc<Route<T>>) {
        for leaf in Leaf::all(route) {
            self.change(&leaf, |bucket| bucket.remove(&leaf));
        }
    }

    /// Changes every bucket in which `leaf` has its place.
    fn change(&mut self, leaf: &Leaf<T>, mut change: impl FnMut(&mut Bucket<T>)) {
        let hosts = &leaf.route().hosts;
        if self.mode != Mode::HostUri || hosts.is_empty() {
            change_place(&mut self.by_uri, leaf, change);
            return;
        }
        for (position, pattern) in hosts.iter().enumerate() {
            let key = pattern.key();
            let is_same =
                |other: &HostPattern| other.is_wildcard() == pattern.is_wildcard() && other.key() == key;
            // Written twice, perhaps in different case: the route must lie there once.
            if hosts.iter().take(position).any(is_same) {
                continue;
            }
            self.by_host.modify(key.as_bytes(), |place| {
                let hosts = place.get_or_insert_default();
                let site = if pattern.is_wildcard() { &mut hosts.wildcard } else { &mut hosts.exact };
                let known = site.get_or_insert_with(|| Site {
                    pattern: Arc::clone(pattern.text()),
                    uris: Radix::default(),
                });
                change_place(&mut known.uris, leaf, &mut change);
                if known.uris.is_empty() {
                    *site = None;
                }
                if hosts.exact.is_none() && hosts.wildcard.is_none() {
                    *place = None;
                }
            });
        }
    }
}

fn change_place<T>(uris: &mut Uris<T>, leaf: &Leaf<T>, change: impl FnOnce(&mut Bucket<T>)) {
    let Some(uri) = leaf.uri() else { return };
    uris.modify(uri.key(), |slot| {
        let place = slot.get_or_insert_default();
        change(if leaf.is_exact() { &mut place.exact } else { &mut place.prefix });
        if place.exact.is_empty() && place.prefix.is_empty() {
            *slot = None;
        }
    });
}
