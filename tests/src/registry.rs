//! A registry of one's own that is spoken to by HTTP/1, as bad as it is told to be.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use discovery::testing::{Able, Conduct};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::eventually;

/// A question as it was asked.
#[derive(Clone, Debug, Default)]
pub struct Question {
    pub method: String,
    pub path: String,
    /// The query and a form in the body, decoded.
    pub values: BTreeMap<String, String>,
    /// Fields by name in small letters.
    pub fields: BTreeMap<String, String>,
}

impl Question {
    /// A value of the query or the form, empty where there is none.
    pub fn value(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }
}

type Answers = dyn Fn(&Question) -> (u16, Value) + Send + Sync;

struct State {
    answers: Box<Answers>,
    conduct: watch::Sender<Conduct>,
    /// Connections that are open, and questions and connections that were turned away.
    open: AtomicUsize,
    turned_away: AtomicUsize,
    questions: Mutex<Vec<Question>>,
}

/// Answers every question by a function of it; ended when dropped.
pub struct Registry {
    pub addr: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Registry {
    pub async fn start(answers: impl Fn(&Question) -> (u16, Value) + Send + Sync + 'static) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            answers: Box::new(answers),
            conduct: watch::Sender::new(Conduct::Well),
            open: AtomicUsize::new(0),
            turned_away: AtomicUsize::new(0),
            questions: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&state)));
        Registry { addr, state, task }
    }

    /// Behaves so from now on. A restart is over, and was noticed, when this returns.
    pub async fn behave(&self, how: Conduct) -> Able {
        match how {
            Conduct::Rewinds => return Able::No,
            Conduct::Restarts | Conduct::RestartsEmpty => {
                let before = self.state.turned_away.load(Ordering::Acquire);
                self.state.conduct.send_replace(how);
                eventually("somebody finds the registry gone", || async {
                    (self.state.turned_away.load(Ordering::Acquire) > before).then_some(())
                })
                .await;
                self.state.conduct.send_replace(Conduct::Well);
            }
            how => {
                self.state.conduct.send_replace(how);
            }
        }
        Able::Yes
    }

    /// Ends its connections, and is there again before anybody asks.
    pub async fn restart_unseen(&self) {
        self.state.conduct.send_replace(Conduct::Restarts);
        eventually("its connections are ended", || async { (self.connections() == 0).then_some(()) }).await;
        self.state.conduct.send_replace(Conduct::Well);
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.state.open.load(Ordering::Acquire)
    }

    /// What was asked so far.
    pub fn questions(&self) -> Vec<Question> {
        self.state.questions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    loop {
        let (stream, _) = listener.accept().await.expect("a connection");
        if is_gone(*state.conduct.borrow()) {
            state.turned_away.fetch_add(1, Ordering::AcqRel);
            continue;
        }
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            state.open.fetch_add(1, Ordering::AcqRel);
            let mut conduct = state.conduct.subscribe();
            // A registry that is gone takes its connections with it, and answers no question that came meanwhile.
            tokio::select! {
                biased;
                _ = conduct.wait_for(|how| is_gone(*how)) => {}
                () = converse(stream, &state) => {}
            }
            state.open.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

fn is_gone(how: Conduct) -> bool {
    matches!(how, Conduct::Restarts | Conduct::RestartsEmpty)
}

async fn converse(mut stream: TcpStream, state: &State) {
    while let Some(question) = read(&mut stream).await {
        let (status, body) = (state.answers)(&question);
        state.questions.lock().unwrap_or_else(PoisonError::into_inner).push(question);
        let body = body.to_string();
        let head = format!(
            "HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let half = &body[..body.len() / 2];
        let how = *state.conduct.borrow();
        let sent = match how {
            Conduct::Errors => "HTTP/1.1 500 Broken\r\ncontent-length: 5\r\n\r\nwrong".to_owned(),
            Conduct::Garbage => "\u{1}\u{2}this is not HTTP\r\n\r\n".to_owned(),
            Conduct::SlowBody | Conduct::HalfBody => format!("{head}{half}"),
            Conduct::Silent => String::new(),
            _ => format!("{head}{body}"),
        };
        if stream.write_all(sent.as_bytes()).await.is_err()
            || matches!(how, Conduct::HalfBody | Conduct::Garbage)
        {
            return;
        }
        if matches!(how, Conduct::SlowBody | Conduct::Silent) {
            // Until whoever asked has had enough.
            let _ = stream.read_u8().await;
            return;
        }
    }
}

async fn read(stream: &mut TcpStream) -> Option<Question> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end;
        }
        let mut piece = [0; 4096];
        match tokio::time::timeout(Duration::from_secs(120), stream.read(&mut piece)).await {
            Ok(Ok(count)) if count > 0 => bytes.extend_from_slice(&piece[..count]),
            _ => return None,
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let fields: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = fields.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = bytes.split_off(end + 4);
    let mut rest = vec![0; length.saturating_sub(body.len())];
    stream.read_exact(&mut rest).await.ok()?;
    body.extend(rest);
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let form = String::from_utf8_lossy(&body).into_owned();
    let pairs = query.split('&').chain(form.split('&')).filter_map(|pair| pair.split_once('='));
    let values = pairs.map(|(name, value)| (decode(name), decode(value))).collect();
    Some(Question { method, path: decode(path), values, fields })
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}
