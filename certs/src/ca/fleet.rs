//! Who uses what: workloads by what they confirm and by what was signed for them.
//!
//! A rotation goes on when everybody has confirmed, so this must not forget anybody who may come back: whoever holds a
//! certificate that is still valid stays listed, over restarts of the authority too (it is written to the store in
//! sixteen parts, a replica each). It is bounded; when it is full, that is said, and stops rotations. Nothing here waits.

mod answers;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::{Forgotten, IssuerId, Moment};
pub use answers::{Answer, Answers};

/// Workloads that are remembered.
pub const MAX_MEMBERS: usize = 50_000;
/// Parts that the list is stored in; with 50,000 workloads each is below what every store takes.
pub const PARTS: u8 = 16;
/// A sign of life that is newer by less is not worth a write.
const LAZY: Duration = Duration::from_secs(120);
/// A workload whose certificate ended so long ago is forgotten.
const FORGET: Duration = Duration::from_secs(3600);
/// Certificates of one workload that are not confirmed.
const MAX_GIVEN: usize = 8;
/// The span of one count of handshakes.
const BUCKET: Duration = Duration::from_secs(5);
/// Handshakes of so long ago are told to other replicas: what the guard compares.
const TOLD: Duration = Duration::from_secs(1200);
/// Counts that are kept: an hour.
const BUCKETS: usize = 720;
/// Reasons of failed handshakes that a rotation can cause.
pub const REASONS: [&str; 3] = ["unknown_issuer", "expired", "not_yet_valid"];

/// A workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The process.
    pub id: String,
    pub identity: String,
    #[serde(default)]
    pub version: String,
    /// The bundle that it uses; 0 until it says one.
    pub generation: u64,
    /// Who signed its certificate.
    pub issuer: IssuerId,
    #[serde(default)]
    pub serial: String,
    /// When it was signed, if that was here.
    #[serde(default)]
    pub signed_at: Moment,
    pub not_after: Moment,
    /// The bundle under which its oldest connection was made.
    #[serde(default)]
    pub oldest_connection: Option<u64>,
    #[serde(default)]
    pub clock_offset_ms: i64,
    pub seen_at: Moment,
    /// Why it did not take the last bundle or certificate.
    #[serde(default)]
    pub refused: Option<String>,
    /// Where it takes connections of the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mesh_address: Option<SocketAddr>,
    /// Certificates that were signed and are not confirmed: it may use any of them. By whom, when, until when.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<(IssuerId, Moment, Moment)>,
    /// What it was handed, if it never says what it uses; the fields above are made of this.
    #[serde(default, skip_serializing_if = "Answers::is_empty")]
    pub answers: Answers,
    /// It has ended since it was seen, and its key with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    #[serde(skip)]
    pub connected: bool,
}

impl Member {
    /// Whether it counts as live: whether it confirms what it is told. Who never does may come back like somebody absent.
    #[must_use]
    pub fn is_live(&self, now: Moment, absent_after: Duration) -> bool {
        !self.is_silent() && now.since(self.seen_at) <= absent_after
    }

    /// Whether it never says what it uses.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Makes of what it was handed what it may use.
    fn settle(&mut self, now: Moment) {
        let in_use = self.answers.in_use(now);
        let Some((first, others)) = in_use.split_first() else { return };
        self.generation = in_use.iter().map(|answer| answer.generation).min().unwrap_or_default();
        self.issuer.clone_from(&first.issuer);
        self.serial.clone_from(&first.serial);
        (self.signed_at, self.not_after) = (first.at, first.until);
        self.given = others.iter().map(|one| (one.issuer.clone(), one.at, one.until)).collect();
        // A workload of the same name that says something is another one.
        (self.oldest_connection, self.refused, self.mesh_address, self.clock_offset_ms) =
            (None, None, None, 0);
        self.connected = false;
    }

    /// Whether it may come back with a certificate that peers accept.
    #[must_use]
    pub fn may_come_back(&self, now: Moment) -> bool {
        self.last_not_after() > now
    }

    /// The end of the last certificate that it may hold.
    #[must_use]
    pub fn last_not_after(&self) -> Moment {
        self.given.iter().map(|(_, _, until)| *until).fold(self.not_after, Moment::max)
    }

    /// Whether it may hold a certificate of `issuer` that is still valid.
    #[must_use]
    pub fn may_hold(&self, issuer: &IssuerId, now: Moment) -> bool {
        (self.issuer == *issuer && self.not_after > now)
            || self.given.iter().any(|(by, _, until)| by == issuer && *until > now)
    }

    /// Whether nothing is to be expected of it: it has ended, and was given nothing since.
    fn is_over(&self) -> bool {
        self.left && self.given.iter().all(|(_, at, _)| *at <= self.seen_at)
    }

    /// It says which certificate it uses: those that it was given before that are not used any more.
    fn confirm(&mut self, not_after: Moment) {
        let used = self.given.iter().find(|(_, _, until)| until.secs() == not_after.secs());
        self.signed_at = used.map(|(_, at, _)| *at).unwrap_or_default();
        let since = self.signed_at;
        self.given.retain(|(_, at, _)| *at > since);
    }

    /// It was given one more. Of too many that are not confirmed, what counts is who signed and the last end.
    fn give(&mut self, issuer: &IssuerId, now: Moment, not_after: Moment) {
        self.given.retain(|(_, _, until)| *until > now);
        if self.given.len() >= MAX_GIVEN
            && let Some(first) = self.given.iter().position(|(by, ..)| by == issuer)
        {
            self.given.remove(first);
        }
        self.given.push((issuer.clone(), now, not_after));
    }
}

/// What a workload says, in the words of this module.
#[derive(Clone, Debug, Default)]
pub struct Said {
    pub id: String,
    pub identity: String,
    pub version: String,
    pub generation: u64,
    pub issuer: IssuerId,
    pub serial: String,
    pub not_after: Moment,
    pub oldest_connection: Option<u64>,
    pub clock_offset_ms: i64,
    pub refused: Option<String>,
    pub handshakes: u64,
    pub failures: BTreeMap<String, u64>,
    pub mesh_address: Option<SocketAddr>,
}

/// Another process of the authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    pub name: String,
    pub seen_at: Moment,
    /// The sequence of the record that it works by.
    pub sequence: u64,
    /// For so long it goes on signing when it cannot read the record.
    pub signs_unread: Duration,
}

/// What this process says of itself to the other replicas.
#[derive(Clone, Copy, Debug)]
pub struct Sign<'a> {
    pub replica: &'a str,
    /// The sequence of the record that it works by.
    pub sequence: u64,
    pub signs_unread: Duration,
    /// It has ended in order, and signs no more.
    pub stopped: bool,
}

/// A place outside of the store that holds the bundle, and what was read back from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    /// Empty: it holds what it should.
    pub problem: String,
}

/// The fleet at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub members: Vec<Member>,
    pub replicas: Vec<Replica>,
    pub sources: Vec<Source>,
    /// How visits at those who renew first ended, by process and serial; none where nobody visits.
    pub visits: Option<BTreeMap<(String, String), Result<(), String>>>,
    /// The sequence of the record that decisions are made from.
    pub sequence: u64,
    /// Whether everybody who was there before this process began had time to say so.
    pub settled: bool,
    /// Workloads that found no place.
    pub dropped: u64,
    /// By how much the clock of the authority was set since its start, in milliseconds.
    pub clock_step_ms: i64,
    /// Start of a span, handshakes in it, failures of [`REASONS`].
    pub handshakes: Vec<(Moment, u64, u64)>,
}

impl View {
    /// Handshakes and failures since then.
    #[must_use]
    pub fn handshakes_since(&self, since: Moment) -> (u64, u64) {
        self.handshakes
            .iter()
            .filter(|(at, ..)| *at + BUCKET > since)
            .fold((0, 0), |(all, bad), (_, more, worse)| (all + more, bad + worse))
    }

    /// With what those may use who never say it.
    pub(crate) fn settle(&mut self, now: Moment) {
        self.members.iter_mut().for_each(|member| member.settle(now));
    }

    /// Who was seen lately.
    pub fn live(&self, now: Moment, absent_after: Duration) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.is_live(now, absent_after))
    }

    /// Without those who were said to be over, and have not been seen since.
    pub(crate) fn forget(&mut self, forgotten: &[Forgotten]) {
        let forgotten: BTreeMap<&str, Moment> =
            forgotten.iter().map(|one| (one.id.as_str(), one.at)).collect();
        if !forgotten.is_empty() {
            self.members
                .retain(|member| forgotten.get(member.id.as_str()).is_none_or(|at| member.seen_at > *at));
        }
    }

    /// Who was not, and may come back.
    pub fn absent(&self, now: Moment, absent_after: Duration) -> impl Iterator<Item = &Member> {
        self.members
            .iter()
            .filter(move |member| !member.is_live(now, absent_after) && member.may_come_back(now))
    }
}

/// One part of the list, as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    replica: String,
    at: Moment,
    /// The sequence of the record that the replica works by.
    sequence: u64,
    signs_unread_ms: u64,
    stopped: bool,
    /// Handshakes that the replica was told of lately, and whom it had no place for: in the first part.
    #[serde(default)]
    handshakes: Vec<(Moment, u64, u64)>,
    #[serde(default)]
    dropped: u64,
    members: Vec<Member>,
}

/// A part that another replica has written, and when it was seen to have changed.
struct Followed {
    part: Part,
    heard_at: Moment,
}

#[derive(Default)]
struct Inner {
    /// By identity and process. Those that this process heard itself.
    own: BTreeMap<String, Member>,
    /// By replica and part, what others have written.
    others: BTreeMap<(String, u8), Followed>,
    /// Counters as they were last said.
    counters: BTreeMap<String, (u64, u64)>,
    handshakes: std::collections::VecDeque<(Moment, u64, u64)>,
    dirty: [bool; PARTS as usize],
    dropped: u64,
    /// Who was known from the store and has not been heard since.
    awaited: std::collections::BTreeSet<String>,
}

/// The list of one process.
#[derive(Default)]
pub struct Fleet {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet").field("members", &self.lock().own.len()).finish_non_exhaustive()
    }
}

fn key(identity: &str, id: &str) -> String {
    format!("{identity} {id}")
}

/// Which part somebody is in: FNV-1a, for it must stay over versions.
fn part(key: &str) -> u8 {
    let hash = hash(key.as_bytes());
    u8::try_from(hash % u64::from(PARTS)).unwrap_or_default()
}

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl Fleet {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A workload says what it uses.
    pub fn heard(&self, said: Said, now: Moment) {
        let mut inner = self.lock();
        let key = key(&said.identity, &said.id);
        let bad = REASONS.iter().filter_map(|reason| said.failures.get(*reason)).sum();
        inner.count(&key, said.handshakes, bad, now);
        inner.awaited.remove(&key);
        let Some(member) = inner.member(&key, &said.identity, &said.id, now) else { return };
        let before = member.clone();
        if member.serial != said.serial || member.not_after != said.not_after {
            member.confirm(said.not_after);
        }
        member.version = said.version;
        member.generation = said.generation;
        member.issuer = said.issuer;
        member.serial = said.serial;
        member.not_after = said.not_after;
        member.oldest_connection = said.oldest_connection;
        member.clock_offset_ms = said.clock_offset_ms;
        member.refused = said.refused;
        member.mesh_address = said.mesh_address;
        (member.connected, member.left) = (true, false);
        let changed = member.generation != before.generation
            || member.issuer != before.issuer
            || member.serial != before.serial
            || member.given != before.given
            || member.not_after != before.not_after
            || member.oldest_connection != before.oldest_connection
            || member.mesh_address != before.mesh_address;
        // What was written is compared with what is written next, so the sign of life moves only then.
        if changed || now.since(before.seen_at) > LAZY {
            inner.touch(&key);
        }
        if let Some(member) = inner.own.get_mut(&key) {
            member.seen_at = now;
        }
    }

    /// A stream has ended; its workload may come back.
    pub fn gone(&self, identity: &str, id: &str) {
        if let Some(member) = self.lock().own.get_mut(&key(identity, id)) {
            member.connected = false;
        }
    }

    /// It has ended in order. It does not come back with what it had, so nobody waits for it.
    pub fn left(&self, identity: &str, id: &str, now: Moment) {
        let mut inner = self.lock();
        let key = key(identity, id);
        inner.awaited.remove(&key);
        if let Some(member) = inner.own.get_mut(&key) {
            member.given.clear();
            (member.left, member.not_after, member.seen_at) = (true, member.not_after.min(now), now);
            inner.touch(&key);
        }
    }

    /// A certificate was signed. Its workload counts from now on, whether or not it ever says something.
    pub fn signed(&self, identity: &str, id: &str, issuer: &IssuerId, not_after: Moment, now: Moment) {
        let mut inner = self.lock();
        let key = key(identity, id);
        if let Some(member) = inner.member(&key, identity, id, now) {
            member.give(issuer, now, not_after);
            (member.seen_at, member.left) = (now, false);
            inner.touch(&key);
        }
    }

    /// A certificate was handed to somebody who never says what he uses. `shown` is the one by which he asked.
    pub fn handed(&self, identity: &str, id: &str, answer: Answer, shown: Option<&str>) {
        let mut inner = self.lock();
        let (key, now) = (key(identity, id), answer.at);
        if let Some(member) = inner.member(&key, identity, id, now) {
            member.answers.add(answer, shown);
            member.settle(now);
            member.seen_at = now;
            inner.touch(&key);
        }
    }

    /// A certificate was signed before this process began, and may not have been written down with its workload.
    pub fn signed_before(&self, identity: &str, id: &str, issuer: &IssuerId, not_after: Moment, at: Moment) {
        let mut inner = self.lock();
        let key = key(identity, id);
        let Some(member) = inner.member(&key, identity, id, at) else { return };
        let same =
            |(by, _, until): &(IssuerId, Moment, Moment)| by == issuer && until.secs() == not_after.secs();
        // What somebody silent was handed was written down before he had it.
        let before = at <= member.signed_at || (member.left && at <= member.seen_at);
        if !before && !member.is_silent() && !member.given.iter().any(same) {
            member.give(issuer, at, not_after);
            (member.seen_at, member.left) = (member.seen_at.max(at), false);
            inner.awaited.insert(key.clone());
            inner.touch(&key);
        }
    }

    /// The process of an identity that was handed this certificate.
    #[must_use]
    pub fn holder(&self, identity: &str, serial: &str) -> Option<String> {
        let inner = self.lock();
        let begin = key(identity, "");
        let own = inner.own.range(begin.clone()..).take_while(|(key, _)| key.starts_with(&begin));
        let own = own.map(|(_, member)| member);
        let others = inner.others.values().flat_map(|followed| &followed.part.members);
        let mut found = own.chain(others.filter(|member| member.identity == identity));
        found.find(|member| member.answers.has(serial)).map(|member| member.id.clone())
    }

    /// Whether everybody that was known from the store has been heard.
    pub fn is_complete(&self, now: Moment) -> bool {
        let inner = self.lock();
        !inner.own.is_empty()
            && inner.awaited.iter().all(|key| inner.own.get(key).is_none_or(|one| !one.may_come_back(now)))
    }

    /// What is to be written: part and bytes. Forgets whom nobody has to remember.
    pub fn changes(&self, sign: &Sign<'_>, all: bool, now: Moment) -> Vec<(u8, Vec<u8>)> {
        let mut inner = self.lock();
        let over: Vec<String> = inner
            .own
            .iter()
            .filter(|(_, member)| !member.connected && member.last_not_after() + FORGET < now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in over {
            inner.own.remove(&key);
            inner.counters.remove(&key);
            inner.touch(&key);
        }
        let mut changes = Vec::new();
        for number in 0..PARTS {
            let dirty = inner.dirty.get_mut(usize::from(number)).is_some_and(std::mem::take);
            // The first part carries the sign of life of the replica.
            let shown = all && number == 0;
            if !(dirty || shown) {
                continue;
            }
            let members = inner.own.iter().filter(|(key, _)| part(key) == number);
            let told = inner.handshakes.iter().filter(|(at, ..)| number == 0 && *at + TOLD > now);
            let part = Part {
                replica: sign.replica.to_owned(),
                at: now,
                sequence: sign.sequence,
                signs_unread_ms: u64::try_from(sign.signs_unread.as_millis()).unwrap_or(u64::MAX),
                stopped: sign.stopped,
                handshakes: told.copied().collect(),
                dropped: if number == 0 { inner.dropped } else { 0 },
                members: members.map(|(_, member)| member.clone()).collect(),
            };
            if let Ok(bytes) = serde_json::to_vec(&part) {
                changes.push((number, bytes));
            }
        }
        changes
    }

    /// A part could not be written: it is tried again.
    pub fn unwritten(&self, part: u8) {
        if let Some(dirty) = self.lock().dirty.get_mut(usize::from(part)) {
            *dirty = true;
        }
    }

    /// What this replica wrote before it was started anew.
    pub fn restore(&self, bytes: &[u8]) {
        let Ok(stored) = serde_json::from_slice::<Part>(bytes) else {
            tracing::warn!("a part of the list of workloads could not be read; it fills itself again");
            return;
        };
        let mut inner = self.lock();
        for member in stored.members {
            let key = key(&member.identity, &member.id);
            if !member.is_silent() {
                inner.awaited.insert(key.clone());
            }
            inner.own.entry(key).or_insert(member);
        }
    }

    /// What another replica has written, by the name of its key. Gives whether it may be removed: nobody in it can come
    /// back.
    pub fn follow(&self, replica: &str, number: u8, bytes: &[u8], now: Moment) -> bool {
        let Ok(part) = serde_json::from_slice::<Part>(bytes) else { return false };
        let over = now.since(part.at) > FORGET
            && part.members.iter().all(|member| member.last_not_after() + FORGET < now);
        let mut inner = self.lock();
        let place = (replica.to_owned(), number);
        if over {
            inner.others.remove(&place);
        } else {
            // By the clock of this process: what counts is whether the other one goes on.
            let before = inner.others.get(&place).filter(|before| before.part.at == part.at);
            let heard_at = before.map_or(now, |before| before.heard_at);
            inner.others.insert(place, Followed { part, heard_at });
        }
        over
    }

    /// The fleet as it is. What other replicas know of a workload counts where it is newer.
    pub fn view(&self) -> View {
        let inner = self.lock();
        let mut members = inner.own.clone();
        let mut replicas: BTreeMap<&str, Replica> = BTreeMap::new();
        let mut handshakes: Vec<_> = inner.handshakes.iter().copied().collect();
        let mut dropped = inner.dropped;
        for ((name, number), Followed { part, heard_at }) in &inner.others {
            if *number == 0 {
                handshakes.extend(&part.handshakes);
                dropped += part.dropped;
            }
            if *number == 0 && !part.stopped {
                let replica = Replica {
                    name: name.clone(),
                    seen_at: *heard_at,
                    sequence: part.sequence,
                    signs_unread: Duration::from_millis(part.signs_unread_ms),
                };
                replicas.insert(name, replica);
            }
            for member in &part.members {
                let key = key(&member.identity, &member.id);
                match members.get_mut(&key) {
                    Some(known) if known.is_silent() || member.is_silent() => {
                        known.answers.join(&member.answers);
                        known.seen_at = known.seen_at.max(member.seen_at);
                    }
                    Some(known) if known.seen_at >= member.seen_at => {
                        // A certificate that another replica gave meanwhile may be in use all the same.
                        let new = member.given.iter().filter(|one| !known.given.contains(one)).cloned();
                        let new: Vec<_> = new.collect();
                        known.given.extend(new);
                    }
                    _ => {
                        members.insert(key, member.clone());
                    }
                }
            }
        }
        members.retain(|_, member| !member.is_over());
        View {
            members: members.into_values().collect(),
            replicas: replicas.into_values().collect(),
            dropped,
            handshakes,
            settled: true,
            ..View::default()
        }
    }
}

impl Inner {
    /// The place of somebody; None when there is none left.
    fn member(&mut self, key: &str, identity: &str, id: &str, now: Moment) -> Option<&mut Member> {
        if !self.own.contains_key(key) {
            if self.own.len() >= MAX_MEMBERS {
                self.own.retain(|_, member| member.connected || member.may_come_back(now));
            }
            if self.own.len() >= MAX_MEMBERS {
                self.dropped += 1;
                return None;
            }
            let member = Member { id: id.to_owned(), identity: identity.to_owned(), ..Member::default() };
            self.own.insert(key.to_owned(), member);
        }
        self.own.get_mut(key)
    }

    fn touch(&mut self, key: &str) {
        if let Some(dirty) = self.dirty.get_mut(usize::from(part(key))) {
            *dirty = true;
        }
    }

    /// Counters of a process grow until it starts anew. What it counted before this process knew it is not of now.
    fn count(&mut self, key: &str, handshakes: u64, failures: u64, now: Moment) {
        let Some((all, bad)) = self.counters.insert(key.to_owned(), (handshakes, failures)) else { return };
        let new = |now: u64, before: u64| if now >= before { now - before } else { now };
        let (all, bad) = (new(handshakes, all), new(failures, bad));
        if all == 0 && bad == 0 {
            return;
        }
        match self.handshakes.back_mut() {
            Some((at, more, worse)) if now.since(*at) < BUCKET => {
                *more += all;
                *worse += bad;
            }
            _ => {
                if self.handshakes.len() >= BUCKETS {
                    self.handshakes.pop_front();
                }
                self.handshakes.push_back((now, all, bad));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn sign(replica: &str, sequence: u64) -> Sign<'_> {
        Sign { replica, sequence, signs_unread: Duration::from_secs(300), stopped: false }
    }

    fn said(id: &str, generation: u64, issuer: &str, not_after: u64) -> Said {
        Said {
            id: id.to_owned(),
            identity: "spiffe://mesh.local/ns/a/sa/b".to_owned(),
            generation,
            issuer: issuer.into(),
            serial: format!("{issuer}-{not_after}"),
            not_after: Moment::from_secs(not_after),
            ..Said::default()
        }
    }

    #[test]
    fn who_says_goodbye_is_not_waited_for() {
        let now = Moment::from_secs(1000);
        let one = "spiffe://mesh.local/ns/a/sa/b";
        let (fleet, other) = (Fleet::default(), Fleet::default());
        // Two replicas have signed for it.
        other.signed(one, "p", &"i1".into(), Moment::from_secs(80_000), Moment::from_secs(900));
        fleet.signed(one, "p", &"i1".into(), Moment::from_secs(90_000), now);
        fleet.heard(said("p", 1, "i1", 90_000), now);
        for (number, part) in other.changes(&sign("ca-2", 1), true, now) {
            fleet.follow("ca-2", number, &part, now);
        }
        assert_eq!(fleet.view().members.len(), 1);
        let end = now + Duration::from_secs(5);
        fleet.left(one, "p", end);
        assert!(fleet.view().members.is_empty());
        // It stays so after a restart, also when the log of signatures is read.
        let restarted = Fleet::default();
        for (_, part) in fleet.changes(&sign("ca-1", 1), true, end) {
            restarted.restore(&part);
        }
        restarted.signed_before(one, "p", &"i1".into(), Moment::from_secs(90_000), now);
        assert!(restarted.view().members.is_empty());
        assert!(restarted.is_complete(end));
        // The next process of that name counts.
        let later = end + Duration::from_secs(60);
        restarted.signed(one, "p", &"i1".into(), Moment::from_secs(95_000), later);
        assert!(restarted.view().members[0].may_come_back(later));
    }

    #[test]
    fn what_the_audit_log_knows_better_is_taken_from_it() {
        let fleet = Fleet::default();
        let (one, end) = ("spiffe://mesh.local/ns/a/sa/b", Moment::from_secs(90_000));
        let at = Moment::from_secs(3_000);
        fleet.signed_before(one, "b", &"i1".into(), end, at);
        let known = fleet.view();
        let member = &known.members[0];
        assert!(member.may_hold(&"i1".into(), at));
        assert_eq!(member.seen_at, at, "it was not seen when the log was read");
        assert!(!fleet.is_complete(at), "it has to be heard first");
        // The log says it a second time, with the moment in which the line was written.
        fleet.signed(one, "b", &"i2".into(), end, Moment(3_500_004));
        fleet.signed_before(one, "b", &"i2".into(), end, Moment(3_500_000));
        assert_eq!(fleet.view().members[0].given.len(), 2);
    }

    #[test]
    fn who_holds_a_valid_certificate_survives_a_restart() {
        let now = Moment::from_secs(1000);
        let fleet = Fleet::default();
        fleet.heard(said("a", 3, "i1", 90_000), now);
        fleet.signed("spiffe://mesh.local/ns/a/sa/b", "b", &"i1".into(), Moment::from_secs(90_000), now);
        let written = fleet.changes(&sign("ca-1", 7), true, now);
        assert!(fleet.changes(&sign("ca-1", 7), false, now).is_empty(), "what is written is not dirty");
        let after = Fleet::default();
        written.iter().for_each(|(_, bytes)| after.restore(bytes));
        let view = after.view();
        assert_eq!(view.members.len(), 2);
        assert!(view.members.iter().all(|one| one.may_hold(&"i1".into(), now)));
        assert!(!after.is_complete(now));
        after.heard(said("a", 3, "i1", 90_000), now);
        assert!(!after.is_complete(now), "b has not been heard");
        after.heard(said("b", 3, "i1", 90_000), now);
        assert!(after.is_complete(now));
    }

    #[test]
    fn a_replica_is_followed_and_its_newer_word_counts() {
        let now = Moment::from_secs(1000);
        let (one, two) = (Fleet::default(), Fleet::default());
        one.heard(said("a", 1, "i1", 90_000), now);
        two.heard(said("a", 2, "i2", 90_000), now + Duration::from_secs(5));
        let tell = |sign: &Sign<'_>, at| {
            for (number, bytes) in two.changes(sign, true, now + Duration::from_secs(5)) {
                assert!(!one.follow("ca-2", number, &bytes, at));
            }
        };
        tell(&sign("ca-2", 9), now + Duration::from_secs(6));
        tell(&sign("ca-2", 9), now + Duration::from_secs(60));
        let view = one.view();
        assert_eq!(
            view.replicas.first().unwrap().seen_at,
            now + Duration::from_secs(6),
            "it says nothing new"
        );
        assert_eq!(view.members.iter().map(|one| one.generation).collect::<Vec<_>>(), [2]);
        assert_eq!(view.replicas.first().unwrap().sequence, 9);
        tell(&Sign { stopped: true, ..sign("ca-2", 9) }, now + Duration::from_secs(61));
        assert!(one.view().replicas.is_empty(), "it has ended in order: nobody waits for it");
        assert_eq!(one.view().members.len(), 1, "whom it knew is known");
    }

    #[test]
    fn failures_count_from_what_was_known_and_over_restarts_of_the_workload() {
        let fleet = Fleet::default();
        let tell = |handshakes, failures, at| {
            let failures = BTreeMap::from([("expired".to_owned(), failures), ("other".to_owned(), 50)]);
            let said = Said { handshakes, failures, ..said("a", 1, "i1", 90_000) };
            fleet.heard(said, Moment::from_secs(at));
        };
        tell(100, 5, 1000);
        assert_eq!(fleet.view().handshakes_since(Moment::default()), (0, 0), "they are of before");
        tell(110, 6, 1010);
        tell(3, 2, 1020);
        assert_eq!(fleet.view().handshakes_since(Moment::default()), (13, 3));
        assert_eq!(fleet.view().handshakes_since(Moment::from_secs(1018)), (3, 2));
    }

    #[test]
    fn who_is_long_over_is_forgotten() {
        let fleet = Fleet::default();
        fleet.heard(said("a", 1, "i1", 2000), Moment::from_secs(1000));
        fleet.gone("spiffe://mesh.local/ns/a/sa/b", "a");
        fleet.changes(&sign("ca", 1), false, Moment::from_secs(5000));
        assert_eq!(fleet.view().members.len(), 1);
        fleet.changes(&sign("ca", 1), false, Moment::from_secs(6000));
        assert!(fleet.view().members.is_empty());
    }

    #[test]
    fn who_says_nothing_is_known_by_what_he_was_handed() {
        let identity = "spiffe://mesh.local/ns/a/sa/b";
        let at = Moment::from_secs;
        let answer = |serial: &str, generation, issuer: &str, since| Answer {
            generation,
            issuer: issuer.into(),
            serial: serial.to_owned(),
            at: at(since),
            until: at(since + 80_000),
            ..Answer::default()
        };
        let fleet = Fleet::default();
        fleet.handed(identity, "istio:a/b", answer("01", 3, "i1", 1000), None);
        let seen = |fleet: &Fleet, now| {
            let mut view = fleet.view();
            view.settle(at(now));
            view
        };
        let minutes = Duration::from_secs(600);
        let view = seen(&fleet, 1001);
        assert_eq!((view.live(at(1001), minutes).count(), view.absent(at(1001), minutes).count()), (0, 1));
        // He does not confirm by another mouth.
        fleet.heard(Said { issuer: "i9".into(), ..said("istio:a/b", 9, "i9", 90_000) }, at(1002));
        let member = seen(&fleet, 1003).members.remove(0);
        assert_eq!((member.generation, member.issuer.0.as_str()), (3, "i1"));

        fleet.handed(identity, "istio:a/b", answer("02", 4, "i2", 40_000), None);
        let early = seen(&fleet, 40_010).members.remove(0);
        assert_eq!(early.generation, 3, "the answer may be lost");
        assert!(early.may_hold(&"i1".into(), at(40_010)) && early.may_hold(&"i2".into(), at(40_010)));
        let late = seen(&fleet, 40_300).members.remove(0);
        assert_eq!(late.generation, 4);
        assert!(!late.may_hold(&"i1".into(), at(40_300)), "it was replaced");
        assert_eq!(fleet.holder(identity, "02").as_deref(), Some("istio:a/b"));
        assert_eq!(fleet.holder("spiffe://mesh.local/ns/a/sa/bb", "02"), None);

        // Over a restart, and for another replica.
        let (after, other) = (Fleet::default(), Fleet::default());
        other.handed(identity, "istio:a/b", answer("03", 4, "i2", 40_100), None);
        for (number, bytes) in fleet.changes(&sign("ca-1", 7), true, at(40_300)) {
            after.restore(&bytes);
            assert!(!other.follow("ca-1", number, &bytes, at(40_300)));
        }
        assert!(after.is_complete(at(40_300)), "nobody waits for him to say something");
        assert_eq!(seen(&after, 40_300).members, [late]);
        assert_eq!(other.holder(identity, "02").as_deref(), Some("istio:a/b"));
        let both = seen(&other, 40_200).members.remove(0);
        assert_eq!((both.generation, both.given.len()), (3, 2), "he asked again, so both may be lost");
        assert_eq!(seen(&other, 40_400).members.remove(0).generation, 4);
    }

    #[test]
    fn there_is_a_bound_and_it_is_told() {
        let fleet = Fleet::default();
        for i in 0..MAX_MEMBERS + 3 {
            fleet.heard(said(&i.to_string(), 1, "i1", 90_000), Moment::from_secs(1));
        }
        let view = fleet.view();
        assert_eq!((view.members.len(), view.dropped), (MAX_MEMBERS, 3));
    }
}
