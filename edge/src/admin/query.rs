//! The query of an Admin request, and what it says about lists: pages and filters.
//!
//! Filters look at single objects as they are stored. Only objects that pass are counted, and only those of
//! the page are read out whole.

use percent_encoding::percent_decode_str;
use regex::Regex;
use serde_json::Value;

/// Names and values, percent-decoded, `+` being a space.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// The query of a URI, without the question mark.
    #[must_use]
    pub fn parse(query: &str) -> Query {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        });
        Query(pairs.collect())
    }

    /// The first value of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether the value of a name is exactly `true`.
    #[must_use]
    pub fn is_true(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

/// What is wrong with a query: the body of the 400.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadQuery {
    /// A plain text, as APISIX writes it.
    Text(&'static str),
    /// The text of `error_msg`.
    Message(String),
}

/// Which objects of a list are wanted.
#[derive(Debug, Default)]
pub struct Filter {
    name: Option<Regex>,
    label: Option<String>,
    uri: Option<Regex>,
    fields: Vec<(String, String)>,
}

/// Fields that `filter=` may name.
const FIELDS: [&str; 2] = ["service_id", "upstream_id"];

impl Filter {
    /// The filters of a query: `name` and `uri` (regular expressions), `label` (a key), and `filter`, which is
    /// a query itself, encoded. `by_field` says whether the kind knows the last.
    ///
    /// # Errors
    /// If an expression cannot be read.
    pub fn parse(query: &Query, by_field: bool) -> Result<Filter, BadQuery> {
        let expression = |argument: &str| match query.get(argument) {
            None => Ok(None),
            Some(text) => Regex::new(text).map(Some).map_err(|error| {
                let error = error.to_string();
                let reason =
                    error.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
                BadQuery::Message(format!("invalid argument {argument}: {reason}"))
            }),
        };
        let mut filter = Filter {
            name: expression("name")?,
            label: query.get("label").map(str::to_owned),
            uri: expression("uri")?,
            fields: Vec::new(),
        };
        if by_field && let Some(inner) = query.get("filter") {
            let Query(pairs) = Query::parse(inner);
            filter.fields = pairs.into_iter().filter(|(name, _)| FIELDS.contains(&name.as_str())).collect();
        }
        Ok(filter)
    }

    /// Whether every object passes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.name.is_none() && self.label.is_none() && self.uri.is_none() && self.fields.is_empty()
    }

    /// Whether the object passes all filters.
    #[must_use]
    pub fn passes(&self, value: &Value) -> bool {
        let text = |field: &str| value.get(field).and_then(Value::as_str);
        let name = || self.name.as_ref().is_none_or(|name| text("name").is_some_and(|is| name.is_match(is)));
        let label = || {
            self.label.as_ref().is_none_or(|key| value.get("labels").is_some_and(|is| is.get(key).is_some()))
        };
        let uri = || {
            self.uri.as_ref().is_none_or(|uri| {
                let uris = value.get("uris").and_then(Value::as_array).into_iter().flatten();
                let mut all = text("uri").into_iter().chain(uris.filter_map(Value::as_str));
                all.any(|is| uri.is_match(is))
            })
        };
        let fields = || {
            self.fields.iter().all(|(field, wanted)| match value.get(field) {
                Some(Value::String(id)) => id == wanted,
                Some(Value::Number(id)) => id.to_string() == *wanted,
                _ => false,
            })
        };
        name() && label() && uri() && fields()
    }
}

/// One page of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// From 1.
    pub number: usize,
    /// 10 to 500.
    pub size: usize,
}

impl Page {
    /// The page a query asks for; none unless both `page` and `page_size` are numbers.
    ///
    /// # Errors
    /// If the size is outside its limits.
    pub fn parse(query: &Query) -> Result<Option<Page>, BadQuery> {
        let number = |name: &str| query.get(name).and_then(|text| text.parse::<f64>().ok());
        let (Some(page), Some(size)) = (number("page"), number("page_size")) else { return Ok(None) };
        if !(10.0..=500.0).contains(&size) {
            return Err(BadQuery::Text("page_size must be between 10 and 500"));
        }
        // Floats saturate: a page beyond all numbers is an empty one.
        Ok(Some(Page { number: (page as usize).max(1), size: size as usize }))
    }

    /// The part of a list that is on the page.
    pub fn of<T>(self, list: Vec<T>) -> Vec<T> {
        list.into_iter().skip((self.number - 1).saturating_mul(self.size)).take(self.size).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    #[test]
    fn names_and_values_are_decoded() {
        let query = Query::parse("a=1&b=x%26y+z&c&=&a=2&filter=service_id%3D1%26upstream_id%3D2");
        assert_eq!(query.get("a"), Some("1"));
        assert_eq!(query.get("b"), Some("x&y z"));
        assert_eq!(query.get("c"), Some(""));
        assert_eq!(query.get("d"), None);
        assert_eq!(query.get("filter"), Some("service_id=1&upstream_id=2"));
    }

    #[test]
    fn filters() {
        let route = json!({"name": "shop-eu", "labels": {"env": "dev"}, "uri": "/a/b", "service_id": "1", "upstream_id": 2});
        let other = json!({"uris": ["/x", "/a"]});
        for (query, passes, other_passes) in [
            ("", true, true),
            ("name=^shop", true, false),
            ("name=eu$", true, false),
            ("name=US", false, false),
            ("label=env", true, false),
            ("label=dev", false, false),
            ("uri=%2Fa", true, true),
            ("uri=b$", true, false),
            ("filter=service_id%3D1", true, false),
            ("filter=upstream_id%3D2", true, false),
            ("filter=upstream_id%3D2%26service_id%3D9", false, false),
            ("filter=nothing%3D2", true, true),
            ("name=shop&label=none", false, false),
        ] {
            let filter = Filter::parse(&Query::parse(query), true).unwrap();
            assert_eq!((filter.passes(&route), filter.passes(&other)), (passes, other_passes), "{query}");
        }
        assert!(matches!(Filter::parse(&Query::parse("name=("), true), Err(BadQuery::Message(_))));
    }

    #[test]
    fn pages() {
        let list: Vec<usize> = (0..25).collect();
        for (query, expected) in [
            ("page=1&page_size=10", Ok(Some(0..10))),
            ("page=3&page_size=10", Ok(Some(20..25))),
            ("page=4&page_size=10", Ok(Some(0..0))),
            ("page=0&page_size=10", Ok(Some(0..10))),
            ("page=1e300&page_size=10", Ok(Some(0..0))),
            ("page=1", Ok(None)),
            ("page=x&page_size=10", Ok(None)),
            ("page=1&page_size=9", Err(BadQuery::Text("page_size must be between 10 and 500"))),
            ("page=1&page_size=501", Err(BadQuery::Text("page_size must be between 10 and 500"))),
            ("page=1&page_size=NaN", Err(BadQuery::Text("page_size must be between 10 and 500"))),
        ] {
            let page = Page::parse(&Query::parse(query)).map(|page| page.map(|page| page.of(list.clone())));
            assert_eq!(page, expected.map(|range| range.map(Iterator::collect)), "{query}");
        }
    }
}
