//! The settings that every logger has: what an entry holds, and how entries are gathered.
//!
//! A macro and not a nested struct, because unknown fields are refused and serde cannot do both.

use std::num::NonZeroU32;

use config::error::ConfigError;

pub(crate) fn batch_max_size() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(999)
}

pub(crate) fn inactive_timeout() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(4)
}

pub(crate) fn buffer_duration() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(59)
}

pub(crate) fn yes() -> bool {
    true
}

/// Refuses what cannot be the name or address of a server.
pub(crate) fn is_host(host: &str, pointer: &str) -> Result<(), ConfigError> {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '@');
    if host.is_empty() || host.contains(odd) {
        return Err(ConfigError::invalid(pointer, "write the name or the address of a server"));
    }
    Ok(())
}

pub(crate) fn retry_delay() -> u32 {
    1
}

pub(crate) fn body_bytes() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(524_287)
}

/// Declares `Config` with the given members and those of every logger. With `queue_name`, the default of `name`, it has
/// the members about gathering entries too.
macro_rules! logger_settings {
    (
        queue_name: $name:literal;
        $($(#[$meta:meta])* $field:ident: $type:ty,)*
    ) => {
        $crate::support::log_settings::logger_settings! {
            $($(#[$meta])* $field: $type,)*
            /// What the queue is called in metrics and in the log.
            #[serde(default = "Config::queue_name")]
            name: String,
            /// Entries that are sent together.
            #[serde(default = "crate::support::log_settings::batch_max_size")]
            batch_max_size: ::std::num::NonZeroU32,
            /// Entries are sent when none came for so many seconds.
            #[serde(default = "crate::support::log_settings::inactive_timeout")]
            inactive_timeout: ::std::num::NonZeroU32,
            /// Entries are sent when the oldest has waited for so many seconds.
            #[serde(default = "crate::support::log_settings::buffer_duration")]
            buffer_duration: ::std::num::NonZeroU32,
            /// Further attempts to send a batch.
            #[serde(default)]
            max_retry_count: u32,
            /// Seconds before the first further attempt; they double with each.
            #[serde(default = "crate::support::log_settings::retry_delay")]
            retry_delay: u32,
            /// Entries that may wait; more are dropped. 100,000 without it, and never more than 64 MB.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            max_pending_entries: Option<::std::num::NonZeroU32>,
        }

        impl Config {
            fn queue_name() -> String {
                $name.to_owned()
            }

            /// `pending` is what the whole gateway says; an attempt takes `timeout` at most.
            fn batch_settings(
                &self,
                pending: Option<::std::num::NonZeroU32>,
                timeout: ::std::time::Duration,
            ) -> $crate::support::batch::BatchSettings {
                let seconds = |n: u32| ::std::time::Duration::from_secs(n.into());
                $crate::support::batch::BatchSettings {
                    name: self.name.clone(),
                    size: self.batch_max_size.get() as usize,
                    idle: seconds(self.inactive_timeout.get()),
                    age: seconds(self.buffer_duration.get()),
                    retries: self.max_retry_count,
                    pause: seconds(self.retry_delay),
                    pending: self.max_pending_entries.or(pending).map(|n| n.get() as usize),
                    timeout,
                    at_once: $crate::support::log_settings::AT_ONCE,
                }
            }
        }
    };
    ($($(#[$meta:meta])* $field:ident: $type:ty,)*) => {
        /// Settings.
        #[derive(Clone, Debug, ::serde::Serialize, ::serde::Deserialize, ::schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct Config {
            $($(#[$meta])* $field: $type,)*
            /// The fields of an entry: texts, or objects of them up to five levels. A text that begins with `$` is a
            /// variable or holds some. Without it an entry tells all there is.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            log_format: Option<$crate::support::log_entry::LogFormat>,
            /// Fields added to the default entry.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            log_format_extra: Option<$crate::support::log_entry::LogFormat>,
            /// Tell the body of the request.
            #[serde(default)]
            include_req_body: bool,
            /// Tell it only where this expression over variables holds.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(length(min = 1))]
            include_req_body_expr: Option<Vec<::serde_json::Value>>,
            /// Bytes of the request's body that are told.
            #[serde(default = "crate::support::log_settings::body_bytes")]
            max_req_body_bytes: ::std::num::NonZeroU32,
            /// Tell the body of the answer.
            #[serde(default)]
            include_resp_body: bool,
            /// Tell it only where this expression over variables holds.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schemars(length(min = 1))]
            include_resp_body_expr: Option<Vec<::serde_json::Value>>,
            /// Bytes of the answer's body that are told.
            #[serde(default = "crate::support::log_settings::body_bytes")]
            max_resp_body_bytes: ::std::num::NonZeroU32,
        }

        impl Config {
            fn entry_settings(&self) -> $crate::support::log_entry::EntrySettings<'_> {
                $crate::support::log_entry::EntrySettings {
                    log_format: self.log_format.as_ref(),
                    log_format_extra: self.log_format_extra.as_ref(),
                    include_req_body: self.include_req_body,
                    include_req_body_expr: self.include_req_body_expr.as_ref(),
                    max_req_body_bytes: self.max_req_body_bytes,
                    include_resp_body: self.include_resp_body,
                    include_resp_body_expr: self.include_resp_body_expr.as_ref(),
                    max_resp_body_bytes: self.max_resp_body_bytes,
                }
            }
        }
    };
}

pub(crate) use logger_settings;

/// Batches of one queue on their way at once.
pub(crate) const AT_ONCE: usize = 4;
