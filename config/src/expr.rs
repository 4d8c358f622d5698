//! `vars` expressions: predicates over request variables, as in routes, `_meta.filter`, `traffic-split` and loggers.
//!
//! An expression is read once into a tree of compiled comparisons (regexes, CIDRs, numbers); a request only walks it,
//! without allocation as long as variables are text. The meaning is that of lua-resty-expr, surprises included: see
//! [`Expr::parse`]. An expression that cannot be read is refused, never taken as true.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use regex::bytes::Regex;
use serde_json::Value;

use crate::error::ConfigError;
use crate::pattern::{self, PatternError};
use crate::var::{Var, Vars};

/// Nesting of logic forms; more than this is no rule a person wrote.
const DEPTH_LIMIT: usize = 32;

/// A compiled expression. The empty one is true.
#[derive(Clone, Debug, Default)]
pub struct Expr {
    root: Option<Node>,
}

/// Why an expression is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    #[error("an expression is an array like [[\"arg_name\", \"==\", \"json\"]]")]
    NotAnArray,
    #[error("a single comparison needs one more pair of brackets: [[\"arg_name\", \"==\", \"json\"]]")]
    NotWrapped,
    #[error("rule too short: {0}")]
    TooShort(&'static str),
    #[error(
        "a comparison has a variable, an optional \"!\", an operator and a value; this one has {0} elements"
    )]
    TooLong(usize),
    #[error("bad 'not' expression: of four elements the second must be \"!\"")]
    BadNot,
    #[error("the name of a variable is a string")]
    NotAName,
    #[error("invalid operator '{0}': use ==, ~=, >, >=, <, <=, ~~, ~*, in, has or ipmatch")]
    UnknownOperator(String),
    #[error("~~ and ~* compare with a pattern, which is a string")]
    NotAPattern,
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error("invalid ip address: give an address, a CIDR, or an array of them")]
    NoAddress,
    #[error("invalid ip address '{0}'")]
    BadAddress(String),
    #[error("nested deeper than {DEPTH_LIMIT} levels")]
    TooDeep,
}

#[derive(Clone, Debug)]
enum Node {
    Logic { form: Form, nodes: Box<[Node]> },
    Compare(Box<Comparison>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    And,
    Or,
    NotAnd,
    NotOr,
}

#[derive(Clone, Debug)]
struct Comparison {
    var: Var,
    negated: bool,
    test: Test,
    /// The comparison as written, for `postern explain`.
    source: Box<str>,
}

/// An operator with its right side, ready to run.
#[derive(Clone, Debug)]
enum Test {
    Equal(Operand),
    Differ(Operand),
    Order(Order, Option<f64>),
    Match(Regex),
    In(Box<[Operand]>),
    Has(Operand),
    Address(Box<[IpNet]>),
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
}

/// A right side by its type, because equality in Lua is strict: `"1"` is not `1`.
#[derive(Clone, Debug)]
enum Operand {
    Null,
    Bool(bool),
    Number(f64),
    Text(Box<str>),
    /// Arrays and objects: equal to nothing, not even to themselves (Lua compares them by identity).
    Table,
}

impl From<&Value> for Operand {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Operand::Null,
            Value::Bool(value) => Operand::Bool(*value),
            Value::Number(number) => number.as_f64().map_or(Operand::Table, Operand::Number),
            Value::String(text) => Operand::Text(text.as_str().into()),
            Value::Array(_) | Value::Object(_) => Operand::Table,
        }
    }
}

/// A left side: text without a copy, or JSON for the few variables that have types.
enum Actual<'a> {
    Missing,
    Text(Cow<'a, str>),
    Json(Value),
}

impl<'a> Actual<'a> {
    fn of<V: Vars + ?Sized>(vars: &'a V, var: &Var) -> Self {
        if var.is_typed()
            && let Some(value) = vars.value(var)
        {
            return match value {
                Value::Null => Actual::Missing,
                Value::String(text) => Actual::Text(Cow::Owned(text)),
                value => Actual::Json(value),
            };
        }
        vars.get(var).map_or(Actual::Missing, Actual::Text)
    }

    /// As Lua's `tonumber`: text that reads as a number counts.
    fn number(&self) -> Option<f64> {
        match self {
            Actual::Text(text) => number(text),
            Actual::Json(value) => value.as_f64(),
            Actual::Missing => None,
        }
    }

    fn text(&self) -> Option<Cow<'_, str>> {
        match self {
            Actual::Missing => None,
            Actual::Text(text) => Some(Cow::Borrowed(text)),
            Actual::Json(Value::Array(_) | Value::Object(_)) => None,
            Actual::Json(value) => Some(Cow::Owned(value.to_string())),
        }
    }

    /// Strict equality, without conversion.
    fn is(&self, operand: &Operand) -> bool {
        match (self, operand) {
            (Actual::Missing, Operand::Null) => true,
            (Actual::Text(left), Operand::Text(right)) => **left == **right,
            (Actual::Json(left), operand) => same(left, operand),
            _ => false,
        }
    }
}

impl fmt::Display for Actual<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actual::Missing => f.write_str("not set"),
            Actual::Text(text) => write!(f, "{text:?}"),
            Actual::Json(value) => write!(f, "{value}"),
        }
    }
}

fn same(value: &Value, operand: &Operand) -> bool {
    match (value, operand) {
        (Value::Null, Operand::Null) => true,
        (Value::Bool(left), Operand::Bool(right)) => left == right,
        (Value::Number(left), Operand::Number(right)) => left.as_f64() == Some(*right),
        (Value::String(left), Operand::Text(right)) => **left == **right,
        _ => false,
    }
}

/// Text to number as Lua's `tonumber` does: blanks around, signs, fractions, exponents and `0x` are fine.
fn number(text: &str) -> Option<f64> {
    let text = text.trim_matches(|c: char| c.is_ascii_whitespace() || c == '\u{b}');
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        if !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let value = u64::from_str_radix(hex, 16).ok()? as f64;
        return Some(if negative { -value } else { value });
    }
    // Rust reads "inf" and "nan" too; a client that sends them means no number.
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    Some(if negative { -value } else { value })
}

impl Expr {
    /// Read an expression.
    ///
    /// `[]` is true; `[c1, c2]` is AND; `["OR", c1, c2]`, `"AND"`, `"!AND"`, `"!OR"` nest and take two or more. A
    /// comparison is `[variable, operator, value]` or `[variable, "!", operator, value]`; operators and forms ignore
    /// case. As in lua-resty-expr
    /// - a number on the right of `==` and `~=` compares numerically, anything else strictly: `"1"` is not `1`;
    /// - `>`, `>=`, `<`, `<=` need numbers on both sides and are false otherwise;
    /// - `null` stands for a missing variable: `[name, "~=", null]` holds when it is there;
    /// - `in` needs an array on the right and `has` one on the left, and both are false otherwise;
    /// - `[variable, value]` is equality with the value in lower case.
    ///
    /// # Errors
    /// If it is none of these forms. Unlike there, a pattern that does not compile and surplus elements are errors
    /// too. The pointer is inside `value`.
    pub fn parse(value: &Value) -> Result<Expr, ConfigError> {
        let Value::Array(items) = value else {
            // A Lua table may be empty without being an array.
            return match value {
                Value::Object(map) if map.is_empty() => Ok(Expr::default()),
                _ => Err(at("", ExprError::NotAnArray)),
            };
        };
        let Some(first) = items.first() else {
            return Ok(Expr::default());
        };
        if !first.is_array() && first.as_str().and_then(Form::parse).is_none() {
            return Err(at("", ExprError::NotWrapped));
        }
        let root = Node::parse(value, "", 0)?;
        Ok(Expr { root: Some(root) })
    }

    /// Whether the expression holds for the request.
    pub fn eval<V: Vars + ?Sized>(&self, vars: &V) -> bool {
        self.root.as_ref().is_none_or(|node| node.eval(vars))
    }

    /// True for every request: there is nothing to compare.
    pub fn is_always(&self) -> bool {
        self.root.is_none()
    }

    /// The variables named, in order of appearance, repetitions included.
    pub fn vars(&self) -> Vec<&Var> {
        fn collect<'a>(node: &'a Node, into: &mut Vec<&'a Var>) {
            match node {
                Node::Compare(comparison) => into.push(&comparison.var),
                Node::Logic { nodes, .. } => nodes.iter().for_each(|node| collect(node, into)),
            }
        }
        let mut names = Vec::new();
        if let Some(root) = &self.root {
            collect(root, &mut names);
        }
        names
    }

    /// Variables without which the expression cannot hold: each must have one of the texts given with it. Tells
    /// many expressions apart without evaluating them; an empty answer says nothing.
    pub fn required(&self) -> Vec<(&Var, Vec<&str>)> {
        fn collect<'a>(node: &'a Node, into: &mut Vec<(&'a Var, Vec<&'a str>)>) {
            match node {
                Node::Logic { form: Form::And, nodes } => nodes.iter().for_each(|node| collect(node, into)),
                Node::Logic { .. } => {}
                Node::Compare(comparison) => {
                    into.extend(comparison.texts().map(|texts| (&comparison.var, texts)));
                }
            }
        }
        let mut required = Vec::new();
        if let Some(root) = &self.root {
            collect(root, &mut required);
        }
        required
    }

    /// Whether the request body must be read before [`Expr::eval`] can answer.
    pub fn needs_body(&self) -> bool {
        self.vars().iter().any(|var| var.needs_body())
    }

    /// In words, the first comparison because of which the expression does not hold, with what the variable was
    /// instead; `None` when it holds.
    pub fn first_failed<V: Vars + ?Sized>(&self, vars: &V) -> Option<String> {
        let root = self.root.as_ref()?;
        if root.eval(vars) { None } else { Some(root.why(vars, false)) }
    }
}

impl Form {
    fn parse(word: &str) -> Option<Form> {
        [("AND", Form::And), ("OR", Form::Or), ("!AND", Form::NotAnd), ("!OR", Form::NotOr)]
            .into_iter()
            .find_map(|(name, form)| word.eq_ignore_ascii_case(name).then_some(form))
    }
}

impl Node {
    fn parse(value: &Value, pointer: &str, depth: usize) -> Result<Node, ConfigError> {
        let Value::Array(items) = value else {
            return Err(at(pointer, ExprError::NotAnArray));
        };
        if depth > DEPTH_LIMIT {
            return Err(at(pointer, ExprError::TooDeep));
        }
        let (form, skip) = match items.first() {
            None => return Err(at(pointer, ExprError::TooShort("it is empty"))),
            Some(Value::Array(_)) => (Form::And, 0),
            Some(Value::String(word)) => match Form::parse(word) {
                Some(form) => (form, 1),
                None => return Comparison::parse(items, pointer).map(|it| Node::Compare(Box::new(it))),
            },
            Some(_) => return Err(at(&format!("{pointer}/0"), ExprError::NotAName)),
        };
        if skip == 1 && items.len() <= 2 {
            return Err(at(pointer, ExprError::TooShort("a logic operator takes two or more comparisons")));
        }
        let nodes = items
            .iter()
            .enumerate()
            .skip(skip)
            .map(|(index, item)| Node::parse(item, &format!("{pointer}/{index}"), depth + 1))
            .collect::<Result<_, _>>()?;
        Ok(Node::Logic { form, nodes })
    }

    fn eval<V: Vars + ?Sized>(&self, vars: &V) -> bool {
        match self {
            Node::Compare(comparison) => comparison.eval(vars),
            Node::Logic { form, nodes } => match form {
                Form::And => nodes.iter().all(|node| node.eval(vars)),
                Form::Or => nodes.iter().any(|node| node.eval(vars)),
                Form::NotAnd => !nodes.iter().all(|node| node.eval(vars)),
                Form::NotOr => !nodes.iter().any(|node| node.eval(vars)),
            },
        }
    }

    /// Why the node is `outcome`; it was evaluated to that before.
    fn why<V: Vars + ?Sized>(&self, vars: &V, outcome: bool) -> String {
        let (form, nodes) = match self {
            Node::Compare(comparison) => return comparison.why(vars, outcome),
            Node::Logic { form, nodes } => (form, nodes),
        };
        let (any, inner) = match form {
            Form::And => (!outcome, outcome),
            Form::Or => (outcome, outcome),
            Form::NotAnd => (outcome, !outcome),
            Form::NotOr => (!outcome, !outcome),
        };
        if any {
            // One child decided: the first with the value it takes.
            let decisive = nodes.iter().find(|node| node.eval(vars) == inner);
            return decisive.map(|node| node.why(vars, inner)).unwrap_or_default();
        }
        let reasons: Vec<String> = nodes.iter().map(|node| node.why(vars, inner)).collect();
        reasons.join(", and ")
    }
}

impl Comparison {
    fn parse(items: &[Value], pointer: &str) -> Result<Comparison, ConfigError> {
        let sub = |index: usize| format!("{pointer}/{index}");
        let (name, negated, operator, value, value_at) = match items {
            [] | [_] => {
                return Err(at(pointer, ExprError::TooShort("a comparison needs an operator and a value")));
            }
            [name, second] => (name, false, second, None, 1),
            [name, operator, value] => (name, false, operator, Some(value), 2),
            [name, Value::String(not), operator, value] if not == "!" => {
                (name, true, operator, Some(value), 3)
            }
            [_, _, _, _] => return Err(at(&sub(1), ExprError::BadNot)),
            _ => return Err(at(pointer, ExprError::TooLong(items.len()))),
        };
        let Value::String(name) = name else {
            return Err(at(&sub(0), ExprError::NotAName));
        };
        let operator_at = sub(if negated { 2 } else { 1 });
        let operator = match operator {
            Value::String(word) => word.to_ascii_lowercase(),
            Value::Number(number) => number.to_string(),
            _ => return Err(at(&operator_at, ExprError::UnknownOperator(operator.to_string()))),
        };
        let test = match value {
            Some(value) => Test::parse(&operator, value, &operator_at, &sub(value_at))?,
            // Two elements: an operator compares with the missing value, any other word is the value of `==`.
            None if is_operator(&operator) => Test::parse(&operator, &Value::Null, &operator_at, pointer)?,
            None => Test::Equal(Operand::Text(operator.as_str().into())),
        };
        let source = Value::Array(items.to_vec()).to_string().into_boxed_str();
        Ok(Comparison { var: Var::parse(name), negated, test, source })
    }

    fn eval<V: Vars + ?Sized>(&self, vars: &V) -> bool {
        self.test.holds(&Actual::of(vars, &self.var)) != self.negated
    }

    /// The texts one of which the variable must have; `None` if it may have others.
    fn texts(&self) -> Option<Vec<&str>> {
        fn text(operand: &Operand) -> Option<&str> {
            match operand {
                Operand::Text(text) => Some(text),
                _ => None,
            }
        }
        match &self.test {
            _ if self.negated => None,
            Test::Equal(operand) => Some(vec![text(operand)?]),
            Test::In(operands) => operands.iter().map(text).collect(),
            _ => None,
        }
    }

    fn why<V: Vars + ?Sized>(&self, vars: &V, outcome: bool) -> String {
        let actual = Actual::of(vars, &self.var);
        let verdict = if outcome { "holds" } else { "does not hold" };
        format!("{} {verdict}: {} is {actual}", self.source, self.var)
    }
}

fn is_operator(word: &str) -> bool {
    matches!(word, "==" | "~=" | ">" | ">=" | "<" | "<=" | "~~" | "~*" | "in" | "has" | "ipmatch")
}

impl Test {
    fn parse(operator: &str, value: &Value, operator_at: &str, value_at: &str) -> Result<Test, ConfigError> {
        let order = |order: Order| {
            let limit = match value {
                Value::Number(limit) => limit.as_f64(),
                Value::String(text) => number(text),
                _ => None,
            };
            Ok(Test::Order(order, limit))
        };
        match operator {
            "==" => Ok(Test::Equal(value.into())),
            "~=" => Ok(Test::Differ(value.into())),
            ">" => order(Order::Greater),
            ">=" => order(Order::GreaterEqual),
            "<" => order(Order::Less),
            "<=" => order(Order::LessEqual),
            "~~" | "~*" => {
                let text = match value {
                    Value::String(text) => Cow::Borrowed(text.as_str()),
                    Value::Number(number) => Cow::Owned(number.to_string()),
                    _ => return Err(at(value_at, ExprError::NotAPattern)),
                };
                let regex = pattern::compile(&text, operator == "~*");
                regex.map(Test::Match).map_err(|error| at(value_at, ExprError::Pattern(error)))
            }
            "in" => {
                let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
                // Lua's `ipairs` stops at a missing element; null never equals one that is there.
                Ok(Test::In(items.iter().filter(|item| !item.is_null()).map(Operand::from).collect()))
            }
            "has" => Ok(Test::Has(value.into())),
            "ipmatch" => Ok(Test::Address(networks(value, value_at)?)),
            _ => Err(at(operator_at, ExprError::UnknownOperator(operator.to_owned()))),
        }
    }

    fn holds(&self, actual: &Actual<'_>) -> bool {
        match self {
            Test::Equal(operand) => equal(actual, operand),
            Test::Differ(operand) => !equal(actual, operand),
            Test::Order(order, Some(limit)) => actual.number().is_some_and(|value| match order {
                Order::Greater => value > *limit,
                Order::GreaterEqual => value >= *limit,
                Order::Less => value < *limit,
                Order::LessEqual => value <= *limit,
            }),
            Test::Order(_, None) => false,
            Test::Match(regex) => actual.text().is_some_and(|text| regex.is_match(text.as_bytes())),
            Test::In(operands) => operands.iter().any(|operand| actual.is(operand)),
            Test::Has(operand) => match actual {
                Actual::Json(Value::Array(items)) => items.iter().any(|item| same(item, operand)),
                _ => false,
            },
            Test::Address(networks) => actual
                .text()
                .and_then(|text| address(&text))
                .is_some_and(|address| networks.iter().any(|network| network.contains(&address))),
        }
    }
}

/// `==`: a number on the right makes the comparison numeric.
fn equal(actual: &Actual<'_>, operand: &Operand) -> bool {
    match operand {
        Operand::Number(right) => actual.number() == Some(*right),
        operand => actual.is(operand),
    }
}

/// An address as a variable holds it; IPv4 in IPv6 counts as IPv4.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text);
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

fn networks(value: &Value, pointer: &str) -> Result<Box<[IpNet]>, ConfigError> {
    let items = match value {
        Value::String(text) if !text.is_empty() => std::slice::from_ref(value),
        Value::Array(items) if !items.is_empty() => items.as_slice(),
        _ => return Err(at(pointer, ExprError::NoAddress)),
    };
    let many = value.is_array();
    let network = |(index, item): (usize, &Value)| {
        let text = item.as_str().unwrap_or_default();
        let parsed = text.parse::<IpNet>().ok().or_else(|| address(text).map(IpNet::from));
        parsed.ok_or_else(|| {
            let pointer = if many { format!("{pointer}/{index}") } else { pointer.to_owned() };
            let text = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
            at(&pointer, ExprError::BadAddress(text))
        })
    };
    items.iter().enumerate().map(network).collect()
}

fn at(pointer: &str, error: ExprError) -> ConfigError {
    ConfigError::new(pointer, error.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Variables of a request, by name; what is not text is answered by `value`.
    #[derive(Debug)]
    struct Request(BTreeMap<String, Value>);

    impl Request {
        fn of(value: Value) -> Request {
            Request(serde_json::from_value(value).unwrap())
        }
    }

    impl Vars for Request {
        fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
            self.0.get(&var.to_string())?.as_str().map(Cow::Borrowed)
        }

        fn value(&self, var: &Var) -> Option<Value> {
            self.0.get(&var.to_string()).cloned()
        }
    }

    #[test]
    fn comparisons_mean_what_they_mean_in_lua_resty_expr() {
        let request = Request::of(json!({
            "arg_k": "v", "arg_n": "11", "arg_hex": "0x10", "arg_empty": "", "http_test": "v", "host": "localhost",
            "server_port": "1984", "remote_addr": "127.0.0.1", "http_real_ip": "::ffff:10.1.2.3",
            "post_arg.tags": ["a", "b", 3], "post_arg.age": 18, "post_arg.admin": true, "post_arg.none": null,
            "post_arg.name": "Ann",
        }));
        let cases = [
            ("equal text", json!([["arg_k", "==", "v"]]), true),
            ("other text", json!([["arg_k", "==", "V"]]), false),
            ("two elements are equality", json!([["arg_k", "v"]]), true),
            ("two elements compare with lower case", json!([["arg_k", "V"]]), true),
            ("header", json!([["http_test", "==", "v"]]), true),
            ("all must hold", json!([["arg_k", "==", "v"], ["host", "==", "x"]]), false),
            ("number as text", json!([["server_port", "==", "1984"]]), true),
            ("number as number", json!([["server_port", "==", 1984]]), true),
            ("number in hexadecimal", json!([["arg_hex", "==", 16]]), true),
            ("number against text", json!([["arg_k", "==", 1]]), false),
            ("differs from a number it is not", json!([["arg_k", "~=", 1]]), true),
            ("differs from the number it is", json!([["arg_n", "~=", 11]]), false),
            ("missing differs from text", json!([["arg_none", "~=", "x"]]), true),
            ("missing equals null", json!([["arg_none", "==", null]]), true),
            ("there differs from null", json!([["arg_k", "~=", null]]), true),
            ("missing does not differ from null", json!([["arg_none", "~=", null]]), false),
            ("operator alone compares with null", json!([["arg_k", "~="]]), true),
            ("empty is not missing", json!([["arg_empty", "~=", null]]), true),
            ("booleans are not text", json!([["arg_k", "==", true]]), false),
            ("tables equal nothing", json!([["post_arg.tags", "==", ["a", "b", 3]]]), false),
            ("greater", json!([["arg_n", ">", 10]]), true),
            ("greater with text on the right", json!([["arg_n", ">", "10"]]), true),
            ("numbers are not compared as text", json!([["arg_n", ">", "9"]]), true),
            ("greater or equal", json!([["arg_n", ">=", 11]]), true),
            ("less", json!([["arg_n", "<", 11]]), false),
            ("less or equal", json!([["arg_n", "<=", 11]]), true),
            ("missing is not less", json!([["arg_none", "<", 11]]), false),
            ("text has no order", json!([["arg_k", "<", "x"]]), false),
            ("not", json!([["arg_n", "!", ">", 15]]), true),
            ("not of what cannot be compared", json!([["arg_none", "!", ">", 15]]), true),
            ("pattern", json!([["arg_k", "~~", "^[a-z]$"]]), true),
            ("pattern with other case", json!([["arg_k", "~~", "V"]]), false),
            ("pattern without case", json!([["arg_k", "~*", "V"]]), true),
            ("pattern on missing", json!([["arg_none", "~~", ".*"]]), false),
            ("pattern on a typed number", json!([["post_arg.age", "~~", "^18$"]]), true),
            ("in", json!([["arg_k", "in", ["u", "v"]]]), true),
            ("operators ignore case", json!([["arg_k", "IN", ["u", "v"]]]), true),
            ("in is strict", json!([["arg_n", "in", [11]]]), false),
            ("in with typed number", json!([["post_arg.age", "in", [17, 18]]]), true),
            ("in needs an array", json!([["arg_k", "in", "{v}"]]), false),
            ("missing is not in", json!([["arg_none", "in", [null]]]), false),
            ("not in", json!([["arg_k", "!", "in", ["u"]]]), true),
            ("has", json!([["post_arg.tags", "has", "a"]]), true),
            ("has not", json!([["post_arg.tags", "has", "c"]]), false),
            ("has number", json!([["post_arg.tags", "has", 3]]), true),
            ("text has nothing", json!([["arg_k", "has", "v"]]), false),
            ("typed number", json!([["post_arg.age", ">=", 18]]), true),
            ("typed number is not text", json!([["post_arg.age", "==", "18"]]), false),
            ("typed boolean", json!([["post_arg.admin", "==", true]]), true),
            ("typed null is missing", json!([["post_arg.none", "==", null]]), true),
            ("typed text", json!([["post_arg.name", "==", "Ann"]]), true),
            ("address", json!([["remote_addr", "ipmatch", "127.0.0.1"]]), true),
            ("network", json!([["remote_addr", "ipmatch", ["10.0.0.0/8", "127.0.0.0/16"]]]), true),
            ("other network", json!([["remote_addr", "ipmatch", ["10.0.0.0/8"]]]), false),
            ("IPv4 in IPv6", json!([["http_real_ip", "ipmatch", ["10.0.0.0/8"]]]), true),
            ("no address", json!([["arg_k", "ipmatch", ["0.0.0.0/0"]]]), false),
            ("or", json!(["OR", ["arg_k", "==", "x"], ["arg_n", "==", 11]]), true),
            ("and", json!(["and", ["arg_k", "==", "x"], ["arg_n", "==", 11]]), false),
            ("not and", json!(["!AND", ["arg_k", "==", "x"], ["arg_n", "==", 11]]), true),
            ("not or", json!(["!OR", ["arg_k", "==", "x"], ["arg_n", "==", 11]]), false),
            (
                "nested",
                json!([["arg_k", "==", "v"], ["OR", ["arg_n", "<", 5], ["arg_n", "!", ">", 15]]]),
                true,
            ),
            ("arrays in arrays are and", json!([[["arg_k", "==", "v"], ["arg_n", "==", 11]]]), true),
            ("empty", json!([]), true),
            ("empty table", json!({}), true),
        ];
        for (about, source, expected) in cases {
            let expr = Expr::parse(&source).unwrap_or_else(|error| panic!("{about}: {error}"));
            assert_eq!(expr.eval(&request), expected, "{about}");
            assert_eq!(expr.first_failed(&request).is_none(), expected, "{about}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_place() {
        let deep = (0..40).fold(json!(["a", "==", "b"]), |inner, _| json!([inner]));
        let cases = [
            (json!("arg_k"), "", "is an array"),
            (json!({"arg_k": "v"}), "", "is an array"),
            (json!(["arg_k", "==", "v"]), "", "brackets"),
            (json!([["arg_k"]]), "/0", "too short"),
            (json!([[]]), "/0", "too short"),
            (json!(["OR", ["arg_k", "==", "v"]]), "", "too short"),
            (json!(["OR", ["arg_k", "==", "v"], ["AND"]]), "/2", "too short"),
            (json!([["arg_k", "=", "v"]]), "/0/1", "invalid operator '='"),
            (json!([["arg_k", "!", "="]]), "/0/1", "invalid operator '!'"),
            (json!([["arg_k", "!", "=", "v"]]), "/0/2", "invalid operator '='"),
            (json!([["!", "arg_k", "==", "v"]]), "/0/1", "bad 'not'"),
            (json!([["http_token", "IN", "1", "2"]]), "/0/1", "bad 'not'"),
            (json!([["a", "!", "==", "v", "w"]]), "/0", "5 elements"),
            (json!([[1, "==", 1]]), "/0/0", "name of a variable"),
            (json!([["a", "==", "b"], "c"]), "/1", "is an array"),
            (json!([["a", "==", "b"], ["arg_k", "~~", "("]]), "/1/2", "regular expression"),
            (json!([["arg_k", "~~", ["a"]]]), "/0/2", "which is a string"),
            (json!([["arg_k", "!", "~~", "(?=a)"]]), "/0/3", "look-around"),
            (json!([["arg_k", "ipmatch", ""]]), "/0/2", "invalid ip address"),
            (json!([["arg_k", "ipmatch", []]]), "/0/2", "invalid ip address"),
            (json!([["arg_k", "ipmatch", null]]), "/0/2", "invalid ip address"),
            (json!([["arg_k", "ipmatch", ["10.0.0.0/8", "10.0.0.0/33"]]]), "/0/2/1", "'10.0.0.0/33'"),
            (deep, "/0", "deeper"),
        ];
        for (source, pointer, text) in cases {
            let error = Expr::parse(&source).unwrap_err();
            assert!(error.pointer.starts_with(pointer), "{source}: {error}");
            assert!(error.kind.to_string().contains(text), "{source}: {error}");
        }
    }

    #[test]
    fn the_comparison_that_decided_is_told_with_the_actual_value() {
        let request = Request::of(json!({"arg_k": "v", "arg_n": "11", "post_arg.age": 18}));
        let cases = [
            (
                json!([["arg_k", "==", "v"], ["arg_n", ">", 20], ["arg_x", "==", "1"]]),
                r#"["arg_n",">",20] does not hold: arg_n is "11""#,
            ),
            (json!([["arg_x", "==", "1"]]), r#"["arg_x","==","1"] does not hold: arg_x is not set"#),
            (
                json!([["post_arg.age", "<", 18]]),
                r#"["post_arg.age","<",18] does not hold: post_arg.age is 18"#,
            ),
            (
                json!(["OR", ["arg_k", "==", "a"], ["arg_k", "==", "b"]]),
                r#"["arg_k","==","a"] does not hold: arg_k is "v", and ["arg_k","==","b"] does not hold: arg_k is "v""#,
            ),
            (
                json!(["!OR", ["arg_k", "==", "a"], ["arg_k", "==", "v"]]),
                r#"["arg_k","==","v"] holds: arg_k is "v""#,
            ),
            (
                json!(["!AND", ["arg_k", "==", "v"], ["arg_n", "==", 11]]),
                r#"["arg_k","==","v"] holds: arg_k is "v", and ["arg_n","==",11] holds: arg_n is "11""#,
            ),
        ];
        for (source, expected) in cases {
            let reason = Expr::parse(&source).unwrap().first_failed(&request).unwrap();
            assert_eq!(reason, expected);
        }
    }

    #[test]
    fn variables_are_listed() {
        let expr =
            Expr::parse(&json!(["OR", ["arg_a", "==", "1"], [["uri", "~~", "x"], ["post_arg.m", "==", 1]]]));
        let expr = expr.unwrap();
        let names: Vec<String> = expr.vars().into_iter().map(Var::to_string).collect();
        assert_eq!(names, ["arg_a", "uri", "post_arg.m"]);
        assert!(expr.needs_body());
        assert!(Expr::parse(&json!([])).unwrap().is_always());
    }

    #[test]
    fn required_texts_are_those_without_which_nothing_holds() {
        let cases = [
            (json!([]), vec![]),
            (json!([["arg_a", "==", "1"]]), vec!["arg_a: 1"]),
            (json!([["arg_a", "x"]]), vec!["arg_a: x"]),
            (
                json!([["uri", "in", ["x", "y"]], ["AND", ["arg_a", "==", "1"], ["arg_b", ">", 1]]]),
                vec!["uri: x y", "arg_a: 1"],
            ),
            // What may hold otherwise: other forms, negation, numbers (which "1.0" equals) and null.
            (json!(["OR", ["arg_a", "==", "1"], ["arg_a", "==", "2"]]), vec![]),
            (json!(["!AND", ["arg_a", "==", "1"], ["arg_b", "==", "2"]]), vec![]),
            (json!([["arg_a", "!", "==", "1"], ["arg_a", "~=", "1"]]), vec![]),
            (json!([["arg_a", "==", 1], ["arg_b", "in", ["1", 2]], ["arg_c", "==", null]]), vec![]),
        ];
        for (value, expected) in cases {
            let expr = Expr::parse(&value).unwrap();
            let required = expr.required();
            let told: Vec<String> =
                required.iter().map(|(var, texts)| format!("{var}: {}", texts.join(" "))).collect();
            assert_eq!(told, expected, "{value}");
        }
    }

    const NAMES: [&str; 4] = ["arg_a", "uri", "remote_addr", "post_arg.b"];

    fn scalar() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-3i64..20).prop_map(Value::from),
            prop::sample::select(vec!["", "a", "A", "1", " 7 ", "0x0a", "-2.5", "127.0.0.1", "nan"])
                .prop_map(Value::from),
        ]
    }

    fn comparison() -> impl Strategy<Value = Value> {
        let right =
            prop_oneof![3 => scalar(), 1 => prop::collection::vec(scalar(), 0..4).prop_map(Value::from)];
        let operator = prop::sample::select(vec!["==", "~=", ">", ">=", "<", "<=", "in", "has", "IN"]);
        (prop::sample::select(NAMES.to_vec()), any::<bool>(), operator, right).prop_map(
            |(name, not, operator, right)| {
                if not { json!([name, "!", operator, right]) } else { json!([name, operator, right]) }
            },
        )
    }

    fn expression() -> impl Strategy<Value = Value> {
        let inner = comparison().prop_recursive(4, 24, 4, |node| {
            let form = prop::sample::select(vec!["AND", "OR", "!AND", "!OR", "or"]);
            prop_oneof![
                (form, prop::collection::vec(node.clone(), 2..4)).prop_map(|(form, mut nodes)| {
                    nodes.insert(0, form.into());
                    Value::from(nodes)
                }),
                prop::collection::vec(node, 1..4).prop_map(Value::from),
            ]
        });
        prop::collection::vec(inner, 0..4).prop_map(Value::from)
    }

    fn request() -> impl Strategy<Value = Request> {
        let text = prop::sample::select(vec!["", "a", "A", "1", "7", "10", "-2.5", "127.0.0.1", "nan"]);
        let json = prop_oneof![scalar(), prop::collection::vec(scalar(), 0..4).prop_map(Value::from)];
        (
            prop::collection::btree_map(
                prop::sample::select(vec!["arg_a", "uri", "remote_addr"]).prop_map(str::to_owned),
                text.prop_map(Value::from),
                0..4,
            ),
            prop::option::of(json),
        )
            .prop_map(|(mut vars, json)| {
                vars.extend(json.map(|json| ("post_arg.b".to_owned(), json)));
                Request(vars)
            })
    }

    /// The meaning again, written over plain JSON without compiling anything.
    fn naive(expr: &Value, request: &Request) -> bool {
        let items = expr.as_array().unwrap();
        let Some(first) = items.first() else { return true };
        if first.is_array() {
            return items.iter().all(|item| naive(item, request));
        }
        let word = first.as_str().unwrap();
        match word.to_uppercase().as_str() {
            "AND" => return items[1..].iter().all(|item| naive(item, request)),
            "OR" => return items[1..].iter().any(|item| naive(item, request)),
            "!AND" => return items[1..].iter().any(|item| !naive(item, request)),
            "!OR" => return items[1..].iter().all(|item| !naive(item, request)),
            _ => {}
        }
        let left = request.0.get(word).filter(|value| !value.is_null());
        let (not, operator, right) =
            if items.len() == 4 { (true, &items[2], &items[3]) } else { (false, &items[1], &items[2]) };
        let to_number = |value: &Value| match value {
            Value::Number(it) => it.as_f64(),
            Value::String(text) => match text.trim() {
                "nan" => None,
                "0x0a" => Some(10.0),
                text => text.parse().ok(),
            },
            _ => None,
        };
        let same = |left: &Value, right: &Value| match (left, right) {
            (Value::Array(_), _) | (_, Value::Array(_)) => false,
            (left, right) => left == right,
        };
        let equal = match (left, right) {
            (left, Value::Number(right)) => left.and_then(to_number) == right.as_f64(),
            (None, right) => right.is_null(),
            (Some(left), right) => same(left, right),
        };
        let order = left.and_then(to_number).zip(to_number(right));
        let outcome = match operator.as_str().unwrap().to_lowercase().as_str() {
            "==" => equal,
            "~=" => !equal,
            ">" => order.is_some_and(|(left, right)| left > right),
            ">=" => order.is_some_and(|(left, right)| left >= right),
            "<" => order.is_some_and(|(left, right)| left < right),
            "<=" => order.is_some_and(|(left, right)| left <= right),
            "in" => match (left, right) {
                (Some(left), Value::Array(items)) => items.iter().any(|item| same(left, item)),
                _ => false,
            },
            "has" => match left {
                Some(Value::Array(items)) => items.iter().any(|item| same(item, right)),
                _ => false,
            },
            other => panic!("{other}"),
        };
        outcome != not
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let words = prop::sample::select(vec![
            "AND", "or", "!", "==", "~~", "~*", "in", "ipmatch", "arg_a", "uri", "(",
        ]);
        let leaf = prop_oneof![2 => words.prop_map(Value::from), 1 => scalar(), 1 => any::<String>().prop_map(Value::from)];
        leaf.prop_recursive(6, 48, 5, |node| {
            prop_oneof![
                4 => prop::collection::vec(node.clone(), 0..6).prop_map(Value::from),
                1 => prop::collection::btree_map(any::<String>(), node, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_json_is_read_or_refused_and_evaluates(source in any_json(), request in request()) {
            if let Ok(expr) = Expr::parse(&source) {
                let holds = expr.eval(&request);
                prop_assert_eq!(expr.first_failed(&request).is_none(), holds);
            }
        }

        #[test]
        fn negation_turns_the_result(source in comparison(), request in request()) {
            let mut negated = source.as_array().unwrap().clone();
            if negated.len() == 4 { negated.remove(1); } else { negated.insert(1, "!".into()); }
            let plain = Expr::parse(&json!([source])).unwrap();
            let negated = Expr::parse(&json!([negated])).unwrap();
            prop_assert_ne!(plain.eval(&request), negated.eval(&request));
        }

        #[test]
        fn logic_forms_obey_de_morgan(a in comparison(), b in comparison(), request in request()) {
            let eval = |source: Value| Expr::parse(&source).unwrap().eval(&request);
            prop_assert_ne!(eval(json!(["AND", a, b])), eval(json!(["!AND", a, b])));
            prop_assert_ne!(eval(json!(["OR", a, b])), eval(json!(["!OR", a, b])));
        }

        #[test]
        fn nothing_holds_without_what_is_required(source in expression(), request in request()) {
            let expr = Expr::parse(&source).unwrap();
            for (var, texts) in expr.required() {
                let has = request.get(var).is_some_and(|value| texts.contains(&&*value));
                prop_assert!(has || var.is_typed() || !expr.eval(&request), "{} {}", source, var);
            }
        }

        #[test]
        fn evaluation_agrees_with_the_plain_reading(source in expression(), request in request()) {
            prop_assert_eq!(Expr::parse(&source).unwrap().eval(&request), naive(&source, &request), "{}", source);
        }
    }
}
