//! URI patterns of routes, read once, and the parameters they capture.
//!
//! A pattern has a static front, which is its place in the tree, and perhaps segments that capture. As in APISIX
//! - without a star (and, in [`Mode::UriWithParameter`], without a `:name` segment) it matches exactly;
//! - a star that does not begin a segment ends the pattern: `/a*` and `/a*b` match all that begins with `/a`;
//! - `*name` matches any number of bytes, slashes and none included, and captures them; `*` alone is `*:ext`;
//! - `:name` matches one segment that is not empty. Before the first star it is a parameter only in
//!   [`Mode::UriWithParameter`], elsewhere plain text;
//! - `/?` at the end of a pattern with parameters makes the last slash optional.
//!
//! Unlike APISIX, text around parameters is compared as text (there it is part of a regular expression), and a
//! colon inside a segment is a colon.

use std::sync::Arc;

use smallvec::SmallVec;

use super::Mode;

/// What a `*` without a name captures.
const REST: &str = ":ext";

/// One pattern of a route.
#[derive(Debug)]
pub(super) struct Uri {
    text: Arc<str>,
    shape: Shape,
}

#[derive(Debug)]
enum Shape {
    Exact,
    /// Everything that begins with this many bytes of the text.
    Prefix(u32),
    /// The same, and what follows is captured as [`REST`].
    Rest(u32),
    Segments(Arc<Segments>),
}

#[derive(Debug)]
struct Segments {
    /// Length of the static front, its last slash included.
    front: u32,
    /// What the segments behind the front must be. Not empty.
    tokens: Box<[Token]>,
    names: Names,
    optional_slash: bool,
}

#[derive(Debug, PartialEq)]
enum Token {
    Text(Box<[u8]>),
    /// One segment, not empty.
    Parameter,
    /// One segment or more; an empty one counts.
    Rest,
    /// A segment that begins so.
    Begins(Box<[u8]>),
    /// Any segments or none, which are not captured. Only at the end.
    Any,
}

type Names = Arc<[Box<str>]>;
/// Start and end of a part of the path, in bytes.
type Span = (u32, u32);

/// The parameters a route's URI captured: names, and where in the path the values are.
///
/// Holds positions rather than text, so that a match copies nothing. Every method takes the path that was
/// matched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params {
    names: Captured,
    spans: SmallVec<[Span; 4]>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Captured {
    #[default]
    Nothing,
    Rest,
    Named(Names),
}

impl Params {
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The value of `uri_param_NAME`. If a pattern uses a name twice, the last one counts.
    pub fn value<'p>(&self, name: &str, path: &'p [u8]) -> Option<&'p [u8]> {
        let position = match &self.names {
            Captured::Nothing => return None,
            Captured::Rest => (name == REST).then_some(0)?,
            Captured::Named(names) => names.iter().rposition(|known| **known == *name)?,
        };
        self.at(position, path)
    }

    /// Names and values in the order of the pattern.
    pub fn iter<'p>(&'p self, path: &'p [u8]) -> impl Iterator<Item = (&'p str, &'p [u8])> {
        let name = |position: usize| match &self.names {
            Captured::Nothing => None,
            Captured::Rest => Some(REST),
            Captured::Named(names) => names.get(position).map(|name| &**name),
        };
        (0..self.spans.len()).filter_map(move |at| Some((name(at)?, self.at(at, path)?)))
    }

    fn at<'p>(&self, position: usize, path: &'p [u8]) -> Option<&'p [u8]> {
        let &(start, end) = self.spans.get(position)?;
        path.get(start as usize..end as usize)
    }
}

impl Uri {
    pub(super) fn new(text: &str, mode: Mode) -> Self {
        Uri { text: Arc::from(text), shape: Shape::of(text, mode) }
    }

    pub(super) fn text(&self) -> &Arc<str> {
        &self.text
    }

    pub(super) fn is_exact(&self) -> bool {
        matches!(self.shape, Shape::Exact)
    }

    /// Where the pattern stands in the tree: the whole path, or what every matching path begins with.
    pub(super) fn key(&self) -> &[u8] {
        let text = self.text.as_bytes();
        let length = match &self.shape {
            Shape::Exact => text.len(),
            Shape::Prefix(length) | Shape::Rest(length) => *length as usize,
            Shape::Segments(segments) => segments.front as usize,
        };
        text.get(..length).unwrap_or(text)
    }

    /// Whether `path`, which is or begins with [`Uri::key`], matches the whole pattern.
    pub(super) fn fits(&self, path: &[u8]) -> bool {
        match &self.shape {
            Shape::Exact | Shape::Prefix(_) | Shape::Rest(_) => true,
            Shape::Segments(segments) => segments.spans(path).is_some(),
        }
    }

    /// What the pattern captures of `path`, which is or begins with its [`Uri::key`]; `None` if it does not
    /// match.
    pub(super) fn capture(&self, path: &[u8]) -> Option<Params> {
        match &self.shape {
            Shape::Exact | Shape::Prefix(_) => Some(Params::default()),
            Shape::Rest(front) => {
                let spans = SmallVec::from_slice(&[(*front, u32::try_from(path.len()).ok()?)]);
                Some(Params { names: Captured::Rest, spans })
            }
            Shape::Segments(segments) => segments.capture(path),
        }
    }
}

impl Shape {
    fn of(text: &str, mode: Mode) -> Shape {
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let first_star = text.find('*');
        // A colon counts before the first star only in the mode that says so.
        let first_colon = match mode {
            Mode::UriWithParameter => text.find("/:").map(|slash| slash + 1),
            Mode::Uri | Mode::HostUri => None,
        };
        let front = match (first_star, first_colon) {
            (None, None) => return Shape::Exact,
            (Some(star), None) => star,
            (None, Some(colon)) => colon,
            (Some(star), Some(colon)) => star.min(colon),
        };
        let (head, tail) = text.split_at_checked(front).unwrap_or((text, ""));
        if !head.ends_with('/') {
            return Shape::Prefix(length(front));
        }
        if tail == "*" {
            return Shape::Rest(length(front));
        }
        Shape::Segments(Arc::new(Segments::new(length(front), tail)))
    }
}

impl Segments {
    fn new(front: u32, tail: &str) -> Self {
        let (tail, optional_slash) = match tail.strip_suffix("/?") {
            Some(tail) => (tail, true),
            None => (tail, false),
        };
        let mut names = Vec::new();
        let mut tokens = Vec::new();
        for segment in tail.split('/') {
            if let Some(name) = segment.strip_prefix(':') {
                names.push(name.into());
                tokens.push(Token::Parameter);
            } else if let Some(name) = segment.strip_prefix('*') {
                names.push(if name.is_empty() { REST } else { name }.into());
                tokens.push(Token::Rest);
            } else if let Some((text, _)) = segment.split_once('*') {
                tokens.extend([Token::Begins(text.as_bytes().into()), Token::Any]);
                break;
            } else {
                tokens.push(Token::Text(segment.as_bytes().into()));
            }
        }
        Segments { front, tokens: tokens.into(), names: names.into(), optional_slash }
    }

    fn capture(&self, path: &[u8]) -> Option<Params> {
        Some(Params { spans: self.spans(path)?, names: Captured::Named(Arc::clone(&self.names)) })
    }

    /// Where the parameters are in `path`; `None` if it does not match.
    fn spans(&self, path: &[u8]) -> Option<SmallVec<[Span; 4]>> {
        // The common `/static/*path` needs no look at the path.
        if let [Token::Rest] = &*self.tokens {
            return Some(SmallVec::from_slice(&[(self.front, u32::try_from(path.len()).ok()?)]));
        }
        let mut segments = segments(path, self.front)?;
        if let Some(spans) = fit(&self.tokens, &segments, path) {
            return Some(spans);
        }
        let last = segments.pop()?;
        if self.optional_slash && last.0 == last.1 { fit(&self.tokens, &segments, path) } else { None }
    }
}

/// The segments of `path` behind its first `front` bytes.
fn segments(path: &[u8], front: u32) -> Option<SmallVec<[Span; 16]>> {
    let mut spans = SmallVec::new();
    let end = u32::try_from(path.len()).ok()?;
    let mut start = front;
    for slash in memchr::memchr_iter(b'/', path.get(front as usize..)?) {
        let slash = front + u32::try_from(slash).ok()?;
        spans.push((start, slash));
        start = slash + 1;
    }
    spans.push((start, end));
    Some(spans)
}

fn slice(path: &[u8], (start, end): Span) -> Option<&[u8]> {
    path.get(start as usize..end as usize)
}

/// Lays `tokens` over `segments`; gives what they capture, in their order.
///
/// From the right, each star taking as little as it can, which leaves the first star as much as it can have:
/// what a greedy expression finds. Only the star met last can need more, so the work is at most tokens times
/// segments.
fn fit(tokens: &[Token], segments: &[Span], path: &[u8]) -> Option<SmallVec<[Span; 4]>> {
    let mut found: SmallVec<[Option<Span>; 8]> = SmallVec::from_elem(None, tokens.len());
    let (mut token, mut segment) = (tokens.len(), segments.len());
    // The star met last, and the first segment it takes.
    let mut star: Option<(usize, usize)> = None;
    loop {
        let next = token.checked_sub(1).and_then(|at| tokens.get(at));
        let candidate = segment.checked_sub(1).and_then(|at| segments.get(at)).copied();
        let taken = match (next, candidate) {
            (None, None) => break,
            (Some(Token::Any), _) => {
                star = Some((token - 1, segment));
                token -= 1;
                continue;
            }
            (Some(Token::Rest), Some(_)) => {
                star = Some((token - 1, segment - 1));
                true
            }
            (Some(Token::Parameter), Some((start, end))) => start < end,
            (Some(Token::Text(text)), Some(span)) => slice(path, span)? == &**text,
            (Some(Token::Begins(text)), Some(span)) => slice(path, span)?.starts_with(text),
            _ => false,
        };
        if taken {
            token -= 1;
            segment -= 1;
            *found.get_mut(token)? = candidate;
            continue;
        }
        let (at, first) = star?;
        let wider = first.checked_sub(1)?;
        let (start, _) = *segments.get(wider)?;
        star = Some((at, wider));
        let place = found.get_mut(at)?;
        *place = place.map(|(_, end)| (start, end));
        token = at;
        segment = wider;
    }
    let captures = |(token, span): (&Token, &Option<Span>)| match token {
        Token::Parameter | Token::Rest => *span,
        Token::Text(_) | Token::Begins(_) | Token::Any => None,
    };
    Some(tokens.iter().zip(&found).filter_map(captures).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn captured(pattern: &str, mode: Mode, path: &str) -> Option<Vec<(String, String)>> {
        let uri = Uri::new(pattern, mode);
        let path = path.as_bytes();
        let fits = if uri.is_exact() { path == uri.key() } else { path.starts_with(uri.key()) };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let params = fits.then(|| uri.capture(path)).flatten()?;
        Some(params.iter(path).map(|(name, value)| (name.to_owned(), text(value))).collect())
    }

    #[test]
    fn patterns_match_and_capture() {
        type Captures = Option<&'static [(&'static str, &'static str)]>;
        let with_parameter: &[(&str, &str, Captures)] = &[
            ("/a", "/a", Some(&[])),
            ("/a", "/a/", None),
            ("/a*", "/a", Some(&[])),
            ("/a*", "/abc/d", Some(&[])),
            ("/a*b", "/ac", Some(&[])),
            ("/name/*name", "/name/json", Some(&[("name", "json")])),
            ("/name/*name", "/name/", Some(&[("name", "")])),
            ("/name/*name", "/name", None),
            ("/name/*", "/name/json/foo/bar", Some(&[(":ext", "json/foo/bar")])),
            ("/name/*", "/name/", Some(&[(":ext", "")])),
            ("/name/:name/id/:id", "/name/json/id/1", Some(&[("name", "json"), ("id", "1")])),
            ("/name/:name/id/:id", "/name/json/id/", None),
            ("/name/:name/id/:id", "/name/json", None),
            (
                "/name/:name/id/:id/*other",
                "/name/json/id/1/foo/bar/gloo",
                Some(&[("name", "json"), ("id", "1"), ("other", "foo/bar/gloo")]),
            ),
            ("/name/:name/foo", "/name/json/foo", Some(&[("name", "json")])),
            ("/:name/foo", "/json/", None),
            ("/:name/foo", "/json/bar", None),
            ("/:name/foo", "/json/foo/bar", None),
            ("/:name/foo", "/json/foo", Some(&[("name", "json")])),
            ("/file/:filename", "/file/123&45@dd:d=test;", Some(&[("filename", "123&45@dd:d=test;")])),
            ("/file/:filename", "/file/a b\u{4e2d}", Some(&[("filename", "a b\u{4e2d}")])),
            ("/name/:name/", "/name/json/", Some(&[("name", "json")])),
            ("/name/:name/", "/name/json", None),
            ("/nodes/:id/?", "/nodes/1", Some(&[("id", "1")])),
            ("/nodes/:id/?", "/nodes/1/", Some(&[("id", "1")])),
            ("/nodes/:id/?", "/nodes/1/2", None),
            // Stars in the middle: the first takes as much as it can.
            ("/a/*/b", "/a/x/y/b", Some(&[(":ext", "x/y")])),
            ("/a/*/b", "/a//b", Some(&[(":ext", "")])),
            ("/a/*/b", "/a/b", None),
            ("/a/*x/b/*y", "/a/1/b/2/b/3", Some(&[("x", "1/b/2"), ("y", "3")])),
            ("/a/*x/:y/b/*z", "/a/1/2/b/3/b/4", Some(&[("x", "1/2/b"), ("y", "3"), ("z", "4")])),
            ("/*x/a/*y/b", "/1/a/2/b", Some(&[("x", "1"), ("y", "2")])),
            ("/*x/a/*y/b", "/1/a/b", None),
            // A star inside a segment behind a parameter ends the pattern too.
            ("/u/:id/file*", "/u/1/files/2", Some(&[("id", "1")])),
            ("/u/:id/file*", "/u/1/file", Some(&[("id", "1")])),
            ("/u/:id/file*", "/u/1/fil", None),
            ("/u/*x/file*", "/u/1/files/files/2", Some(&[("x", "1/files")])),
            // What is special to a regular expression is plain text.
            ("/v1.0/:id/a+b", "/v1.0/1/a+b", Some(&[("id", "1")])),
            ("/v1.0/:id/a.b", "/v1.0/1/acb", None),
            ("/v1/users:batch", "/v1/users:batch", Some(&[])),
            ("/v1/users:batch", "/v1/users", None),
            ("/v1/:id:batch", "/v1/7", Some(&[("id:batch", "7")])),
            ("*", "/anything", Some(&[])),
        ];
        let without_parameter: &[(&str, &str, Captures)] = &[
            ("/name/:name", "/name/:name", Some(&[])),
            ("/name/:name", "/name/json", None),
            ("/name/:name/*", "/name/:name/x", Some(&[(":ext", "x")])),
            ("/name/:name/*", "/name/json/x", None),
            ("/name/*/:id", "/name/a/b/7", Some(&[(":ext", "a/b"), ("id", "7")])),
        ];
        let modes = [(Mode::UriWithParameter, with_parameter), (Mode::HostUri, without_parameter)];
        for (mode, cases) in modes {
            for &(pattern, path, expected) in cases {
                let captured = captured(pattern, mode, path);
                let expected: Option<Vec<_>> =
                    expected.map(|pairs| pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect());
                assert_eq!(captured, expected, "{pattern} on {path}");
            }
        }
    }

    #[test]
    fn a_name_used_twice_gives_the_last_value() {
        let uri = Uri::new("/:id/x/:id", Mode::UriWithParameter);
        let params = uri.capture(b"/1/x/2").unwrap();
        assert_eq!(params.value("id", b"/1/x/2"), Some(&b"2"[..]));
        assert_eq!(params.value("other", b"/1/x/2"), None);
    }
}
