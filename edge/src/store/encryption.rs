//! Fields that APISIX keeps encrypted in its store: private keys, and secrets inside plugin settings.
//!
//! The cipher is the one APISIX chose, AES-CBC with the key as its own initialisation vector, so that both can
//! read one etcd. It hides secrets from a casual look and protects nothing from whoever has the key ring; the
//! default ring is known to everybody. What cannot be decrypted is taken as it is, as APISIX does.

use aws_lc_rs::cipher::{
    AES_128, AES_256, DecryptionContext, EncryptionContext, PaddedBlockDecryptingKey,
    PaddedBlockEncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use config::Kind;
use config::process::DataEncryption;
use serde_json::Value;

/// The ring APISIX comes with: what it wrote must be read, whatever is configured here.
const DEFAULT_KEYS: [&str; 2] = ["qeddd145sfvddff3", "edd1c9f0985e76a2"];

/// The fields of plugins that are encrypted, as paths inside the settings.
const FIELDS: [(&str, &[&[&str]]); 19] = [
    ("authz-casdoor", &[&["client_secret"]]),
    ("authz-keycloak", &[&["client_secret"]]),
    ("basic-auth", &[&["password"]]),
    ("clickhouse-logger", &[&["password"]]),
    ("csrf", &[&["key"]]),
    ("elasticsearch-logger", &[&["auth", "password"]]),
    ("google-cloud-logging", &[&["auth_config", "private_key"]]),
    ("hmac-auth", &[&["secret_key"]]),
    ("jwt-auth", &[&["secret"]]),
    ("kafka-proxy", &[&["sasl", "password"]]),
    ("key-auth", &[&["key"]]),
    ("lago", &[&["token"]]),
    ("limit-conn", &[&["redis_password"]]),
    ("limit-count", &[&["redis_password"]]),
    ("openid-connect", &[&["client_secret"], &["client_rsa_private_key"]]),
    ("rocketmq-logger", &[&["secret_key"]]),
    ("sls-logger", &[&["access_key_secret"]]),
    ("splunk-hec-logging", &[&["endpoint", "token"]]),
    ("tencent-cloud-cls", &[&["secret_key"]]),
];

/// The key ring.
pub struct Encryption {
    /// Tried in this order.
    read: Vec<Key>,
    /// The first of the configured ones; nothing if fields are written as they are.
    write: Option<Key>,
}

#[derive(Clone)]
struct Key(Vec<u8>);

impl Default for Encryption {
    /// Reads what APISIX wrote with its own ring, and writes nothing encrypted.
    fn default() -> Encryption {
        Encryption {
            read: DEFAULT_KEYS.iter().map(|key| Key(key.as_bytes().to_vec())).collect(),
            write: None,
        }
    }
}

impl Encryption {
    /// The ring of `apisix.data_encryption`, and for reading that of APISIX.
    #[must_use]
    pub fn new(settings: &DataEncryption) -> Encryption {
        let configured = settings.keyring.iter().map(|key| Key(key.reveal().as_bytes().to_vec()));
        let mut read: Vec<Key> = configured.collect();
        let write = read.first().filter(|_| settings.enabled).cloned();
        read.extend(Encryption::default().read);
        Encryption { read, write }
    }

    /// An object from the store, with its fields readable.
    pub(super) fn open(&self, kind: Kind, json: &[u8]) -> Bytes {
        self.change(kind, json, |text| self.decrypt(text))
    }

    /// An object for the store.
    pub(super) fn seal(&self, kind: Kind, json: Vec<u8>) -> Vec<u8> {
        match &self.write {
            None => json,
            Some(key) => self.change(kind, &json, |text| key.encrypt(text)).to_vec(),
        }
    }

    fn change(&self, kind: Kind, json: &[u8], mut change: impl FnMut(&str) -> Option<String>) -> Bytes {
        // Most objects have no such field: they are not even parsed.
        if !may_have_secrets(kind, json) {
            return Bytes::copy_from_slice(json);
        }
        let Ok(mut value) = serde_json::from_slice::<Value>(json) else {
            return Bytes::copy_from_slice(json);
        };
        let mut changed = false;
        each_secret(kind, &mut value, &mut |text| {
            if let Some(other) = change(text) {
                *text = other;
                changed = true;
            }
        });
        if changed { Bytes::from(value.to_string()) } else { Bytes::copy_from_slice(json) }
    }

    fn decrypt(&self, text: &str) -> Option<String> {
        if is_plain(text) {
            return None;
        }
        let encrypted =
            STANDARD.decode(text).ok().filter(|bytes| !bytes.is_empty() && bytes.len() % 16 == 0)?;
        self.read.iter().find_map(|key| key.decrypt(&encrypted))
    }
}

impl Key {
    fn cipher(&self) -> Option<(UnboundCipherKey, [u8; 16])> {
        let algorithm = if self.0.len() == 32 { &AES_256 } else { &AES_128 };
        let key = UnboundCipherKey::new(algorithm, &self.0).ok()?;
        Some((key, *self.0.first_chunk()?))
    }

    fn encrypt(&self, text: &str) -> Option<String> {
        if is_plain(text) && !text.starts_with("-----") {
            return None;
        }
        let (key, iv) = self.cipher()?;
        let mut bytes = text.as_bytes().to_vec();
        let context = EncryptionContext::Iv128(FixedLength::from(iv));
        PaddedBlockEncryptingKey::cbc_pkcs7(key).ok()?.less_safe_encrypt(&mut bytes, context).ok()?;
        Some(STANDARD.encode(bytes))
    }

    fn decrypt(&self, encrypted: &[u8]) -> Option<String> {
        let (key, iv) = self.cipher()?;
        let mut bytes = encrypted.to_vec();
        let context = DecryptionContext::Iv128(FixedLength::from(iv));
        let text = PaddedBlockDecryptingKey::cbc_pkcs7(key).ok()?.decrypt(&mut bytes, context).ok()?;
        String::from_utf8(text.to_vec()).ok()
    }
}

/// PEM, and references to secrets that are elsewhere.
fn is_plain(text: &str) -> bool {
    text.is_empty() || text.starts_with("-----") || text.starts_with('$')
}

fn may_have_secrets(kind: Kind, json: &[u8]) -> bool {
    let contains = |text: &str| memchr::memmem::find(json, text.as_bytes()).is_some();
    kind == Kind::Ssl
        || contains("client_key")
        || (contains("plugins") && FIELDS.iter().any(|(name, _)| contains(name)))
}

fn each_secret(kind: Kind, value: &mut Value, visit: &mut dyn FnMut(&mut String)) {
    let mut text = |value: Option<&mut Value>| {
        if let Some(Value::String(text)) = value {
            visit(text);
        }
    };
    match kind {
        Kind::Ssl => {
            text(value.get_mut("key"));
            value
                .get_mut("keys")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
                .for_each(|key| text(Some(key)));
        }
        Kind::Upstream => text(value.pointer_mut("/tls/client_key")),
        _ => text(value.pointer_mut("/upstream/tls/client_key")),
    }
    let Some(Value::Object(plugins)) = value.get_mut("plugins") else { return };
    for (name, paths) in FIELDS {
        let Some(settings) = plugins.get_mut(name) else { continue };
        for path in paths {
            let place = path.iter().try_fold(&mut *settings, |place, member| place.get_mut(*member));
            text(place);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use config::process::DataEncryption;
    use serde_json::json;

    use super::*;

    fn ring(enabled: bool, keys: &[&str]) -> Encryption {
        let keyring = keys.iter().map(|key| (*key).to_owned().into()).collect();
        Encryption::new(&DataEncryption { enabled, keyring })
    }

    fn object(kind: Kind) -> Value {
        let pem = "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----";
        match kind {
            Kind::Ssl => json!({"cert": "c", "key": pem, "keys": [pem], "sni": "a"}),
            Kind::Upstream => {
                json!({"nodes": {"key-auth:1": 1}, "tls": {"client_cert": "c", "client_key": pem}})
            }
            Kind::Route => json!({
                "uri": "/", "upstream": {"tls": {"client_key": pem}},
                "plugins": {"openid-connect": {"client_id": "me", "client_secret": "hush"}, "key-auth": {}},
            }),
            _ => json!({"username": "jack", "plugins": {
                "key-auth": {"key": "k"}, "basic-auth": {"username": "u", "password": "$secret://vault/1/a/b"},
                "jwt-auth": {"key": "not this one", "secret": "x"},
            }}),
        }
    }

    #[test]
    fn what_is_sealed_opens_and_only_secrets_change() {
        for key in ["0123456789abcdef", "0123456789abcdef0123456789abcdef"] {
            let encryption = ring(true, &[key]);
            for kind in [Kind::Ssl, Kind::Upstream, Kind::Route, Kind::Consumer] {
                let plain = object(kind);
                let sealed = encryption.seal(kind, plain.to_string().into_bytes());
                let text = String::from_utf8(sealed.clone()).unwrap();
                for secret in ["PRIVATE KEY", "hush", "\"k\"", "\"x\""] {
                    assert!(!text.contains(secret), "{kind}: {text}");
                }
                for kept in ["$secret://", "not this one", "\"me\"", "\"c\""] {
                    assert_eq!(text.contains(kept), plain.to_string().contains(kept), "{kind}: {text}");
                }
                let opened: Value = serde_json::from_slice(&encryption.open(kind, &sealed)).unwrap();
                assert_eq!(opened, plain, "{kind}");
                // An older key of the ring still reads.
                let rotated = ring(true, &["fedcba9876543210", key]);
                let opened: Value = serde_json::from_slice(&rotated.open(kind, &sealed)).unwrap();
                assert_eq!(opened, plain, "{kind}");
            }
        }
    }

    #[test]
    fn what_apisix_wrote_with_its_own_ring_is_read() {
        // openssl enc -aes-128-cbc -K 65646431633966303938356537366132 -iv 65646431633966303938356537366132 -base64
        let value = json!({"username": "jack", "plugins": {"key-auth": {"key": "RjeV6km+KxQJN2rfu8Y7aA=="}}})
            .to_string();
        let opened = Encryption::default().open(Kind::Consumer, value.as_bytes());
        let opened: Value = serde_json::from_slice(&opened).unwrap();
        assert_eq!(opened.pointer("/plugins/key-auth/key").unwrap(), "auth-one");
    }

    #[test]
    fn what_is_not_encrypted_stays() {
        let encryption = Encryption::default();
        for text in ["k", "MTIzNDU2Nzg5MDEyMzQ1Ng==", "", "$env://KEY", "not base64!"] {
            let value = json!({"plugins": {"key-auth": {"key": text}}}).to_string();
            assert_eq!(encryption.open(Kind::Consumer, value.as_bytes()), value.as_bytes(), "{text}");
        }
        let plain = object(Kind::Ssl).to_string();
        assert_eq!(
            ring(false, &["0123456789abcdef"]).seal(Kind::Ssl, plain.clone().into_bytes()),
            plain.into_bytes()
        );
        assert_eq!(encryption.open(Kind::Ssl, b"{oops"), b"{oops".as_slice());
    }
}
