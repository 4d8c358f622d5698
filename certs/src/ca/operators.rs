//! What operators ask of an authority about join tokens, on the socket in its data directory.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::attest::token::{JoinTokens, NewToken};
use super::audit::{Audit, Entry};
use super::{Current, proto};
use crate::clock::Clock;
use crate::grpc::Caller;

/// The service of join tokens.
pub struct Operators {
    pub tokens: Arc<JoinTokens>,
    pub audit: Arc<Audit>,
    pub current: watch::Receiver<Arc<Current>>,
    pub clock: Arc<dyn Clock>,
}

impl Operators {
    fn write(&self, entry: &Entry<'_>) -> Result<(), Status> {
        let written = self.audit.write(entry, self.clock.now()).and_then(|()| self.audit.sync());
        written.map_err(|error| Status::unavailable(error.to_string()))
    }
}

fn millis(seconds: u64) -> i64 {
    i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl proto::join_tokens_server::JoinTokens for Operators {
    async fn create_token(
        &self,
        request: Request<proto::CreateTokenRequest>,
    ) -> Result<Response<proto::CreateTokenResponse>, Status> {
        let uid = Caller::of(&request).user;
        let asked = request.into_inner();
        let identity = asked.identity.parse();
        let identity = identity
            .map_err(|error: crate::identity::IdentityError| Status::invalid_argument(error.to_string()))?;
        let domain = self.current.borrow().bundle().trust_domain.clone();
        let new = NewToken {
            identity,
            ttl: Duration::from_secs(asked.ttl_s),
            uses: asked.uses,
            dns_names: asked.dns_names,
            longest_ttl: (asked.longest_ttl_s > 0).then(|| Duration::from_secs(asked.longest_ttl_s)),
        };
        let made = self.tokens.create(new, &domain, self.clock.now()).await;
        let (secret, token) = made.map_err(Status::invalid_argument)?;
        let id = token.hash.get(..16).unwrap_or_default().to_owned();
        let entry = Entry::allowed("token.create", &asked.actor)
            .with("uid", uid)
            .with("token", id.as_str())
            .with("identity", token.identity.to_string())
            .with("uses", token.uses_left)
            .with("expires", token.expires);
        if let Err(status) = self.write(&entry) {
            // Nobody has been told of it.
            let _ = self.tokens.delete(&id).await;
            return Err(status);
        }
        let answer =
            proto::CreateTokenResponse { secret: secret.to_string(), id, expires_ms: millis(token.expires) };
        Ok(Response::new(answer))
    }

    async fn list_tokens(
        &self,
        _: Request<proto::ListTokensRequest>,
    ) -> Result<Response<proto::ListTokensResponse>, Status> {
        let tokens = self.tokens.list(self.clock.now()).await.map_err(Status::unavailable)?;
        let tokens = tokens.into_iter().map(|(id, token)| proto::Token {
            id,
            identity: token.identity.to_string(),
            expires_ms: millis(token.expires),
            uses_left: token.uses_left,
            dns_names: token.dns_names,
        });
        Ok(Response::new(proto::ListTokensResponse { tokens: tokens.collect() }))
    }

    async fn delete_token(
        &self,
        request: Request<proto::DeleteTokenRequest>,
    ) -> Result<Response<proto::DeleteTokenResponse>, Status> {
        let uid = Caller::of(&request).user;
        let asked = request.into_inner();
        let deleted = self.tokens.delete(&asked.id).await.map_err(Status::invalid_argument)?;
        if !deleted {
            return Err(Status::not_found(format!("there is no join token {}", asked.id)));
        }
        let entry = Entry::allowed("token.delete", &asked.actor).with("uid", uid);
        self.write(&entry.with("token", asked.id.as_str()))?;
        Ok(Response::new(proto::DeleteTokenResponse {}))
    }
}
