//! Regular expressions as APISIX users write them (PCRE), on the `regex` engine.
//!
//! Matching is linear in the input, so no pattern can be made to hang a worker; what needs back-tracking (look-around,
//! back-references) is refused when the configuration is read. Bytes are matched without Unicode tables, as PCRE does
//! in nginx: `\d` is `[0-9]`, `.` is one byte. Compile at load, never in a request.

use regex::bytes::{Regex, RegexBuilder};

/// Memory one compiled pattern may take.
const SIZE_LIMIT: usize = 1 << 20;
/// Longest pattern, in bytes. Long lists belong into `in`.
const LENGTH_LIMIT: usize = 16 << 10;

/// Why a pattern is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("the pattern is {0} bytes long, {LENGTH_LIMIT} are allowed")]
    TooLong(usize),
    #[error("the pattern needs more than 1 MiB when compiled; make its repetitions smaller")]
    TooBig,
    #[error("look-around and back-references are not supported; {0}")]
    BackTracking(&'static str),
    #[error("not a valid regular expression: {0}")]
    Syntax(String),
}

/// Compile a pattern. `ignore_case` is PCRE's `i`.
pub fn compile(pattern: &str, ignore_case: bool) -> Result<Regex, PatternError> {
    if pattern.len() > LENGTH_LIMIT {
        return Err(PatternError::TooLong(pattern.len()));
    }
    let translated = translate(pattern)?;
    let build = |unicode: bool| {
        RegexBuilder::new(&translated)
            .case_insensitive(ignore_case)
            .unicode(unicode)
            .size_limit(SIZE_LIMIT)
            .dfa_size_limit(SIZE_LIMIT)
            .build()
    };
    // A class with letters beyond ASCII (`[é]`) exists only with Unicode on.
    build(false).or_else(|first| build(true).map_err(|_| first)).map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => PatternError::TooBig,
        error => PatternError::Syntax(one_line(&error.to_string())),
    })
}

/// The engine's report draws the pattern over several lines; operators want one.
fn one_line(report: &str) -> String {
    let last = report.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or(report);
    last.trim().trim_start_matches("error: ").to_owned()
}

/// PCRE to the engine's dialect: inside a class the engine gives `[`, `&&`, `--` and `~~` a meaning PCRE does not.
/// Constructs that need back-tracking are named here, where there is a better word for them than a syntax error.
fn translate(pattern: &str) -> Result<String, PatternError> {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut chars = pattern.chars().peekable();
    let mut in_class = false;
    let mut class_empty = false;
    let mut set_ended = false;
    while let Some(c) = chars.next() {
        let first_in_class = std::mem::take(&mut class_empty);
        let after_set = std::mem::take(&mut set_ended);
        match c {
            '\\' => {
                let Some(escaped) = chars.next() else {
                    return Err(PatternError::Syntax("it ends in a single backslash".into()));
                };
                match escaped {
                    '1'..='9' | 'k' | 'g' if !in_class => {
                        return Err(PatternError::BackTracking("compare the two parts in separate rules"));
                    }
                    'h' => {
                        set_ended = true;
                        out.push_str(if in_class { r"\t " } else { r"[\t ]" });
                    }
                    'e' => out.push_str(r"\x1b"),
                    'Z' if !in_class => out.push_str(r"(?:\n?\z)"),
                    // PCRE takes an escaped character without a meaning literally.
                    _ if !escaped.is_ascii_alphanumeric() && !escaped.is_ascii_punctuation() => {
                        out.push(escaped)
                    }
                    '<' | '>' => out.push(escaped),
                    _ => {
                        set_ended = matches!(escaped, 'w' | 'W' | 'd' | 'D' | 's' | 'S');
                        out.push('\\');
                        out.push(escaped);
                    }
                }
            }
            '[' if in_class => {
                if chars.peek() == Some(&':') {
                    out.push('[');
                } else {
                    out.push_str(r"\[");
                }
            }
            '[' => {
                in_class = true;
                class_empty = true;
                out.push('[');
                if chars.peek() == Some(&'^') {
                    chars.next();
                    out.push('^');
                }
            }
            // Directly after `[` PCRE takes `]` literally.
            ']' if in_class && first_in_class => out.push_str(r"\]"),
            ']' if in_class => {
                // The end of `[:alpha:]` is not the end of the class.
                if !out.ends_with(':') || !posix_class_open(&out) {
                    in_class = false;
                }
                out.push(']');
            }
            '&' | '~' if in_class => {
                out.push('\\');
                out.push(c);
            }
            // Beside a set such as `\w` no range is possible, so PCRE takes `-` literally.
            '-' if in_class && (after_set || out.ends_with('-') || set_follows(&chars)) => {
                out.push_str(r"\-")
            }
            '(' if !in_class && chars.peek() == Some(&'?') => {
                let mut ahead = chars.clone();
                ahead.next();
                let (kind, then) = (ahead.next(), ahead.next());
                match (kind, then) {
                    (Some('=' | '!'), _) | (Some('<'), Some('=' | '!')) => {
                        return Err(PatternError::BackTracking(
                            "use a second comparison, negated with \"!\" where the text must not occur",
                        ));
                    }
                    (Some('>' | '|' | '(' | 'R' | '&'), _) => {
                        return Err(PatternError::BackTracking("use a plain group `(?:...)`"));
                    }
                    _ => out.push('('),
                }
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// Whether `\w`, `\d` or `\s` comes next.
fn set_follows(chars: &std::iter::Peekable<std::str::Chars<'_>>) -> bool {
    let mut ahead = chars.clone();
    ahead.next() == Some('\\') && matches!(ahead.next(), Some('w' | 'W' | 'd' | 'D' | 's' | 'S' | 'h'))
}

/// Whether `out` ends inside `[:name:` of a POSIX class.
fn posix_class_open(out: &str) -> bool {
    let name = out.trim_end_matches(':').trim_end_matches(|c: char| c.is_ascii_lowercase() || c == '^');
    name.ends_with("[:")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::*;

    #[test]
    fn pcre_spellings_match_as_in_nginx() {
        let cases: &[(&str, &str, bool)] = &[
            (r"^/api/v\d+/", "/api/v12/x", true),
            (r"\d", "\u{663}", false),
            (r"^.$", "\u{e9}", false),
            (r"[[]", "[", true),
            (r"[]a]", "]", true),
            (r"[^]a]", "]", false),
            (r"[[:alpha:]_]+$", "ab_", true),
            (r"[[:digit:]]", "x", false),
            (r"[a&&b]", "&", true),
            (r"[a~~]", "~", true),
            (r"^[\w--]$", "-", true),
            (r"^[\w-.]$", "-", true),
            (r"^[a-\d]$", "-", true),
            (r"^[a-c]$", "b", true),
            (r"a\/b", "a/b", true),
            (r"\<b\>", "<b>", true),
            (r"(?<id>\d+)", "7", true),
            (r"(?i)abc", "ABC", true),
            (r"\h+", "\t", true),
            (r"x\Z", "x\n", true),
            ("[\u{e9}]", "\u{e9}", true),
        ];
        for (pattern, text, hit) in cases {
            let regex = compile(pattern, false).unwrap_or_else(|error| panic!("{pattern}: {error}"));
            assert_eq!(regex.is_match(text.as_bytes()), *hit, "{pattern} on {text}");
        }
    }

    #[test]
    fn patterns_that_could_hang_or_swell_are_refused() {
        for pattern in [r"(?=a)b", r"a(?!b)", r"(?<=a)b", r"(?<!a)b", r"(a)\1", r"(?>a)b"] {
            assert!(matches!(compile(pattern, false), Err(PatternError::BackTracking(_))), "{pattern}");
        }
        assert_eq!(compile("((a{100}){100}){100}", false).unwrap_err(), PatternError::TooBig);
        assert!(matches!(compile(&"a".repeat(20_000), false), Err(PatternError::TooLong(20_000))));
        for pattern in ["(", "a\\", "[a", "*"] {
            let error = compile(pattern, false).unwrap_err();
            assert!(matches!(error, PatternError::Syntax(_)), "{pattern}");
            assert!(!error.to_string().contains('\n'), "{pattern}");
        }
    }
}
