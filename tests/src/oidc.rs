//! A real OpenID provider (npm `oidc-provider`) that logs a user in without asking, and a browser that follows it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::client::{Answer, Call};
use crate::ports::Port;
use crate::process::Process;
use crate::{eventually, node};

/// The provider.
#[derive(Debug)]
pub struct Provider {
    port: Port,
    _process: Process,
    _folder: TempDir,
}

impl Provider {
    /// Starts one whose client `shop` may be sent back to these URLs, and whose access tokens last so many seconds.
    pub async fn start(redirects: &[&str], lasts: u32) -> Provider {
        let (port, folder) = (Port::free(), tempfile::tempdir().expect("a folder"));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/oidc_provider.js").to_owned();
        let args = [script, port.number().to_string(), redirects.join(" "), lasts.to_string()];
        // Where the script finds its packages, wherever it stands.
        let env = [("NODE_PATH".to_owned(), node::folder().join("node_modules").display().to_string())];
        let log = folder.path().join("output");
        let process = Process::start(Path::new("node"), &args, &env, &PathBuf::from("/"), &log);
        let provider = Provider { port, _process: process, _folder: folder };
        let addr = provider.addr();
        eventually("the provider answers", || async { tokio::net::TcpStream::connect(addr).await.ok() })
            .await;
        provider
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// The discovery document.
    pub fn discovery(&self) -> String {
        format!("http://{}/.well-known/openid-configuration", self.addr())
    }

    /// A call of the token endpoint as `shop`; panics unless it gives an access token.
    pub async fn token(&self, form: &str) -> String {
        let call = Call::new("POST", "/token")
            .header("host", &self.addr().to_string())
            // shop:secret-of-the-client
            .header("authorization", "Basic c2hvcDpzZWNyZXQtb2YtdGhlLWNsaWVudA==")
            .header("content-type", "application/x-www-form-urlencoded");
        let answer = call.body(form.to_owned()).send_to(self.addr()).await.expect_status(200);
        answer.json()["access_token"].as_str().expect("a token").to_owned()
    }
}

/// A browser: it keeps cookies and follows redirects.
#[derive(Clone, Debug, Default)]
pub struct Browser {
    /// Cookies by host and name.
    pub jar: BTreeMap<(SocketAddr, String), String>,
    /// What was asked for last.
    pub url: String,
}

impl Browser {
    /// One request, without following.
    pub async fn step(&mut self, url: &str) -> Answer {
        let (_, rest) = url.split_once("://").expect("a whole URL");
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let addr: SocketAddr = host.parse().expect("an address");
        url.clone_into(&mut self.url);
        let mut call = Call::get(if path.is_empty() { "/" } else { path }).header("host", host);
        let cookies: Vec<_> = self
            .jar
            .iter()
            .filter(|((of, _), _)| *of == addr)
            .map(|((_, name), value)| format!("{name}={value}"))
            .collect();
        if !cookies.is_empty() {
            call = call.header("cookie", &cookies.join("; "));
        }
        let answer = call.send_to(addr).await;
        for cookie in answer.header_values("set-cookie") {
            let mut parts = cookie.split(';').map(str::trim);
            let (name, value) = parts.next().and_then(|pair| pair.split_once('=')).expect("a cookie");
            let gone = value.is_empty() || parts.any(|part| part == "Max-Age=0" || part.contains("1970"));
            let key = (addr, name.to_owned());
            if gone {
                self.jar.remove(&key);
            } else {
                self.jar.insert(key, value.to_owned());
            }
        }
        answer
    }

    /// Asks for a page and follows redirects, at most twenty.
    pub async fn open(&mut self, url: &str) -> Answer {
        let mut answer = self.step(url).await;
        for _ in 0..20 {
            if !(300..400).contains(&answer.status) {
                return answer;
            }
            let next = self.next(&answer);
            answer = self.step(&next).await;
        }
        panic!("redirects without end, at last to {}", self.url)
    }

    /// Where a redirect leads.
    pub fn next(&self, answer: &Answer) -> String {
        let to = answer.header("location").expect("a location");
        if to.contains("://") {
            return to.to_owned();
        }
        let origin: Vec<_> = self.url.splitn(4, '/').take(3).collect();
        format!("{}{to}", origin.join("/"))
    }
}
