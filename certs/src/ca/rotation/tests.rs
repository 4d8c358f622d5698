//! The interlocks one by one: each holds, names who is in the way, and gives way to what it says and to nothing else. And
//! what commands refuse.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::Duration;

use super::super::fleet::{Answer, Answers, Member, Replica, Source, View};
use super::super::record::{IssuerState, Lifetimes, Moment, Observer, Record, RootState};
use super::command::{Command, NewRoot, Refusal, Rotate};
use super::forge::make;
use super::interlocks::Blocker;
use super::machine::{Decision, decide};
use super::{Back, Kind, Policy, State, model, plan};

/// A record and three workloads that do what they are told.
struct Bench {
    forge: model::Words,
    record: Record,
    view: View,
    now: Moment,
}

const DAY: u64 = 86_400;

impl Bench {
    fn new() -> Self {
        Self::with(Lifetimes::default())
    }

    fn with(lifetimes: Lifetimes) -> Self {
        let forge = model::Words::default();
        let now = Moment::from_secs(1_795_000_000);
        let record = model::founded(&forge, now, lifetimes);
        let member = |id: &str| Member {
            id: id.to_owned(),
            identity: format!("spiffe://mesh.local/ns/shop/sa/{id}"),
            version: "1.2".to_owned(),
            ..Member::default()
        };
        let members = ["p1", "p2", "p3"].map(member).to_vec();
        let mut bench = Self { forge, record, view: View { members, settled: true, ..View::default() }, now };
        bench.please();
        bench
    }

    /// Everybody has what there is.
    fn please(&mut self) {
        let signing = self.record.signing().unwrap().id.clone();
        for member in &mut self.view.members {
            member.generation = self.record.bundle.generation;
            member.seen_at = self.now;
            if member.issuer != signing || member.signed_at < self.now {
                member.issuer = signing.clone();
                member.signed_at = self.now;
                member.not_after = self.now + self.record.lifetimes.leaf();
            }
        }
    }

    fn member(&mut self, id: &str) -> &mut Member {
        self.view.members.iter_mut().find(|member| member.id == id).unwrap()
    }

    fn command(&mut self, command: &Command) -> Result<(), Refusal> {
        let wanted = command.wanted(&self.record)?;
        let material = make(&self.forge, &self.record, &wanted, self.now).unwrap();
        self.record = command.apply(&self.record, material, &self.view, self.now, "sre")?;
        Ok(())
    }

    fn rotate(&self, kind: Kind) -> Rotate {
        Rotate { kind, policy: plan::policy(&self.record), root: NewRoot::Usual, reason: "test".to_owned() }
    }

    fn begin(&mut self, kind: Kind) -> Result<(), Refusal> {
        self.command(&Command::Rotate(self.rotate(kind)))
    }

    fn state(&self) -> Option<State> {
        self.record.rotation.as_ref().map(|rotation| rotation.state)
    }

    /// Decides until nothing is left to do now.
    fn settle(&mut self) -> Vec<Blocker> {
        for _ in 0..50 {
            match decide(&self.record, &self.view, self.now) {
                Decision::Next(next) => self.record = *next,
                Decision::Waiting(waiting) => return waiting.blockers,
                Decision::Steady => return Vec::new(),
            }
        }
        panic!("it never comes to rest");
    }

    /// With everybody doing what he is told, until the state is reached, and no further.
    fn go(&mut self, state: State) {
        for _ in 0..400 {
            if self.state() == Some(state) {
                self.please();
                return;
            }
            self.please();
            match decide(&self.record, &self.view, self.now) {
                Decision::Next(next) => self.record = *next,
                Decision::Waiting(_) => self.now = self.now + Duration::from_secs(30),
                Decision::Steady => panic!("it never came to {state}"),
            }
        }
        panic!("it never came to {state}: {:?}", self.state());
    }

    fn advance(&mut self, force: bool, waive: &[&str], reason: &str) -> Result<(), Refusal> {
        let waive = waive.iter().map(|who| (*who).to_owned()).collect();
        self.command(&Command::Advance { force, waive, compress: false, reason: reason.to_owned() })
    }
}

/// The interlock, and that it names `who`.
#[track_caller]
fn held(blockers: &[Blocker], interlock: u8, who: &str) {
    let found = blockers.iter().find(|blocker| blocker.interlock == interlock);
    let found = found.unwrap_or_else(|| panic!("interlock {interlock} does not hold: {blockers:#?}"));
    assert!(who.is_empty() || found.culprits.iter().any(|one| one.who.contains(who)), "{found:#?}");
    assert!(!found.way.is_empty() && !found.what.is_empty());
}

#[test]
fn every_state_of_a_root_rotation_follows_the_one_before() {
    let mut bench = Bench::new();
    let old = bench.record.current_root().unwrap().id.clone();
    bench.begin(Kind::Root).unwrap();
    assert_eq!(bench.record.trusted().count(), 1, "what is prepared is shown to nobody");
    for (state, trusted) in [
        (State::Prepared, 1),
        (State::Trusting, 2),
        (State::Cutover, 2),
        (State::Migrating, 2),
        (State::Verifying, 2),
        (State::Retiring, 1),
    ] {
        bench.go(state);
        assert_eq!(bench.record.trusted().count(), trusted, "{state}");
        let signs_new = bench.record.current_root().unwrap().id != old;
        assert_eq!(signs_new, state >= State::Cutover, "{state}");
    }
    for _ in 0..20 {
        bench.now = bench.now + Duration::from_secs(30);
        bench.please();
        bench.settle();
    }
    assert!(bench.record.rotation.is_none());
    let root = bench.record.root(&old).unwrap();
    assert_eq!((root.state, root.key.is_none()), (RootState::Retired, true));
    assert!(bench.record.bundle.min_supported_generation > 1);
}

#[test]
fn interlock_1_whoever_has_not_confirmed() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.member("p2").generation = 1;
    bench.member("p2").refused = Some("disk full".to_owned());
    let blockers = bench.settle();
    held(&blockers, 1, "p2");
    let why = &blockers.first().unwrap().culprits.first().unwrap().why;
    assert!(
        why.contains("generation 1 of 2") && why.contains("version 1.2") && why.contains("disk full"),
        "{why}"
    );
    assert_eq!(blockers.first().unwrap().culprits.len(), 1, "the others are not named");
    bench.advance(false, &["p2"], "being scrapped").unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));
}

#[test]
fn interlock_1_nobody_is_judged_by_a_list_that_is_not_whole() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.view.settled = false;
    held(&bench.settle(), 1, "");
    bench.view.settled = true;
    bench.view.dropped = 3;
    held(&bench.settle(), 1, "");
}

#[test]
fn interlock_2_whoever_may_come_back() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    let gone = bench.member("p3").clone();
    bench.go(State::Verifying);
    // It was there with its old certificate, and was not seen since.
    *bench.member("p3") = Member { seen_at: bench.now - Duration::from_secs(1200), ..gone.clone() };
    held(&bench.settle(), 2, "p3");
    let ends = gone.not_after;
    let mut later = Bench {
        forge: model::Words::default(),
        record: bench.record.clone(),
        view: bench.view.clone(),
        now: ends,
    };
    for member in &mut later.view.members {
        if member.id != "p3" {
            member.seen_at = ends;
            member.not_after = ends + Duration::from_secs(DAY);
        }
    }
    later.settle();
    assert_eq!(later.state(), Some(State::Retiring), "a certificate that has ended holds up nobody");
    bench.advance(false, &["p3"], "burnt").unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Retiring));
}

#[test]
fn interlock_2_does_not_hold_up_the_cutover_while_the_old_root_vouches_for_the_new() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.member("p3").generation = 1;
    bench.member("p3").seen_at = bench.now - Duration::from_secs(1200);
    let mut without = bench.record.clone();
    let to = without.rotation.as_ref().unwrap().to.issuer.clone();
    without.issuer_mut(&to).unwrap().cross = None;
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));
    bench.record = without;
    held(&bench.settle(), 2, "p3");
}

#[test]
fn interlock_2_waits_for_who_never_confirms_however_lately_he_was_seen() {
    let silent = |bench: &mut Bench, generation| {
        let now = bench.now;
        let member = bench.member("p3");
        member.answers = Answers::default();
        member
            .answers
            .add(Answer { at: now, until: now + Duration::from_secs(DAY), ..Answer::default() }, None);
        (member.generation, member.seen_at) = (generation, now);
    };
    // Where nothing leads from the old root to the new one, he has to have it before it signs.
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    let to = bench.record.rotation.as_ref().unwrap().to.issuer.clone();
    bench.record.issuer_mut(&to).unwrap().cross = None;
    silent(&mut bench, 1);
    let blockers = bench.settle();
    held(&blockers, 2, "p3");
    assert!(blockers.iter().all(|blocker| blocker.interlock == 2), "{blockers:#?}");
    bench.member("p3").generation = bench.record.bundle.generation;
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));

    // On the way back he has to have the old root again before it signs, and then a certificate below it.
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Retiring);
    let only_new = bench.record.bundle.generation;
    bench.command(&Command::Rollback { reason: "test".to_owned() }).unwrap();
    bench.please();
    silent(&mut bench, only_new);
    held(&bench.settle(), 2, "p3");
    let rotation = bench.record.rotation.clone().unwrap();
    assert_eq!(rotation.back, Some(Back::Trusting));
    bench.member("p3").generation = rotation.generation;
    bench.settle();
    assert_eq!(bench.record.rotation.as_ref().unwrap().back, Some(Back::Migrating));
    let with_new = bench.member("p3").issuer.clone();
    bench.please();
    bench.member("p3").issuer = with_new;
    held(&bench.settle(), 2, "p3");
    bench.please();
    bench.settle();
    assert_eq!(bench.state(), None);
}

#[test]
fn interlock_3_is_passed_by_nobody() {
    // Issuers that live for a day cannot carry leaves that do.
    let mut bench = Bench::with(Lifetimes { issuer_s: DAY, ..Lifetimes::default() });
    let Err(Refusal::Blocked(blockers)) = bench.begin(Kind::Issuer) else { panic!("it began") };
    held(&blockers, 3, "issuer");
    assert!(bench.record.rotation.is_none());

    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    let to = bench.record.rotation.as_ref().unwrap().to.clone();
    bench.record.issuer_mut(&to.issuer).unwrap().not_after = bench.now + Duration::from_secs(3600);
    bench.advance(true, &[], "I know better").unwrap();
    held(&bench.settle(), 3, to.issuer.short());
    assert_eq!(bench.state(), Some(State::Prepared));
}

#[test]
fn interlock_4_clocks() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.member("p1").clock_offset_ms = -60_000;
    held(&bench.settle(), 4, "p1");
    bench.advance(true, &[], "known, harmless").unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));

    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.member("p1").clock_offset_ms = 400_000;
    bench.advance(true, &[], "known, harmless").unwrap();
    held(&bench.settle(), 4, "p1");
    bench.member("p1").clock_offset_ms = 0;
    bench.record.rotation.as_mut().unwrap().force = None;
    bench.view.clock_step_ms = 90_000;
    held(&bench.settle(), 4, "");
}

#[test]
fn interlock_5_the_old_root_has_to_live_long_enough() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    let from = bench.record.rotation.as_ref().unwrap().from.root.clone();
    // Enough for a short rotation, and not for one that spreads over half an hour.
    bench.record.root_mut(&from).unwrap().not_after = bench.now + Duration::from_secs(600);
    let blockers = bench.settle();
    held(&blockers, 5, from.short());
    assert!(blockers.first().unwrap().way.contains("--compress"));
    let compress = Command::Advance { force: false, waive: vec![], compress: true, reason: String::new() };
    bench.command(&compress).unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Trusting));
}

#[test]
fn an_authority_that_starts_anew_goes_on_waiting_where_it_was() {
    let mut bench = Bench::new();
    bench.begin(Kind::Issuer).unwrap();
    bench.go(State::Cutover);
    bench.settle();
    let since = bench.record.rotation.as_ref().unwrap().quiet_since;
    assert!(since.is_some());
    // Whoever starts does not know yet who is there, and nothing speaks against what was.
    bench.view.settled = false;
    let before = bench.record.clone();
    held(&bench.settle(), 1, "");
    assert_eq!(bench.record, before, "nothing is written");
    bench.view.settled = true;
    bench.settle();
    assert_eq!(bench.record.rotation.as_ref().unwrap().quiet_since, since);
}

#[test]
fn interlock_6_is_passed_by_nobody() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    let Err(Refusal::Busy(words)) = bench.begin(Kind::Leaf) else { panic!("two at once") };
    assert!(words.contains("rollback"));
    bench.go(State::Trusting);
    bench.view.sequence = 9;
    let replica = |seen_at| Replica {
        name: "ca-2".to_owned(),
        seen_at,
        sequence: 8,
        signs_unread: Duration::from_secs(300),
    };
    bench.view.replicas = vec![replica(bench.now)];
    bench.advance(true, &[], "I know better").unwrap();
    held(&bench.settle(), 6, "ca-2");
    bench.view.replicas = vec![];
    bench.view.sources = vec![Source { name: "file /x".to_owned(), problem: "has other roots".to_owned() }];
    held(&bench.settle(), 6, "file /x");
    bench.view.sources = vec![];
    // It does not sign any more.
    bench.view.replicas = vec![replica(bench.now - Duration::from_secs(601))];
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));
}

#[test]
fn interlock_7_a_new_key_is_new() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    let rotation = bench.record.rotation.clone().unwrap();
    let old = bench.record.root(&rotation.from.root).unwrap().spki.clone();
    bench.record.root_mut(&rotation.to.root).unwrap().spki = old;
    held(&bench.settle(), 7, rotation.to.root.short());

    let mut bench = Bench::new();
    let policy = Policy { same_key: true, ..plan::policy(&bench.record) };
    let rotate = Rotate { policy, ..bench.rotate(Kind::Root) };
    bench.command(&Command::Rotate(rotate)).unwrap();
    let note = &bench.record.rotation.as_ref().unwrap().history.first().unwrap().note;
    assert!(note.contains("no remedy"), "{note}");
    bench.go(State::Trusting);

    // A key that was distrusted does not come back under another certificate.
    let to = bench.record.rotation.as_ref().unwrap().to.root.clone();
    let known = bench.record.root(&to).unwrap().clone();
    let gone = super::super::record::Root { id: "feed".into(), state: RootState::Distrusted, ..known };
    bench.record.roots.push(gone);
    bench.record.rotation.as_mut().unwrap().state = State::Prepared;
    bench.advance(false, &[], "").unwrap();
    held(&bench.settle(), 7, to.short());
}

#[test]
fn interlock_8_failing_handshakes_turn_a_rotation_round() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Migrating);
    // Two are chance.
    bench.view.handshakes = vec![(bench.now, 1000, 2)];
    bench.settle();
    assert_ne!(bench.state(), Some(State::RollingBack));

    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Migrating);
    bench.view.handshakes = vec![(bench.now, 1000, 9)];
    bench.settle();
    assert_eq!(bench.state(), Some(State::RollingBack));
    assert!(bench.record.rotation.as_ref().unwrap().history.last().unwrap().note.contains("9 of 1000"));

    // What failed before as often is no reason.
    let mut bench = Bench::new();
    bench.view.handshakes = vec![(bench.now, 1000, 9)];
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Migrating);
    bench.view.handshakes = vec![(bench.now, 1000, 9)];
    bench.settle();
    assert_ne!(bench.state(), Some(State::RollingBack));

    // When the old root is going, it stops and asks.
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Retiring);
    bench.view.handshakes = vec![(bench.now, 100, 5)];
    bench.settle();
    assert_eq!(bench.state(), Some(State::Paused));
    bench.now = bench.now + Duration::from_secs(60);
    bench.command(&Command::Resume { reason: "it was a test".to_owned() }).unwrap();
    bench.please();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Retiring));
}

#[test]
fn interlock_9_edges_and_peers_have_to_confirm_seen_or_not() {
    let mut bench = Bench::new();
    bench.record.observers.push(Observer { name: "edge-1".to_owned(), kind: "edge".to_owned() });
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    held(&bench.settle(), 9, "edge-1");
    bench.advance(false, &["edge-1"], "not in use").unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));
}

#[test]
fn interlock_10_whoever_forces_says_why() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    for (force, waive) in [(true, &[][..]), (false, &["p1"][..])] {
        let Err(Refusal::Blocked(blockers)) = bench.advance(force, waive, "  ") else {
            panic!("it was taken")
        };
        held(&blockers, 10, "sre");
    }
}

#[test]
fn force_is_for_one_state() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Trusting);
    bench.member("p2").generation = 1;
    bench.advance(true, &[], "ticket 7").unwrap();
    bench.settle();
    assert_eq!(bench.state(), Some(State::Cutover));
    let rotation = bench.record.rotation.as_ref().unwrap();
    assert_eq!(rotation.force, None);
    assert!(rotation.history.iter().any(|event| event.note.contains("forced by sre: ticket 7")));
}

#[test]
fn step_by_step_waits_for_a_word_each_time() {
    let mut bench = Bench::new();
    let policy = Policy { step: true, ..plan::policy(&bench.record) };
    let rotate = Rotate { policy, ..bench.rotate(Kind::Issuer) };
    bench.command(&Command::Rotate(rotate)).unwrap();
    for state in [State::Prepared, State::Cutover, State::Migrating, State::Verifying] {
        for _ in 0..10 {
            bench.please();
            bench.now = bench.now + Duration::from_secs(60);
            bench.settle();
        }
        assert_eq!(bench.state(), Some(state));
        bench.advance(false, &[], "").unwrap();
        bench.please();
        bench.settle();
    }
    assert_eq!(bench.state(), None);
}

#[test]
fn a_rotation_that_is_paused_stays() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Migrating);
    bench.command(&Command::Pause { reason: "lunch".to_owned() }).unwrap();
    for _ in 0..10 {
        bench.please();
        bench.now = bench.now + Duration::from_secs(600);
        bench.settle();
    }
    assert_eq!(bench.state(), Some(State::Paused));
    assert!(super::renewal(&bench.record).is_none());
    bench.command(&Command::Resume { reason: String::new() }).unwrap();
    bench.go(State::Verifying);
}

#[test]
fn there_is_no_way_back_to_a_key_that_is_gone() {
    let mut bench = Bench::new();
    bench.begin(Kind::Issuer).unwrap();
    bench.go(State::Migrating);
    let from = bench.record.rotation.as_ref().unwrap().from.issuer.clone();
    bench.record.issuer_mut(&from).unwrap().key = None;
    let Err(Refusal::Blocked(blockers)) = bench.command(&Command::Rollback { reason: String::new() }) else {
        panic!("it went back");
    };
    held(&blockers, 3, from.short());
}

#[test]
fn an_emergency_takes_the_other_end_of_a_rotation_or_makes_a_new_root() {
    let mut bench = Bench::new();
    bench.begin(Kind::Root).unwrap();
    bench.go(State::Migrating);
    let rotation = bench.record.rotation.clone().unwrap();
    let distrust = |root: &str| Command::Distrust { root: root.to_owned(), reason: "stolen".to_owned() };
    let roots = bench.record.roots.len();
    bench.command(&distrust(rotation.from.root.short())).unwrap();
    assert_eq!(bench.record.roots.len(), roots, "there was another one");
    assert_eq!(bench.record.current_root().unwrap().id, rotation.to.root);
    assert_eq!(bench.record.issuer(&rotation.to.issuer).unwrap().cross, None, "nothing leads to it any more");
    assert_eq!(bench.state(), Some(State::Emergency));
    let Err(Refusal::Invalid(_)) = bench.command(&Command::Rollback { reason: String::new() }) else {
        panic!("it went back to a root that is distrusted");
    };
    bench.please();
    bench.settle();
    assert_eq!(bench.state(), None);
    let now = rotation.to.root;
    bench.command(&distrust(&now.0)).unwrap();
    assert_ne!(bench.record.current_root().unwrap().id, now);
    assert_eq!(bench.record.root(&now).unwrap().state, RootState::Distrusted);
    for (root, reason, words) in [
        ("", "x", "no root begins with"),
        ("zz", "x", "no root begins with"),
        ("00", "x", "several roots"),
        (now.short(), " ", "with a reason"),
    ] {
        let command = Command::Distrust { root: root.to_owned(), reason: reason.to_owned() };
        let error = bench.command(&command).unwrap_err().to_string();
        assert!(error.contains(words), "{root}: {error}");
    }
}

#[test]
fn a_root_that_has_ended_is_replaced_and_one_that_has_not_is_rotated() {
    let mut bench = Bench::new();
    let recover = Command::Recover { import: None, reason: "forgotten".to_owned() };
    let error = bench.command(&recover).unwrap_err().to_string();
    assert!(error.contains("rotate root"), "{error}");
    let old = bench.record.current_root().unwrap().id.clone();
    bench.now = bench.record.root(&old).unwrap().not_after + Duration::from_secs(DAY);
    bench.command(&recover).unwrap();
    assert_eq!(bench.state(), Some(State::Emergency));
    assert_eq!(bench.record.trusted().count(), 1);
    assert_ne!(bench.record.current_root().unwrap().id, old);
    bench.please();
    bench.settle();
    assert_eq!(bench.state(), None);
}

#[test]
fn what_is_revoked_is_told_and_can_be_taken_back() {
    let mut bench = Bench::new();
    let revoke =
        |what: &str, reason: &str| Command::Revoke { what: what.to_owned(), reason: reason.to_owned() };
    let id = "spiffe://mesh.local/ns/shop/sa/p1";
    bench.command(&revoke(id, "broken into")).unwrap();
    bench.command(&revoke("00:4F:0c", "lost")).unwrap();
    assert_eq!(bench.record.bundle.generation, 3);
    assert_eq!(bench.record.revocations.serials.first().unwrap().what, "4f0c");
    for (what, reason, words) in [
        (id, "again", "revoked already"),
        ("4f0c", "again", "revoked already"),
        ("spiffe://other/ns/a", "x", "not an identity of"),
        ("xyz", "x", "neither a serial"),
        ("", "x", "neither a serial"),
        ("0f", "", "with a reason"),
    ] {
        let error = bench.command(&revoke(what, reason)).unwrap_err().to_string();
        assert!(error.contains(words), "{what}: {error}");
    }
    bench.command(&Command::Allow { what: id.to_owned() }).unwrap();
    assert!(bench.record.revocations.identities.is_empty());
    assert!(bench.command(&Command::Allow { what: id.to_owned() }).is_err());
    // A serial is forgotten when its certificate has ended; the next change of the record does it.
    bench.now = bench.now + Duration::from_secs(2 * DAY);
    bench.command(&revoke("aa", "x")).unwrap();
    assert_eq!(bench.record.revocations.serials.len(), 1);
}

#[test]
fn a_leaf_rotation_is_for_those_who_are_selected() {
    let mut bench = Bench::new();
    bench.now = bench.now + Duration::from_secs(60);
    for member in &mut bench.view.members {
        member.seen_at = bench.now;
    }
    let policy = Policy {
        select: vec!["spiffe://mesh.local/ns/shop/sa/p2".to_owned()],
        ..plan::policy(&bench.record)
    };
    let rotate = Rotate { policy, ..bench.rotate(Kind::Leaf) };
    bench.command(&Command::Rotate(rotate)).unwrap();
    let blockers = bench.settle();
    held(&blockers, 1, "p2");
    assert_eq!(blockers.first().unwrap().culprits.len(), 1);
    bench.member("p2").signed_at = bench.now;
    assert_eq!(bench.settle(), []);
    assert_eq!(bench.state(), None);
    assert_eq!(bench.record.issuers.iter().filter(|one| one.state == IssuerState::Signing).count(), 1);
}

#[test]
fn a_plan_names_who_would_be_waited_for_and_writes_nothing() {
    let mut bench = Bench::new();
    bench.member("p3").seen_at = bench.now - Duration::from_secs(1200);
    let rotate = bench.rotate(Kind::Root);
    let wanted = Command::Rotate(rotate.clone()).wanted(&bench.record).unwrap();
    let material = make(&bench.forge, &bench.record, &wanted, bench.now).unwrap();
    let (stages, blockers) =
        super::command::plan(&bench.record, &rotate, material, &bench.view, bench.now).unwrap();
    assert_eq!(stages.len(), 6);
    assert!(stages.windows(2).all(|pair| pair[0].ends <= pair[1].begins));
    let verifying = stages.iter().find(|stage| stage.state == State::Verifying).unwrap();
    assert!(verifying.ends >= bench.view.members.first().unwrap().not_after, "it waits for the absent one");
    held(&blockers, 2, "p3");
    assert!(bench.record.rotation.is_none());
}

#[test]
fn what_is_old_is_exchanged_by_itself() {
    let bench = Bench::new();
    let due = |at: Duration| super::machine::due(&bench.record, false, bench.now + at);
    assert_eq!(due(Duration::from_secs(30 * DAY)), None);
    assert_eq!(due(Duration::from_secs(183 * DAY)), Some(Kind::Issuer));
    assert_eq!(due(Duration::from_secs(366 * DAY)), Some(Kind::Root));
}
