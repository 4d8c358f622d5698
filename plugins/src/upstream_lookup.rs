//! `upstream-lookup`: chooses upstream and path from a lookup table, by a key of the request. An extension; APISIX has
//! no such plugin.
//!
//! Phase: around the upstream call, so that authentication and limits come first and `traffic-split` cannot undo the
//! choice. A key without an entry is answered with 404, a table that is not complete with 503: it is never guessed.

use std::sync::Arc;

use config::Id;
use config::error::ConfigError;
use config::fields::WideText;
use config::template::Template;
use http::uri::PathAndQuery;
use layers::error::Fault;
use layers::exchange::{Exchange, State};
use layers::lookup::{Table, Target};
use layers::plugin::{Around, BuildEnv, Definition, Hooks, Next};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::support::uri;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The id of the lookup table.
    table: Id,
    /// The key to look up, with variables: `$uri_param_id`, `$http_x_cluster`.
    key: WideText<1, 256>,
    /// The path to ask for, with variables; a query may follow, and the client's query stays behind it. The `uri` of
    /// the entry goes before it. Without both the path stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uri: Option<WideText<1, 4096>>,
    /// The key of the entry for requests whose own key has none. Without it they are answered with 404.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    default_key: Option<WideText<1, 256>>,
}

/// The plugin.
pub struct UpstreamLookup {
    table: Arc<Table>,
    key: Template,
    target: Option<Target>,
    default_key: Option<Box<str>>,
}

impl Definition for UpstreamLookup {
    const NAME: &'static str = "upstream-lookup";
    const PRIORITY: i32 = 960;
    const PLACEMENT: layers::plugin::Placement = layers::plugin::Placement::Edge("lookup tables are resources of the edge; write the endpoints on the service");
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if Template::parse(&config.key).is_literal() {
            let problem = "the key is the same for every request: write a variable, like `$uri_param_id`";
            errors.push(ConfigError::invalid("/key", problem));
        }
        if config.uri.as_ref().is_some_and(|uri| !uri.starts_with('/')) {
            errors.push(ConfigError::invalid("/uri", "a path begins with `/`"));
        }
        errors
    }

    fn build(config: Config, env: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let id = config.table.as_str();
        hooks.around(&Arc::new(Self {
            // The table may come later than the route: until then its requests are answered with 503.
            table: env.carry.get_or(&Table::carried(id), || Table::new(id)),
            key: Template::parse(&config.key),
            target: config.uri.as_deref().map(Target::parse),
            default_key: config.default_key.as_deref().map(Into::into),
        }));
        Ok(())
    }
}

impl Around for UpstreamLookup {
    async fn around(&self, mut x: Exchange, next: Next) -> Result<Exchange, Fault> {
        let found = self.table.find(&self.key.to_text(&*x));
        let found = match (found, &self.default_key) {
            (Err(unknown), Some(key)) if unknown.reason().status() == http::StatusCode::NOT_FOUND => {
                self.table.find(key)
            }
            (found, _) => found,
        };
        let entry = match found {
            Ok(entry) => entry,
            Err(error) => return Err(Fault { exchange: x, error }),
        };
        let cluster = match self.table.cluster(&entry).await {
            Ok(cluster) => cluster,
            Err(error) => return Err(Fault { exchange: x, error }),
        };
        x.chosen = Some(cluster);
        if let Some(target) = entry.target().or(self.target.as_ref()) {
            x.forward.uri = render(target, &x);
        }
        next.run(x).await
    }
}

fn render(target: &Target, x: &State) -> Option<PathAndQuery> {
    let path = target.path.to_text(x);
    let query = target.query.as_ref().map(|query| query.to_text(x));
    uri::target(path.as_bytes(), query.as_deref().map(str::as_bytes), x)
}

#[cfg(test)]
mod tests {
    use config::lookup_table::LookupEntry;
    use layers::error::Reason;
    use layers::lookup::{Entry, Origin, Parts};
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::{Value, json};

    use super::*;

    fn entry(key: &str, fields: Value) -> Arc<Entry> {
        let written: LookupEntry = serde_json::from_value(fields).unwrap();
        Entry::new(&Arc::from(key), &Arc::new(written), Parts::default())
    }

    #[tokio::test]
    async fn what_cannot_be_looked_up_is_answered_with_its_reason() {
        let env = TestEnv::default();
        let settings = json!({"table": "t", "key": "$http_x_id"});
        let mut chain = env.chain::<UpstreamLookup, _>(&settings, |_| Ok(())).unwrap();
        let mut x = chain.run(exchange("GET", "http://a/").header("x-id", "1").build()).await;
        assert_eq!((x.status(), x.reason()), (503, Some(Reason::LookupNotReady)));
        assert!(!text(&mut x).await.contains("lookup"), "what is missing is no business of clients");
        // An upstream that is not there; the table is the one that the plugin has.
        let table = env.carry.get_or(&Table::carried("t"), || Table::new("t"));
        table.put(Origin::Object, &"1".into(), Some(entry("1", json!({"upstream_id": "none"}))));
        let x = chain.run(exchange("GET", "http://a/").header("x-id", "1").build()).await;
        assert_eq!((x.status(), x.reason()), (502, Some(Reason::UpstreamMissing)));
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused_at_their_place() {
        for (settings, place) in [
            (json!({"table": "t", "key": "fixed"}), "/key"),
            (json!({"table": "t", "key": "$host", "uri": "x"}), "/uri"),
            (json!({"table": "a b", "key": "$host"}), "/table"),
            (json!({"key": "$host"}), ""),
            (json!({"table": "t", "key": "$host", "default": "x"}), "/default"),
        ] {
            let errors = TestEnv::default().build::<UpstreamLookup>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, place, "{settings} {errors:?}");
        }
    }

    #[test]
    fn paths_are_made_of_variables_and_escaped_once() {
        let x = exchange("GET", "http://a/?q=1").header("x-rest", "b c%/d").build();
        for (source, target) in [
            ("/k/$http_x_rest", "/k/b%20c%25/d?q=1"),
            ("/k?x=$http_x_rest", "/k?x=b%20c%/d&q=1"),
            ("/k", "/k?q=1"),
        ] {
            assert_eq!(render(&Target::parse(source), &x).unwrap().as_str(), target, "{source}");
        }
    }
}
