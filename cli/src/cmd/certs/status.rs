//! What there is, and whether something ends soon.

use anyhow::{Result, bail};
use certs::ca::admin;
use certs::ca::proto::{StatusReply, StatusRequest};
use clap::Args;
use serde_json::json;

use super::ask::{Asked, answer, request};
use super::{ATTENTION, OK, show};
use crate::output::{self, Colour, Format, line, painted};

/// Arguments of `postern certs status`.
#[derive(Args)]
pub struct Status {
    /// Every workload, and not only those that somebody has to look at.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    asked: Asked,
}

impl Status {
    pub async fn run(self) -> Result<u8> {
        let status = fetch(&self.asked, self.all).await?;
        match self.asked.output {
            Format::Json => output::json(&status),
            Format::Text => show::status(&status),
        }
        Ok(show::code(&status))
    }
}

pub async fn fetch(asked: &Asked, all: bool) -> Result<StatusReply> {
    answer(asked.client().await?.status(request(StatusRequest { all })).await)
}

/// Arguments of `postern certs check`.
#[derive(Args)]
pub struct Check {
    /// Something in use ends sooner than this: 30d, 12h, 90m, 600s.
    #[arg(long, value_name = "SPAN", default_value = "30d", value_parser = seconds)]
    fail_before: u64,
    #[command(flatten)]
    asked: Asked,
}

impl Check {
    pub async fn run(self) -> Result<u8> {
        let status = fetch(&self.asked, true).await?;
        let ending = admin::ending(&status, self.fail_before);
        match self.asked.output {
            Format::Json => output::json(&json!({"ok": ending.is_empty(), "found": ending})),
            Format::Text if ending.is_empty() => {
                let within = show::span(self.fail_before);
                line(format_args!(
                    "{}",
                    painted(&format!("nothing in use ends within {within}"), Colour::Green)
                ));
            }
            Format::Text => {
                ending.iter().for_each(|found| line(format_args!("{}", painted(found, Colour::Red))));
                line(format_args!("exchange it: `postern certs rotate root` or `rotate issuer`"));
            }
        }
        Ok(if ending.is_empty() { OK } else { ATTENTION })
    }
}

/// A span of time: a number and s, m, h or d.
pub fn seconds(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..) {
        Some("" | "s") => 1,
        Some("m" | "min") => 60,
        Some("h") => 3600,
        Some("d") => 86_400,
        _ => bail!("write a number with s, m, h or d: 30d"),
    };
    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)) {
        Some(seconds) => Ok(seconds),
        None => bail!("write a number with s, m, h or d: 30d"),
    }
}

/// The same in milliseconds, `500ms` too.
pub fn millis(text: &str) -> Result<u64> {
    if let Some(digits) = text.strip_suffix("ms") {
        return Ok(digits.parse()?);
    }
    Ok(seconds(text)?.saturating_mul(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_a_number_and_a_unit() {
        for (text, expected) in [
            ("30d", Some(2_592_000)),
            ("12h", Some(43_200)),
            ("90m", Some(5400)),
            ("7", Some(7)),
            ("2s", Some(2)),
        ] {
            assert_eq!(seconds(text).ok(), expected, "{text}");
        }
        for text in ["", "d", "3w", "-1d", "99999999999999999999d", "1.5h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        assert_eq!(millis("250ms").unwrap(), 250);
        assert_eq!(millis("2s").unwrap(), 2000);
    }
}
