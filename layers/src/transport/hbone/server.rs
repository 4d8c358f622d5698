//! The end that tunnels lead to: takes `CONNECT`s of one connection and hands each to whoever decides. Everything else is
//! refused here. When it is to end it tells the peer to open no more, and ends with the last tunnel.

use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep_until, timeout};

use super::stream::Open;
use super::{CONNECTION_WINDOW, FRAME, HEAD, Lease, MAX_STREAMS, SEND_BUFFER, STREAM_WINDOW, Tunnel};

/// A peer lets go of idle connections after five minutes; one that does not is told to.
const IDLE: Duration = Duration::from_secs(600);

/// Streams a peer may have open: more than ours open, because others may count differently.
const STREAMS: u32 = 2 * MAX_STREAMS;

/// One `CONNECT` that waits for an answer.
pub struct Connect {
    authority: Authority,
    headers: HeaderMap,
    respond: SendResponse<Bytes>,
    body: RecvStream,
    lease: Lease,
}

impl Connect {
    /// Where it leads, if that is an address.
    pub fn target(&self) -> Option<SocketAddr> {
        address(&self.authority)
    }

    /// Where it leads, as it was written.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// What the peer says of the call, such as `baggage`. It is the peer's word and proves nothing.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Opens the tunnel.
    ///
    /// # Errors
    /// The peer has gone.
    pub fn accept(mut self) -> Result<Tunnel, h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok(Tunnel::new(send, self.body, self.lease))
    }

    /// Refuses it; `why` goes to the peer.
    pub fn refuse(mut self, status: StatusCode, why: &'static str) {
        refuse(&mut self.respond, status, why);
    }
}

/// The address that an authority is, with its port, if it is one and nothing else.
pub(super) fn address(authority: &Authority) -> Option<SocketAddr> {
    if authority.as_str().contains('@') {
        return None;
    }
    let host = authority.host();
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let ip: IpAddr = host.parse().ok()?;
    let port = authority.port_u16().filter(|port| *port != 0)?;
    Some(SocketAddr::new(ip.to_canonical(), port))
}

fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode, why: &'static str) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert("proxy-status", HeaderValue::from_static(why));
    // A peer that has gone needs no answer.
    let _ = respond.send_response(response, true);
}

/// A connection of tunnels.
pub struct Server<T> {
    connection: Connection<T, Bytes>,
    open: Rc<Open>,
}

/// How a connection of tunnels ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The peer spoke no HTTP/2, or broke its rules.
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    /// It did not begin in time.
    #[error("no HTTP/2 preface within {0:?}")]
    Silent(Duration),
}

impl<T> Server<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    /// Begins HTTP/2 on a connection whose handshake is over, within `limit`.
    ///
    /// # Errors
    /// The peer does not speak it, or says nothing.
    pub async fn begin(io: T, limit: Duration) -> Result<Self, ServerError> {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEAD)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_streams(STREAMS);
        match timeout(limit, builder.handshake(io)).await {
            Ok(connection) => Ok(Self { connection: connection?, open: Rc::default() }),
            Err(_) => Err(ServerError::Silent(limit)),
        }
    }

    /// Serves until the peer closes or, after `drain`, until the last tunnel has ended. Each `CONNECT` gets a task of its
    /// own by `serve`. Dropping this future cuts every tunnel.
    ///
    /// # Errors
    /// The peer breaks the rules, or is gone.
    pub async fn run<F>(
        mut self,
        serve: impl Fn(Connect) -> F,
        drain: impl Future<Output = ()>,
    ) -> Result<(), ServerError>
    where
        F: Future<Output = ()> + 'static,
    {
        let mut drain = pin!(drain);
        let mut idle = pin!(sleep_until(self.open.since() + IDLE));
        let mut leaving = false;
        loop {
            tokio::select! {
                biased;
                () = &mut drain, if !leaving => {
                    leaving = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut idle, if !leaving => {
                    if self.open.count() == 0 && self.open.since().elapsed() >= IDLE {
                        leaving = true;
                        self.connection.graceful_shutdown();
                    } else {
                        idle.as_mut().reset(self.open.since().max(tokio::time::Instant::now()) + IDLE);
                    }
                }
                next = poll_fn(|cx| self.connection.poll_accept(cx)) => match next {
                    None => return Ok(()),
                    Some(arrived) => {
                        let (request, respond) = arrived?;
                        if let Some(connect) = self.connect(request, respond) {
                            tokio::task::spawn_local(serve(connect));
                        }
                    }
                },
            }
        }
    }

    fn connect(&self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Option<Connect> {
        let (head, body) = request.into_parts();
        if head.method != Method::CONNECT {
            refuse(
                &mut respond,
                StatusCode::METHOD_NOT_ALLOWED,
                "postern; details=\"only CONNECT is served\"",
            );
            return None;
        }
        let Some(authority) = head.uri.into_parts().authority else {
            refuse(
                &mut respond,
                StatusCode::BAD_REQUEST,
                "postern; details=\"CONNECT without an authority\"",
            );
            return None;
        };
        Some(Connect { authority, headers: head.headers, respond, body, lease: self.open.lease() })
    }
}
