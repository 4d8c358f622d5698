//! Client certificates: who signed them, how long the chain may be, and what they say. The chain is
//! checked in the handshake, or, where the requirement depends on the URI, recorded there and asked
//! for when the request is known. The fields of a certificate are read only when somebody wants them.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use regex::Regex;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509Name};

use crate::error::Problem;

/// More certificates than any honest client sends; a longer list is refused before a path is built.
const MAX_PRESENTED: usize = 16;

/// The `client` block of an `ssl` resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientAuth {
    /// PEM of the authorities a client certificate may come from.
    pub ca: String,
    /// How many intermediate certificates may stand between the client and the authority.
    pub depth: u32,
    /// URIs on which no client certificate is asked for.
    pub skip_uri_regex: Vec<String>,
}

/// The compiled `client` block: the handshake verifier and the request-time exceptions.
pub struct ClientPolicy {
    strict: Arc<dyn ClientCertVerifier>,
    depth: usize,
    skip: Vec<Regex>,
}

impl ClientPolicy {
    /// Compiles the block.
    ///
    /// # Errors
    /// The field inside `client` that cannot be used, and why.
    pub fn build(auth: &ClientAuth, provider: &Arc<CryptoProvider>) -> Result<Self, (String, Problem)> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(auth.ca.as_bytes()) {
            let certificate = certificate.map_err(|e| ("ca".to_owned(), Problem::Pem(e.to_string())))?;
            roots.add(certificate).map_err(|e| ("ca".to_owned(), Problem::Authority(e.to_string())))?;
        }
        if roots.is_empty() {
            return Err(("ca".to_owned(), Problem::NoCertificateBlock));
        }
        let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|e| ("ca".to_owned(), Problem::Authority(e.to_string())))?;
        let skip = auth
            .skip_uri_regex
            .iter()
            .enumerate()
            .map(|(i, pattern)| {
                Regex::new(pattern)
                    .map_err(|e| (format!("skip_mtls_uri_regex/{i}"), Problem::Regex(e.to_string())))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { strict, depth: usize::try_from(auth.depth).unwrap_or(usize::MAX), skip })
    }

    /// Whether a handshake without a certificate is let through, to be judged by its URI.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        !self.skip.is_empty()
    }

    /// Whether requests for this URI path need no client certificate.
    #[must_use]
    pub fn skips(&self, uri: &str) -> bool {
        self.skip.iter().any(|pattern| pattern.is_match(uri))
    }

    /// Checks a presented chain: signatures up to a trusted authority, validity, usage, length.
    ///
    /// # Errors
    /// What rustls reports; an empty chain is [`Error::NoCertificatesPresented`].
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        self.verify_parts(leaf, intermediates, now).map(|_| ())
    }

    fn verify_parts(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if intermediates.len() >= MAX_PRESENTED {
            return Err(CertificateError::BadEncoding.into());
        }
        // A chain is sent leaf first, so a path of at most `depth` intermediates uses no later ones.
        // Cutting the list is stricter than counting for an unordered one, never laxer.
        let used = intermediates.get(..self.depth).unwrap_or(intermediates);
        self.strict.verify_client_cert(leaf, used, now)
    }
}

impl fmt::Debug for ClientPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientPolicy")
            .field("depth", &self.depth)
            .field("skip", &self.skip)
            .finish_non_exhaustive()
    }
}

/// The policy as rustls drives it in a handshake.
#[derive(Debug)]
pub(crate) struct HandshakeVerifier(pub(crate) Arc<ClientPolicy>);

impl ClientCertVerifier for HandshakeVerifier {
    fn client_auth_mandatory(&self) -> bool {
        !self.0.is_optional()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.strict.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.0.is_optional() {
            // An unsuitable certificate is no worse than none where the URI decides: the connection
            // records that it was not verified and only the excepted URIs are served.
            return Ok(ClientCertVerified::assertion());
        }
        self.0.verify_parts(leaf, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.strict.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.strict.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.strict.supported_verify_schemes()
    }
}

/// What a client certificate says about its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    /// Subject in RFC 2253 form, as nginx's `$ssl_client_s_dn`.
    pub subject: String,
    /// Issuer in the same form.
    pub issuer: String,
    /// Serial number in upper-case hexadecimal.
    pub serial: String,
    /// Subject alternative names in the certificate's order.
    pub names: Vec<AltName>,
    /// Validity as seconds since 1970.
    pub not_before: i64,
    /// Validity as seconds since 1970.
    pub not_after: i64,
}

/// One subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AltName {
    Dns(String),
    Uri(String),
    Email(String),
    Ip(IpAddr),
}

impl ClientIdentity {
    /// Reads the fields of a certificate; `None` if it is not well formed.
    #[must_use]
    pub fn parse(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let names = match parsed.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().filter_map(alt_name).collect(),
            Ok(None) => Vec::new(),
            Err(_) => return None,
        };
        Some(Self {
            subject: distinguished_name(parsed.subject()),
            issuer: distinguished_name(parsed.issuer()),
            serial: hex(parsed.raw_serial()),
            names,
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
        })
    }
}

fn alt_name(name: &GeneralName<'_>) -> Option<AltName> {
    match name {
        GeneralName::DNSName(name) => Some(AltName::Dns((*name).to_owned())),
        GeneralName::URI(uri) => Some(AltName::Uri((*uri).to_owned())),
        GeneralName::RFC822Name(mail) => Some(AltName::Email((*mail).to_owned())),
        GeneralName::IPAddress(bytes) => {
            if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
                return Some(AltName::Ip(v4.into()));
            }
            <[u8; 16]>::try_from(*bytes).ok().map(|v6| AltName::Ip(v6.into()))
        }
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    // A DER integer has a leading zero when its first bit is set; it is no part of the number.
    let bytes = match bytes {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    };
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(out, "{byte:02X}");
    }
    out
}

fn distinguished_name(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| {
            rdn.iter()
                .map(|attribute| {
                    let oid = attribute.attr_type().to_id_string();
                    format!("{}={}", short_name(&oid), escaped(attribute.as_str().unwrap_or_default()))
                })
                .collect::<Vec<_>>()
                .join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

fn short_name(oid: &str) -> &str {
    match oid {
        "2.5.4.3" => "CN",
        "2.5.4.4" => "SN",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "street",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.12" => "title",
        "2.5.4.42" => "GN",
        "1.2.840.113549.1.9.1" => "emailAddress",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        other => other,
    }
}

fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (i, c) in value.chars().enumerate() {
        let edge = (i == 0 && (c == ' ' || c == '#')) || (i == last && c == ' ');
        if edge || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        // A control character would break a log line or a header made of the name.
        out.push(if c.is_control() { '?' } else { c });
    }
    out
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn names_read_as_nginx_prints_them() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params =
            rcgen::CertificateParams::new(vec!["api.test".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        params.serial_number = Some(rcgen::SerialNumber::from(vec![0xab, 0x01]));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "Acme, Inc");
        params.distinguished_name.push(rcgen::DnType::CommonName, "client \u{7}1");
        let certificate = params.self_signed(&key).unwrap();

        let identity = ClientIdentity::parse(certificate.der()).unwrap();
        assert_eq!(identity.subject, "CN=client ?1,O=Acme\\, Inc");
        assert_eq!(identity.serial, "AB01");
        assert_eq!(
            identity.names,
            [AltName::Dns("api.test".to_owned()), AltName::Ip("10.0.0.1".parse().unwrap())]
        );
    }

    #[test]
    fn a_broken_certificate_has_no_identity() {
        assert_eq!(ClientIdentity::parse(&CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])), None);
    }
}
