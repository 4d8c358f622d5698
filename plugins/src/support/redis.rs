//! Redis for plugins: one connection that all workers share for each server, or cluster, that settings name.
//!
//! The connection lives on the control runtime; a worker hands a command over and waits for the answer, never longer
//! than the time-out of the settings. A task there connects, watches and connects again with growing pauses. While no
//! connection can be had, a command fails at once, so that a dead Redis does not cost each request its time-out.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use config::error::ConfigError;
use config::sensitive::Sensitive;
use layers::plugin::BuildEnv;
use redis::aio::MultiplexedConnection;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo, RedisConnectionInfo, RedisError, ServerErrorKind, TlsMode, ToRedisArgs, Value,
};
use sha1::{Digest, Sha1};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

/// The shortest time that connecting gets; requests do not wait for it.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a connection may be quiet before it is asked whether it still works.
const QUIET: Duration = Duration::from_secs(2);
/// The first and the longest pause between attempts to connect.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Attempts of the cluster's own client to follow slots that move, within a command's time.
const REDIRECTS: u32 = 3;

/// Where Redis is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// One server, or the nodes of a cluster that are asked for the others.
    pub servers: Servers,
    /// The user, where the server has several.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Sensitive<0>>,
    /// The database; 0 for a cluster.
    pub database: u32,
    /// What one command may take, connecting included.
    pub timeout: Duration,
    /// Whether TLS is spoken, and whether the server's certificate is verified.
    pub tls: Tls,
}

/// One server or a cluster.
#[derive(Clone, Debug)]
pub enum Servers {
    /// Host and port.
    One(String, u16),
    /// Hosts and ports of some nodes.
    Cluster(Vec<(String, u16)>),
}

/// How a connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Not at all.
    Off,
    /// By TLS with whatever certificate the server shows.
    Unverified,
    /// By TLS; the certificate has to fit the host and a root of the system.
    Verified,
}

impl Tls {
    /// From the two switches of APISIX's settings.
    pub fn of(ssl: bool, verify: bool) -> Self {
        match (ssl, verify) {
            (false, _) => Self::Off,
            (true, false) => Self::Unverified,
            (true, true) => Self::Verified,
        }
    }
}

/// Reads `host:port`; an IPv6 address stands in brackets.
pub fn address(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port > 0)?;
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is no connection, and none could be made.
    #[error("redis is not reachable: {0}")]
    Unreachable(Arc<str>),
    /// The time of the settings is over.
    #[error("redis did not answer in time")]
    TimedOut,
    /// The server answered with an error, or with what was not expected.
    #[error("redis: {0}")]
    Refused(RedisError),
}

/// A script, sent by its hash and only to a server that does not know it in full.
#[derive(Debug)]
pub struct Script {
    text: Cow<'static, str>,
    hash: String,
}

impl Script {
    /// A script in Lua. All keys it touches have to be among its keys.
    pub fn new(text: impl Into<Cow<'static, str>>) -> Self {
        let text = text.into();
        let mut hash = String::with_capacity(40);
        for byte in Sha1::digest(text.as_bytes()) {
            let _ = write!(hash, "{byte:02x}");
        }
        Self { text, hash }
    }
}

/// What the watching task tells those who want to send.
#[derive(Clone)]
enum State {
    /// The first attempt to connect, or the first after a connection broke, is under way: worth waiting for.
    Connecting,
    /// Connected; how many connections there were before.
    Up(Link, u64),
    /// The last attempt failed.
    Down(Arc<str>),
}

/// A connection. Copies share it.
#[derive(Clone)]
enum Link {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Link {
    async fn send(&mut self, command: &Cmd) -> Result<Value, RedisError> {
        match self {
            Self::One(connection) => command.query_async(connection).await,
            Self::Cluster(connection) => command.query_async(connection).await,
        }
    }
}

/// A Redis server or cluster.
pub struct Redis {
    state: watch::Receiver<State>,
    /// Wakes the watching task: something is wrong with the connection.
    suspicion: Arc<Notify>,
    timeout: Duration,
    task: AbortHandle,
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Redis {
    /// The connection that these settings name. Plugins with the same settings share it, also over reloads.
    ///
    /// # Errors
    /// The settings cannot work. That Redis cannot be reached is none: commands say so.
    pub fn open(settings: &Settings, env: &BuildEnv<'_>) -> Result<Arc<Self>, ConfigError> {
        let maker = Maker::new(settings).map_err(|error| ConfigError::invalid("", error.to_string()))?;
        let Settings { servers, username, password, database, timeout, tls } = settings;
        let secret = password.as_ref().map(|password| Sha1::digest(password.reveal().as_bytes()));
        let name = format!("redis {servers:?} {username:?} {secret:?} {database} {timeout:?} {tls:?}");
        Ok(env.carry.get_or(&name, || Self::start(maker, *timeout, env.control)))
    }

    fn start(maker: Maker, timeout: Duration, control: &tokio::runtime::Handle) -> Self {
        let (tell, state) = watch::channel(State::Connecting);
        let suspicion = Arc::new(Notify::new());
        let watching = watch_over(maker, tell, suspicion.clone(), timeout.max(CONNECT));
        Self { state, suspicion, timeout, task: control.spawn(watching).abort_handle() }
    }

    /// Sends a command. It may be carried out twice if the connection breaks in the midst of it, and it may be carried
    /// out although this fails.
    ///
    /// # Errors
    /// There is no answer, or it is an error, or of another type.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Failure> {
        let value = self.send(command, Instant::now() + self.timeout).await?;
        redis::from_redis_value(value).map_err(|error| Failure::Refused(error.into()))
    }

    /// Runs a script, all of it at once as Redis does.
    ///
    /// # Errors
    /// As for [`query`](Self::query).
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &Script,
        keys: &[impl ToRedisArgs],
        arguments: &[impl ToRedisArgs],
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + self.timeout;
        let call = |name: &str, script: &str| {
            let mut command = redis::cmd(name);
            command.arg(script).arg(keys.len());
            for key in keys {
                command.arg(key);
            }
            for argument in arguments {
                command.arg(argument);
            }
            command
        };
        let value = match self.send(&call("EVALSHA", &script.hash), deadline).await {
            Err(Failure::Refused(error)) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.send(&call("EVAL", &script.text), deadline).await?
            }
            other => other?,
        };
        redis::from_redis_value(value).map_err(|error| Failure::Refused(error.into()))
    }

    async fn send(&self, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        let mut broken = None;
        loop {
            let (mut link, generation) =
                timeout_at(deadline, self.link(broken)).await.map_err(|_| Failure::TimedOut)??;
            let error = match timeout_at(deadline, link.send(command)).await {
                Ok(Ok(value)) => return Ok(value),
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
    async fn link(&self, broken: Option<u64>) -> Result<(Link, u64), Failure> {
        let known = |state: &State| match state {
            State::Connecting => None,
            State::Up(_, generation) if Some(*generation) == broken => None,
            State::Up(link, generation) => Some(Ok((link.clone(), *generation))),
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

/// Makes connections.
enum Maker {
    One(Box<Client>),
    Cluster(Box<ClusterClient>),
}

impl Maker {
    fn new(settings: &Settings) -> Result<Self, RedisError> {
        let mut redis = RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(username) = &settings.username {
            redis = redis.set_username(username);
        }
        // An empty password is none, as in APISIX.
        let password = settings.password.as_ref().map(Sensitive::reveal).filter(|text| !text.is_empty());
        if let Some(password) = password {
            redis = redis.set_password(password);
        }
        let tcp = TcpSettings::default().set_nodelay(true);
        let node = |(host, port): &(String, u16)| -> Result<ConnectionInfo, RedisError> {
            let (host, port) = (host.clone(), *port);
            let address = match settings.tls {
                Tls::Off => ConnectionAddr::Tcp(host, port),
                tls => {
                    let insecure = tls == Tls::Unverified;
                    ConnectionAddr::TcpTls { host, port, insecure, tls_params: None }
                }
            };
            Ok(address
                .into_connection_info()?
                .set_tcp_settings(tcp.clone())
                .set_redis_settings(redis.clone().set_db(i64::from(settings.database))))
        };
        match &settings.servers {
            Servers::One(host, port) => Ok(Self::One(Box::new(Client::open(node(&(host.clone(), *port))?)?))),
            Servers::Cluster(nodes) => {
                let nodes = nodes.iter().map(node).collect::<Result<Vec<_>, _>>()?;
                let mut builder = ClusterClientBuilder::new(nodes)
                    .retries(REDIRECTS)
                    .min_retry_wait(10)
                    .max_retry_wait(100)
                    .connection_timeout(settings.timeout.max(CONNECT) / 2)
                    .response_timeout(settings.timeout)
                    .tcp_settings(tcp);
                builder = match settings.tls {
                    Tls::Off => builder,
                    Tls::Unverified => builder.tls(TlsMode::Insecure),
                    Tls::Verified => builder.tls(TlsMode::Secure),
                };
                Ok(Self::Cluster(Box::new(builder.build()?)))
            }
        }
    }

    async fn connect(&self) -> Result<Link, RedisError> {
        match self {
            Self::One(client) => {
                // The deadlines are ours; those of the client would count twice.
                let config =
                    AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
                let mut link = Link::One(client.get_multiplexed_async_connection_with_config(&config).await?);
                link.send(&redis::cmd("PING")).await?;
                Ok(link)
            }
            Self::Cluster(client) => Ok(Link::Cluster(client.get_async_connection().await?)),
        }
    }
}

/// Connects, and connects again whenever the connection does not work, until it is stopped.
async fn watch_over(maker: Maker, tell: watch::Sender<State>, suspicion: Arc<Notify>, limit: Duration) {
    let mut generation = 0;
    let mut pause = PAUSES.0;
    loop {
        let error: Arc<str> = match timeout(limit, maker.connect()).await {
            Ok(Ok(mut link)) => {
                if generation > 0 {
                    tracing::info!("redis: connected again");
                }
                generation += 1;
                pause = PAUSES.0;
                tell.send_replace(State::Up(link.clone(), generation));
                let rest = Instant::now() + PAUSES.1;
                healthy(&mut link, &suspicion, limit).await;
                match link {
                    Link::One(_) => _ = tell.send_replace(State::Connecting),
                    // The nodes that still work are used until there is a new connection, and a node that is down for
                    // long does not cost one after the other.
                    Link::Cluster(_) => sleep_until(rest).await,
                }
                continue;
            }
            Ok(Err(error)) => error.to_string().into(),
            Err(_) => "it does not answer".into(),
        };
        if !matches!(&*tell.borrow(), State::Down(_)) {
            tracing::warn!(%error, "redis: not reachable");
        }
        tell.send_replace(State::Down(error));
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Returns when the connection does not work any more.
async fn healthy(link: &mut Link, suspicion: &Notify, limit: Duration) {
    loop {
        match link {
            // Its own client keeps the connections to the nodes; only who uses them knows which slots are served.
            Link::Cluster(_) => return suspicion.notified().await,
            Link::One(_) => {
                let _ = timeout(QUIET, suspicion.notified()).await;
                if !matches!(timeout(limit, link.send(&redis::cmd("PING"))).await, Ok(Ok(_))) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use layers::testing::TestEnv;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinSet;

    use super::*;

    /// A server that answers as it is told, and notes what it was asked.
    struct Fake {
        address: SocketAddr,
        asked: Arc<Mutex<Vec<String>>>,
        mood: watch::Sender<Mood>,
    }

    #[derive(Clone, Copy, Default)]
    struct Mood {
        /// Takes commands and says nothing.
        silent: bool,
        /// Cuts all connections when it changes.
        cut: u32,
    }

    impl Fake {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (mood, moods) = watch::channel(Mood::default());
            let asked = Arc::<Mutex<Vec<String>>>::default();
            let notes = asked.clone();
            tokio::spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    connections.spawn(serve(stream, notes.clone(), moods.clone()));
                }
            });
            Self { address, asked, mood }
        }

        fn redis(&self, millis: u64) -> Arc<Redis> {
            let settings = Settings {
                servers: Servers::One(self.address.ip().to_string(), self.address.port()),
                username: None,
                password: None,
                database: 0,
                timeout: Duration::from_millis(millis),
                tls: Tls::Off,
            };
            TestEnv::default().with(|env| Redis::open(&settings, env)).unwrap()
        }

        fn asked(&self, name: &str) -> usize {
            self.asked.lock().unwrap().iter().filter(|asked| **asked == name).count()
        }
    }

    async fn serve(stream: TcpStream, asked: Arc<Mutex<Vec<String>>>, mut moods: watch::Receiver<Mood>) {
        let mut stream = BufReader::new(stream);
        let mut loaded = false;
        let cut = moods.borrow().cut;
        loop {
            let command = tokio::select! {
                command = command(&mut stream) => command,
                _ = moods.wait_for(|mood| mood.cut != cut) => return,
            };
            let Some(command) = command else { return };
            asked.lock().unwrap().push(command[0].clone());
            if moods.wait_for(|mood| !mood.silent).await.is_err() {
                return;
            }
            let answer = match command[0].as_str() {
                "PING" => "+PONG\r\n",
                "EVALSHA" if !loaded => "-NOSCRIPT No matching script.\r\n",
                "FAIL" => "-ERR no\r\n",
                name => {
                    loaded |= name == "EVAL";
                    ":7\r\n"
                }
            };
            if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    async fn command(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
        let mut line = async || {
            let mut line = String::new();
            stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
            Some(line.trim_end().to_owned())
        };
        let count: usize = line().await?.strip_prefix('*')?.parse().ok()?;
        let mut words = Vec::new();
        for _ in 0..count {
            line().await?;
            words.push(line().await?);
        }
        Some(words)
    }

    async fn asks(redis: &Redis) -> Result<u64, Failure> {
        redis.query(&redis::cmd("INCR")).await
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for (text, expected) in [
            ("127.0.0.1:6379", Some(("127.0.0.1", 6379))),
            ("[::1]:7000", Some(("::1", 7000))),
            ("redis.local:1", Some(("redis.local", 1))),
            ("redis.local", None),
            (":1", None),
            ("a:0", None),
            ("a:99999", None),
        ] {
            assert_eq!(address(text), expected.map(|(host, port)| (host.to_owned(), port)), "{text}");
        }
    }

    #[tokio::test]
    async fn a_script_is_sent_in_full_only_where_it_is_not_known() {
        let fake = Fake::start().await;
        let redis = fake.redis(2_000);
        let script = Script::new("return 7");
        assert_eq!(script.hash, "59b6ab2fbe0ee4b25733de0f62e6cda4899ef8e9");
        for _ in 0..3 {
            assert_eq!(redis.run::<u64>(&script, &["k"], &[1]).await.unwrap(), 7);
        }
        assert_eq!((fake.asked("EVALSHA"), fake.asked("EVAL")), (3, 1));
    }

    #[tokio::test]
    async fn an_error_of_the_server_is_told_and_breaks_nothing() {
        let fake = Fake::start().await;
        let redis = fake.redis(2_000);
        let error = redis.query::<u64>(&redis::cmd("FAIL")).await.unwrap_err();
        assert!(matches!(error, Failure::Refused(_)), "{error}");
        assert_eq!(asks(&redis).await.unwrap(), 7);
        assert_eq!(fake.asked("FAIL"), 1, "it is not sent again");
    }

    #[tokio::test]
    async fn a_connection_that_the_server_closed_is_replaced_without_a_failure() {
        let fake = Fake::start().await;
        let redis = fake.redis(2_000);
        assert_eq!(asks(&redis).await.unwrap(), 7);
        for cut in 1..=20 {
            fake.mood.send_replace(Mood { silent: false, cut });
            assert_eq!(asks(&redis).await.unwrap(), 7);
        }
        let connected = fake.asked("PING");
        assert!(connected > 10, "{connected}");
    }

    #[tokio::test]
    async fn a_silent_server_costs_the_time_out_then_nothing_until_it_answers_again() {
        let fake = Fake::start().await;
        let redis = fake.redis(50);
        let up = async |redis: &Redis| {
            for _ in 0..200 {
                if asks(redis).await.is_ok() {
                    return true;
                }
                sleep(Duration::from_millis(20)).await;
            }
            false
        };
        assert!(up(&redis).await);
        fake.mood.send_replace(Mood { silent: true, cut: 0 });
        let started = Instant::now();
        assert!(matches!(asks(&redis).await, Err(Failure::TimedOut)));
        assert!(started.elapsed() < Duration::from_millis(500));
        // Then nobody waits any more.
        let down = async { while !matches!(asks(&redis).await, Err(Failure::Unreachable(_))) {} };
        timeout(Duration::from_secs(8), down).await.unwrap();
        let started = Instant::now();
        for _ in 0..100 {
            assert!(asks(&redis).await.is_err());
        }
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        fake.mood.send_replace(Mood::default());
        assert!(up(&redis).await, "it is found again");
    }

    #[tokio::test]
    async fn where_nobody_listens_commands_fail_at_once() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (mood, _) = watch::channel(Mood::default());
        let nobody = Fake { address: free, asked: Arc::default(), mood };
        let redis = nobody.redis(5_000);
        let started = Instant::now();
        assert!(matches!(asks(&redis).await, Err(Failure::Unreachable(_))));
        assert!(started.elapsed() < Duration::from_secs(2));
    }
}
