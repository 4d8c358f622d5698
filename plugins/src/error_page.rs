//! `error-page`: other bodies for errors that the gateway answers itself.
//!
//! Phase: `header_filter`. Answers of upstreams pass as they are. The pages stand in the plugin's metadata and hold for
//! every object that has the plugin, most often a global rule.

use std::sync::Arc;

use bytes::Bytes;
use config::error::ConfigError;
use http::{HeaderValue, StatusCode, header};
use layers::body::Body;
use layers::exchange::{Answered, Exchange};
use layers::plugin::{BuildEnv, Definition, Extras, Hooks, OnResponse};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::headers;

/// Settings: none, the pages are in the metadata.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {}

/// Settings for the whole gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// Whether the pages are sent.
    #[serde(default)]
    enable: bool,
    /// The page of 404.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error_404: Option<Page<404>>,
    /// The page of 500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error_500: Option<Page<500>>,
    /// The page of 502.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error_502: Option<Page<502>>,
    /// The page of 503.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error_503: Option<Page<503>>,
}

/// A page.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct Page<const STATUS: u16> {
    /// The body; an empty one changes nothing. Without it the page of the status.
    #[serde(default = "page::<STATUS>")]
    body: String,
    /// Its `Content-Type`.
    #[serde(default = "html")]
    content_type: String,
}

fn page<const STATUS: u16>() -> String {
    layers::rescue::page(StatusCode::from_u16(STATUS).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
}

fn html() -> String {
    "text/html".into()
}

/// The plugin.
pub struct ErrorPage {
    pages: Box<[(u16, HeaderValue, Bytes)]>,
}

impl Definition for ErrorPage {
    const NAME: &'static str = "error-page";
    const PRIORITY: i32 = 450;
    type Config = Config;

    fn extend(extras: &mut Extras) {
        extras.checked_metadata::<Metadata>(|metadata| pages(metadata).filter_map(Result::err).collect());
    }

    fn build(_: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let metadata = env.metadata.and_then(|value| Metadata::deserialize(value).ok()).unwrap_or_default();
        if metadata.enable {
            let pages = pages(&metadata).collect::<Result<Vec<_>, _>>()?;
            let pages = pages.into_iter().filter(|(_, _, body)| !body.is_empty()).collect();
            hooks.response(&Arc::new(Self { pages }));
        }
        Ok(())
    }
}

type Compiled = (u16, HeaderValue, Bytes);

/// The pages that are set, with pointers into the metadata.
fn pages(metadata: &Metadata) -> impl Iterator<Item = Result<Compiled, ConfigError>> {
    let Metadata { error_404, error_500, error_502, error_503, .. } = metadata;
    let pages = [
        error_404.as_ref().map(Page::compile),
        error_500.as_ref().map(Page::compile),
        error_502.as_ref().map(Page::compile),
        error_503.as_ref().map(Page::compile),
    ];
    pages.into_iter().flatten()
}

impl<const STATUS: u16> Page<STATUS> {
    fn compile(&self) -> Result<Compiled, ConfigError> {
        let kind = HeaderValue::from_str(&self.content_type).map_err(|_| {
            let pointer = format!("/error_{STATUS}/content_type");
            ConfigError::invalid(pointer, "a header field has no control characters")
        })?;
        Ok((STATUS, kind, self.body.clone().into()))
    }
}

impl OnResponse for ErrorPage {
    fn response(&self, x: &mut Exchange) {
        if !matches!(x.answered, Answered::Gateway(_)) {
            return;
        }
        let status = x.response.status().as_u16();
        let Some((_, kind, body)) = self.pages.iter().find(|(of, _, _)| *of == status) else { return };
        headers::body_changes(x.response.headers_mut());
        x.response.headers_mut().insert(header::CONTENT_TYPE, kind.clone());
        *x.response.body_mut() = Body::from(body.clone());
    }
}

#[cfg(test)]
mod tests {
    use layers::error::{Error, Reason};
    use layers::testing::{TestEnv, exchange, field, text};
    use serde_json::{Value, json};

    use super::*;

    async fn run(metadata: Value, failure: Option<Reason>) -> (u16, String, String) {
        let env = TestEnv { metadata: Some(metadata), ..TestEnv::default() };
        let mut chain = env
            .chain::<ErrorPage, _>(&json!({}), move |x| match failure {
                Some(reason) => Err(Error::new(reason)),
                None => {
                    *x.response.status_mut() = StatusCode::BAD_GATEWAY;
                    *x.response.body_mut() = "of the upstream".into();
                    Ok(())
                }
            })
            .unwrap();
        let mut x = chain.run(exchange("GET", "http://a/").build()).await;
        let body = text(&mut x).await;
        (x.response.status().as_u16(), field(&x, "content-type").to_owned(), body)
    }

    #[tokio::test]
    async fn errors_of_the_gateway_get_the_configured_page() {
        let pages = json!({
            "enable": true,
            "error_404": {"body": "{\"code\":404}", "content_type": "application/json"},
            "error_502": {},
            "error_503": {"body": ""},
        });
        let missing = run(pages.clone(), Some(Reason::RouteNotFound)).await;
        assert_eq!(missing, (404, "application/json".into(), "{\"code\":404}".into()));
        let (status, kind, body) = run(pages.clone(), Some(Reason::ConnectFailed)).await;
        assert_eq!((status, &*kind), (502, "text/html"));
        assert!(body.contains("502 Bad Gateway"), "{body}");
        let (status, kind, body) = run(pages.clone(), Some(Reason::NoUpstream)).await;
        assert_eq!((status, &*kind), (503, "text/html; charset=utf-8"), "an empty page changes nothing: {body}");
        assert_eq!(run(pages.clone(), None).await.2, "of the upstream");
        let (status, _, body) = run(pages, Some(Reason::ReadTimeout)).await;
        assert!(status == 504 && body.contains("504"), "{body}");
        let off = json!({"error_404": {"body": "own"}});
        assert!(run(off, Some(Reason::RouteNotFound)).await.2.contains("404 Route Not Found"));
    }

    #[test]
    fn metadata_is_checked() {
        let check = |value: Value| {
            let mut extras = Extras::default();
            ErrorPage::extend(&mut extras);
            extras.check_metadata(&value).unwrap()
        };
        assert!(check(json!({"enable": true, "error_500": {"body": "x"}})).is_ok());
        for (value, pointer) in [
            (json!({"enable": 1}), "/enable"),
            (json!({"error_404": {"body": 1}}), "/error_404/body"),
            (json!({"error_418": {}}), "/error_418"),
            (json!({"error_404": {"status": 1}}), "/error_404/status"),
            (json!({"error_502": {"content_type": "a\nb"}}), "/error_502/content_type"),
        ] {
            assert_eq!(check(value.clone()).unwrap_err()[0].pointer, pointer, "{value}");
        }
    }
}
