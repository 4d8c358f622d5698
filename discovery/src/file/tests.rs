//! The suite of conduct over a file and over a folder.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::testing::{Able, Conduct, Registry, conduct};

struct Files {
    directory: TempDir,
    folder: bool,
    services: BTreeMap<String, BTreeMap<String, u32>>,
    behaves: bool,
}

impl Files {
    fn new(folder: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut files = Self { directory, folder, services: BTreeMap::new(), behaves: true };
        files.write();
        files
    }

    fn path(&self) -> PathBuf {
        if self.folder {
            self.directory.path().to_owned()
        } else {
            self.directory.path().join("services.json")
        }
    }

    /// Beside the file and moved over it, as whoever writes one should.
    fn put(&self, name: &str, text: &str) {
        let new = self.directory.path().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.directory.path().join(name)).unwrap();
    }

    fn write(&mut self) {
        let endpoint = |(address, weight): (&String, &u32)| {
            let (host, port) = address.rsplit_once(':').unwrap();
            json!({"host": host, "port": port.parse::<u16>().unwrap(), "weight": weight})
        };
        let list = |endpoints: &BTreeMap<String, u32>| endpoints.iter().map(endpoint).collect::<Vec<_>>();
        if self.folder {
            for (name, endpoints) in &self.services {
                self.put(&format!("{name}.json"), &json!(list(endpoints)).to_string());
            }
            return;
        }
        let services: BTreeMap<_, _> = self.services.iter().map(|(name, all)| (name, list(all))).collect();
        self.put("services.json", &json!(services).to_string());
    }

    fn spoil(&mut self, text: Option<&str>) -> Able {
        let name = if self.folder { "conduct.json" } else { "services.json" };
        self.behaves = false;
        match text {
            Some(text) => self.put(name, text),
            None if self.folder => {
                fs::rename(self.directory.path(), self.directory.path().with_extension("away")).unwrap()
            }
            None => fs::remove_file(self.directory.path().join(name)).unwrap(),
        }
        Able::Yes
    }
}

impl Registry for Files {
    fn source(&self) -> Arc<dyn Source> {
        let settings = json!({"path": self.path(), "interval": 0.05});
        Arc::new(File::new(&serde_json::from_value(settings).unwrap()))
    }

    fn service_name(&self, service: &str) -> String {
        service.to_owned()
    }

    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()> {
        self.services.entry(service.to_owned()).or_default().insert(address.to_owned(), weight);
        self.write();
        Box::pin(async {})
    }

    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()> {
        self.services.entry(service.to_owned()).or_default().remove(address);
        self.write();
        Box::pin(async {})
    }

    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able> {
        let able = match how {
            Conduct::Well => {
                let away = self.directory.path().with_extension("away");
                if away.exists() {
                    fs::rename(away, self.directory.path()).unwrap();
                }
                if !std::mem::replace(&mut self.behaves, true) {
                    self.write();
                }
                Able::Yes
            }
            // Away for as long as the suite looks, and back with what it knew.
            Conduct::Errors => self.spoil(None),
            Conduct::HalfBody => self.spoil(Some(r#"{"conduct": [{"host": "127.0.0.1", "po"#)),
            Conduct::Garbage => self.spoil(Some(r#"{"conduct": [{"host": "127.0.0.1", "prot": 1}]}"#)),
            // A file answers at once, and has no memory but itself.
            Conduct::SlowBody
            | Conduct::Silent
            | Conduct::Restarts
            | Conduct::RestartsEmpty
            | Conduct::Rewinds => Able::No,
        };
        Box::pin(async move { able })
    }

    fn wrong_name(&self) -> Option<String> {
        Some("../etc/passwd".to_owned())
    }
}

#[tokio::test]
async fn a_file_and_a_folder_conduct_themselves() {
    for folder in [false, true] {
        let report =
            conduct(&mut Files::new(folder)).await.unwrap_or_else(|broken| panic!("{folder}: {broken}"));
        assert!(report.ran.iter().any(|part| part == "Garbage"), "{report:?}");
        assert_eq!(report.skipped, ["SlowBody", "Silent", "Restarts", "Rewinds", "RestartsEmpty"]);
    }
}

#[tokio::test]
async fn everything_of_an_endpoint_is_read_and_what_is_wrong_has_a_place() {
    let files = Files::new(false);
    let mut watcher = files.source().open(&query("orders")).unwrap();
    let text = "orders:\n  - host: a.example\n    port: 80\n  - {host: '::1', port: 81, weight: 5, priority: -1, \
                health: draining, details: {zone: z, meta: {version: '2'}}}\n";
    files.put("services.json", "{}");
    assert_eq!(watcher.next().await.unwrap().instances, []);
    let mut settings = files.directory.path().join("services.yaml");
    fs::write(&settings, text).unwrap();
    let source = File::new(&serde_json::from_value(json!({"path": settings})).unwrap());
    let instances = source.open(&query("orders")).unwrap().next().await.unwrap().instances;
    let [first, second] = instances.as_slice() else { panic!("{instances:?}") };
    assert_eq!((&*first.id, first.node.weight, first.health), ("a.example:80", 1, Health::Healthy));
    assert_eq!((second.node.weight, second.node.priority, second.health), (5, -1, Health::Draining));
    let details = second.details.as_ref().unwrap();
    assert_eq!((details.zone.as_deref(), details.meta.get("version").map(|v| &**v)), (Some("z"), Some("2")));
    for (text, told) in [
        ("orders:\n  - host: a\n    prot: 80\n", "services.yaml:3:5: /orders/0/prot: unknown field"),
        ("orders: [{host: a, port: 99999}]\n", "services.yaml:1:"),
        ("orders: [\n", "services.yaml:"),
    ] {
        fs::write(&settings, text).unwrap();
        let error = source.open(&query("orders")).unwrap().next().await.unwrap_err();
        assert!(error.reason.contains(told), "{error}");
    }
    settings.set_extension("gone");
    let source = File::new(&serde_json::from_value(json!({"path": settings})).unwrap());
    assert!(source.open(&query("orders")).unwrap().next().await.is_err());
}

fn query(service: &str) -> Query {
    Query { service: service.into(), args: BTreeMap::new() }
}
