//! What a node has signed and refused, in a hash-chained log ([`Audit`]). Signatures come by the thousand, so those of one
//! client by one key are added up and written together, with their number; refusals are told from each other by reason.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::ca::audit::{Audit, AuditError, Entry};

/// Lines that are gathered between two writes. Another one is counted with a client and a key that are not told.
const MOST: usize = 4096;
/// What a client says is not written down at any length.
const LONGEST: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    client: String,
    key: String,
    /// None for a signature.
    refused: Option<&'static str>,
}

/// The log of a node.
#[derive(Debug)]
pub struct Journal {
    audit: Audit,
    gathered: Mutex<BTreeMap<Line, u64>>,
    failed: AtomicBool,
}

impl Journal {
    #[must_use]
    pub fn new(audit: Audit) -> Self {
        Self { audit, gathered: Mutex::default(), failed: AtomicBool::new(false) }
    }

    pub(super) fn signed(&self, client: &str, key: &str) {
        self.add(client, key, None);
    }

    pub(super) fn refused(&self, client: &str, key: &str, reason: &'static str) {
        self.add(client, key, Some(reason));
    }

    fn add(&self, client: &str, key: &str, refused: Option<&'static str>) {
        let short = |text: &str| text.chars().take(LONGEST).collect();
        let mut line = Line { client: short(client), key: short(key), refused };
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if gathered.len() >= MOST && !gathered.contains_key(&line) {
            line = Line { client: "others".to_owned(), key: String::new(), refused };
        }
        *gathered.entry(line).or_default() += 1;
    }

    /// Writes down one event of the process itself.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn event(&self, action: &str, now: SystemTime) -> Result<(), AuditError> {
        self.audit.write(&Entry::allowed(action, "signer"), now)
    }

    /// Writes what was gathered. Blocks.
    ///
    /// # Errors
    /// The log cannot be written; what was gathered is kept for the next time.
    pub fn write(&self, now: SystemTime) -> Result<(), AuditError> {
        let gathered = std::mem::take(&mut *self.gathered.lock().unwrap_or_else(PoisonError::into_inner));
        let mut lines = gathered.into_iter();
        let written = lines.try_for_each(|(line, count)| {
            let entry = match line.refused {
                None => Entry::allowed("sign", &line.client),
                Some(reason) => Entry::refused("sign", &line.client, reason),
            };
            let entry = entry.with("key", line.key.as_str()).with("count", count);
            self.audit.write(&entry, now).inspect_err(|_| self.again(line.clone(), count))
        });
        lines.for_each(|(line, count)| self.again(line, count));
        let written = written.and_then(|()| self.audit.sync());
        self.failed.store(written.is_err(), Ordering::Relaxed);
        written
    }

    fn again(&self, line: Line, count: u64) {
        *self.gathered.lock().unwrap_or_else(PoisonError::into_inner).entry(line).or_default() += count;
    }

    /// Whether the last write failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// The log itself.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.audit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::audit::verify;

    #[test]
    fn signatures_are_added_up_and_refusals_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let now = SystemTime::now();
        let journal = Journal::new(Audit::open(&path, now).unwrap());
        for _ in 0..1000 {
            journal.signed("gw", "shop");
        }
        journal.refused("gw", "bank", "not-allowed");
        journal.refused("gw", "shop", "not-a-handshake");
        journal.write(now).unwrap();
        journal.write(now).unwrap();
        assert!(!journal.has_failed());
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("\"count\":1000") && text.contains("not-a-handshake"), "{text}");
        assert_eq!(verify(&path, None).unwrap(), journal.audit().head());
    }

    #[test]
    fn no_client_can_fill_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(Audit::open(&dir.path().join("log"), SystemTime::now()).unwrap());
        for index in 0..2 * MOST {
            journal.refused("gw", &format!("{index}{}", "x".repeat(1000)), "not-allowed");
        }
        let gathered = journal.gathered.lock().unwrap();
        assert_eq!(gathered.len(), MOST + 1);
        assert_eq!(gathered.values().sum::<u64>(), 2 * u64::try_from(MOST).unwrap());
        assert!(gathered.keys().all(|line| line.key.len() <= LONGEST));
    }
}
