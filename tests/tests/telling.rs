//! What the gateway tells of itself and of requests: logs without what is hidden, the instance, its status.

use e2e::client::Call;
use e2e::origin::echo;
use e2e::{Edge, eventually, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_masked_is_not_in_the_access_log_and_reaches_the_upstream() {
    let origin = echo::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("access.log");
    let http = json!({
        "access_log": file,
        "access_log_format": "\"$request\" $request_uri $args $arg_token $upstream_uri \"$http_x_key\" $http_cookie.",
    });
    let mask = json!({"request": [
        {"type": "query", "name": "token", "action": "replace", "value": "*****"},
        {"type": "query", "name": "password", "action": "remove"},
        {"type": "header", "name": "X-Key", "action": "regex", "regex": "^(..).*", "value": "$1.."},
        {"type": "header", "name": "Cookie", "action": "remove"},
    ]});
    let edge = Edge::file()
        .config(json!({"nginx_config": {"http": http}}))
        .route(json!({"uri": "/*", "plugins": {"data-mask": mask}, "upstream": origin.upstream()}))
        .start()
        .await;
    let call = Call::get("/%61?token=secret1&password=secret2&a=1")
        .header("x-key", "12secret3")
        .header("cookie", "secret4=1");
    let got = edge.send(call).await.expect_status(200).json();
    assert_eq!(got["query"], "token=secret1&password=secret2&a=1");
    assert_eq!(got["headers"]["x-key"][0], "12secret3");
    let line = eventually("a line in the access log", || async {
        std::fs::read_to_string(&file).ok().filter(|text| text.contains('\n'))
    })
    .await;
    assert_eq!(
        line.trim(),
        "\"GET /%61?token=*****&a=1 HTTP/1.1\" /%61?token=*****&a=1 token=*****&a=1 ***** /a?token=*****&a=1 \"12..\" -."
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loggers_see_the_request_and_its_body_masked() {
    let origin = echo::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("entries.log");
    let plugins = json!({
        "file-logger": {"path": file, "include_req_body": true},
        "data-mask": {"request": [
            {"type": "query", "name": "token", "action": "replace", "value": "*****"},
            {"type": "header", "name": "Authorization", "action": "remove"},
            {"type": "body", "body_format": "json", "name": "$.password", "action": "remove"},
            {"type": "body", "body_format": "json", "name": "$.users[*].card", "action": "regex",
             "regex": "^(\\d+)-.*$", "value": "$1-****"},
        ]},
    });
    let edge = Edge::file()
        .route(json!({"uri": "/*", "plugins": plugins, "upstream": origin.upstream()}))
        .start()
        .await;
    let secret = json!({"password": "secret1", "users": [{"name": "ann", "card": "1234-secret2"}]});
    for body in [secret.to_string(), "{\"password\":\"secret3\"".to_owned()] {
        let call =
            Call::new("POST", "/a?token=secret4").header("authorization", "secret5").body(body.clone());
        let got = edge.send(call).await.expect_status(200).json();
        assert_eq!((&got["body"], &got["query"]), (&body.into(), &"token=secret4".into()));
    }
    let told = eventually("two entries", || async {
        std::fs::read_to_string(&file).ok().filter(|text| text.lines().count() == 2)
    })
    .await;
    assert!(!told.contains("secret"), "{told}");
    assert!(told.contains("token=*****") && told.contains("1234-****") && told.contains("ann"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_instance_tells_who_it_is_where_the_plugins_are_enabled() {
    let route = json!({"uri": "/apisix/status", "plugins": {"public-api": {}}});
    let edge = Edge::file().route(route.clone()).start().await;
    let info = edge.call_control("/v1/server_info").await.expect_status(200).json();
    let status = edge.get("/apisix/status").await.expect_status(200).json();
    assert_eq!(info["id"], status["id"]);
    assert!(info["boot_time"].as_u64().is_some_and(|time| time > 1_700_000_000), "{info}");
    assert_eq!(info["etcd_version"], "unknown");

    let few = json!({"plugins": ["public-api", "prometheus"], "apisix": {"id": "gw"}});
    let edge = Edge::file().config(few).route(route).start().await;
    edge.call_control("/v1/server_info").await.expect_status(404);
    edge.get("/apisix/status").await.expect_status(404);
}
