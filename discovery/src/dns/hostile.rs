//! A name server for tests that is as bad as it is told to be, over UDP and TCP on one port.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_resolver::proto::op::{Message, Query};
use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, SOA, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::sleep;

pub use hickory_resolver::proto::op::ResponseCode;

/// How a question is dealt with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Behaviour {
    /// From the zone.
    #[default]
    Well,
    /// From the zone, after a while.
    Slow(Duration),
    /// With this code and nothing else.
    Code(ResponseCode),
    /// NXDOMAIN with the SOA of the zone; the answer to `Code(NXDomain)` has none.
    Gone,
    /// No records and the SOA of the zone.
    Empty,
    /// No records, no SOA.
    Bare,
    /// An SOA that is not that of the zone.
    Foreign,
    /// Truncated over UDP; as the zone says over TCP.
    Truncated,
    /// Truncated over UDP, and TCP is closed at once.
    TruncatedNoTcp,
    /// Truncated over UDP; half an answer over TCP, and the rest never.
    HalfTcp,
    /// Silent over UDP; as the zone says over TCP.
    SilentUdp,
    /// The right answer under another id.
    WrongId,
    /// The answer to another question.
    WrongQuestion,
    /// Bytes that are no message.
    Garbage,
    /// Half a message.
    Half,
    Silence,
}

#[derive(Debug, Default)]
struct State {
    zone: BTreeMap<(Name, RecordType), Vec<Record>>,
    behaviour: Behaviour,
    of_kind: BTreeMap<RecordType, Behaviour>,
    /// Addresses of the targets of SRV records are sent along.
    glue: bool,
    questions: Vec<(String, RecordType, bool)>,
}

/// A name server of the zone `test.`
#[derive(Debug)]
pub struct Server {
    pub addr: SocketAddr,
    state: Arc<Mutex<State>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Server {
    /// With an empty zone.
    pub async fn start() -> Self {
        // A port that is free for UDP need not be free for TCP.
        for _ in 0..100 {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let addr = udp.local_addr().unwrap();
            let Ok(tcp) = TcpListener::bind(addr).await else { continue };
            let state = Arc::new(Mutex::new(State { glue: true, ..State::default() }));
            let tasks = vec![
                tokio::spawn(datagrams(udp, Arc::clone(&state))),
                tokio::spawn(streams(tcp, Arc::clone(&state))),
            ];
            return Self { addr, state, tasks };
        }
        panic!("no port is free for UDP and TCP");
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// How questions for one type are dealt with, whatever the others get.
    pub fn behave_for(&self, kind: RecordType, behaviour: Behaviour) {
        self.state().of_kind.insert(kind, behaviour);
    }

    pub fn with_glue(&self, glue: bool) {
        self.state().glue = glue;
    }

    /// The addresses of a name, all of them.
    pub fn addresses(&self, name: &str, ttl: u32, ips: impl IntoIterator<Item = IpAddr>) {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for ip in ips {
            match ip {
                IpAddr::V4(ip) => v4.push(RData::A(A(ip))),
                IpAddr::V6(ip) => v6.push(RData::AAAA(AAAA(ip))),
            }
        }
        self.records(name, RecordType::A, ttl, v4);
        self.records(name, RecordType::AAAA, ttl, v6);
    }

    /// `10.0.0.N` for each of `last`.
    pub fn numbered(&self, name: &str, ttl: u32, last: &[u8]) {
        self.addresses(name, ttl, last.iter().map(|last| IpAddr::from([10, 0, 0, *last])));
    }

    /// SRV records: priority, weight, port, target.
    pub fn services(&self, name: &str, ttl: u32, services: &[(u16, u16, u16, &str)]) {
        let record = |(priority, weight, port, target): &(u16, u16, u16, &str)| {
            RData::SRV(SRV::new(*priority, *weight, *port, full(target)))
        };
        self.records(name, RecordType::SRV, ttl, services.iter().map(record).collect());
    }

    pub fn alias(&self, name: &str, ttl: u32, target: &str) {
        self.records(name, RecordType::CNAME, ttl, vec![RData::CNAME(CNAME(full(target)))]);
    }

    /// The records of one type of a name.
    pub fn records(&self, name: &str, kind: RecordType, ttl: u32, list: Vec<RData>) {
        let name = full(name);
        let records: Vec<Record> =
            list.into_iter().map(|data| Record::from_rdata(name.clone(), ttl, data)).collect();
        let mut state = self.state();
        if records.is_empty() {
            state.zone.remove(&(name, kind));
        } else {
            state.zone.insert((name, kind), records);
        }
    }

    /// Questions for a type so far.
    pub fn asked(&self, kind: RecordType) -> usize {
        self.state().questions.iter().filter(|(_, asked, _)| *asked == kind).count()
    }

    /// Questions so far: the name, the type, and whether over TCP.
    pub fn questions(&self) -> Vec<(String, RecordType, bool)> {
        self.state().questions.clone()
    }
}

fn full(name: &str) -> Name {
    let mut name = Name::from_str_relaxed(name).unwrap();
    name.set_fqdn(true);
    name
}

async fn datagrams(socket: UdpSocket, state: Arc<Mutex<State>>) {
    let socket = Arc::new(socket);
    let mut buffer = [0; 4096];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let Some((answer, pause)) = answer(&buffer[..length], &state, false) else { continue };
        let socket = Arc::clone(&socket);
        tokio::spawn(async move {
            sleep(pause).await;
            let _ = socket.send_to(&answer, peer).await;
        });
    }
}

async fn streams(listener: TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(conversation(stream, Arc::clone(&state)));
    }
}

async fn conversation(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    while let Ok(length) = stream.read_u16().await {
        let mut question = vec![0; length.into()];
        if stream.read_exact(&mut question).await.is_err() {
            return;
        }
        let behaviour = state.lock().unwrap_or_else(PoisonError::into_inner).behaviour;
        if behaviour == Behaviour::TruncatedNoTcp {
            return;
        }
        let Some((answer, pause)) = answer(&question, &state, true) else { continue };
        sleep(pause).await;
        let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
        if behaviour == Behaviour::HalfTcp {
            let _ = stream.write_u16(length).await;
            let _ = stream.write_all(&answer[..answer.len() / 2]).await;
            continue;
        }
        if stream.write_u16(length).await.is_err() || stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// What is sent, and after which pause.
fn answer(question: &[u8], state: &Mutex<State>, tcp: bool) -> Option<(Vec<u8>, Duration)> {
    let question = Message::from_vec(question).unwrap();
    let query = question.queries[0].clone();
    let room = question.edns.as_ref().map_or(512, |edns| edns.max_payload().max(512)).into();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.questions.push((query.name().to_string(), query.query_type(), tcp));
    let behaviour = state.of_kind.get(&query.query_type()).copied().unwrap_or(state.behaviour);
    let mut message = Message::response(question.metadata.id, question.metadata.op_code);
    message.add_query(query.clone());
    let mut pause = Duration::ZERO;
    match behaviour {
        Behaviour::Silence => return None,
        Behaviour::SilentUdp if !tcp => return None,
        Behaviour::Garbage => return Some((vec![0xff; 600], pause)),
        Behaviour::Code(code) => message.metadata.response_code = code,
        Behaviour::Gone => {
            message.metadata.response_code = ResponseCode::NXDomain;
            message.add_authority(soa("test."));
        }
        Behaviour::Empty => {
            message.add_authority(soa("test."));
        }
        Behaviour::Bare => {}
        Behaviour::Foreign => {
            message.metadata.response_code = ResponseCode::NXDomain;
            message.add_authority(soa("elsewhere."));
        }
        Behaviour::Truncated | Behaviour::TruncatedNoTcp | Behaviour::HalfTcp if !tcp => {
            message.metadata.truncation = true;
        }
        Behaviour::WrongId => {
            message.metadata.id = question.metadata.id.wrapping_add(1);
            from_zone(&state, &query, &mut message);
        }
        Behaviour::WrongQuestion => {
            message.queries = vec![Query::query(full("other.test"), query.query_type())];
            from_zone(&state, &query, &mut message);
        }
        Behaviour::Slow(time) => {
            pause = time;
            from_zone(&state, &query, &mut message);
        }
        _ => from_zone(&state, &query, &mut message),
    }
    let mut bytes = message.to_vec().unwrap();
    if !tcp && bytes.len() > room {
        message.answers.clear();
        message.additionals.clear();
        message.metadata.truncation = true;
        bytes = message.to_vec().unwrap();
    }
    if behaviour == Behaviour::Half {
        bytes.truncate(bytes.len() / 2);
    }
    Some((bytes, pause))
}

fn from_zone(state: &State, query: &Query, message: &mut Message) {
    let mut name = query.name().to_lowercase();
    // As far as a server follows aliases by itself.
    for _ in 0..4 {
        let own = state.zone.get(&(name.clone(), query.query_type()));
        if let Some(records) = own {
            message.add_answers(records.iter().cloned());
            break;
        }
        let Some([alias]) = state.zone.get(&(name.clone(), RecordType::CNAME)).map(Vec::as_slice) else {
            break;
        };
        message.add_answer(alias.clone());
        let RData::CNAME(target) = &alias.data else { break };
        name = target.0.clone();
    }
    if state.glue {
        let targets = message.answers.iter().filter_map(|record| match &record.data {
            RData::SRV(srv) => Some(srv.target.clone()),
            _ => None,
        });
        let mut targets: Vec<Name> = targets.collect();
        targets.sort_unstable();
        targets.dedup();
        for kind in [RecordType::A, RecordType::AAAA] {
            for target in &targets {
                let records = state.zone.get(&(target.clone(), kind)).into_iter().flatten();
                message.additionals.extend(records.cloned());
            }
        }
    }
    if message.answers.is_empty() {
        let exists = state.zone.keys().any(|(other, _)| *other == name);
        message.metadata.response_code = if exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
        message.add_authority(soa("test."));
    }
}

fn soa(zone: &str) -> Record {
    let (server, person) = (full("ns.test"), full("somebody.test"));
    Record::from_rdata(full(zone), 1, RData::SOA(SOA::new(server, person, 1, 60, 60, 60, 1)))
}
