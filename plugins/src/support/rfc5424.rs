//! Messages of syslog as RFC 5424 writes them.

use std::time::SystemTime;

use layers::telemetry::time;

/// The name of the application in messages, as APISIX writes it.
const APPLICATION: &str = "apisix";
/// Characters of a host name.
const HOST: usize = 255;

/// One message, without its end: `<46>1 2026-11-21T03:04:05.678Z example.com apisix 42 - - text`.
///
/// `priority` is eight times the facility and the severity. `data` is the structured data, `-` for none.
pub fn message(priority: u8, at: SystemTime, host: &str, data: &str, text: &str) -> String {
    // The host may come from the client: only what the RFC allows there.
    let host: String = host.chars().filter(char::is_ascii_graphic).take(HOST).collect();
    let host = if host.is_empty() { "-" } else { &host };
    let (at, process) = (time::rfc3339_millis(at), std::process::id());
    format!("<{priority}>1 {at} {host} {APPLICATION} {process} - {data} {text}")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_message_is_one_line_with_its_parts() {
        let at = UNIX_EPOCH + Duration::from_millis(1_763_694_245_678);
        let process = std::process::id();
        for (host, told) in [("a.com", "a.com"), ("", "-"), ("a b\nc", "abc")] {
            assert_eq!(
                message(46, at, host, "-", "{}"),
                format!("<46>1 2025-11-21T03:04:05.678Z {told} apisix {process} - - {{}}")
            );
        }
    }
}
