//! Connections that the kernel leads to a sidecar, in network namespaces with real rules. What stands in for the sidecar
//! here only says where a connection was going; what it does with it is another test's matter.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets something unexpected is meant to panic"
)]

#[path = "../../tests/src/namespace.rs"]
mod namespace;

use std::net::SocketAddr;
use std::time::Duration;

use config::capture::Capture;
use layers::transport::original_dst::{Captured, accept_any_destination, connect_as, original_dst};
use serde_json::{Value, json};
use sidecar::capture::probe::{By, Outcome, probe};
use sidecar::capture::{self, With};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use namespace::Namespace;

const LIMIT: Duration = Duration::from_secs(10);
const MARK: u32 = 0x505;

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn settings(settings: Value) -> Capture {
    serde_json::from_value(settings).unwrap()
}

/// A machine with a workload, and one beside it.
struct Machines {
    workload: Namespace,
    beside: Namespace,
}

/// Two of them, or a word and none.
fn machines() -> Option<Machines> {
    let made = Namespace::new().and_then(|workload| Ok(Machines { workload, beside: Namespace::new()? }));
    match made {
        Ok(machines) => {
            machines.workload.join(&machines.beside);
            Some(machines)
        }
        Err(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

impl Machines {
    fn install(&self, capture: &Capture, with: With) {
        self.workload.run(|| async { capture::install(capture, with).await.unwrap() });
    }

    fn differences(&self, capture: &Capture, with: With) -> Vec<String> {
        self.workload.run(|| async { capture::check(capture, with).await.unwrap() })
    }

    /// Everything of the kernel that a capture may change. A table of routes that is not there is nothing.
    fn state(&self) -> String {
        self.workload.sh("nft list ruleset; ip -4 rule; ip -6 rule; \
             ip -4 route show table 506 2>&-; ip -6 route show table 506 2>&-; true")
    }

    /// The rules of iptables.
    fn iptables(&self) -> String {
        self.workload.sh("iptables -t nat -S; ip6tables -t nat -S")
    }
}

/// Listeners that tell whoever connects, in a line, who they are and what they saw.
struct Listeners(Vec<std::net::TcpListener>);

impl Listeners {
    /// Bound inside the namespace they are made in.
    fn bind(addresses: &[&str]) -> Self {
        let bind = |address: &&str| {
            let address = addr(address);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
            if address.is_ipv6() {
                socket.set_only_v6(true).unwrap();
            }
            socket.set_reuse_address(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(16).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.into()
        };
        Self(addresses.iter().map(bind).collect())
    }

    /// Answers, on a thread of its own, until what is given is dropped: `name`, where the connection was going, and from
    /// whom.
    fn serve(self, name: &'static str, captured: Captured) -> oneshot::Sender<()> {
        let (stop, stopped) = oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                for listener in self.0 {
                    tokio::spawn(answer(TcpListener::from_std(listener).unwrap(), name, captured));
                }
                let _ = stopped.await;
            });
        });
        stop
    }
}

async fn answer(listener: TcpListener, name: &'static str, captured: Captured) {
    while let Ok((mut stream, peer)) = listener.accept().await {
        let going = original_dst(&stream, captured).unwrap();
        let words = format!("{name} {going} from {}", peer.ip().to_canonical());
        let _ = stream.write_all(words.as_bytes()).await;
    }
}

/// What a connection to `to` hears.
async fn hear(to: SocketAddr) -> String {
    heard(TcpStream::connect(to).await).await
}

async fn heard(stream: std::io::Result<TcpStream>) -> String {
    let mut words = String::new();
    match stream {
        Ok(mut stream) => match timeout(LIMIT, stream.read_to_string(&mut words)).await {
            Ok(Ok(_)) => words,
            other => format!("{other:?}"),
        },
        Err(error) => error.kind().to_string(),
    }
}

async fn hear_marked(to: SocketAddr, mark: u32) -> String {
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    SockRef::from(&socket).set_mark(mark).unwrap();
    heard(timeout(LIMIT, socket.connect(to)).await.unwrap()).await
}

const SIDECAR: [&str; 4] = ["127.0.0.1:15001", "[::1]:15001", "0.0.0.0:15006", "[::]:15006"];

impl Machines {
    /// A sidecar and an application on the workload's machine, an application on the machine beside.
    fn everybody(&self) -> [oneshot::Sender<()>; 3] {
        let inside =
            |namespace: &Namespace, addresses: &[&str]| namespace.enter(|| Listeners::bind(addresses));
        let application = ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:9005"];
        let far = ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:5432", "[::]:5432", "0.0.0.0:53"];
        [
            inside(&self.workload, &SIDECAR).serve("sidecar", Captured::Redirect),
            inside(&self.workload, &application).serve("application", Captured::Redirect),
            inside(&self.beside, &far).serve("far", Captured::Redirect),
        ]
    }

    /// What the workload hears from there.
    fn out(&self, to: &str) -> String {
        self.workload.run(|| hear(addr(to)))
    }

    /// What the machine beside hears from there.
    fn in_from_beside(&self, to: &str) -> String {
        self.beside.run(|| hear(addr(to)))
    }
}

/// Both ways of writing the rules.
const BOTH: [With; 2] = [With::Nft, With::Iptables];

#[test]
fn redirected_connections_tell_where_they_were_going() {
    let Some(machines) = machines() else { return };
    let _everybody = machines.everybody();
    for with in BOTH {
        machines.install(&Capture::default(), with);
        for (to, told) in [
            ("10.9.0.2:8080", "sidecar 10.9.0.2:8080 from 10.9.0.1"),
            ("[fd09::2]:8080", "sidecar [fd09::2]:8080 from fd09::1"),
            ("10.9.0.2:7", "sidecar 10.9.0.2:7 from 10.9.0.1"),
            ("10.9.0.2:53", "far 10.9.0.2:53 from 10.9.0.1"),
            ("127.0.0.1:8080", "application 127.0.0.1:8080 from 127.0.0.1"),
            ("[::1]:8080", "application [::1]:8080 from ::1"),
            ("10.9.0.1:8080", "application 10.9.0.1:8080 from 10.9.0.1"),
            ("[fd09::1]:8080", "application [fd09::1]:8080 from fd09::1"),
        ] {
            assert_eq!(machines.out(to), told, "out to {to}, {with:?}");
        }
        for (to, told) in [
            ("10.9.0.1:8080", "sidecar 10.9.0.1:8080 from 10.9.0.2"),
            ("[fd09::1]:8080", "sidecar [fd09::1]:8080 from fd09::2"),
            ("10.9.0.1:9005", "sidecar 10.9.0.1:9005 from 10.9.0.2"),
            // The sidecar's own port: it was going to the sidecar itself.
            ("10.9.0.1:15006", "sidecar 10.9.0.1:15006 from 10.9.0.2"),
            ("10.9.0.1:15001", "connection refused"),
        ] {
            assert_eq!(machines.in_from_beside(to), told, "in to {to}, {with:?}");
        }
    }
}

#[test]
fn the_sidecars_own_connections_are_told_by_uid_or_by_mark() {
    let Some(machines) = machines() else { return };
    let _everybody = machines.everybody();
    let (captured, direct) = ("sidecar 10.9.0.2:8080 from 10.9.0.1", "far 10.9.0.2:8080 from 10.9.0.1");
    let as_uid = |uid: u32| {
        machines.workload.sh(&format!(
            "setpriv --reuid {uid} --clear-groups timeout 10 bash -c 'exec 3<>/dev/tcp/10.9.0.2/8080; cat <&3'"
        ))
    };
    let marked = |mark| machines.workload.run(move || hear_marked(addr("10.9.0.2:8080"), mark));
    for with in BOTH {
        machines.install(&settings(json!({ "uid": 2102 })), with);
        assert_eq!((as_uid(2102), as_uid(1000)), (direct.to_owned(), captured.to_owned()), "{with:?}");
        assert_eq!(marked(MARK), captured, "a mark that nobody asked for, {with:?}");

        machines.install(&settings(json!({ "mark": MARK })), with);
        assert_eq!((marked(MARK), marked(MARK + 1)), (direct.to_owned(), captured.to_owned()), "{with:?}");
        assert_eq!(as_uid(2102), captured, "a uid that nobody asked for, {with:?}");
        let v6 = machines.workload.run(|| hear_marked(addr("[fd09::2]:8080"), MARK));
        assert_eq!(v6, "far [fd09::2]:8080 from fd09::1", "{with:?}");

        machines.install(&settings(json!({ "mark": MARK, "uid": 2102 })), with);
        assert_eq!((as_uid(2102), marked(MARK)), (direct.to_owned(), direct.to_owned()), "{with:?}");
    }
}

#[test]
fn ports_and_networks_are_skipped_both_ways() {
    let Some(machines) = machines() else { return };
    let _everybody = machines.everybody();
    let ports = settings(json!({ "skip_inbound_ports": ["9000-9010"], "skip_outbound_ports": [5432] }));
    let far =
        settings(json!({ "skip_inbound_cidrs": ["10.9.0.0/24"], "skip_outbound_cidrs": ["fd09::/64"] }));
    let near =
        settings(json!({ "skip_inbound_cidrs": ["fd09::2/128"], "skip_outbound_cidrs": ["10.9.0.2/32"] }));
    for with in BOTH {
        machines.install(&ports, with);
        assert_eq!(machines.out("10.9.0.2:5432"), "far 10.9.0.2:5432 from 10.9.0.1");
        assert_eq!(machines.out("[fd09::2]:5432"), "far [fd09::2]:5432 from fd09::1");
        assert_eq!(machines.out("10.9.0.2:8080"), "sidecar 10.9.0.2:8080 from 10.9.0.1");
        assert_eq!(machines.in_from_beside("10.9.0.1:9005"), "application 10.9.0.1:9005 from 10.9.0.2");
        assert_eq!(machines.in_from_beside("10.9.0.1:8080"), "sidecar 10.9.0.1:8080 from 10.9.0.2");

        machines.install(&far, with);
        assert_eq!(machines.out("[fd09::2]:8080"), "far [fd09::2]:8080 from fd09::1");
        assert_eq!(machines.out("10.9.0.2:8080"), "sidecar 10.9.0.2:8080 from 10.9.0.1");
        assert_eq!(machines.in_from_beside("10.9.0.1:8080"), "application 10.9.0.1:8080 from 10.9.0.2");
        assert_eq!(machines.in_from_beside("[fd09::1]:8080"), "sidecar [fd09::1]:8080 from fd09::2");

        machines.install(&near, with);
        assert_eq!(machines.out("[fd09::2]:8080"), "sidecar [fd09::2]:8080 from fd09::1");
        assert_eq!(machines.out("10.9.0.2:8080"), "far 10.9.0.2:8080 from 10.9.0.1");
        assert_eq!(machines.in_from_beside("10.9.0.1:8080"), "sidecar 10.9.0.1:8080 from 10.9.0.2");
        assert_eq!(machines.in_from_beside("[fd09::1]:8080"), "application [fd09::1]:8080 from fd09::2");
    }
}

#[test]
fn twice_is_once_and_nothing_is_left() {
    let Some(machines) = machines() else { return };
    let before = machines.state();
    let redirect = settings(json!({
        "skip_inbound_ports": [22, "9000-9010"], "skip_outbound_cidrs": ["10.0.0.0/9", "10.128.0.0/9", "11.0.0.0/9", "fd00::/8"],
    }));
    let tproxy = settings(json!({ "mode": "tproxy", "mark": MARK }));
    for capture in [&redirect, &tproxy] {
        machines.install(capture, With::Nft);
        let once = machines.state();
        machines.install(capture, With::Nft);
        assert_eq!(machines.state(), once);
        assert_eq!(machines.differences(capture, With::Nft), [""; 0]);
    }
    assert!(!machines.differences(&redirect, With::Nft).is_empty(), "TPROXY is no redirection");
    machines.install(&redirect, With::Nft);
    assert_eq!(machines.differences(&redirect, With::Nft), [""; 0], "what TPROXY needed is gone");
    for _ in 0..2 {
        machines.workload.run(|| async { capture::remove().await.unwrap() });
        assert_eq!(machines.state(), before);
    }

    machines.workload.sh("iptables -t nat -A OUTPUT -p tcp --dport 81 -j REDIRECT --to-ports 82");
    let before = machines.iptables();
    machines.install(&redirect, With::Iptables);
    let once = machines.state();
    machines.install(&redirect, With::Iptables);
    assert_eq!(machines.state(), once);
    assert_eq!(machines.differences(&redirect, With::Iptables), [""; 0]);
    machines.install(&redirect, With::Nft);
    assert!(!machines.state().contains("POSTERN"), "one capture, not two");
    machines.install(&redirect, With::Iptables);
    assert!(!machines.state().contains("table inet postern"), "one capture, not two");
    machines.workload.run(|| async { capture::remove().await.unwrap() });
    assert_eq!(machines.iptables(), before, "somebody else's rule stays");
}

#[test]
fn a_check_names_what_differs() {
    let Some(machines) = machines() else { return };
    let capture = settings(json!({ "skip_inbound_ports": [22] }));
    let differences = || machines.differences(&capture, With::Nft);
    assert_eq!(differences(), ["the table `inet postern` does not stand: nothing is captured"]);
    machines.install(&capture, With::Nft);
    machines.workload.sh("nft add rule inet postern outbound ip daddr 10.9.0.7 counter accept");
    let told = differences();
    assert_eq!(told, ["chain `outbound`: `ip daddr 10.9.0.7 accept` does not belong there"]);
    machines.install(&capture, With::Nft);
    machines
        .workload
        .sh("nft insert rule inet postern outbound udp dport 9 drop; nft add chain inet postern other");
    let told = differences();
    assert!(
        told[0].contains("\"drop\"") && told[1] == "there is a chain `other` that does not belong there",
        "{told:?}"
    );
    machines.install(&capture, With::Nft);
    machines.workload.sh("nft flush chain inet postern inbound");
    let told = differences();
    assert!(told.contains(&"chain `inbound`: `tcp dport 22 return` is missing".to_owned()), "{told:?}");
    let other = settings(json!({ "skip_inbound_ports": [23], "inbound_port": 16006 }));
    machines.install(&other, With::Nft);
    let told = differences();
    for line in [
        "chain `inbound`: `tcp dport 22 return` is missing",
        "chain `inbound`: `tcp dport 23 return` does not belong there",
        "chain `inbound`: `meta l4proto tcp redirect to :15006` is missing",
    ] {
        assert!(told.iter().any(|told| told == line), "{line}: {told:?}");
    }
}

#[test]
fn tproxy_keeps_destination_and_source() {
    let Some(machines) = machines() else { return };
    let tproxy = settings(json!({ "mode": "tproxy", "mark": MARK }));
    machines.install(&tproxy, With::Auto);
    let far = machines.beside.enter(|| Listeners::bind(&["0.0.0.0:8080"]));
    let _far = far.serve("far", Captured::Redirect);
    let out = machines.workload.enter(|| Listeners::bind(&SIDECAR[..2])).serve("sidecar", Captured::Redirect);
    let application = machines.workload.enter(|| Listeners::bind(&["0.0.0.0:8080", "[::]:8080"]));
    let _application = application.serve("application", Captured::Tproxy);
    // A sidecar that hands every connection on, as its client.
    let nobody = machines
        .beside
        .run(|| async { timeout(Duration::from_millis(300), hear(addr("10.9.0.1:8080"))).await });
    assert!(nobody.is_err(), "without a sidecar nothing goes past it: {nobody:?}");
    let inbound = machines.workload.enter(|| Listeners::bind(&SIDECAR[2..]));
    inbound.0.iter().for_each(|listener| accept_any_destination(listener).unwrap());
    let mark = tproxy.tproxy_mark.get();
    let (stop, stopped) = oneshot::channel::<()>();
    let relay = std::thread::scope(|scope| {
        let relay = scope.spawn(|| {
            machines.workload.run(|| async move {
                for listener in inbound.0 {
                    let listener = TcpListener::from_std(listener).unwrap();
                    tokio::task::spawn_local(async move {
                        while let Ok((mut stream, peer)) = listener.accept().await {
                            let going = original_dst(&stream, Captured::Tproxy).unwrap();
                            let mut application = connect_as(peer.ip(), going, mark).await.unwrap();
                            stream.write_all(format!("{going} ").as_bytes()).await.unwrap();
                            let _ = tokio::io::copy_bidirectional(&mut stream, &mut application).await;
                        }
                    });
                }
                let _ = stopped.await;
            });
        });
        for (to, told) in [
            ("10.9.0.1:8080", "10.9.0.1:8080 application 10.9.0.1:8080 from 10.9.0.2"),
            ("[fd09::1]:8080", "[fd09::1]:8080 application [fd09::1]:8080 from fd09::2"),
        ] {
            assert_eq!(machines.in_from_beside(to), told);
        }
        // Outbound is as ever.
        assert_eq!(machines.out("10.9.0.2:8080"), "sidecar 10.9.0.2:8080 from 10.9.0.1");
        assert_eq!(machines.out("10.9.0.1:8080"), "application 10.9.0.1:8080 from 10.9.0.1");
        drop(stop);
        relay.join()
    });
    relay.unwrap();
    drop(out);
}

#[test]
fn a_capture_is_tried_without_privilege() {
    let Some(machines) = machines() else { return };
    let tried =
        |by, limit| machines.workload.run(move || probe(15001, by, limit)).map(|(_, outcome)| outcome);
    let short = Duration::from_millis(300);
    let missing = |outcome: &Outcome| matches!(outcome, Outcome::Missing(_) | Outcome::NoRoute);
    assert!(tried(By::Anybody, short).iter().all(missing), "nothing is captured");
    for with in BOTH {
        machines.install(&Capture::default(), with);
        assert_eq!(tried(By::Anybody, LIMIT), [Outcome::Captured, Outcome::Captured], "{with:?}");
        assert!(tried(By::Ourselves, short).iter().all(missing), "nobody answers, {with:?}");
    }
    let elsewhere = settings(json!({ "outbound_port": 16001 }));
    machines.install(&elsewhere, With::Nft);
    assert!(tried(By::Anybody, short).iter().all(missing), "it leads to another port");
    let alone = Namespace::new().unwrap();
    let tried = alone.run(move || probe(15001, By::Anybody, short)).map(|(_, outcome)| outcome);
    assert_eq!(tried, [Outcome::NoRoute, Outcome::NoRoute], "nothing can leave");
}
