//! Identities, trust and handshakes together, over certificates made here.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConnection, ServerConnection};

use crate::identity::{IdentityPattern, SpiffeId, TrustDomain};
use crate::mesh::{Clients, Expected, InstallError, MeshIdentity, verify_error};
use crate::svid::{Svid, SvidError};
use crate::trust::{Fingerprint, HexId, Revoked, Trust, TrustError, Usage, VerifyError};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// The time of these tests, in seconds since 1970.
const NOW: u64 = 1_800_000_000;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

fn domain() -> TrustDomain {
    "mesh.test".parse().unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::new(&domain(), path).unwrap()
}

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: CertificateDer<'static>,
}

impl Ca {
    fn root() -> Self {
        Self::root_valid(now() - DAY, now() + 365 * DAY)
    }

    fn root_valid(from: SystemTime, to: SystemTime) -> Self {
        let (params, key) = (ca_params(from, to), KeyPair::generate().unwrap());
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { params, key, der }
    }

    fn under(above: &Ca) -> Self {
        let (params, key) = (ca_params(now() - DAY, now() + 90 * DAY), KeyPair::generate().unwrap());
        let der = params.signed_by(&key, &above.issuer()).unwrap().der().clone();
        Self { params, key, der }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn leaf(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = leaf_params("spiffe://mesh.test/ns/default/sa/web");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let der = params.signed_by(&key, &self.issuer()).unwrap().der().clone();
        (der, PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

fn ca_params(from: SystemTime, to: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, unique());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (from.into(), to.into());
    params
}

/// A name that no other authority of the tests has.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("authority {}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn leaf_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(name)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = ((now() - DAY).into(), (now() + DAY).into());
    params
}

fn trust(roots: &[&Ca]) -> Trust {
    generation(1, roots)
}

fn generation(generation: u64, roots: &[&Ca]) -> Trust {
    let roots = roots.iter().map(|ca| ca.der.clone());
    Trust::new(domain(), generation).with_roots(&domain(), roots).unwrap()
}

#[test]
fn a_chain_is_judged_by_everything_that_makes_it_an_identity() {
    let root = Ca::root();
    let (stranger, intermediate) = (Ca::root(), Ca::under(&root));
    let trust = trust(&[&root]);
    let judge = |chain: &[CertificateDer<'static>]| {
        trust.verify(chain, Usage::Client, now()).map(|verified| verified.peer.id.path().to_owned())
    };
    let one = |change: &dyn Fn(&mut CertificateParams)| judge(&[root.leaf(change).0]);
    let web = Ok("/ns/default/sa/web".to_owned());

    assert_eq!(one(&|_| {}), web);
    let below = intermediate.leaf(|_| {}).0;
    assert_eq!(judge(&[below.clone(), intermediate.der.clone()]), web);
    assert_eq!(judge(&[below]), Err(VerifyError::UnknownIssuer), "the chain is not complete");
    assert_eq!(judge(&[]), Err(VerifyError::NoCertificate));
    assert_eq!(judge(&[stranger.leaf(|_| {}).0]), Err(VerifyError::UnknownIssuer));
    assert_eq!(one(&|p| p.subject_alt_names.clear()), Err(VerifyError::UriNames(0)));
    assert_eq!(
        one(&|p| p.subject_alt_names.push(uri("spiffe://mesh.test/other"))),
        Err(VerifyError::UriNames(2))
    );
    let named = |p: &mut CertificateParams| {
        p.subject_alt_names.push(SanType::DnsName("web.test".try_into().unwrap()))
    };
    assert_eq!(one(&named), web, "names of other kinds may stand beside it");
    for wrong in
        ["https://mesh.test/web", "spiffe://mesh.test", "spiffe://Mesh.test/web", "spiffe://mesh.test/a//b"]
    {
        let judged = one(&|p| p.subject_alt_names = vec![uri(wrong)]);
        assert!(matches!(judged, Err(VerifyError::Identity(_))), "{wrong} {judged:?}");
    }
    let foreign = one(&|p| p.subject_alt_names = vec![uri("spiffe://other.test/web")]);
    assert_eq!(foreign, Err(VerifyError::TrustDomain("other.test".to_owned())));
    let purpose = |judged: Result<String, VerifyError>| {
        assert!(matches!(judged, Err(VerifyError::Purpose(_))), "{judged:?}")
    };
    purpose(one(&|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)));
    purpose(one(&|p| p.key_usages.clear()));
    purpose(one(&|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]));
    purpose(one(&|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)));
    purpose(one(&|p| p.extended_key_usages.clear()));
    purpose(one(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]));
    assert_eq!(one(&|p| p.not_after = (now() - DAY / 2).into()), Err(VerifyError::Expired));
    assert_eq!(one(&|p| p.not_before = (now() + DAY / 2).into()), Err(VerifyError::NotYetValid));
    let ten = Duration::from_secs(10);
    assert_eq!(one(&|p| p.not_after = (now() - ten).into()), web, "clocks differ a little");
    assert_eq!(one(&|p| p.not_before = (now() + ten).into()), web);
    let leaf = root.leaf(|_| {}).0;
    let mut behind = leaf.to_vec();
    behind.push(0);
    assert!(matches!(judge(&[behind.into()]), Err(VerifyError::Malformed(_))));
    assert!(matches!(judge(&[leaf[..leaf.len() / 2].to_vec().into()]), Err(VerifyError::Malformed(_))));
    assert!(matches!(judge(&vec![leaf; 9]), Err(VerifyError::Malformed(_))));
}

#[test]
fn a_root_counts_for_its_own_domain_and_as_long_as_it_is_valid() {
    let (root, expired) = (Ca::root(), Ca::root_valid(now() - 10 * DAY, now() - DAY));
    let leaf = expired.leaf(|_| {}).0;
    let old = trust(&[&root, &expired]);
    assert_eq!(old.verify(&[leaf], Usage::Server, now()), Err(VerifyError::Expired), "webpki does not look");
    assert_eq!(trust(&[&expired]).check(now()), Err(TrustError::NoRoot(domain())));
    let other: TrustDomain = "other.test".parse().unwrap();
    let federated = trust(&[&root]).with_roots(&other, [expired.der.clone()]).unwrap();
    let mine = root.leaf(|p| p.subject_alt_names = vec![uri("spiffe://other.test/web")]).0;
    let judged = federated.verify(&[mine], Usage::Client, now());
    assert_eq!(judged, Err(VerifyError::UnknownIssuer), "a root cannot speak for another domain");
    let leaf = root.leaf(|_| {}).0;
    assert!(matches!(trust(&[]).with_roots(&domain(), [leaf]), Err(TrustError::Root { index: 0, .. })));
}

#[test]
fn what_was_revoked_or_distrusted_is_refused() {
    let root = Ca::root();
    let intermediate = Ca::under(&root);
    let leaf = intermediate.leaf(|p| p.serial_number = Some(SerialNumber::from(vec![0x01, 0x02]))).0;
    let chain = [leaf, intermediate.der.clone()];
    let judge =
        |revoked| trust(&[&root]).with_revoked(revoked).verify(&chain, Usage::Client, now()).map(|_| ());
    assert_eq!(judge(Revoked::default()), Ok(()));
    let serials = [HexId::new(&[0, 1, 2])].into();
    assert_eq!(judge(Revoked { serials, ..Revoked::default() }), Err(VerifyError::Revoked));
    let since = |at| Revoked { identities: [(id("/ns/default/sa/web"), at)].into(), ..Revoked::default() };
    assert_eq!(judge(since(now())), Err(VerifyError::Revoked));
    assert_eq!(judge(since(now() - 2 * DAY)), Ok(()), "a newer certificate is another matter");
    for distrusted in [&intermediate.der, &root.der] {
        let authorities = [Fingerprint::of(distrusted)].into();
        assert_eq!(judge(Revoked { authorities, ..Revoked::default() }), Err(VerifyError::Distrusted));
    }
    let crl = CertificateRevocationListParams {
        this_update: (now() - DAY).into(),
        next_update: (now() + DAY).into(),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(vec![1, 2]),
            revocation_time: (now() - DAY).into(),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = crl.signed_by(&intermediate.issuer()).unwrap();
    let listed = trust(&[&root]).with_crls([crl.der()]).unwrap();
    assert_eq!(listed.verify(&chain, Usage::Client, now()), Err(VerifyError::Revoked));
    let other = intermediate.leaf(|_| {}).0;
    assert!(listed.verify(&[other, intermediate.der.clone()], Usage::Client, now()).is_ok());
}

#[test]
fn connections_are_short_lived_while_others_may_not_have_heard_of_a_bundle() {
    let ca = Ca::root();
    let identity = process(&ca, "/ns/a/sa/b", &[&ca]);
    assert!(!identity.is_moving(), "the first bundle is no rotation");
    identity.set_trust(trust(&[&ca])).unwrap();
    assert!(!identity.is_moving(), "nothing has to be made anew");
    identity.set_trust(trust(&[&ca]).with_least_connection(1)).unwrap();
    assert!(identity.is_moving());
}

#[derive(Debug)]
struct Clock(AtomicU64);

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::Relaxed))))
    }
}

fn process(ca: &Ca, path: &str, roots: &[&Ca]) -> MeshIdentity {
    let identity = MeshIdentity::with_clock(Arc::new(Clock(AtomicU64::new(NOW))));
    identity.set_trust(trust(roots)).unwrap();
    identity.install(svid(ca, path)).unwrap();
    identity
}

fn svid(ca: &Ca, path: &str) -> Svid {
    let (leaf, key) = ca.leaf(|p| p.subject_alt_names = vec![uri(id(path).as_str())]);
    Svid::new(vec![leaf], &key).unwrap()
}

/// Shakes hands in memory: what each side ends with.
fn handshake(
    client: &MeshIdentity,
    server: &MeshIdentity,
    expected: Expected,
) -> (Result<(), rustls::Error>, Result<(), rustls::Error>) {
    let config = client.client_config(expected, &[b"postern-h2"]).unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut client = ClientConnection::new(config, name).unwrap();
    let config = server.server_config(Clients::Required, &[b"postern-h2"]).unwrap();
    let mut server = ServerConnection::new(config).unwrap();
    let mut ends = (Ok(()), Ok(()));
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut bytes = &wire[..];
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            ends.1 = ends.1.and(server.process_new_packets().map(|_| ()));
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut bytes = &wire[..];
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            ends.0 = ends.0.and(client.process_new_packets().map(|_| ()));
        }
    }
    if ends.0.is_ok() && ends.1.is_ok() {
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert_eq!(server.alpn_protocol(), Some(&b"postern-h2"[..]));
    }
    ends
}

#[test]
fn peers_shake_hands_as_who_they_are_now() {
    let (old, new) = (Ca::root(), Ca::root());
    let (web, orders) = (process(&old, "/web", &[&old]), process(&old, "/orders", &[&old]));
    let only = |path: &str| Expected::from(id(path));
    assert_eq!(handshake(&web, &orders, only("/orders")), (Ok(()), Ok(())));
    assert_eq!(handshake(&web, &orders, Expected::OwnDomain), (Ok(()), Ok(())));
    let under: IdentityPattern = "spiffe://mesh.test/*".parse().unwrap();
    assert_eq!(handshake(&web, &orders, Expected::AnyOf([under].into())), (Ok(()), Ok(())));

    let refused = handshake(&web, &orders, only("/other")).0.unwrap_err();
    assert!(
        matches!(verify_error(&refused), Some(VerifyError::Unexpected { found, .. }) if found == id("/orders"))
    );
    assert!(web.refused().contains(&(Usage::Server, "unexpected_peer", 1)), "{:?}", web.refused());

    // A root comes, certificates change one by one, the old root goes: nobody is refused at any time.
    let all = || {
        handshake(&web, &orders, Expected::OwnDomain) == (Ok(()), Ok(()))
            && handshake(&orders, &web, Expected::OwnDomain) == (Ok(()), Ok(()))
    };
    let steps: [&dyn Fn(); 6] = [
        &|| web.set_trust(generation(2, &[&old, &new])).unwrap(),
        &|| orders.set_trust(generation(2, &[&old, &new])).unwrap(),
        &|| orders.install(svid(&new, "/orders")).unwrap(),
        &|| web.install(svid(&new, "/web")).unwrap(),
        &|| web.set_trust(generation(3, &[&new])).unwrap(),
        &|| orders.set_trust(generation(3, &[&new])).unwrap(),
    ];
    for (index, step) in steps.iter().enumerate() {
        step();
        assert!(all(), "after step {index}");
    }
    let late = process(&old, "/late", &[&old, &new]);
    let (client, server) = handshake(&late, &web, Expected::OwnDomain);
    assert_eq!(verify_error(&server.unwrap_err()), Some(VerifyError::UnknownIssuer));
    assert!(client.is_err(), "the alert arrives");
}

#[test]
fn what_cannot_work_is_not_installed_and_what_was_there_stays() {
    let (root, other) = (Ca::root(), Ca::root());
    let web = process(&root, "/web", &[&root]);
    let before = web.svid().unwrap();
    let changes = *web.changes().borrow();
    let refused = web.install(svid(&other, "/web"));
    assert_eq!(refused, Err(InstallError::Unverified(VerifyError::UnknownIssuer)));
    assert!(matches!(web.install(svid(&root, "/orders")), Err(InstallError::Identity { .. })));
    assert!(matches!(web.set_trust(trust(&[])), Err(InstallError::Trust(TrustError::NoRoot(_)))));
    web.set_trust(generation(5, &[&root])).unwrap();
    assert_eq!(web.set_trust(trust(&[&root])), Err(InstallError::Older { new: 1, current: 5 }));
    assert!(Arc::ptr_eq(&before, &web.svid().unwrap()));
    assert_eq!(*web.changes().borrow(), changes + 1);
    let nobody = MeshIdentity::new();
    assert_eq!(nobody.install(svid(&root, "/web")), Err(InstallError::NoTrust));
    let (leaf, _) = root.leaf(|_| {});
    let (_, key) = root.leaf(|_| {});
    assert_eq!(Svid::new(vec![leaf], &key).unwrap_err(), SvidError::Mismatch);
}

#[test]
fn without_an_identity_there_is_no_handshake() {
    let root = Ca::root();
    let web = process(&root, "/web", &[&root]);
    let nobody = MeshIdentity::with_clock(Arc::new(Clock(AtomicU64::new(NOW))));
    nobody.set_trust(trust(&[&root])).unwrap();
    let (_, server) = handshake(&nobody, &web, Expected::OwnDomain);
    assert_eq!(server, Err(rustls::Error::NoCertificatesPresented));
    let (client, server) = handshake(&web, &nobody, Expected::OwnDomain);
    assert!(client.is_err() && server.is_err());
}
