//! What all verifiers of certificates do alike: they let nobody pass who has not the key of the certificate that he shows.
//! They differ in whose certificate they believe.

/// The three methods of a `ServerCertVerifier` or a `ClientCertVerifier` that are about the signature of a handshake, by
/// the algorithms of a provider. With `TLS13`, signatures of TLS 1.2 are refused.
macro_rules! checks_signatures {
    (TLS13, |$verifier:ident| $provider:expr) => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &::rustls::pki_types::CertificateDer<'_>,
            _: &::rustls::DigitallySignedStruct,
        ) -> Result<::rustls::client::danger::HandshakeSignatureValid, ::rustls::Error> {
            Err(::rustls::PeerIncompatible::Tls12NotOffered.into())
        }

        $crate::signatures::checks_signatures!(@rest |$verifier| $provider);
    };
    (|$verifier:ident| $provider:expr) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &::rustls::pki_types::CertificateDer<'_>,
            signature: &::rustls::DigitallySignedStruct,
        ) -> Result<::rustls::client::danger::HandshakeSignatureValid, ::rustls::Error> {
            let $verifier = self;
            let algorithms = &$provider.signature_verification_algorithms;
            ::rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
        }

        $crate::signatures::checks_signatures!(@rest |$verifier| $provider);
    };
    (@rest |$verifier:ident| $provider:expr) => {
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &::rustls::pki_types::CertificateDer<'_>,
            signature: &::rustls::DigitallySignedStruct,
        ) -> Result<::rustls::client::danger::HandshakeSignatureValid, ::rustls::Error> {
            let $verifier = self;
            let algorithms = &$provider.signature_verification_algorithms;
            ::rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<::rustls::SignatureScheme> {
            let $verifier = self;
            $provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

pub(crate) use checks_signatures;
