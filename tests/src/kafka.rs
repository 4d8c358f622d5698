//! A broker of Kafka that is not ours, and somebody who reads a topic there.
//!
//! Debian has no broker. It has kcat, whose library has a cluster of brokers inside, for tests, which speaks the protocol
//! as they do; it knows no users. Where `POSTERN_TEST_KAFKA` has the `host:port` of a real broker, that one is used, with
//! `POSTERN_TEST_KAFKA_SASL` as `mechanism:user:password` where it asks for a user.

use std::path::Path;

use regex::Regex;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::eventually;
use crate::process::Process;

/// A topic, and its reader.
#[derive(Debug)]
pub struct Kafka {
    folder: TempDir,
    address: String,
    sasl: Option<[String; 3]>,
    /// A topic of this test alone.
    pub topic: String,
    _reader: Process,
}

impl Kafka {
    /// Begins to read a new topic, of the broker of the environment or of one that is started.
    pub async fn start() -> Kafka {
        let folder = tempfile::tempdir().expect("a folder");
        let topic = format!("postern-{:08x}", fastrand::u32(..));
        let given = std::env::var("POSTERN_TEST_KAFKA").ok();
        let sasl = std::env::var("POSTERN_TEST_KAFKA_SASL").ok().map(|sasl| {
            let mut parts = sasl.splitn(3, ':').map(str::to_owned);
            [(); 3].map(|()| parts.next().expect("POSTERN_TEST_KAFKA_SASL is mechanism:user:password"))
        });
        let mut args = vec!["-C", "-u", "-q", "-t", &topic, "-o", "beginning", "-f", "%k %s\\n"];
        args.extend(["-X", "allow.auto.create.topics=true", "-X", "topic.metadata.refresh.interval.ms=200"]);
        let user = sasl.as_ref().map_or(Vec::new(), |[mechanism, user, password]| {
            vec![
                "security.protocol=SASL_PLAINTEXT".to_owned(),
                format!("sasl.mechanisms={mechanism}"),
                format!("sasl.username={user}"),
                format!("sasl.password={password}"),
            ]
        });
        match &given {
            Some(address) => args.extend(["-b", address]),
            None => args.extend(["-b", "own", "-X", "test.mock.num.brokers=2", "-d", "mock"]),
        }
        args.extend(user.iter().flat_map(|option| ["-X", option.as_str()]));
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        // Messages have a file of their own: what the library tells of itself would fall between their parts.
        let read = ["-c", "exec kcat \"$@\" > messages", "kcat"].map(str::to_owned);
        let args = [&read[..], &args].concat();
        let reader =
            Process::start(Path::new("sh"), &args, &[], folder.path(), &folder.path().join("output"));
        let output = folder.path().join("output");
        let address = match given {
            Some(address) => address,
            None => {
                let told = Regex::new("bootstrap.servers=([^ ,]+)").expect("a pattern");
                eventually("kcat tells its broker", || async {
                    let text = std::fs::read_to_string(&output).ok()?;
                    Some(told.captures(&text)?[1].to_owned())
                })
                .await
            }
        };
        Kafka { folder, address, sasl, topic, _reader: reader }
    }

    /// The settings of a plugin that logs here.
    pub fn settings(&self) -> Value {
        let (host, port) = self.address.rsplit_once(':').expect("host:port");
        let mut broker = json!({"host": host, "port": port.parse::<u16>().expect("a port")});
        if let Some([mechanism, user, password]) = &self.sasl {
            broker["sasl_config"] = json!({"mechanism": mechanism, "user": user, "password": password});
        }
        json!({"brokers": [broker], "kafka_topic": self.topic})
    }

    /// What was read so far: a line for each message, key and value. One that is still being written is not told.
    pub fn messages(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.path().join("messages")).unwrap_or_default();
        text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect()
    }
}
