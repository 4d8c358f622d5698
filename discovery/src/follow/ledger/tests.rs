//! Each line is an answer and what is left of the instances after it.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::source::Again;
use crate::testing::fake::instance;

/// `a` is an instance `a:1`, `-` none; a capital letter is one that is kept though it is not listed.
fn shown(ledger: &Ledger) -> String {
    let letter = |held: &Held| {
        let id = held.instance.id.split(':').next().unwrap().to_owned();
        if held.kept.is_some() { id.to_uppercase() } else { id }
    };
    let letters: String = ledger.followed().instances.iter().map(letter).collect();
    if letters.is_empty() { "-".to_owned() } else { letters }
}

fn listing(letters: &str, standing: Standing) -> Listing {
    let letters = letters.chars().filter(char::is_ascii_lowercase);
    let instances = letters.map(|letter| instance(&format!("{letter}:1"), 1)).collect();
    Listing { instances, standing, again: Again::Now }
}

fn after(start: Now, seconds: f64) -> Now {
    let passed = Duration::from_secs_f64(seconds);
    Now { at: start.at + passed, wall: start.wall + passed }
}

/// `list abc`, `began ab` (the registry began anew), `retired a` (it was told to take it out), `error`, `doubt`, `time`, `up a`, `down a` (a probe).
fn run(steps: &[(f64, &str, &str, char)]) {
    let start = Now::get();
    let mut ledger = Ledger::new(Duration::from_secs(3));
    for (at, what, left, freshness) in steps {
        let now = after(start, *at);
        let (verb, letters) = what.split_once(' ').unwrap_or((what, ""));
        let before = ledger.followed().clone();
        let changed = match verb {
            "list" => ledger.listed(listing(letters, Standing::Continued), now),
            "began" => ledger.listed(listing(letters, Standing::Restarted), now),
            "retired" => {
                listing(letters, Standing::Continued).instances.iter().for_each(|it| ledger.retired(it));
                false
            }
            "error" => ledger.failed(&SourceError::new("500"), now),
            "time" => ledger.tick(now),
            "doubt" => {
                ledger.doubt();
                false
            }
            "up" | "down" => {
                let is = |key: &Key| letters.contains(&*key.host);
                let results: Vec<_> =
                    ledger.lost().into_iter().filter(is).map(|key| (key, verb == "up")).collect();
                assert_eq!(results.len(), letters.len(), "{steps:?}: {what}: not all are probed");
                ledger.probed(&results, now)
            }
            "disk" => {
                let held = listing(letters, Standing::Continued).instances;
                let held = held.into_iter().map(|instance| Held::new(instance, start.wall)).collect();
                ledger.restore(held, start.wall, now)
            }
            other => panic!("{other}"),
        };
        assert_eq!(shown(&ledger), *left, "{steps:?}: after {at} s, {what}");
        let is = match ledger.followed().freshness {
            Freshness::Fresh => 'f',
            Freshness::Stale { .. } => 's',
            Freshness::Unknown => 'u',
        };
        assert_eq!(is, *freshness, "{steps:?}: after {at} s, {what}");
        assert_eq!(changed, *ledger.followed() != before, "{steps:?}: after {at} s, {what}: told and true");
    }
}

#[test]
fn what_the_registry_says_is_so() {
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "list ab", "ab", 'f'),
        (2.0, "list cb", "bc", 'f'),
        (3.0, "list c", "c", 'f'),
    ]);
    run(&[(0.0, "list", "-", 'f'), (1.0, "list a", "a", 'f')]);
}

#[test]
fn an_error_takes_nothing_away() {
    run(&[
        (0.0, "error", "-", 'u'),
        (1.0, "list ab", "ab", 'f'),
        (2.0, "error", "ab", 's'),
        (3.0, "error", "ab", 's'),
        (90_000.0, "time", "ab", 's'),
        (90_001.0, "list ab", "ab", 'f'),
    ]);
}

#[test]
fn an_empty_list_has_to_be_said_twice_or_to_stand() {
    run(&[(0.0, "list ab", "ab", 'f'), (1.0, "list", "ab", 's'), (2.0, "list", "-", 'f')]);
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "list", "ab", 's'),
        (3.9, "time", "ab", 's'),
        (4.0, "time", "-", 'f'),
    ]);
    // Something comes between.
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "list", "ab", 's'),
        (2.0, "list a", "a", 'f'),
        (3.0, "list", "a", 's'),
        (4.0, "error", "a", 's'),
        (9.0, "time", "a", 's'),
        (10.0, "list", "a", 's'),
        (11.0, "list", "-", 'f'),
    ]);
}

#[test]
fn an_empty_list_is_believed_where_everything_was_taken_out_on_request() {
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "retired a", "ab", 'f'),
        (1.1, "list ab", "ab", 'f'),
        (1.2, "list b", "b", 'f'),
        (2.0, "retired b", "b", 'f'),
        (2.1, "list", "-", 'f'),
        (2.2, "list b", "b", 'f'),
        // It is another one than that which was taken out.
        (3.0, "list", "b", 's'),
    ]);
    run(&[(0.0, "list ab", "ab", 'f'), (1.0, "retired a", "ab", 'f'), (2.0, "list", "ab", 's')]);
    run(&[(0.0, "list a", "a", 'f'), (1.0, "retired a", "a", 'f'), (2.0, "began", "A", 'f')]);
}

#[test]
fn what_a_registry_has_forgotten_is_kept_while_it_answers() {
    run(&[
        (0.0, "list abc", "abc", 'f'),
        (1.0, "began", "ABC", 'f'),
        (2.0, "down c", "ABC", 'f'),
        (2.5, "up c", "ABC", 'f'),
        (3.0, "down c", "ABC", 'f'),
        (3.5, "list", "ABC", 'f'),
        (4.0, "down c", "AB", 'f'),
        (5.0, "list a", "aB", 'f'),
        (6.0, "list ab", "ab", 'f'),
        (7.0, "list a", "a", 'f'),
        (8.0, "began a", "a", 'f'),
    ]);
    // Ten minutes after the registry knew the first one again, it has had time to learn of the others.
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "began", "AB", 'f'),
        (5000.0, "time", "AB", 'f'),
        (6000.0, "list a", "aB", 'f'),
        (6599.0, "time", "aB", 'f'),
        (6599.5, "error", "aB", 's'),
        (6600.0, "time", "aB", 's'),
        (6601.0, "list a", "aB", 'f'),
        (6601.0, "time", "a", 'f'),
    ]);
    // It begins anew once more, and says in between that there is nothing.
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "began a", "aB", 'f'),
        (2.0, "began", "AB", 'f'),
        (3.0, "list", "AB", 'f'),
        (4.0, "list", "AB", 'f'),
    ]);
    // What it lists beside what is kept can still be taken away.
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "began a", "aB", 'f'),
        (2.0, "list", "aB", 's'),
        (3.0, "list", "B", 'f'),
    ]);
}

#[test]
fn without_continuity_a_list_is_one_that_began_anew() {
    run(&[
        (0.0, "list ab", "ab", 'f'),
        (1.0, "error", "ab", 's'),
        (2.0, "doubt", "ab", 's'),
        (3.0, "list a", "aB", 'f'),
        (4.0, "list a", "aB", 'f'),
    ]);
}

#[test]
fn what_is_on_disk_serves_until_the_first_answer() {
    run(&[(60.0, "disk ab", "ab", 's'), (61.0, "error", "ab", 's'), (62.0, "list bc", "bc", 'f')]);
    // The registry may have been started just now as well.
    run(&[(60.0, "disk ab", "ab", 's'), (61.0, "list", "AB", 'f'), (62.0, "list a", "aB", 'f')]);
    run(&[(60.0, "list a", "a", 'f'), (61.0, "disk ab", "a", 'f')]);
}

#[test]
fn every_step_is_remembered_and_not_more_than_some() {
    let start = Now::get();
    let mut ledger = Ledger::new(Duration::ZERO);
    for round in 0..50 {
        let letters = if round % 2 == 0 { "abcdefghijklmnop" } else { "b" };
        ledger.listed(listing(letters, Standing::Continued), after(start, f64::from(round)));
    }
    let history = ledger.history();
    assert_eq!(history.len(), HISTORY);
    let last = history.last().unwrap();
    assert_eq!((last.removed.count, last.removed.some.len(), &*last.removed.some[0]), (15, 8, "a:1 a:1"));
    assert_eq!(&*last.why, "listed by the registry");
    ledger.listed(listing("", Standing::Continued), start);
    assert_eq!(shown(&ledger), "-", "no confirmation is asked for");
}

#[test]
fn a_change_of_one_keeps_the_others() {
    let now = Now::get();
    let mut ledger = Ledger::new(Duration::from_secs(3));
    ledger.listed(listing("abc", Standing::Continued), now);
    let before = ledger.followed().instances.clone();
    let mut list = listing("abc", Standing::Continued);
    list.instances[1].node.weight = 5;
    // Two of one name: one counts.
    list.instances.push(list.instances[0].clone());
    let later = after(now, 9.0);
    assert!(ledger.listed(list, later));
    let held = &ledger.followed().instances;
    assert_eq!(held.len(), 3);
    assert!(Arc::ptr_eq(&held[0].instance.id, &before[0].instance.id), "what has not changed is shared");
    assert_eq!((held[1].instance.node.weight, held[1].first_seen), (5, now.wall));
}
