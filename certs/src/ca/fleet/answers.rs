//! What somebody holds who never says it: clients of Istio's API learn roots only with a certificate.
//!
//! It follows from what they were handed. The last answer counts that cannot have been lost: whoever missed one asks again
//! within minutes, and who does not has it. What came later may be in use or may be lost, so it counts too; what came
//! before is not used any more.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::record::{IssuerId, Moment};

/// A client that missed an answer has asked again by then: ztunnel pauses 150 s at most.
const PATIENCE: Duration = Duration::from_secs(300);
/// Answers of one client that are remembered.
const MOST: usize = 8;

/// A certificate and the roots that came with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The bundle of the roots.
    pub generation: u64,
    pub issuer: IssuerId,
    pub serial: String,
    pub at: Moment,
    /// The end of the certificate.
    pub until: Moment,
    /// When the client asked again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Moment>,
    /// It has shown the certificate since.
    #[serde(default)]
    pub shown: bool,
}

impl Answer {
    /// Whether it has arrived. Renewals are further apart than a quarter of a life.
    fn is_taken(&self, now: Moment) -> bool {
        let patience = PATIENCE.min(self.until.since(self.at) / 4);
        self.shown || self.next.unwrap_or(now).since(self.at) >= patience
    }
}

/// The answers to one client, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Answers(Vec<Answer>);

impl Answers {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them has this certificate.
    #[must_use]
    pub fn has(&self, serial: &str) -> bool {
        self.0.iter().any(|answer| answer.serial == serial)
    }

    /// One more, to somebody who showed a certificate when he asked, or none.
    pub fn add(&mut self, answer: Answer, shown: Option<&str>) {
        let now = answer.at;
        if let Some(known) = self.0.iter_mut().find(|known| Some(known.serial.as_str()) == shown) {
            known.shown = true;
        }
        if let Some(last) = self.0.last_mut() {
            last.next.get_or_insert(now);
        }
        let taken = self.0.iter().rposition(|known| known.is_taken(now)).unwrap_or(0);
        self.0.drain(..taken);
        self.0.retain(|known| known.until > now);
        if self.0.len() >= MOST {
            // The first has the oldest bundle. Of the others one goes whose issuer signed a later one.
            let twice = |at: &usize| {
                let issuer = self.0.get(*at).map(|one| &one.issuer);
                self.0.iter().skip(at + 1).any(|later| Some(&later.issuer) == issuer)
            };
            let one = (1..self.0.len()).find(twice).unwrap_or(1);
            self.0.remove(one);
        }
        self.0.push(answer);
    }

    /// With those that another replica gave.
    pub fn join(&mut self, others: &Self) {
        for other in &others.0 {
            match self.0.iter_mut().find(|own| own.serial == other.serial) {
                Some(own) => {
                    own.shown |= other.shown;
                    own.next = own.next.into_iter().chain(other.next).min();
                }
                None => self.0.push(other.clone()),
            }
        }
        self.0.sort_by_key(|answer| answer.at);
        // Who asked another replica has asked again.
        let later: Vec<Moment> = self.0.iter().skip(1).map(|answer| answer.at).collect();
        for (answer, next) in self.0.iter_mut().zip(later) {
            answer.next = Some(answer.next.map_or(next, |known| known.min(next)));
        }
    }

    /// Those that may be in use, the one that is certain first; the last one when all have ended.
    #[must_use]
    pub fn in_use(&self, now: Moment) -> Vec<&Answer> {
        let from = self.0.iter().rposition(|answer| answer.is_taken(now)).unwrap_or(0);
        let valid: Vec<&Answer> = self.0.iter().skip(from).filter(|answer| answer.until > now).collect();
        if valid.is_empty() { self.0.last().into_iter().collect() } else { valid }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600;

    fn answer(name: &str, at: u64) -> Answer {
        Answer {
            generation: at / 1000,
            issuer: "i1".into(),
            serial: name.to_owned(),
            at: Moment::from_secs(at),
            until: Moment::from_secs(at + 24 * HOUR),
            ..Answer::default()
        }
    }

    fn used(answers: &Answers, now: u64) -> String {
        answers.in_use(Moment::from_secs(now)).iter().map(|one| one.serial.as_str()).collect()
    }

    #[test]
    fn an_answer_counts_alone_when_nobody_has_asked_again() {
        let mut answers = Answers::default();
        answers.add(answer("a", 1000), None);
        assert_eq!(used(&answers, 1000), "a");
        answers.add(answer("b", 40_000), None);
        assert_eq!(used(&answers, 40_000), "ab", "the second may be lost");
        assert_eq!(used(&answers, 40_299), "ab");
        assert_eq!(used(&answers, 40_300), "b");
        answers.add(answer("c", 80_000), None);
        assert_eq!(used(&answers, 80_000), "bc");
    }

    #[test]
    fn who_asks_again_and_again_may_have_none_of_the_answers() {
        let mut answers = Answers::default();
        answers.add(answer("a", 1000), None);
        for (serial, at) in [("b", 40_000), ("c", 40_030), ("d", 40_090)] {
            answers.add(answer(serial, at), None);
        }
        assert_eq!(used(&answers, 40_100), "abcd");
        assert_eq!(used(&answers, 40_390), "d", "the last was enough");
        for at in 0..100 {
            answers.add(answer("x", 41_000 + at), None);
        }
        assert!(used(&answers, 41_100).starts_with('d'), "what is certain is not forgotten");
        assert!(answers.0.len() <= MOST);
    }

    #[test]
    fn of_many_answers_every_issuer_is_remembered() {
        let mut answers = Answers::default();
        answers.add(Answer { issuer: "i0".into(), ..answer("a", 1000) }, None);
        answers.add(Answer { issuer: "i1".into(), ..answer("b", 1001) }, None);
        for at in 2..50 {
            answers.add(Answer { issuer: "i2".into(), ..answer("c", 1000 + at) }, None);
        }
        let used = answers.in_use(Moment::from_secs(1060));
        let issuers: std::collections::BTreeSet<&str> =
            used.iter().map(|one| one.issuer.0.as_str()).collect();
        assert_eq!(issuers.into_iter().collect::<Vec<_>>(), ["i0", "i1", "i2"]);
    }

    #[test]
    fn a_certificate_that_was_shown_has_arrived() {
        let mut answers = Answers::default();
        answers.add(answer("a", 1000), None);
        answers.add(answer("b", 1010), None);
        answers.add(answer("c", 1020), Some("b"));
        assert_eq!(used(&answers, 1021), "bc");
        assert!(answers.has("c") && !answers.has("a"));
    }

    #[test]
    fn what_has_ended_is_not_in_use_and_the_last_is_known() {
        let mut answers = Answers::default();
        answers.add(answer("a", 1000), None);
        answers.add(answer("b", 1010), None);
        assert_eq!(used(&answers, 1000 + 24 * HOUR), "b");
        assert_eq!(used(&answers, 1010 + 48 * HOUR), "b");
        assert_eq!(used(&Answers::default(), 1), "");
    }

    #[test]
    fn replicas_know_together_what_was_given() {
        let (mut one, mut two) = (Answers::default(), Answers::default());
        one.add(answer("a", 1000), None);
        two.add(answer("b", 40_000), None);
        one.add(answer("c", 40_060), None);
        let mut both = one.clone();
        both.join(&two);
        assert_eq!(used(&both, 40_100), "abc");
        assert_eq!(used(&both, 40_360), "c");
        let mut other = two.clone();
        other.join(&one);
        other.join(&one);
        assert_eq!(other, both, "whoever looks");
    }

    #[test]
    fn certificates_that_live_short_are_waited_for_shortly() {
        let mut answers = Answers::default();
        let short = |name, at| Answer { until: Moment::from_secs(at + 60), ..answer(name, at) };
        answers.add(short("a", 1000), None);
        answers.add(short("b", 1030), None);
        assert_eq!(used(&answers, 1044), "ab");
        assert_eq!(used(&answers, 1045), "b");
    }
}
