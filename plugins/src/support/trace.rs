//! A request as spans: the context it came with, the context its upstream gets, and the attempts that were made.
//!
//! Used by the plugins that trace. A request keeps one [`Trace`] for each of them in a slot of its own type; what they
//! tell is put together in the `log` phase, from times that the exchange has anyway.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue};
use layers::exchange::{Attempt, State};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// A span that somebody else has begun. W3C Trace Context, and B3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanContext {
    /// Never 0.
    pub trace_id: u128,
    /// Never 0.
    pub span_id: u64,
    /// Whether it is told to anybody. B3 may leave it open.
    pub sampled: Option<bool>,
}

/// What is wrong with a `b3` field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadB3;

/// What the fields of B3 say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct B3Fields {
    /// The span of the caller.
    pub context: Option<SpanContext>,
    /// What the caller decided about sampling.
    pub sampled: Option<bool>,
    /// `X-B3-Flags: 1`: sampled whatever anybody says.
    pub debug: bool,
}

/// A span of the gateway.
#[derive(Clone, Copy, Debug)]
pub struct Trace {
    /// The same for all spans of a trace.
    pub trace_id: u128,
    /// The span of this request.
    pub span_id: u64,
    /// The span of the caller.
    pub parent: Option<u64>,
    /// Whether it is told.
    pub sampled: bool,
}

impl Trace {
    /// A span under `parent`, or the first of a new trace.
    pub fn new(parent: Option<&SpanContext>, sampled: bool) -> Self {
        Self {
            trace_id: parent.map_or_else(new_trace_id, |parent| parent.trace_id),
            span_id: new_span_id(),
            parent: parent.map(|parent| parent.span_id),
            sampled,
        }
    }

    /// `00-TRACE-SPAN-FLAGS`.
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }

    /// Tells the upstream by `traceparent`. The client's `tracestate` goes along as it is.
    pub fn inject_w3c(&self, headers: &mut HeaderMap) {
        set(headers, TRACEPARENT, self.traceparent());
    }

    /// Tells the upstream by the fields of B3, and takes the client's away.
    pub fn inject_b3(&self, headers: &mut HeaderMap) {
        headers.remove(B3);
        set(headers, B3_TRACE, format!("{:032x}", self.trace_id));
        set(headers, B3_SPAN, format!("{:016x}", self.span_id));
        match self.parent {
            Some(parent) => set(headers, B3_PARENT, format!("{parent:016x}")),
            None => {
                headers.remove(B3_PARENT);
            }
        }
        headers.insert(B3_SAMPLED, HeaderValue::from_static(if self.sampled { "1" } else { "0" }));
    }

    /// Tells the upstream that nothing is told of this request.
    pub fn inject_unsampled_b3(headers: &mut HeaderMap) {
        headers.remove(B3);
        headers.insert(B3_SAMPLED, HeaderValue::from_static("0"));
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: String) {
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.insert(name, value);
    }
}

/// A random id, not 0.
pub fn new_trace_id() -> u128 {
    fastrand::u128(1..)
}

/// A random id, not 0.
pub fn new_span_id() -> u64 {
    fastrand::u64(1..)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

fn hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// An id of `lengths` digits, which is not 0.
fn id(text: &str, lengths: &[usize]) -> Option<u128> {
    let id = (lengths.contains(&text.len()) && hex(text)).then(|| u128::from_str_radix(text, 16).ok())??;
    (id != 0).then_some(id)
}

fn span_id(text: &str) -> Option<u64> {
    id(text, &[16]).and_then(|id| u64::try_from(id).ok())
}

/// The span that `traceparent` names. What is not well-formed counts as absent, as the standard says.
pub fn w3c(headers: &HeaderMap) -> Option<SpanContext> {
    let text = text(headers, &TRACEPARENT)?;
    if headers.get_all(TRACEPARENT).iter().count() != 1 || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut parts = text.splitn(5, '-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let more = parts.next().is_some();
    if version.len() != 2 || !hex(version) || version == "ff" || (version == "00" && more) || flags.len() != 2
    {
        return None;
    }
    let flags = hex(flags).then(|| u8::from_str_radix(flags, 16).ok())??;
    Some(SpanContext { trace_id: id(trace, &[32])?, span_id: span_id(span)?, sampled: Some(flags & 1 == 1) })
}

/// What the caller says by B3: the single field first, then the several ones. An id that is not well-formed in one of
/// the several makes all of them absent.
///
/// # Errors
/// The single field is not well-formed.
pub fn b3(headers: &HeaderMap) -> Result<B3Fields, BadB3> {
    if let Some(value) = headers.get(B3) {
        return single_b3(value.to_str().map_err(|_| BadB3)?.trim());
    }
    let debug = text(headers, &B3_FLAGS) == Some("1");
    let sampled = match text(headers, &B3_SAMPLED) {
        _ if debug => Some(true),
        Some("1" | "true") => Some(true),
        Some("0" | "false") => Some(false),
        _ => None,
    };
    let ids = || {
        let trace_id = id(text(headers, &B3_TRACE)?, &[16, 32])?;
        let span_id = span_id(text(headers, &B3_SPAN)?)?;
        if let Some(parent) = text(headers, &B3_PARENT) {
            self::span_id(parent)?;
        }
        Some(SpanContext { trace_id, span_id, sampled })
    };
    Ok(B3Fields { context: ids(), sampled, debug })
}

fn single_b3(text: &str) -> Result<B3Fields, BadB3> {
    let decision = |text: &str| match text {
        "1" => Ok((Some(true), false)),
        "0" => Ok((Some(false), false)),
        "d" => Ok((Some(true), true)),
        _ => Err(BadB3),
    };
    let mut parts = text.split('-');
    let first = parts.next().ok_or(BadB3)?;
    let Some(second) = parts.next() else {
        let (sampled, debug) = decision(first)?;
        return Ok(B3Fields { context: None, sampled, debug });
    };
    let (trace_id, span_id) = (id(first, &[16, 32]).ok_or(BadB3)?, span_id(second).ok_or(BadB3)?);
    let (sampled, debug) = parts.next().map_or(Ok((None, false)), decision)?;
    if let Some(parent) = parts.next() {
        self::span_id(parent).ok_or(BadB3)?;
    }
    if parts.next().is_some() {
        return Err(BadB3);
    }
    Ok(B3Fields { context: Some(SpanContext { trace_id, span_id, sampled }), sampled, debug })
}

/// Wall-clock times of instants near now.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    now: Instant,
    wall: Duration,
}

impl Clock {
    /// Of this moment.
    pub fn now() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { now: Instant::now(), wall }
    }

    /// The time of `instant` since 1970.
    pub fn at(&self, instant: Instant) -> Duration {
        self.wall.saturating_sub(self.now.saturating_duration_since(instant))
    }

    /// This moment since 1970.
    pub fn wall(&self) -> Duration {
        self.wall
    }
}

/// An attempt to reach the upstream, in times of the wall clock.
#[derive(Clone, Debug)]
pub struct AttemptSpan {
    /// When the node was chosen.
    pub start: Duration,
    /// When the head of the answer was there, or the attempt had failed.
    pub end: Duration,
    /// The node.
    pub address: std::net::SocketAddr,
    /// What it answered.
    pub status: Option<u16>,
    /// The code of the reason why it failed.
    pub failed: Option<&'static str>,
}

/// The attempts of an exchange. The last one that had an answer lasts until its body has ended.
pub fn attempts<'a>(x: &'a State, clock: &'a Clock) -> impl Iterator<Item = AttemptSpan> + 'a {
    let last = x.attempts.len().saturating_sub(1);
    x.attempts.iter().enumerate().map(move |(number, attempt): (usize, &Attempt)| {
        let start = clock.at(attempt.started);
        let end =
            if number == last && attempt.failed.is_none() { clock.wall() } else { start + attempt.took };
        AttemptSpan {
            start,
            end,
            address: attempt.address,
            status: attempt.status,
            failed: attempt.failed.map(|reason| reason.code()),
        }
    })
}

/// Whether a share of the requests has this one in it.
pub fn chance(ratio: f64) -> bool {
    ratio >= 1.0 || fastrand::f64() < ratio
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn a_traceparent_is_read_as_the_standard_says() {
        let read = |text: &str| w3c(&headers(&[("traceparent", text)]));
        let good = read(&format!("00-{TRACE}-{SPAN}-01")).unwrap();
        assert_eq!(good.trace_id, u128::from_str_radix(TRACE, 16).unwrap());
        assert_eq!(good.span_id, u64::from_str_radix(SPAN, 16).unwrap());
        assert_eq!(good.sampled, Some(true));
        assert_eq!(read(&format!("00-{TRACE}-{SPAN}-02")).unwrap().sampled, Some(false));
        assert!(read(&format!("cc-{TRACE}-{SPAN}-01-more")).is_some(), "a version to come");
        for wrong in [
            String::new(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}x-{SPAN}-01"),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
        ] {
            assert_eq!(read(&wrong), None, "{wrong}");
        }
        let twice = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(w3c(&headers(&[("traceparent", &twice), ("traceparent", &twice)])), None);
    }

    #[test]
    fn b3_is_read_from_one_field_and_from_several() {
        let single = |text: &str| b3(&headers(&[("b3", text)]));
        let found = single(&format!("{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90")).unwrap();
        assert_eq!((found.sampled, found.debug), (Some(true), false));
        assert!(found.context.is_some());
        assert_eq!(single("0").unwrap(), B3Fields { sampled: Some(false), ..B3Fields::default() });
        assert!(single("d").unwrap().debug);
        assert_eq!(single(&format!("{TRACE}-{SPAN}")).unwrap().sampled, None);
        for wrong in ["", "x", "1-2", TRACE, &format!("{TRACE}-{SPAN}-7"), &format!("{TRACE}-{SPAN}-1-2-3")] {
            assert_eq!(single(wrong), Err(BadB3), "{wrong}");
        }
        let several = |extra: &[(&'static str, &str)]| {
            let mut fields = vec![("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
            fields.extend(extra);
            b3(&headers(&fields)).unwrap()
        };
        assert!(several(&[]).context.is_some());
        assert_eq!(several(&[("x-b3-sampled", "false")]).sampled, Some(false));
        assert_eq!(several(&[("x-b3-sampled", "0"), ("x-b3-flags", "1")]).sampled, Some(true));
        assert!(several(&[("x-b3-parentspanid", "zz")]).context.is_none());
        assert!(b3(&headers(&[("x-b3-traceid", "12"), ("x-b3-spanid", SPAN)])).unwrap().context.is_none());
    }

    #[test]
    fn what_the_upstream_gets_can_be_read_again() {
        let trace = Trace::new(None, true);
        let mut fields = headers(&[("b3", "0"), ("x-b3-parentspanid", SPAN)]);
        trace.inject_w3c(&mut fields);
        trace.inject_b3(&mut fields);
        let expected = SpanContext { trace_id: trace.trace_id, span_id: trace.span_id, sampled: Some(true) };
        assert_eq!(w3c(&fields), Some(expected));
        assert_eq!(b3(&fields).unwrap().context, Some(expected));
        assert!(!fields.contains_key("x-b3-parentspanid"));
        let child = Trace::new(Some(&expected), false);
        assert_eq!((child.trace_id, child.parent), (trace.trace_id, Some(trace.span_id)));
    }
}
