//! HTTP/1 with clients: our own engine.
//!
//! A connection is one task and no more: it reads a head by strict rules ([`framing`](crate::transport::framing)) straight
//! into a request, polls the stack's future, and writes the answer. The request's body is read from the same socket when
//! its reader asks. What a request needs besides is an [`Engine`](connection::Engine), which the worker keeps between requests: a
//! connection that idles has none and holds no buffer.

mod answer;
mod body;
pub(crate) mod connection;
mod date;
mod output;
mod request;
mod wire;

pub use body::ClientBody;
pub(crate) use connection::{Connection, End, Engine};
pub(crate) use date::Date;
