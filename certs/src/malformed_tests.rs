//! Certificates that no peer may get in with, each wrong in one way, and what is said of it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, GeneralSubtree,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;

use crate::identity::TrustDomain;
use crate::trust::{Fingerprint, Revoked, Serial, Trust, Usage};

const DAY: u64 = 86_400;
const NOW: u64 = 1_800_000_000;
const SAN: &[u64] = &[2, 5, 29, 17];
const GOOD: &str = "spiffe://mesh.local/ns/default/sa/orders";

type Change = fn(&mut CertificateParams);
type Chain = Vec<CertificateDer<'static>>;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

macro_rules! date {
    ($seconds:expr) => {
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs($seconds)
    };
}

fn domain() -> TrustDomain {
    "mesh.local".parse().unwrap()
}

/// An authority with its certificate.
struct Signer {
    certificate: CertificateDer<'static>,
    params: CertificateParams,
    key: KeyPair,
}

fn authority(name: &str, path: Option<u8>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(path.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = date!(NOW - DAY);
    params.not_after = date!(NOW + 100 * DAY);
    params
}

impl Signer {
    fn root(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: params.self_signed(&key).unwrap().der().clone(), params, key }
    }

    fn below(&self, params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: params.signed_by(&key, &self.issuer()).unwrap().der().clone(), params, key }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        leaf_params(change).signed_by(&key, &self.issuer()).unwrap().der().clone()
    }
}

/// A certificate that is as it should be, but for what is changed.
fn leaf_params(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(GOOD.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = date!(NOW - 300);
    params.not_after = date!(NOW + DAY);
    params.serial_number = Some(SerialNumber::from_slice(&[0x4d, 1, 2, 3]));
    change(&mut params);
    params
}

/// DER of short and long things.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut out = vec![tag];
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.push(short),
        _ => {
            out.push(0x82);
            out.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        }
    }
    out.extend_from_slice(content);
    out
}

/// Names as they are given, whatever they are.
fn names(params: &mut CertificateParams, names: &[(u8, &[u8])]) {
    params.subject_alt_names.clear();
    let content = names.iter().flat_map(|(tag, name)| der(*tag, name)).collect::<Vec<_>>();
    params.custom_extensions.push(CustomExtension::from_oid_content(SAN, der(0x30, &content)));
}

const URI: u8 = 0x86;
const DNS: u8 = 0x82;
const MAIL: u8 = 0x81;

struct World {
    root: Signer,
    issuer: Signer,
}

impl World {
    fn new() -> Self {
        let root = Signer::root(authority("root", None));
        let issuer = root.below(authority("issuer", Some(0)));
        Self { root, issuer }
    }

    fn trust(&self) -> Trust {
        Trust::new(domain(), 1).with_roots(&domain(), [self.root.certificate.clone()]).unwrap()
    }

    fn chain(&self, change: impl FnOnce(&mut CertificateParams)) -> Chain {
        vec![self.issuer.leaf(change), self.issuer.certificate.clone()]
    }

    fn code(&self, chain: &[CertificateDer<'_>]) -> &'static str {
        code(&self.trust(), chain)
    }
}

/// What is said of it by both sides, which say the same.
fn code(trust: &Trust, chain: &[CertificateDer<'_>]) -> &'static str {
    let said = [Usage::Client, Usage::Server].map(|usage| match trust.verify(chain, usage, at(NOW)) {
        Ok(_) => "taken",
        Err(error) => error.code(),
    });
    assert_eq!(said[0], said[1]);
    said[0]
}

#[test]
fn what_is_as_it_should_be_is_taken() {
    let world = World::new();
    assert_eq!(world.code(&world.chain(|_| {})), "taken");
    let also_dns: Change =
        |it| it.subject_alt_names.push(SanType::DnsName("orders.test".try_into().unwrap()));
    assert_eq!(world.code(&world.chain(also_dns)), "taken");
    let by_hand: Change = |it| names(it, &[(DNS, b"orders.test"), (URI, GOOD.as_bytes())]);
    assert_eq!(
        world.code(&world.chain(by_hand)),
        "taken",
        "the names of the cases below are read as they are made"
    );
}

#[test]
fn names_that_are_no_identity_are_refused() {
    let world = World::new();
    let long = format!("spiffe://mesh.local/{}", "a".repeat(2048));
    let uris: [(&str, &[u8]); 26] = [
        ("another scheme", b"https://mesh.local/ns/default/sa/orders"),
        ("no scheme", b"mesh.local/ns/default/sa/orders"),
        ("the scheme in capitals", b"SPIFFE://mesh.local/ns/default/sa/orders"),
        ("one slash", b"spiffe:/mesh.local/a"),
        ("the trust domain in capitals", b"spiffe://Mesh.Local/a"),
        ("a query", b"spiffe://mesh.local/a?b=c"),
        ("an empty query", b"spiffe://mesh.local/a?"),
        ("a fragment", b"spiffe://mesh.local/a#b"),
        ("a user", b"spiffe://admin@mesh.local/a"),
        ("a user and a password", b"spiffe://admin:secret@mesh.local/a"),
        ("a port", b"spiffe://mesh.local:443/a"),
        ("an empty segment", b"spiffe://mesh.local/ns//sa"),
        ("empty segments alone", b"spiffe://mesh.local//"),
        ("a slash at the end", b"spiffe://mesh.local/a/"),
        ("no path", b"spiffe://mesh.local"),
        ("an empty path", b"spiffe://mesh.local/"),
        ("a dot", b"spiffe://mesh.local/./a"),
        ("two dots", b"spiffe://mesh.local/a/../admin"),
        ("escaped", b"spiffe://mesh.local/a%2fb"),
        ("escaped letters", b"spiffe://mesh.local/%61"),
        ("no trust domain", b"spiffe:///a"),
        ("a wildcard", b"spiffe://mesh.local/*"),
        ("a space", b"spiffe://mesh.local/a b"),
        ("a line end", b"spiffe://mesh.local/a\nspiffe://mesh.local/b"),
        ("a NUL", b"spiffe://mesh.local/a\0.evil"),
        ("too long", long.as_bytes()),
    ];
    for (what, uri) in uris {
        let said = world.code(&world.chain(|it| names(it, &[(URI, uri)])));
        assert_eq!(said, "identity", "{what}");
    }
    #[expect(clippy::type_complexity, reason = "written once, and read where it stands")]
    let cases: [(&str, &[(u8, &[u8])]); 7] = [
        ("no names", &[]),
        ("two identities", &[(URI, GOOD.as_bytes()), (URI, b"spiffe://mesh.local/admin")]),
        ("one identity twice", &[(URI, GOOD.as_bytes()), (URI, GOOD.as_bytes())]),
        ("an identity and another URI", &[(URI, GOOD.as_bytes()), (URI, b"https://mesh.local")]),
        ("an identity as a DNS name", &[(DNS, GOOD.as_bytes())]),
        ("an identity as a mail address", &[(MAIL, GOOD.as_bytes())]),
        ("an empty URI", &[(URI, b"")]),
    ];
    for (what, list) in cases {
        let said = world.code(&world.chain(|it| names(it, list)));
        // Some are refused before names are looked at.
        assert!(matches!(said, "identity" | "malformed"), "{what}: {said}");
    }
    let not_ascii =
        world.code(&world.chain(|it| names(it, &[(URI, "spiffe://mesh.local/\u{e4}".as_bytes())])));
    assert!(matches!(not_ascii, "identity" | "malformed"), "{not_ascii}");
    let elsewhere =
        world.code(&world.chain(|it| names(it, &[(URI, b"spiffe://other.test/ns/default/sa/orders")])));
    assert_eq!(elsewhere, "trust_domain");
    let no_names: Change = |it| {
        it.subject_alt_names.clear();
        it.distinguished_name.push(DnType::CommonName, GOOD);
    };
    assert_eq!(world.code(&world.chain(no_names)), "identity", "a common name is no identity");
    let twice: Change = |it| {
        let content = der(0x30, &der(URI, b"spiffe://mesh.local/admin"));
        it.custom_extensions.push(CustomExtension::from_oid_content(SAN, content));
    };
    assert_ne!(world.code(&world.chain(twice)), "taken", "two lists of names");
}

#[test]
fn certificates_that_are_meant_for_something_else_are_refused() {
    let world = World::new();
    let cases: [(&str, Change); 12] = [
        ("no extended key usage", |it| it.extended_key_usages.clear()),
        ("for servers alone", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ("for clients alone", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
        ("for anything", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]),
        ("for code", |it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ("no key usage", |it| it.key_usages.clear()),
        ("a key that signs nothing", |it| it.key_usages = vec![KeyUsagePurpose::KeyAgreement]),
        ("a key that signs certificates", |it| it.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ("a key that signs lists", |it| it.key_usages.push(KeyUsagePurpose::CrlSign)),
        ("an authority", |it| it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        ("an authority of length 0", |it| it.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))),
        ("an authority that looks like one", |it| {
            it.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            it.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            it.extended_key_usages.clear();
        }),
    ];
    for (what, change) in cases {
        assert_eq!(world.code(&world.chain(change)), "purpose", "{what}");
    }
    let unknown: Change = |it| {
        let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
        extension.set_criticality(true);
        it.custom_extensions.push(extension);
    };
    assert_ne!(world.code(&world.chain(unknown)), "taken", "something critical that nobody knows");
}

#[test]
fn certificates_out_of_their_time_are_refused() {
    let world = World::new();
    let cases: [(&str, Change, &str); 5] = [
        (
            "ended a day ago",
            |it| {
                it.not_before = date!(NOW - 2 * DAY);
                it.not_after = date!(NOW - DAY);
            },
            "expired",
        ),
        ("ended before the skew", |it| it.not_after = date!(NOW - 21), "expired"),
        ("begins tomorrow", |it| it.not_before = date!(NOW + DAY), "not_yet_valid"),
        ("begins after the skew", |it| it.not_before = date!(NOW + 21), "not_yet_valid"),
        ("ends before it begins", |it| it.not_after = date!(NOW - 400), "malformed"),
    ];
    for (what, change, expected) in cases {
        assert_eq!(world.code(&world.chain(change)), expected, "{what}");
    }
    let within: [(&str, Change); 2] = [
        ("ended within the skew", |it| it.not_after = date!(NOW - 19)),
        ("begins within the skew", |it| it.not_before = date!(NOW + 19)),
    ];
    for (what, change) in within {
        assert_eq!(world.code(&world.chain(change)), "taken", "{what}");
    }
    let mut old = authority("old issuer", Some(0));
    old.not_after = date!(NOW - DAY);
    let old = world.root.below(old);
    assert_eq!(world.code(&[old.leaf(|_| {}), old.certificate.clone()]), "expired", "its issuer has ended");
    let mut ended = authority("ended root", None);
    ended.not_after = date!(NOW - DAY);
    let ended = Signer::root(ended);
    let trust = Trust::new(domain(), 1).with_roots(&domain(), [ended.certificate.clone()]).unwrap();
    let issuer = ended.below(authority("issuer", Some(0)));
    assert_eq!(
        code(&trust, &[issuer.leaf(|_| {}), issuer.certificate.clone()]),
        "expired",
        "its root has ended"
    );
}

#[test]
fn chains_that_lead_nowhere_are_refused() {
    let world = World::new();
    let whole = world.chain(|_| {});
    let leaf = || whole[0].clone();
    let issuer = || whole[1].clone();

    let key = KeyPair::generate().unwrap();
    let own = leaf_params(|_| {}).self_signed(&key).unwrap().der().clone();
    let other = World::new();
    let same_name = world.root.below(authority("issuer", Some(0)));
    let by_leaf = {
        // A workload that signs with the key of its certificate.
        let key = KeyPair::generate().unwrap();
        let params = leaf_params(|it| it.distinguished_name.push(DnType::CommonName, "leaf"));
        let certificate = params.signed_by(&key, &world.issuer.issuer()).unwrap().der().clone();
        let signer = Signer { certificate, params: authority("leaf", None), key };
        vec![signer.leaf(|_| {}), signer.certificate.clone(), issuer()]
    };
    let too_deep = {
        let below = world.issuer.below(authority("below", None));
        vec![below.leaf(|_| {}), below.certificate.clone(), issuer()]
    };
    let constrained = {
        let mut params = authority("constrained", Some(0));
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName("shop.test".to_owned())],
            excluded_subtrees: Vec::new(),
        });
        let signer = world.root.below(params);
        let change: Change =
            |it| it.subject_alt_names.push(SanType::DnsName("admin.test".try_into().unwrap()));
        vec![signer.leaf(change), signer.certificate.clone()]
    };
    let not_an_authority = {
        let mut params = authority("no authority", None);
        params.is_ca = IsCa::NoCa;
        let signer = world.root.below(params);
        vec![signer.leaf(|_| {}), signer.certificate.clone()]
    };
    let cases: [(&str, Chain); 10] = [
        ("signed by itself", vec![own]),
        ("of another root", other.chain(|_| {})),
        ("of another root, with the right issuer beside it", vec![other.issuer.leaf(|_| {}), issuer()]),
        ("without its issuer", vec![leaf()]),
        ("with an issuer of the same name", vec![leaf(), same_name.certificate.clone()]),
        ("by an issuer of the same name", vec![same_name.leaf(|_| {}), issuer()]),
        ("signed by a workload", by_leaf),
        ("below an issuer that may sign no authorities", too_deep),
        ("with names that its issuer may not give", constrained),
        ("below what is no authority", not_an_authority),
    ];
    for (what, chain) in cases {
        assert_eq!(world.code(&chain), "unknown_issuer", "{what}");
    }
    assert_eq!(world.code(&[]), "no_certificate");
    let mut many = vec![leaf()];
    many.extend((0..20).map(|_| issuer()));
    assert_eq!(world.code(&many), "malformed", "more certificates than anybody needs");
    assert_eq!(world.code(&[issuer()]), "purpose", "the issuer itself");
    let garbage = [CertificateDer::from(vec![0x30, 3, 1, 2, 3]), issuer()];
    assert_eq!(world.code(&garbage), "malformed");
    let behind = CertificateDer::from([leaf().to_vec(), vec![0]].concat());
    assert_eq!(world.code(&[behind, issuer()]), "malformed");
    assert_ne!(world.code(&[leaf(), CertificateDer::from(vec![0x30, 3, 1, 2, 3])]), "taken");
}

/// Whichever bit of a certificate is changed, and wherever it is cut: it is not taken, and nothing panics.
#[test]
fn no_changed_certificate_is_taken() {
    let world = World::new();
    let (chain, trust) = (world.chain(|_| {}), world.trust());
    let mut rng = fastrand::Rng::new();
    for byte in 0..chain[0].len() {
        let mut changed = chain[0].to_vec();
        changed[byte] ^= 1 << rng.u32(0..8);
        let changed = [CertificateDer::from(changed), chain[1].clone()];
        assert!(trust.verify(&changed, Usage::Client, at(NOW)).is_err(), "byte {byte}");
        let cut = [CertificateDer::from(chain[0][..byte].to_vec()), chain[1].clone()];
        assert!(trust.verify(&cut, Usage::Client, at(NOW)).is_err(), "cut at {byte}");
    }
}

#[test]
fn what_was_taken_back_is_refused() {
    let world = World::new();
    let chain = world.chain(|_| {});
    let with = |revoked: Revoked| code(&world.trust().with_revoked(revoked), &chain);
    let mut serial = Revoked::default();
    serial.serials.insert(Serial::new(&[0, 0x4d, 1, 2, 3]));
    assert_eq!(with(serial), "revoked", "its number, with a leading zero");
    let mut identity = Revoked::default();
    identity.identities.insert(GOOD.parse().unwrap(), at(NOW));
    assert_eq!(with(identity), "revoked", "its identity");
    for certificate in [&world.issuer.certificate, &world.root.certificate] {
        let mut authority = Revoked::default();
        authority.authorities.insert(Fingerprint::of(certificate));
        assert_eq!(with(authority), "distrusted");
    }
    let mut others = Revoked::default();
    others.serials.insert(Serial::new(&[0x4d, 1, 2, 4]));
    others.identities.insert("spiffe://mesh.local/ns/default/sa/other".parse().unwrap(), at(NOW));
    others.identities.insert(GOOD.parse().unwrap(), at(NOW - 301));
    assert_eq!(with(others), "taken", "others are no concern of it, nor what was before it");
}
