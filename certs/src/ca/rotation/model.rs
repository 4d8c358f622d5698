//! A forge without cryptography, for tests: certificates are words.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::record::{
    Cross, Der, Issuer, IssuerState, Lifetimes, Moment, Record, Root, RootState, SealedKey,
};
use super::forge::{Forge, ForgeError, Request};

/// Counts, so that no two things have the same name.
#[derive(Debug, Default)]
pub(crate) struct Words(AtomicU64);

impl Words {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl Forge for Words {
    fn root(&self, request: &Request<'_>, same_key: Option<&Root>) -> Result<Root, ForgeError> {
        let number = self.next();
        let id = format!("{number:04}{}", "0".repeat(60));
        Ok(Root {
            id: id.as_str().into(),
            state: RootState::Staged,
            certificate: Der(format!("root {number}").into_bytes()),
            spki: same_key.map_or_else(|| format!("spki-{number}"), |root| root.spki.clone()),
            not_before: request.now,
            not_after: request.now + request.life,
            key: Some(SealedKey(format!("sealed-{number}"))),
            kept: String::new(),
            made_at: request.now,
            changed_at: request.now,
            note: String::new(),
        })
    }

    fn import(&self, request: &Request<'_>, _: &str) -> Result<(Root, Option<Issuer>), ForgeError> {
        Ok((self.root(request, None)?, None))
    }

    fn issuer(&self, request: &Request<'_>, root: &Root) -> Result<Issuer, ForgeError> {
        if root.key.is_none() {
            return Err(ForgeError("the key of the root is not here".to_owned()));
        }
        let number = self.next();
        Ok(Issuer {
            id: format!("{number:04}{}", "1".repeat(36)).as_str().into(),
            state: IssuerState::Staged,
            root: root.id.clone(),
            certificate: Der(format!("issuer {number} by {}", root.id).into_bytes()),
            above: Vec::new(),
            cross: None,
            not_before: request.now,
            not_after: (request.now + request.life).min(root.not_after),
            key: Some(SealedKey(format!("sealed-{number}"))),
            made_at: request.now,
            changed_at: request.now,
        })
    }

    fn cross(&self, _: &Request<'_>, root: &Root, by: &Root) -> Result<Cross, ForgeError> {
        if by.key.is_none() {
            return Err(ForgeError("the key of the root is not here".to_owned()));
        }
        Ok(Cross {
            root: by.id.clone(),
            certificate: Der(format!("{} over {}", by.id, root.id).into_bytes()),
            not_after: root.not_after.min(by.not_after),
        })
    }

    fn prove(&self, _: &Request<'_>, _: &Issuer, _: &[&Root]) -> Result<(), ForgeError> {
        Ok(())
    }
}

/// A new authority.
pub(crate) fn record(now: Moment) -> Record {
    founded(&Words::default(), now, Lifetimes::default())
}

/// The same by a forge that goes on being used.
pub(crate) fn founded(forge: &dyn Forge, now: Moment, lifetimes: Lifetimes) -> Record {
    let request = |life: Duration| Request { trust_domain: "mesh.local", now, life };
    let root = forge.root(&request(lifetimes.root()), None).expect("a root");
    let issuer = forge.issuer(&request(lifetimes.issuer()), &root).expect("an issuer");
    Record::new("mesh.local", lifetimes, root, issuer, now)
}
