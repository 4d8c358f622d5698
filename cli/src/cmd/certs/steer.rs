//! What may be said to a rotation that is under way, and how it is followed.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use certs::ca::proto::admin_client::AdminClient;
use certs::ca::proto::{
    AdvanceRequest, Blocker, ReasonRequest, RotationStatus, StatusReply, WatchStatusRequest,
};
use clap::Args;
use tonic::transport::Channel;

use super::ask::{Asked, answer, request};
use super::{ATTENTION, BLOCKED, IN_PROGRESS, OK, show};
use crate::output::{self, Format};

/// What has not changed is told again after this.
const REPEAT: Duration = Duration::from_secs(10);

/// Arguments of `postern certs advance`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  postern certs advance                                     the next state, with --step\n  \
                        postern certs advance --waive orders-7 --reason 'machine is scrapped'\n  \
                        postern certs advance --force --reason 'ticket 4711'\n\n\
                        --force passes the interlocks of the present state, once. The third (nothing outlives its signer) and the \
                        sixth\n(replicas and copies agree) are never passed."
)]
pub struct Advance {
    /// Past the interlocks of the present state.
    #[arg(long)]
    force: bool,
    /// Do not wait for this workload: its name, or its identity. May be repeated.
    #[arg(long, value_name = "NAME")]
    waive: Vec<String>,
    /// The shortest waits from now on.
    #[arg(long)]
    compress: bool,
    /// For the log; needed with --force and --waive.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    asked: Asked,
}

impl Advance {
    pub async fn run(self) -> Result<u8> {
        let Self { force, waive, compress, reason, asked } = self;
        let message = AdvanceRequest { reason, force, waive, compress };
        let status = answer(asked.client().await?.advance(request(message)).await)?;
        Ok(told(&asked, &status))
    }
}

macro_rules! reasoned {
    ($(#[$doc:meta])* $name:ident, $call:ident) => {
        $(#[$doc])*
        #[derive(Args)]
        pub struct $name {
            /// For the log and for whoever looks.
            #[arg(long, value_name = "TEXT", default_value = "")]
            reason: String,
            #[command(flatten)]
            asked: Asked,
        }

        impl $name {
            pub async fn run(self) -> Result<u8> {
                let message = ReasonRequest { reason: self.reason };
                let status = answer(self.asked.client().await?.$call(request(message)).await)?;
                Ok(told(&self.asked, &status))
            }
        }
    };
}

reasoned! {
    /// Arguments of `postern certs pause`.
    Pause, pause
}
reasoned! {
    /// Arguments of `postern certs resume`.
    Resume, resume
}

/// Arguments of `postern certs rollback`.
#[derive(Args)]
pub struct Rollback {
    /// For the log and for whoever looks.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Begin it and return.
    #[arg(long)]
    no_wait: bool,
    /// Return after so long; it goes on.
    #[arg(long, value_name = "SPAN", value_parser = super::status::seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    asked: Asked,
}

impl Rollback {
    pub async fn run(self) -> Result<u8> {
        let mut client = self.asked.client().await?;
        let status = answer(client.rollback(request(ReasonRequest { reason: self.reason })).await)?;
        if self.no_wait || status.rotation.is_none() {
            return Ok(told(&self.asked, &status));
        }
        match follow(&self.asked, client, self.timeout.map(Duration::from_secs)).await? {
            // To be back is what was asked for.
            ATTENTION => Ok(OK),
            code => Ok(code),
        }
    }
}

/// Arguments of `postern certs watch`.
#[derive(Args)]
pub struct Watch {
    /// Return after so long.
    #[arg(long, value_name = "SPAN", value_parser = super::status::seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    asked: Asked,
}

impl Watch {
    pub async fn run(self) -> Result<u8> {
        let client = self.asked.client().await?;
        follow(&self.asked, client, self.timeout.map(Duration::from_secs)).await
    }
}

/// What a command did.
fn told(asked: &Asked, status: &StatusReply) -> u8 {
    match (asked.output, &status.rotation) {
        (Format::Json, _) => output::json(status),
        (Format::Text, Some(rotation)) => show::rotation(rotation, status.now),
        (Format::Text, None) => {
            status.past.last().into_iter().for_each(|last| show::rotation(last, status.now))
        }
    }
    match &status.rotation {
        None => OK,
        Some(_) => IN_PROGRESS,
    }
}

/// Whether there is nothing to tell but that time has passed.
fn is_same(one: &RotationStatus, other: &RotationStatus) -> bool {
    let waits = |rotation: &RotationStatus| -> Vec<(u32, Option<String>)> {
        let who = |blocker: &Blocker| blocker.culprits.first().map(|culprit| culprit.who.clone());
        rotation.blockers.iter().map(|blocker| (blocker.interlock, who(blocker))).collect()
    };
    (&one.id, &one.state, one.done, one.of, one.quiet_until, waits(one))
        == (&other.id, &other.state, other.done, other.of, other.quiet_until, waits(other))
}

/// Shows how far what is under way is, until it is over or time is. With JSON only the end is printed.
pub async fn follow(asked: &Asked, mut client: AdminClient<Channel>, limit: Option<Duration>) -> Result<u8> {
    let until = limit.map(|limit| tokio::time::Instant::now() + limit);
    let mut last: Option<StatusReply> = None;
    let mut said: Option<(RotationStatus, Instant)> = None;
    let mut stream = answer(client.watch(WatchStatusRequest {}).await)?;
    loop {
        let next = match until {
            Some(until) => tokio::time::timeout_at(until, stream.message()).await,
            None => Ok(stream.message().await),
        };
        let status = match next {
            Err(_) => break,
            Ok(Ok(Some(status))) => status,
            // The authority was started anew: what is under way goes on in it.
            Ok(Ok(None) | Err(_)) => {
                let again = Instant::now() + Duration::from_secs(30);
                stream = loop {
                    if Instant::now() > again || until.is_some_and(|u| tokio::time::Instant::now() > u) {
                        bail!(
                            "the authority is gone; when it is back, `postern certs watch` shows where it is"
                        );
                    }
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    let Ok(mut client) = asked.client().await else { continue };
                    if let Ok(stream) = client.watch(WatchStatusRequest {}).await {
                        break stream.into_inner();
                    }
                };
                continue;
            }
        };
        let Some(rotation) = &status.rotation else {
            last = Some(status);
            break;
        };
        let old = said.as_ref();
        let is_news = old.is_none_or(|(old, at)| at.elapsed() > REPEAT || !is_same(old, rotation));
        if asked.output == Format::Text && is_news {
            output::note(&show::progress(rotation, status.now));
            for blocker in &rotation.blockers {
                let who = blocker.culprits.first();
                let who = who.map_or_else(String::new, |one| format!(": {} {}", one.who, one.why));
                output::note(&format!("  waits: {}{who}", blocker.what));
            }
            said = Some((rotation.clone(), Instant::now()));
        }
        let stands = !rotation.for_whom.is_empty();
        last = Some(status);
        if stands {
            break;
        }
    }
    let Some(status) = last else { return Ok(IN_PROGRESS) };
    match asked.output {
        Format::Json => output::json(&status),
        Format::Text => match (&status.rotation, status.past.last()) {
            (Some(rotation), _) => show::rotation(rotation, status.now),
            (None, Some(past)) => show::rotation(past, status.now),
            (None, None) => output::line(format_args!("nothing is under way")),
        },
    }
    Ok(match (&status.rotation, status.past.last()) {
        (None, Some(past)) if past.ended != "done" => ATTENTION,
        (None, _) => OK,
        (Some(rotation), _) if rotation.state == "PAUSED" => ATTENTION,
        (Some(rotation), _) if !rotation.blockers.is_empty() => BLOCKED,
        (Some(_), _) => IN_PROGRESS,
    })
}
