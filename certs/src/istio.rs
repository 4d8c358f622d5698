//! Takes the identity of this process from an authority that speaks Istio's `CreateCertificate`, such as istiod.
//!
//! A bearer token says who asks; it is read anew for each request, because Kubernetes replaces it. The last entry of an
//! answer holds the roots, and there is no other way to learn of them: a root that is added is known at the next renewal.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use http::Uri;
use rustls::pki_types::{CertificateDer, ServerName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::ca::authority::pem_certificates;
use crate::ca::channel::{self, Pin};
use crate::grpc::{self, Dial};
use crate::renewing::{Csr, Failure, Signed, Signer};
use crate::token::Token;
use proto::istio_certificate_service_client::IstioCertificateServiceClient;

/// The messages, made from the proto file.
#[allow(
    missing_docs,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::nursery,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "made by tonic"
)]
pub(crate) mod proto {
    tonic::include_proto!("istio.v1.auth");
}

/// More entries than any chain has.
const MAX_ENTRIES: usize = 16;

/// An authority with Istio's API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `host:port`, such as `istiod.istio-system.svc:15012`.
    pub address: String,
    /// The name in the authority's certificate, where it is not the host.
    #[serde(default)]
    pub server_name: Option<String>,
    /// PEM of the roots that the authority's own certificate is from. It is read at each connection.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// In place of `ca_file`, the hash of the authority's key: `sha256/` and base64.
    #[serde(default)]
    pub pin: Option<String>,
    /// The token that is sent: `file: /var/run/secrets/tokens/istio-token`. Its audience has to be the authority's.
    pub token: Token,
    /// How long certificates are to live, in seconds; what the authority gives where this is not set.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// Istio's API as an issuer.
#[derive(Debug)]
pub struct Istio {
    address: String,
    server_name: Option<String>,
    believed: Believed,
    token: Token,
    ttl: Option<Duration>,
}

#[derive(Clone, Debug)]
enum Believed {
    File(PathBuf),
    Pin(Arc<[Pin]>),
}

impl Istio {
    /// By these settings.
    ///
    /// # Errors
    /// Which of them cannot be used, and why.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let believed = match (&settings.ca_file, &settings.pin) {
            (Some(path), None) => Believed::File(path.clone()),
            (None, Some(pin)) => {
                Believed::Pin(Arc::from([pin.parse::<Pin>().map_err(|error| format!("pin: {error}"))?]))
            }
            _ => return Err("say whom to believe: either `ca_file` or `pin`".to_owned()),
        };
        let uri: Uri = format!("https://{}", settings.address).parse().unwrap_or_default();
        if uri.port_u16().is_none() || uri.authority().is_none_or(|it| it.as_str() != settings.address) {
            return Err(format!("address: `{}` is not host:port", settings.address));
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        ServerName::try_from(settings.server_name.as_deref().unwrap_or(host))
            .map_err(|error| format!("server_name: no name of a server: {error}"))?;
        let ttl = settings.ttl_seconds.map(Duration::from_secs);
        let Settings { address, server_name, token, .. } = settings;
        Ok(Self { address, server_name, believed, token, ttl })
    }

    async fn channel(&self) -> Result<Channel, Failure> {
        let failed = |problem: String| Failure::new(format!("{}: {problem}", self.address));
        let config = match &self.believed {
            Believed::Pin(pins) => {
                channel::client(pins.clone(), None).map_err(|error| failed(error.to_string()))?
            }
            Believed::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || grpc::client_tls(Some(&path), None)).await;
                read.map_err(|error| failed(error.to_string()))?.map_err(failed)?
            }
        };
        let dial = Dial {
            server: self.address.clone(),
            tls: Some(config),
            server_name: self.server_name.clone(),
            patience: None,
        };
        dial.connect().await.map_err(failed)
    }

    async fn create(&self, csr: &Csr) -> Result<Signed, Failure> {
        let token = self.token.read().await.map_err(Failure::new)?;
        let mut bearer: MetadataValue<_> = format!("Bearer {}", token.as_str())
            .parse()
            .map_err(|_| Failure::new("the token has characters that cannot be sent"))?;
        bearer.set_sensitive(true);
        let asked = proto::IstioCertificateRequest {
            csr: csr.pem.clone(),
            validity_duration: self.ttl.map_or(0, |ttl| i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX)),
            metadata: None,
        };
        let mut request = Request::new(asked);
        request.metadata_mut().insert("authorization", bearer);
        let mut client = IstioCertificateServiceClient::new(self.channel().await?);
        let answer = client.create_certificate(request).await.map_err(|status| self.refused(&status))?;
        read(&answer.into_inner())
            .map_err(|problem| Failure::new(format!("{}: the answer is not taken: {problem}", self.address)))
    }

    fn refused(&self, status: &Status) -> Failure {
        let words = match status.message() {
            "" => status.code().description(),
            words => words,
        };
        let hint = match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => " (the token and its audience?)",
            _ => "",
        };
        Failure::new(format!("{}: {words}{hint}", self.address))
    }
}

impl Signer for Istio {
    fn name(&self) -> String {
        format!("istio {}", self.address)
    }

    fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    fn sign<'a>(&'a mut self, csr: &'a Csr, _: SystemTime) -> BoxFuture<'a, Result<Signed, Failure>> {
        Box::pin(self.create(csr))
    }
}

/// The chain is everything but the last entry, which is the roots; newer authorities may name these apart.
fn read(answer: &proto::IstioCertificateResponse) -> Result<Signed, String> {
    let entries = answer.cert_chain.as_slice();
    let apart = answer.root_cert.as_ref().map(|roots| roots.ca_cert.as_slice()).filter(|all| !all.is_empty());
    if entries.len() > MAX_ENTRIES || apart.is_some_and(|roots| roots.len() > MAX_ENTRIES) {
        return Err(format!("more than {MAX_ENTRIES} entries"));
    }
    let split = entries.len().checked_sub(1).ok_or("it is empty")?;
    let (chain, roots) = apart.map_or_else(|| entries.split_at(split), |roots| (entries, roots));
    if chain.is_empty() {
        return Err("it has one entry and not a certificate and its roots".to_owned());
    }
    let read = |entries: &[String]| -> Result<Vec<CertificateDer<'static>>, String> {
        let read = |entry: &String| pem_certificates(entry.as_bytes()).map_err(|error| error.to_string());
        Ok(entries.iter().map(read).collect::<Result<Vec<_>, _>>()?.concat())
    };
    Ok(Signed { chain: read(chain)?, roots: read(roots)? })
}

#[cfg(test)]
mod tests;
