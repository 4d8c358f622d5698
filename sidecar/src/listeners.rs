//! Where the sidecar listens, and who meets the connections there. Sockets are bound before anything else is started, so that
//! a taken port is told at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use config::capture::Mode;
use config::sidecar::Sidecar;
use layers::transport::hbone::receiver as hbone;
use layers::transport::listen::{Listen, ListenError};
use layers::transport::original_dst::accept_any_destination;
use layers::worker::{Doorman, ListenOptions, Listening};
use nix::unistd::geteuid;

use crate::app::{Addresses, StartError};
use crate::inbound::{By, Inbound, Receiver};
use crate::outbound::{Carrier, Kind, Outbound};
use crate::tunnels::Tunnels;

/// What takes `CAP_NET_ADMIN`.
const PRIVILEGE: &str = "that takes CAP_NET_ADMIN";

/// Makes the connections of this process known to the rules of the kernel, or it would be led to itself for ever.
///
/// # Errors
/// They would not be told apart from those of the workload.
pub fn be_known(config: &Sidecar) -> Result<(), StartError> {
    if !config.is_transparent() {
        return Ok(());
    }
    let capture = &config.capture;
    if let Some(mark) = capture.mark.and_then(|mark| NonZeroU32::new(mark.get())) {
        return certs::outgoing::set_mark(mark).map_err(|source| StartError::System {
            what: format!(
                "capture.mark: connections cannot be marked; {PRIVILEGE}. Without it, run the sidecar under a uid of \
                 its own and write `uid`"
            ),
            source,
        });
    }
    let own = geteuid().as_raw();
    match capture.bypass_uid() {
        Some(uid) if uid != own => Err(StartError::Setting(format!(
            "capture.uid: the rules tell the sidecar's own connections by the uid {uid}, and it runs under {own}: its \
             connections would come back to it. Run it under {uid}, or write `mark`, which takes CAP_NET_ADMIN"
        ))),
        _ => Ok(()),
    }
}

struct Binder<'a> {
    workers: usize,
    all: Vec<Listening>,
    addresses: &'a mut Addresses,
}

impl Binder<'_> {
    fn bind(&mut self, address: SocketAddr, key: &str, doorman: Arc<dyn Doorman>) -> Result<(), ListenError> {
        let sockets = Listen { address, key: key.to_owned() }.bind(self.workers)?;
        let bound = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(address);
        self.addresses.0.push((key.to_owned(), bound));
        let options = ListenOptions { doorman: Some(doorman), ..ListenOptions::default() };
        self.all.push(Listening { sockets, options });
        Ok(())
    }

    /// At an address of each family; a machine may well have no IPv6.
    fn bind_both(
        &mut self,
        [v4, v6]: [IpAddr; 2],
        port: u16,
        key: &str,
        doorman: &Arc<dyn Doorman>,
    ) -> Result<(), ListenError> {
        self.bind(SocketAddr::new(v4, port), key, doorman.clone())?;
        match self.bind(SocketAddr::new(v6, port), key, doorman.clone()) {
            Err(error) if error.is_missing_family() => Ok(()),
            bound => bound,
        }
    }
}

/// The listeners for the workload's callers.
///
/// # Errors
/// An address cannot be listened on.
pub fn inward(
    config: &Sidecar,
    receiver: &Arc<Receiver>,
    tunnels: &Arc<hbone::Receiver>,
    addresses: &mut Addresses,
) -> Result<Vec<Listening>, StartError> {
    let mut binder = Binder { workers: config.workers.get() as usize, all: Vec::new(), addresses };
    let listens = config.inbound.ports.iter().filter_map(|port| port.listen);
    for (number, listen) in listens.enumerate() {
        let doorman = Arc::new(Inbound { by: By::Port(number), receiver: receiver.clone() });
        binder.bind(listen.0, &format!("inbound.ports.{number}.listen"), doorman)?;
    }
    if let Some(address) = config.inbound.hbone {
        let doorman = Arc::new(Tunnels { hbone: tunnels.clone(), receiver: receiver.clone() });
        binder.bind(address.0, "inbound.hbone", doorman)?;
    }
    if config.inbound.transparent {
        let doorman: Arc<dyn Doorman> = Arc::new(Inbound { by: By::Capture, receiver: receiver.clone() });
        let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let before = binder.all.len();
        binder.bind_both(any, config.capture.inbound_port.get(), "capture.inbound_port", &doorman)?;
        if config.capture.mode == Mode::Tproxy {
            let sockets = binder.all.iter().skip(before).flat_map(|listening| &listening.sockets);
            sockets.into_iter().try_for_each(accept_any_destination).map_err(|source| {
                StartError::System {
                    what: format!("capture.mode: tproxy is not permitted; {PRIVILEGE}"),
                    source,
                }
            })?;
        }
    }
    Ok(binder.all)
}

/// The listeners for the workload.
///
/// # Errors
/// An address cannot be listened on.
pub fn outward(
    config: &Sidecar,
    carrier: &Arc<Carrier>,
    addresses: &mut Addresses,
) -> Result<Vec<Listening>, StartError> {
    let mut wanted = Vec::new();
    if let Some(address) = config.outbound.http_proxy {
        wanted.push((address, "outbound.http_proxy".to_owned(), Kind::HttpProxy));
    }
    if let Some(address) = config.outbound.socks5 {
        wanted.push((address, "outbound.socks5".to_owned(), Kind::Socks5));
    }
    for (number, listener) in config.outbound.listeners.iter().enumerate() {
        let kind = Kind::Service(listener.service.to_string().into());
        wanted.push((listener.listen, format!("outbound.listeners.{number}.listen"), kind));
    }
    let mut binder = Binder { workers: config.workers.get() as usize, all: Vec::new(), addresses };
    for (address, key, kind) in wanted {
        binder.bind(address.0, &key, Arc::new(Outbound { kind, carrier: carrier.clone() }))?;
    }
    if config.outbound.transparent {
        let doorman: Arc<dyn Doorman> = Arc::new(Outbound { kind: Kind::Capture, carrier: carrier.clone() });
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        binder.bind_both(loopback, config.capture.outbound_port.get(), "capture.outbound_port", &doorman)?;
    }
    Ok(binder.all)
}
