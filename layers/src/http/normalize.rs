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

/// Percent-encodes what may not stand in a query (control bytes, space, `"`, `#`, `<`, `>`, 0x7F and above) and
/// leaves every other byte as the client sent it, broken escapes included: a query has no agreed form.
pub fn normalize_query(raw: &[u8]) -> Cow<'_, str> {
    let fits = |byte: u8| matches!(byte, 0x21..=0x7E) && !matches!(byte, b'"' | b'#' | b'<' | b'>');
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use http::uri::PathAndQuery;
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Options = Options { keep_encoded_slash: false, servlet: false, delete_tail_slash: false };
    const KEEP: Options = Options { keep_encoded_slash: true, ..PLAIN };
    const SERVLET: Options = Options { servlet: true, ..PLAIN };
    const TAIL: Options = Options { delete_tail_slash: true, ..PLAIN };

    #[test]
    fn paths_have_one_normal_form() {
        type Expected = Result<(&'static [u8], &'static str), BadPath>;
        fn is(decoded: &'static str, sent: &'static str) -> Expected {
            Ok((decoded.as_bytes(), sent))
        }
        let cases: &[(Options, &str, Expected)] = &[
            (PLAIN, "/", is("/", "/")),
            (PLAIN, "/a/b.c", is("/a/b.c", "/a/b.c")),
            (PLAIN, "/.well-known/..x/.../y.", is("/.well-known/..x/.../y.", "/.well-known/..x/.../y.")),
            (PLAIN, "/a;b=c,d@e:f!$&'()*+=~", is("/a;b=c,d@e:f!$&'()*+=~", "/a;b=c,d@e:f!$&'()*+=~")),
            (PLAIN, "/a[1]{2}|^\"", is("/a[1]{2}|^\"", "/a[1]{2}|^\"")),
            // Unreserved characters are decoded both ways, reserved ones keep their spelling.
            (PLAIN, "/%41%2d%7e", is("/A-~", "/A-~")),
            (PLAIN, "/a%3bb%2cc%20d", is("/a;b,c d", "/a%3Bb%2Cc%20d")),
            (PLAIN, "/a%3Fb%23c%25d", is("/a?b#c%d", "/a%3Fb%23c%25d")),
            (PLAIN, "/a%2525", is("/a%25", "/a%2525")),
            // What may not be sent as it came is encoded.
            (PLAIN, "/\u{4e2d}", is("/\u{4e2d}", "/%E4%B8%AD")),
            (PLAIN, "/%e4%b8%ad", is("/\u{4e2d}", "/%E4%B8%AD")),
            (PLAIN, "/%ff", Ok((b"/\xFF", "/%FF"))),
            (PLAIN, "/a#b", is("/a#b", "/a%23b")),
            (PLAIN, "/a\\..\\b", is("/a\\..\\b", "/a%5C..%5Cb")),
            (PLAIN, "/a b<c>`", is("/a b<c>`", "/a%20b%3Cc%3E%60")),
            (PLAIN, "/a?b", is("/a?b", "/a%3Fb")),
            // Slashes and dot segments, encoded or not.
            (PLAIN, "//a///b//", is("/a/b/", "/a/b/")),
            (PLAIN, "/a/./b/.", is("/a/b/", "/a/b/")),
            (PLAIN, "/a/b/../c", is("/a/c", "/a/c")),
            (PLAIN, "/a/b/..", is("/a/", "/a/")),
            (PLAIN, "/a/..", is("/", "/")),
            (PLAIN, "/a//../b", is("/b", "/b")),
            (PLAIN, "/a/%2e%2E/b", is("/b", "/b")),
            (PLAIN, "/a/.%2e/%2e/b", is("/b", "/b")),
            (PLAIN, "/a%2fb", is("/a/b", "/a/b")),
            (PLAIN, "/a%2F..%2fb", is("/b", "/b")),
            (PLAIN, "/a%2F%2f/b", is("/a/b", "/a/b")),
            (PLAIN, "/%252e%252e/b", is("/%2e%2e/b", "/%252e%252e/b")),
            (PLAIN, "/..", Err(BadPath::AboveRoot)),
            (PLAIN, "/a/../..", Err(BadPath::AboveRoot)),
            (PLAIN, "/%2e%2e%2fb", Err(BadPath::AboveRoot)),
            (PLAIN, "", Err(BadPath::NotAbsolute)),
            (PLAIN, "*", Err(BadPath::NotAbsolute)),
            (PLAIN, "a/b", Err(BadPath::NotAbsolute)),
            (PLAIN, "/%", Err(BadPath::Escape(1))),
            (PLAIN, "/a%2", Err(BadPath::Escape(2))),
            (PLAIN, "/a%2g", Err(BadPath::Escape(2))),
            (PLAIN, "/a%+1", Err(BadPath::Escape(2))),
            (PLAIN, "/a%00", Err(BadPath::Control(2))),
            (PLAIN, "/a%0d%0a", Err(BadPath::Control(2))),
            (PLAIN, "/a\tb", Err(BadPath::Control(2))),
            (PLAIN, "/a%7F", Err(BadPath::Control(2))),
            // Encoded slashes kept, where nothing else had to be brought in order.
            (KEEP, "/v1/te%2fst/x", is("/v1/te%2Fst/x", "/v1/te%2Fst/x")),
            (KEEP, "/v1/2024%2F01%2F01/", is("/v1/2024%2F01%2F01/", "/v1/2024%2F01%2F01/")),
            (KEEP, "/te%41%2fst", is("/teA%2Fst", "/teA%2Fst")),
            (KEEP, "/a%2F", is("/a%2F", "/a%2F")),
            (KEEP, "/x%2Fy/../z", is("/x/z", "/x/z")),
            (KEEP, "/x%2Fy/../..", is("/", "/")),
            (KEEP, "/a%2F..%2Fb", is("/b", "/b")),
            (KEEP, "/a%2F%2e%2e", is("/", "/")),
            (KEEP, "/..%2Fa", Err(BadPath::AboveRoot)),
            (KEEP, "/a%2F/b", is("/a/b", "/a/b")),
            (KEEP, "/a%2F%2Fb", is("/a/b", "/a/b")),
            (KEEP, "/%2Fa", is("/a", "/a")),
            (KEEP, "//a%2Fb", is("/a/b", "/a/b")),
            // A percent sign never looks like an encoded slash.
            (KEEP, "/a%252Fb", is("/a%252Fb", "/a%252Fb")),
            (KEEP, "/a%25%32%66b", is("/a%252fb", "/a%252fb")),
            (KEEP, "/a%25252Fb", is("/a%25252Fb", "/a%25252Fb")),
            (KEEP, "/100%25/a%2Fb", is("/100%/a%2Fb", "/100%25/a%2Fb")),
            (KEEP, "/x/../a%252Fb", is("/a%252Fb", "/a%252Fb")),
            // Servlet parameters are sent, but not matched.
            (SERVLET, "/a;jsessionid=x/b;y", is("/a/b", "/a;jsessionid=x/b;y")),
            (SERVLET, "/a/;jsessionid=x", is("/a/", "/a/;jsessionid=x")),
            (SERVLET, "/a%3Fb;j=%78", is("/a?b", "/a%3Fb;j=x")),
            (SERVLET, "/a%3Bb", is("/a;b", "/a%3Bb")),
            (SERVLET, "/a;x/../b", is("/b", "/b")),
            (SERVLET, "/a/..;/b", Err(BadPath::DotSegmentWithParameter)),
            (SERVLET, "/a/.;x", Err(BadPath::DotSegmentWithParameter)),
            (SERVLET, "/a/%2e%2E;/b", Err(BadPath::DotSegmentWithParameter)),
            (SERVLET, "/a/%252e;/b", Err(BadPath::DotSegmentWithParameter)),
            (SERVLET, "/;x/b", Err(BadPath::EmptySegmentWithParameter)),
            (SERVLET, "/a;x=%00", Err(BadPath::Control(5))),
            // The last slash is sent, but not matched.
            (TAIL, "/a/", is("/a", "/a/")),
            (TAIL, "/a", is("/a", "/a")),
            (TAIL, "/", is("/", "/")),
            (TAIL, "/a/b/..", is("/a", "/a/")),
            (TAIL, "//", is("/", "/")),
        ];
        for (options, raw, expected) in cases {
            let normal = normalize(raw.as_bytes(), *options);
            let pair =
                normal.as_ref().map(|normal| (&*normal.decoded, &*normal.sent)).map_err(|error| *error);
            assert_eq!(pair, *expected, "{raw:?} with {options:?}");
        }
    }

    #[test]
    fn a_normal_path_is_borrowed() {
        for (options, raw) in [(PLAIN, "/.a/b..c;d/"), (KEEP, "/a/b"), (TAIL, "/a/"), (SERVLET, "/a.b/")] {
            let normal = normalize(raw.as_bytes(), options).unwrap();
            assert!(matches!((normal.decoded, normal.sent), (Cow::Borrowed(_), Cow::Borrowed(_))), "{raw}");
        }
    }

    #[test]
    fn queries_keep_all_that_may_stand_in_one() {
        let cases = [
            ("", ""),
            ("a=1&b=%2&c=%zz+d", "a=1&b=%2&c=%zz+d"),
            ("a={'b':[`|^\\]}/?", "a={'b':[`|^\\]}/?"),
            ("q=\u{4e2d} \u{7f}\"#<>\r\n\0", "q=%E4%B8%AD%20%7F%22%23%3C%3E%0D%0A%00"),
        ];
        for (raw, expected) in cases {
            assert_eq!(normalize_query(raw.as_bytes()), expected);
        }
        assert!(matches!(normalize_query(b"a=1"), Cow::Borrowed(_)));
    }

    fn options() -> impl Strategy<Value = Options> {
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(keep_encoded_slash, servlet, delete_tail_slash)| Options {
                keep_encoded_slash,
                servlet,
                delete_tail_slash,
            },
        )
    }

    /// Paths made of what matters here, and of anything.
    fn raw() -> impl Strategy<Value = Vec<u8>> {
        let words: Vec<&[u8]> = vec![
            b"/",
            b"/",
            b".",
            b"..",
            b"a",
            b"%2F",
            b"%2f",
            b"%2e",
            b"%25",
            b"2F",
            b"25",
            b"%32",
            b"%46",
            b";",
            b"\\",
            b"%3B",
            b"%5c",
            b"\xC3\xA9",
            b"%FF",
            b"#",
            b"?",
            b" ",
            b"%7E",
            b"%",
            b"%00",
        ];
        let word = prop_oneof![
            30 => proptest::sample::select(words).prop_map(<[u8]>::to_vec),
            1 => any::<u8>().prop_map(|byte| vec![byte]),
        ];
        proptest::collection::vec(word, 0..16).prop_map(|words| [b"/".to_vec(), words.concat()].concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn what_is_sent_is_what_was_matched(raw in raw(), options in options()) {
            if let Ok(normal) = normalize(&raw, options) {
                // Normalizing again changes nothing, so the next hop reads what was matched here.
                let again = normalize(normal.sent.as_bytes(), options).unwrap();
                prop_assert_eq!(&again, &normal);
                // Without options that take something away, plain decoding gives what was matched.
                if options == PLAIN {
                    let decoded: Vec<u8> = percent_encoding::percent_decode_str(&normal.sent).collect();
                    prop_assert_eq!(decoded, normal.decoded.to_vec());
                }
            }
        }

        #[test]
        fn nothing_dangerous_comes_out(raw in raw(), options in options()) {
            if let Ok(Normal { decoded, sent }) = normalize(&raw, options) {
                let text = String::from_utf8_lossy(&decoded).into_owned();
                prop_assert!(text.starts_with('/'));
                prop_assert!(!text.contains("//"), "{}", text);
                prop_assert!(text.split('/').all(|segment| segment != "." && segment != ".."), "{}", text);
                prop_assert!(!text.bytes().any(|byte| byte < 0x20 || byte == 0x7F));
                prop_assert!(sent.bytes().all(|byte| matches!(byte, 0x21..=0x7E)), "{}", sent);
                prop_assert!(!sent.contains(['#', '?', '\\']), "{}", sent);
                prop_assert!(sent.parse::<PathAndQuery>().is_ok(), "{}", sent);
                if options.keep_encoded_slash {
                    // An upstream that decodes kept slashes meets no dot segment either.
                    let later = text.replace("%2F", "/");
                    prop_assert!(later.split('/').all(|segment| segment != "." && segment != ".."), "{}", text);
                }
            }
        }

        #[test]
        fn a_query_is_fit_to_be_sent(raw in proptest::collection::vec(any::<u8>(), 0..40)) {
            let sent = normalize_query(&raw);
            prop_assert_eq!(&normalize_query(sent.as_bytes()), &sent);
            let target = format!("/?{sent}");
            prop_assert!(target.parse::<PathAndQuery>().is_ok());
            prop_assert_eq!(
                percent_encoding::percent_decode_str(&sent).collect::<Vec<_>>(),
                percent_encoding::percent_decode(&raw).collect::<Vec<_>>()
            );
        }
    }
}
