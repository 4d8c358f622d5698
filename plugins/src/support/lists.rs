//! Lists that decide who is let in: patterns compiled with the place of the one that is wrong, and the two lists of
//! which one has to be there.

use config::error::{ConfigError, ErrorKind};
use config::pattern;
use regex::bytes::Regex;

/// Compiles the patterns that stand at `pointer`.
///
/// # Errors
/// The first that is not a pattern.
pub fn patterns<'a>(
    sources: impl IntoIterator<Item = &'a str>,
    ignore_case: bool,
    pointer: &str,
) -> Result<Box<[Regex]>, ConfigError> {
    let compiled = sources.into_iter().enumerate().map(|(index, source)| {
        pattern::compile(source, ignore_case)
            .map_err(|error| ConfigError::invalid(format!("{pointer}/{index}"), error.to_string()))
    });
    compiled.collect()
}

/// The one of two lists that is there, and whether it lets in (the first) or keeps out.
///
/// # Errors
/// Both are there, or none.
pub fn one_of<T>(
    (first, lets_in): (&'static str, Option<T>),
    (second, keeps_out): (&'static str, Option<T>),
) -> Result<(T, bool), ConfigError> {
    match (lets_in, keeps_out) {
        (Some(list), None) => Ok((list, true)),
        (None, Some(list)) => Ok((list, false)),
        (Some(_), Some(_)) => Err(ConfigError::new("", ErrorKind::Exclusive { one: first, other: second })),
        (None, None) => Err(ConfigError::new("", ErrorKind::NoneOf { fields: vec![first, second] })),
    }
}
