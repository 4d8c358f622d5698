//! What stands between a Consul and whoever asks it, and misbehaves on request.
//!
//! It passes requests without a body on, one at a time on each connection, and answers as they are, late, by half, or never.
//! A connection that was silent once stays silent, as if what was sent on it were lost for good.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use discovery::testing::Conduct;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A wire to one server; cut when dropped.
#[derive(Debug)]
pub struct Wire {
    pub addr: SocketAddr,
    conduct: watch::Sender<Conduct>,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    target: SocketAddr,
    conduct: watch::Receiver<Conduct>,
    /// How much lower indexes are told than they are.
    rewound: AtomicU64,
    open: AtomicUsize,
    asked: AtomicUsize,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    /// To the server at `target`.
    pub async fn to(target: SocketAddr) -> Wire {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (conduct, receiver) = watch::channel(Conduct::Well);
        let state = Arc::new(State {
            target,
            conduct: receiver,
            rewound: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let state = Arc::clone(&shared);
                connections.spawn(async move {
                    state.open.fetch_add(1, Ordering::SeqCst);
                    let _ = state.serve(stream).await;
                    state.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Wire { addr, conduct, state, task }
    }

    /// `http://127.0.0.1:port`
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// How it behaves from now on. What is under way is answered that way too.
    pub fn behave(&self, how: Conduct) {
        if how == Conduct::Well {
            self.state.rewound.store(0, Ordering::SeqCst);
        }
        self.conduct.send_replace(how);
    }

    /// Connections of clients.
    pub fn open(&self) -> usize {
        self.state.open.load(Ordering::SeqCst)
    }

    /// Requests so far.
    pub fn asked(&self) -> usize {
        self.state.asked.load(Ordering::SeqCst)
    }
}

impl State {
    async fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let _ = client.set_nodelay(true);
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await?);
            }
            self.asked.fetch_add(1, Ordering::SeqCst);
            let head = String::from_utf8_lossy(&head).into_owned();
            let Some(answer) = self.answer(&mut client, head).await? else { return lost(client).await };
            let conduct = *self.conduct.borrow();
            match conduct {
                Conduct::Silent => return lost(client).await,
                Conduct::SlowBody | Conduct::HalfBody => {
                    client.write_all(&answer[..answer.len() - answer.len() / 4]).await?;
                    return if conduct == Conduct::SlowBody { lost(client).await } else { Ok(()) };
                }
                Conduct::Errors => {
                    let text =
                        "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 17\r\n\r\nNo cluster leader";
                    client.write_all(text.as_bytes()).await?;
                }
                Conduct::Garbage => {
                    let text =
                        "HTTP/1.1 200 OK\r\nContent-Length: 15\r\nX-Consul-Index: 9\r\n\r\n<html>hi</html>";
                    client.write_all(text.as_bytes()).await?;
                }
                _ => client.write_all(&answer).await?,
            }
        }
    }

    /// What the server answers; at once when the conduct changes meanwhile. None: the client has gone.
    async fn answer(&self, client: &mut TcpStream, mut head: String) -> std::io::Result<Option<Vec<u8>>> {
        let mut conduct = self.conduct.clone();
        loop {
            let how = *conduct.borrow_and_update();
            if !matches!(how, Conduct::Well | Conduct::SlowBody | Conduct::HalfBody | Conduct::Rewinds) {
                return Ok(Some(Vec::new()));
            }
            let mut byte = [0];
            tokio::select! {
                answer = self.forward(&head, how) => return answer.map(Some),
                read = client.peek(&mut byte) => if read? == 0 { return Ok(None) },
                _ = conduct.changed() => {}
            }
            head = at_once(&head);
        }
    }

    async fn forward(&self, head: &str, how: Conduct) -> std::io::Result<Vec<u8>> {
        let rewound = self.rewound.load(Ordering::SeqCst);
        let head = replace_number(head, "index=", |index| index.saturating_add(rewound));
        let head = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        let mut server = TcpStream::connect(self.target).await?;
        server.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        if server.read_to_end(&mut answer).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut text = String::from_utf8_lossy(&answer).replacen("Connection: close\r\n", "", 1);
        if how == Conduct::Rewinds && rewound == 0 {
            text = replace_number(&text, "X-Consul-Index: ", |index| {
                self.rewound.store(index.saturating_sub(1), Ordering::SeqCst);
                index
            });
        }
        let rewound = self.rewound.load(Ordering::SeqCst);
        Ok(replace_number(&text, "X-Consul-Index: ", |index| index.saturating_sub(rewound).max(1))
            .into_bytes())
    }
}

/// Reads and answers nothing until the client gives up.
async fn lost(mut client: TcpStream) -> std::io::Result<()> {
    let mut nothing = [0; 1024];
    while client.read(&mut nothing).await? > 0 {}
    Ok(())
}

/// The same question without waiting for a change.
fn at_once(head: &str) -> String {
    let head = replace_number(head, "index=", |_| 0);
    replace_number(&head, "wait=", |_| 1)
}

/// Puts another number behind the first `mark`.
fn replace_number(text: &str, mark: &str, change: impl FnOnce(u64) -> u64) -> String {
    let Some(start) = text.find(mark).map(|start| start + mark.len()) else { return text.to_owned() };
    let digits = text[start..].chars().take_while(char::is_ascii_digit).count();
    let Ok(number) = text[start..start + digits].parse() else { return text.to_owned() };
    format!("{}{}{}", &text[..start], change(number), &text[start + digits..])
}
