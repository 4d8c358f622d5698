//! The same capture for a system that has iptables and no nft: two chains of our own in the table `nat`, for IPv4 and for
//! IPv6. What `iptables-restore` gets is one transaction for each of the two.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::CaptureError;
use super::rules::{Act, Chain, Hook, Match, Rule};
use super::tool::Tool;

/// Ports in one rule; the module multiport takes no more, and a range counts twice.
const PORTS: usize = 15;

/// Seconds to wait for another program that holds the lock.
const WAIT: &str = "5";

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

/// The programs of one family.
#[derive(Clone, Debug)]
struct Tables {
    restore: Tool,
    save: Tool,
}

impl Tables {
    fn need(family: Family) -> Result<Self, CaptureError> {
        let (restore, save) = match family {
            Family::V4 => ("iptables-restore", "iptables-save"),
            Family::V6 => ("ip6tables-restore", "ip6tables-save"),
        };
        let package = "nftables (or iptables)";
        Ok(Self { restore: Tool::need(restore, package)?, save: Tool::need(save, package)? })
    }

    async fn apply(&self, text: &str) -> Result<(), CaptureError> {
        self.restore.run(&["--noflush", "-w", WAIT], text).await.map(drop)
    }

    /// The lines of the table `nat` that are ours, as they stand.
    async fn ours(&self) -> Result<Vec<String>, CaptureError> {
        let saved = self.save.run(&["-t", "nat"], "").await?;
        Ok(saved
            .lines()
            .filter(|line| line.starts_with("-A ") && line.contains("POSTERN_"))
            .map(str::to_owned)
            .collect())
    }
}

/// The chain of the system it hangs in, and its own name.
fn names(hook: Hook) -> Option<(&'static str, &'static str)> {
    match hook {
        Hook::NatPrerouting => Some(("PREROUTING", "POSTERN_INBOUND")),
        Hook::NatOutput => Some(("OUTPUT", "POSTERN_OUTBOUND")),
        Hook::ManglePrerouting | Hook::RouteOutput => None,
    }
}

/// The lines that have to stand, in the words of `iptables-save`, so that they can be compared with what it says.
///
/// # Errors
/// TPROXY is done with nft only.
pub fn lines(chains: &[Chain], family: Family) -> Result<Vec<String>, CaptureError> {
    let (mut jumps, mut lines) = (Vec::new(), Vec::new());
    for chain in chains {
        let (system, own) = names(chain.hook).ok_or(CaptureError::OnlyNft)?;
        jumps.push(format!("-A {system} -p tcp -j {own}"));
        for rule in &chain.rules {
            lines.extend(written(rule, family).into_iter().map(|rule| format!("-A {own} {rule}")));
        }
    }
    jumps.append(&mut lines);
    Ok(jumps)
}

/// The text for `iptables-restore --noflush`; naming a chain empties it. A jump that stands is not made a second time.
fn text(lines: &[String], standing: &[String]) -> String {
    let mut text = String::from("*nat\n");
    let own = ["POSTERN_INBOUND", "POSTERN_OUTBOUND"];
    for chain in own {
        let _ = writeln!(text, ":{chain} - [0:0]");
    }
    let is_jump = |line: &str| !own.iter().any(|own| line.starts_with(&format!("-A {own} ")));
    // A jump that stands twice, or differs, goes.
    let mut seen = HashSet::new();
    for line in standing.iter().filter(|line| is_jump(line)) {
        if !lines.contains(line) || !seen.insert(line) {
            let _ = writeln!(text, "-D {}", line.trim_start_matches("-A "));
        }
    }
    for line in lines.iter().filter(|line| !(is_jump(line) && seen.contains(line))) {
        let _ = writeln!(text, "{line}");
    }
    text.push_str("COMMIT\n");
    text
}

/// What is printed: the text for an empty table.
///
/// # Errors
/// As [`lines`].
pub fn print(chains: &[Chain], family: Family) -> Result<String, CaptureError> {
    Ok(text(&lines(chains, family)?, &[]))
}

/// One rule of ours is as many of theirs as it has networks and groups of ports.
fn written(rule: &Rule, family: Family) -> Vec<String> {
    let protocol =
        rule.matches.iter().any(|condition| matches!(condition, Match::Port(_) | Match::Tcp(true)));
    let mut networks = vec![String::new()];
    let (mut interface, mut rest) = (String::new(), vec![String::new()]);
    for condition in &rule.matches {
        let option = |flag: &str, of: Vec<String>| -> Vec<String> {
            of.into_iter()
                .map(|net| if net.ends_with("/0") { String::new() } else { format!("{flag} {net} ") })
                .collect()
        };
        match condition {
            // Only TCP jumps here.
            Match::Tcp(false) => return Vec::new(),
            Match::Tcp(true) => {}
            Match::FromLoopback => interface.push_str("-i lo "),
            Match::ToLoopback => interface.push_str("-o lo "),
            Match::NotForUs => rest = vec!["-m addrtype ! --dst-type LOCAL ".to_owned()],
            Match::From4(nets) if family == Family::V4 => networks = option("-s", told(&nets.networks())),
            Match::To4(nets) if family == Family::V4 => networks = option("-d", told(&nets.networks())),
            Match::From6(nets) if family == Family::V6 => networks = option("-s", told(&nets.networks())),
            Match::To6(nets) if family == Family::V6 => networks = option("-d", told(&nets.networks())),
            Match::From4(_) | Match::To4(_) | Match::From6(_) | Match::To6(_) => return Vec::new(),
            Match::Port(ports) => rest = groups(ports.spans()),
            Match::New => rest = vec!["-m conntrack --ctstate NEW ".to_owned()],
            Match::Mark(mark) => rest = vec![format!("-m mark --mark {mark:#x} ")],
            Match::ConnectionMark(mark) => rest = vec![format!("-m connmark --mark {mark:#x} ")],
            Match::Uid(uid) => rest = vec![format!("-m owner --uid-owner {uid} ")],
        }
    }
    let protocol = if protocol { "-p tcp " } else { "" };
    let target = match rule.acts.last() {
        Some(Act::Redirect(port)) => format!("-j REDIRECT --to-ports {port}"),
        Some(Act::Drop) => "-j DROP".to_owned(),
        _ => "-j RETURN".to_owned(),
    };
    let mut all = Vec::new();
    for network in &networks {
        for condition in &rest {
            all.push(format!("{network}{interface}{protocol}{condition}{target}"));
        }
    }
    all
}

/// Networks as `iptables-save` tells them.
fn told<N: ToString>(networks: &[N]) -> Vec<String> {
    networks.iter().map(ToString::to_string).collect()
}

fn groups(spans: &[(u16, u16)]) -> Vec<String> {
    if let [(first, last)] = spans {
        return vec![match first == last {
            true => format!("-m tcp --dport {first} "),
            false => format!("-m tcp --dport {first}:{last} "),
        }];
    }
    let mut groups: Vec<(usize, String)> = Vec::new();
    for (first, last) in spans {
        let (weight, word) = match first == last {
            true => (1, first.to_string()),
            false => (2, format!("{first}:{last}")),
        };
        match groups.last_mut() {
            Some((room, words)) if *room + weight <= PORTS => {
                *room += weight;
                let _ = write!(words, ",{word}");
            }
            _ => groups.push((weight, word)),
        }
    }
    groups.into_iter().map(|(_, words)| format!("-m multiport --dports {words} ")).collect()
}

/// Makes the chains what `chains` say. If IPv6 is refused, IPv4 is taken back: half a capture is none.
///
/// # Errors
/// iptables is not there or refuses.
pub async fn install(chains: &[Chain]) -> Result<(), CaptureError> {
    for family in Family::ALL {
        let lines = lines(chains, family)?;
        let done = async {
            let tables = Tables::need(family)?;
            let standing = tables.ours().await?;
            tables.apply(&text(&lines, &standing)).await
        };
        if let Err(error) = done.await {
            if family == Family::V6 {
                remove_from(Family::V4).await?;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Takes the chains and the jumps to them away. Fine if there are none.
///
/// # Errors
/// iptables refuses.
pub async fn remove() -> Result<(), CaptureError> {
    for family in Family::ALL {
        remove_from(family).await?;
    }
    Ok(())
}

async fn remove_from(family: Family) -> Result<(), CaptureError> {
    let tables = Tables::need(family)?;
    let saved = tables.save.run(&["-t", "nat"], "").await?;
    let declared = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    let own: Vec<&str> = declared.filter(|chain| chain.starts_with("POSTERN_")).collect();
    if own.is_empty() {
        return Ok(());
    }
    let mut text = String::from("*nat\n");
    for jump in saved.lines().filter(|line| line.contains("-j POSTERN_")) {
        let _ = writeln!(text, "-D {}", jump.trim_start_matches("-A "));
    }
    for chain in &own {
        let _ = writeln!(text, "-F {chain}");
    }
    for chain in &own {
        let _ = writeln!(text, "-X {chain}");
    }
    text.push_str("COMMIT\n");
    tables.apply(&text).await
}

/// The lines of ours that stand.
///
/// # Errors
/// iptables is not there or refuses.
pub async fn found(family: Family) -> Result<Vec<String>, CaptureError> {
    Tables::need(family)?.ours().await
}
