//! What is printed for people.

use certs::ca::proto::{Blocker, RotationStatus, StatusReply};

use super::{ATTENTION, BLOCKED, IN_PROGRESS, OK};
use crate::output::{Colour, count, line, painted};

/// `3 h`, `12 d`; what is over says so.
pub fn left(until: u64, now: u64) -> String {
    if until <= now {
        return format!("ended {} ago", span(now - until));
    }
    format!("{} left", span(until - now))
}

pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

fn number(number: u64, what: &str) -> String {
    count(usize::try_from(number).unwrap_or(usize::MAX), what)
}

/// Everything on one screen.
pub fn status(status: &StatusReply) {
    let now = status.now;
    let fleet = status.fleet.clone().unwrap_or_default();
    let leads = if status.leads { "leads" } else { "follows" };
    line(format_args!(
        "{}  bundle generation {}, replica {} {leads}",
        status.trust_domain, status.generation, status.replica
    ));
    if !status.problem.is_empty() {
        line(format_args!("  {}", painted(&status.problem, Colour::Red)));
    }
    if !status.overdue.is_empty() {
        line(format_args!("  {}", painted(&status.overdue, Colour::Red)));
    }
    for one in &status.replicas {
        let level = match one.ahead {
            0 => "level".to_owned(),
            ahead @ 1.. => format!("{ahead} changes ahead"),
            behind => format!("{} changes behind", -behind),
        };
        line(format_args!(
            "  replica {}: {level}, seen {} ago",
            one.name,
            span(now.saturating_sub(one.seen))
        ));
    }
    line(format_args!("\nroots"));
    for root in &status.roots {
        let colour = match root.state.as_str() {
            "active" if root.not_after > now => Colour::Green,
            "distrusted" | "active" => Colour::Red,
            _ => Colour::Dim,
        };
        let key = match root.kept.as_str() {
            _ if root.key => String::new(),
            "" => ", key not here".to_owned(),
            "elsewhere" => ", key elsewhere".to_owned(),
            kept => format!(", key at {kept}"),
        };
        let note = if root.note.is_empty() { String::new() } else { format!("  ({})", root.note) };
        line(format_args!(
            "  {}  {}  {}{key}{note}",
            short(&root.fingerprint),
            painted(&format!("{:<10}", root.state), colour),
            left(root.not_after, now)
        ));
    }
    line(format_args!("\nissuers"));
    for issuer in status.issuers.iter().filter(|issuer| issuer.state != "retired" || issuer.leaves > 0) {
        let colour = if issuer.state == "signing" { Colour::Green } else { Colour::Dim };
        line(format_args!(
            "  {}  {}  {}, {} (root {})",
            short(&issuer.id),
            painted(&format!("{:<10}", issuer.state), colour),
            left(issuer.not_after, now),
            number(issuer.leaves, "certificate"),
            short(&issuer.root)
        ));
    }
    line(format_args!("\nworkloads"));
    line(format_args!(
        "  {} live, {} absent with a valid certificate, {} with generation {}",
        fleet.live, fleet.absent, fleet.current, status.generation
    ));
    if fleet.silent > 0 {
        line(format_args!("  {} of the absent never confirm: they speak Istio's API", fleet.silent));
    }
    if let [fresh, first, second, last] = fleet.by_age.as_slice()
        && fleet.live > 0
    {
        line(format_args!(
            "  age of certificates: {fresh} in the first quarter of their life, {first} in the second, {second} in the third, {last} in the last"
        ));
        match fleet.first_end.saturating_sub(now) {
            0 => line(format_args!("  {}", painted("the first has ended", Colour::Red))),
            left => line(format_args!("  the first ends in {}", span(left))),
        }
    }
    line(format_args!(
        "  {} in 10 min, {} for want of trust",
        number(fleet.handshakes, "handshake"),
        fleet.failures
    ));
    for one in &fleet.listed {
        let mut says =
            format!("generation {}, seen {} ago", one.generation, span(now.saturating_sub(one.seen)));
        if !one.refused.is_empty() {
            says = format!("{says}, says: {}", one.refused);
        }
        line(format_args!("  {} ({})  {says}", one.id, one.identity));
    }
    for one in &status.observers {
        line(format_args!("  {} {} has to confirm, has generation {}", one.kind, one.name, one.generation));
    }
    if !status.revocations.is_empty() {
        line(format_args!("\nrevoked"));
        for one in &status.revocations {
            line(format_args!("  {}  by {}: {}", one.what, one.by, one.reason));
        }
    }
    if let Some(rehearsal) = &status.rehearsal {
        line(format_args!(
            "\nrehearsal: {} of {} have generation {}",
            rehearsal.confirmed, rehearsal.of, rehearsal.generation
        ));
    }
    match &status.rotation {
        Some(rotation) => {
            line(format_args!(""));
            self::rotation(rotation, now);
        }
        None if has_ended(status) => line(format_args!(
            "\n{}: nobody believes anybody; `postern certs recover --new-root --reason TEXT` mends it",
            painted("ended", Colour::Red)
        )),
        None => {
            let next = if status.due == 0 {
                "nothing is exchanged by itself".to_owned()
            } else {
                format!(
                    "the {} is exchanged by its age in {}",
                    status.due_kind,
                    span(status.due.saturating_sub(now))
                )
            };
            line(format_args!("\n{}; {next}", painted("steady", Colour::Green)));
        }
    }
}

/// One rotation with everything that is in its way.
pub fn rotation(rotation: &RotationStatus, now: u64) {
    line(format_args!("{}", progress(rotation, now)));
    blockers(&rotation.blockers);
}

/// One line about how far it is.
pub fn progress(rotation: &RotationStatus, now: u64) -> String {
    if !rotation.ended.is_empty() {
        let last = rotation.events.last().map(|event| event.note.clone()).unwrap_or_default();
        return format!("{} rotation {}: {} ({last})", rotation.kind, rotation.id, rotation.ended);
    }
    let mut told = format!("{} rotation {}: {}", rotation.kind, rotation.id, rotation.state);
    if !rotation.paused_in.is_empty() {
        told = format!("{told} in {}", rotation.paused_in);
    }
    told = format!(
        "{told} for {}, {} {} of {}",
        span(now.saturating_sub(rotation.entered)),
        bar(rotation),
        rotation.done,
        rotation.of
    );
    if rotation.quiet_until > now {
        told = format!("{told}, quiet for {} more", span(rotation.quiet_until - now));
    }
    if !rotation.for_whom.is_empty() {
        told = format!("{told}, {}", rotation.for_whom);
    }
    told
}

fn bar(rotation: &RotationStatus) -> String {
    const WIDTH: u64 = 20;
    let full = (rotation.done * WIDTH).checked_div(rotation.of).unwrap_or(WIDTH);
    (0..WIDTH).map(|place| if place < full { '#' } else { '.' }).collect()
}

/// What is in the way, who, and what to do.
pub fn blockers(blockers: &[Blocker]) {
    for blocker in blockers {
        line(format_args!(
            "  {} {}",
            painted(&format!("interlock {}:", blocker.interlock), Colour::Red),
            blocker.what
        ));
        for culprit in blocker.culprits.iter().take(10) {
            line(format_args!("    {}  {}", culprit.who, culprit.why));
        }
        if blocker.culprits.len() > 10 {
            line(format_args!("    and {} more (-o json has all)", blocker.culprits.len() - 10));
        }
        line(format_args!("    {}", painted(&blocker.way, Colour::Dim)));
    }
}

/// Whether the root or the issuer that is in use has come to its end.
fn has_ended(status: &StatusReply) -> bool {
    let root = status.roots.iter().filter(|root| root.state == "active").map(|root| root.not_after);
    let issuer =
        status.issuers.iter().filter(|issuer| issuer.state == "signing").map(|issuer| issuer.not_after);
    root.chain(issuer).any(|end| end <= status.now)
}

/// The exit code of a status.
pub fn code(status: &StatusReply) -> u8 {
    if !status.problem.is_empty() || !status.overdue.is_empty() || has_ended(status) {
        return ATTENTION;
    }
    match &status.rotation {
        None => OK,
        Some(rotation) if rotation.state == "PAUSED" => ATTENTION,
        Some(rotation) if rotation.blockers.is_empty() => IN_PROGRESS,
        Some(_) => BLOCKED,
    }
}
