//! One Redis server: a connection, and the task that keeps it.

use std::sync::Arc;
use std::time::Duration;

use config::sensitive::Sensitive;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisError, Value,
};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Failure, Settings, Tls};

/// The shortest time that connecting gets; requests do not wait for it.
pub(super) const CONNECT: Duration = Duration::from_secs(1);
/// How long a connection may be quiet before it is asked whether it still works.
const QUIET: Duration = Duration::from_secs(2);
/// The first and the longest pause between attempts to connect.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What the watching task tells those who want to send.
#[derive(Clone)]
enum State {
    /// The first attempt to connect, or the first after a connection broke, is under way: worth waiting for.
    Connecting,
    /// Connected; how many connections there were before.
    Up(MultiplexedConnection, u64),
    /// The last attempt failed.
    Down(Arc<str>),
}

/// A server.
pub(super) struct Node {
    state: watch::Receiver<State>,
    /// Wakes the watching task: something is wrong with the connection.
    suspicion: Arc<Notify>,
    task: Option<AbortHandle>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

/// What is sent in one piece.
#[derive(Clone, Copy)]
enum Parcel<'a> {
    One(&'a Cmd),
    All(&'a Pipeline),
}

impl Parcel<'_> {
    async fn send(self, connection: &mut MultiplexedConnection) -> Result<Value, RedisError> {
        match self {
            Self::One(command) => command.query_async(connection).await,
            Self::All(commands) => {
                let answers: Vec<Value> = commands.query_async(connection).await?;
                Ok(answers.into_iter().next_back().unwrap_or(Value::Nil))
            }
        }
    }
}

/// What makes connections to a server.
pub(super) fn client(settings: &Settings, host: &str, port: u16) -> Result<Client, RedisError> {
    let mut redis =
        RedisConnectionInfo::default().set_skip_set_lib_name().set_db(i64::from(settings.database));
    if let Some(username) = &settings.username {
        redis = redis.set_username(username);
    }
    // An empty password is none, as in APISIX.
    let password = settings.password.as_ref().map(Sensitive::reveal).filter(|text| !text.is_empty());
    if let Some(password) = password {
        redis = redis.set_password(password);
    }
    let host = host.to_owned();
    let address = match settings.tls {
        Tls::Off => ConnectionAddr::Tcp(host, port),
        tls => ConnectionAddr::TcpTls { host, port, insecure: tls == Tls::Unverified, tls_params: None },
    };
    let tcp = TcpSettings::default().set_nodelay(true);
    Client::open(address.into_connection_info()?.set_tcp_settings(tcp).set_redis_settings(redis))
}

impl Node {
    /// A server that a task connects to from now on.
    pub(super) fn start(settings: &Settings, host: &str, port: u16, control: &Handle) -> Self {
        let suspicion = Arc::new(Notify::new());
        let (tell, state) = watch::channel(State::Connecting);
        let task = match client(settings, host, port) {
            Ok(client) => {
                let name = format!("{host}:{port}");
                let watching =
                    watch_over(client, name, tell, suspicion.clone(), settings.timeout.max(CONNECT));
                Some(control.spawn(watching).abort_handle())
            }
            Err(error) => {
                tell.send_replace(State::Down(error.to_string().into()));
                None
            }
        };
        Self { state, suspicion, task }
    }

    /// Sends a command.
    pub(super) async fn send(&self, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        self.deliver(Parcel::One(command), deadline).await
    }

    /// Sends commands that nothing may come between, and gives the answer of the last.
    pub(super) async fn send_all(&self, commands: &Pipeline, deadline: Instant) -> Result<Value, Failure> {
        self.deliver(Parcel::All(commands), deadline).await
    }

    async fn deliver(&self, parcel: Parcel<'_>, deadline: Instant) -> Result<Value, Failure> {
        let mut broken = None;
        loop {
            let (mut connection, generation) =
                timeout_at(deadline, self.connection(broken)).await.map_err(|_| Failure::TimedOut)??;
            let error = match timeout_at(deadline, parcel.send(&mut connection)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => {
                    self.suspicion.notify_one();
                    return Err(Failure::TimedOut);
                }
            };
            if matches!(error.kind(), ErrorKind::Server(_)) {
                return Err(Failure::Refused(error));
            }
            self.suspicion.notify_one();
            // A server may close a connection that was quiet; the next one deserves a try, once.
            if broken.is_some() || !error.is_io_error() {
                return Err(Failure::Refused(error));
            }
            broken = Some(generation);
        }
    }

    /// The connection, unless it is the broken one.
    async fn connection(&self, broken: Option<u64>) -> Result<(MultiplexedConnection, u64), Failure> {
        let known = |state: &State| match state {
            State::Connecting => None,
            State::Up(_, generation) if Some(*generation) == broken => None,
            State::Up(connection, generation) => Some(Ok((connection.clone(), *generation))),
            State::Down(why) => Some(Err(Failure::Unreachable(why.clone()))),
        };
        if let Some(found) = known(&self.state.borrow()) {
            return found;
        }
        let mut state = self.state.clone();
        let state = state.wait_for(|state| known(state).is_some()).await;
        let found = state.ok().and_then(|state| known(&state));
        found.unwrap_or_else(|| Err(Failure::Unreachable("the gateway stops".into())))
    }
}

async fn connect(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    // The deadlines are ours; those of the client would count twice.
    let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    ping(&mut connection).await?;
    Ok(connection)
}

async fn ping(connection: &mut MultiplexedConnection) -> Result<Value, RedisError> {
    redis::cmd("PING").query_async(connection).await
}

/// Connects, and connects again whenever the connection does not work, until it is stopped.
async fn watch_over(
    client: Client,
    name: String,
    tell: watch::Sender<State>,
    suspicion: Arc<Notify>,
    limit: Duration,
) {
    let mut generation = 0;
    let mut pause = PAUSES.0;
    loop {
        let error: Arc<str> = match timeout(limit, connect(&client)).await {
            Ok(Ok(mut connection)) => {
                if matches!(&*tell.borrow(), State::Down(_)) {
                    tracing::info!(redis = name, "redis: connected");
                }
                generation += 1;
                pause = PAUSES.0;
                tell.send_replace(State::Up(connection.clone(), generation));
                healthy(&mut connection, &suspicion, limit).await;
                tell.send_replace(State::Connecting);
                continue;
            }
            Ok(Err(error)) => error.to_string().into(),
            Err(_) => "it does not answer".into(),
        };
        if !matches!(&*tell.borrow(), State::Down(_)) {
            tracing::warn!(redis = name, %error, "redis: not reachable");
        }
        tell.send_replace(State::Down(error));
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Returns when the connection does not work any more.
async fn healthy(connection: &mut MultiplexedConnection, suspicion: &Notify, limit: Duration) {
    loop {
        let _ = timeout(QUIET, suspicion.notified()).await;
        if !matches!(timeout(limit, ping(connection)).await, Ok(Ok(_))) {
            return;
        }
    }
}
