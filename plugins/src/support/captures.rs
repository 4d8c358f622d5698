//! Texts that take parts of a match, `/$1-$host`, and the replacement of what a pattern matches.
//!
//! Bytes, not text: patterns match single bytes, so a capture may end inside a character.

use config::error::ConfigError;
use config::pattern;
use config::template::{Piece, Template};
use config::var::{Var, Vars};
use regex::bytes::{Captures, Regex};
use smallvec::SmallVec;

/// A text that is put together for one request. Short ones, which is most, stay on the stack.
pub type Text = SmallVec<[u8; 128]>;

/// A text that takes captures and, if it was read so, variables.
#[derive(Clone, Debug, Default)]
pub struct Replacement {
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Literal(Box<str>),
    Capture(usize),
    /// A variable, and what stands for it when it has no value.
    Variable(Var, Option<Box<str>>),
}

impl Replacement {
    /// Reads captures (`$0`, `$1`, `${1}`; `$$` is a dollar sign) and takes everything else as it is.
    pub fn captures(source: &str) -> Self {
        Self::read(source, |text, parts| {
            if !text.is_empty() {
                parts.push(Part::Literal(text.replace("$$", "$").into()));
            }
        })
    }

    /// Reads captures and variables (`$host`, `${arg_name}`).
    pub fn with_variables(source: &str) -> Self {
        Self::read(source, |text, parts| {
            parts.extend(Template::parse(text).pieces().iter().map(|piece| match piece {
                Piece::Text(text) => Part::Literal(text.clone()),
                Piece::Var(var, default) => Part::Variable(var.clone(), default.clone()),
            }));
        })
    }

    /// Cuts `source` at its captures.
    fn read(source: &str, mut between: impl FnMut(&str, &mut Vec<Part>)) -> Self {
        let mut parts = Vec::new();
        let (mut start, mut at) = (0, 0);
        while let Some(dollar) = source.get(at..).and_then(|rest| rest.find('$')).map(|found| at + found) {
            let rest = source.get(dollar + 1..).unwrap_or_default();
            let escaped = source.get(..dollar).is_some_and(|before| before.ends_with('\\'));
            match number(rest).filter(|_| !escaped) {
                Some((capture, length)) => {
                    between(source.get(start..dollar).unwrap_or_default(), &mut parts);
                    parts.push(Part::Capture(capture));
                    start = dollar + 1 + length;
                    at = start;
                }
                // Both signs of `$$` are passed, so that `$$1` is `$1` and not a capture behind a sign.
                None => at = dollar + if rest.starts_with('$') { 2 } else { 1 },
            }
        }
        between(source.get(start..).unwrap_or_default(), &mut parts);
        Self { parts }
    }

    /// Cuts at the first question mark that was written, not one that a variable or capture brings.
    pub fn split_query(self) -> (Self, Option<Self>) {
        let mut path = Vec::new();
        let mut parts = self.parts.into_iter();
        while let Some(part) = parts.next() {
            let Part::Literal(text) = &part else {
                path.push(part);
                continue;
            };
            let Some((before, after)) = text.split_once('?') else {
                path.push(part);
                continue;
            };
            if !before.is_empty() {
                path.push(Part::Literal(before.into()));
            }
            let mut query = Vec::new();
            if !after.is_empty() {
                query.push(Part::Literal(after.into()));
            }
            query.extend(parts);
            return (Self { parts: path }, Some(Self { parts: query }));
        }
        (Self { parts: path }, None)
    }

    /// The text, if it takes nothing.
    pub fn as_literal(&self) -> Option<&str> {
        match &*self.parts {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Appends the text. A capture that does not exist adds nothing, nor does a variable without a value.
    pub fn render<V: Vars + ?Sized>(&self, vars: &V, captures: Option<&Captures<'_>>, out: &mut Text) {
        self.pieces(vars, captures, |piece| out.extend_from_slice(piece));
    }

    /// Gives the text piece by piece.
    pub fn pieces<V: Vars + ?Sized>(
        &self,
        vars: &V,
        captures: Option<&Captures<'_>>,
        mut write: impl FnMut(&[u8]),
    ) {
        for part in &self.parts {
            match part {
                Part::Literal(text) => write(text.as_bytes()),
                Part::Capture(number) => {
                    if let Some(found) = captures.and_then(|captures| captures.get(*number)) {
                        write(found.as_bytes());
                    }
                }
                Part::Variable(var, default) => {
                    if let Some(value) = vars.get(var).as_deref().or(default.as_deref()) {
                        write(value.as_bytes());
                    }
                }
            }
        }
    }
}

/// The capture that `rest`, the text behind a dollar sign, begins with, and how long it is.
fn number(rest: &str) -> Option<(usize, usize)> {
    let (digits, around) = match rest.strip_prefix('{') {
        Some(inner) => (inner.split_once('}')?.0, 2),
        None => {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            (rest.get(..end)?, 0)
        }
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((digits.parse().ok()?, digits.len() + around))
}

/// A pattern and what stands for its first match in a path.
#[derive(Clone, Debug)]
pub struct RegexUri {
    pattern: Regex,
    path: Replacement,
    query: Option<Replacement>,
}

impl RegexUri {
    /// Compiles `pattern`, which stands at `pointer`. A question mark in `replacement` begins a query.
    ///
    /// # Errors
    /// It is not a pattern.
    pub fn new(pattern: &str, replacement: Replacement, pointer: &str) -> Result<Self, ConfigError> {
        let pattern = pattern::compile(pattern, false)
            .map_err(|error| ConfigError::invalid(pointer, error.to_string()))?;
        let (path, query) = replacement.split_query();
        Ok(Self { pattern, path, query })
    }

    /// What the pattern captures in `subject`; nothing if it does not match.
    pub fn captures<'s>(&self, subject: &'s [u8]) -> Option<Captures<'s>> {
        self.pattern.captures(subject)
    }

    /// `subject` with its match replaced: path and query.
    pub fn replace<V: Vars + ?Sized>(
        &self,
        subject: &[u8],
        captures: &Captures<'_>,
        vars: &V,
    ) -> (Text, Option<Text>) {
        let (start, end) = captures.get(0).map_or((0, 0), |found| (found.start(), found.end()));
        let mut path = Text::new();
        path.extend_from_slice(subject.get(..start).unwrap_or_default());
        self.path.render(vars, Some(captures), &mut path);
        let rest = subject.get(end..).unwrap_or_default();
        let Some(query) = &self.query else {
            path.extend_from_slice(rest);
            return (path, None);
        };
        let mut out = Text::new();
        query.render(vars, Some(captures), &mut out);
        out.extend_from_slice(rest);
        (path, Some(out))
    }
}

#[cfg(test)]
mod tests {
    use layers::testing::exchange;

    use super::*;

    fn replaced(pattern: &str, replacement: Replacement, subject: &str) -> Option<String> {
        let x = exchange("GET", "http://a.com/x?q=1").build();
        let rule = RegexUri::new(pattern, replacement, "").unwrap();
        let captures = rule.captures(subject.as_bytes())?;
        let (mut out, query) = rule.replace(subject.as_bytes(), &captures, &*x);
        if let Some(query) = query {
            out.extend_from_slice(&[b" query ", &query[..]].concat());
        }
        Some(String::from_utf8(out.to_vec()).unwrap())
    }

    #[test]
    fn captures_and_variables_are_filled_in() {
        let cases = [
            ("^/a/(.*)", "/b/$1", "/a/c", "/b/c"),
            ("^/a/(.*)/(.*)", "/${2}x/$1", "/a/c/d", "/dx/c"),
            ("/a/", "/b/", "/x/a/y/a/", "/x/b/y/a/"),
            ("^/(.*)$", "/$host/$1?q=${arg_q}", "/c", "/a.com/c query q=1"),
            ("^/a/([^/]*)", "/b?x=$1&y=", "/a/?/z", "/b query x=?&y=/z"),
            ("^/a", "/b${nothing ?? ?}", "/a", "/b?"),
            ("^/(.)", "/$1abc", "/xyz", "/xabcyz"),
            ("^/(.)", "/$9", "/x", "/"),
            ("(.+)", "$0$0", "/x", "/x/x"),
            ("^/(.*)", r"/\$1", "/x", "/$1"),
            ("^/(.*)", "/$nothing", "/x", "/"),
        ];
        for (pattern, source, subject, expected) in cases {
            let out = replaced(pattern, Replacement::with_variables(source), subject);
            assert_eq!(out.as_deref(), Some(expected), "{pattern} {source}");
        }
        assert_eq!(replaced("^/a", Replacement::captures("/b"), "/c"), None);
    }

    #[test]
    fn without_variables_only_captures_are_special() {
        for (source, expected) in [("$host-$1", "$host-x"), ("$$1", "$1"), ("5$", "5$"), ("${1}", "x")] {
            let out = replaced("^/(.*)$", Replacement::captures(source), "/x");
            assert_eq!(out.as_deref(), Some(expected), "{source}");
        }
    }

    #[test]
    fn literals_are_known() {
        assert_eq!(Replacement::with_variables("a/b").as_literal(), Some("a/b"));
        assert_eq!(Replacement::with_variables("").as_literal(), Some(""));
        assert_eq!(Replacement::with_variables("$1").as_literal(), None);
        assert_eq!(Replacement::with_variables("$host").as_literal(), None);
    }
}
