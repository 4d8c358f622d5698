//! Sizes and times as nginx writes them.

use std::time::Duration;

/// Bytes of `10`, `16k`, `10m` or `1g`, either case.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, factor) = match text.char_indices().last()? {
        (end, 'k' | 'K') => (text.get(..end)?, 1 << 10),
        (end, 'm' | 'M') => (text.get(..end)?, 1 << 20),
        (end, 'g' | 'G') => (text.get(..end)?, 1 << 30),
        _ => (text, 1),
    };
    digits.trim_end().parse::<u64>().ok()?.checked_mul(factor)
}

/// `60` (seconds), `500ms`, `60s`, `1m 30s`, `1h`, `1d`, `1w`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (digits, after) = rest.split_at(end);
        let amount: u64 = digits.parse().ok()?;
        let end = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let part = match unit {
            "ms" => Duration::from_millis(amount),
            "" | "s" => Duration::from_secs(amount),
            "m" => Duration::from_secs(amount.checked_mul(60)?),
            "h" => Duration::from_secs(amount.checked_mul(3600)?),
            "d" => Duration::from_secs(amount.checked_mul(86_400)?),
            "w" => Duration::from_secs(amount.checked_mul(604_800)?),
            _ => return None,
        };
        total = total.checked_add(part)?;
        rest = after.trim_start();
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("16k", Some(16 << 10)),
            ("10M", Some(10 << 20)),
            ("1g", Some(1 << 30)),
            (" 4 k ", Some(4096)),
            ("", None),
            ("k", None),
            ("-1", None),
            ("1.5m", None),
            ("10mb", None),
            ("99999999999999999999", None),
            ("99999999999999g", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn times_have_units() {
        for (text, millis) in [
            ("60", Some(60_000)),
            ("60s", Some(60_000)),
            ("500ms", Some(500)),
            ("1m", Some(60_000)),
            ("1h30m", Some(5_400_000)),
            ("1m 30s", Some(90_000)),
            ("1d", Some(86_400_000)),
            ("0", Some(0)),
            ("", None),
            ("s", None),
            ("1x", None),
            ("-1s", None),
            ("1.5s", None),
            ("99999999999999999999w", None),
            ("9999999999999999999w", None),
        ] {
            assert_eq!(parse_duration(text), millis.map(Duration::from_millis), "{text:?}");
        }
    }
}
