//! Keeps the exact bytes of each request and answers with exact bytes.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Origin;
use crate::eventually;

/// What a recorder has got, one entry per connection.
#[derive(Clone, Debug, Default)]
pub struct Records(Arc<Mutex<Vec<Vec<u8>>>>);

impl Records {
    /// The bytes of every connection so far.
    pub fn all(&self) -> Vec<Vec<u8>> {
        self.0.lock().expect("the records").clone()
    }

    /// All bytes of all connections as text.
    pub fn text(&self) -> String {
        self.all().iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    /// Waits until something containing `mark` has arrived and gives everything.
    pub async fn wait_for(&self, mark: &str) -> String {
        eventually(&format!("the origin gets {mark:?}"), || async {
            let text = self.text();
            text.contains(mark).then_some(text)
        })
        .await
    }
}

/// Answers each request head (a body is taken along as it comes) with `answer`.
pub async fn start(answer: impl Into<Bytes>) -> (Origin, Records) {
    let answer = answer.into();
    let records = Records::default();
    let shared = records.clone();
    let origin = Origin::tcp(move |mut stream, seen| {
        let (answer, records) = (answer.clone(), shared.clone());
        async move {
            let index = {
                let mut all = records.0.lock().expect("the records");
                all.push(Vec::new());
                all.len() - 1
            };
            let mut answered = 0;
            let mut buffer = [0; 16 * 1024];
            while let Ok(count) = stream.read(&mut buffer).await {
                if count == 0 {
                    return;
                }
                let heads = {
                    let mut all = records.0.lock().expect("the records");
                    all[index].extend_from_slice(&buffer[..count]);
                    all[index].windows(4).filter(|window| window == b"\r\n\r\n").count()
                };
                while answered < heads {
                    answered += 1;
                    seen.request();
                    if stream.write_all(&answer).await.is_err() {
                        return;
                    }
                }
            }
        }
    })
    .await;
    (origin, records)
}

/// A recorder that answers `200` with an empty body.
pub async fn ok() -> (Origin, Records) {
    start("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await
}
