//! What a replica serves: the certificates there are, and the answers to what the authority asks now.

use std::fmt;

use zeroize::Zeroizing;

use super::{Challenge, Seconds};

/// Everything to be served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// By the names of their records.
    pub certificates: Vec<Issued>,
    /// What is to be answered now.
    pub challenges: Vec<Challenge>,
}

/// A certificate with its key in the open.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// Sorted.
    pub names: Vec<String>,
    /// PEM, leaf first.
    pub chain: String,
    /// PEM.
    pub key: Zeroizing<String>,
    pub not_after: Seconds,
    /// Whether it is from the authority that is asked now, and not from one of before.
    pub current: bool,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Served {
    /// The certificate to show for these names, and those of them that it is for. Names that were added have none until
    /// the next certificate is there, and the others keep theirs.
    #[must_use]
    pub fn best(&self, names: &[String], now: Seconds) -> Option<(&Issued, Vec<String>)> {
        let covered = |issued: &Issued| -> Vec<String> {
            names.iter().filter(|name| issued.names.contains(name)).cloned().collect()
        };
        let rated = self.certificates.iter().filter_map(|issued| {
            let covered = covered(issued);
            let exact = issued.names.len() == names.len();
            let rank = (issued.not_after > now, issued.current, covered.len(), exact);
            (!covered.is_empty()).then_some(((rank, issued.not_after), issued, covered))
        });
        let best = rated.max_by(|(one, ..), (other, ..)| one.cmp(other));
        best.map(|(_, issued, covered)| (issued, covered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(names: &[&str], not_after: Seconds) -> Issued {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Issued { names, chain: String::new(), key: Zeroizing::default(), not_after, current: true }
    }

    #[test]
    fn names_keep_the_certificate_they_have_until_there_is_a_better_one() {
        let staging = Issued { current: false, ..issued(&["a.com"], 900) };
        let both = issued(&["a.com", "b.com"], 200);
        for (what, certificates, names, expected) in [
            ("nothing", vec![], vec!["a.com"], None),
            ("its own", vec![issued(&["a.com"], 200)], vec!["a.com"], Some((200, vec!["a.com"]))),
            (
                "a name more",
                vec![issued(&["a.com"], 200)],
                vec!["a.com", "b.com"],
                Some((200, vec!["a.com"])),
            ),
            ("a name less", vec![both.clone()], vec!["a.com"], Some((200, vec!["a.com"]))),
            (
                "its own before one with other names",
                vec![both.clone(), issued(&["a.com"], 150)],
                vec!["a.com"],
                Some((150, vec!["a.com"])),
            ),
            (
                "one that holds before its own that has ended",
                vec![both.clone(), issued(&["a.com"], 100)],
                vec!["a.com"],
                Some((200, vec!["a.com"])),
            ),
            (
                "an old one before none",
                vec![issued(&["a.com"], 50)],
                vec!["a.com"],
                Some((50, vec!["a.com"])),
            ),
            (
                "one of the authority that is asked now",
                vec![staging.clone(), issued(&["a.com"], 200)],
                vec!["a.com"],
                Some((200, vec!["a.com"])),
            ),
            ("another's before none", vec![staging], vec!["a.com"], Some((900, vec!["a.com"]))),
            ("others only", vec![both], vec!["c.com"], None),
        ] {
            let served = Served { certificates, challenges: Vec::new() };
            let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
            let found = served.best(&names, 100).map(|(issued, names)| (issued.not_after, names));
            let expected =
                expected.map(|(end, names)| (end, names.into_iter().map(str::to_owned).collect::<Vec<_>>()));
            assert_eq!(found, expected, "{what}");
        }
    }
}
