#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::source::{Query, Source};
use crate::testing::Conduct;
use crate::testing::fake::{FakeRegistry, instance};
use crate::{Discovery, Endpoints, Freshness, Settings, Target, Watch};

fn discovery(registry: &FakeRegistry, dir: &TempDir) -> Discovery {
    let sources: Vec<Arc<dyn Source>> = vec![Arc::new(registry.clone())];
    let data_dir = Some(dir.path().to_owned());
    Discovery::new(Handle::current(), Settings { sources, data_dir, ..Settings::default() })
}

fn watch(discovery: &Discovery, service: &str) -> Watch {
    let query = Query { service: service.into(), args: BTreeMap::from([("a".into(), "b".into())]) };
    discovery.watch(&Target::service("upstreams/1", "fake", query))
}

async fn until(watch: &mut Watch, done: impl FnMut(&Arc<Endpoints>) -> bool) -> Arc<Endpoints> {
    let found = tokio::time::timeout(Duration::from_secs(10), watch.wait_for(done)).await;
    Arc::clone(&found.unwrap().unwrap())
}

fn files(dir: &TempDir) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir.path().join("discovery")) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

async fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_start_without_the_registry_serves_what_was_good() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), FakeRegistry::default());
    let service = "orders/../é two".replace(' ', "-");
    let mut one = instance("10.0.0.1:80", 7);
    one.details = Some(Arc::new(Details { zone: Some("z".into()), ..Details::default() }));
    registry.set(&service, vec![one, instance("10.0.0.2:80", 1)]);
    let first = discovery(&registry, &dir);
    let mut seen = watch(&first, &service);
    until(&mut seen, |now| now.list.len() == 2).await;
    eventually("it is written", || files(&dir).len() == 1).await;
    let file = files(&dir).remove(0);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(file.file_name().unwrap().to_str().unwrap().starts_with("fake.orders_____-two."), "{file:?}");
    drop((first, seen));

    // The registry is away: what was good serves, and is said to be stale.
    registry.conducts(Conduct::Errors);
    let second = discovery(&registry, &dir);
    let mut seen = watch(&second, &service);
    let endpoints = until(&mut seen, |now| now.list.len() == 2 && !now.failures.is_empty()).await;
    assert_eq!(endpoints.list[0].weight, 7);
    assert_eq!(endpoints.list[0].details.as_ref().unwrap().zone.as_deref(), Some("z"));
    assert!(endpoints.settled());
    assert!(matches!(second.services()[0].freshness, Freshness::Stale { .. }));
    // Another service is not that one.
    assert!(until(&mut watch(&second, "other"), |now| now.settled()).await.list.is_empty());

    // It is back, and its word counts.
    registry.set(&service, vec![instance("10.0.0.2:80", 1), instance("10.0.0.3:80", 1)]);
    registry.conducts(Conduct::Well);
    let endpoints = until(&mut seen, |now| now.failures.is_empty()).await;
    let addresses: Vec<String> = endpoints.list.iter().map(|one| one.addr.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.2:80", "10.0.0.3:80"]);
    // What has no instances needs no file.
    registry.set(&service, Vec::new());
    eventually("the file is gone", || files(&dir).is_empty()).await;
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_set_aside() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), FakeRegistry::default());
    registry.set("s", vec![instance("10.0.0.1:80", 1)]);
    let first = discovery(&registry, &dir);
    let mut seen = watch(&first, "s");
    until(&mut seen, |now| now.list.len() == 1).await;
    eventually("it is written", || files(&dir).len() == 1).await;
    let file = files(&dir).remove(0);
    let good = fs::read_to_string(&file).unwrap();
    drop((first, seen));
    registry.conducts(Conduct::Errors);
    for damaged in [
        good[..good.len() / 2].to_owned(),
        good.replace(r#""version":1"#, r#""version":99"#),
        good.replace(r#""service":"s""#, r#""service":"t""#),
        good.replace(r#""port":80"#, r#""port":80000"#),
        String::new(),
    ] {
        fs::write(&file, &damaged).unwrap();
        let discovery = discovery(&registry, &dir);
        let mut seen = watch(&discovery, "s");
        let endpoints = until(&mut seen, |now| now.settled()).await;
        assert!(endpoints.list.is_empty(), "{damaged}");
        assert!(!file.exists() && file.with_extension("damaged").exists(), "{damaged}");
    }
}
