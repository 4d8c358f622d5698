//! A broker of Kafka as far as producers need one: a topic `logs` with two partitions, and SASL PLAIN.
//!
//! It knows one version of each call and keeps the values of records, each with its partition.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Origin;
use crate::sink::Arrived;

/// The user and the password that are let in where the broker asks.
pub const USER: (&str, &str) = ("jack", "secret-of-jack");

/// A broker. With `asks`, only [`USER`] may produce.
pub async fn start(arrived: Arrived, asks: bool) -> Origin {
    // Metadata names the address of the broker, which is known only when it listens.
    let address = Arc::new(std::sync::OnceLock::new());
    let known = address.clone();
    let origin = Origin::tcp(move |stream, seen| {
        let (arrived, known) = (arrived.clone(), known.clone());
        async move {
            let port = *known.get_or_init(|| stream.local_addr().expect("an address").port());
            let mut broker = Broker { stream, arrived, port, signed_in: !asks };
            while broker.call().await.is_some() {
                seen.request();
            }
        }
    })
    .await;
    let _ = address.set(origin.addr.port());
    origin
}

struct Broker {
    stream: TcpStream,
    arrived: Arrived,
    port: u16,
    signed_in: bool,
}

/// Reads what the protocol is made of.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn i16(&mut self) -> Option<i16> {
        Some(i16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn i32(&mut self) -> Option<i32> {
        Some(i32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.i16()?;
        let bytes = self.take(usize::try_from(length).unwrap_or(0))?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.i32()?;
        self.take(usize::try_from(length).unwrap_or(0))
    }

    /// A number in zigzag form.
    fn varint(&mut self) -> Option<i64> {
        let (mut number, mut shift) = (0_u64, 0);
        loop {
            let byte = *self.take(1)?.first()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some((number >> 1) as i64 ^ -((number & 1) as i64));
            }
            shift += 7;
        }
    }

    fn varbytes(&mut self) -> Option<Option<&'a [u8]>> {
        match self.varint()? {
            -1 => Some(None),
            length => Some(Some(self.take(usize::try_from(length).ok()?)?)),
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as i16).to_be_bytes());
    out.extend(text.as_bytes());
}

impl Broker {
    /// Answers one call; nothing when the connection is over.
    async fn call(&mut self) -> Option<()> {
        let length = self.stream.read_i32().await.ok()?;
        let mut frame = vec![0; usize::try_from(length).ok()?];
        self.stream.read_exact(&mut frame).await.ok()?;
        let mut reader = Reader(&frame);
        let (key, version, correlation) = (reader.i16()?, reader.i16()?, reader.i32()?);
        reader.text()?;
        let mut body = Vec::new();
        match key {
            0 => self.produce(&mut reader, &mut body)?,
            3 => self.metadata(&mut body),
            17 => sasl_handshake(&mut body),
            18 => versions(version, &mut body),
            36 => self.authenticate(&mut reader, &mut body)?,
            other => panic!("the broker of the test does not know call {other}"),
        }
        let mut answer = ((body.len() + 4) as i32).to_be_bytes().to_vec();
        answer.extend(correlation.to_be_bytes());
        answer.extend(body);
        self.stream.write_all(&answer).await.ok()
    }

    /// Metadata, version 1.
    fn metadata(&self, out: &mut Vec<u8>) {
        out.extend(1_i32.to_be_bytes());
        out.extend(0_i32.to_be_bytes());
        text(out, "127.0.0.1");
        out.extend(i32::from(self.port).to_be_bytes());
        out.extend((-1_i16).to_be_bytes());
        out.extend(0_i32.to_be_bytes());
        out.extend(1_i32.to_be_bytes());
        out.extend(0_i16.to_be_bytes());
        text(out, "logs");
        out.push(0);
        out.extend(2_i32.to_be_bytes());
        for partition in 0..2_i32 {
            out.extend(0_i16.to_be_bytes());
            out.extend(partition.to_be_bytes());
            out.extend(0_i32.to_be_bytes());
            for _ in ["replicas", "in sync"] {
                out.extend(1_i32.to_be_bytes());
                out.extend(0_i32.to_be_bytes());
            }
        }
    }

    /// Produce, version 3.
    fn produce(&self, reader: &mut Reader<'_>, out: &mut Vec<u8>) -> Option<()> {
        // Transaction, acknowledgements, time-out, one topic with one partition.
        reader.text()?;
        reader.take(2 + 4 + 4)?;
        let topic = reader.text()?;
        reader.i32()?;
        let partition = reader.i32()?;
        let records = reader.bytes()?;
        let error: i16 = if self.signed_in { 0 } else { 29 };
        if self.signed_in {
            for value in values(records)? {
                self.arrived.add(&format!("{topic}/{partition} {value}"));
            }
        }
        out.extend(1_i32.to_be_bytes());
        text(out, &topic);
        out.extend(1_i32.to_be_bytes());
        out.extend(partition.to_be_bytes());
        out.extend(error.to_be_bytes());
        out.extend(0_i64.to_be_bytes());
        out.extend((-1_i64).to_be_bytes());
        out.extend(0_i32.to_be_bytes());
        Some(())
    }

    /// SaslAuthenticate, version 0, with PLAIN.
    fn authenticate(&mut self, reader: &mut Reader<'_>, out: &mut Vec<u8>) -> Option<()> {
        let words = String::from_utf8_lossy(reader.bytes()?).into_owned();
        let (user, password) = USER;
        self.signed_in = words == format!("\0{user}\0{password}");
        let error: i16 = if self.signed_in { 0 } else { 58 };
        out.extend(error.to_be_bytes());
        out.extend((-1_i16).to_be_bytes());
        out.extend(0_i32.to_be_bytes());
        Some(())
    }
}

/// The values of a batch of records, version 2.
fn values(batch: &[u8]) -> Option<Vec<String>> {
    let mut reader = Reader(batch);
    // Offset, length, epoch, magic, checksum, attributes, last offset, two times, producer, its epoch, sequence.
    reader.take(8 + 4 + 4 + 1 + 4 + 2 + 4 + 8 + 8 + 8 + 2 + 4)?;
    let count = reader.i32()?;
    (0..count)
        .map(|_| {
            reader.varint()?;
            reader.take(1)?;
            reader.varint()?;
            reader.varint()?;
            let key = reader.varbytes()?;
            let value = String::from_utf8_lossy(reader.varbytes()??).into_owned();
            for _ in 0..reader.varint()? {
                reader.varbytes()?;
                reader.varbytes()?;
            }
            Some(match key {
                Some(key) => format!("{}: {value}", String::from_utf8_lossy(key)),
                None => value,
            })
        })
        .collect()
}

/// ApiVersions, up to version 0: others are told that they are none.
fn versions(version: i16, out: &mut Vec<u8>) {
    let error: i16 = if version == 0 { 0 } else { 35 };
    out.extend(error.to_be_bytes());
    let calls: [(i16, i16); 5] = [(0, 3), (3, 1), (17, 1), (18, 0), (36, 0)];
    out.extend((calls.len() as i32).to_be_bytes());
    for (key, version) in calls {
        for number in [key, version, version] {
            out.extend(number.to_be_bytes());
        }
    }
}

/// SaslHandshake, version 1.
fn sasl_handshake(out: &mut Vec<u8>) {
    out.extend(0_i16.to_be_bytes());
    out.extend(1_i32.to_be_bytes());
    text(out, "PLAIN");
}
