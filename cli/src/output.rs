//! How commands speak: text for people, JSON for programs, colours only on a terminal, and exit codes that stay.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use serde::Serialize;

/// Everything is as it should be.
pub const OK: u8 = 0;
/// The command worked and found something wrong: errors in a configuration, a request that would be refused.
pub const FOUND: u8 = 1;
/// The command could not do its work: no connection, no permission.
pub const FAILED: u8 = 3;

/// The form of what a command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON document.
    Json,
}

/// Prints `value` as one JSON document.
pub fn json(value: &impl Serialize) {
    let text =
        serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    line(format_args!("{text}"));
}

/// Prints a line. A reader that has gone away (`| head`) is no failure.
pub fn line(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints what need not be text.
pub fn bytes(bytes: &[u8]) {
    let mut out = std::io::stdout();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Prints what went wrong, with its causes, and gives the exit code.
pub fn failure(error: &anyhow::Error) -> ExitCode {
    let mut err = std::io::stderr();
    let _ = writeln!(err, "{}: {error}", paint("error", Colour::Red, err.is_terminal()));
    for cause in error.chain().skip(1) {
        let _ = writeln!(err, "  because: {cause}");
    }
    ExitCode::from(FAILED)
}

/// Prints one thing that is wrong, on standard error.
pub fn problem(text: &str) {
    let mut err = std::io::stderr();
    let _ = writeln!(err, "{}: {text}", paint("error", Colour::Red, err.is_terminal()));
}

/// Prints something worth knowing, on standard error.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "postern: {text}");
}

/// `1 error`, `2 errors`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// A colour that a terminal shows.
#[derive(Clone, Copy)]
pub enum Colour {
    /// Something is wrong.
    Red,
    /// Something is right.
    Green,
    /// Something is secondary.
    Dim,
}

/// `text` in that colour, if `terminal`.
pub fn paint(text: &str, colour: Colour, terminal: bool) -> String {
    if !terminal || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    let code = match colour {
        Colour::Red => "31;1",
        Colour::Green => "32",
        Colour::Dim => "2",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// [`paint`] for standard output.
pub fn painted(text: &str, colour: Colour) -> String {
    paint(text, colour, std::io::stdout().is_terminal())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_only() {
        assert_eq!(paint("x", Colour::Red, false), "x");
    }
}
