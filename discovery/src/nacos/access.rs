//! What questions to Nacos carry to be answered: the token of a login, the signature of a key.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use config::discovery::nacos::{Credentials, Key};
use http::{HeaderName, HeaderValue, Method, header};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::http::Question;
use crate::poll::{JSON, Polled, escape};
use crate::source::SourceError;

/// A token is renewed at the latest after this.
const RENEW: Duration = Duration::from_secs(3600);
const FORM: (HeaderName, HeaderValue) =
    (header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));

/// Credentials, shared by everybody who asks.
#[derive(Debug)]
pub(super) struct Access {
    /// By server.
    credentials: Vec<Option<Credentials>>,
    /// The id of a key, and the key.
    key: Option<(Box<str>, hmac::Key)>,
    /// The token of a login, and until when it is used.
    token: Mutex<Option<(Arc<str>, Instant)>>,
}

impl Access {
    pub fn new(credentials: Vec<Option<Credentials>>, key: Option<Key<'_>>) -> Self {
        let key = key.map(|key| {
            let secret = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key.secret.as_bytes());
            (key.id.into(), secret)
        });
        Self { credentials, key, token: Mutex::default() }
    }

    /// The token is not valid any more: the next question begins with a login.
    pub async fn forget(&self) {
        *self.token.lock().await = None;
    }

    /// Adds what is needed to a question for `signed`.
    pub async fn add(
        &self,
        target: &mut String,
        signed: &str,
        polled: &mut Polled,
        limit: Duration,
    ) -> Result<(), SourceError> {
        if let Some(Some(credentials)) = self.credentials.get(polled.turn()) {
            let token = self.token(credentials, polled, limit).await?;
            let _ = write!(target, "&accessToken={}", escape(&token));
        }
        if let Some((id, key)) = &self.key {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let data = format!("{}@@{signed}", since.as_millis());
            let signature = STANDARD.encode(hmac::sign(key, data.as_bytes()));
            let (id, data, signature) = (escape(id), escape(&data), escape(&signature));
            let _ = write!(target, "&ak={id}&data={data}&signature={signature}");
        }
        Ok(())
    }

    async fn token(
        &self,
        credentials: &Credentials,
        polled: &mut Polled,
        limit: Duration,
    ) -> Result<Arc<str>, SourceError> {
        // Held while somebody logs in: the others need not.
        let known = timeout(limit, self.token.lock()).await;
        let mut known = known.map_err(|_| SourceError::new("a login to Nacos takes too long"))?;
        if let Some((token, until)) = &*known
            && Instant::now() < *until
        {
            return Ok(Arc::clone(token));
        }
        let (name, word) = (escape(&credentials.username), escape(credentials.password.reveal()));
        let body = format!("username={name}&password={word}").into();
        let fields = [JSON, FORM];
        let question =
            Question { method: Method::POST, headers: &fields, body, ..Question::get("/auth/login", limit) };
        let answer = polled.ask(&question, |_| false).await?;
        let login: Login = serde_json::from_slice(&answer.body).map_err(|error| polled.wrong(error))?;
        let token: Arc<str> = login.access_token.into();
        let holds = Duration::from_secs(login.token_ttl).mul_f64(0.8).min(RENEW);
        *known = Some((Arc::clone(&token), Instant::now() + holds));
        Ok(token)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Login {
    access_token: String,
    #[serde(default)]
    token_ttl: u64,
}
