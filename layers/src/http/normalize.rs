//! The one normal form of a request path and query, made before anything is matched.
//!
//! Runs first of all request work. What routes and plugins see (`decoded`) and what the upstream receives
//! (`sent`) come from the same pass, so an access rule and the upstream cannot disagree about the path. A path
//! that is already normal is borrowed; nothing here waits, logs or answers.
//!
//! The rules are nginx's with `merge_slashes`, except that a path nginx would pass on although two readers may
//! understand it differently is refused. The spelling of reserved characters is kept: `%3B` stays `%3B` and `;`
//! stays `;`, because an upstream may tell them apart.

use std::borrow::Cow;
use std::fmt::Write as _;

use thiserror::Error;

/// How the operator wants paths to be read: the switches of `apisix:` in config.yaml. All are off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `match_uri_encoded_slash`: an encoded slash stays `%2F` in what is matched and sent. It is decoded all
    /// the same when the path also has dot segments or double slashes, since the two together are how such a
    /// path is smuggled past a rule.
    pub keep_encoded_slash: bool,
    /// `normalize_uri_like_servlet`: `;name=value` behind a segment is not matched, but still sent. Sequences
    /// the Servlet specification calls suspicious are refused.
    pub servlet: bool,
    /// `delete_uri_tail_slash`: `/a/` is matched as `/a`; the upstream still receives `/a/`.
    pub delete_tail_slash: bool,
}

/// A path in normal form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normal<'a> {
    /// What is matched and what `$uri` says: percent-decoded, without dot segments and double slashes. It may
    /// hold any byte of 0x80 and above. With [`Options::keep_encoded_slash`], `%2F` means an encoded slash, and
    /// a percent sign before `2F`, `2f` or `25` is written `%25`, so that two different paths never look alike.
    pub decoded: Cow<'a, [u8]>,
    /// What goes upstream: visible ASCII, no `#`, a valid path of `http::uri::PathAndQuery`. Normalizing it
    /// again with the same options gives the same pair.
    pub sent: Cow<'a, str>,
}

/// Why a path is refused. Each is a 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadPath {
    /// `*`, an authority, or nothing at all.
    #[error("path does not start with a slash")]
    NotAbsolute,
    /// `%` without two hexadecimal digits behind it; the offset in bytes is given.
    #[error("broken percent escape at byte {0} of the path")]
    Escape(usize),
    /// A byte below 0x20 or 0x7F, raw or encoded; the offset in bytes is given.
    #[error("control character at byte {0} of the path")]
    Control(usize),
    /// More `..` segments than there are segments before them.
    #[error("path climbs above its root")]
    AboveRoot,
    /// `/..;x` and `/.;x` (servlet only): some containers drop the parameter first, some last.
    #[error("dot segment with a parameter")]
    DotSegmentWithParameter,
    /// `/;x/` (servlet only).
    #[error("empty segment with a parameter")]
    EmptySegmentWithParameter,
}

impl BadPath {
    /// Short code for the access log and `Proxy-Status`.
    pub fn code(self) -> &'static str {
        match self {
            BadPath::NotAbsolute => "path_not_absolute",
            BadPath::Escape(_) => "path_bad_escape",
            BadPath::Control(_) => "path_control_byte",
            BadPath::AboveRoot => "path_above_root",
            BadPath::DotSegmentWithParameter | BadPath::EmptySegmentWithParameter => {
                "path_ambiguous_parameter"
            }
        }
    }
}

/// Brings `raw`, the path part of a request target without its query, into normal form.
///
/// # Errors
/// [`BadPath`] when the path has no safe reading.
pub fn normalize(raw: &[u8], options: Options) -> Result<Normal<'_>, BadPath> {
    if raw.first() != Some(&b'/') {
        return Err(BadPath::NotAbsolute);
    }
    if let Some(path) = already_normal(raw, options.servlet) {
        let decoded = match raw {
            [head @ .., b'/'] if options.delete_tail_slash && !head.is_empty() => head,
            all => all,
        };
        return Ok(Normal { decoded: Cow::Borrowed(decoded), sent: Cow::Borrowed(path) });
    }

    if options.keep_encoded_slash
        && let Some(normal) = Rewrite::new(raw, options, true).run()?
    {
        return Ok(normal);
    }
    match Rewrite::new(raw, options, false).run()? {
        Some(normal) => Ok(normal),
        // Only a rewrite that keeps slashes gives up.
        None => Err(BadPath::AboveRoot),
    }
}

/// Percent-encodes what may not stand in a query (control bytes, space, `#`, `<`, `>`, 0x7F and above) and
/// leaves every other byte as the client sent it, broken escapes included: a query has no agreed form.
pub fn normalize_query(raw: &[u8]) -> Cow<'_, str> {
    let fits = |byte: u8| matches!(byte, 0x21..=0x7E) && !matches!(byte, b'#' | b'<' | b'>');
    if raw.iter().all(|&byte| fits(byte))
        && let Ok(query) = std::str::from_utf8(raw)
    {
        return Cow::Borrowed(query);
    }
    let mut sent = String::with_capacity(raw.len() + 16);
    for &byte in raw {
        if fits(byte) { sent.push(char::from(byte)) } else { push_escape(&mut sent, byte) }
    }
    Cow::Owned(sent)
}

/// The path as text if it is its own normal form, found by one look at each byte.
fn already_normal(raw: &[u8], servlet: bool) -> Option<&str> {
    let mut bytes = raw.iter();
    while let Some(&byte) = bytes.next() {
        match CLASS.get(usize::from(byte)) {
            Some(Class::Plain) => {}
            Some(Class::Semicolon) if !servlet => {}
            Some(Class::Slash) => match bytes.as_slice() {
                [b'/', ..] | [b'.'] | [b'.', b'/', ..] | [b'.', b'.'] | [b'.', b'.', b'/', ..] => {
                    return None;
                }
                _ => {}
            },
            _ => return None,
        }
    }
    // All bytes are ASCII here; the check costs less than a table that proves it.
    std::str::from_utf8(raw).ok()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Stands for itself, decoded and sent.
    Plain,
    Slash,
    Semicolon,
    /// `%`, and what is sent encoded or refused.
    Special,
}

/// What a raw byte of a path means. `\` is sent encoded because URL parsers of browsers and Node.js read a raw
/// one as a slash.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, and the index is below the length")]
const CLASS: [Class; 256] = {
    let mut table = [Class::Special; 256];
    let mut byte = 0x21;
    while byte < 0x7F {
        table[byte] = match byte as u8 {
            b'/' => Class::Slash,
            b';' => Class::Semicolon,
            b'%' | b'#' | b'?' | b'<' | b'>' | b'`' | b'\\' => Class::Special,
            _ => Class::Plain,
        };
        byte += 1;
    }
    table
};

/// One run over a path that is not in normal form.
struct Rewrite<'a> {
    raw: &'a [u8],
    options: Options,
    /// Encoded slashes stay; the run gives up when that would not be safe.
    keep_slashes: bool,
    /// Both always end with the slash that opens the current segment when a segment begins.
    decoded: Vec<u8>,
    sent: String,
    /// Where the last decoded percent sign stands, if `2F` or `25` behind it would have to be told apart.
    percent: Option<usize>,
}

/// What ended a segment.
enum End {
    Slash,
    Path,
}

impl<'a> Rewrite<'a> {
    fn new(raw: &'a [u8], options: Options, keep_slashes: bool) -> Self {
        Rewrite {
            raw,
            options,
            keep_slashes,
            decoded: Vec::with_capacity(raw.len()),
            sent: String::with_capacity(raw.len() + 16),
            percent: None,
        }
    }

    /// `None`: encoded slashes cannot be kept in this path.
    fn run(mut self) -> Result<Option<Normal<'a>>, BadPath> {
        self.decoded.push(b'/');
        self.sent.push('/');
        let mut at = 1;
        loop {
            let (opened, opened_sent) = (self.decoded.len(), self.sent.len());
            let Some((next, end, has_parameter)) = self.segment(at)? else { return Ok(None) };
            at = next;
            let last = matches!(end, End::Path);
            let name = self.decoded.get(opened..).unwrap_or_default();

            if has_parameter {
                match name {
                    b"." | b".." => return Err(BadPath::DotSegmentWithParameter),
                    b"" if !last => return Err(BadPath::EmptySegmentWithParameter),
                    // Written `%252e;`: a second decoder would see a dot segment.
                    name if name.eq_ignore_ascii_case(b"%2e") || name.eq_ignore_ascii_case(b"%2e%2e") => {
                        return Err(BadPath::DotSegmentWithParameter);
                    }
                    _ => {}
                }
            }
            match name {
                b"" if self.keep_slashes && !last => return Ok(None),
                b"" => {}
                b"." => self.back_to(opened, opened_sent),
                b".." => {
                    let parent = parent_of(self.decoded.get(..opened).unwrap_or_default());
                    let parent_sent = parent_of(self.sent.as_bytes().get(..opened_sent).unwrap_or_default());
                    let (Some(parent), Some(parent_sent)) = (parent, parent_sent) else {
                        return Err(BadPath::AboveRoot);
                    };
                    self.back_to(parent, parent_sent);
                }
                _ if !last => {
                    self.decoded.push(b'/');
                    self.sent.push('/');
                }
                _ => {}
            }
            if last {
                break;
            }
        }

        if self.options.delete_tail_slash && self.decoded.len() > 1 && self.decoded.last() == Some(&b'/') {
            self.decoded.pop();
        }
        Ok(Some(Normal { decoded: Cow::Owned(self.decoded), sent: Cow::Owned(self.sent) }))
    }

    fn back_to(&mut self, decoded: usize, sent: usize) {
        self.decoded.truncate(decoded);
        self.sent.truncate(sent);
    }

    /// Reads one segment from `at`; gives where the next begins, what ended this one, and whether it had a
    /// servlet parameter. `None` as in [`Rewrite::run`].
    fn segment(&mut self, mut at: usize) -> Result<Option<(usize, End, bool)>, BadPath> {
        let mut has_parameter = false;
        let opened = self.decoded.len();
        // Where the part behind the last slash begins, kept encoded slashes counted.
        let mut part = opened;
        self.percent = None;
        while let Some(&byte) = self.raw.get(at) {
            match CLASS.get(usize::from(byte)) {
                Some(Class::Slash) => {
                    let doubled = part > opened && part == self.decoded.len();
                    let fits = self.kept_part_is_plain(part) && !doubled;
                    return Ok(fits.then_some((at + 1, End::Slash, has_parameter)));
                }
                Some(Class::Semicolon) if self.options.servlet => {
                    has_parameter = true;
                    self.sent.push(';');
                    at += 1;
                }
                Some(Class::Plain | Class::Semicolon) => {
                    if !has_parameter {
                        self.push_decoded(byte);
                    }
                    self.sent.push(char::from(byte));
                    at += 1;
                }
                _ if byte == b'%' => {
                    let value = escape_at(self.raw, at).ok_or(BadPath::Escape(at))?;
                    if value < 0x20 || value == 0x7F {
                        return Err(BadPath::Control(at));
                    }
                    if value == b'/' && !self.keep_slashes {
                        return Ok(Some((at + 3, End::Slash, has_parameter)));
                    }
                    if value == b'/' && !has_parameter {
                        if !self.kept_part_is_plain(part) || part == self.decoded.len() {
                            return Ok(None);
                        }
                        self.decoded.extend_from_slice(b"%2F");
                        part = self.decoded.len();
                    } else if !has_parameter {
                        self.push_decoded(value);
                    }
                    if value.is_ascii_alphanumeric() || matches!(value, b'-' | b'.' | b'_' | b'~') {
                        self.sent.push(char::from(value));
                    } else {
                        push_escape(&mut self.sent, value);
                    }
                    at += 3;
                }
                _ if byte < 0x20 || byte == 0x7F => return Err(BadPath::Control(at)),
                _ => {
                    if !has_parameter {
                        self.push_decoded(byte);
                    }
                    push_escape(&mut self.sent, byte);
                    at += 1;
                }
            }
        }
        Ok(self.kept_part_is_plain(part).then_some((at, End::Path, has_parameter)))
    }

    /// False where a kept encoded slash stands next to `.` or `..`: an upstream that decodes it later would
    /// climb.
    fn kept_part_is_plain(&self, part: usize) -> bool {
        !(self.keep_slashes && matches!(self.decoded.get(part..), Some(b"." | b"..")))
    }

    fn push_decoded(&mut self, byte: u8) {
        self.decoded.push(byte);
        if !self.options.keep_encoded_slash {
            return;
        }
        if byte == b'%' {
            self.percent = Some(self.decoded.len() - 1);
        } else if let Some(percent) = self.percent
            && let Some([b'%', b'2', b'F' | b'f' | b'5']) = self.decoded.get(percent..)
        {
            self.decoded.splice(percent + 1..percent + 1, *b"25");
            self.percent = None;
        }
    }
}

/// The length of `path`, which ends with a slash, without its last segment.
fn parent_of(path: &[u8]) -> Option<usize> {
    let (_, head) = path.split_last()?;
    memchr::memrchr(b'/', head).map(|slash| slash + 1)
}

fn escape_at(raw: &[u8], at: usize) -> Option<u8> {
    let digit = |offset: usize| char::from(*raw.get(at + offset)?).to_digit(16);
    u8::try_from(digit(1)? * 16 + digit(2)?).ok()
}

fn push_escape(to: &mut String, byte: u8) {
    // Writing to a String cannot fail.
    let _ = write!(to, "%{byte:02X}");
}
