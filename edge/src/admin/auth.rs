//! Who may use the Admin API: addresses, keys and roles.
//!
//! There is no key that everybody knows. If none is configured, one is made at the first start and kept in
//! the data directory, readable by the owner alone. Keys are compared in a time that does not depend on them.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use config::process::{self, AdminRole};
use http::header::COOKIE;
use http::{HeaderMap, Method};
use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::query::Query;
use crate::store::prepare_data_dir;

/// Name of the file with the generated key, in the data directory.
pub const KEY_FILE: &str = "admin.key";
/// Length of a generated key.
const KEY_LENGTH: usize = 32;

/// The rules of access.
pub struct Access {
    keys: Vec<Key>,
    key_required: bool,
    /// Empty: everybody.
    allow: Vec<IpNet>,
    generated: Option<PathBuf>,
}

struct Key {
    name: String,
    /// Only the digest is kept: equal lengths to compare, and no key in a memory dump.
    digest: [u8; 32],
    role: AdminRole,
}

/// Whose key was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// The name of the key.
    pub name: &'a str,
    /// What it may do.
    pub role: AdminRole,
}

/// Why a request is refused. The text is what APISIX writes into `description`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No key was shown.
    #[error("missing apikey")]
    MissingKey,
    /// A key that is none of ours.
    #[error("wrong apikey")]
    WrongKey,
    /// A viewer may only read.
    #[error("invalid method for role viewer")]
    ReadOnly,
}

impl Access {
    /// The rules of `settings`. If a key is needed and none is configured, the one in `data_dir` is used,
    /// or made.
    ///
    /// # Errors
    /// If the key file cannot be read or written.
    pub fn new(settings: &process::Admin, data_dir: &Path) -> io::Result<Access> {
        let mut keys: Vec<Key> = settings
            .keys
            .iter()
            // APISIX takes an empty key as "make one".
            .filter(|key| !key.key.reveal().is_empty())
            .map(|key| Key { name: key.name.clone(), digest: digest(key.key.reveal()), role: key.role })
            .collect();
        let mut generated = None;
        if settings.key_required && keys.is_empty() {
            let path = data_dir.join(KEY_FILE);
            let key = generated_key(&path)?;
            keys.push(Key { name: "admin".to_owned(), digest: digest(&key), role: AdminRole::Admin });
            generated = Some(path);
        }
        Ok(Access { keys, key_required: settings.key_required, allow: settings.allow.clone(), generated })
    }

    /// Where the generated key is, if it is the one to use: for the start-up message.
    #[must_use]
    pub fn generated_key_file(&self) -> Option<&Path> {
        self.generated.as_deref()
    }

    /// Whether the address may connect.
    #[must_use]
    pub fn allows(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.allow.is_empty() || self.allow.iter().any(|net| net.contains(&peer))
    }

    /// Whose key was shown: in the query as `api_key`, in the header `X-API-KEY`, or in the
    /// cookie `x-api-key`, in this order.
    ///
    /// # Errors
    /// Why the request is refused.
    pub fn authenticate(
        &self,
        method: &Method,
        headers: &HeaderMap,
        query: &Query,
    ) -> Result<Identity<'_>, Refusal> {
        if !self.key_required {
            return Ok(Identity { name: "anonymous", role: AdminRole::Admin });
        }
        let header = || headers.get("x-api-key").map(|key| key.as_bytes().to_vec());
        let shown = query.get("api_key").map(|key| key.as_bytes().to_vec());
        let shown = shown.or_else(header).or_else(|| cookie(headers)).ok_or(Refusal::MissingKey)?;
        let shown: [u8; 32] = Sha256::digest(&shown).into();
        // All keys are looked at, wherever the right one is.
        let mut found = None;
        for key in &self.keys {
            let difference = key.digest.iter().zip(&shown).fold(0, |sum, (a, b)| sum | (a ^ b));
            if difference == 0 {
                found = found.or(Some(key));
            }
        }
        let key = found.ok_or(Refusal::WrongKey)?;
        if key.role == AdminRole::Viewer && !matches!(*method, Method::GET | Method::HEAD) {
            return Err(Refusal::ReadOnly);
        }
        Ok(Identity { name: &key.name, role: key.role })
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn cookie(headers: &HeaderMap) -> Option<Vec<u8>> {
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';'));
    pairs.find_map(|pair| Some(pair.trim().strip_prefix("x-api-key=")?.as_bytes().to_vec()))
}

/// The key in a file for the owner alone, made if there is none.
pub(crate) fn generated_key(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Ok(key) if key.trim().len() >= KEY_LENGTH => return Ok(key.trim().to_owned()),
        Ok(_) => tracing::warn!(path = %path.display(), "the key in the file is too short, making another"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if let Some(directory) = path.parent() {
        prepare_data_dir(directory)?;
    }
    let key = random_key()?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(key.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    Ok(key)
}

/// 32 letters and digits from the operating system's generator: 190 bits.
pub(crate) fn random_key() -> io::Result<String> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut source = fs::File::open("/dev/urandom")?;
    let mut key = String::with_capacity(KEY_LENGTH);
    while key.len() < KEY_LENGTH {
        let mut bytes = [0; 64];
        io::Read::read_exact(&mut source, &mut bytes)?;
        // A byte too large for a whole number of rounds would prefer the first letters.
        let fair = bytes.iter().filter(|byte| usize::from(**byte) < 256 / LETTERS.len() * LETTERS.len());
        let letters = fair.filter_map(|byte| LETTERS.get(usize::from(*byte) % LETTERS.len()));
        key.extend(letters.map(|letter| char::from(*letter)).take(KEY_LENGTH - key.len()));
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::net::SocketAddr;
    use std::os::unix::fs::PermissionsExt;

    use config::process::{Admin, AdminKey};
    use http::HeaderValue;

    use super::*;

    fn settings(keys: &[(&str, &str, AdminRole)], allow: &[&str]) -> Admin {
        let key = |(name, key, role): &(&str, &str, AdminRole)| AdminKey {
            name: (*name).to_owned(),
            key: (*key).to_owned().into(),
            role: *role,
        };
        Admin {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            keys: keys.iter().map(key).collect(),
            key_required: true,
            allow: allow.iter().map(|net| net.parse().unwrap()).collect(),
            cors: true,
            tls: None,
        }
    }

    #[test]
    fn keys_and_roles() {
        let directory = tempfile::tempdir().unwrap();
        let keys = [("root", "secret", AdminRole::Admin), ("eye", "look", AdminRole::Viewer)];
        let access = Access::new(&settings(&keys, &[]), directory.path()).unwrap();
        assert_eq!(access.generated_key_file(), None);
        for (method, query, header, cookie, expected) in [
            (Method::GET, "", None, None, Err(Refusal::MissingKey)),
            (Method::GET, "", Some("nope"), None, Err(Refusal::WrongKey)),
            (Method::GET, "", Some(""), None, Err(Refusal::WrongKey)),
            (Method::PUT, "", Some("secret"), None, Ok("root")),
            (Method::PUT, "api_key=secret", None, None, Ok("root")),
            (Method::PUT, "api_key=nope", Some("secret"), None, Err(Refusal::WrongKey)),
            (Method::PUT, "", None, Some("a=b; x-api-key=secret; c=d"), Ok("root")),
            (Method::PUT, "", None, Some("xx-api-key=secret"), Err(Refusal::MissingKey)),
            (Method::GET, "", Some("look"), None, Ok("eye")),
            (Method::DELETE, "", Some("look"), None, Err(Refusal::ReadOnly)),
            (Method::POST, "", Some("look"), None, Err(Refusal::ReadOnly)),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [("x-api-key", header), ("cookie", cookie)] {
                if let Some(value) = value {
                    headers.insert(name, HeaderValue::from_static(value));
                }
            }
            let identity = access.authenticate(&method, &headers, &Query::parse(query));
            assert_eq!(
                identity.map(|identity| identity.name),
                expected,
                "{method} {query} {header:?} {cookie:?}"
            );
        }
    }

    #[test]
    fn a_key_is_made_once_and_only_the_owner_reads_it() {
        let outside = tempfile::tempdir().unwrap();
        let directory = outside.path().join("postern-data");
        for round in 0..2 {
            let access = Access::new(&settings(&[("admin", "", AdminRole::Admin)], &[]), &directory).unwrap();
            let path = access.generated_key_file().unwrap();
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
            let key = fs::read_to_string(path).unwrap();
            assert_eq!(key.trim().len(), KEY_LENGTH, "round {round}");
            let headers = HeaderMap::new();
            let query = Query::parse(&format!("api_key={}", key.trim()));
            assert!(access.authenticate(&Method::PUT, &headers, &query).is_ok());
        }
        assert_ne!(random_key().unwrap(), random_key().unwrap());
    }

    #[test]
    fn addresses() {
        let directory = tempfile::tempdir().unwrap();
        let access = Access::new(&settings(&[], &["127.0.0.0/24", "fd00::/8"]), directory.path()).unwrap();
        for (peer, allowed) in [
            ("127.0.0.1", true),
            ("::ffff:127.0.0.9", true),
            ("127.0.1.1", false),
            ("fd00::1", true),
            ("::1", false),
        ] {
            assert_eq!(access.allows(peer.parse().unwrap()), allowed, "{peer}");
        }
        let open = Access::new(&settings(&[], &[]), directory.path()).unwrap();
        assert!(open.allows("9.9.9.9".parse().unwrap()));
    }
}
