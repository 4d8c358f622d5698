//! The rules of a capture, as values: what they match, what they do, and in which chain. How nft and iptables write them
//! down is the matter of those two; what is found in the kernel is compared with these.

use std::net::{Ipv4Addr, Ipv6Addr};

use config::capture::{Capture, Direction, Mode};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Addresses for documentation, which no network has. A capture redirects them to the sidecar, whoever asks, so that
/// connecting to them shows whether it stands.
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The same for IPv6.
pub const PROBE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// DNS is not captured, over TCP neither.
const DNS: u16 = 53;

/// Where a chain hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Destinations of packets that come in.
    NatPrerouting,
    /// Destinations of packets that are sent from here.
    NatOutput,
    /// Packets that come in, before their way is chosen.
    ManglePrerouting,
    /// Packets that are sent from here; their way is chosen anew.
    RouteOutput,
}

/// Rules that are gone through in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name in the table.
    pub name: &'static str,
    /// Where it hangs.
    pub hook: Hook,
    /// In order.
    pub rules: Vec<Rule>,
}

/// All of `matches` have to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For people who look at it.
    pub why: &'static str,
    /// The conditions.
    pub matches: Vec<Match>,
    /// What is done.
    pub acts: Vec<Act>,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// TCP, or everything but.
    Tcp(bool),
    /// It comes in by loopback.
    FromLoopback,
    /// It goes out by loopback.
    ToLoopback,
    /// Its destination is no address of this machine.
    NotForUs,
    /// The destination's port.
    Port(Spans<u16>),
    /// The source, IPv4.
    From4(Spans<u32>),
    /// The source, IPv6.
    From6(Spans<u128>),
    /// The destination, IPv4.
    To4(Spans<u32>),
    /// The destination, IPv6.
    To6(Spans<u128>),
    /// It begins a connection.
    New,
    /// The packet's mark.
    Mark(u32),
    /// The connection's mark.
    ConnectionMark(u32),
    /// Who owns the socket that sends it.
    Uid(u32),
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Leave it alone.
    Return,
    /// Take it as it is now.
    Accept,
    /// Let nobody have it.
    Drop,
    /// To this port of ours.
    Redirect(u16),
    /// To the socket that listens on this port, with its destination kept.
    Tproxy(u16),
    /// Mark the packet.
    SetMark(u32),
    /// Mark the connection.
    SetConnectionMark(u32),
}

/// Ranges, ascending, that neither overlap nor touch: one set has one form, however it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans<T>(Vec<(T, T)>);

/// A number with a next one.
pub trait Step: Copy + Ord {
    /// The next number, if there is one.
    fn next(self) -> Option<Self>;
}

macro_rules! step {
    ($($number:ty),*) => {$(impl Step for $number {
        fn next(self) -> Option<Self> {
            self.checked_add(1)
        }
    })*};
}

step!(u16, u32, u128);

impl<T: Step> Spans<T> {
    /// Of ranges in any order.
    pub fn new(spans: impl IntoIterator<Item = (T, T)>) -> Self {
        let mut all: Vec<(T, T)> = spans.into_iter().collect();
        all.sort_unstable();
        let mut merged: Vec<(T, T)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match merged.last_mut() {
                Some((_, end)) if end.next().is_none_or(|next| first <= next) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// One number.
    pub fn one(number: T) -> Self {
        Self(vec![(number, number)])
    }

    /// The ranges.
    pub fn spans(&self) -> &[(T, T)] {
        &self.0
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Spans<u32> {
    /// The networks that make up the ranges.
    pub fn networks(&self) -> Vec<Ipv4Net> {
        let range = |&(first, last): &(u32, u32)| ipnet::Ipv4Subnets::new(first.into(), last.into(), 0);
        self.0.iter().flat_map(range).collect()
    }
}

impl Spans<u128> {
    /// The networks that make up the ranges.
    pub fn networks(&self) -> Vec<Ipv6Net> {
        let range = |&(first, last): &(u128, u128)| ipnet::Ipv6Subnets::new(first.into(), last.into(), 0);
        self.0.iter().flat_map(range).collect()
    }
}

/// The IPv4 and IPv6 parts of a list.
fn split(networks: &[IpNet]) -> (Spans<u32>, Spans<u128>) {
    let v4 = networks.iter().filter_map(|network| match network {
        IpNet::V4(network) => Some((network.network().into(), network.broadcast().into())),
        IpNet::V6(_) => None,
    });
    let v6 = networks.iter().filter_map(|network| match network {
        IpNet::V6(network) => Some((network.network().into(), network.broadcast().into())),
        IpNet::V4(_) => None,
    });
    (Spans::new(v4), Spans::new(v6))
}

fn rule(why: &'static str, matches: impl Into<Vec<Match>>, acts: impl Into<Vec<Act>>) -> Rule {
    Rule { why, matches: matches.into(), acts: acts.into() }
}

fn skip(rules: &mut Vec<Rule>, why: &'static str, condition: Match) {
    rules.push(rule(why, [condition], [Act::Return]));
}

/// The chains that `capture` asks for.
pub fn chains(capture: &Capture) -> Vec<Chain> {
    let mut chains = Vec::new();
    if capture.takes(Direction::Inbound) {
        match capture.mode {
            Mode::Redirect => {
                chains.push(Chain { name: "inbound", hook: Hook::NatPrerouting, rules: inbound(capture) });
            }
            Mode::Tproxy => {
                chains.push(Chain { name: "inbound", hook: Hook::ManglePrerouting, rules: inbound(capture) });
                chains.push(Chain { name: "replies", hook: Hook::RouteOutput, rules: replies(capture) });
            }
        }
    }
    if capture.takes(Direction::Outbound) {
        chains.push(Chain { name: "outbound", hook: Hook::NatOutput, rules: outbound(capture) });
    }
    chains
}

fn inbound(capture: &Capture) -> Vec<Rule> {
    let port = capture.inbound_port.get();
    let mut rules = Vec::new();
    skip(&mut rules, "only TCP is captured", Match::Tcp(false));
    if capture.mode == Mode::Tproxy {
        // The sidecar's connection to the application bears the client's address; its replies have to find back.
        rules.push(rule(
            "from the sidecar to the application, as its client",
            [Match::FromLoopback, Match::Mark(capture.tproxy_mark.get())],
            [Act::SetConnectionMark(capture.tproxy_mark.get()), Act::Return],
        ));
    }
    skip(&mut rules, "inside this machine", Match::FromLoopback);
    skip(&mut rules, "only passing through", Match::NotForUs);
    let own = capture.listening().into_iter().map(|port| (port, port));
    skip(&mut rules, "the sidecar's own ports", Match::Port(Spans::new(own)));
    let ports = Spans::new(capture.skip_inbound_ports.iter().map(|ports| ports.bounds()));
    if !ports.is_empty() {
        skip(&mut rules, "skip_inbound_ports", Match::Port(ports));
    }
    let (v4, v6) = split(&capture.skip_inbound_cidrs);
    if !v4.is_empty() {
        skip(&mut rules, "skip_inbound_cidrs", Match::From4(v4));
    }
    if !v6.is_empty() {
        skip(&mut rules, "skip_inbound_cidrs", Match::From6(v6));
    }
    match capture.mode {
        Mode::Redirect => rules.push(rule("to the sidecar", [Match::Tcp(true)], [Act::Redirect(port)])),
        Mode::Tproxy => {
            rules.push(rule(
                "to the sidecar",
                [Match::Tcp(true)],
                [Act::Tproxy(port), Act::SetMark(capture.tproxy_mark.get()), Act::Accept],
            ));
            // Nobody listens: they would go on to the application, past every policy.
            rules.push(rule("there is no sidecar", [Match::New], [Act::Drop]));
        }
    }
    rules
}

fn replies(capture: &Capture) -> Vec<Rule> {
    let mark = capture.tproxy_mark.get();
    vec![rule(
        "from the application to the sidecar, which looks like its client",
        [Match::ConnectionMark(mark)],
        [Act::SetMark(mark)],
    )]
}

fn outbound(capture: &Capture) -> Vec<Rule> {
    let port = capture.outbound_port.get();
    let mut rules = Vec::new();
    skip(&mut rules, "only TCP is captured", Match::Tcp(false));
    for condition in [Match::To4(Spans::one(PROBE_V4.into())), Match::To6(Spans::one(PROBE_V6.into()))] {
        rules.push(rule(
            "by this the capture is tried",
            [condition, Match::Port(Spans::one(port))],
            [Act::Redirect(port)],
        ));
    }
    skip(&mut rules, "inside this machine", Match::ToLoopback);
    if let Some(mark) = capture.mark {
        skip(&mut rules, "from the sidecar", Match::Mark(mark.get()));
    }
    if capture.mode == Mode::Tproxy {
        skip(&mut rules, "from the sidecar, as a client", Match::Mark(capture.tproxy_mark.get()));
    }
    if let Some(uid) = capture.bypass_uid() {
        skip(&mut rules, "from the sidecar", Match::Uid(uid));
    }
    skip(&mut rules, "DNS", Match::Port(Spans::one(DNS)));
    let ports = Spans::new(capture.skip_outbound_ports.iter().map(|ports| ports.bounds()));
    if !ports.is_empty() {
        skip(&mut rules, "skip_outbound_ports", Match::Port(ports));
    }
    let (v4, v6) = split(&capture.skip_outbound_cidrs);
    if !v4.is_empty() {
        skip(&mut rules, "skip_outbound_cidrs", Match::To4(v4));
    }
    if !v6.is_empty() {
        skip(&mut rules, "skip_outbound_cidrs", Match::To6(v6));
    }
    rules.push(rule("to the sidecar", [Match::Tcp(true)], [Act::Redirect(port)]));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_direction_is_captured_without_the_other() {
        let names = |only| -> Vec<&str> {
            let capture = Capture { only, ..Capture::default() };
            chains(&capture).iter().map(|chain| chain.name).collect()
        };
        assert_eq!(names(None), ["inbound", "outbound"]);
        assert_eq!(names(Some(Direction::Inbound)), ["inbound"]);
        assert_eq!(names(Some(Direction::Outbound)), ["outbound"]);
    }

    #[test]
    fn a_set_has_one_form() {
        #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
        let cases: [(&[(u16, u16)], &[(u16, u16)]); 6] = [
            (&[], &[]),
            (&[(5, 5), (1, 2)], &[(1, 2), (5, 5)]),
            (&[(1, 2), (3, 4)], &[(1, 4)]),
            (&[(1, 9), (3, 4)], &[(1, 9)]),
            (&[(1, 65535), (7, 7)], &[(1, 65535)]),
            (&[(1, 1), (1, 1), (3, 3)], &[(1, 1), (3, 3)]),
        ];
        for (given, told) in cases {
            assert_eq!(Spans::new(given.iter().copied()).spans(), told, "{given:?}");
        }
    }

    #[test]
    fn ranges_are_told_as_networks() {
        let networks = ["10.0.0.0/9", "10.128.0.0/9", "11.0.0.0/9"].map(|text| text.parse().unwrap());
        let (v4, v6) = split(&networks);
        let told: Vec<String> = v4.networks().iter().map(ToString::to_string).collect();
        assert_eq!(told, ["10.0.0.0/8", "11.0.0.0/9"]);
        assert!(v6.is_empty());
        let (_, v6) = split(&["::/0".parse().unwrap(), "fd00::/8".parse().unwrap()]);
        assert_eq!(v6.networks().iter().map(ToString::to_string).collect::<Vec<_>>(), ["::/0"]);
    }
}
