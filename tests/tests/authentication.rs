//! Authentication over real sockets, against credentials that other code made: tokens and signatures by openssl.
//!
//! What the plugins answer, case by case, is told by `tests/compat`.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use e2e::client::{Call, Raw};
use e2e::origin::echo;
use e2e::{Edge, Value, eventually, json};
use tempfile::TempDir;

/// What `openssl` writes when it gets `input`.
fn openssl(args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl");
    child.stdin.take().expect("a pipe").write_all(input).expect("an input");
    let output = child.wait_with_output().expect("an end");
    assert!(output.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A key pair that openssl made.
struct Pair {
    folder: TempDir,
    public: String,
}

impl Pair {
    fn new(args: &[&str]) -> Pair {
        let folder = tempfile::tempdir().expect("a folder");
        let private = openssl(&[&["genpkey"], args].concat(), b"");
        std::fs::write(folder.path().join("private.pem"), &private).expect("a file");
        let public = String::from_utf8(openssl(&["pkey", "-pubout"], &private)).expect("PEM");
        Pair { folder, public }
    }

    fn rsa(bits: &str) -> Pair {
        Pair::new(&["-algorithm", "RSA", "-pkeyopt", bits])
    }

    fn on(curve: &str) -> Pair {
        Pair::new(&["-algorithm", "EC", "-pkeyopt", &format!("ec_paramgen_curve:{curve}")])
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The signature that a token carries.
    fn sign(&self, algorithm: &str, signed: &[u8]) -> Vec<u8> {
        let private = self.path("private.pem");
        let digest = format!("-sha{}", algorithm.trim_start_matches(|c: char| c.is_ascii_alphabetic()));
        let plain = ["dgst", &digest, "-sign", &private];
        match algorithm {
            "RS256" | "RS384" | "RS512" => openssl(&plain, signed),
            "PS256" | "PS384" | "PS512" => {
                let pss = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"];
                openssl(&[&plain[..], &pss].concat(), signed)
            }
            "ES256" => fixed(&openssl(&plain, signed), 32),
            "ES384" => fixed(&openssl(&plain, signed), 48),
            "ES512" => fixed(&openssl(&plain, signed), 66),
            "EdDSA" => {
                let file = self.path("signed");
                std::fs::write(&file, signed).expect("a file");
                openssl(&["pkeyutl", "-sign", "-inkey", &private, "-rawin", "-in", &file], b"")
            }
            _ => panic!("{algorithm}"),
        }
    }
}

/// The two numbers of an ECDSA signature in DER, one behind the other, each `size` bytes long.
fn fixed(der: &[u8], size: usize) -> Vec<u8> {
    let start = if der[1] & 0x80 == 0 { 2 } else { 3 };
    let mut rest = &der[start..];
    let mut numbers = Vec::new();
    for _ in 0..2 {
        assert_eq!(rest[0], 2, "an INTEGER");
        let (number, after) = rest[2..].split_at(usize::from(rest[1]));
        let digits = number.iter().skip_while(|byte| **byte == 0).copied().collect::<Vec<_>>();
        numbers.extend(vec![0; size - digits.len()]);
        numbers.extend(digits);
        rest = after;
    }
    numbers
}

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// A token whose signature is what `sign` makes of its text.
fn token(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", part(header), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// HMAC by openssl, of a secret of any bytes.
fn hmac(digest: &str, secret: &[u8], text: &[u8]) -> Vec<u8> {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    openssl(&["dgst", digest, "-mac", "HMAC", "-macopt", &format!("hexkey:{hex}"), "-binary"], text)
}

async fn status(edge: &Edge, token: &str) -> u16 {
    edge.send(Call::get("/").header("authorization", &format!("Bearer {token}"))).await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_openssl_signs_by_every_algorithm_are_taken() {
    const SECRET: &str = "a secret \u{e9}";
    let (rsa, long) = (Pair::rsa("rsa_keygen_bits:2048"), Pair::rsa("rsa_keygen_bits:4608"));
    let (p256, p384, p521) = (Pair::on("P-256"), Pair::on("P-384"), Pair::on("P-521"));
    let ed25519 = Pair::new(&["-algorithm", "ED25519"]);
    let pairs = [
        ("RS256", &rsa),
        ("RS384", &rsa),
        ("RS512", &long),
        ("PS256", &rsa),
        ("PS384", &long),
        ("PS512", &rsa),
        ("ES256", &p256),
        ("ES384", &p384),
        ("ES512", &p521),
        ("EdDSA", &ed25519),
    ];
    let shared = [("HS256", "-sha256"), ("HS384", "-sha384"), ("HS512", "-sha512")];
    let origin = echo::start().await;
    let mut builder = Edge::file()
        .route(json!({"id": "1", "uri": "/*", "plugins": {"jwt-auth": {}}, "upstream": origin.upstream()}));
    let mut consumer = |algorithm: &str, material: Value| {
        let mut settings = json!({"key": algorithm, "algorithm": algorithm});
        settings.as_object_mut().expect("an object").extend(material.as_object().expect("an object").clone());
        let taken = std::mem::replace(&mut builder, Edge::file());
        builder =
            taken.resource("consumers", json!({"username": algorithm, "plugins": {"jwt-auth": settings}}));
    };
    for (algorithm, pair) in pairs {
        consumer(algorithm, json!({"public_key": pair.public}));
    }
    for (algorithm, _) in shared {
        consumer(algorithm, json!({"secret": SECRET}));
    }
    let edge = builder.start().await;

    let algorithms = pairs.iter().map(|(algorithm, _)| *algorithm).chain(shared.iter().map(|(a, _)| *a));
    let sign = |algorithm: &str, signed: &[u8]| match shared.iter().find(|(name, _)| *name == algorithm) {
        Some((_, digest)) => hmac(digest, SECRET.as_bytes(), signed),
        None => pairs.iter().find(|(name, _)| *name == algorithm).expect("a pair").1.sign(algorithm, signed),
    };
    for algorithm in algorithms {
        let (header, claims) = (json!({"alg": algorithm, "typ": "JWT"}), json!({"key": algorithm}));
        let good = token(&header, &claims, |signed| sign(algorithm, signed));
        let answer = edge.send(Call::get("/").header("authorization", &good)).await.expect_status(200).json();
        assert_eq!(answer["headers"]["x-consumer-username"], json!([algorithm]), "{algorithm}");
        let (signed, signature) = good.rsplit_once('.').expect("a signature");
        let (head, _) = signed.split_once('.').expect("a header");
        let forged = format!("{head}.{}.{signature}", part(&json!({"key": algorithm, "admin": true})));
        assert_eq!(status(&edge, &forged).await, 401, "{algorithm}: other claims");
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
        bytes[0] ^= 1;
        let flipped = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(&bytes));
        assert_eq!(status(&edge, &flipped).await, 401, "{algorithm}: another signature");
        assert_eq!(status(&edge, &format!("{signed}.")).await, 401, "{algorithm}: no signature");
    }
    // The right key, another algorithm of the same family.
    for (key, by) in [("RS256", "PS256"), ("RS256", "RS384"), ("PS256", "RS256"), ("PS256", "PS512")] {
        let crossed = token(&json!({"alg": by}), &json!({"key": key}), |signed| rsa.sign(by, signed));
        assert_eq!(status(&edge, &crossed).await, 401, "{by} where {key} is asked for");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_tokens_are_refused_and_tell_nothing() {
    const SECRET: &str = "very-secret-word";
    let rsa = Pair::rsa("rsa_keygen_bits:2048");
    let own = Pair::rsa("rsa_keygen_bits:2048");
    let origin = echo::start().await;
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/*", "plugins": {"jwt-auth": {}}, "upstream": origin.upstream()}))
        .resource(
            "consumers",
            json!({"username": "hs", "plugins": {"jwt-auth": {"key": "hs", "secret": SECRET}}}),
        )
        .resource(
            "consumers",
            json!({"username": "rs", "plugins": {"jwt-auth":
            {"key": "rs", "algorithm": "RS256", "public_key": rsa.public}}}),
        )
        .env("POSTERN_LOG", "trace,notify=off")
        .start()
        .await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let hs = |header: Value, claims: Value| {
        token(&header, &claims, |signed| hmac("-sha256", SECRET.as_bytes(), signed))
    };
    let plain = json!({"alg": "HS256"});
    assert_eq!(status(&edge, &hs(plain.clone(), json!({"key": "hs"}))).await, 200);
    assert_eq!(
        status(&edge, &hs(plain.clone(), json!({"key": "hs", "exp": now + 60, "nbf": now - 60}))).await,
        200
    );

    let mut forged: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, token: String| forged.push((name.to_owned(), token));
    for alg in ["none", "None", "NONE", "nOnE", "", " none", "HS256 ", "hs256", "null"] {
        for signature in [&b""[..], b"x"] {
            add(
                &format!("alg {alg:?}"),
                token(&json!({"alg": alg}), &json!({"key": "rs"}), |_| signature.to_vec()),
            );
        }
    }
    let trimmed = rsa.public.trim_end();
    let der = STANDARD.decode(trimmed.lines().filter(|line| !line.starts_with('-')).collect::<String>());
    let der = der.expect("base64");
    for public in [rsa.public.as_bytes(), trimmed.as_bytes(), trimmed.replace('\n', "\r\n").as_bytes(), &der]
    {
        for alg in ["HS256", "RS256"] {
            let claims = json!({"key": "rs"});
            add(
                "a public key as a secret",
                token(&json!({"alg": alg}), &claims, |s| hmac("-sha256", public, s)),
            );
        }
    }
    let jwk = json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"});
    for extra in [
        json!({"jwk": jwk}),
        json!({"jku": "http://127.0.0.1/keys"}),
        json!({"x5u": "http://127.0.0.1/cert"}),
        json!({"x5c": [trimmed]}),
        json!({"kid": "../../../../dev/null"}),
        json!({"kid": "' OR 1=1 --"}),
    ] {
        let mut header = json!({"alg": "RS256"});
        header.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        add("a key of its own", token(&header, &json!({"key": "rs"}), |signed| own.sign("RS256", signed)));
    }
    for header in [
        json!({"alg": "HS256", "crit": ["exp"]}),
        json!({"alg": "HS256", "crit": []}),
        json!({"alg": "HS256", "b64": false}),
        json!({"alg": "HS256", "b64": false, "crit": ["b64"]}),
        json!({"alg": ["HS256"]}),
        json!({"alg": {"HS256": 1}}),
        json!({"alg": null}),
        json!({"typ": "JWT"}),
        json!({"alg": "HS384"}),
    ] {
        add(&header.to_string(), hs(header.clone(), json!({"key": "hs"})));
    }
    for claims in [
        json!({"key": "hs", "exp": 0}),
        json!({"key": "hs", "exp": -1}),
        json!({"key": "hs", "exp": now - 1}),
        json!({"key": "hs", "exp": (now + 60).to_string()}),
        json!({"key": "hs", "exp": null}),
        json!({"key": "hs", "exp": [now + 60]}),
        json!({"key": "hs", "nbf": now + 60}),
        json!({"key": "hs", "nbf": "0"}),
        json!({"key": ["hs"]}),
        json!({"key": {"hs": 1}}),
        json!({"key": null}),
        json!({"key": "HS"}),
        json!({"key": "rs"}),
        json!(["key", "hs"]),
        json!("hs"),
    ] {
        add(&claims.to_string(), hs(plain.clone(), claims.clone()));
    }
    let good = hs(plain, json!({"key": "hs"}));
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else { panic!("three parts") };
    for (name, text) in [
        ("padding", format!("{header}.{payload}.{signature}=")),
        ("a dot more", format!("{good}.")),
        ("a dot before", format!(".{good}")),
        ("a part more", format!("{good}.{signature}")),
        ("two parts", format!("{header}.{payload}")),
        ("only dots", "..".to_owned()),
        ("dots without end", ".".repeat(5000)),
        ("no header", format!(".{payload}.{signature}")),
        ("no claims", format!("{header}..{signature}")),
        ("a signature in hexadecimal", format!("{header}.{payload}.{}", "ab".repeat(32))),
        ("half a signature", format!("{header}.{payload}.{}", &signature[..20])),
        ("deep JSON", format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode("[".repeat(3000)))),
        ("Bearer twice", format!("Bearer {good}")),
    ] {
        add(name, text);
    }
    let mut connection = edge.connect().await;
    for (name, token) in &forged {
        let call = Call::get("/").header("authorization", &format!("Bearer {token}"));
        let answer = connection.send(call).await;
        assert_eq!(answer.status, 401, "{name}: {token}");
        assert!(!answer.text().contains(SECRET), "{name}");
    }

    assert_eq!(edge.get("/").await.status, 401);
    let output = edge.output();
    assert!(output.contains("TRACE") || output.contains("DEBUG"), "the log is at its finest");
    for secret in [SECRET, &good, signature] {
        assert!(!output.contains(secret), "a credential stands in the log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_do_not_get_into_the_log_nor_into_refusals_of_the_admin_api() {
    let origin = echo::start().await;
    let edge = Edge::embedded().env("POSTERN_LOG", "trace,notify=off").start().await;
    const PASSWORD: &str = "planted-password";
    const WRONG: &str = "planted-wrong-password";
    edge.put(
        "consumers/jack",
        json!({"username": "jack", "plugins":
        {"basic-auth": {"username": "jack", "password": PASSWORD}}}),
    )
    .await;
    edge.put("routes/1", json!({"uri": "/*", "plugins": {"basic-auth": {}}, "upstream": origin.upstream()}))
        .await;
    let basic = |password: &str| format!("Basic {}", STANDARD.encode(format!("jack:{password}")));
    let call = || Call::get("/").header("authorization", &basic(PASSWORD));
    eventually("the consumer is known", || async { (edge.send(call()).await.status == 200).then_some(()) })
        .await;
    assert_eq!(edge.send(Call::get("/").header("authorization", &basic(WRONG))).await.status, 401);

    const PEM: &str = "-----BEGIN PUBLIC KEY-----\nplanted\n-----END PUBLIC KEY-----";
    for (plugin, settings, told) in [
        ("basic-auth", json!({"username": "a:b", "password": PASSWORD}), "username"),
        ("basic-auth", json!({"username": "a", "password": [PASSWORD]}), "password"),
        ("jwt-auth", json!({"key": "a", "secret": PASSWORD, "base64_secret": true}), "secret"),
        (
            "jwt-auth",
            json!({"key": "a", "algorithm": "ES256", "secret": PASSWORD, "public_key": PEM}),
            "public_key",
        ),
        ("hmac-auth", json!({"key_id": "a", "secret_key": PASSWORD.repeat(30)}), "secret_key"),
        ("hmac-auth", json!({"key_id": "a", "secret_key": PASSWORD, "sceret": WRONG}), "sceret"),
    ] {
        let body = json!({"username": "jill", "plugins": {plugin: settings}});
        let answer = edge.call_admin("PUT", "consumers", Some(&body)).await.expect_status(400).text();
        assert!(answer.contains(plugin) && answer.contains(told), "{answer}");
        assert!(!answer.contains("planted"), "{answer}");
    }
    let output = edge.output();
    for secret in ["planted", STANDARD.encode(format!("jack:{PASSWORD}")).as_str()] {
        assert!(!output.contains(secret), "{secret} stands in the log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_body_whose_signature_is_wrong() {
    let origin = echo::start().await;
    let hmac_auth = json!({"validate_request_body": true, "max_req_body_size": 100_000});
    let edge = Edge::file()
        .route(json!({"id": "1", "uri": "/*", "upstream": origin.upstream(),
                      "plugins": {"hmac-auth": hmac_auth}}))
        .resource(
            "consumers",
            json!({"username": "ann", "plugins":
            {"hmac-auth": {"key_id": "id", "secret_key": "secret"}}}),
        )
        .start()
        .await;
    let date = String::from_utf8(
        Command::new("date")
            .env("LC_ALL", "C")
            .args(["-u", "+%a, %d %b %Y %H:%M:%S GMT"])
            .output()
            .expect("date")
            .stdout,
    );
    let date = date.expect("ASCII").trim().to_owned();
    let head = |digest: &str, key: &[u8], length: usize| {
        let signed = format!("id\nPOST /a?b=%41\ndate: {date}\ndigest: {digest}\n");
        let signature = STANDARD.encode(hmac("-sha256", key, signed.as_bytes()));
        format!(
            "POST /a?b=%41 HTTP/1.1\r\nHost: localhost\r\nDate: {date}\r\nDigest: {digest}\r\n\
             Authorization: Signature keyId=\"id\",algorithm=\"hmac-sha256\",\
             headers=\"@request-target date digest\",signature=\"{signature}\"\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let body = vec![b'x'; 90_000];
    let digest = format!("SHA-256={}", STANDARD.encode(openssl(&["dgst", "-sha256", "-binary"], &body)));

    let mut forged = Raw::connect(edge.http).await;
    forged.write(head(&digest, b"other", 90_000)).await;
    let answer =
        tokio::time::timeout(Duration::from_secs(10), forged.answer()).await.expect("no wait for the body");
    assert_eq!(answer.expect("an answer").status, 401);

    let mut right = Raw::connect(edge.http).await;
    right.write(head(&digest, b"secret", body.len())).await;
    right.write(&body).await;
    let answer = right.answer().await.expect("an answer").expect_status(200).json();
    assert_eq!(answer["headers"]["x-consumer-username"], json!(["ann"]));
    assert_eq!(answer["body"].as_str().map(str::len), Some(body.len()));

    let mut large = Raw::connect(edge.http).await;
    large.write(head(&digest, b"secret", 100_001)).await;
    large.write(vec![b'x'; 100_001]).await;
    assert_eq!(large.answer().await.expect("an answer").status, 413);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_calls_is_told_by_the_gateway_alone() {
    let origin = echo::start().await;
    let auth = json!({"auth_plugins": [{"basic-auth": {}}, {"key-auth": {"anonymous_consumer": "guest"}}]});
    let edge = Edge::file()
        .route(
            json!({"id": "1", "uri": "/*", "plugins": {"multi-auth": auth}, "upstream": origin.upstream()}),
        )
        .resource(
            "consumers",
            json!({"username": "ann", "plugins":
            {"basic-auth": {"username": "foo", "password": "bar"}}}),
        )
        .resource("consumers", json!({"username": "guest"}))
        .start()
        .await;
    let names =
        ["X-Consumer-Username", "X-Credential-Identifier", "X-Consumer-Custom-Id", "X-Consumer-Group-Id"];
    for name in names {
        for spelled in [name.to_owned(), name.replace('-', "_")] {
            for (authorization, consumer) in [("Basic Zm9vOmJhcg==", "ann"), ("Basic eDp5", "guest")] {
                let call = Call::get("/").header("authorization", authorization).header(&spelled, "boss");
                let seen = edge.send(call).await.expect_status(200).json();
                assert_eq!(seen["headers"]["x-consumer-username"], json!([consumer]), "{spelled}");
                assert!(!seen["headers"].to_string().contains("boss"), "{spelled}: {}", seen["headers"]);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_that_is_taken_away_is_refused_soon() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    edge.put("consumers/jack", json!({"username": "jack"})).await;
    edge.put(
        "consumers/jack/credentials/old",
        json!({"plugins": {"hmac-auth": {"key_id": "k", "secret_key": "s"}}}),
    )
    .await;
    edge.put(
        "consumers/jack/credentials/new",
        json!({"plugins": {"jwt-auth": {"key": "k", "secret": "one"}}}),
    )
    .await;
    edge.put("routes/1", json!({"uri": "/*", "plugins": {"jwt-auth": {}}, "upstream": origin.upstream()}))
        .await;
    let by = |secret: &str| {
        token(&json!({"alg": "HS256"}), &json!({"key": "k"}), |signed| {
            hmac("-sha256", secret.as_bytes(), signed)
        })
    };
    let (one, two) = (by("one"), by("two"));
    eventually("the credential is known", || async { (status(&edge, &one).await == 200).then_some(()) })
        .await;
    let seen = edge.send(Call::get("/").header("authorization", &one)).await.json();
    assert_eq!(seen["headers"]["x-credential-identifier"], json!(["new"]));
    edge.put(
        "consumers/jack/credentials/new",
        json!({"plugins": {"jwt-auth": {"key": "k", "secret": "two"}}}),
    )
    .await;
    eventually("the new secret holds", || async { (status(&edge, &two).await == 200).then_some(()) }).await;
    assert_eq!(status(&edge, &one).await, 401);
    edge.delete("consumers/jack/credentials/new").await;
    eventually("no secret holds", || async { (status(&edge, &two).await == 401).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_belongs_to_one_consumer() {
    let origin = echo::start().await;
    let edge = Edge::embedded().start().await;
    let basic = |user: &str| json!({"basic-auth": {"username": user, "password": "word"}});
    edge.put("consumers", json!({"username": "ann", "plugins": basic("foo")})).await;
    edge.put("consumers", json!({"username": "ben"})).await;
    edge.put("consumers/ben/credentials/c", json!({"plugins": basic("bar")})).await;
    edge.put("routes/1", json!({"uri": "/*", "plugins": {"basic-auth": {}}, "upstream": origin.upstream()}))
        .await;
    for user in ["foo", "bar"] {
        let call = || {
            Call::get("/")
                .header("authorization", &format!("Basic {}", STANDARD.encode(format!("{user}:word"))))
        };
        eventually("both are known", || async { (edge.send(call()).await.status == 200).then_some(()) })
            .await;
    }
    let with = |name: &str, user: &str| json!({"username": name, "plugins": basic(user)});
    for (path, body, status, other) in [
        ("consumers", with("ann", "foo"), 200, ""),
        ("consumers/ben/credentials/c", json!({"plugins": basic("bar")}), 200, ""),
        ("consumers", with("cat", "foo"), 400, "ann"),
        ("consumers", with("cat", "bar"), 400, "ben"),
        ("consumers", with("ben", "bar"), 400, "ben"),
        ("consumers/ben/credentials/d", json!({"plugins": basic("foo")}), 400, "ann"),
        ("consumers", with("cat", "baz"), 201, ""),
    ] {
        let answer = edge.call_admin("PUT", path, Some(&body)).await.expect_status(status);
        if status == 400 {
            let told = format!("duplicate key found with consumer: {other}");
            assert_eq!(answer.json(), json!({"error_msg": told}), "{path} {body}");
        }
    }
    // What was taken away a moment ago is free.
    edge.delete("consumers/ann").await;
    edge.call_admin("PUT", "consumers", Some(&with("dan", "foo"))).await.expect_status(201);
}
