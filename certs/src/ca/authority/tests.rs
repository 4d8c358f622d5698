use crate::ca::Bundle;

use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn domain() -> TrustDomain {
    "mesh.local".parse().unwrap()
}

fn identity() -> SpiffeId {
    "spiffe://mesh.local/ns/default/sa/orders".parse().unwrap()
}

fn root(kind: KeyKind, life: Duration) -> Authority {
    Authority::root(&domain(), kind, life, now()).unwrap()
}

fn public(kind: KeyKind) -> PublicKey {
    PublicKey::from_spki(&Key::generate(kind).unwrap().subject_public_key_info()).unwrap()
}

fn trust(roots: &[&Authority]) -> Trust {
    let roots = roots.iter().map(|root| root.certificate().clone());
    Trust::new(domain(), 1).with_roots(&domain(), roots).unwrap()
}

fn sign(authority: &Authority, ttl: Duration, at: SystemTime) -> Result<Issued, AuthorityError> {
    let key = public(KeyKind::P256);
    let request = Request {
        key: &key,
        identity: &identity(),
        dns_names: &["orders.test".to_owned()],
        ttl,
        not_before: None,
        mark: None,
    };
    authority.leaf(&request, &Lifetimes::default(), at)
}

#[test]
fn a_certificate_says_who_it_is_for_and_verifies_for_both_sides() {
    for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048] {
        let root = root(kind, 3650 * DAY);
        let issuer = root.intermediate(&domain(), kind, 365 * DAY, now()).unwrap();
        let issued = sign(&issuer, Duration::ZERO, now()).unwrap();
        assert_eq!(issued.chain.len(), 2, "the leaf and its issuer, not the root");
        for usage in [Usage::Client, Usage::Server] {
            let verified = trust(&[&root]).verify(&issued.chain, usage, now()).unwrap();
            assert_eq!(verified.peer.id, identity(), "{kind:?}");
            assert_eq!(verified.peer.issuer, issuer.id());
            assert_eq!(verified.peer.serial, issued.serial);
            assert_eq!(verified.peer.not_before, now() - BACKDATE);
            assert_eq!(verified.peer.not_after, now() + DAY);
        }
        assert_eq!(issued.serial.as_bytes().len(), 16);
        let (_, parsed) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 2);
        assert!(parsed.subject().iter_rdn().next().is_none());
    }
}

/// For any lives of root and issuer and any moment: what is signed ends before its signer, or is not signed.
#[test]
fn nothing_outlives_its_signer() {
    let mut rng = fastrand::Rng::new();
    for _ in 0..60 {
        let root_life = Duration::from_secs(rng.u64(3_600..100 * 86_400));
        let issuer_life = Duration::from_secs(rng.u64(60..200 * 86_400));
        let ttl = Duration::from_secs(rng.u64(0..3 * 86_400));
        let at = now() + Duration::from_secs(rng.u64(0..100 * 86_400));
        let root = root(KeyKind::P256, root_life);
        let issuer = root.intermediate(&domain(), KeyKind::P256, issuer_life, now()).unwrap();
        assert!(
            issuer.facts().not_after + MARGIN <= root.facts().not_after || issuer_life + MARGIN <= root_life
        );
        let lifetimes = Lifetimes::default();
        match sign(&issuer, ttl, at) {
            Ok(issued) => {
                assert!(issued.not_after + MARGIN <= issuer.facts().not_after, "{ttl:?} {issuer_life:?}");
                assert!(issued.not_after + MARGIN <= root.facts().not_after);
                assert!(issued.not_after <= at + lifetimes.longest);
                trust(&[&root]).verify(&issued.chain, Usage::Server, at).unwrap();
            }
            Err(AuthorityError::SignerEnds { .. }) => {
                let asked = if ttl.is_zero() { lifetimes.longest } else { ttl.min(lifetimes.longest) };
                assert!(at + asked + MARGIN > issuer.ends());
                assert!(at + lifetimes.renewal * 2 + MARGIN > issuer.ends());
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn serial_numbers_differ() {
    let root = root(KeyKind::P256, 100 * DAY);
    let serials: std::collections::HashSet<_> =
        (0..200).map(|_| sign(&root, DAY, now()).unwrap().serial).collect();
    assert_eq!(serials.len(), 200);
    assert!(serials.iter().all(|serial| serial.as_bytes().len() == 16));
}

#[test]
fn who_believes_the_old_root_believes_what_the_new_one_signs() {
    let (old, new) = (root(KeyKind::P256, 100 * DAY), root(KeyKind::P384, 3650 * DAY));
    let cross = old.cross_sign(new.certificate(), now()).unwrap();
    let issuer =
        new.intermediate(&domain(), KeyKind::P256, 365 * DAY, now()).unwrap().with_cross(vec![cross]);
    let issued = sign(&issuer, DAY, now()).unwrap();
    assert_eq!(issued.chain.len(), 3);
    for (roots, what) in [(&[&old][..], "old"), (&[&new][..], "new"), (&[&old, &new][..], "both")] {
        assert!(trust(roots).verify(&issued.chain, Usage::Server, now()).is_ok(), "{what}");
    }
    // The end of the old root is not the end of what the new one signs.
    assert!(sign(&issuer, DAY, now() + 200 * DAY).is_ok());
    let other = root(KeyKind::P256, DAY);
    assert!(trust(&[&other]).verify(&issued.chain, Usage::Server, now()).is_err());
    assert_eq!(issuer.cross_sign(new.certificate(), now()).unwrap_err(), AuthorityError::PathLength);
}

#[test]
fn an_issuer_signs_no_authorities() {
    let root = root(KeyKind::P256, 100 * DAY);
    let issuer = root.intermediate(&domain(), KeyKind::P256, 50 * DAY, now()).unwrap();
    let below = issuer.intermediate(&domain(), KeyKind::P256, DAY, now());
    assert_eq!(below.unwrap_err(), AuthorityError::PathLength);
}

#[test]
fn an_issuer_is_loaded_without_the_key_of_its_root() {
    let root = root(KeyKind::P256, 100 * DAY);
    let issuer = root.intermediate(&domain(), KeyKind::P384, 50 * DAY, now()).unwrap();
    let chain = vec![issuer.certificate().clone(), root.certificate().clone()];
    let load = |chain: Vec<_>, der: &[u8]| {
        let der = PrivateKeyDer::try_from(der.to_vec()).unwrap();
        Authority::load(chain, Vec::new(), Key::load(&der).unwrap())
    };
    let loaded = load(chain.clone(), &issuer.key().der()).unwrap();
    assert_eq!(loaded.id(), issuer.id());
    assert_eq!(loaded.ends(), issuer.ends());
    let issued = sign(&loaded, DAY, now()).unwrap();
    assert_eq!(issued.chain.len(), 2, "a root that was written down is not handed out");
    trust(&[&root]).verify(&issued.chain, Usage::Client, now()).unwrap();

    assert_eq!(load(chain.clone(), &root.key().der()).unwrap_err(), AuthorityError::KeyMismatch);
    let reversed = vec![root.certificate().clone(), issuer.certificate().clone()];
    assert_eq!(load(reversed, &root.key().der()).unwrap_err(), AuthorityError::Chain(0));
    assert_eq!(load(Vec::new(), &root.key().der()).unwrap_err(), AuthorityError::Missing("certificate"));
}

#[test]
fn pem_is_read_whatever_was_done_to_its_spaces() {
    let root = root(KeyKind::P256, 100 * DAY);
    let certificate = pem(root.certificate());
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    type Change = (&'static str, fn(&str) -> String);
    let changes: [Change; 7] = [
        ("as it is", str::to_owned),
        ("CR LF", |text| text.replace('\n', "\r\n")),
        ("indented", |text| text.lines().map(|line| format!("    {line}  \n")).collect()),
        ("empty lines", |text| text.replace('\n', "\n\n")),
        ("two characters for a line end", |text| text.replace('\n', "\\n")),
        ("a mark at the beginning", |text| format!("\u{feff}{text}")),
        ("no end of the last line", |text| text.trim_end().to_owned()),
    ];
    for (what, change) in changes {
        let found = pem_certificates(change(&certificate).as_bytes());
        assert_eq!(found.as_deref(), Ok(&[root.certificate().clone()][..]), "{what}");
        let found = pem_key(change(&key).as_bytes()).unwrap_or_else(|error| panic!("{what}: {error}"));
        Key::load(&found).unwrap();
    }
    assert_eq!(pem_certificates(b"").unwrap_err(), AuthorityError::Missing("certificate"));
    assert_eq!(pem_key(certificate.as_bytes()).unwrap_err(), AuthorityError::Missing("private key"));
}

#[test]
fn what_is_wrong_with_an_authority_is_found_before_it_signs() {
    let old = root(KeyKind::P256, 3650 * DAY);
    let good = old.intermediate(&domain(), KeyKind::P256, 365 * DAY, now()).unwrap();
    let rules = |distrusted: Vec<Fingerprint>| Rules { longest_leaf: DAY, distrusted, unlimited: false };
    let whole = trust(&[&old]);
    assert_eq!(good.lint(&whole, &rules(Vec::new()), now()), []);

    // Like an authority, but for what is changed.
    let odd = |change: fn(&mut CertificateParams)| {
        let key = Key::generate(KeyKind::P256).unwrap();
        let mut params =
            authority_params(&domain(), "odd", &key, Some(0), (now(), now() + 365 * DAY)).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &old.issuer).unwrap().der().clone();
        Authority::load(vec![certificate], Vec::new(), key).unwrap()
    };
    type Case = (&'static str, fn(&mut CertificateParams), fn(&[Finding]) -> bool);
    let cases: [Case; 5] = [
        (
            "no authority",
            |params| params.is_ca = IsCa::ExplicitNoCa,
            |found| {
                found.contains(&Finding::NotAnAuthority) && matches!(found.last(), Some(Finding::Trial(_)))
            },
        ),
        (
            "key usage",
            |params| params.key_usages = vec![KeyUsagePurpose::CrlSign],
            |found| found.contains(&Finding::KeyUsage),
        ),
        (
            "no pathlen",
            |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
            |found| found == [Finding::PathLength],
        ),
        (
            "short",
            |params| params.not_after = date!(now() + DAY),
            |found| matches!(found, [Finding::Ends { left: 86_400, needed: 172_800 }]),
        ),
        (
            "tomorrow",
            |params| params.not_before = date!(now() + DAY),
            |found| matches!(found, [Finding::NotYetValid, Finding::Trial(_)]),
        ),
    ];
    for (what, change, expected) in cases {
        let found = odd(change).lint(&whole, &rules(Vec::new()), now());
        assert!(expected(&found), "{what}: {found:?}");
    }
    let found = good.lint(&whole, &rules(vec![good.facts().key_hash]), now());
    assert_eq!(found, [Finding::Distrusted]);
    let other = root(KeyKind::P256, 3650 * DAY);
    assert!(matches!(good.lint(&trust(&[&other]), &rules(Vec::new()), now())[..], [Finding::Trial(_)]));
}

#[test]
fn lists_of_revoked_certificates_are_believed() {
    let root = root(KeyKind::P256, 100 * DAY);
    let (one, other) = (sign(&root, DAY, now()).unwrap(), sign(&root, DAY, now()).unwrap());
    let crl = root.crl([(one.serial.clone(), now())], 7, now(), DAY).unwrap();
    let trust = trust(&[&root]).with_crls([&crl]).unwrap();
    assert!(trust.verify(&one.chain, Usage::Client, now()).is_err());
    assert!(trust.verify(&other.chain, Usage::Client, now()).is_ok());
}

#[test]
fn a_certificate_after_a_revocation_is_not_revoked_by_it() {
    let root = root(KeyKind::P256, 100 * DAY);
    let mut revoked = crate::trust::Revoked::default();
    revoked.identities.insert(identity(), now());
    let trust = trust(&[&root]).with_revoked(revoked);
    let key = public(KeyKind::P256);
    let later = now() + Duration::from_secs(10);
    let mut request =
        Request { key: &key, identity: &identity(), dns_names: &[], ttl: DAY, not_before: None, mark: None };
    let old = root.leaf(&request, &Lifetimes::default(), later).unwrap();
    assert!(trust.verify(&old.chain, Usage::Client, later).is_err());
    request.not_before = Some(now() + Duration::from_secs(1));
    let new = root.leaf(&request, &Lifetimes::default(), later).unwrap();
    assert!(trust.verify(&new.chain, Usage::Client, later).is_ok());
}

#[test]
fn names_that_are_none_are_not_signed() {
    let root = root(KeyKind::P256, 100 * DAY);
    let key = public(KeyKind::P256);
    for name in ["", ".", "a..b", "-a", "a-", "a b", "a/b", "*.test", "\u{e4}", &"a".repeat(64)] {
        let names = [name.to_owned()];
        let request = Request {
            key: &key,
            identity: &identity(),
            dns_names: &names,
            ttl: DAY,
            not_before: None,
            mark: None,
        };
        let refused = root.leaf(&request, &Lifetimes::default(), now()).unwrap_err();
        assert_eq!(refused, AuthorityError::DnsName(name.to_owned()));
    }
}

#[test]
fn a_bundle_is_what_verifies_with_it() {
    let root = root(KeyKind::P256, 100 * DAY);
    let state = crate::ca::RootState::Active;
    let roots = vec![crate::ca::BundleRoot { certificate: root.certificate().clone(), state }];
    let bundle = Bundle {
        shadow_roots: Vec::new(),
        trust_domain: domain(),
        generation: 3,
        least_generation: 0,
        least_connection_generation: 0,
        roots,
        revoked: crate::trust::Revoked::default(),
        made: now(),
    };
    let issued = sign(&root, DAY, now()).unwrap();
    assert!(bundle.trust().unwrap().verify(&issued.chain, Usage::Client, now()).is_ok());
}
