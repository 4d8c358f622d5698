//! The capture as one table of nftables, written, installed and read back. A file that nft is given is one transaction:
//! either all of it stands afterwards, or nothing has changed.

use std::fmt::{self, Display, Write as _};
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::CaptureError;
use super::rules::{Act, Chain, Hook, Match, Rule, Spans};
use super::tool::Tool;

/// The table; nothing else of the system's is touched.
const TABLE: &str = "postern";

impl Hook {
    /// Type, hook and priority.
    fn words(self) -> (&'static str, &'static str, i64) {
        match self {
            // Where the system's own translations of destinations are.
            Hook::NatPrerouting => ("nat", "prerouting", -100),
            Hook::NatOutput => ("nat", "output", -100),
            Hook::ManglePrerouting => ("filter", "prerouting", -150),
            Hook::RouteOutput => ("route", "output", -150),
        }
    }
}

/// The whole file. The table is made if it is not there, so that it can be deleted, and is then made anew: all of that in
/// one transaction, whatever stood before.
pub fn text(chains: &[Chain]) -> String {
    let mut text = removal();
    let _ = writeln!(text, "table inet {TABLE} {{");
    for (index, chain) in chains.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        let (kind, hook, priority) = chain.hook.words();
        let _ = writeln!(text, "    chain {} {{", chain.name);
        let _ = writeln!(text, "        type {kind} hook {hook} priority {priority}; policy accept;");
        for rule in &chain.rules {
            let _ = writeln!(text, "        {rule} comment \"{}\"", rule.why);
        }
        text.push_str("    }\n");
    }
    text.push_str("}\n");
    text
}

fn removal() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

impl Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        for (index, act) in self.acts.iter().enumerate() {
            if index > 0 {
                f.write_char(' ')?;
            }
            write!(f, "{act}")?;
        }
        Ok(())
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Match::Tcp(true) => f.write_str("meta l4proto tcp"),
            Match::Tcp(false) => f.write_str("meta l4proto != tcp"),
            Match::FromLoopback => f.write_str("iifname \"lo\""),
            Match::ToLoopback => f.write_str("oifname \"lo\""),
            Match::NotForUs => f.write_str("fib daddr type != local"),
            Match::Port(ports) => {
                let span = |&(first, last): &(u16, u16)| match first == last {
                    true => first.to_string(),
                    false => format!("{first}-{last}"),
                };
                write!(f, "tcp dport {}", set(ports.spans().iter().map(span)))
            }
            Match::From4(nets) => write!(f, "ip saddr {}", set(nets.networks().into_iter().map(v4))),
            Match::From6(nets) => write!(f, "ip6 saddr {}", set(nets.networks().into_iter().map(v6))),
            Match::To4(nets) => write!(f, "ip daddr {}", set(nets.networks().into_iter().map(v4))),
            Match::To6(nets) => write!(f, "ip6 daddr {}", set(nets.networks().into_iter().map(v6))),
            Match::New => f.write_str("ct state new"),
            Match::Mark(mark) => write!(f, "meta mark {mark:#x}"),
            Match::ConnectionMark(mark) => write!(f, "ct mark {mark:#x}"),
            Match::Uid(uid) => write!(f, "meta skuid {uid}"),
        }
    }
}

impl Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Return => f.write_str("return"),
            Act::Accept => f.write_str("accept"),
            Act::Drop => f.write_str("drop"),
            Act::Redirect(port) => write!(f, "redirect to :{port}"),
            Act::Tproxy(port) => write!(f, "tproxy to :{port}"),
            Act::SetMark(mark) => write!(f, "meta mark set {mark:#x}"),
            Act::SetConnectionMark(mark) => write!(f, "ct mark set {mark:#x}"),
        }
    }
}

fn v4(network: ipnet::Ipv4Net) -> String {
    if network.prefix_len() == 32 { network.addr().to_string() } else { network.to_string() }
}

fn v6(network: ipnet::Ipv6Net) -> String {
    if network.prefix_len() == 128 { network.addr().to_string() } else { network.to_string() }
}

/// One element as it is, more in braces.
fn set(elements: impl Iterator<Item = String>) -> String {
    let elements: Vec<String> = elements.collect();
    match elements.as_slice() {
        [one] => one.clone(),
        all => format!("{{ {} }}", all.join(", ")),
    }
}

/// Makes the kernel's table what `chains` say.
///
/// # Errors
/// nft is refused; nothing has changed then.
pub async fn install(nft: &Tool, chains: &[Chain]) -> Result<(), CaptureError> {
    nft.run(&["-f", "-"], &text(chains)).await.map(drop)
}

/// Takes the table away. Fine if there is none.
///
/// # Errors
/// nft is refused.
pub async fn remove(nft: &Tool) -> Result<(), CaptureError> {
    nft.run(&["-f", "-"], &removal()).await.map(drop)
}

/// A chain as it stands in the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Type, hook and priority in words, or that it hangs nowhere.
    pub hook: String,
    /// What it does with what no rule decides.
    pub policy: String,
    /// Its rules. One that no capture has is told as nft tells it.
    pub rules: Vec<Result<Rule, String>>,
}

/// The table as it stands, or `None` if there is none.
///
/// # Errors
/// nft is refused, or says what cannot be read.
pub async fn found(nft: &Tool) -> Result<Option<Vec<Found>>, CaptureError> {
    let listed = match nft.run(&["-j", "list", "table", "inet", TABLE], "").await {
        Ok(listed) => listed,
        Err(CaptureError::Refused { said, .. }) if said.contains("No such file or directory") => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    read(&listed).map(Some).ok_or(CaptureError::Unreadable { tool: "nft" })
}

/// Reads what `nft -j list table` says.
fn read(listed: &str) -> Option<Vec<Found>> {
    let listed: Value = serde_json::from_str(listed).ok()?;
    let objects = listed.get("nftables")?.as_array()?;
    let mut chains: Vec<Found> = Vec::new();
    for chain in objects.iter().filter_map(|object| object.get("chain")) {
        let word = |key| chain.get(key).and_then(Value::as_str);
        let hook = match (word("type"), word("hook"), chain.get("prio").and_then(Value::as_i64)) {
            (Some(kind), Some(hook), Some(priority)) => hanging((kind, hook, priority)),
            _ => "nowhere".to_owned(),
        };
        let policy = word("policy").unwrap_or("accept").to_owned();
        chains.push(Found { name: word("name")?.to_owned(), hook, policy, rules: Vec::new() });
    }
    for rule in objects.iter().filter_map(|object| object.get("rule")) {
        let name = rule.get("chain")?.as_str()?;
        let expressions = rule.get("expr")?.as_array()?;
        let chain = chains.iter_mut().find(|chain| chain.name == name)?;
        chain.rules.push(read_rule(expressions).ok_or_else(|| rule.get("expr").unwrap_or(rule).to_string()));
    }
    Some(chains)
}

/// How a chain that hangs somewhere is told.
pub fn hanging((kind, hook, priority): (&str, &str, i64)) -> String {
    format!("type {kind} hook {hook} priority {priority}")
}

impl Chain {
    /// How it is told where it hangs.
    pub fn hanging(&self) -> String {
        hanging(self.hook.words())
    }
}

fn read_rule(expressions: &[Value]) -> Option<Rule> {
    let mut rule = Rule { why: "", matches: Vec::new(), acts: Vec::new() };
    for expression in expressions {
        let (key, value) = expression.as_object()?.iter().next()?;
        match key.as_str() {
            "match" => rule.matches.push(read_match(value)?),
            "return" => rule.acts.push(Act::Return),
            "accept" => rule.acts.push(Act::Accept),
            "drop" => rule.acts.push(Act::Drop),
            "redirect" if is_port_alone(value) => rule.acts.push(Act::Redirect(port(value)?)),
            "tproxy" if is_port_alone(value) => rule.acts.push(Act::Tproxy(port(value)?)),
            "mangle" => {
                let mark = u32::try_from(value.get("value")?.as_u64()?).ok()?;
                let key = value.get("key")?;
                rule.acts.push(match (key.pointer("/meta/key"), key.pointer("/ct/key")) {
                    (Some(key), None) if key == "mark" => Act::SetMark(mark),
                    (None, Some(key)) if key == "mark" => Act::SetConnectionMark(mark),
                    _ => return None,
                });
            }
            // It counts what passes, and changes nothing.
            "counter" => {}
            _ => return None,
        }
    }
    Some(rule)
}

fn is_port_alone(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.len() == 1)
}

fn port(value: &Value) -> Option<u16> {
    value.get("port")?.as_u64()?.try_into().ok()
}

fn read_match(value: &Value) -> Option<Match> {
    let is_state = value.pointer("/left/ct/key").is_some_and(|key| key == "state");
    if is_state {
        let new = value.get("op")? == "in" && value.get("right")? == "new";
        return new.then_some(Match::New);
    }
    let same = match value.get("op")?.as_str()? {
        "==" => true,
        "!=" => false,
        _ => return None,
    };
    let (left, right) = (value.get("left")?, value.get("right")?);
    let number = || right.as_u64().and_then(|number| u32::try_from(number).ok());
    if left.get("fib").is_some() {
        let of_destination = left.pointer("/fib/flags") == Some(&Value::from(vec!["daddr"]));
        let wanted = of_destination && left.pointer("/fib/result")? == "type" && right == "local" && !same;
        return wanted.then_some(Match::NotForUs);
    }
    if let Some(key) = left.pointer("/meta/key") {
        return match (key.as_str()?, same) {
            ("l4proto", same) if right == "tcp" => Some(Match::Tcp(same)),
            ("iifname", true) if right == "lo" => Some(Match::FromLoopback),
            ("oifname", true) if right == "lo" => Some(Match::ToLoopback),
            ("mark", true) => Some(Match::Mark(number()?)),
            ("skuid", true) => Some(Match::Uid(number()?)),
            _ => None,
        };
    }
    if left.pointer("/ct/key").is_some_and(|key| key == "mark") && same {
        return Some(Match::ConnectionMark(number()?));
    }
    let field = |name| left.pointer(name).and_then(Value::as_str);
    if !same {
        return None;
    }
    match (field("/payload/protocol")?, field("/payload/field")?) {
        ("tcp", "dport") => {
            let spans = elements(right).into_iter().map(port_span);
            Some(Match::Port(Spans::new(spans.collect::<Option<Vec<_>>>()?)))
        }
        ("ip", "saddr") => Some(Match::From4(spans4(right)?)),
        ("ip", "daddr") => Some(Match::To4(spans4(right)?)),
        ("ip6", "saddr") => Some(Match::From6(spans6(right)?)),
        ("ip6", "daddr") => Some(Match::To6(spans6(right)?)),
        _ => None,
    }
}

fn elements(right: &Value) -> Vec<&Value> {
    match right.get("set").and_then(Value::as_array) {
        Some(all) => all.iter().collect(),
        None => vec![right],
    }
}

fn port_span(element: &Value) -> Option<(u16, u16)> {
    let number = |value: &Value| value.as_u64().and_then(|number| u16::try_from(number).ok());
    match element.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        Some([first, last]) => Some((number(first)?, number(last)?)),
        _ => number(element).map(|port| (port, port)),
    }
}

fn address_span(element: &Value) -> Option<(IpAddr, IpAddr)> {
    let address = |value: &Value| value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
    if let Some([first, last]) = element.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        return Some((address(first)?, address(last)?));
    }
    if let Some(prefix) = element.get("prefix") {
        let length = prefix.get("len")?.as_u64()?.try_into().ok()?;
        let network = IpNet::new(address(prefix.get("addr")?)?, length).ok()?;
        return Some((network.network(), network.broadcast()));
    }
    address(element).map(|one| (one, one))
}

fn spans4(right: &Value) -> Option<Spans<u32>> {
    let span = |element| match address_span(element)? {
        (IpAddr::V4(first), IpAddr::V4(last)) => Some((first.into(), last.into())),
        _ => None,
    };
    Some(Spans::new(elements(right).into_iter().map(span).collect::<Option<Vec<_>>>()?))
}

fn spans6(right: &Value) -> Option<Spans<u128>> {
    let span = |element| match address_span(element)? {
        (IpAddr::V6(first), IpAddr::V6(last)) => Some((first.into(), last.into())),
        _ => None,
    };
    Some(Spans::new(elements(right).into_iter().map(span).collect::<Option<Vec<_>>>()?))
}
