//! Where new roots and issuers come from: the one place where rotation meets cryptography.

use std::time::Duration;

use super::super::record::{Cross, Issuer, Moment, Root};

/// Why something could not be made, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ForgeError(pub String);

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub trust_domain: &'a str,
    pub now: Moment,
    pub life: Duration,
}

/// Makes roots and issuers. Blocks: keys are drawn and certificates are signed.
pub trait Forge: Send + Sync + 'static {
    /// A new root; with the key of `same_key` if there is one.
    ///
    /// # Errors
    /// No key can be made, or that of the former root cannot be used.
    fn root(&self, request: &Request<'_>, same_key: Option<&Root>) -> Result<Root, ForgeError>;

    /// A root from elsewhere, in PEM: with its key, or with an issuer below it that has its key, where the root's stays away.
    ///
    /// # Errors
    /// There is no root, or the key belongs to nobody.
    fn import(&self, request: &Request<'_>, pem: &str) -> Result<(Root, Option<Issuer>), ForgeError>;

    /// A new issuer below `root`, whose key is at hand.
    ///
    /// # Errors
    /// The root's key is not at hand, or it leaves no time.
    fn issuer(&self, request: &Request<'_>, root: &Root) -> Result<Issuer, ForgeError>;

    /// A root signed by another one, whose key is at hand.
    ///
    /// # Errors
    /// As [`issuer`](Self::issuer).
    fn cross(&self, request: &Request<'_>, root: &Root, by: &Root) -> Result<Cross, ForgeError>;

    /// Signs a leaf with `issuer` and verifies it as a peer would that trusts `root` alone, and one that trusts the root
    /// of the cross-signed certificate alone.
    ///
    /// # Errors
    /// A peer would refuse it.
    fn prove(&self, request: &Request<'_>, issuer: &Issuer, roots: &[&Root]) -> Result<(), ForgeError>;
}

/// What a command needs before it can change the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    Nothing,
    /// A new issuer below the current root.
    Issuer,
    /// One that was signed elsewhere: PEM of it, those above it, the root, and its key.
    IssuerFrom(String),
    /// A new root with an issuer below it, signed over by the current root where its key is at hand.
    Root {
        same_key: bool,
        import: Option<String>,
        /// Not signed over: nobody shall trust what the old key says.
        cross: bool,
    },
    /// An issuer that somebody else signs, who has the root's key: below the current root, or below a new one. It is not
    /// made here; see [`Elsewhere`](super::super::outside::Elsewhere).
    Outside {
        new_root: bool,
    },
    /// A root that is used for nothing.
    Rehearsal,
}

/// What was made for a command.
#[derive(Clone, Debug, Default)]
pub struct Material {
    pub root: Option<Root>,
    pub issuer: Option<Issuer>,
    /// The present issuer signed by the new root, for the way back.
    pub back: Option<Cross>,
    /// Why the new issuer is not signed over by the old root; empty if it is.
    pub no_cross: String,
}

/// Makes what is wanted.
///
/// # Errors
/// Something cannot be made, or does not verify.
pub fn make(
    forge: &dyn Forge,
    record: &super::super::record::Record,
    wanted: &Wanted,
    now: Moment,
) -> Result<Material, ForgeError> {
    let missing = || ForgeError("the authority has no root that signs".to_owned());
    let lives = &record.lifetimes;
    let request = |life| Request { trust_domain: &record.trust_domain, now, life };
    match wanted {
        Wanted::Nothing => Ok(Material::default()),
        Wanted::Outside { .. } => Err(ForgeError("the root's key is not here".to_owned())),
        Wanted::Rehearsal => {
            let root = forge.root(&request(Duration::from_secs(86_400)), None)?;
            Ok(Material { root: Some(Root { key: None, ..root }), ..Material::default() })
        }
        Wanted::Issuer => {
            let root = record.current_root().ok_or_else(missing)?;
            let issuer = forge.issuer(&request(lives.issuer()), root)?;
            forge.prove(&request(lives.leaf()), &issuer, &[root])?;
            Ok(Material { issuer: Some(issuer), ..Material::default() })
        }
        Wanted::IssuerFrom(pem) => {
            let current = record.current_root().ok_or_else(missing)?;
            let (root, issuer) = forge.import(&request(lives.issuer()), pem)?;
            let issuer = issuer.ok_or_else(|| {
                ForgeError("this is a root: `postern certs rotate root --from-file` takes it".to_owned())
            })?;
            if root.id != current.id {
                return Err(ForgeError(format!(
                    "it is below root {}, and the one in use is {}: `postern certs rotate root --from-file` exchanges both",
                    root.id.short(),
                    current.id.short()
                )));
            }
            forge.prove(&request(lives.leaf()), &issuer, &[current])?;
            Ok(Material { issuer: Some(issuer), ..Material::default() })
        }
        Wanted::Root { same_key, import, cross } => {
            let old = record.current_root().ok_or_else(missing)?;
            let (root, issuer) = match import {
                Some(pem) => forge.import(&request(lives.root()), pem)?,
                None => (forge.root(&request(lives.root()), same_key.then_some(old))?, None),
            };
            let mut issuer = match issuer {
                Some(issuer) => issuer,
                None => forge.issuer(&request(lives.issuer()), &root)?,
            };
            let mut no_cross = String::new();
            let mut back = None;
            if *cross {
                match forge.cross(&request(lives.root()), &root, old) {
                    Ok(made) => issuer.cross = Some(made),
                    Err(error) => no_cross = error.0,
                }
                back = forge.cross(&request(lives.root()), old, &root).ok();
            } else {
                no_cross = "the old root is not to be believed".to_owned();
            }
            let both = [&root, old];
            let roots =
                if issuer.cross.is_some() { both.as_slice() } else { both.get(..1).unwrap_or_default() };
            forge.prove(&request(lives.leaf()), &issuer, roots)?;
            Ok(Material { root: Some(root), issuer: Some(issuer), back, no_cross })
        }
    }
}
