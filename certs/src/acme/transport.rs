//! The HTTP under the ACME library: our TLS, our connections, a deadline for each exchange, and bodies that end.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::RootCertStore;
use tokio::time::timeout;

use crate::grpc::chain;
use crate::http::{Tcp, client};

/// One exchange, from the connection to the end of the answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// Chains, directories and orders; never more.
const MAX_BODY: usize = 1 << 20;
/// The longest that an authority is obeyed when it asks to be left alone.
const LONGEST_PAUSE: Duration = Duration::from_secs(24 * 3600);

/// A client for one order. Clones are the same.
#[derive(Clone)]
pub(super) struct Transport {
    client: Client<HttpsConnector<Tcp>, BodyWrapper<Bytes>>,
    paused: Arc<Mutex<Option<SystemTime>>>,
}

impl Transport {
    /// Which believes these roots.
    pub(super) fn new(roots: Arc<RootCertStore>) -> Result<Self, rustls::Error> {
        Ok(Self { client: client(roots)?, paused: Arc::default() })
    }

    /// Until when the authority wants to be left alone, if it has said so.
    pub(super) fn paused(&self) -> Option<SystemTime> {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn exchange(self, request: Request<BodyWrapper<Bytes>>) -> Result<BytesResponse, Error> {
        let at = request.uri().clone();
        let wrong = |problem: String| Error::Other(format!("{at}: {problem}").into());
        // An answer may name other addresses than the directory's.
        if at.scheme_str() != Some("https") {
            return Err(wrong("it is asked by https only".to_owned()));
        }
        let answer = self.client.request(request).await.map_err(|error| wrong(chain(&error)))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(|error| wrong(chain(&*error)))?;
        let asked = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, Some(seconds)) =
            (head.status, asked)
        {
            let pause = Duration::from_secs(seconds).min(LONGEST_PAUSE);
            *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(SystemTime::now() + pause);
        }
        // The library reads every refusal as JSON.
        if !head.status.is_success() && !is_json(&head.headers) {
            return Err(wrong(format!("it answered {}", head.status)));
        }
        Ok(BytesResponse::from(Response::from_parts(head, Full::new(body.to_bytes()))))
    }
}

/// `application/problem+json`, with parameters or without.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()?.split(';').next());
    kind.is_some_and(|kind| kind.trim_end().to_ascii_lowercase().ends_with("json"))
}

impl HttpClient for Transport {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let (client, at) = (self.clone(), request.uri().clone());
        Box::pin(async move {
            match timeout(DEADLINE, client.exchange(request)).await {
                Ok(answered) => answered,
                Err(_) => {
                    Err(Error::Other(format!("{at}: no answer within {} s", DEADLINE.as_secs()).into()))
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn refusals_in_json_are_told_from_those_of_whoever_stands_between() {
        for (kind, expected) in [
            (Some("application/problem+json"), true),
            (Some("application/problem+json; charset=utf-8"), true),
            (Some("Application/JSON ;charset=utf-8"), true),
            (Some("text/html; charset=json"), false),
            (Some("text/html"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(kind) = kind {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            }
            assert_eq!(is_json(&headers), expected, "{kind:?}");
        }
    }
}
