//! What authentication leaves on a request: the consumer, and the fields that tell the upstream who calls.

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use layers::consumer::Consumer;
use layers::exchange::Exchange;
use serde_json::{Map, Value};

const USERNAME: HeaderName = HeaderName::from_static("x-consumer-username");
const CREDENTIAL: HeaderName = HeaderName::from_static("x-credential-identifier");
const CUSTOM_ID: HeaderName = HeaderName::from_static("x-consumer-custom-id");

/// What an identity provider says of whoever calls: the claims of a token, an answer of its user endpoint. A plugin that
/// recognises users without consumers keeps it on the exchange.
pub struct ExternalUser(pub Arc<Map<String, Value>>);

/// Makes `consumer` the request's. What a client wrote into these fields goes in any case.
pub fn attach(x: &mut Exchange, consumer: Arc<Consumer>) {
    let fields = [
        (USERNAME, Some(&consumer.name)),
        (CREDENTIAL, consumer.credential_id.as_ref()),
        (CUSTOM_ID, consumer.custom_id.as_ref()),
    ];
    for (name, value) in fields {
        match value.and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok()) {
            Some(value) => {
                x.request.headers.insert(name, value);
            }
            None => {
                x.request.headers.remove(name);
            }
        }
    }
    x.consumer = Some(consumer);
}
