//! `attach-consumer-label`: tells the upstream what labels the consumer has.
//!
//! Phase: `before_proxy`. The fields are the gateway's alone: what a client wrote into them goes, also where there is no
//! consumer, and where it has no such label.

use std::collections::BTreeMap;
use std::sync::Arc;

use config::error::ConfigError;
use http::{HeaderName, HeaderValue};
use layers::exchange::Exchange;
use layers::plugin::{BeforeProxy, BuildEnv, Definition, Flow, Hooks};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::headers;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Names of header fields, and the label that each tells: `{"X-Department": "$department"}`.
    #[schemars(extend("minProperties" = 1, "additionalProperties" = {"type": "string", "pattern": r"^\$.*"}))]
    headers: BTreeMap<String, String>,
}

/// The plugin.
pub struct AttachConsumerLabel {
    fields: Vec<(HeaderName, Box<str>)>,
}

/// The fields and their labels.
fn fields(config: &Config) -> Vec<Result<(HeaderName, Box<str>), ConfigError>> {
    let field = |(name, label): (&String, &String)| {
        let header = headers::name(name, "/headers")?;
        let label = label.strip_prefix('$').ok_or_else(|| {
            let place = format!("/headers/{}", config::error::escape(name));
            ConfigError::invalid(place, "write `$` and the name of a label")
        })?;
        Ok((header, label.into()))
    };
    config.headers.iter().map(field).collect()
}

impl Definition for AttachConsumerLabel {
    const NAME: &'static str = "attach-consumer-label";
    const PRIORITY: i32 = 2399;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::NEEDS_CONSUMERS;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let none = config.headers.is_empty();
        let none = none.then(|| ConfigError::invalid("/headers", "write at least one field"));
        none.into_iter().chain(fields(config).into_iter().filter_map(Result::err)).collect()
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let fields = fields(&config).into_iter().collect::<Result<_, _>>()?;
        hooks.before_proxy(&Arc::new(Self { fields }));
        Ok(())
    }
}

impl BeforeProxy for AttachConsumerLabel {
    fn before_proxy(&self, x: &mut Exchange) -> Flow {
        let consumer = x.consumer.clone();
        for (name, label) in &self.fields {
            let value = consumer.as_ref().and_then(|consumer| {
                let (_, value) = consumer.labels.iter().find(|(key, _)| key == label)?;
                HeaderValue::from_bytes(value.as_bytes()).ok()
            });
            headers::set(&mut x.request.headers, name, value);
        }
        Flow::Next
    }
}

#[cfg(test)]
mod tests {
    use layers::consumer::Consumer;
    use layers::testing::{TestEnv, exchange};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn labels_go_into_fields_that_clients_cannot_write() {
        let config = json!({"headers": {"X-Department": "$department", "X-Company": "$company"}});
        let labels: Arc<[(Box<str>, Box<str>)]> = Arc::from([("department".into(), "devops".into())]);
        let labelled = Consumer { labels, ..Consumer::new("jack") };
        for (name, consumer, department) in [
            ("a consumer with the label", Some(labelled), Some("devops")),
            ("a consumer without labels", Some(Consumer::new("jill")), None),
            ("no consumer", None, None),
        ] {
            let mut chain = TestEnv::default()
                .chain::<AttachConsumerLabel, _>(&config, |x| {
                    layers::chain::before_proxy(x);
                    Ok(())
                })
                .unwrap();
            let spoofed = exchange("GET", "http://a/").header("x-department", "boss").header("x-company", "acme");
            let mut x = spoofed.build();
            x.consumer = consumer.map(Arc::new);
            let x = chain.run(x).await;
            let got = x.request.headers.get("x-department").map(|value| value.to_str().unwrap());
            assert_eq!(got, department, "{name}");
            assert!(!x.request.headers.contains_key("x-company"), "{name}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        for (settings, pointer) in [
            (json!({}), ""),
            (json!({"headers": {}}), "/headers"),
            (json!({"headers": {"X-A": "a"}}), "/headers/X-A"),
            (json!({"headers": {"X A": "$a"}}), "/headers/X A"),
        ] {
            let errors = TestEnv::default().build::<AttachConsumerLabel>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
    }
}
