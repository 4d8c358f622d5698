//! What is wrong with a configuration, where, and what to write instead.
//!
//! A [`ConfigError`] points into the object it is about by an RFC 6901 pointer. Whoever puts the object into
//! a larger one moves the pointer with [`ConfigError::under`]. Values of secrets never get into a message.

use std::fmt;

use crate::id::ResourceKey;
use crate::secret_ref::manager_path;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// RFC 6901 pointer inside the object: `/upstream/nodes/0/weight`, or empty for the object itself.
    pub pointer: String,
    /// What is wrong there.
    pub kind: ErrorKind,
}

/// The ways to be wrong. The text says what was found and what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A field that does not exist.
    #[error("unknown field `{field}`{}", suggest(nearest.as_deref()))]
    UnknownField {
        /// As it was written.
        field: String,
        /// The field that was probably meant.
        nearest: Option<String>,
    },
    /// A field that has to be there.
    #[error("`{field}` is missing: add it")]
    MissingField {
        /// Its name.
        field: String,
    },
    /// A value of another JSON type.
    #[error("found {found}, write {expected}")]
    WrongType {
        /// The type that was found.
        found: &'static str,
        /// What belongs there.
        expected: String,
    },
    /// `null` where a value or nothing belongs.
    #[error("the value is null: write a value, or take the field out")]
    Null,
    /// A word that is none of the allowed ones.
    #[error("`{found}` is not known here: write {}{}", one_of(allowed), suggest(nearest.as_deref()))]
    NotOneOf {
        /// As it was written.
        found: String,
        /// All words that are allowed.
        allowed: Vec<String>,
        /// The one that was probably meant.
        nearest: Option<String>,
    },
    /// A number, length or count outside its limits.
    #[error("{what} {found} is out of range: write {allowed}")]
    OutOfRange {
        /// What is counted: `value`, `length`.
        what: &'static str,
        /// What was found.
        found: String,
        /// The limits in words.
        allowed: String,
    },
    /// Text of the wrong form.
    #[error("`{found}` is not {expected}")]
    BadFormat {
        /// As it was written.
        found: String,
        /// The right form in words.
        expected: String,
    },
    /// The same element twice.
    #[error("an element is written twice: write each one once")]
    Duplicate,
    /// Two fields that exclude each other.
    #[error("`{one}` and `{other}` exclude each other: keep one of them")]
    Exclusive {
        /// The one.
        one: &'static str,
        /// And the other.
        other: &'static str,
    },
    /// A field that needs another one beside it.
    #[error("`{field}` needs `{needs}` beside it")]
    Needs {
        /// What was found.
        field: String,
        /// What it needs.
        needs: &'static str,
    },
    /// One of several fields has to be there.
    #[error("none of {} is there: write one of them", list(fields))]
    NoneOf {
        /// The fields.
        fields: Vec<&'static str>,
    },
    /// An id that breaks the rules.
    #[error("`{found}` is not an id: write {rule}")]
    BadId {
        /// As it was written.
        found: String,
        /// The rule in words.
        rule: &'static str,
    },
    /// The id inside the object is not the id it is stored under.
    #[error("the id is `{found}`, but the object is {key}: write the same id, or leave it out")]
    OtherId {
        /// The id inside.
        found: String,
        /// The address of the object.
        key: ResourceKey,
    },
    /// Something of APISIX that is not offered, and what to use.
    #[error("{what} is not supported: {instead}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        instead: String,
    },
    /// A plugin that does not exist here.
    #[error("plugin `{name}` does not exist here{}", advise(advice.as_deref()))]
    UnknownPlugin {
        /// As it was written.
        name: String,
        /// What to use instead.
        advice: Option<String>,
    },
    /// A plugin in a place where it has no meaning.
    #[error("plugin `{name}` cannot be used here: {reason}")]
    MisplacedPlugin {
        /// Its name.
        name: String,
        /// Why, and where it belongs.
        reason: &'static str,
    },
    /// A reference to a secret that cannot be looked up.
    #[error("the secret reference `{reference}` cannot be resolved: {reason}")]
    UnresolvedSecret {
        /// As it was written; the reference, not the secret.
        reference: String,
        /// Why.
        reason: String,
    },
    /// A reference to an object that does not exist.
    #[error("{target} does not exist: create it first, or refer to another one")]
    MissingReference {
        /// The object that is asked for.
        target: ResourceKey,
    },
    /// A `vars` expression that cannot be read.
    #[error(transparent)]
    Expr(#[from] crate::expr::ExprError),
    /// A regular expression that cannot be used.
    #[error(transparent)]
    Pattern(#[from] crate::pattern::PatternError),
    /// Anything else. `problem` says what is wrong and what to write instead.
    #[error("{problem}")]
    Invalid {
        /// One sentence without a full stop.
        problem: String,
    },
}

impl ConfigError {
    /// Whether it says no more than that a secret manager was not asked, for only a running gateway asks.
    #[must_use]
    pub fn is_unasked_secret(&self) -> bool {
        matches!(&self.kind, ErrorKind::UnresolvedSecret { reference, .. } if manager_path(reference).is_some())
    }

    /// Whether it is about the name of an object that was given the key of its place, because its name is none or taken:
    /// the reading of its file has told that.
    #[must_use]
    pub fn is_told_by_file(&self, key: &ResourceKey) -> bool {
        key.is_by_place() && self.pointer == "/id"
    }

    /// An error at `pointer`.
    pub fn new(pointer: impl Into<String>, kind: ErrorKind) -> ConfigError {
        ConfigError { pointer: pointer.into(), kind }
    }

    /// An error that has no kind of its own. `problem` says what is wrong and what to write instead.
    pub fn invalid(pointer: impl Into<String>, problem: impl Into<String>) -> ConfigError {
        ConfigError::new(pointer, ErrorKind::Invalid { problem: problem.into() })
    }

    /// The same error seen from the object that holds this one at `prefix`, which is a pointer itself.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> ConfigError {
        self.pointer.insert_str(0, prefix);
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pointer.is_empty() {
            return write!(f, "{}", self.kind);
        }
        write!(f, "{}: {}", self.pointer, self.kind)
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.kind)
    }
}

/// All errors in one line.
pub fn joined(errors: &[ConfigError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// One step of an RFC 6901 pointer: `~` and `/` escaped.
#[must_use]
pub fn escape(token: &str) -> String {
    token.replace('~', "~0").replace('/', "~1")
}

/// The candidate that differs least from `word`, if any is near enough to have been meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // One slip for each three letters; a short word must be nearly right.
    let limit = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters differ, two that are swapped being one, `-` and `_` and upper and lower case the same.
fn distance(a: &str, b: &str) -> usize {
    let fold = |c: char| if c == '-' { '_' } else { c.to_ascii_lowercase() };
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().map(fold).collect(), b.chars().map(fold).collect());
    let at = |row: &[usize], i: usize| row.get(i).copied().unwrap_or(0);
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = Vec::with_capacity(above.len());
        row.push(i + 1);
        for (j, y) in b.iter().enumerate() {
            let mut cost =
                (at(&above, j) + usize::from(x != y)).min(at(&above, j + 1) + 1).min(at(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                cost = cost.min(at(&before, j - 1) + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or(0)
}

fn suggest(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!(" (did you mean `{nearest}`?)"))
}

fn advise(advice: Option<&str>) -> String {
    advice.map_or_else(|| ": take it out".to_owned(), |advice| format!(": {advice}"))
}

fn one_of(allowed: &[String]) -> String {
    match allowed {
        [only] => format!("`{only}`"),
        _ => format!("one of {}", list(allowed)),
    }
}

fn list<T: AsRef<str>>(words: &[T]) -> String {
    let mut text = String::new();
    for word in words {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push('`');
        text.push_str(word.as_ref());
        text.push('`');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_only_if_it_is_near() {
        let words = ["upstream", "upstream_id", "uri", "uris", "proxy-rewrite"];
        for (word, expected) in [
            ("upstraem", Some("upstream")),
            ("upstreamid", Some("upstream_id")),
            ("url", Some("uri")),
            ("proxy_rewrite", Some("proxy-rewrite")),
            ("Uri", Some("uri")),
            ("rui", Some("uri")),
            ("nothing", None),
        ] {
            assert_eq!(nearest(word, words), expected, "{word}");
        }
    }

    #[test]
    fn an_error_moves_below_the_object_that_holds_it() {
        let error = ConfigError::new("/weight", ErrorKind::MissingField { field: "weight".into() });
        let error = error.under("/nodes/0").under("/upstream");
        assert_eq!(error.to_string(), "/upstream/nodes/0/weight: `weight` is missing: add it");
    }

    #[test]
    fn pointer_tokens_are_escaped() {
        assert_eq!(escape("a/b~c"), "a~1b~0c");
    }
}
