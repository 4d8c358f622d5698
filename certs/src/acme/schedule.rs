//! When something is to be done for a set of names. Functions of what is remembered and of the time.

use std::time::Duration;

use super::{Record, Seconds};

/// The longest pause after an authority has refused.
pub(super) const LONGEST_REFUSED: Duration = Duration::from_secs(6 * 3600);
/// The longest pause while it cannot be reached, which costs nobody anything.
pub(super) const LONGEST_UNREACHED: Duration = Duration::from_secs(10 * 60);

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// An order.
    Order,
    /// To ask the authority when it wants the certificate renewed.
    Hints,
    /// Nothing before this moment.
    At(Seconds),
}

/// What there is to do for names of which this is remembered, by the instance `own`.
pub(super) fn due(record: Option<&Record>, own: &str, now: Seconds) -> Due {
    let Some(record) = record else { return Due::Order };
    // What this instance began and is not at any more was cut off by its end.
    if let Some(work) = record.at_work(now).filter(|work| work.by != own) {
        return Due::At(work.until);
    }
    if record.asked {
        return Due::Order;
    }
    let held = record.failed.as_ref().map(|failed| failed.next).filter(|next| *next > now);
    match (&record.certificate, held) {
        (None, None) => Due::Order,
        (None, Some(next)) => Due::At(next),
        (Some(certificate), held) if certificate.renew <= now => held.map_or(Due::Order, Due::At),
        (Some(certificate), _) => match certificate.hints {
            Some(hints) if hints <= now => Due::Hints,
            Some(hints) => Due::At(certificate.renew.min(hints)),
            None => Due::At(certificate.renew),
        },
    }
}

/// When a certificate is renewed: when a third of its life is left, or up to a thirtieth before, so that many that came
/// together do not go together. `random` is from 0 to 1.
pub(super) fn renewal(not_before: Seconds, not_after: Seconds, random: f64) -> Seconds {
    let life = Duration::from_secs(not_after.saturating_sub(not_before));
    let left = life.mul_f64(1.0 / 3.0 + random.clamp(0.0, 1.0) / 30.0);
    not_after.saturating_sub(left.as_secs())
}

/// How long is waited after so many failures in a row: four times longer each, give or take a tenth. With a first pause of a
/// minute that is four attempts in the first hour; Let's Encrypt allows five for a name.
pub(super) fn pause(failures: u32, first: Duration, longest: Duration, random: f64) -> Duration {
    let factor = 4_u32.saturating_pow(failures.saturating_sub(1).min(15));
    let pause = first.saturating_mul(factor).min(longest.max(first));
    pause.mul_f64(0.9 + random.clamp(0.0, 1.0) * 0.2)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Certificate, Failed, Work};
    use super::*;

    const NOW: Seconds = 1_800_000_000;

    fn record(certificate: Option<(Seconds, Option<Seconds>)>) -> Record {
        let certificate = certificate.map(|(renew, hints)| Certificate {
            chain: String::new(),
            key: String::new(),
            not_before: NOW - 1000,
            not_after: NOW + 1000,
            obtained: NOW - 1000,
            renew,
            hints,
            hinted: false,
        });
        Record { certificate, ..Record::new("https://ca/dir", &["a.example.com".to_owned()], NOW) }
    }

    fn work(by: &str, until: Seconds) -> Option<Work> {
        Some(Work { by: by.to_owned(), until, challenges: Vec::new() })
    }

    fn failed(next: Seconds) -> Option<Failed> {
        Some(Failed { count: 1, at: NOW, next, reason: String::new() })
    }

    #[test]
    fn what_is_remembered_and_the_time_decide() {
        let none = || record(None);
        let fresh = || record(Some((NOW + 100, None)));
        let old = || record(Some((NOW - 1, None)));
        for (what, record, expected) in [
            ("nothing is known", None, Due::Order),
            ("no certificate yet", Some(none()), Due::Order),
            (
                "it failed a moment ago",
                Some(Record { failed: failed(NOW + 60), ..none() }),
                Due::At(NOW + 60),
            ),
            ("the pause is over", Some(Record { failed: failed(NOW), ..none() }), Due::Order),
            ("somebody else orders", Some(Record { work: work("b", NOW + 9), ..none() }), Due::At(NOW + 9)),
            ("who ordered is dead", Some(Record { work: work("b", NOW), ..none() }), Due::Order),
            ("this instance was cut off", Some(Record { work: work("a", NOW + 9), ..none() }), Due::Order),
            ("a fresh one", Some(fresh()), Due::At(NOW + 100)),
            ("an old one", Some(old()), Due::Order),
            ("renewal failed", Some(Record { failed: failed(NOW + 60), ..old() }), Due::At(NOW + 60)),
            ("a new one was asked for", Some(Record { asked: true, ..fresh() }), Due::Order),
            (
                "asked for while it pauses",
                Some(Record { asked: true, failed: failed(NOW + 60), ..old() }),
                Due::Order,
            ),
            (
                "asked for while somebody orders",
                Some(Record { asked: true, work: work("b", NOW + 9), ..fresh() }),
                Due::At(NOW + 9),
            ),
            ("the authority may be asked", Some(record(Some((NOW + 100, Some(NOW))))), Due::Hints),
            ("it was asked before", Some(record(Some((NOW + 100, Some(NOW + 50))))), Due::At(NOW + 50)),
        ] {
            assert_eq!(due(record.as_ref(), "a", NOW), expected, "{what}");
        }
    }

    #[test]
    fn a_third_of_the_life_is_left_when_it_is_renewed() {
        let day = 86_400;
        for (life, earliest, latest) in
            [(90 * day, 57 * day, 60 * day), (6 * day, 3 * day, 4 * day), (30, 19, 20)]
        {
            for random in [0.0, 0.3, 1.0] {
                let at = renewal(NOW, NOW + life, random) - NOW;
                assert!((earliest..=latest).contains(&at), "{at} of {life}");
            }
        }
        assert!(renewal(NOW, NOW + 90 * day, 0.0) > renewal(NOW, NOW + 90 * day, 1.0));
    }

    #[test]
    fn pauses_keep_within_what_authorities_allow() {
        let minute = Duration::from_secs(60);
        let mut at = Duration::ZERO;
        let mut in_first_hour = 0;
        for failures in 1..20 {
            if at < Duration::from_secs(3600) {
                in_first_hour += 1;
            }
            let pause = pause(failures, minute, LONGEST_REFUSED, 0.0);
            assert!(pause <= LONGEST_REFUSED);
            at += pause;
        }
        assert!(in_first_hour <= 4, "{in_first_hour}");
        assert!(pause(9, minute, LONGEST_UNREACHED, 1.0) <= LONGEST_UNREACHED.mul_f64(1.1));
        assert!(pause(1, minute, LONGEST_REFUSED, 0.5) >= minute.mul_f64(0.99));
    }
}
