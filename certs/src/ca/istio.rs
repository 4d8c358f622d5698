//! Istio's `CreateCertificate` in front of an authority: for clients that speak nothing else, such as Istio's agent and
//! ztunnel.
//!
//! Who asks is found out as at the main door, by a bearer token or the certificate that he shows, and the same service signs.
//! The last entry of an answer is all roots of the bundle. Nobody says what he uses here, so what a rotation knows of these
//! clients is what they were handed.

pub mod door;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::{self, PemObject};
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use tracing::debug;

use super::attest::node::{self, Accounts};
use super::attest::session::Session;
use super::attest::{self, Attestors, Grant, Refusal, renewal, token};
use super::authority;
use super::proto::attest_request::Proof;
use super::proto::{JoinToken, KubernetesToken, Renewal};
use super::service::{Hearing, Service, Signed, Wish};
use super::{BundleRoot, RootState};
use crate::grpc::Caller;
use crate::identity::SpiffeId;
use crate::istio::proto;
use crate::istio::proto::istio_certificate_service_server::IstioCertificateService;
use crate::trust::{Fingerprint, Peer, Serial};

/// How calls here are counted.
const CALL: &str = "create_certificate";
/// How long it may take to write down what was handed to whom.
const WRITTEN: Duration = Duration::from_secs(5);
/// The metadata by which a node's proxy says whom it asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The service in front of another.
pub struct Front {
    service: Service,
    attestors: Attestors,
    accounts: Accounts,
}

impl Front {
    /// Takes these proofs; `accounts` are those of proxies that ask for the pods of their node.
    pub fn new(service: Service, attestors: Attestors, accounts: Accounts) -> Self {
        Self { service, attestors, accounts }
    }

    pub(super) fn service(&self) -> &Service {
        &self.service
    }

    async fn answer(
        &self,
        caller: &Caller,
        metadata: &MetadataMap,
        asked: proto::IstioCertificateRequest,
    ) -> Result<(proto::IstioCertificateResponse, &'static str), (Status, &'static str)> {
        let none = |status| (status, "none");
        let ttl_s = u64::try_from(asked.validity_duration)
            .map_err(|_| none(Status::invalid_argument("validity_duration is less than nothing")))?;
        // A request that is none does not use up a token.
        let csr_der = csr(&asked.csr).map_err(none)?;
        let bearer = bearer(metadata).map_err(none)?;
        let wanted = wanted(asked.metadata.unwrap_or_default()).map_err(none)?;
        let grant = match &wanted {
            Some(wanted) => self.on_node(caller, bearer, wanted).await?,
            None => self.attested(caller, bearer).await?,
        };
        let kind = grant.attestor;
        let failed = |status| (status, kind);
        self.service.found(caller, &grant).map_err(failed)?;
        let leaf = caller.chain.first().filter(|_| kind == renewal::KIND);
        let shown = leaf.and_then(|leaf| Peer::read(leaf).ok()).map(|leaf| leaf.serial);
        let proxy_id = self.process(&grant, shown.as_ref(), &csr_der);
        let session = Session::of(grant, self.service.now());
        let wish = Wish { csr_der, ttl_s, proxy_id, session, hearing: Hearing::Nothing { shown } };
        let signed = self.service.sign(wish).await.map_err(failed)?;
        // Nobody will say that he has this: it must not be forgotten.
        let written = timeout(WRITTEN, self.service.acks().written()).await;
        if let Err(error) = written.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            debug!(error, "a certificate is not handed out, because that cannot be written down");
            return Err(failed(Status::unavailable("what is handed out cannot be written down")));
        }
        Ok((proto::IstioCertificateResponse { cert_chain: entries(&signed), root_cert: None }, kind))
    }

    /// Who the caller is: by the certificate that he shows, if it holds, else by his token.
    async fn attested(&self, caller: &Caller, bearer: Option<&str>) -> Result<Grant, (Status, &'static str)> {
        let current = self.service.current();
        let judging = self.service.judging(caller, &current);
        let holds = !caller.chain.is_empty() && renewal::verify(&judging).is_ok();
        let proof = match bearer {
            Some(secret) if !holds && token::looks_like_one(secret) => {
                Proof::JoinToken(JoinToken { secret: secret.to_owned() })
            }
            Some(secret) if !holds => Proof::Kubernetes(KubernetesToken { token: secret.to_owned() }),
            None if caller.chain.is_empty() => {
                let words = "show a token (`authorization: Bearer TOKEN`) or a certificate of this authority";
                return Err((Status::unauthenticated(words), "none"));
            }
            _ => Proof::Renewal(Renewal {}),
        };
        let kind = attest::kind(&proof);
        self.service.admit(caller, kind).map_err(|status| (status, kind))?;
        let judged = self.attestors.attest(&proof, None, &judging);
        self.service.prove(caller, kind, None, judged).await.map_err(|status| (status, kind))
    }

    /// For a node's proxy that asks in the name of a pod.
    async fn on_node(
        &self,
        caller: &Caller,
        bearer: Option<&str>,
        wanted: &SpiffeId,
    ) -> Result<Grant, (Status, &'static str)> {
        let failed = |status| (status, node::KIND);
        self.service.admit(caller, node::KIND).map_err(failed)?;
        let current = self.service.current();
        let judged = async {
            let secret =
                bearer.ok_or_else(|| Refusal::Proof("a node's proxy has to show its token".to_owned()))?;
            let cluster = self.attestors.kubernetes.as_ref();
            let cluster = cluster
                .ok_or_else(|| Refusal::Proof("tokens of Kubernetes are not taken here".to_owned()))?;
            let domain = &current.bundle().trust_domain;
            cluster.attest_node(secret, wanted, &self.accounts, domain, self.service.now()).await
        };
        self.service.prove(caller, node::KIND, Some(wanted), judged).await.map_err(failed)
    }

    /// Which process of an identity this is: the one that it was when it was handed what it shows. Who can be told by nothing is
    /// somebody new, and nothing that was handed out before counts as replaced.
    fn process(&self, grant: &Grant, shown: Option<&Serial>, csr_der: &[u8]) -> String {
        match (&grant.process, shown) {
            (Some(process), _) => format!("istio:{process}"),
            (None, Some(serial)) => {
                let holder = self.service.acks().holder(&grant.identity, serial);
                holder.unwrap_or_else(|| format!("istio:certificate/{serial}"))
            }
            (None, None) => {
                let hash = Fingerprint::of(csr_der).to_string();
                format!("istio:request/{}", hash.get(..16).unwrap_or(&hash))
            }
        }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Front {
    async fn create_certificate(
        &self,
        request: Request<proto::IstioCertificateRequest>,
    ) -> Result<Response<proto::IstioCertificateResponse>, Status> {
        let caller = Caller::of(&request);
        let (metadata, _, asked) = request.into_parts();
        match self.answer(&caller, &metadata, asked).await {
            Ok((answer, kind)) => {
                self.service.count(CALL, kind, Code::Ok);
                Ok(Response::new(answer))
            }
            Err((status, kind)) => {
                debug!(code = ?status.code(), reason = status.message(), kind, "a client of Istio is refused");
                self.service.count(CALL, kind, status.code());
                Err(status)
            }
        }
    }
}

/// The request in its PEM.
fn csr(text: &str) -> Result<Vec<u8>, Status> {
    let found = CertificateSigningRequestDer::from_pem_slice(text.as_bytes());
    found.map(|der| der.to_vec()).map_err(|error| {
        let problem = match error {
            pem::Error::NoItemsFound => "there is no CERTIFICATE REQUEST in it".to_owned(),
            error => error.to_string(),
        };
        Status::invalid_argument(format!("the csr is not PKCS #10 in PEM: {problem}"))
    })
}

/// The token that comes with a call.
fn bearer(metadata: &MetadataMap) -> Result<Option<&str>, Status> {
    let mut given = metadata.get_all("authorization").iter();
    let Some(value) = given.next() else { return Ok(None) };
    if given.next().is_some() {
        return Err(Status::invalid_argument("there are several `authorization`"));
    }
    let wrong = || Status::unauthenticated("`authorization` is not of the form `Bearer TOKEN`");
    let (scheme, secret) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(wrong)?;
    let secret = secret.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || secret.is_empty() {
        return Err(wrong());
    }
    Ok(Some(secret))
}

/// Whom a node's proxy asks for.
fn wanted(mut metadata: proto::Struct) -> Result<Option<SpiffeId>, Status> {
    let Some(said) = metadata.fields.remove(IMPERSONATED) else { return Ok(None) };
    let wanted = said.string_value.parse();
    wanted.map(Some).map_err(|error| Status::invalid_argument(format!("{IMPERSONATED}: {error}")))
}

/// The certificate and those above it, one to an entry; the last entry is all roots, first the one that this chain leads
/// to, because there are clients that read no other.
fn entries(signed: &Signed) -> Vec<String> {
    let mut entries: Vec<String> = signed.issued.chain.iter().map(authority::pem).collect();
    let roots = &signed.current.bundle().roots;
    let (signing, others): (Vec<&BundleRoot>, Vec<&BundleRoot>) =
        roots.iter().partition(|root| root.state == RootState::Active);
    entries.push(signing.into_iter().chain(others).map(|root| authority::pem(&root.certificate)).collect());
    entries
}
