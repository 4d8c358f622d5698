//! `acl`: lets in, or keeps out, whoever has certain labels: a consumer, or a user that an identity provider knows.
//!
//! Phase: `access`. `deny_labels` goes first. Labels that cannot be read as they should are a refusal, whereas APISIX
//! takes them for none. Of JSONPath there are names and numbers, `$.realm.groups[0]`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use config::error::ConfigError;
use config::fields::{Int, List, WideText};
use http::StatusCode;
use layers::exchange::Exchange;
use layers::plugin::{Access, BuildEnv, Definition, Flow, Hooks};
use regex::bytes::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::consumer::ExternalUser;
use crate::support::reply::{self, Canned};

/// Labels and the values of which one is enough.
type Labels = BTreeMap<String, List<String>>;

/// Settings.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the labels of a user of an identity provider stand, as a JSONPath of names and numbers.
    #[serde(default = "groups")]
    external_user_label_field: WideText<1, 1024>,
    /// The label that these values are; the path itself where nothing is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    external_user_label_field_key: Option<WideText<1, 1024>>,
    /// How these values are written. Where nothing is written it is found out: a list, a list as JSON text, values
    /// with commas between them, one value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    external_user_label_field_parser: Option<Parser>,
    /// What stands between values of `segmented_text`: a regular expression. White space around it does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    external_user_label_field_separator: Option<WideText<1, 1024>>,
    /// Who has one of these labels is let in; all others are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1))]
    allow_labels: Option<Labels>,
    /// Who has one of these labels is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1))]
    deny_labels: Option<Labels>,
    /// The status of a refusal.
    #[serde(default)]
    rejected_code: Int<200, 599, 403>,
    /// The message of a refusal.
    #[serde(default = "rejected_msg")]
    rejected_msg: String,
}

fn groups() -> WideText<1, 1024> {
    #[expect(clippy::expect_used, reason = "a constant within its limits")]
    WideText::new("groups").expect("6 characters")
}

fn rejected_msg() -> String {
    "The consumer is forbidden.".into()
}

/// How the values of a label are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Parser {
    /// Text with something between the values.
    SegmentedText,
    /// A list as JSON text.
    Json,
    /// A list.
    Table,
}

/// The plugin.
pub struct Acl {
    path: Vec<Step>,
    label: Box<str>,
    reading: Reading,
    allow: Option<Labels>,
    deny: Labels,
    nobody: Canned,
    refusal: Canned,
}

/// How labels of external users are read.
enum Reading {
    Guessed,
    Json,
    Table,
    Segmented(Regex),
}

/// One step of a path.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Name(Box<str>),
    Number(usize),
}

/// Reads `groups`, `$.realm.groups[0]`, `$['a b']`.
fn path(text: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = text.strip_prefix('$').unwrap_or(text);
    // The first name may stand without a dot when there is no dollar sign.
    let mut dotless = rest.len() == text.len();
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let (index, after) = inner.split_once(']')?;
            let quoted = ['\'', '"'].iter().find_map(|quote| index.strip_prefix(*quote)?.strip_suffix(*quote));
            steps.push(match quoted {
                Some(name) => Step::Name(name.into()),
                None => Step::Number(index.parse().ok()?),
            });
            rest = after;
        } else {
            let after = if dotless { rest } else { rest.strip_prefix('.')? };
            let end = after.find(['.', '[']).unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            if name.is_empty() || name.contains(['*', '?', ' ']) {
                return None;
            }
            steps.push(Step::Name(name.into()));
            rest = after;
        }
        dotless = false;
    }
    (!steps.is_empty()).then_some(steps)
}

impl Definition for Acl {
    const NAME: &'static str = "acl";
    const PRIORITY: i32 = 2410;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if path(&config.external_user_label_field).is_none() {
            let words = "write a path of names and numbers: `groups`, `$.realm.groups`, `$.teams[0]`";
            errors.push(ConfigError::invalid("/external_user_label_field", words));
        }
        errors.extend(reading(config).err());
        if config.allow_labels.is_none() && config.deny_labels.is_none() {
            errors.push(ConfigError::invalid("", "write `allow_labels` or `deny_labels`"));
        }
        for (place, labels) in [("/allow_labels", &config.allow_labels), ("/deny_labels", &config.deny_labels)] {
            if labels.as_ref().is_some_and(Labels::is_empty) {
                errors.push(ConfigError::invalid(place, "write at least one label"));
            }
        }
        errors
    }

    fn build(config: Config, _: &BuildEnv<'_>, hooks: &mut Hooks) -> Result<(), ConfigError> {
        let reading = reading(&config)?;
        let field = &*config.external_user_label_field;
        hooks.access(&Arc::new(Self {
            path: path(field).unwrap_or_default(),
            label: config.external_user_label_field_key.as_deref().unwrap_or(field).into(),
            reading,
            allow: config.allow_labels,
            deny: config.deny_labels.unwrap_or_default(),
            nobody: Canned::message(StatusCode::UNAUTHORIZED, "Missing authentication."),
            refusal: Canned::message(reply::status(config.rejected_code.get()), &config.rejected_msg),
        }));
        Ok(())
    }
}

fn reading(config: &Config) -> Result<Reading, ConfigError> {
    Ok(match config.external_user_label_field_parser {
        None => Reading::Guessed,
        Some(Parser::Json) => Reading::Json,
        Some(Parser::Table) => Reading::Table,
        Some(Parser::SegmentedText) => {
            const PLACE: &str = "/external_user_label_field_separator";
            let separator = config.external_user_label_field_separator.as_deref();
            let separator = separator.ok_or_else(|| {
                ConfigError::invalid("", "`segmented_text` needs `external_user_label_field_separator`: add it")
            })?;
            // Alone first: what is put around it must not make a pattern of what is none.
            let pattern = config::pattern::compile(separator, false)
                .and_then(|_| config::pattern::compile(&format!(r"\s*(?:{separator})\s*"), false));
            Reading::Segmented(pattern.map_err(|error| ConfigError::invalid(PLACE, error.to_string()))?)
        }
    })
}

impl Access for Acl {
    fn access(&self, x: &mut Exchange) -> Flow {
        let lets_in = if let Some(consumer) = &x.consumer {
            self.lets_in(|name| {
                let (_, value) = consumer.labels.iter().find(|(label, _)| **label == *name)?;
                Some(Reading::Guessed.text(value))
            })
        } else if let Some(user) = x.slot::<ExternalUser>() {
            let (first, rest) = self.path.split_first().unzip();
            let value = match first {
                Some(Step::Name(name)) => user.0.get(&**name).and_then(|value| at(value, rest.unwrap_or_default())),
                // A user has names, no numbers.
                Some(Step::Number(_)) | None => None,
            };
            self.lets_in(|name| value.filter(|_| name == &*self.label).map(|value| self.reading.values(value)))
        } else {
            return self.nobody.flow();
        };
        if lets_in { Flow::Next } else { self.refusal.flow() }
    }
}

/// The values of a label; nothing if it is not written as it should be.
type Values<'a> = Option<Vec<Cow<'a, [u8]>>>;

impl Acl {
    /// What `label` says of the label of a name decides; it says nothing of those that there are not.
    fn lets_in<'a>(&self, label: impl Fn(&str) -> Option<Values<'a>>) -> bool {
        let has = |values: &[Cow<'_, [u8]>], wanted: &[String]| {
            wanted.iter().any(|wanted| values.iter().any(|value| **value == *wanted.as_bytes()))
        };
        let is_denied = self.deny.iter().any(|(name, wanted)| match label(name) {
            None => false,
            Some(None) => true,
            Some(Some(values)) => has(&values, wanted),
        });
        let is_allowed = |allow: &Labels| {
            allow.iter().any(|(name, wanted)| label(name).flatten().is_some_and(|values| has(&values, wanted)))
        };
        !is_denied && self.allow.as_ref().is_none_or(is_allowed)
    }
}

impl Reading {
    fn values<'a>(&self, value: &'a Value) -> Values<'a> {
        match (self, value) {
            (Self::Guessed | Self::Table, Value::Array(list)) => {
                let texts = list.iter().filter_map(Value::as_str);
                Some(texts.map(|text| Cow::Borrowed(text.as_bytes())).collect())
            }
            (Self::Guessed | Self::Json | Self::Segmented(_), Value::String(text)) => self.text(text),
            _ => None,
        }
    }

    fn text<'a>(&self, text: &'a str) -> Values<'a> {
        match self {
            Self::Table => None,
            Self::Segmented(separator) => Some(separator.split(text.as_bytes()).map(Cow::Borrowed).collect()),
            Self::Guessed if !text.starts_with('[') => {
                Some(text.split(',').map(|part| Cow::Borrowed(part.trim().as_bytes())).collect())
            }
            Self::Json | Self::Guessed => {
                let list: Vec<Value> = serde_json::from_str(text).ok()?;
                let texts = list.into_iter().filter_map(|value| match value {
                    Value::String(text) => Some(Cow::Owned(text.into_bytes())),
                    _ => None,
                });
                Some(texts.collect())
            }
        }
    }
}

/// What stands at the end of a path.
fn at<'a>(value: &'a Value, path: &[Step]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, step| match step {
        Step::Name(name) => value.get(&**name),
        Step::Number(number) => value.get(number),
    })
}

#[cfg(test)]
mod tests {
    use layers::consumer::Consumer;
    use layers::testing::{TestEnv, exchange, text};
    use serde_json::json;

    use super::*;

    async fn run(config: &Value, who: impl FnOnce(&mut Exchange)) -> Exchange {
        let mut x = exchange("GET", "http://a/").build();
        who(&mut x);
        TestEnv::default().chain::<Acl, _>(config, |_| Ok(())).unwrap().run(x).await
    }

    fn labelled(labels: &[(&str, &str)]) -> Arc<Consumer> {
        let labels = labels.iter().map(|(name, value)| (Box::from(*name), Box::from(*value))).collect();
        Arc::new(Consumer { labels, ..Consumer::new("jack") })
    }

    #[tokio::test]
    async fn labels_of_a_consumer_decide() {
        type Labelled<'a> = (&'a Value, &'a [(&'a str, &'a str)], u16);
        let allow = json!({"allow_labels": {"org": ["apache", "linux"], "team": ["a"]}});
        let deny = json!({"deny_labels": {"org": ["opensource", "apache"]}});
        let both = json!({"allow_labels": {"org": ["apache"]}, "deny_labels": {"team": ["b"]}});
        let cases: [Labelled<'_>; 14] = [
            (&allow, &[("org", "apache")], 200),
            (&allow, &[("org", "other"), ("team", "a")], 200),
            (&allow, &[("org", "other")], 403),
            (&allow, &[("org", "apache,other")], 200),
            (&allow, &[("org", "[\"other\",\"apache\"]")], 200),
            (&allow, &[("org", "[\"other\"")], 403),
            (&allow, &[], 403),
            (&deny, &[("org", "apache")], 403),
            (&deny, &[("org", "other,opensource")], 403),
            (&deny, &[("org", "apache2")], 200),
            (&deny, &[("org", "[broken")], 403),
            (&deny, &[], 200),
            (&both, &[("org", "apache"), ("team", "b")], 403),
            (&both, &[("org", "apache"), ("team", "c")], 200),
        ];
        for (config, labels, status) in cases {
            let x = run(config, |x| x.consumer = Some(labelled(labels))).await;
            assert_eq!(x.status(), status, "{config} {labels:?}");
        }
    }

    #[tokio::test]
    async fn labels_of_an_external_user_decide() {
        let allow = |more: Value| {
            let mut config = json!({"allow_labels": {"team": ["a"]}, "external_user_label_field_key": "team"});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        let cases = [
            ("the default path", allow(json!({})), json!({"groups": ["a", "b"]}), 200),
            ("none of them", allow(json!({})), json!({"groups": ["b", 7]}), 403),
            ("no such field", allow(json!({})), json!({"team": ["a"]}), 403),
            ("a path", allow(json!({"external_user_label_field": "$.r['x y'][1].g"})),
             json!({"r": {"x y": [0, {"g": "a"}]}}), 200),
            ("text with semicolons", allow(json!({"external_user_label_field_parser": "segmented_text",
                "external_user_label_field_separator": ";|\\|"})), json!({"groups": "b ; c|a"}), 200),
            ("the text as a whole", allow(json!({"external_user_label_field_parser": "segmented_text",
                "external_user_label_field_separator": ";"})), json!({"groups": "b,a"}), 403),
            ("JSON", allow(json!({"external_user_label_field_parser": "json"})), json!({"groups": "[\"a\"]"}), 200),
            ("no JSON", allow(json!({"external_user_label_field_parser": "json"})), json!({"groups": "a"}), 403),
            ("a list", allow(json!({"external_user_label_field_parser": "table"})), json!({"groups": ["a"]}), 200),
            ("no list", allow(json!({"external_user_label_field_parser": "table"})), json!({"groups": "a"}), 403),
            ("a denied group that cannot be read", json!({"deny_labels": {"groups": ["a"]}}),
             json!({"groups": {"a": true}}), 403),
            ("the path is the label", json!({"deny_labels": {"groups": ["a"]}}), json!({"groups": "b"}), 200),
        ];
        for (name, config, user, status) in cases {
            let user = user.as_object().unwrap().clone();
            let x = run(&config, |x| x.put_slot(ExternalUser(user.into()))).await;
            assert_eq!(x.status(), status, "{name}");
        }
    }

    #[tokio::test]
    async fn a_refusal_has_its_words() {
        let config = json!({"deny_labels": {"org": ["a"]}});
        let mut x = run(&config, |_| {}).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"Missing authentication.\"}\n");
        assert_eq!(x.status(), 401);
        let mut x = run(&config, |x| x.consumer = Some(labelled(&[("org", "a")]))).await;
        assert_eq!(text(&mut x).await, "{\"message\":\"The consumer is forbidden.\"}\n");
        let own = json!({"deny_labels": {"org": ["a"]}, "rejected_code": 418, "rejected_msg": "no"});
        let mut x = run(&own, |x| x.consumer = Some(labelled(&[("org", "a")]))).await;
        assert_eq!((x.status(), text(&mut x).await), (418, "{\"message\":\"no\"}\n".to_owned()));
    }

    #[test]
    fn a_path_is_made_of_names_and_numbers() {
        let name = |name: &str| Step::Name(name.into());
        assert_eq!(path("groups"), Some(vec![name("groups")]));
        assert_eq!(path("a.b[0]"), Some(vec![name("a"), name("b"), Step::Number(0)]));
        assert_eq!(path("$.a[\"b.c\"]['d']"), Some(vec![name("a"), name("b.c"), name("d")]));
        for wrong in ["", "$", "$..a", "$.a[*]", "$.*", "a b", "$a", "$.a[", "$.a[x]", ".", "a..b", "$.a[?(@.b)]"] {
            assert_eq!(path(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn settings_are_checked() {
        let with = |more: Value| {
            let mut config = json!({"deny_labels": {"a": ["b"]}});
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config
        };
        for (settings, pointer) in [
            (json!({}), ""),
            (json!({"allow_labels": {}}), "/allow_labels"),
            (json!({"deny_labels": {"a": []}}), "/deny_labels/a"),
            (with(json!({"external_user_label_field": "$..a"})), "/external_user_label_field"),
            (with(json!({"external_user_label_field_parser": "segmented_text"})), ""),
            (with(json!({"external_user_label_field_parser": "segmented_text",
                "external_user_label_field_separator": "("})), "/external_user_label_field_separator"),
            (with(json!({"external_user_label_field_parser": "segmented_text",
                "external_user_label_field_separator": "a)|(b"})), "/external_user_label_field_separator"),
            (with(json!({"rejected_code": 99})), "/rejected_code"),
        ] {
            let errors = TestEnv::default().build::<Acl>(&settings).unwrap_err();
            assert_eq!(errors[0].pointer, pointer, "{settings}: {errors:?}");
        }
    }
}
