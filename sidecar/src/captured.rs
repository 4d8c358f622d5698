//! Connections that the kernel has led here: where they were going, and which of them may not go on.
//!
//! What was going to the sidecar itself would come back for ever, and what was not going to this machine has nothing to do
//! behind the sidecar's back door. Both are refused before anything of them is read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use config::capture::Mode;
use config::sidecar::Sidecar;
use layers::error::{Error, Reason};
use layers::transport::original_dst::{Captured, Own};
use layers::worker::io::Socket;
use tokio::time::timeout;

use crate::capture::probe;

/// For whoever tries the capture to take the answer.
const ANSWER: Duration = Duration::from_secs(5);

/// How connections are captured, and what is ours. Clones are the same.
#[derive(Clone)]
pub struct Captures {
    /// The sidecar's own listeners.
    pub own: Arc<Own>,
    inbound: Captured,
    probed: u16,
}

impl Captures {
    /// As the file says.
    pub fn new(config: &Sidecar) -> Self {
        Self {
            own: Arc::new(Own::new(config.ports())),
            inbound: match config.capture.mode {
                Mode::Redirect => Captured::Redirect,
                Mode::Tproxy => Captured::Tproxy,
            },
            probed: config.capture.outbound_port.get(),
        }
    }

    /// Whether the workload sees who its clients are.
    pub fn keeps_client(&self) -> bool {
        self.inbound == Captured::Tproxy
    }

    /// Where a connection to the workload was going.
    ///
    /// # Errors
    /// It was going to the sidecar, or not to this machine.
    pub fn inbound(&self, socket: &Socket) -> Result<SocketAddr, Error> {
        let destination = self.destination(socket, self.inbound)?;
        if !self.own.is_ours(destination.ip()) {
            let why = format!("{destination} is no address of this machine");
            return Err(Error::new(Reason::BadRequest).detail(why));
        }
        Ok(destination)
    }

    /// Where a connection of the workload was going; nowhere where it was one that tries the capture, which is answered.
    ///
    /// # Errors
    /// It was going to the sidecar.
    pub async fn outbound(&self, socket: &mut Socket) -> Result<Option<SocketAddr>, Error> {
        // What leaves the workload is redirected in both modes.
        let destination = self.destination(socket, Captured::Redirect)?;
        if destination.port() == self.probed && probe::is_probe(destination) {
            // Whoever asked and has gone has its own end of it to judge by.
            let _ = timeout(ANSWER, probe::answer(socket)).await;
            return Ok(None);
        }
        Ok(Some(destination))
    }

    fn destination(&self, socket: &Socket, captured: Captured) -> Result<SocketAddr, Error> {
        let destination = socket
            .original_dst(captured)
            .map_err(|error| Error::new(Reason::Internal).detail("no original destination").because(error))?;
        self.refuse_loop(destination)?;
        Ok(destination)
    }

    /// Refuses what would reach the sidecar itself.
    ///
    /// # Errors
    /// It would.
    pub fn refuse_loop(&self, destination: SocketAddr) -> Result<(), Error> {
        match self.own.is_loop(destination) {
            true => {
                Err(Error::new(Reason::Loop).detail(format!("{destination} is where the sidecar listens")))
            }
            false => Ok(()),
        }
    }
}
