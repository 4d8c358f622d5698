//! Answers that plugins give, made once where they do not depend on the request.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use layers::body::Body;
use layers::plugin::Flow;
use serde_json::{Value, json};

/// An answer that is always the same.
#[derive(Clone, Debug)]
pub struct Canned {
    status: StatusCode,
    kind: Option<HeaderValue>,
    body: Bytes,
    headers: HeaderMap,
}

impl Canned {
    /// A JSON body, with the line end and the type that APISIX gives one.
    pub fn json(status: StatusCode, body: &Value) -> Self {
        Self {
            status,
            kind: Some(HeaderValue::from_static("text/plain; charset=utf-8")),
            body: format!("{body}\n").into(),
            headers: HeaderMap::new(),
        }
    }

    /// `{"message": ...}`, the form of refusals.
    pub fn message(status: StatusCode, message: &str) -> Self {
        Self::json(status, &json!({ "message": message }))
    }

    /// Text.
    pub fn text(status: StatusCode, text: &str) -> Self {
        Self {
            status,
            kind: Some(HeaderValue::from_static("text/plain; charset=utf-8")),
            body: text.to_owned().into(),
            headers: HeaderMap::new(),
        }
    }

    /// A status alone: the error page of its status, as nginx answers.
    pub fn status(status: StatusCode) -> Self {
        let page = if status.as_u16() < 300 { String::new() } else { layers::rescue::page(status) };
        Self {
            status,
            kind: (!page.is_empty()).then(|| HeaderValue::from_static("text/html; charset=utf-8")),
            body: page.into(),
            headers: HeaderMap::new(),
        }
    }

    /// Adds a field.
    #[must_use]
    pub fn header(mut self, name: http::HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The answer.
    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body.clone()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        if let Some(kind) = &self.kind {
            headers.insert(header::CONTENT_TYPE, kind.clone());
        }
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
        response
    }

    /// The answer, as a plugin gives it.
    pub fn flow(&self) -> Flow {
        Flow::Reply(self.response())
    }
}

/// A status code that was checked to be one; 500 otherwise.
pub fn status(code: u32) -> StatusCode {
    u16::try_from(code)
        .ok()
        .and_then(|code| StatusCode::from_u16(code).ok())
        .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}
