//! One line for each request, when its response has left or was given up.
//!
//! The format is nginx's (`access_log_format`, escaped as `access_log_format_escape` says). `$reason` is the code of an
//! answer that the gateway made itself, `-` for one of the upstream.

use std::fmt::Write as _;
use std::rc::Rc;
use std::task::{Context, Poll};

use config::process::Escape;
use config::template::Template;
use config::var::{Var, Vars};
use tower::{Layer, Service};

use crate::error::Fault;
use crate::exchange::{Exchange, Finish};
use crate::stack::HttpService;
use crate::telemetry::log_file::LogHandle;

/// What a line looks like and where it goes.
#[derive(Clone)]
pub struct AccessLog {
    format: Template,
    escape: Escape,
    log: LogHandle,
    reads_head: bool,
}

impl AccessLog {
    /// Lines of that format to `log`.
    pub fn new(format: Template, escape: Escape, log: LogHandle) -> Self {
        let reads_head = format.vars().any(|var| matches!(var, Var::SentHttp(_) | Var::UpstreamHttp(_)));
        Self { format, escape, log, reads_head }
    }
}

impl AccessLog {
    /// Writes a line about whatever has these variables.
    pub fn write<V: Vars + ?Sized>(&self, vars: &V) {
        let mut line = String::with_capacity(256);
        let missing = if self.escape == Escape::Default { "-" } else { "" };
        self.format.render_with(vars, &mut line, |line, value| match value {
            Some(value) if !value.is_empty() => escape(line, value, self.escape),
            _ => line.push_str(missing),
        });
        self.log.line(line);
    }
}

impl Finish for AccessLog {
    fn finish(&self, x: &Exchange) {
        self.write(&**x);
    }
}

fn escape(line: &mut String, value: &str, escape: Escape) {
    for c in value.chars() {
        let written = match (escape, c) {
            // Even without escaping a line stays a line.
            (Escape::None, '\n' | '\r') | (Escape::Default, '"' | '\\' | '\0'..='\x1f' | '\x7f') => {
                write!(line, "\\x{:02X}", u32::from(c))
            }
            (Escape::Json, '"' | '\\') => write!(line, "\\{c}"),
            (Escape::Json, '\0'..='\x1f') => write!(line, "\\u{:04x}", u32::from(c)),
            _ => {
                line.push(c);
                Ok(())
            }
        };
        // Writing to a String cannot fail.
        debug_assert!(written.is_ok());
    }
}

/// Makes [`Logged`].
#[derive(Clone)]
pub struct AccessLogLayer(Option<Rc<AccessLog>>);

impl AccessLogLayer {
    /// Logs to `log`, or not at all.
    pub fn new(log: Option<AccessLog>) -> Self {
        Self(log.map(Rc::new))
    }
}

impl<S> Layer<S> for AccessLogLayer {
    type Service = Logged<S>;

    fn layer(&self, inner: S) -> Logged<S> {
        Logged { inner, log: self.0.clone() }
    }
}

/// Logs each exchange.
#[derive(Clone)]
pub struct Logged<S> {
    inner: S,
    log: Option<Rc<AccessLog>>,
}

impl<S: HttpService> Service<Exchange> for Logged<S> {
    type Response = Exchange;
    type Error = Fault;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut x: Exchange) -> S::Future {
        if let Some(log) = &self.log {
            x.keeps_head |= log.reads_head;
            x.on_finish(log.clone());
        }
        self.inner.call(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_end_the_line_or_the_string() {
        let cases = [
            (Escape::Default, "a\"b\\c\nd", "a\\x22b\\x5Cc\\x0Ad"),
            (Escape::Json, "a\"b\\c\nd", "a\\\"b\\\\c\\u000ad"),
            (Escape::None, "a\"b\nd", "a\"b\\x0Ad"),
        ];
        for (how, value, expected) in cases {
            let mut line = String::new();
            escape(&mut line, value, how);
            assert_eq!(line, expected);
        }
    }
}
