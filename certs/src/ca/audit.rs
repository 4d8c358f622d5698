//! The log of what the authority decided: JSON lines that are only ever added to, each with the hash of the one before it.
//!
//! A line is `{"hash":"HASH",...}`, where HASH is SHA-256 over the hash of the line before and the line without its own. So
//! a line that was changed, taken out or put in is found by [`verify`]. Lines that were cut off at the end are found by who
//! has written down the last hash, which is shown in the status of the authority.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use time::PrimitiveDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use super::record::Moment;
use crate::trust::Fingerprint;

/// `{"hash":"`, 64 digits, `",`.
const HASH_FIELD: &str = "{\"hash\":\"";
const DIGITS: usize = 64;
/// A line is a few hundred bytes; a longer one is no line of this log.
const LONGEST: u64 = 64 * 1024;
/// How far back [`Audit::signed_since`] looks: 20,000 signatures.
const LOOKED_AT: u64 = 8 * 1024 * 1024;
const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
const FIRST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What was decided.
#[derive(Clone, Debug, Serialize)]
pub struct Entry<'a> {
    /// `attest`, `sign`, `token.create`, `rotate` and the like.
    pub action: &'a str,
    /// Who asked: an identity, or an operator.
    pub actor: &'a str,
    /// `allowed` or `refused`.
    pub decision: &'a str,
    /// Everything else: proof, identity, serial, key, end, reason.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl<'a> Entry<'a> {
    pub fn allowed(action: &'a str, actor: &'a str) -> Self {
        Self { action, actor, decision: "allowed", details: Map::new() }
    }

    pub fn refused(action: &'a str, actor: &'a str, reason: &str) -> Self {
        Self { action, actor, decision: "refused", details: Map::new() }.with("reason", reason)
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }
}

/// Why the log cannot be written or is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("the audit log {}: {error}", .path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("line {line} of the audit log is not one that was written: {problem}")]
    Line { line: u64, problem: &'static str },
    #[error("the audit log ends with {found}, expected was {expected}: lines at its end are missing")]
    Head { found: String, expected: String },
    #[error("the audit log is held by another process")]
    Held,
}

/// The log, open at its end.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Bytes that were written whole.
    length: u64,
    head: Head,
}

/// The end of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub lines: u64,
    pub hash: String,
}

impl Audit {
    /// Opens the log, or begins one. A line that was not finished when a machine stopped is taken away and told of.
    ///
    /// # Errors
    /// The file cannot be used, another process has it, or its last line is not one that was written.
    pub fn open(path: &Path, now: SystemTime) -> Result<Self, AuditError> {
        let wrong = |error| AuditError::File { path: path.into(), error };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(wrong)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(AuditError::Held),
            Err(std::fs::TryLockError::Error(error)) => return Err(wrong(error)),
        }
        let length = file.seek(SeekFrom::End(0)).map_err(wrong)?;
        let start = length.saturating_sub(2 * LONGEST);
        file.seek(SeekFrom::Start(start)).map_err(wrong)?;
        let mut tail = Vec::new();
        Read::by_ref(&mut file).take(2 * LONGEST).read_to_end(&mut tail).map_err(wrong)?;
        let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let cut = tail.len() - whole;
        tail.truncate(whole);
        let last = tail.strip_suffix(b"\n").and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next());
        let head = match last {
            None if start == 0 => Head { lines: 0, hash: FIRST.to_owned() },
            None => return Err(AuditError::Line { line: 0, problem: "it is too long" }),
            Some(line) => head_of(line)?,
        };
        let length = length - u64::try_from(cut).unwrap_or_default();
        if cut > 0 {
            file.set_len(length).map_err(wrong)?;
        }
        let audit = Self { path: path.into(), state: Mutex::new(State { file, length, head }) };
        if cut > 0 {
            audit.write(&Entry::allowed("audit.repair", "authority").with("bytes_cut", cut), now)?;
        }
        Ok(audit)
    }

    /// Adds a line. Whoever decides something writes it down first; if that fails, it is not done.
    ///
    /// # Errors
    /// The line was not written.
    pub fn write(&self, entry: &Entry<'_>, now: SystemTime) -> Result<(), AuditError> {
        let wrong = |error| AuditError::File { path: self.path.clone(), error };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = state.head.lines + 1;
        let body = Body { seq: lines, time: rfc3339(now), entry };
        let body = serde_json::to_string(&body).map_err(|error| wrong(error.into()))?;
        let body = body.strip_prefix('{').unwrap_or_default();
        let hash = hash(&state.head.hash, body);
        let line = format!("{HASH_FIELD}{hash}\",{body}\n");
        if let Err(error) = state.file.write_all(line.as_bytes()) {
            // Half a line would spoil the next one.
            let length = state.length;
            let _ = state.file.set_len(length);
            return Err(wrong(error));
        }
        state.length += u64::try_from(line.len()).unwrap_or_default();
        state.head = Head { lines, hash };
        Ok(())
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// It may not be.
    pub fn sync(&self) -> Result<(), AuditError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.file.sync_data().map_err(|error| AuditError::File { path: self.path.clone(), error })
    }

    /// The signatures that were written down since a time, of those that fit in the last megabytes of the log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn signed_since(&self, since: SystemTime) -> Result<Vec<Signature>, AuditError> {
        let wrong = |error| AuditError::File { path: self.path.clone(), error };
        let length = self.state.lock().unwrap_or_else(PoisonError::into_inner).length;
        let mut file = File::open(&self.path).map_err(wrong)?;
        let start = length.saturating_sub(LOOKED_AT);
        file.seek(SeekFrom::Start(start)).map_err(wrong)?;
        let mut tail = Vec::new();
        file.take(length - start).read_to_end(&mut tail).map_err(wrong)?;
        // The line that it begins within is not one that can be read.
        let lines =
            tail.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Line>(line).ok());
        let signatures = lines.filter(|line| line.action == "sign" && line.decision == "allowed");
        Ok(signatures.filter_map(Line::signature).filter(|signature| signature.at >= since).collect())
    }

    /// How far the log is.
    pub fn head(&self) -> Head {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).head.clone()
    }
}

/// A certificate that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    pub identity: String,
    pub proxy_id: String,
    /// Who signed.
    pub issuer: String,
    pub at: SystemTime,
    pub not_after: SystemTime,
}

/// What a line about a signature says.
#[derive(Deserialize)]
struct Line {
    time: String,
    action: String,
    actor: String,
    decision: String,
    #[serde(default)]
    proxy_id: String,
    #[serde(default)]
    issuer: String,
    #[serde(default)]
    not_after: String,
}

impl Line {
    fn signature(self) -> Option<Signature> {
        let (at, not_after) = (read_time(&self.time)?, read_time(&self.not_after)?);
        Some(Signature { identity: self.actor, proxy_id: self.proxy_id, issuer: self.issuer, at, not_after })
    }
}

#[derive(Serialize)]
struct Body<'a> {
    seq: u64,
    time: String,
    #[serde(flatten)]
    entry: &'a Entry<'a>,
}

fn hash(before: &str, body: &str) -> String {
    Fingerprint::of(format!("{before}\n{body}").as_bytes()).to_string()
}

/// The hash that a line says it has, and the line without it.
fn parts(line: &str) -> Option<(&str, &str)> {
    let (hash, rest) = line.strip_prefix(HASH_FIELD)?.split_at_checked(DIGITS)?;
    let body = rest.strip_prefix("\",")?;
    hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then_some((hash, body))
}

fn sequence(body: &str) -> Option<u64> {
    let parsed: Value = serde_json::from_str(&format!("{{{body}")).ok()?;
    parsed.get("seq")?.as_u64()
}

fn head_of(line: &[u8]) -> Result<Head, AuditError> {
    let wrong = AuditError::Line { line: 0, problem: "the last one has another form" };
    let Some((hash, body)) = std::str::from_utf8(line).ok().and_then(parts) else { return Err(wrong) };
    let Some(lines) = sequence(body) else { return Err(wrong) };
    Ok(Head { lines, hash: hash.to_owned() })
}

/// Reads a log from its beginning and checks each line. `expected` is the last hash that somebody wrote down, where he did.
///
/// # Errors
/// The first line that was changed, put in, or follows one that was taken out.
pub fn verify(path: &Path, expected: Option<&str>) -> Result<Head, AuditError> {
    let wrong = |error| AuditError::File { path: path.into(), error };
    let mut reader = BufReader::new(File::open(path).map_err(wrong)?);
    let mut head = Head { lines: 0, hash: FIRST.to_owned() };
    let mut seen = expected.is_none_or(|expected| expected == FIRST);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST + 1).read_until(b'\n', &mut line).map_err(wrong)? == 0 {
            break;
        }
        let number = head.lines + 1;
        let bad = |problem| AuditError::Line { line: number, problem };
        let text = line.strip_suffix(b"\n").ok_or(bad("it has no end"))?;
        let text = std::str::from_utf8(text).map_err(|_| bad("it is not text"))?;
        let (said, body) = parts(text).ok_or(bad("it has another form"))?;
        if hash(&head.hash, body) != said {
            return Err(bad("its hash does not follow from it and the line before"));
        }
        if sequence(body) != Some(number) {
            return Err(bad("its number is not the next one"));
        }
        head = Head { lines: number, hash: said.to_owned() };
        seen |= expected == Some(said);
    }
    match expected {
        Some(expected) if !seen => Err(AuditError::Head { found: head.hash, expected: expected.to_owned() }),
        _ => Ok(head),
    }
}

/// `2026-11-21T13:05:00.123Z`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    Moment::from(time).utc().format(TIME).unwrap_or_default()
}

fn read_time(text: &str) -> Option<SystemTime> {
    PrimitiveDateTime::parse(text, TIME).ok().map(|time| time.assume_utc().into())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_written_as_everybody_does() {
        let cases = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_704_067_199, "2023-12-31T23:59:59.000Z"),
            (1_795_266_300, "2026-11-21T13:05:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(rfc3339(at(seconds)), text);
        }
    }

    #[test]
    fn signatures_since_a_time_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(&dir.path().join("audit.log"), at(1)).unwrap();
        let sign = |id: &'static str| {
            let entry = Entry::allowed("sign", "spiffe://td/a").with("proxy_id", id).with("issuer", "i1");
            entry.with("not_after", rfc3339(at(90_000)))
        };
        audit.write(&sign("early"), at(10)).unwrap();
        audit.write(&Entry::refused("sign", "spiffe://td/b", "no"), at(20)).unwrap();
        audit.write(&Entry::allowed("token.create", "root"), at(20)).unwrap();
        audit.write(&sign("late"), at(20)).unwrap();
        let late = Signature {
            identity: "spiffe://td/a".into(),
            proxy_id: "late".into(),
            issuer: "i1".into(),
            at: at(20),
            not_after: at(90_000),
        };
        assert_eq!(audit.signed_since(at(20)).unwrap(), [late]);
        assert_eq!(audit.signed_since(at(10)).unwrap().len(), 2);
        // Of a long log the end is read, and the line that it begins within is passed over.
        let long = "x".repeat(30_000);
        for _ in 0..300 {
            audit.write(&Entry::allowed("fill", "root").with("long", long.as_str()), at(30)).unwrap();
        }
        audit.write(&sign("last"), at(40)).unwrap();
        let found = audit.signed_since(at(0)).unwrap();
        assert_eq!(found.iter().map(|one| &*one.proxy_id).collect::<Vec<_>>(), ["last"]);
    }

    fn log(dir: &Path) -> PathBuf {
        let path = dir.join("audit.log");
        let audit = Audit::open(&path, at(1)).unwrap();
        for number in 0..6 {
            let entry = Entry::allowed("sign", "spiffe://td/a").with("serial", format!("{number}"));
            audit.write(&entry, at(number)).unwrap();
        }
        path
    }

    #[test]
    fn a_log_that_was_left_alone_is_whole_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let again = Audit::open(&path, at(9)).unwrap();
        assert!(matches!(Audit::open(&path, at(9)), Err(AuditError::Held)));
        again.write(&Entry::refused("sign", "spiffe://td/b", "a \"reason\"\n"), at(9)).unwrap();
        assert_eq!(verify(&path, None).unwrap(), again.head());
        assert_eq!(again.head().lines, 7);
    }

    /// Whatever is done to it is found, wherever.
    #[test]
    fn every_change_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let whole = std::fs::read(&path).unwrap();
        let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        let last = verify(&path, None).unwrap().hash;
        let check = |bytes: Vec<u8>, what: &str| {
            std::fs::write(&path, bytes).unwrap();
            assert!(verify(&path, Some(&last)).is_err(), "{what}");
        };
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            check(changed, &format!("byte {at}"));
        }
        for at in 0..lines.len() {
            let without: Vec<&[u8]> =
                lines.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, l)| *l).collect();
            check(without.concat(), &format!("line {at} taken out"));
            let twice: Vec<&[u8]> =
                lines.iter().enumerate().flat_map(|(i, l)| vec![*l; if i == at { 2 } else { 1 }]).collect();
            check(twice.concat(), &format!("line {at} twice"));
            let mut other = lines.clone();
            other.swap(at, (at + 1) % lines.len());
            check(other.concat(), &format!("lines {at} and the next exchanged"));
            check(lines[..at].concat(), &format!("cut off from line {at}"));
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(verify(&path, Some(&last)).is_ok());
    }

    #[test]
    fn half_a_line_is_taken_away_and_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for cut in [1, 30, 100] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let audit = Audit::open(&path, at(20)).unwrap();
            assert_eq!(verify(&path, None).unwrap(), audit.head());
            assert_eq!(audit.head().lines, 6, "five lines and one about the repair");
            assert!(std::fs::read_to_string(&path).unwrap().contains("audit.repair"));
        }
        std::fs::write(&path, b"something else\n").unwrap();
        assert!(Audit::open(&path, at(20)).is_err());
    }
}
