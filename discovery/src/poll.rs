//! A registry that can only be polled, on any of several servers that know the same.
//!
//! One server is asked at a time; after a failure it is the next one's turn, when the driver asks again.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, StatusCode};

use crate::http::{Answer, Connection, Question, Server};
use crate::source::{Again, Instance, Listing, SourceError, Standing};

/// What is kept of one who asks.
#[derive(Debug)]
pub(crate) struct Polled {
    connections: Vec<Connection>,
    at: usize,
    /// The question before had no answer.
    failed: bool,
    /// The server has ended a connection since the list before.
    cut: bool,
}

impl Polled {
    /// Begins with any of them, so that not everybody asks the first.
    pub fn new(servers: &[Arc<Server>]) -> Self {
        let connections: Vec<Connection> = servers.iter().map(Server::connection).collect();
        let at = fastrand::usize(..connections.len().max(1));
        Self { connections, at, failed: false, cut: false }
    }

    /// Asks the server whose turn it is. A status that is not `2xx` and that `accepts` does not want is an error.
    pub async fn ask(
        &mut self,
        question: &Question<'_>,
        accepts: impl Fn(StatusCode) -> bool,
    ) -> Result<Answer, SourceError> {
        let turn = self.turn();
        let Some(connection) = self.connections.get_mut(turn) else {
            return Err(SourceError::new("there is no server to ask"));
        };
        let outcome = match connection.ask(question).await {
            Ok(answer) if answer.status.is_success() || accepts(answer.status) => Ok(answer),
            Ok(answer) => Err(answer.refusal(connection.server())),
            Err(error) => Err(error.into()),
        };
        self.cut |= connection.was_ended();
        if outcome.is_err() {
            self.fail();
        }
        outcome
    }

    /// Whose turn it is, by place.
    pub fn turn(&self) -> usize {
        self.at % self.connections.len().max(1)
    }

    /// An answer that was accepted and is none.
    pub fn refuse(&mut self, answer: &Answer) -> SourceError {
        let turn = self.turn();
        let error = match self.connections.get(turn) {
            Some(connection) => answer.refusal(connection.server()),
            None => SourceError::new("there is no server to ask"),
        };
        self.fail();
        error
    }

    /// The answer was none after all: it is the next server's turn.
    fn fail(&mut self) {
        self.at = self.at.wrapping_add(1);
        self.failed = true;
    }

    /// What was wrong with an answer, with the address of who gave it.
    pub fn wrong(&mut self, what: impl std::fmt::Display) -> SourceError {
        let name = self.connections.get(self.turn()).map_or("", |connection| connection.server().name());
        let error = SourceError::new(format!("{name} answered something else than expected: {what}"));
        self.fail();
        error
    }

    /// The list of an answer. After a failure the registry may have begun anew and not know everybody yet. A restart between
    /// two questions is no failure, but it ends connections: what lists nothing over a new one may have forgotten all.
    pub fn listing(&mut self, instances: Vec<Instance>, interval: Duration) -> Listing {
        let (failed, cut) = (std::mem::take(&mut self.failed), std::mem::take(&mut self.cut));
        let restarted = failed || (cut && instances.is_empty());
        let standing = if restarted { Standing::Restarted } else { Standing::Continued };
        Listing { instances, standing, again: Again::After(interval) }
    }
}

/// Text as a value in a query or a form.
pub(crate) fn escape(text: &str) -> impl std::fmt::Display + '_ {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
}

/// The form in which answers are wanted.
pub(crate) const JSON: (HeaderName, http::HeaderValue) =
    (http::header::ACCEPT, http::HeaderValue::from_static("application/json"));
