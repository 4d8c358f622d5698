//! `vars` expressions, as JSON, over a request that has a little of everything.

#![no_main]

use std::borrow::Cow;

use config::{Expr, Var, Vars};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

struct Request;

impl Vars for Request {
    fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
        match var {
            Var::Uri => Some(Cow::Borrowed("/a/b")),
            Var::RemoteAddr => Some(Cow::Borrowed("127.0.0.1")),
            Var::Arg(name) => Some(Cow::Owned(name.to_string())),
            Var::Cookie(_) => Some(Cow::Borrowed("")),
            _ => None,
        }
    }

    fn value(&self, var: &Var) -> Option<Value> {
        match var {
            Var::PostArgPath(path) => Some(json!([path, 1, null, true])),
            Var::Other(name) => name.parse().ok().map(|number: f64| json!(number)),
            _ => None,
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(source) = serde_json::from_slice::<Value>(data) else { return };
    let Ok(expr) = Expr::parse(&source) else { return };
    let holds = expr.eval(&Request);
    assert_eq!(expr.first_failed(&Request).is_none(), holds);
    // The negation of two of them holds exactly when it does not.
    if !expr.is_always() && source.as_array().is_some_and(|items| items.first().is_some_and(Value::is_array))
    {
        let negated = Expr::parse(&json!(["!AND", source, source]));
        if let Ok(negated) = negated {
            assert_ne!(negated.eval(&Request), holds);
        }
    }
});
