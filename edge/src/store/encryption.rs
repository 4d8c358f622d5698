//! Fields that are kept encrypted in a store that APISIX may read too: private keys, and secrets inside plugin settings.
//!
//! Written encrypted are the fields that APISIX encrypts, and every secret of plugins that APISIX does not have: in any
//! other field APISIX would take the encrypted text for the secret itself. Read are these and every secret of every
//! plugin, because another version of APISIX may encrypt more. The cipher is the one APISIX chose, AES-CBC with the key as its own initialisation vector, so that both can
//! read one etcd. It hides secrets from a casual look and protects nothing from whoever has the key ring; the
//! default ring is known to everybody. What cannot be decrypted is taken as it is, as APISIX does.

use std::sync::LazyLock;

use aws_lc_rs::cipher::{
    AES_128, AES_256, DecryptionContext, EncryptionContext, PaddedBlockDecryptingKey,
    PaddedBlockEncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use config::process::DataEncryption;
use config::{Kind, ResourceKey};
use hashbrown::HashMap;
use layers::plugin::Registration;
use plugins::absent;
use serde_json::Value;

/// The ring APISIX comes with: what it wrote must be read, whatever is configured here.
const DEFAULT_KEYS: [&str; 2] = ["qeddd145sfvddff3", "edd1c9f0985e76a2"];

/// The fields of plugins that APISIX encrypts, as paths inside the settings.
const APISIX: [(&str, &[&[&str]]); 19] = [
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
    ("limit-count", &[&["redis_password"], &["sentinel_password"]]),
    ("openid-connect", &[&["client_secret"], &["client_rsa_private_key"]]),
    ("rocketmq-logger", &[&["secret_key"]]),
    ("sls-logger", &[&["access_key_secret"]]),
    ("splunk-hec-logging", &[&["endpoint", "token"]]),
    ("tencent-cloud-cls", &[&["secret_key"]]),
];

/// The fields of metadata that APISIX encrypts.
const APISIX_METADATA: [(&str, &[&[&str]]); 1] = [("error-log-logger", &[&["clickhouse", "password"]])];

/// One step of the way to a secret.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Member(Box<str>),
    /// Each element of a list, or each member of an object.
    Each,
}

type Way = Vec<Step>;

/// The ways to secrets, by plugin.
type Ways = HashMap<&'static str, Vec<Way>>;

/// Where secrets are: in settings of plugins, and in their metadata.
#[derive(Default)]
struct Places {
    settings: Ways,
    metadata: Ways,
}

impl Places {
    fn apisix() -> Self {
        let ways = |listed: &[(&'static str, &[&[&str]])]| {
            let way = |way: &&[&str]| way.iter().map(|&member| Step::Member(member.into())).collect();
            listed.iter().map(|(name, all)| (*name, all.iter().map(way).collect())).collect()
        };
        Self { settings: ways(&APISIX), metadata: ways(&APISIX_METADATA) }
    }

    /// With the secrets that the schemas of these plugins mark.
    fn with(mut self, plugins: impl Iterator<Item = &'static Registration>) -> Self {
        for plugin in plugins {
            let extras = (plugin.extras)();
            let settings = [Some((plugin.schema)()), extras.consumer_schema()];
            let of = |places: &mut Ways, schema: &Value| {
                let mut found = Vec::new();
                marked(schema, schema, &mut Vec::new(), 0, &mut found);
                for way in found {
                    let ways = places.entry(plugin.name).or_default();
                    if !ways.contains(&way) {
                        ways.push(way);
                    }
                }
            };
            settings.iter().flatten().for_each(|schema| of(&mut self.settings, schema));
            extras.metadata_schema().iter().for_each(|schema| of(&mut self.metadata, schema));
        }
        self
    }

    /// What is written encrypted.
    fn written() -> &'static Self {
        static PLACES: LazyLock<Places> = LazyLock::new(|| {
            let ours = plugins::registrations().iter().filter(|plugin| absent::OURS.contains(&plugin.name));
            Places::apisix().with(ours)
        });
        &PLACES
    }

    /// What may be found encrypted.
    fn read() -> &'static Self {
        static PLACES: LazyLock<Places> =
            LazyLock::new(|| Places::apisix().with(plugins::registrations().iter()));
        &PLACES
    }
}

/// How deep a schema is followed.
const DEEPEST: usize = 32;

/// The ways to what a schema marks as secret.
fn marked(schema: &Value, root: &Value, way: &mut Way, depth: usize, found: &mut Vec<Way>) {
    if depth > DEEPEST {
        return;
    }
    if schema.get("x-encrypted") == Some(&Value::Bool(true)) {
        found.push(way.clone());
    }
    let mut along = |step: Option<Step>, next: &Value| {
        let length = way.len();
        way.extend(step);
        marked(next, root, way, depth + 1, found);
        way.truncate(length);
    };
    let reference =
        schema.get("$ref").and_then(Value::as_str).and_then(|to| root.pointer(to.strip_prefix('#')?));
    reference.into_iter().for_each(|next| along(None, next));
    for (name, next) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        along(Some(Step::Member(name.as_str().into())), next);
    }
    for name in ["items", "additionalProperties"] {
        schema.get(name).into_iter().for_each(|next| along(Some(Step::Each), next));
    }
    for name in ["anyOf", "oneOf", "allOf"] {
        let choices = schema.get(name).and_then(Value::as_array).into_iter().flatten();
        choices.for_each(|next| along(None, next));
    }
}

/// Visits the texts at the end of a way.
fn follow(value: &mut Value, way: &[Step], visit: &mut dyn FnMut(&mut String)) {
    match (way.split_first(), value) {
        (None, Value::String(text)) => visit(text),
        (Some((Step::Member(name), rest)), Value::Object(members)) => {
            members.get_mut(&**name).into_iter().for_each(|next| follow(next, rest, visit));
        }
        (Some((Step::Each, rest)), Value::Object(members)) => {
            members.values_mut().for_each(|next| follow(next, rest, visit));
        }
        (Some((Step::Each, rest)), Value::Array(list)) => {
            list.iter_mut().for_each(|next| follow(next, rest, visit));
        }
        _ => {}
    }
}

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
    pub(super) fn open(&self, key: &ResourceKey, json: &[u8]) -> Bytes {
        change(key, Places::read(), json, |text| self.decrypt(text))
    }

    /// An object for the store.
    pub(super) fn seal(&self, key: &ResourceKey, json: Vec<u8>) -> Vec<u8> {
        match &self.write {
            None => json,
            Some(cipher) => change(key, Places::written(), &json, |text| cipher.encrypt(text)).to_vec(),
        }
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

/// PEM, and names of secrets and keys that are elsewhere.
fn is_plain(text: &str) -> bool {
    text.is_empty() || ["-----", "$", "signer://"].iter().any(|start| text.starts_with(start))
}

fn change(
    key: &ResourceKey,
    places: &Places,
    json: &[u8],
    mut change: impl FnMut(&str) -> Option<String>,
) -> Bytes {
    // Most objects have no such field: they are not even parsed.
    if !may_have_secrets(key, places, json) {
        return Bytes::copy_from_slice(json);
    }
    let Ok(mut value) = serde_json::from_slice::<Value>(json) else {
        return Bytes::copy_from_slice(json);
    };
    let mut changed = false;
    each_secret(key, places, &mut value, &mut |text| {
        if let Some(other) = change(text) {
            *text = other;
            changed = true;
        }
    });
    if changed { Bytes::from(value.to_string()) } else { Bytes::copy_from_slice(json) }
}

fn may_have_secrets(key: &ResourceKey, places: &Places, json: &[u8]) -> bool {
    let contains = |text: &str| memchr::memmem::find(json, text.as_bytes()).is_some();
    match key.kind {
        Kind::Ssl => true,
        Kind::PluginMetadata => places.metadata.contains_key(&*key.id),
        _ => {
            contains("client_key")
                || (contains("plugins") && places.settings.keys().any(|name| contains(name)))
        }
    }
}

fn each_secret(key: &ResourceKey, places: &Places, value: &mut Value, visit: &mut dyn FnMut(&mut String)) {
    let way = |names: &[&str]| names.iter().map(|&name| Step::Member(name.into())).collect::<Way>();
    match key.kind {
        Kind::Ssl => {
            follow(value, &way(&["key"]), visit);
            follow(value, &[Step::Member("keys".into()), Step::Each], visit);
        }
        Kind::Upstream => follow(value, &way(&["tls", "client_key"]), visit),
        Kind::PluginMetadata => {
            let ways = places.metadata.get(&*key.id);
            ways.into_iter().flatten().for_each(|way| follow(value, way, visit));
        }
        _ => follow(value, &way(&["upstream", "tls", "client_key"]), visit),
    }
    let Some(Value::Object(plugins)) = value.get_mut("plugins") else { return };
    for (name, settings) in plugins {
        let ways = places.settings.get(name.as_str());
        ways.into_iter().flatten().for_each(|way| follow(settings, way, visit));
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
                let key_of = &ResourceKey::new(kind, "1");
                let sealed = encryption.seal(key_of, plain.to_string().into_bytes());
                let text = String::from_utf8(sealed.clone()).unwrap();
                for secret in ["PRIVATE KEY", "hush", "\"k\"", "\"x\""] {
                    assert!(!text.contains(secret), "{kind}: {text}");
                }
                for kept in ["$secret://", "not this one", "\"me\"", "\"c\""] {
                    assert_eq!(text.contains(kept), plain.to_string().contains(kept), "{kind}: {text}");
                }
                let opened: Value = serde_json::from_slice(&encryption.open(key_of, &sealed)).unwrap();
                assert_eq!(opened, plain, "{kind}");
                // An older key of the ring still reads.
                let rotated = ring(true, &["fedcba9876543210", key]);
                let opened: Value = serde_json::from_slice(&rotated.open(key_of, &sealed)).unwrap();
                assert_eq!(opened, plain, "{kind}");
            }
        }
    }

    #[test]
    fn what_apisix_wrote_with_its_own_ring_is_read() {
        // openssl enc -aes-128-cbc -K 65646431633966303938356537366132 -iv 65646431633966303938356537366132 -base64
        let value = json!({"username": "jack", "plugins": {"key-auth": {"key": "RjeV6km+KxQJN2rfu8Y7aA=="}}})
            .to_string();
        let opened = Encryption::default().open(&ResourceKey::new(Kind::Consumer, "jack"), value.as_bytes());
        let opened: Value = serde_json::from_slice(&opened).unwrap();
        assert_eq!(opened.pointer("/plugins/key-auth/key").unwrap(), "auth-one");
    }

    #[test]
    fn what_is_not_encrypted_stays() {
        let encryption = Encryption::default();
        let consumer = &ResourceKey::new(Kind::Consumer, "jack");
        for text in ["k", "MTIzNDU2Nzg5MDEyMzQ1Ng==", "", "$env://KEY", "signer://main/shop", "not base64!"] {
            let value = json!({"plugins": {"key-auth": {"key": text}}}).to_string();
            assert_eq!(encryption.open(consumer, value.as_bytes()), value.as_bytes(), "{text}");
        }
        let ssl = &ResourceKey::new(Kind::Ssl, "1");
        let plain = object(Kind::Ssl).to_string();
        assert_eq!(
            ring(false, &["0123456789abcdef"]).seal(ssl, plain.clone().into_bytes()),
            plain.into_bytes()
        );
        assert_eq!(encryption.open(ssl, b"{oops"), b"{oops".as_slice());
    }

    #[test]
    fn what_apisix_would_not_decrypt_is_written_as_it_is_and_read_either_way() {
        let encryption = ring(true, &["0123456789abcdef"]);
        let cipher = encryption.write.clone().unwrap();
        let route = |settings: Value| (Kind::Route, "1", json!({"uri": "/", "plugins": settings}));
        let metadata = |name: &'static str, metadata: Value| (Kind::PluginMetadata, name, metadata);
        // (object, where its secret is, whether it is written encrypted)
        let cases = [
            (
                route(json!({"limit-count": {"redis_password": "s"}})),
                "/plugins/limit-count/redis_password",
                true,
            ),
            (
                route(json!({"limit-count": {"sentinel_password": "s"}})),
                "/plugins/limit-count/sentinel_password",
                true,
            ),
            (
                route(json!({"limit-req": {"redis_password": "s"}})),
                "/plugins/limit-req/redis_password",
                false,
            ),
            (
                route(json!({"openid-connect": {"session": {"secret": "s"}}})),
                "/plugins/openid-connect/session/secret",
                false,
            ),
            (
                route(json!({"kafka-logger": {"brokers": [{}, {"sasl_config": {"password": "s"}}]}})),
                "/plugins/kafka-logger/brokers/1/sasl_config/password",
                false,
            ),
            // Of ours alone, so that no APISIX reads it.
            (
                route(json!({"jwt-issue": {"keys": [{"private_key": "-----BEGIN"}]}})),
                "/plugins/jwt-issue/keys/0/private_key",
                true,
            ),
            (metadata("jwt-issue", json!({"keys": [{"private_key": "s"}]})), "/keys/0/private_key", true),
            (
                metadata("error-log-logger", json!({"clickhouse": {"password": "s"}})),
                "/clickhouse/password",
                true,
            ),
        ];
        for ((kind, id, plain), place, encrypted) in cases {
            let key = &ResourceKey::new(kind, id);
            let sealed = encryption.seal(key, plain.to_string().into_bytes());
            let stored: Value = serde_json::from_slice(&sealed).unwrap();
            assert_eq!(stored.pointer(place) != plain.pointer(place), encrypted, "{place}: {stored}");
            let mut other = plain.clone();
            let text = other.pointer_mut(place).unwrap();
            *text = cipher.encrypt(text.as_str().unwrap()).unwrap().into();
            for stored in [stored, other] {
                let opened = encryption.open(key, stored.to_string().as_bytes());
                assert_eq!(serde_json::from_slice::<Value>(&opened).unwrap(), plain, "{place}");
            }
        }
    }
}
