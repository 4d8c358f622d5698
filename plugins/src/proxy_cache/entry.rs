//! What is kept: an answer with its times, or the fields by which the answers to a request differ.
//!
//! The form on disk is one file: a line that tells the version, the length of the head, the head as JSON, the body, and
//! a checksum of all of it, so that a file that was cut short or damaged is no answer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The name of what is kept: a digest of everything that tells requests apart.
pub type Key = [u8; 32];

/// Something that is kept.
#[derive(Debug)]
pub enum Stored {
    /// An answer.
    Answer(Entry),
    /// There are several, by the values that these fields have in the request.
    Vary(Variants),
}

/// The answers to a request that differ by fields of the request.
#[derive(Clone, Debug, PartialEq)]
pub struct Variants {
    /// The fields, in the order of their names.
    pub names: Box<[HeaderName]>,
    /// The answers, the newest last.
    pub keys: Vec<Key>,
}

/// A kept answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, without those of a connection and `Content-Length`.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// When it came, or was last confirmed.
    pub stored: SystemTime,
    /// How long it is fresh.
    pub ttl: Duration,
}

impl Entry {
    /// How old it is here. A clock that was set back makes nothing older.
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.stored).unwrap_or_default()
    }

    /// Whether its time is not over.
    pub fn is_fresh(&self, now: SystemTime) -> bool {
        self.age(now) < self.ttl
    }
}

/// What an entry takes beside its body and fields.
const OVERHEAD: usize = 512;

#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    headers: Vec<(String, String)>,
    #[serde(default)]
    stored: u64,
    #[serde(default)]
    ttl: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    vary: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    variants: Vec<String>,
}

const MAGIC: &[u8] = b"postern cache 1\n";
const SUM: usize = 32;

impl Stored {
    /// Bytes that it takes in memory.
    pub fn size(&self) -> u32 {
        let size = match self {
            Self::Answer(entry) => {
                let fields: usize =
                    entry.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum();
                entry.body.len() + fields
            }
            Self::Vary(variants) => (variants.names.len() + variants.keys.len()) * 64,
        };
        u32::try_from(size + OVERHEAD).unwrap_or(u32::MAX)
    }

    /// The file.
    pub fn to_file(&self) -> Vec<u8> {
        let empty = Bytes::new();
        let (head, body) = match self {
            Self::Answer(entry) => (
                Head {
                    status: Some(entry.status.as_u16()),
                    headers: entry
                        .headers
                        .iter()
                        .map(|(name, value)| (name.to_string(), STANDARD.encode(value)))
                        .collect(),
                    stored: millis(entry.stored.duration_since(UNIX_EPOCH).unwrap_or_default()),
                    ttl: millis(entry.ttl),
                    vary: Vec::new(),
                    variants: Vec::new(),
                },
                &entry.body,
            ),
            Self::Vary(variants) => (
                Head {
                    status: None,
                    headers: Vec::new(),
                    stored: 0,
                    ttl: 0,
                    vary: variants.names.iter().map(HeaderName::to_string).collect(),
                    variants: variants.keys.iter().map(|key| STANDARD.encode(key)).collect(),
                },
                &empty,
            ),
        };
        let head = serde_json::to_vec(&head).unwrap_or_default();
        let mut file = Vec::with_capacity(MAGIC.len() + 8 + head.len() + body.len() + SUM);
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&(head.len() as u64).to_be_bytes());
        file.extend_from_slice(&head);
        file.extend_from_slice(body);
        let sum = Sha256::digest(&file);
        file.extend_from_slice(&sum);
        file
    }

    /// Reads a file; nothing if it is none of ours, or not whole.
    pub fn from_file(file: &[u8]) -> Option<Self> {
        let (text, sum) = file.split_at_checked(file.len().checked_sub(SUM)?)?;
        if Sha256::digest(text).as_slice() != sum {
            return None;
        }
        let rest = text.strip_prefix(MAGIC)?;
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (head, body) = rest.split_at_checked(usize::try_from(u64::from_be_bytes(*length)).ok()?)?;
        let head: Head = serde_json::from_slice(head).ok()?;
        let Some(status) = head.status else {
            return Some(Self::Vary(Variants {
                names: head.vary.iter().map(|name| name.parse().ok()).collect::<Option<_>>()?,
                keys: head
                    .variants
                    .iter()
                    .map(|key| Key::try_from(STANDARD.decode(key).ok()?).ok())
                    .collect::<Option<_>>()?,
            }));
        };
        let mut headers = HeaderMap::with_capacity(head.headers.len());
        for (name, value) in &head.headers {
            let value = HeaderValue::from_bytes(&STANDARD.decode(value).ok()?).ok()?;
            headers.append(name.parse::<HeaderName>().ok()?, value);
        }
        Some(Self::Answer(Entry {
            status: StatusCode::from_u16(status).ok()?,
            headers,
            body: Bytes::copy_from_slice(body),
            stored: UNIX_EPOCH + Duration::from_millis(head.stored),
            ttl: Duration::from_millis(head.ttl),
        }))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_bytes(b"\xff\xfe").unwrap());
        Entry {
            status: StatusCode::NOT_FOUND,
            headers,
            body: Bytes::from_static(b"hello\0world"),
            stored: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            ttl: Duration::from_secs(5),
        }
    }

    #[test]
    fn a_file_holds_all_of_an_answer() {
        let file = Stored::Answer(entry()).to_file();
        let Some(Stored::Answer(read)) = Stored::from_file(&file) else { panic!("an answer") };
        assert_eq!(read, entry());
        let variants = Variants { names: [http::header::ACCEPT].into(), keys: vec![[7; 32], [8; 32]] };
        let file = Stored::Vary(variants.clone()).to_file();
        let Some(Stored::Vary(read)) = Stored::from_file(&file) else { panic!("variants") };
        assert_eq!(read, variants);
    }

    #[test]
    fn a_damaged_file_is_no_answer() {
        let file = Stored::Answer(entry()).to_file();
        for cut in 0..file.len() {
            assert!(Stored::from_file(&file[..cut]).is_none(), "{cut}");
        }
        for at in 0..file.len() {
            let mut file = file.clone();
            file[at] ^= 1;
            assert!(Stored::from_file(&file).is_none(), "{at}");
        }
    }

    #[test]
    fn an_answer_is_fresh_for_its_time() {
        let entry = entry();
        for (after, fresh) in [(0, true), (4_999, true), (5_000, false), (9_000, false)] {
            assert_eq!(entry.is_fresh(entry.stored + Duration::from_millis(after)), fresh, "{after}");
        }
        assert!(entry.is_fresh(entry.stored - Duration::from_secs(60)), "the clock was set back");
    }
}
