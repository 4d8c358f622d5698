//! A broker of Kafka as far as producers need one: a topic `logs` with two partitions, and SASL by PLAIN and SCRAM.
//!
//! It knows one version of each call and keeps the values of records, each with its partition. Its side of SCRAM is
//! written after RFC 5802.

use std::num::NonZeroU32;
use std::sync::Arc;

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
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
            let sign_in = if asks { SignIn::Asked } else { SignIn::Done };
            let mut broker = Broker { stream, arrived, port, sign_in };
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
    sign_in: SignIn,
}

/// How far a client has come.
enum SignIn {
    /// It has to name a mechanism first.
    Asked,
    /// It has named one.
    Begun(Mechanism),
    /// It has to prove that it knows the password.
    Challenged(Challenge),
    /// It may produce.
    Done,
}

#[derive(Clone, Copy)]
enum Mechanism {
    Plain,
    Scram(Hash),
}

/// What a mechanism of SCRAM is made of.
#[derive(Clone, Copy)]
struct Hash {
    hmac: hmac::Algorithm,
    pbkdf2: pbkdf2::Algorithm,
    digest: &'static digest::Algorithm,
}

const MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];

impl Mechanism {
    fn named(name: &str) -> Option<Self> {
        let scram = |hmac, pbkdf2, digest| Some(Self::Scram(Hash { hmac, pbkdf2, digest }));
        match name {
            "PLAIN" => Some(Self::Plain),
            "SCRAM-SHA-256" => scram(hmac::HMAC_SHA256, pbkdf2::PBKDF2_HMAC_SHA256, &digest::SHA256),
            "SCRAM-SHA-512" => scram(hmac::HMAC_SHA512, pbkdf2::PBKDF2_HMAC_SHA512, &digest::SHA512),
            _ => None,
        }
    }
}

/// What was said in SCRAM so far.
struct Challenge {
    hash: Hash,
    nonce: String,
    /// `client-first-message-bare` and `server-first-message`, with a comma between them.
    said: String,
}

const SALT: &[u8] = b"salt of the test";
const ITERATIONS: u32 = 4096;

impl Challenge {
    /// The answer to `client-first-message`; nothing if it is of somebody unknown.
    fn of(hash: Hash, first: &str) -> Option<(Self, String)> {
        let bare = first.strip_prefix("n,,")?;
        let (user, nonce) = bare.strip_prefix("n=")?.split_once(",r=")?;
        if user != USER.0 || nonce.is_empty() {
            return None;
        }
        let nonce = format!("{nonce}{:016x}", fastrand::u64(..));
        let answer = format!("r={nonce},s={},i={ITERATIONS}", STANDARD.encode(SALT));
        Some((Self { hash, said: format!("{bare},{answer}"), nonce }, answer))
    }

    /// The answer to `client-final-message`; nothing if its proof is of another password.
    fn prove(&self, last: &str) -> Option<String> {
        let (unproven, proof) = last.rsplit_once(",p=")?;
        // `biws` is `n,,`: no channel binding.
        if unproven != format!("c=biws,r={}", self.nonce) {
            return None;
        }
        let Hash { hmac: algorithm, pbkdf2, digest } = self.hash;
        let sign = |key: &[u8], text: &[u8]| hmac::sign(&hmac::Key::new(algorithm, key), text);
        let mut salted = vec![0; digest.output_len()];
        let iterations = NonZeroU32::new(ITERATIONS).expect("a number above 0");
        pbkdf2::derive(pbkdf2, iterations, SALT, USER.1.as_bytes(), &mut salted);
        let said = format!("{},{unproven}", self.said);
        let stored = digest::digest(digest, sign(&salted, b"Client Key").as_ref());
        let signature = sign(stored.as_ref(), said.as_bytes());
        let proof = STANDARD.decode(proof).ok().filter(|proof| proof.len() == salted.len())?;
        let shown: Vec<u8> = proof.iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
        if digest::digest(digest, &shown).as_ref() != stored.as_ref() {
            return None;
        }
        let own = sign(sign(&salted, b"Server Key").as_ref(), said.as_bytes());
        Some(format!("v={}", STANDARD.encode(own)))
    }
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
            17 => self.handshake(&reader.text()?, &mut body),
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
        let signed_in = matches!(self.sign_in, SignIn::Done);
        let error: i16 = if signed_in { 0 } else { 29 };
        if signed_in {
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

    /// SaslHandshake, version 1.
    fn handshake(&mut self, name: &str, out: &mut Vec<u8>) {
        let mechanism = Mechanism::named(name);
        let error: i16 = if mechanism.is_some() { 0 } else { 33 };
        if let Some(mechanism) = mechanism {
            self.sign_in = SignIn::Begun(mechanism);
        }
        out.extend(error.to_be_bytes());
        out.extend((MECHANISMS.len() as i32).to_be_bytes());
        for name in MECHANISMS {
            text(out, name);
        }
    }

    /// SaslAuthenticate, version 0.
    fn authenticate(&mut self, reader: &mut Reader<'_>, out: &mut Vec<u8>) -> Option<()> {
        let words = String::from_utf8_lossy(reader.bytes()?).into_owned();
        let (user, password) = USER;
        let next = match &self.sign_in {
            SignIn::Begun(Mechanism::Plain) => {
                (words == format!("\0{user}\0{password}")).then(|| (SignIn::Done, String::new()))
            }
            SignIn::Begun(Mechanism::Scram(hash)) => Challenge::of(*hash, &words)
                .map(|(challenge, answer)| (SignIn::Challenged(challenge), answer)),
            SignIn::Challenged(challenge) => challenge.prove(&words).map(|answer| (SignIn::Done, answer)),
            SignIn::Asked | SignIn::Done => None,
        };
        let error: i16 = if next.is_some() { 0 } else { 58 };
        let (step, answer) = next.unwrap_or((SignIn::Asked, String::new()));
        self.sign_in = step;
        out.extend(error.to_be_bytes());
        out.extend((-1_i16).to_be_bytes());
        out.extend((answer.len() as i32).to_be_bytes());
        out.extend(answer.as_bytes());
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
