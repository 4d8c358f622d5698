//! The one record of an authority: everything that has to survive, in one value of one key.
//!
//! Every change is one compare-and-swap of the whole record, so there is no moment at which half of a change is written.
//! Roots are never forgotten: what was ever trusted stays listed with what became of it. Keys are in here sealed and
//! leave with the change that retires them. A record that does not hold together is refused with words and never
//! overwritten. Nothing here knows stores, clocks or the network.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, PrimitiveDateTime};

use super::rotation::Rotation;

/// The form that this code writes.
pub const VERSION: u32 = 1;
/// The largest record: Consul takes values of 512 KiB.
pub const LARGEST: usize = 480 << 10;
/// Rotations that ended and are still listed.
pub const MAX_PAST: usize = 32;
/// Revoked serials and identities that can be listed.
pub const MAX_REVOCATIONS: usize = 2000;
/// Workloads that are forgotten while they might come back.
pub const MAX_FORGOTTEN: usize = 500;
/// Roots that can be listed.
pub const MAX_ROOTS: usize = 64;

/// A moment of the wall clock, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    /// That many whole seconds after 1970.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1000))
    }

    /// Whole seconds since 1970.
    #[must_use]
    pub const fn secs(self) -> u64 {
        self.0 / 1000
    }

    /// How long after `earlier`; zero if it is before.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// As a date. What is after the year 9999 is its end.
    pub(super) fn utc(self) -> OffsetDateTime {
        let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000);
        time.unwrap_or(PrimitiveDateTime::MAX.assume_utc())
    }

    /// The later of two.
    #[must_use]
    pub fn or_later(self, other: Self) -> Self {
        self.max(other)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;
    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl std::ops::Sub<Duration> for Moment {
    type Output = Self;
    fn sub(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl From<SystemTime> for Moment {
    fn from(time: SystemTime) -> Self {
        Self::default() + time.duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

impl From<Moment> for SystemTime {
    fn from(moment: Moment) -> Self {
        UNIX_EPOCH + Duration::from_millis(moment.0)
    }
}

/// `2026-11-21T13:05:00Z`.
impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = Self::from_secs(self.secs());
        f.write_str(&whole.utc().format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

/// A certificate in DER; base64 where it is written.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Der(pub Vec<u8>);

impl fmt::Debug for Der {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Der({} bytes)", self.0.len())
    }
}

impl Serialize for Der {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Der {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Der).map_err(serde::de::Error::custom)
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(pub String);

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $type {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl $type {
            #[doc = "What a screen has room for."]
            #[must_use]
            pub fn short(&self) -> &str {
                self.0.get(..12).unwrap_or(&self.0)
            }
        }
    };
}

name! {
    /// A root by the SHA-256 of its certificate, in hexadecimal digits.
    RootId
}
name! {
    /// An issuer by its subject key identifier, in hexadecimal digits: what its leaves name as their authority.
    IssuerId
}

/// A private key that only whoever has the sealing key can use. Its form is that of `seal.rs`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SealedKey(pub String);

impl fmt::Debug for SealedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealedKey(..)")
    }
}

/// What a root is to the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootState {
    /// Made, and not shown to anybody.
    Staged,
    /// In the bundle.
    Active,
    /// In the bundle until nothing depends on it.
    Retiring,
    /// No longer in the bundle.
    Retired,
    /// Taken out in an emergency; its key is never accepted again.
    Distrusted,
}

impl RootState {
    /// The word in JSON and on screens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Active => "active",
            Self::Retiring => "retiring",
            Self::Retired => "retired",
            Self::Distrusted => "distrusted",
        }
    }
}

/// A root that is, was or will be trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    pub id: RootId,
    pub state: RootState,
    pub certificate: Der,
    /// SHA-256 of the public key: a root that was made anew with the same key is known by it.
    pub spki: String,
    pub not_before: Moment,
    pub not_after: Moment,
    /// None: kept elsewhere, or destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SealedKey>,
    /// Who has its key, if that is not this authority.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kept: String,
    pub made_at: Moment,
    pub changed_at: Moment,
    /// Why it is what it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

impl Root {
    /// Whether verifiers get it.
    #[must_use]
    pub const fn in_bundle(&self) -> bool {
        matches!(self.state, RootState::Active | RootState::Retiring)
    }

    pub(crate) fn become_(&mut self, state: RootState, now: Moment, note: impl Into<String>) {
        self.state = state;
        self.changed_at = now;
        self.note = note.into();
    }
}

/// What an issuer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssuerState {
    /// Made, signs nothing yet.
    Staged,
    /// Signs leaves. There is one.
    Signing,
    /// Signed before, and may again.
    Standby,
    /// Signs no more; its key is gone.
    Retired,
}

impl IssuerState {
    /// The word in JSON and on screens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Signing => "signing",
            Self::Standby => "standby",
            Self::Retired => "retired",
        }
    }
}

/// An intermediate authority, which signs leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    pub id: IssuerId,
    pub state: IssuerState,
    /// The root below which it stands.
    pub root: RootId,
    pub certificate: Der,
    /// Between it and its root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub above: Vec<Der>,
    /// Its root signed by another one, for peers that know only that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross: Option<Cross>,
    pub not_before: Moment,
    pub not_after: Moment,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SealedKey>,
    pub made_at: Moment,
    pub changed_at: Moment,
}

/// A root's certificate below another root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cross {
    pub root: RootId,
    pub certificate: Der,
    pub not_after: Moment,
}

/// What verifiers are told, besides the roots themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleState {
    /// Counts every change of roots and revocations.
    pub generation: u64,
    /// Whoever has less cannot take part.
    pub min_supported_generation: u64,
    pub changed_at: Moment,
    /// Connections that were made below this generation are to be made anew, gently. 0: none.
    #[serde(default)]
    pub reconnect_below: u64,
}

/// A certificate or an identity that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    /// A serial in hexadecimal digits, or a SPIFFE identity.
    pub what: String,
    pub at: Moment,
    pub by: String,
    pub reason: String,
    /// When it can be forgotten: the last certificate that it is about has expired. None for an identity, which stays
    /// refused until it is allowed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Moment>,
}

/// What is refused though a root vouches for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocations {
    #[serde(default)]
    pub serials: Vec<Revocation>,
    #[serde(default)]
    pub identities: Vec<Revocation>,
}

/// Who drives. Others follow, and take over when this has not changed for [`LEASE`] by their own clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    pub holder: String,
    /// Counts renewals, so that followers see a sign of life without comparing clocks.
    pub beat: u64,
}

/// How long a lease lasts without a sign of life.
pub const LEASE: Duration = Duration::from_secs(15);

/// How long certificates live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lifetimes {
    pub root_s: u64,
    pub issuer_s: u64,
    /// The longest life of a leaf.
    pub leaf_s: u64,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { root_s: 10 * 365 * 86_400, issuer_s: 365 * 86_400, leaf_s: 86_400 }
    }
}

impl Lifetimes {
    /// The longest life of a leaf.
    #[must_use]
    pub const fn leaf(&self) -> Duration {
        Duration::from_secs(self.leaf_s)
    }

    /// The life of a new root.
    #[must_use]
    pub const fn root(&self) -> Duration {
        Duration::from_secs(self.root_s)
    }

    /// The life of a new issuer.
    #[must_use]
    pub const fn issuer(&self) -> Duration {
        Duration::from_secs(self.issuer_s)
    }
}

/// A throw-away root that is pushed beside the bundle and trusted by nobody, to see who gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rehearsal {
    pub id: String,
    pub root: RootId,
    pub certificate: Der,
    /// The generation that carries it.
    pub generation: u64,
    pub started_at: Moment,
    pub by: String,
}

/// Somebody who has to confirm every bundle whether or not it has been seen lately: an edge, a federated peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observer {
    pub name: String,
    pub kind: String,
}

/// A workload that is over: what was known of it until then does not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forgotten {
    pub id: String,
    pub at: Moment,
    pub by: String,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub version: u32,
    /// Counts what was changed, signs of life apart.
    #[serde(default)]
    pub sequence: u64,
    pub trust_domain: String,
    pub roots: Vec<Root>,
    pub issuers: Vec<Issuer>,
    pub bundle: BundleState,
    pub lifetimes: Lifetimes,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
    /// What ended, the latest last.
    #[serde(default)]
    pub past: Vec<Rotation>,
    /// How many rotations there have been: the source of their names.
    #[serde(default)]
    pub rotations: u64,
    #[serde(default)]
    pub revocations: Revocations,
    #[serde(default)]
    pub observers: Vec<Observer>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forgotten: Vec<Forgotten>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearsal: Option<Rehearsal>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// Why a record cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error(
        "the record of the authority is damaged and was left as it is: {0}; restore it from a copy, or start an authority in an empty place"
    )]
    Damaged(String),
    #[error(
        "the record of the authority has the form {found}, and this postern knows {VERSION}: use the postern that wrote it, or a newer one"
    )]
    Version { found: u64 },
    #[error(
        "the record of the authority would be {0} bytes, and {LARGEST} is the most that every store takes: forget what is revoked and over"
    )]
    TooLarge(usize),
}

impl Record {
    /// The record of a new authority: one root, which is trusted, and one issuer, which signs.
    #[must_use]
    pub fn new(trust_domain: &str, lifetimes: Lifetimes, root: Root, issuer: Issuer, now: Moment) -> Self {
        let root = Root { state: RootState::Active, ..root };
        let issuer = Issuer { state: IssuerState::Signing, ..issuer };
        Self {
            version: VERSION,
            sequence: 0,
            trust_domain: trust_domain.to_owned(),
            roots: vec![root],
            issuers: vec![issuer],
            bundle: BundleState {
                generation: 1,
                min_supported_generation: 1,
                changed_at: now,
                reconnect_below: 0,
            },
            lifetimes,
            rotation: None,
            past: Vec::new(),
            rotations: 0,
            revocations: Revocations::default(),
            observers: Vec::new(),
            forgotten: Vec::new(),
            rehearsal: None,
            lease: None,
        }
    }

    /// Reads what a store has.
    ///
    /// # Errors
    /// It is not JSON of this form, or does not hold together; the text says what.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Form {
            version: u64,
        }
        let form: Form =
            serde_json::from_slice(bytes).map_err(|error| RecordError::Damaged(error.to_string()))?;
        if form.version != u64::from(VERSION) {
            return Err(RecordError::Version { found: form.version });
        }
        let record: Self =
            serde_json::from_slice(bytes).map_err(|error| RecordError::Damaged(error.to_string()))?;
        record.check().map_err(RecordError::Damaged)?;
        Ok(record)
    }

    /// What a store is given.
    ///
    /// # Errors
    /// It does not hold together (a defect, which must not be written), or is too large.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check().map_err(RecordError::Damaged)?;
        let bytes = serde_json::to_vec(self).map_err(|error| RecordError::Damaged(error.to_string()))?;
        if bytes.len() > LARGEST {
            return Err(RecordError::TooLarge(bytes.len()));
        }
        Ok(bytes)
    }

    /// What does not hold together, in words.
    fn check(&self) -> Result<(), String> {
        if self.trust_domain.is_empty() {
            return Err("it names no trust domain".to_owned());
        }
        for (i, root) in self.roots.iter().enumerate() {
            if self.roots.iter().skip(i + 1).any(|other| other.id == root.id) {
                return Err(format!("root {} is listed twice", root.id.short()));
            }
            if root.not_after <= root.not_before {
                return Err(format!("root {} ends before it begins", root.id.short()));
            }
        }
        if !self.roots.iter().any(Root::in_bundle) {
            return Err("no root is trusted".to_owned());
        }
        for (i, issuer) in self.issuers.iter().enumerate() {
            if self.issuers.iter().skip(i + 1).any(|other| other.id == issuer.id) {
                return Err(format!("issuer {} is listed twice", issuer.id.short()));
            }
            if self.root(&issuer.root).is_none() {
                return Err(format!("issuer {} stands below a root that is not listed", issuer.id.short()));
            }
        }
        let mut signing = self.issuers.iter().filter(|issuer| issuer.state == IssuerState::Signing);
        let (Some(signer), None) = (signing.next(), signing.next()) else {
            return Err("there is not exactly one issuer that signs".to_owned());
        };
        if !self.root(&signer.root).is_some_and(Root::in_bundle) {
            return Err(format!("issuer {} signs below a root that nobody trusts", signer.id.short()));
        }
        if self.bundle.generation == 0 || self.bundle.min_supported_generation > self.bundle.generation {
            return Err("the generations of the bundle contradict each other".to_owned());
        }
        if let Some(rotation) = &self.rotation {
            for id in [&rotation.from.issuer, &rotation.to.issuer] {
                if self.issuer(id).is_none() {
                    return Err(format!(
                        "rotation {} speaks of issuer {}, which is not listed",
                        rotation.id,
                        id.short()
                    ));
                }
            }
            for id in [&rotation.from.root, &rotation.to.root] {
                if self.root(id).is_none() {
                    return Err(format!(
                        "rotation {} speaks of root {}, which is not listed",
                        rotation.id,
                        id.short()
                    ));
                }
            }
        }
        Ok(())
    }

    /// A root by its whole fingerprint.
    #[must_use]
    pub fn root(&self, id: &RootId) -> Option<&Root> {
        self.roots.iter().find(|root| root.id == *id)
    }

    pub(crate) fn root_mut(&mut self, id: &RootId) -> Option<&mut Root> {
        self.roots.iter_mut().find(|root| root.id == *id)
    }

    /// An issuer by its whole name.
    #[must_use]
    pub fn issuer(&self, id: &IssuerId) -> Option<&Issuer> {
        self.issuers.iter().find(|issuer| issuer.id == *id)
    }

    pub(crate) fn issuer_mut(&mut self, id: &IssuerId) -> Option<&mut Issuer> {
        self.issuers.iter_mut().find(|issuer| issuer.id == *id)
    }

    /// The issuer that signs.
    #[must_use]
    pub fn signing(&self) -> Option<&Issuer> {
        self.issuers.iter().find(|issuer| issuer.state == IssuerState::Signing)
    }

    /// The certificates between a leaf of `issuer` and the roots, as leaves carry them: the issuer's own, those above it,
    /// and while somebody may know only the other root, its root as that signed it.
    #[must_use]
    pub fn intermediates(&self, issuer: &Issuer) -> Vec<Der> {
        let mut chain = vec![issuer.certificate.clone()];
        chain.extend(issuer.above.iter().cloned());
        if let Some(cross) = &issuer.cross
            && self.rotation.is_some()
        {
            chain.push(cross.certificate.clone());
        }
        chain
    }

    /// What verifiers trust.
    pub fn trusted(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter().filter(|root| root.in_bundle())
    }

    /// The root that new leaves lead to.
    #[must_use]
    pub fn current_root(&self) -> Option<&Root> {
        self.root(&self.signing()?.root)
    }

    /// Whether leaves of this issuer are refused for its root's sake.
    #[must_use]
    pub fn is_trusted(&self, issuer: &IssuerId) -> bool {
        let Some(issuer) = self.issuer(issuer) else { return false };
        let through = |id: &RootId| self.root(id).is_some_and(Root::in_bundle);
        through(&issuer.root) || issuer.cross.as_ref().is_some_and(|cross| through(&cross.root))
    }

    /// One more generation of the bundle.
    pub(crate) fn bump(&mut self, now: Moment) -> u64 {
        self.bundle.generation += 1;
        self.bundle.changed_at = now;
        self.bundle.generation
    }

    /// Forgets what has no meaning any more, so that the record stays small.
    pub(crate) fn tidy(&mut self, now: Moment) {
        self.revocations.serials.retain(|one| one.until.is_none_or(|until| until > now));
        let extra = self.past.len().saturating_sub(MAX_PAST);
        self.past.drain(..extra);
        // A retired issuer is of interest as long as its leaves might be seen, and so is who was forgotten.
        let leaf = self.lifetimes.leaf();
        self.forgotten.retain(|one| now < one.at + leaf + leaf);
        let named: Vec<IssuerId> = self
            .rotation
            .iter()
            .flat_map(|rotation| [rotation.from.issuer.clone(), rotation.to.issuer.clone()])
            .collect();
        self.issuers.retain(|issuer| {
            issuer.state != IssuerState::Retired
                || named.contains(&issuer.id)
                || now < issuer.changed_at + leaf + leaf
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::rotation::model;
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let record = model::record(Moment::from_secs(1_800_000_000));
        assert_eq!(Record::decode(&record.encode().unwrap()).unwrap(), record);
    }

    #[test]
    fn what_does_not_hold_together_is_refused_with_words() {
        type Damage = fn(&mut serde_json::Value);
        let cases: [(&str, Damage, &str); 9] = [
            ("no trust domain", |v| v["trust_domain"] = "".into(), "names no trust domain"),
            ("a newer form", |v| v["version"] = 2.into(), "has the form 2"),
            ("no root", |v| v["roots"] = serde_json::json!([]), "no root is trusted"),
            (
                "a root that is not in use",
                |v| v["roots"][0]["state"] = "retired".into(),
                "no root is trusted",
            ),
            ("no issuer that signs", |v| v["issuers"][0]["state"] = "standby".into(), "exactly one issuer"),
            (
                "an issuer of nobody",
                |v| v["issuers"][0]["root"] = "00".into(),
                "below a root that is not listed",
            ),
            ("an unknown key", |v| v["shoes"] = 1.into(), "unknown field `shoes`"),
            ("no base64", |v| v["roots"][0]["certificate"] = "%".into(), "damaged"),
            ("generations", |v| v["bundle"]["min_supported_generation"] = 9.into(), "contradict each other"),
        ];
        let good = model::record(Moment::from_secs(1_800_000_000)).encode().unwrap();
        for (name, damage, words) in cases {
            let mut value: serde_json::Value = serde_json::from_slice(&good).unwrap();
            damage(&mut value);
            let error = Record::decode(value.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{name}: {error}");
        }
        let cut = good.get(..good.len() / 2).unwrap();
        assert!(Record::decode(cut).unwrap_err().to_string().contains("left as it is"));
    }

    #[test]
    fn a_moment_is_shown_as_people_write_it() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_266_300, "2026-11-21T13:05:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
        ] {
            assert_eq!(Moment::from_secs(seconds).to_string(), text);
        }
    }

    #[test]
    fn no_key_is_ever_printed() {
        let record = model::record(Moment::from_secs(1_800_000_000));
        assert!(!format!("{record:?}").contains("sealed-"));
    }
}
