//! The bundle in the forms that others read.

pub mod jks;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

/// A SPIFFE bundle: a JWK set.
///
/// # Errors
/// A root has a key of a kind that has no form in it.
pub fn spiffe(roots: &[Vec<u8>], generation: u64) -> Result<Value, String> {
    let keys: Result<Vec<Value>, String> = roots.iter().map(|root| jwk(root)).collect();
    Ok(json!({"keys": keys?, "spiffe_sequence": generation, "spiffe_refresh_hint": 300}))
}

fn jwk(root: &[u8]) -> Result<Value, String> {
    let (_, parsed) = X509Certificate::from_der(root).map_err(|error| error.to_string())?;
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let spki = parsed.public_key();
    let mut key = match spki.parsed().map_err(|error| error.to_string())? {
        PublicKey::EC(point) => {
            let data = point.data();
            let (curve, length) = match data.len() {
                65 => ("P-256", 32),
                97 => ("P-384", 48),
                133 => ("P-521", 66),
                other => return Err(format!("a root has a point of {other} bytes")),
            };
            let (x, y) = data.get(1..).unwrap_or_default().split_at(length);
            json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)})
        }
        PublicKey::RSA(rsa) => {
            let modulus = rsa.modulus.iter().position(|byte| *byte != 0).and_then(|at| rsa.modulus.get(at..));
            json!({"kty": "RSA", "n": encode(modulus.unwrap_or_default()), "e": encode(rsa.exponent)})
        }
        _ if spki.subject_public_key.data.len() == 32 => {
            json!({"kty": "OKP", "crv": "Ed25519", "x": encode(&spki.subject_public_key.data)})
        }
        _ => return Err("a root has a key that a SPIFFE bundle cannot carry".to_owned()),
    };
    if let Some(key) = key.as_object_mut() {
        key.insert("use".to_owned(), "x509-svid".into());
        key.insert("x5c".to_owned(), json!([STANDARD.encode(root)]));
    }
    Ok(key)
}

/// A ConfigMap for Kubernetes, as YAML.
#[must_use]
pub fn config_map(name: &str, pem: &str) -> String {
    let mut text =
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {name}\ndata:\n  ca-bundle.pem: |\n");
    for line in pem.lines() {
        text.push_str("    ");
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::{Duration, SystemTime};

    use super::super::authority::{Authority, KeyKind};
    use super::*;

    #[test]
    fn a_bundle_has_a_key_and_a_certificate_for_each_root() {
        let kinds = [
            (KeyKind::P256, "EC"),
            (KeyKind::P384, "EC"),
            (KeyKind::Ed25519, "OKP"),
            (KeyKind::Rsa2048, "RSA"),
        ];
        let life = Duration::from_secs(86_400);
        let roots: Vec<Vec<u8>> = kinds
            .iter()
            .map(|(kind, _)| {
                let domain = "mesh.local".parse().unwrap();
                Authority::root(&domain, *kind, life, SystemTime::now()).unwrap().certificate().to_vec()
            })
            .collect();
        let bundle = spiffe(&roots, 7).unwrap();
        assert_eq!(bundle["spiffe_sequence"], 7);
        for (index, (_, kty)) in kinds.iter().enumerate() {
            let key = &bundle["keys"][index];
            assert_eq!(key["kty"], *kty);
            assert_eq!(key["use"], "x509-svid");
            assert_eq!(STANDARD.decode(key["x5c"][0].as_str().unwrap()).unwrap(), roots[index]);
        }
        let length = |at: usize, name: &str| {
            URL_SAFE_NO_PAD.decode(bundle["keys"][at][name].as_str().unwrap()).unwrap().len()
        };
        assert_eq!([length(0, "x"), length(1, "y"), length(2, "x"), length(3, "n")], [32, 48, 32, 256]);
        assert!(spiffe(&[b"no certificate".to_vec()], 1).is_err());
    }
}
