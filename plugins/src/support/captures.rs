//! Texts that take parts of a match, `/$1-$host`, and the replacement of what a pattern matches.
//!
//! Bytes, not text: patterns match single bytes, so a capture may end inside a character.

use config::error::ConfigError;
use config::pattern;
use config::template::Template;
use config::var::Vars;
use regex::bytes::{Captures, Regex};

/// A text that takes captures and, if it was read so, variables.
#[derive(Clone, Debug)]
pub struct Replacement {
    parts: Box<[Part]>,
}

#[derive(Clone, Debug)]
enum Part {
    Literal(Box<str>),
    Capture(usize),
    Variables(Template),
}

impl Replacement {
    /// Reads captures (`$0`, `$1`, `${1}`; `$$` is a dollar sign) and takes everything else as it is.
    pub fn captures(source: &str) -> Self {
        Self::read(source, |text| (!text.is_empty()).then(|| Part::Literal(text.replace("$$", "$").into())))
    }

    /// Reads captures and variables (`$host`, `${arg_name}`).
    pub fn with_variables(source: &str) -> Self {
        Self::read(source, |text| {
            let template = Template::parse(text);
            match template.as_literal() {
                Some("") => None,
                Some(literal) => Some(Part::Literal(literal.into())),
                None => Some(Part::Variables(template)),
            }
        })
    }

    /// Cuts `source` at its captures.
    fn read(source: &str, mut between: impl FnMut(&str) -> Option<Part>) -> Self {
        let mut parts = Vec::new();
        let (mut start, mut at) = (0, 0);
        while let Some(dollar) = source.get(at..).and_then(|rest| rest.find('$')).map(|found| at + found) {
            let rest = source.get(dollar + 1..).unwrap_or_default();
            let escaped = source.get(..dollar).is_some_and(|before| before.ends_with('\\'));
            match number(rest).filter(|_| !escaped) {
                Some((capture, length)) => {
                    parts.extend(source.get(start..dollar).and_then(&mut between));
                    parts.push(Part::Capture(capture));
                    start = dollar + 1 + length;
                    at = start;
                }
                // Both signs of `$$` are passed, so that `$$1` is `$1` and not a capture behind a sign.
                None => at = dollar + if rest.starts_with('$') { 2 } else { 1 },
            }
        }
        parts.extend(source.get(start..).and_then(between));
        Self { parts: parts.into() }
    }

    /// The text, if it takes nothing.
    pub fn as_literal(&self) -> Option<&str> {
        match &*self.parts {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Appends the text. A capture that does not exist adds nothing.
    pub fn render<V: Vars + ?Sized>(&self, vars: &V, captures: Option<&Captures<'_>>, out: &mut Vec<u8>) {
        self.render_with(vars, captures, out, |out, value| out.extend_from_slice(value.as_bytes()));
    }

    /// As [`render`](Self::render), with `write` putting down what variables say.
    pub fn render_with<V: Vars + ?Sized>(
        &self,
        vars: &V,
        captures: Option<&Captures<'_>>,
        out: &mut Vec<u8>,
        mut write: impl FnMut(&mut Vec<u8>, &str),
    ) {
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Part::Capture(number) => {
                    if let Some(found) = captures.and_then(|captures| captures.get(*number)) {
                        out.extend_from_slice(found.as_bytes());
                    }
                }
                Part::Variables(template) => {
                    for piece in template.pieces() {
                        match piece {
                            config::template::Piece::Text(text) => out.extend_from_slice(text.as_bytes()),
                            config::template::Piece::Var(var, default) => {
                                if let Some(value) = vars.get(var).as_deref().or(default.as_deref()) {
                                    write(out, value);
                                }
                            }
                        }
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

/// A pattern and what stands for its first match.
#[derive(Clone, Debug)]
pub struct RegexUri {
    pattern: Regex,
    replacement: Replacement,
}

impl RegexUri {
    /// Compiles `pattern`, which stands at `pointer`.
    ///
    /// # Errors
    /// It is not a pattern.
    pub fn new(pattern: &str, replacement: Replacement, pointer: &str) -> Result<Self, ConfigError> {
        let pattern = pattern::compile(pattern, false)
            .map_err(|error| ConfigError::invalid(pointer, error.to_string()))?;
        Ok(Self { pattern, replacement })
    }

    /// What the pattern captures in `subject`; nothing if it does not match.
    pub fn captures<'s>(&self, subject: &'s [u8]) -> Option<Captures<'s>> {
        self.pattern.captures(subject)
    }

    /// `subject` with its match replaced. `write` puts down what variables say.
    pub fn replace<V: Vars + ?Sized>(
        &self,
        subject: &[u8],
        captures: &Captures<'_>,
        vars: &V,
        write: impl FnMut(&mut Vec<u8>, &str),
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(subject.len() + 32);
        let (start, end) = captures.get(0).map_or((0, 0), |found| (found.start(), found.end()));
        out.extend_from_slice(subject.get(..start).unwrap_or_default());
        self.replacement.render_with(vars, Some(captures), &mut out, write);
        out.extend_from_slice(subject.get(end..).unwrap_or_default());
        out
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
        let out = rule.replace(subject.as_bytes(), &captures, &*x, |out, v| out.extend(v.bytes()));
        Some(String::from_utf8(out).unwrap())
    }

    #[test]
    fn captures_and_variables_are_filled_in() {
        let cases = [
            ("^/a/(.*)", "/b/$1", "/a/c", "/b/c"),
            ("^/a/(.*)/(.*)", "/${2}x/$1", "/a/c/d", "/dx/c"),
            ("/a/", "/b/", "/x/a/y/a/", "/x/b/y/a/"),
            ("^/(.*)$", "/$host/$1?q=${arg_q}", "/c", "/a.com/c?q=1"),
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
