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
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::trust::Fingerprint;

/// `{"hash":"`, 64 digits, `",`.
const HASH_FIELD: &str = "{\"hash\":\"";
const DIGITS: usize = 64;
/// A line is a few hundred bytes; a longer one is no line of this log.
const LONGEST: u64 = 64 * 1024;
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

    /// How far the log is.
    pub fn head(&self) -> Head {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).head.clone()
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
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 1 March of year 0, in eras of 400 years (the proleptic Gregorian calendar).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hours, minutes, seconds) = (rest / 3_600, rest % 3_600 / 60, rest % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{:03}Z",
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
