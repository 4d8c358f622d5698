//! Numbers as header values.

use std::sync::OnceLock;

use http::HeaderValue;

/// Numbers that have a value made once.
const KNOWN: usize = 2_000;

/// The number as a header value. Small ones, which is what quotas and seconds are, cost nothing.
pub fn number(n: u64) -> HeaderValue {
    // From texts that live as long as the process, so that a copy touches no counter that workers share.
    static VALUES: OnceLock<Box<[HeaderValue]>> = OnceLock::new();
    let values = VALUES.get_or_init(|| {
        (0..KNOWN).map(|n| HeaderValue::from_static(Box::leak(n.to_string().into_boxed_str()))).collect()
    });
    usize::try_from(n).ok().and_then(|n| values.get(n)).cloned().unwrap_or_else(|| written(n))
}

fn written(n: u64) -> HeaderValue {
    let mut digits = itoa::Buffer::new();
    HeaderValue::from_str(digits.format(n)).unwrap_or_else(|_| HeaderValue::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimals() {
        for n in [0, 7, 1_999, 2_000, u64::MAX] {
            assert_eq!(number(n), n.to_string().as_str());
        }
    }
}
