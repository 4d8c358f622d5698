//! What cert-manager does with CertificateRequests, as far as an authority is concerned that asks it for issuers.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::objects::{Filter, place};
use super::{Kind, KubeApi};
use crate::certs::Authority;

impl KubeApi {
    /// Every CertificateRequest that there is.
    pub fn certificate_requests(&self) -> Vec<Value> {
        self.state.kept().objects.list(Kind::CERTIFICATE_REQUEST, &Filter::default())
    }

    /// Signs what asks to be an authority and has no answer yet, as a CA issuer does: without a path length.
    pub fn sign_requests(&self, authority: &Authority) -> usize {
        let life = std::time::Duration::from_secs(365 * 86_400);
        self.answer_requests(|request| {
            assert_eq!(request["spec"]["isCA"], true);
            assert_eq!(request["spec"]["usages"], json!(["cert sign", "crl sign"]));
            let pem =
                STANDARD.decode(request["spec"]["request"].as_str().expect("a request")).expect("base64");
            let pem = String::from_utf8(pem).expect("PEM");
            let certificate = authority.sign_issuer(&pem, "an issuer of the mesh", None, life);
            json!({
                "certificate": STANDARD.encode(certificate), "ca": STANDARD.encode(authority.pem()),
                "conditions": [
                    {"type": "Approved", "status": "True", "message": "approved"},
                    {"type": "Ready", "status": "True", "reason": "Issued", "message": "signed"},
                ],
            })
        })
    }

    /// Says no to what has no answer yet.
    pub fn deny_requests(&self) -> usize {
        self.answer_requests(|_| {
            json!({"conditions": [
                {"type": "Denied", "status": "True", "reason": "policy", "message": "not for this namespace"},
                {"type": "Ready", "status": "False", "reason": "Denied", "message": "denied"},
            ]})
        })
    }

    fn answer_requests(&self, answer: impl Fn(&Value) -> Value) -> usize {
        let open = self.certificate_requests().into_iter().filter(|request| request["status"].is_null());
        let mut answered = 0;
        for mut request in open {
            request["status"] = answer(&request);
            assert_ne!(place(&request).0, "", "a request is in a namespace");
            self.put(Kind::CERTIFICATE_REQUEST, request);
            answered += 1;
        }
        answered
    }
}
