//! Calls to an authority: a connection to a server that is known by its key.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::ca::channel::{self, Pin};
use crate::ca::proto;
use crate::ca::proto::certificate_authority_client::CertificateAuthorityClient;
use crate::ca::service::retry_after;
use crate::grpc::Dial;
use crate::identity::SpiffeId;
use crate::svid::Svid;

/// A bundle with some thousand revocations.
const LONGEST_MESSAGE: usize = 4 << 20;
/// What wants to be said and waits.
const OUTBOX: usize = 4;

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// The authority wants to be left alone so long.
    pub(super) retry_after: Option<Duration>,
    /// The proof did not count.
    pub(super) denied: bool,
    /// The answer was not taken.
    pub(super) refused: bool,
}

impl Failure {
    pub(super) fn new(reason: String) -> Self {
        Self { reason, retry_after: None, denied: false, refused: false }
    }

    pub(super) fn refused(reason: String) -> Self {
        Self { refused: true, ..Self::new(reason) }
    }

    pub(super) fn of(status: &Status) -> Self {
        let words = match status.message() {
            "" => format!("the authority answered {}", status.code()),
            words => words.to_owned(),
        };
        Self {
            retry_after: retry_after(status),
            denied: matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
            ..Self::new(words)
        }
    }
}

/// A connection to an authority.
pub(super) struct Call(CertificateAuthorityClient<Channel>);

impl Call {
    /// Connects to `server`, showing a certificate where there is one.
    pub(super) async fn connect(
        server: &str,
        pins: Arc<[Pin]>,
        svid: Option<&Svid>,
    ) -> Result<Self, Failure> {
        let failed = |problem: &dyn std::fmt::Display| Failure::new(format!("{server}: {problem}"));
        let tls = channel::client(pins, svid).map_err(|error| failed(&error))?;
        // Whose certificate it is, the pin says; it has this name.
        let server_name = Some("postern-ca".to_owned());
        let dial = Dial { server: server.to_owned(), tls: Some(tls), server_name, patience: None };
        let channel = dial.connect().await.map_err(|error| failed(&error))?;
        Ok(Self(CertificateAuthorityClient::new(channel).max_decoding_message_size(LONGEST_MESSAGE)))
    }

    pub(super) async fn attest(
        &mut self,
        proof: proto::attest_request::Proof,
        identity: Option<&SpiffeId>,
    ) -> Result<proto::Session, Failure> {
        let identity = identity.map(ToString::to_string).unwrap_or_default();
        let said = proto::AttestRequest { identity, proof: Some(proof) };
        let answer = self.0.attest(stream::iter([said])).await;
        answer.map(tonic::Response::into_inner).map_err(|status| Failure::of(&status))
    }

    pub(super) async fn sign(&mut self, asked: proto::SignRequest) -> Result<proto::SignResponse, Failure> {
        let answer = self.0.sign(asked).await;
        answer.map(tonic::Response::into_inner).map_err(|status| Failure::of(&status))
    }

    /// The stream of trust: where to say something, and what the authority says.
    pub(super) async fn watch(
        &mut self,
        hello: proto::WatchHello,
    ) -> Result<(mpsc::Sender<proto::WatchRequest>, Streaming<proto::WatchResponse>), Failure> {
        let (sender, receiver) = mpsc::channel(OUTBOX);
        let hello = proto::WatchRequest { body: Some(proto::watch_request::Body::Hello(hello)) };
        let _ = sender.send(hello).await;
        let requests =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        let answer = self.0.watch_trust(Request::new(requests)).await;
        answer.map(|answer| (sender, answer.into_inner())).map_err(|status| Failure::of(&status))
    }
}
