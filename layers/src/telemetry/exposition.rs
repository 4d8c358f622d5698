//! The text that Prometheus reads, version 0.0.4.
//!
//! Written on the control side from values that workers keep in atomics: a scrape makes no worker wait.

use std::fmt::{Display, Write};

use super::names::Metric;

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Collects samples, family by family.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    /// Begins a family. `prefix` stands before the metric's name, here and in [`Self::sample`].
    pub fn family(&mut self, prefix: &str, metric: &Metric) {
        let Metric { name, kind, help } = metric;
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {}\n", kind.as_str());
    }

    /// Adds a sample to the family just begun.
    pub fn sample<'a>(
        &mut self,
        prefix: &str,
        name: &str,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        value: impl Display,
    ) {
        let mut text = String::new();
        labels.into_iter().for_each(|(name, value)| Self::label(&mut text, name, value));
        self.sample_of(prefix, name, &text, value);
    }

    /// As [`sample`](Self::sample), with labels that [`label`](Self::label) has put together.
    pub fn sample_of(&mut self, prefix: &str, name: &str, labels: &str, value: impl Display) {
        self.text.push_str(prefix);
        self.text.push_str(name);
        if !labels.is_empty() {
            self.text.push('{');
            self.text.push_str(labels);
            self.text.push('}');
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, " {value}");
    }

    /// Adds a label to the text between the braces.
    pub fn label(text: &mut String, name: &str, value: &str) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        escape(text, value);
        text.push('"');
    }

    /// A family of a single sample without labels.
    pub fn single(&mut self, prefix: &str, metric: &Metric, value: impl Display) {
        self.family(prefix, metric);
        self.sample(prefix, metric.name, [], value);
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }
}

/// A label value: one line, whatever is in it.
fn escape(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// Thousandths as a decimal number: `1500` is `1.5`.
pub(crate) struct Thousandths(pub(crate) u64);

impl Display for Thousandths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{rest:03}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::super::names;
    use super::*;

    #[test]
    fn samples_stand_under_their_family_and_stay_on_one_line() {
        let mut text = Exposition::default();
        text.family("apisix_", &names::HTTP_STATUS);
        text.sample("apisix_", "http_status", [("code", "200"), ("route", "a\"b\\c\nd")], 7);
        text.single("", &names::REQUESTS_IN_FLIGHT, 0);
        assert_eq!(
            text.finish(),
            "# HELP apisix_http_status Answers by status code, route, service and consumer.\n\
             # TYPE apisix_http_status counter\n\
             apisix_http_status{code=\"200\",route=\"a\\\"b\\\\c\\nd\"} 7\n\
             # HELP postern_requests_in_flight Requests at work, until their answer has left.\n\
             # TYPE postern_requests_in_flight gauge\n\
             postern_requests_in_flight 0\n"
        );
    }

    #[test]
    fn thousandths_are_written_without_needless_digits() {
        for (value, text) in [(0, "0"), (1, "0.001"), (1500, "1.5"), (2000, "2"), (12_345, "12.345")] {
            assert_eq!(Thousandths(value).to_string(), text);
        }
    }
}
