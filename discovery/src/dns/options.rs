//! How often names are asked for: the settings of all, and what an upstream wants otherwise.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use config::discovery::dns::Record;
use config::fields::Int;
use config::upstream::DnsOptions;

use super::lookup::{Order, RecordKind};

/// The longest that "there is no such name" is believed.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(30);

/// How names are resolved. The defaults are those of a stock gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Name servers; none means those of `resolv_conf`.
    pub servers: Vec<SocketAddr>,
    /// Where the system's name servers and search list stand, instead of `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// Look into `/etc/hosts` first.
    pub hosts: bool,
    /// No name is asked again sooner than this, whatever its time to live.
    pub min_ttl: Duration,
    /// No name is trusted longer than this without a question.
    pub max_ttl: Duration,
    /// Replaces every time to live (`dns_resolver_valid`).
    pub valid: Option<Duration>,
    /// One question to one server.
    pub timeout: Duration,
    /// Rounds over the servers before a question counts as failed, the first over UDP and the others over TCP; at least 1.
    pub attempts: usize,
    /// Ask for AAAA too; used where there is no A record.
    pub ipv6: bool,
    /// Apply the search list of `/etc/resolv.conf` (`enable_resolv_search_opt`).
    pub search: bool,
    /// Which records are asked for where a service is looked for. Nodes of upstreams have A and AAAA alone.
    pub order: Order,
    /// Addresses that an answer leaves out stay for this long: for servers that give a part of the set at a time.
    pub accumulate: Option<Duration>,
    /// Drop addresses whose name could not be resolved for this long; none keeps them for ever.
    pub stale_limit: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            resolv_conf: None,
            hosts: true,
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(300),
            valid: None,
            timeout: Duration::from_secs(5),
            attempts: 2,
            ipv6: true,
            search: true,
            order: Order::default(),
            accumulate: None,
            stale_limit: None,
        }
    }
}

/// `discovery.dns` of `config.yaml`.
impl From<&config::discovery::dns::Dns> for Settings {
    fn from(written: &config::discovery::dns::Dns) -> Self {
        let kind = |record: &Record| match record {
            Record::Srv => Some(RecordKind::Srv),
            Record::A => Some(RecordKind::A),
            Record::Aaaa => Some(RecordKind::Aaaa),
            Record::Last | Record::Cname => None,
        };
        let seconds = |count: u32| Duration::from_secs(count.into());
        Self {
            servers: written.servers(),
            resolv_conf: written.resolv_conf.clone(),
            hosts: false,
            min_ttl: seconds(written.min_ttl.get()),
            max_ttl: seconds(written.max_ttl.get()),
            timeout: written.timeout.duration(),
            attempts: usize::try_from(written.attempts.get()).unwrap_or(1),
            search: written.search,
            order: Order {
                kinds: written.order.iter().filter_map(kind).collect(),
                last: written.order.contains(&Record::Last),
            },
            accumulate: written.accumulate(),
            ..Self::default()
        }
    }
}

/// What an upstream wants otherwise than the settings say. Names with different options do not share questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NameOptions {
    pub min_ttl: Option<Duration>,
    pub max_ttl: Option<Duration>,
    /// Replaces every time to live.
    pub refresh: Option<Duration>,
    pub accumulate: Option<Duration>,
}

impl NameOptions {
    /// The names of the options in `discovery_args`, each a number of seconds.
    pub const ARGS: [&str; 4] = ["min_ttl", "max_ttl", "refresh", "accumulate"];

    /// The options that `discovery_args` have.
    ///
    /// # Errors
    /// An argument that is none of these or no number of seconds. Says what to write instead.
    pub fn from_args<'a>(args: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, value) in args {
            let option = match name {
                "min_ttl" => &mut options.min_ttl,
                "max_ttl" => &mut options.max_ttl,
                "refresh" => &mut options.refresh,
                "accumulate" => &mut options.accumulate,
                _ => {
                    return Err(format!(
                        "`{name}` says nothing to DNS; write one of {}",
                        Self::ARGS.join(", ")
                    ));
                }
            };
            let seconds = value.parse::<f64>().ok().filter(|count| *count > 0.0);
            let duration = seconds.and_then(|count| Duration::try_from_secs_f64(count).ok());
            *option =
                Some(duration.ok_or_else(|| format!("`{name}` is a number of seconds, not `{value}`"))?);
        }
        Ok(options)
    }

    /// The same as `discovery_args`.
    pub fn to_args(self) -> impl Iterator<Item = (Arc<str>, Arc<str>)> {
        let values = [self.min_ttl, self.max_ttl, self.refresh, self.accumulate];
        let set = Self::ARGS.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?)));
        set.map(|(name, value)| (name.into(), value.as_secs_f64().to_string().into()))
    }
}

/// `dns` of an upstream.
impl From<&DnsOptions> for NameOptions {
    fn from(written: &DnsOptions) -> Self {
        let seconds = |count: Int<1, 86_400>| Duration::from_secs(count.get().into());
        Self {
            min_ttl: written.min_ttl.map(seconds),
            max_ttl: written.max_ttl.map(seconds),
            refresh: written.refresh.map(seconds),
            accumulate: written.accumulate.map(seconds),
        }
    }
}

/// A floor of the time to live, and nothing else.
impl From<Option<Duration>> for NameOptions {
    fn from(min_ttl: Option<Duration>) -> Self {
        Self { min_ttl, ..Self::default() }
    }
}

/// The limits of one name: its own before those of all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    min: Duration,
    max: Duration,
    /// The answers of this name do not say when it is asked again.
    refresh: Option<Duration>,
    valid: Option<Duration>,
    pub accumulate: Option<Duration>,
}

impl Limits {
    pub fn new(settings: &Settings, options: &NameOptions) -> Self {
        Self {
            min: options.min_ttl.unwrap_or(settings.min_ttl),
            max: options.max_ttl.unwrap_or(settings.max_ttl),
            refresh: options.refresh,
            valid: settings.valid,
            accumulate: options.accumulate.or(settings.accumulate),
        }
    }

    /// When to ask again after an answer. Names that were first asked for together spread.
    pub fn positive(&self, ttl: Duration) -> Duration {
        let bounded = || self.valid.unwrap_or(ttl).min(self.max).max(self.min);
        let ttl = self.refresh.unwrap_or_else(bounded);
        ttl + ttl.mul_f64(fastrand::f64() / 10.0)
    }

    /// When to ask again after a denial.
    pub fn negative(&self, ttl: Duration) -> Duration {
        ttl.min(MAX_NEGATIVE_TTL).min(self.max).max(self.min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn options_are_read_from_arguments_and_written_as_such() {
        let args = [("min_ttl", "2"), ("max_ttl", "60"), ("refresh", "0.5"), ("accumulate", "300")];
        let options = NameOptions {
            min_ttl: Some(seconds(2)),
            max_ttl: Some(seconds(60)),
            refresh: Some(Duration::from_millis(500)),
            accumulate: Some(seconds(300)),
        };
        assert_eq!(NameOptions::from_args(args), Ok(options));
        let written: Vec<(Arc<str>, Arc<str>)> = options.to_args().collect();
        assert_eq!(NameOptions::from_args(written.iter().map(|(k, v)| (&**k, &**v))), Ok(options));
        for (name, value, told) in [
            ("ttl", "1", "says nothing to DNS"),
            ("min_ttl", "", "a number of seconds"),
            ("min_ttl", "0", "a number of seconds"),
            ("refresh", "-1", "a number of seconds"),
            ("refresh", "1e300", "a number of seconds"),
            ("accumulate", "NaN", "a number of seconds"),
        ] {
            let error = NameOptions::from_args([(name, value)]).unwrap_or_default();
            assert_eq!(error, NameOptions::default(), "{name}={value}");
            assert!(
                NameOptions::from_args([(name, value)]).is_err_and(|error| error.contains(told)),
                "{name}"
            );
        }
    }

    #[test]
    fn times_to_live_have_a_floor_and_a_ceiling() {
        let limits = Limits::new(&Settings::default(), &NameOptions::default());
        let own =
            NameOptions { min_ttl: Some(seconds(5)), max_ttl: Some(seconds(20)), ..NameOptions::default() };
        let own = Limits::new(&Settings::default(), &own);
        let often = NameOptions { refresh: Some(seconds(600)), ..NameOptions::default() };
        let often = Limits::new(&Settings::default(), &often);
        let fixed = NameOptions { refresh: Some(seconds(7)), ..NameOptions::default() };
        let fixed = Limits::new(&Settings::default(), &fixed);
        for (limits, ttl, positive, negative) in [
            (limits, seconds(0), 1, 1),
            (limits, seconds(40), 40, 30),
            (limits, Duration::MAX, 300, 30),
            (own, seconds(0), 5, 5),
            (own, seconds(40), 20, 20),
            (fixed, seconds(0), 7, 1),
            (fixed, seconds(1000), 7, 30),
            (often, seconds(1000), 600, 30),
        ] {
            let asked = limits.positive(ttl);
            assert!(
                asked >= seconds(positive) && asked <= seconds(positive).mul_f64(1.1),
                "{ttl:?}: {asked:?}"
            );
            assert_eq!(limits.negative(ttl), seconds(negative), "{ttl:?}");
        }
    }
}
