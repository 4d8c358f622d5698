//! Transparent capture: a workload's connections are led to its sidecar by rules in the kernel. One table of nftables, put
//! there in one transaction; two chains of iptables where nft is not to be had; a routing rule for TPROXY. All of it can be
//! printed without privileges, compared with what stands, and taken away so that nothing is left.

pub mod iptables;
pub mod nft;
pub mod probe;
pub mod proof;
mod routes;
pub mod rules;
mod tool;

use std::io;
use std::time::Duration;

use config::capture::Capture;
use iptables::Family;
use tool::Tool;

const NEED_PRIVILEGE: &str = "it needs CAP_NET_ADMIN in this network namespace: run it as root, give the pod's init container \
    the capability NET_ADMIN, or use explicit mode, which needs no privilege";

/// What may go wrong. Each tells what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A program is not there.
    #[error("`{tool}` is not installed: install the package {package}")]
    Missing {
        /// Its name.
        tool: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// A program cannot be started.
    #[error("`{tool}` cannot be run: {error}")]
    Run {
        /// Its name.
        tool: &'static str,
        /// Why.
        error: io::Error,
    },
    /// A program does not end.
    #[error("`{tool}` did not end within {limit:?} and was stopped")]
    TimedOut {
        /// Its name.
        tool: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// A program refuses.
    #[error("`{tool}` refused: {said}; {next}")]
    Refused {
        /// Its name.
        tool: &'static str,
        /// Its words.
        said: String,
        /// What to do.
        next: &'static str,
    },
    /// A program said something that we do not know.
    #[error("what `{tool}` says cannot be understood: compare by hand with `postern sidecar capture print`")]
    Unreadable {
        /// Its name.
        tool: &'static str,
    },
    /// We may not.
    #[error("changing and reading the rules of the kernel is not permitted: {NEED_PRIVILEGE}")]
    Privilege,
    /// TPROXY without nft.
    #[error("TPROXY is done with nft only: install the package nftables, or use `mode: redirect`")]
    OnlyNft,
}

/// By what the rules are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum With {
    /// nft if it is there, else iptables.
    #[default]
    Auto,
    /// nft.
    Nft,
    /// iptables.
    Iptables,
}

/// The one that is used.
enum Backend {
    Nft(Tool),
    Iptables,
}

fn backend(with: With) -> Result<Backend, CaptureError> {
    match (with, Tool::find("nft")) {
        (With::Auto | With::Nft, Some(nft)) => Ok(Backend::Nft(nft)),
        (With::Nft, None) => Err(CaptureError::Missing { tool: "nft", package: "nftables" }),
        (With::Auto | With::Iptables, _) => {
            Tool::need("iptables-restore", "nftables (or iptables)").map(|_| Backend::Iptables)
        }
    }
}

/// Asked before any tool is, whose words would be less clear.
fn permitted() -> Result<(), CaptureError> {
    const NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    match effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()) {
        Some(bits) if bits & (1 << NET_ADMIN) == 0 => Err(CaptureError::Privilege),
        _ => Ok(()),
    }
}

/// Installs the capture, or brings one that stands up to date. Doing it twice changes nothing.
///
/// # Errors
/// Nothing has changed then, or what was changed was taken back.
pub async fn install(capture: &Capture, with: With) -> Result<&'static str, CaptureError> {
    permitted()?;
    let chains = rules::chains(capture);
    match backend(with)? {
        Backend::Nft(nft) => {
            if capture.mode == config::capture::Mode::Redirect {
                routes::remove().await?;
            }
            routes::install(capture).await?;
            if let Err(error) = nft::install(&nft, &chains).await {
                routes::remove().await?;
                return Err(error);
            }
            // A capture by iptables from before would be a second one.
            if Tool::find("iptables-restore").is_some() {
                let _ = iptables::remove().await;
            }
            Ok("nft")
        }
        Backend::Iptables => {
            iptables::install(&chains).await?;
            if let Some(nft) = Tool::find("nft") {
                let _ = nft::remove(&nft).await;
            }
            routes::remove().await?;
            Ok("iptables")
        }
    }
}

/// Takes everything away that an installation has put there, by whatever it was.
///
/// # Errors
/// A tool refuses; what it has not taken away stands.
pub async fn remove() -> Result<(), CaptureError> {
    permitted()?;
    let nft = Tool::find("nft");
    let tables = Tool::find("iptables-restore").is_some();
    if nft.is_none() && !tables {
        return Err(CaptureError::Missing { tool: "nft", package: "nftables (or iptables)" });
    }
    if let Some(nft) = &nft {
        nft::remove(nft).await?;
    }
    if tables {
        match iptables::remove().await {
            // Where there is nft, iptables may well have nothing to work with.
            Err(_) if nft.is_some() => {}
            done => done?,
        }
    }
    routes::remove().await
}

/// Compares what stands with what should: each difference in words, none if the two are the same.
///
/// # Errors
/// It cannot be looked at.
pub async fn check(capture: &Capture, with: With) -> Result<Vec<String>, CaptureError> {
    permitted()?;
    let chains = rules::chains(capture);
    let mut differences = match backend(with)? {
        Backend::Nft(nft) => match nft::found(&nft).await? {
            None => vec!["the table `inet postern` does not stand: nothing is captured".to_owned()],
            Some(found) => compare(&chains, &found),
        },
        Backend::Iptables => {
            let mut differences = Vec::new();
            for family in Family::ALL {
                let should = iptables::lines(&chains, family)?;
                let found = iptables::found(family).await?;
                let place = format!("iptables, {}", family.name());
                differences.extend(compare_lines(&place, &should, &found));
            }
            differences
        }
    };
    differences.extend(routes::check(capture).await?);
    Ok(differences)
}

fn compare(chains: &[rules::Chain], found: &[nft::Found]) -> Vec<String> {
    let mut differences = Vec::new();
    for chain in chains {
        let Some(standing) = found.iter().find(|found| found.name == chain.name) else {
            differences.push(format!("the chain `{}` is missing", chain.name));
            continue;
        };
        if standing.hook != chain.hanging() {
            differences.push(format!(
                "the chain `{}` should be `{}` and is `{}`",
                chain.name,
                chain.hanging(),
                standing.hook
            ));
        }
        if standing.policy != "accept" {
            differences.push(format!("the policy of the chain `{}` should be `accept`", chain.name));
        }
        let should: Vec<String> = chain.rules.iter().map(ToString::to_string).collect();
        let stands = standing.rules.iter().map(|rule| match rule {
            Ok(rule) => rule.to_string(),
            Err(unknown) => unknown.clone(),
        });
        let stands: Vec<String> = stands.collect();
        differences.extend(compare_lines(&format!("chain `{}`", chain.name), &should, &stands));
    }
    for extra in found.iter().filter(|found| !chains.iter().any(|chain| chain.name == found.name)) {
        differences.push(format!("there is a chain `{}` that does not belong there", extra.name));
    }
    differences
}

/// Names what is missing, what is too much, and a wrong order.
fn compare_lines(place: &str, should: &[String], stands: &[String]) -> Vec<String> {
    let mut differences = Vec::new();
    let mut unused: Vec<&String> = stands.iter().collect();
    for line in should {
        match unused.iter().position(|other| *other == line) {
            Some(index) => drop(unused.remove(index)),
            None => differences.push(format!("{place}: `{line}` is missing")),
        }
    }
    differences.extend(unused.into_iter().map(|line| format!("{place}: `{line}` does not belong there")));
    if differences.is_empty() && should != stands {
        differences.push(format!("{place}: the rules are in another order"));
    }
    differences
}

/// What `install` would do, by nft: the ruleset, and the commands for TPROXY before it.
pub fn print_nft(capture: &Capture) -> String {
    let mut text = String::new();
    for command in routes::print(capture) {
        text.push_str("# ");
        text.push_str(&command);
        text.push('\n');
    }
    text.push_str(&nft::text(&rules::chains(capture)));
    text
}

/// What `install` would do, by iptables: the inputs of `iptables-restore --noflush` and `ip6tables-restore --noflush`.
///
/// # Errors
/// TPROXY is done with nft only.
pub fn print_iptables(capture: &Capture) -> Result<String, CaptureError> {
    let chains = rules::chains(capture);
    let mut text = String::new();
    for (family, tool) in [(Family::V4, "iptables-restore"), (Family::V6, "ip6tables-restore")] {
        text.push_str(&format!("# {tool} --noflush\n{}", iptables::print(&chains, family)?));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
