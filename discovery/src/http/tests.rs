#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::*;

const LONG: Duration = Duration::from_secs(10);

/// A server that gives its n-th answer to the n-th question and then ends the connection or not.
struct Fake {
    url: String,
    asked: mpsc::UnboundedReceiver<String>,
}

/// What a fake does with a question: bytes to send, whether it hangs afterwards (otherwise it reads on), whether it closes.
#[derive(Clone, Copy)]
enum Move {
    Answer(&'static str),
    AnswerAndClose(&'static str),
    AnswerAndHang(&'static str),
}

async fn fake(moves: &'static [Move]) -> Fake {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tell, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut moves = moves.iter().copied();
        let mut connections = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            connections += 1;
            loop {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                if head.is_empty() {
                    break;
                }
                let _ = tell.send(format!("{connections} {}", String::from_utf8(head).unwrap()));
                let (text, then) = match moves.next() {
                    Some(Move::Answer(text)) => (text, 0),
                    Some(Move::AnswerAndClose(text)) => (text, 1),
                    Some(Move::AnswerAndHang(text)) => (text, 2),
                    None => return,
                };
                let _ = stream.write_all(text.as_bytes()).await;
                match then {
                    0 => {}
                    1 => break,
                    _ => std::future::pending().await,
                }
            }
        }
    });
    Fake { url, asked }
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_connection_is_kept_and_opened_again_when_it_has_ended() {
    let mut fake = fake(&[Move::Answer(OK), Move::AnswerAndClose(OK), Move::Answer(OK)]).await;
    let server = Server::new(&format!("{}/base/", fake.url), Options::default()).unwrap();
    let mut connection = server.connection();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let answer = connection.ask(&Question::get("/a?b=c%20d", LONG)).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (StatusCode::OK, &b"ok"[..]));
        seen.push(fake.asked.recv().await.unwrap());
        // The end of a connection arrives when it arrives.
        while seen.len() == 2 && connection.kept.as_ref().is_some_and(|kept| !kept.sender.is_closed()) {
            tokio::task::yield_now().await;
        }
    }
    let firsts: Vec<_> = seen.iter().map(|head| head.lines().next().unwrap()).collect();
    let line = "GET /base/a?b=c%20d HTTP/1.1";
    assert_eq!(firsts, [format!("1 {line}"), format!("1 {line}"), format!("2 {line}")]);
}

#[tokio::test]
async fn an_end_between_two_questions_is_told() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let answers = async || {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(OK.as_bytes()).await.unwrap();
        stream
    };
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut connection = Server::new(&url, Options::default()).unwrap().connection();
    let question = Question::get("/", LONG);
    let (first, stream) = tokio::join!(connection.ask(&question), answers());
    assert!(first.is_ok() && !connection.was_ended());
    drop(stream);
    while connection.kept.as_ref().is_some_and(|kept| !kept.sender.is_closed()) {
        tokio::task::yield_now().await;
    }
    let (second, _stream) = tokio::join!(connection.ask(&question), answers());
    assert!(second.is_ok() && connection.was_ended());
}

#[tokio::test]
async fn an_end_that_was_announced_says_nothing_about_the_server() {
    for text in [
        "HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ] {
        let moves: &'static [Move] = Box::leak(Box::new([Move::AnswerAndClose(text), Move::Answer(OK)]));
        let fake = fake(moves).await;
        let mut connection = Server::new(&fake.url, Options::default()).unwrap().connection();
        for _ in 0..2 {
            connection.ask(&Question::get("/", LONG)).await.unwrap();
            assert!(!connection.was_ended(), "{text}");
        }
    }
}

#[tokio::test]
async fn one_deadline_covers_head_and_body() {
    for text in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"] {
        let moves: &'static [Move] = Box::leak(Box::new([Move::AnswerAndHang(text)]));
        let fake = fake(moves).await;
        let server = Server::new(&fake.url, Options::default()).unwrap();
        let mut connection = server.connection();
        let error = connection.ask(&Question::get("/", Duration::from_millis(100))).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{}: no answer within 100ms", fake.url), "{text}");
        assert!(connection.kept.is_none(), "a connection with half an answer is not used again");
    }
}

#[tokio::test]
async fn what_is_cut_too_large_or_not_http_is_an_error_with_the_address() {
    let cases: [(&'static str, &str); 4] = [
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", "end of file before message"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n123456789", "larger than 8 bytes"),
        ("HTTP/1.1 200 OK\r\n\r\n123456789", "larger than 8 bytes"),
        ("220 mail.example ESMTP\r\n\r\n", "invalid HTTP"),
    ];
    for (text, expected) in cases {
        let moves: &'static [Move] = Box::leak(Box::new([Move::AnswerAndClose(text)]));
        let fake = fake(moves).await;
        let options = Options { max_body: 8, ..Options::default() };
        let server = Server::new(&fake.url, options).unwrap();
        let error = server.connection().ask(&Question::get("/", LONG)).await.unwrap_err().to_string();
        assert!(error.starts_with(&fake.url) && error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_secret_is_read_again_and_the_one_before_stays_while_the_file_is_away() {
    let mut fake = fake(&[Move::Answer(OK), Move::Answer(OK), Move::Answer(OK), Move::Answer(OK)]).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"first\n").unwrap();
    let secret = SecretFile {
        field: HeaderName::from_static("x-consul-token"),
        scheme: "",
        path: file.path().to_owned(),
    };
    let options = Options { secret: Some(secret), ..Options::default() };
    let server = Server::new(&fake.url, options).unwrap();
    let mut connection = server.connection();
    let mut told = async |connection: &mut Connection| {
        if let Some((since, _)) = &mut *server.secret.lock().await {
            *since -= SHARED;
        }
        connection.ask(&Question::get("/", LONG)).await.unwrap();
        let head = fake.asked.recv().await.unwrap();
        head.lines().find_map(|line| line.strip_prefix("x-consul-token: ")).unwrap().to_owned()
    };
    assert_eq!(told(&mut connection).await, "first");
    std::fs::write(file.path(), "second").unwrap();
    assert_eq!(told(&mut connection).await, "second");
    // Whoever writes a token empties the file first.
    std::fs::write(file.path(), "\n").unwrap();
    assert_eq!(told(&mut connection).await, "second");
    file.close().unwrap();
    assert_eq!(told(&mut connection).await, "second");
}

#[tokio::test]
async fn credentials_of_the_url_are_sent_and_never_told() {
    let mut fake =
        fake(&[Move::Answer("HTTP/1.1 503 Busy\r\nretry-after: 7\r\ncontent-length: 5\r\n\r\nbusy\n")]).await;
    let url = fake.url.replace("http://", "http://nacos:p%40ss@");
    let server = Server::new(&url, Options::default()).unwrap();
    let answer = server.connection().ask(&Question::get("/", LONG)).await.unwrap();
    let head = fake.asked.recv().await.unwrap();
    assert!(head.contains(&format!("authorization: Basic {}", STANDARD.encode("nacos:p@ss"))), "{head}");
    let refusal = answer.refusal(&server);
    assert_eq!(&*refusal.reason, format!("{} answered 503 Service Unavailable: busy", fake.url));
    assert_eq!(refusal.retry_after, Some(Duration::from_secs(7)));
    assert!(!format!("{server:?}").contains("p%40ss"));
}

#[test]
fn urls_of_another_form_are_refused_without_their_credentials() {
    for url in ["", "127.0.0.1:8500", "ftp://a:1", "http://", "http://a:1?b=c", "http://u:secret@a:1?b"] {
        let error = Server::new(url, Options::default()).unwrap_err();
        assert!(error.contains("is not a URL of the form") && !error.contains("secret"), "{error}");
    }
}
