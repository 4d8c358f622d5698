//! How certificates stand, for operators and their tools.

use serde::Serialize;

use super::Seconds;

/// Everything that is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Status {
    /// The authority's directory.
    pub directory: String,
    /// This instance, as `ordered_by` names it.
    pub instance: String,
    /// Where certificates are kept.
    pub store: String,
    /// Why what is shown may be old: the store cannot be used.
    pub problem: Option<String>,
    /// Orders of this process by what came of them.
    pub orders: Counts,
    /// In the order of their names.
    pub certificates: Vec<CertificateStatus>,
}

/// Orders since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub issued: u64,
    pub failed: u64,
}

/// The certificate of one set of names.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CertificateStatus {
    pub names: Vec<String>,
    /// The `ssl` resources that want it.
    pub ssls: Vec<String>,
    pub state: State,
    /// The instance that orders one now.
    pub ordered_by: Option<String>,
    pub not_before: Option<Seconds>,
    pub not_after: Option<Seconds>,
    pub obtained_at: Option<Seconds>,
    /// When the next one is ordered.
    pub renew_at: Option<Seconds>,
    /// Why there is no newer one.
    pub failure: Option<FailureStatus>,
    /// Why what is there cannot be served.
    pub problem: Option<String>,
}

/// In a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is served.
    Valid,
    /// It is served and has ended.
    Expired,
    /// There is none, and one is ordered.
    Ordering,
    /// There is none, because orders failed.
    Failed,
    /// There is none yet.
    Waiting,
}

impl State {
    /// As in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Expired => "expired",
            Self::Ordering => "ordering",
            Self::Failed => "failed",
            Self::Waiting => "waiting",
        }
    }
}

/// Orders that failed, one after another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FailureStatus {
    pub count: u32,
    pub at: Seconds,
    pub next_attempt: Seconds,
    pub reason: String,
}
