//! Times as log formats write them. UTC, as everything the gateway writes.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Year, month, day, hour, minute, second.
fn civil(time: SystemTime) -> (i64, usize, u64, u64, u64, u64) {
    let total = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = ((total / 86_400) as i64, total % 86_400);
    // Days to a date by eras of 400 years that begin on 1 March, so that leap days come last.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u64;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month as usize, day, rest / 3_600, rest / 60 % 60, rest % 60)
}

/// `2026-11-21T03:04:05+00:00`, nginx `$time_iso8601`.
pub fn iso8601(time: SystemTime) -> String {
    let (year, month, day, hour, minute, second) = civil(time);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}+00:00")
}

/// `2026-11-21T03:04:05.678Z`, RFC 3339 with milliseconds.
pub fn rfc3339_millis(time: SystemTime) -> String {
    let (year, month, day, hour, minute, second) = civil(time);
    let millis = time.duration_since(UNIX_EPOCH).unwrap_or_default().subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// The time as `format` of `strftime` says, in UTC; nothing if there is a letter behind `%` that is not known: `Y`, `y`,
/// `m`, `d`, `j`, `H`, `M`, `S`, `b`, `F`, `T` and `%` are.
pub fn strftime(time: SystemTime, format: &str) -> Option<String> {
    let (year, month, day, hour, minute, second) = civil(time);
    let mut text = String::with_capacity(format.len() + 8);
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        text.push_str(&match chars.next()? {
            'Y' => format!("{year:04}"),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'j' => format!("{:03}", day_of_year(year, month, day)),
            'H' => format!("{hour:02}"),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'b' => MONTHS.get(month - 1)?.to_string(),
            'F' => format!("{year:04}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            '%' => "%".to_owned(),
            _ => return None,
        });
    }
    Some(text)
}

/// From 1.
fn day_of_year(year: i64, month: usize, day: u64) -> u64 {
    const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    BEFORE.get(month - 1).copied().unwrap_or_default() + day + u64::from(leap && month > 2)
}

/// `21/Nov/2026:03:04:05 +0000`, nginx `$time_local`.
pub fn common_log(time: SystemTime) -> String {
    let (year, month, day, hour, minute, second) = civil(time);
    let name = MONTHS.get(month - 1).copied().unwrap_or("Jan");
    format!("{day:02}/{name}/{year:04}:{hour:02}:{minute:02}:{second:02} +0000")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "1970-01-01T00:00:00+00:00", "01/Jan/1970:00:00:00 +0000"),
            (951_782_400, "2000-02-29T00:00:00+00:00", "29/Feb/2000:00:00:00 +0000"),
            (1_763_694_245, "2025-11-21T03:04:05+00:00", "21/Nov/2025:03:04:05 +0000"),
            (4_107_542_399, "2100-02-28T23:59:59+00:00", "28/Feb/2100:23:59:59 +0000"),
            (4_107_542_400, "2100-03-01T00:00:00+00:00", "01/Mar/2100:00:00:00 +0000"),
        ];
        for (seconds, iso, common) in cases {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(iso8601(time), iso);
            assert_eq!(common_log(time), common);
        }
    }

    #[test]
    fn a_format_of_strftime_is_filled_in() {
        let time = UNIX_EPOCH + Duration::from_millis(1_709_262_245_678);
        let cases = [
            ("%Y.%m.%d", Some("2024.03.01")),
            ("%F %T", Some("2024-03-01 03:04:05")),
            ("%y%j%%", Some("24061%")),
            ("%b", Some("Mar")),
            ("no time", Some("no time")),
            ("%Q", None),
            ("%", None),
        ];
        for (format, expected) in cases {
            assert_eq!(strftime(time, format).as_deref(), expected, "{format}");
        }
        assert_eq!(rfc3339_millis(time), "2024-03-01T03:04:05.678Z");
    }
}
