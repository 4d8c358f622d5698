//! One question to one HTTP server: a connection, the question, the whole answer, within a deadline.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::files;

const DEADLINE: Duration = Duration::from_secs(5);
/// The pods of one service account on one node are a megabyte at most.
const LARGEST: usize = 4 * 1024 * 1024;

/// Where questions go.
#[derive(Clone, Debug)]
pub(super) struct Server {
    host: String,
    port: u16,
    authority: HeaderValue,
    /// Of TLS: authorities in PEM, or those of the system.
    tls: Option<Option<PathBuf>>,
}

impl Server {
    /// The server at `http(s)://host[:port]`.
    pub(super) fn new(url: &str, ca: Option<PathBuf>) -> Result<Self, String> {
        let form = || format!("`{url}` is not a URL of the form http(s)://host[:port]");
        let uri: Uri = url.parse().map_err(|_| form())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(form()) };
        if !matches!(scheme, "http" | "https") || uri.path().len() > 1 || uri.query().is_some() {
            return Err(form());
        }
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(form());
        }
        let https = scheme == "https";
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(if https { 443 } else { 80 }),
            authority: HeaderValue::from_str(authority.as_str()).map_err(|_| form())?,
            tls: https.then_some(ca),
        })
    }

    /// Asks.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        field: (HeaderName, &str),
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), String> {
        let asked = timeout(DEADLINE, self.exchange(method, path, field, body)).await;
        let answer = asked.unwrap_or_else(|_| Err(format!("no answer within {} s", DEADLINE.as_secs())));
        answer.map_err(|problem| format!("{}:{}: {problem}", self.host, self.port))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        (name, value): (HeaderName, &str),
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), String> {
        let mut value = HeaderValue::from_str(value).map_err(|_| "the credential is no header".to_owned())?;
        value.set_sensitive(true);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().map_err(|_| format!("`{path}` is no path"))?;
        let fields = request.headers_mut();
        fields.insert(HOST, self.authority.clone());
        fields.insert(USER_AGENT, const { HeaderValue::from_static("postern") });
        fields.insert(CONTENT_TYPE, const { HeaderValue::from_static("application/json") });
        fields.insert(name, value);
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = stream.map_err(|error| error.to_string())?;
        let _ = stream.set_nodelay(true);
        let Some(ca) = self.tls.clone() else { return talk(stream, request).await };
        // Files are small and read anew, because they are replaced.
        let config =
            tokio::task::spawn_blocking(move || tls(ca)).await.map_err(|error| error.to_string())??;
        let name = ServerName::try_from(self.host.clone()).map_err(|_| "no name for TLS".to_owned())?;
        let stream =
            TlsConnector::from(config).connect(name, stream).await.map_err(|error| error.to_string())?;
        talk(stream, request).await
    }
}

fn tls(ca: Option<PathBuf>) -> Result<Arc<ClientConfig>, String> {
    let roots = ca.as_deref().map_or_else(files::system_roots, files::trusted_roots);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    let roots = roots.map_err(|error| error.to_string())?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), LARGEST).collect().await;
        Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    tokio::pin!(exchange);
    // The connection is driven here and ends with the question.
    tokio::select! {
        answer = &mut exchange => answer,
        end = connection => match end {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}
