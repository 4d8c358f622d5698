//! What TPROXY needs besides rules: packets with its mark are looked up in a table by which every address is this machine,
//! so that replies to the sidecar's connections, which bear its clients' addresses, reach it.

use serde_json::Value;

use config::capture::{Capture, Mode};

use super::CaptureError;
use super::iptables::Family;
use super::tool::Tool;

/// Before the system's own rules for `main`.
const PREFERENCE: &str = "15006";

fn flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

fn everything(family: Family) -> &'static str {
    match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    }
}

/// The commands, for people.
pub fn print(capture: &Capture) -> Vec<String> {
    if capture.mode != Mode::Tproxy {
        return Vec::new();
    }
    let (mark, table) = (capture.tproxy_mark, capture.tproxy_table);
    let commands = Family::ALL.map(|family| {
        let flag = flag(family);
        [
            format!("ip {flag} route replace local {} dev lo table {table}", everything(family)),
            format!("ip {flag} rule add fwmark {mark} lookup {table} preference {PREFERENCE}"),
        ]
    });
    commands.into_iter().flatten().collect()
}

/// Makes routes and rules what `capture` says.
///
/// # Errors
/// `ip` is not there or refuses.
pub async fn install(capture: &Capture) -> Result<(), CaptureError> {
    if capture.mode != Mode::Tproxy {
        return Ok(());
    }
    let ip = Tool::need("ip", "iproute2")?;
    let (mark, table) = (capture.tproxy_mark.to_string(), capture.tproxy_table.to_string());
    for family in Family::ALL {
        let (flag, all) = (flag(family), everything(family));
        ip.run(&[flag, "route", "replace", "local", all, "dev", "lo", "table", &table], "").await?;
        if standing_rules(&ip, family).await?.iter().any(|rule| is(rule, capture)) {
            continue;
        }
        // One of ours with another mark or table is from former settings.
        forget(&ip, family).await?;
        let add = [flag, "rule", "add", "fwmark", &mark, "lookup", &table, "preference", PREFERENCE];
        ip.run(&add, "").await?;
    }
    Ok(())
}

/// Takes rules and routes away. Fine if there are none.
///
/// # Errors
/// `ip` refuses.
pub async fn remove() -> Result<(), CaptureError> {
    let Some(ip) = Tool::find("ip") else { return Ok(()) };
    for family in Family::ALL {
        forget(&ip, family).await?;
    }
    Ok(())
}

/// What is missing, in words.
///
/// # Errors
/// `ip` is not there or refuses.
pub async fn check(capture: &Capture) -> Result<Vec<String>, CaptureError> {
    let mut differences = Vec::new();
    let ip = match Tool::find("ip") {
        Some(ip) => ip,
        None if capture.mode == Mode::Tproxy => {
            return Err(CaptureError::Missing { tool: "ip", package: "iproute2" });
        }
        None => return Ok(differences),
    };
    let table = capture.tproxy_table.to_string();
    for family in Family::ALL {
        let rules = standing_rules(&ip, family).await?;
        if capture.mode != Mode::Tproxy {
            if !rules.is_empty() {
                differences
                    .push(format!("a routing rule for TPROXY stands and none should ({})", family.name()));
            }
            continue;
        }
        if !rules.iter().any(|rule| is(rule, capture)) {
            differences.push(format!(
                "the routing rule `fwmark {} lookup {table}` is missing ({})",
                capture.tproxy_mark,
                family.name()
            ));
        }
        // A table that was never used does not exist, which is an error to ip.
        let routes =
            ip.run(&[flag(family), "-j", "route", "show", "table", &table], "").await.unwrap_or_default();
        let routes: Vec<Value> = serde_json::from_str(&routes).unwrap_or_default();
        let to_us =
            |route: &Value| route["type"] == "local" && route["dst"] == "default" && route["dev"] == "lo";
        if !routes.iter().any(to_us) {
            differences.push(format!(
                "the route `local default dev lo table {table}` is missing ({})",
                family.name()
            ));
        }
    }
    Ok(differences)
}

/// Our rules, told by their preference.
async fn standing_rules(ip: &Tool, family: Family) -> Result<Vec<Value>, CaptureError> {
    let listed = ip.run(&[flag(family), "-j", "rule"], "").await?;
    let listed: Vec<Value> =
        serde_json::from_str(&listed).map_err(|_| CaptureError::Unreadable { tool: "ip" })?;
    let ours = |rule: &Value| {
        let preference = rule.get("priority").map(Value::to_string);
        preference.as_deref() == Some(PREFERENCE) && rule.get("fwmark").is_some()
    };
    Ok(listed.into_iter().filter(ours).collect())
}

fn is(rule: &Value, capture: &Capture) -> bool {
    let text = |name| rule.get(name).and_then(Value::as_str);
    let mark = text("fwmark").and_then(|mark| mark.parse().ok());
    text("table") == Some(&*capture.tproxy_table.to_string()) && mark == Some(capture.tproxy_mark)
}

async fn forget(ip: &Tool, family: Family) -> Result<(), CaptureError> {
    for rule in standing_rules(ip, family).await? {
        ip.run(&[flag(family), "rule", "del", "preference", PREFERENCE], "").await?;
        if let Some(table) = rule.get("table").and_then(Value::as_str) {
            let all = everything(family);
            // The route may be gone already, and with it the table.
            let _ =
                ip.run(&[flag(family), "route", "del", "local", all, "dev", "lo", "table", table], "").await;
        }
    }
    Ok(())
}
