//! Redis for plugins: one connection that all workers share for each server that settings name, that a cluster has, or
//! that sentinels name.
//!
//! Connections live on the control runtime; a worker hands a command over and waits for the answer, never longer than
//! the time-out of the settings. A task there connects, watches and connects again with growing pauses. While no
//! connection can be had, a command fails at once, so that a dead Redis does not cost each request its time-out.

mod cluster;
mod found;
mod node;
mod sentinel;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use config::error::ConfigError;
use config::fields::{Int, WideText};
use config::sensitive::Sensitive;
use layers::plugin::BuildEnv;
use redis::{Cmd, ErrorKind, FromRedisValue, RedisError, ServerErrorKind, ToRedisArgs, Value};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use tokio::time::Instant;

use self::cluster::Cluster;
use self::node::Node;
use self::sentinel::Sentinel;

/// The pause before a server is asked again that could not take a command.
const AGAIN: Duration = Duration::from_millis(20);
/// How often it is asked who serves what: at most, and without a reason.
const REFRESH: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Host and port.
type Address = (String, u16);

/// Where Redis is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// One server, the nodes of a cluster that are asked for the others, or the sentinels of a master.
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

/// One server, a cluster, or a master that is watched.
#[derive(Clone, Debug)]
pub enum Servers {
    /// Host and port.
    One(String, u16),
    /// Hosts and ports of some nodes.
    Cluster(Vec<(String, u16)>),
    /// Who says which server is the master.
    Sentinels(Sentinels),
}

/// Sentinels, and the master that they are asked for.
#[derive(Clone, Debug)]
pub struct Sentinels {
    /// Hosts and ports.
    pub addresses: Vec<(String, u16)>,
    /// What they call the master.
    pub master: String,
    /// The user, where they have several.
    pub username: Option<String>,
    /// Their password.
    pub password: Option<Sensitive<0>>,
}

impl Sentinels {
    /// How one of them is spoken to.
    fn settings(&self, master: &Settings) -> Settings {
        Settings {
            username: self.username.clone(),
            password: self.password.clone(),
            database: 0,
            ..master.clone()
        }
    }
}

/// A sentinel, as settings name it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct SentinelAddress {
    /// Its host.
    host: WideText<2, 4096>,
    /// Its port.
    port: Int<1, 65_535>,
}

/// Which of the servers that sentinels watch is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Role {
    /// The one that takes writes.
    Master,
    /// Refused here: counting is writing, and replicas take no writes.
    Slave,
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

/// Where counts are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// In this process.
    #[default]
    Local,
    /// In a Redis server that several gateways may share.
    Redis,
    /// In a Redis cluster that several gateways may share.
    RedisCluster,
    /// In the Redis server that sentinels name as the master.
    RedisSentinel,
}

/// Puts APISIX's settings of Redis behind those of a plugin that has a `policy`, and a method `redis_settings` that
/// reads them.
macro_rules! with_redis {
    ($(#[$attributes:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        $(#[$attributes])*
        pub struct $name {
            $($fields)*
            /// The host of Redis. Needed with `policy: redis`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_host: Option<config::fields::WideText<2, 4096>>,
            /// The port of Redis. 6379 where it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_port: Option<config::fields::Int<1, 65535>>,
            /// The user, where Redis has several.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_username: Option<config::fields::WideText<1, 4096>>,
            /// The password of Redis, of the cluster, or of the master that sentinels name.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(extend("x-encrypted" = true))]
            redis_password: Option<config::sensitive::Sensitive<0>>,
            /// The database. 0 where it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_database: Option<config::fields::Int<0, 2_147_483_647>>,
            /// What asking Redis may take for one request, in milliseconds. 1000 where it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_timeout: Option<config::fields::Int<1, 2_147_483_647>>,
            /// Speak TLS to Redis.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_ssl: Option<bool>,
            /// Verify the certificate of Redis.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_ssl_verify: Option<bool>,
            /// Taken and not used: one connection serves all requests.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_keepalive_timeout: Option<config::fields::Int<1, 2_147_483_647>>,
            /// Taken and not used: one connection serves all requests.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_keepalive_pool: Option<config::fields::Int<1, 2_147_483_647>>,
            /// Some nodes of the cluster, `host:port`. Needed with `policy: redis-cluster`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(length(min = 1))]
            redis_cluster_nodes: Option<Vec<config::fields::WideText<2, 100>>>,
            /// A name for the cluster. Needed with `policy: redis-cluster`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_cluster_name: Option<String>,
            /// Speak TLS to the cluster.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_cluster_ssl: Option<bool>,
            /// Verify the certificates of the cluster.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_cluster_ssl_verify: Option<bool>,
            /// The sentinels. Needed with `policy: redis-sentinel`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(length(min = 1))]
            redis_sentinels: Option<Vec<$crate::support::redis::SentinelAddress>>,
            /// What the sentinels call the master. Needed with `policy: redis-sentinel`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_master_name: Option<config::fields::WideText<1, 4096>>,
            /// Which of the servers that the sentinels watch is used. `master` where it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_role: Option<$crate::support::redis::Role>,
            /// Taken and not used: requests do not wait for connections.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_connect_timeout: Option<config::fields::Int<1, 2_147_483_647>>,
            /// As `redis_timeout`, with `policy: redis-sentinel`. 1000 where it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            redis_read_timeout: Option<config::fields::Int<1, 2_147_483_647>>,
            /// The user of the sentinels, where they have several.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            sentinel_username: Option<String>,
            /// The password of the sentinels.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(extend("x-encrypted" = true))]
            sentinel_password: Option<config::sensitive::Sensitive<0>>,
        }

        impl $name {
            /// How Redis is reached; nothing for counts of this process.
            fn redis_settings(
                &self,
            ) -> Result<Option<$crate::support::redis::Settings>, config::error::ConfigError> {
                $crate::support::redis::Fields {
                    policy: self.policy,
                    host: self.redis_host.as_deref(),
                    port: self.redis_port.map(config::fields::Int::get),
                    username: self.redis_username.as_deref(),
                    password: self.redis_password.as_ref(),
                    database: self.redis_database.map(config::fields::Int::get),
                    timeout: self.redis_timeout.map(config::fields::Int::get),
                    ssl: [self.redis_ssl, self.redis_ssl_verify].map(Option::unwrap_or_default),
                    nodes: self.redis_cluster_nodes.as_deref(),
                    cluster_name: self.redis_cluster_name.as_deref(),
                    cluster_ssl: [self.redis_cluster_ssl, self.redis_cluster_ssl_verify]
                        .map(Option::unwrap_or_default),
                    idle: self.redis_keepalive_timeout.map(config::fields::Int::get),
                    sentinels: self.redis_sentinels.as_deref(),
                    master: self.redis_master_name.as_deref(),
                    role: self.redis_role,
                    read_timeout: self.redis_read_timeout.map(config::fields::Int::get),
                    sentinel_username: self.sentinel_username.as_deref(),
                    sentinel_password: self.sentinel_password.as_ref(),
                }
                .settings()
            }
        }
    };
}
pub(crate) use with_redis;

/// The settings of Redis as a plugin has them.
pub(crate) struct Fields<'a> {
    pub policy: Policy,
    pub host: Option<&'a str>,
    pub port: Option<u32>,
    pub username: Option<&'a str>,
    pub password: Option<&'a Sensitive<0>>,
    pub database: Option<u32>,
    pub timeout: Option<u32>,
    pub ssl: [bool; 2],
    pub nodes: Option<&'a [WideText<2, 100>]>,
    pub cluster_name: Option<&'a str>,
    pub cluster_ssl: [bool; 2],
    pub idle: Option<u32>,
    pub sentinels: Option<&'a [SentinelAddress]>,
    pub master: Option<&'a str>,
    pub role: Option<Role>,
    pub read_timeout: Option<u32>,
    pub sentinel_username: Option<&'a str>,
    pub sentinel_password: Option<&'a Sensitive<0>>,
}

impl Fields<'_> {
    pub(crate) fn settings(self) -> Result<Option<Settings>, ConfigError> {
        let missing =
            |field: &str| ConfigError::new("", config::ErrorKind::MissingField { field: field.into() });
        // As APISIX, whose sentinels alone take less.
        if self.policy != Policy::RedisSentinel && self.idle.is_some_and(|idle| idle < 1000) {
            return Err(ConfigError::invalid("/redis_keepalive_timeout", "write a number from 1000"));
        }
        let mut timeout = self.timeout;
        let (servers, [ssl, verify]) = match self.policy {
            Policy::Local => return Ok(None),
            Policy::Redis => {
                let host = self.host.ok_or_else(|| missing("redis_host"))?;
                let port = self.port.and_then(|port| u16::try_from(port).ok()).unwrap_or(6379);
                (Servers::One(host.to_owned(), port), self.ssl)
            }
            Policy::RedisCluster => {
                self.cluster_name.ok_or_else(|| missing("redis_cluster_name"))?;
                let nodes = self.nodes.ok_or_else(|| missing("redis_cluster_nodes"))?;
                if nodes.is_empty() {
                    return Err(super::limiting::at_least_one("/redis_cluster_nodes"));
                }
                let nodes = nodes.iter().enumerate().map(|(index, node)| {
                    address(node).ok_or_else(|| {
                        ConfigError::invalid(
                            format!("/redis_cluster_nodes/{index}"),
                            format!("`{}` is no address: write `host:port`", &**node),
                        )
                    })
                });
                (Servers::Cluster(nodes.collect::<Result<_, _>>()?), self.cluster_ssl)
            }
            Policy::RedisSentinel => {
                timeout = self.read_timeout;
                let sentinels = self.sentinels.ok_or_else(|| missing("redis_sentinels"))?;
                if sentinels.is_empty() {
                    return Err(super::limiting::at_least_one("/redis_sentinels"));
                }
                if self.role == Some(Role::Slave) {
                    let problem = "counting is writing, and replicas take no writes: write `master`";
                    return Err(ConfigError::invalid("/redis_role", problem));
                }
                let address = |SentinelAddress { host, port }: &SentinelAddress| {
                    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                    Some((host, u16::try_from(port.get()).ok()?))
                };
                let sentinels = Sentinels {
                    addresses: sentinels.iter().filter_map(address).collect(),
                    master: self.master.ok_or_else(|| missing("redis_master_name"))?.to_owned(),
                    username: self.sentinel_username.filter(|name| !name.is_empty()).map(str::to_owned),
                    password: self.sentinel_password.cloned(),
                };
                (Servers::Sentinels(sentinels), [false; 2])
            }
        };
        let one = !matches!(servers, Servers::Cluster(_));
        Ok(Some(Settings {
            servers,
            username: self.username.filter(|_| one).map(str::to_owned),
            password: self.password.cloned(),
            database: self.database.filter(|_| one).unwrap_or(0),
            timeout: Duration::from_millis(u64::from(timeout.unwrap_or(1000))),
            tls: Tls::of(ssl, verify),
        }))
    }
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

/// A Redis server, a cluster, or a master that is watched.
#[derive(Debug)]
pub struct Redis {
    servers: Connected,
    timeout: Duration,
}

#[derive(Debug)]
enum Connected {
    One(Node),
    Cluster(Cluster),
    Sentinel(Sentinel),
}

impl Redis {
    /// The connection that these settings name. Plugins with the same settings share it, also over reloads.
    ///
    /// # Errors
    /// The settings cannot work. That Redis cannot be reached is none: commands say so.
    pub fn open(settings: &Settings, env: &BuildEnv<'_>) -> Result<Arc<Self>, ConfigError> {
        let Settings { servers, username, password, database, timeout, tls } = settings;
        let seeds = match servers {
            Servers::One(host, port) => &[(host.clone(), *port)][..],
            Servers::Cluster(nodes) => nodes,
            Servers::Sentinels(sentinels) => &sentinels.addresses,
        };
        for (host, port) in seeds {
            node::client(settings, host, *port)
                .map_err(|error| ConfigError::invalid("", error.to_string()))?;
        }
        let secret = |password: &Option<Sensitive<0>>| {
            password.as_ref().map(|password| Sha1::digest(password.reveal().as_bytes()))
        };
        let secrets = match servers {
            Servers::Sentinels(sentinels) => [secret(password), secret(&sentinels.password)],
            Servers::One(..) | Servers::Cluster(_) => [secret(password), None],
        };
        let name = format!("redis {servers:?} {username:?} {secrets:?} {database} {timeout:?} {tls:?}");
        Ok(env.carry.get_or(&name, || Self {
            servers: match servers {
                Servers::One(host, port) => Connected::One(Node::start(settings, host, *port, env.control)),
                Servers::Cluster(_) => Connected::Cluster(Cluster::start(settings, env.control)),
                Servers::Sentinels(sentinels) => {
                    Connected::Sentinel(Sentinel::start(settings, sentinels, env.control))
                }
            },
            timeout: *timeout,
        }))
    }

    /// When a request that begins now has to have its answers.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Sends a command, of a cluster to the node of its first key. It may be carried out twice if the connection breaks
    /// in the midst of it, and it may be carried out although this fails.
    ///
    /// # Errors
    /// There is no answer, or it is an error, or of another type.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Failure> {
        let value = self.send(command, self.deadline()).await?;
        redis::from_redis_value(value).map_err(|error| Failure::Refused(error.into()))
    }

    /// Runs a script, all of it at once as Redis does. One request may run several with one deadline.
    ///
    /// # Errors
    /// As for [`query`](Self::query).
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &Script,
        keys: &[impl ToRedisArgs],
        arguments: &[impl ToRedisArgs],
        deadline: Instant,
    ) -> Result<T, Failure> {
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
        match &self.servers {
            Connected::One(node) => node.send(command, deadline).await,
            Connected::Cluster(cluster) => cluster.send(command, deadline).await,
            Connected::Sentinel(sentinel) => sentinel.send(command, deadline).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use layers::testing::TestEnv;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio::sync::watch;
    use tokio::task::JoinSet;
    use tokio::time::{sleep, timeout};

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
            assert_eq!(redis.run::<u64>(&script, &["k"], &[1], redis.deadline()).await.unwrap(), 7);
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
        assert!(started.elapsed() < Duration::from_secs(5));
        // Then nobody waits any more.
        let down = async { while !matches!(asks(&redis).await, Err(Failure::Unreachable(_))) {} };
        timeout(Duration::from_secs(8), down).await.unwrap();
        let started = Instant::now();
        for _ in 0..100 {
            assert!(asks(&redis).await.is_err());
        }
        assert!(
            started.elapsed() < Duration::from_secs(4),
            "not the time-out of each: {:?}",
            started.elapsed()
        );
        fake.mood.send_replace(Mood::default());
        assert!(up(&redis).await, "it is found again");
    }

    #[tokio::test]
    async fn where_nobody_listens_commands_fail_at_once() {
        // Bound, so that nobody else gets the port.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let free = socket.local_addr().unwrap();
        let (mood, _) = watch::channel(Mood::default());
        let nobody = Fake { address: free, asked: Arc::default(), mood };
        let redis = nobody.redis(5_000);
        let started = Instant::now();
        assert!(matches!(asks(&redis).await, Err(Failure::Unreachable(_))));
        assert!(started.elapsed() < Duration::from_secs(2));
    }
}
