//! `postern.acme`: who gives certificates to the `ssl` resources that ask for them.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::Hidden;
use super::section::Section;
use crate::ssl::AcmeChallenge;

/// Directories that have a name.
const DIRECTORIES: [(&str, &str); 2] = [
    ("letsencrypt", "https://acme-v02.api.letsencrypt.org/directory"),
    ("letsencrypt-staging", "https://acme-staging-v02.api.letsencrypt.org/directory"),
];

/// An authority that speaks ACME, and the account there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// The URL of its directory.
    pub directory: String,
    /// Whom it may write to.
    pub email: Vec<String>,
    /// How names are shown to be ours, where a resource does not say.
    pub challenge: AcmeChallenge,
    /// The account at the authority's operator.
    pub external_account: Option<ExternalAccount>,
    /// PEM of whom the directory's certificate may be from; the system's roots without it.
    pub ca_file: Option<PathBuf>,
    /// Which kind of certificate, where the authority offers several.
    pub profile: Option<String>,
    /// The pause after the first order that failed; it grows.
    pub retry: Duration,
    /// Where certificates are kept in place of the provider's store: a folder that several gateways may share.
    pub folder: Option<PathBuf>,
}

/// External account binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalAccount {
    pub kid: String,
    /// In base64url, as operators hand it out.
    pub hmac_key: Hidden,
}

impl ExternalAccount {
    /// The bytes of the key.
    #[must_use]
    pub fn key(&self) -> Option<Vec<u8>> {
        decoded(self.hmac_key.reveal())
    }
}

/// With or without padding, in either alphabet.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let text = text.trim().trim_end_matches('=').replace('+', "-").replace('/', "_");
    URL_SAFE_NO_PAD.decode(text).ok().filter(|key| !key.is_empty())
}

pub(super) fn read(section: Section<'_>) -> Option<Acme> {
    if !section.is_present() {
        section.finish();
        return None;
    }
    let words = [("http-01", AcmeChallenge::Http01), ("tls-alpn-01", AcmeChallenge::TlsAlpn01)];
    let acme = Acme {
        directory: directory(&section).unwrap_or_default(),
        email: email(&section),
        challenge: section.one_of("challenge", &words).unwrap_or_default(),
        external_account: external_account(&section),
        ca_file: section.path("ca_file"),
        profile: section.word("profile").map(str::to_owned),
        retry: section.duration("retry").unwrap_or(Duration::from_secs(60)),
        folder: section.path("folder"),
    };
    if acme.retry < Duration::from_secs(1) {
        section.invalid("retry", "authorities count attempts that fail: write a second (`1s`) or more");
    }
    if section.flag("accept_terms") != Some(true) {
        let told = "certificates are given to who agrees to the authority's terms of service: read them, and write \
                    `accept_terms: true`";
        section.invalid("accept_terms", told);
    }
    section.finish();
    Some(acme)
}

fn directory(section: &Section<'_>) -> Option<String> {
    let Some(text) = section.word("directory") else {
        section.invalid("directory", "missing: write the URL of the authority's directory, or `letsencrypt`");
        return None;
    };
    if let Some((_, url)) = DIRECTORIES.iter().find(|(name, _)| *name == text) {
        return Some((*url).to_owned());
    }
    let host = text.strip_prefix("https://").and_then(|rest| rest.split('/').next());
    if host.is_none_or(|host| host.is_empty() || host.contains('@')) || text.contains(char::is_whitespace) {
        let told = format!(
            "`{text}` is no directory: write its URL (`https://ca.example.com/acme/directory`), `letsencrypt` or \
             `letsencrypt-staging`"
        );
        section.invalid("directory", told);
    }
    Some(text.to_owned())
}

fn email(section: &Section<'_>) -> Vec<String> {
    let elements = section.list_or_single("email").unwrap_or_default();
    let read = |element| {
        let text = section.element_text(&element)?;
        let parts = text.split_once('@');
        if parts.is_none_or(|(user, host)| user.is_empty() || host.is_empty())
            || text.contains([' ', ',', ':'])
        {
            section.element_invalid(&element, format!("`{text}` is no address: write `ops@example.com`"));
        }
        Some(text.to_owned())
    };
    elements.into_iter().filter_map(read).collect()
}

fn external_account(section: &Section<'_>) -> Option<ExternalAccount> {
    let account = section.section("external_account");
    let (kid, key) = (account.loose_text("kid"), account.loose_text("hmac_key"));
    let bound = match (kid, key) {
        (Some(kid), Some(key)) => {
            if decoded(&key).is_none() {
                account.invalid("hmac_key", "not base64url: write it as the authority's operator gave it");
            }
            Some(ExternalAccount { kid, hmac_key: Hidden::from(key) })
        }
        (None, None) if !account.is_present() => None,
        _ => {
            section.invalid("external_account", "`kid` and `hmac_key` are needed together");
            None
        }
    };
    account.finish();
    bound
}
