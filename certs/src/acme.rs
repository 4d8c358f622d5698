//! Certificates for public names from an authority that speaks ACME (RFC 8555), such as Let's Encrypt.
//!
//! A [`Keeper`] sees to it that every set of names that is [wanted](Want) has a certificate, and tells whoever serves what to
//! serve. What it has to remember is a [`Record`] for each set of names in a store that is changed by compare-and-swap alone.
//! Replicas share the store: the record says who orders, what all of them have to answer while the authority looks, and
//! what came of it. Nothing here runs on a worker.

mod account;
mod authority;
mod challenge;
mod directory;
mod keeper;
mod last_good;
mod lease;
mod record;
mod schedule;
mod served;
mod status;
mod transport;
mod vault;

use std::fmt;

pub use authority::{Ask, Authority, Failure, Hints, Present};
pub use challenge::{Challenge, ChallengeKind, alpn_config};
pub use directory::{Directory, ExternalAccount, Settings};
pub use keeper::{Keeper, Parts, Publish};
pub use record::{Certificate, Record};
pub use served::{Issued, Served};
pub use status::{CertificateStatus, Counts, FailureStatus, State, Status};
pub use vault::{Vault, VaultError};

use crate::trust::Fingerprint;

/// Seconds since 1970.
pub type Seconds = u64;

/// A set of names that is to have a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Who wants it: the id of a resource.
    pub id: String,
    /// The names in their [normal form](crate::sni::normal_name), without wildcards, sorted, each once.
    pub names: Vec<String>,
    /// How it is shown that the names are ours, where that is not left to the settings.
    pub challenge: Option<ChallengeKind>,
}

/// What the record of a set of names is called in the store. The directory is a part of it: certificates of a staging
/// authority are none of the real one.
fn record_name(directory: &str, names: &[String]) -> String {
    format!("{CERTIFICATES}{}", digest(directory, names.iter().map(String::as_str)))
}

/// What the names of records begin with.
const CERTIFICATES: &str = "certificate/";

fn digest<'a>(first: &'a str, rest: impl Iterator<Item = &'a str>) -> String {
    let mut text = first.to_owned();
    for part in rest {
        text.push('\n');
        text.push_str(part);
    }
    let mut name = Fingerprint::of(text.as_bytes()).to_string();
    name.truncate(40);
    name
}

/// A list of names for people.
fn listed(names: &[String]) -> impl fmt::Display {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first, rest @ ..] if rest.len() > 4 => format!("{first} and {} more", rest.len()),
        names => names.join(", "),
    }
}

#[cfg(test)]
mod tests;
