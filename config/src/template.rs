//! Strings with variables (`$scheme://$host${uri}`), compiled.
//!
//! Plugins, loggers, redirects and access log formats write them. They are read once; rendering copies text and asks
//! [`Vars`] for the rest. Reading never fails, as in APISIX: a name nobody knows is a variable without a value, and a
//! `$` that begins no name is itself.

use std::borrow::Cow;

use crate::var::{Var, Vars};

/// A compiled string with variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Template {
    pieces: Box<[Piece]>,
}

/// One part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text that is copied.
    Text(Box<str>),
    /// A variable, and what stands for it when it has no value.
    Var(Var, Option<Box<str>>),
}

/// Which dialect of `$name` is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialect {
    /// APISIX: names may hold dots (`$post_arg.model`), `${a ?? b}` gives a default, `\$` is a plain `$`.
    Apisix,
    /// As `Apisix`, but `$1` and `${1}` stay as they are.
    KeepCaptures,
    /// nginx: names end at a dot, nothing escapes.
    Nginx,
}

impl Template {
    /// Read a string as APISIX does: `$name`, `${name}`, `${name ?? default}`, `\$` for a plain `$`.
    ///
    /// Names take letters, digits, `_` and dots, so that `$host.` is the variable `host.`, which has no value; write
    /// `${host}.` instead. Unlike APISIX, the backslash of `\$` does not stay.
    pub fn parse(source: &str) -> Template {
        Template::read(source, Dialect::Apisix)
    }

    /// As [`Template::parse`], but numbered captures (`$1`, `${1}`) stay text, for a plugin that fills them itself.
    pub fn parse_keeping_captures(source: &str) -> Template {
        Template::read(source, Dialect::KeepCaptures)
    }

    /// Read a string as nginx reads a log format: `$name`, `${name}`.
    pub fn parse_log_format(source: &str) -> Template {
        Template::read(source, Dialect::Nginx)
    }

    fn read(source: &str, dialect: Dialect) -> Template {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = source;
        while let Some(dollar) = rest.find('$') {
            let (before, after) = rest.split_at(dollar);
            rest = after.strip_prefix('$').unwrap_or(after);
            if dialect != Dialect::Nginx && before.ends_with('\\') {
                text.push_str(before.strip_suffix('\\').unwrap_or(before));
                text.push('$');
                continue;
            }
            text.push_str(before);
            match variable(rest, dialect) {
                Some((piece, remaining)) => {
                    if !text.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut text).into()));
                    }
                    pieces.push(piece);
                    rest = remaining;
                }
                None => text.push('$'),
            }
        }
        text.push_str(rest);
        if !text.is_empty() {
            pieces.push(Piece::Text(text.into()));
        }
        Template { pieces: pieces.into() }
    }

    /// Append the string for one request; a variable without a value and without a default adds nothing.
    pub fn render<V: Vars + ?Sized>(&self, vars: &V, out: &mut String) {
        self.render_with(vars, out, |out, value| out.push_str(value.unwrap_or_default()));
    }

    /// Append the string for one request, with `write` deciding how a value, or its absence, is put down: loggers
    /// escape there, and write `-` for what is missing.
    pub fn render_with<V: Vars + ?Sized>(
        &self,
        vars: &V,
        out: &mut String,
        mut write: impl FnMut(&mut String, Option<&str>),
    ) {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Var(var, default) => {
                    let value = text_of(vars, var);
                    write(out, value.as_deref().or(default.as_deref()));
                }
            }
        }
    }

    /// The string for one request; borrowed when there is nothing to fill in.
    pub fn to_text<V: Vars + ?Sized>(&self, vars: &V) -> Cow<'_, str> {
        if let Some(text) = self.as_literal() {
            return Cow::Borrowed(text);
        }
        let mut out = String::new();
        self.render(vars, &mut out);
        Cow::Owned(out)
    }

    /// Whether no variable occurs.
    pub fn is_literal(&self) -> bool {
        self.as_literal().is_some()
    }

    /// The text, if no variable occurs.
    pub fn as_literal(&self) -> Option<&str> {
        match &*self.pieces {
            [] => Some(""),
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The parts in order; never two texts in a row.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The variables named, in order of appearance, repetitions included.
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Var(var, _) => Some(var),
            Piece::Text(_) => None,
        })
    }
}

/// A variable's text; JSON that is not text is written as JSON.
fn text_of<'a, V: Vars + ?Sized>(vars: &'a V, var: &Var) -> Option<Cow<'a, str>> {
    if var.is_typed()
        && let Some(value) = vars.value(var)
    {
        return match value {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(Cow::Owned(text)),
            value => Some(Cow::Owned(value.to_string())),
        };
    }
    vars.get(var)
}

/// Reads what follows a `$`; `None` if that begins no variable.
fn variable(rest: &str, dialect: Dialect) -> Option<(Piece, &str)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || (c == '.' && dialect != Dialect::Nginx);
    let (name, default, remaining) = match rest.strip_prefix('{') {
        Some(inner) => {
            let (inside, remaining) = inner.split_once('}')?;
            match inside.split_once("??") {
                Some((name, default)) if dialect != Dialect::Nginx => {
                    (name.trim(), Some(default.trim()), remaining)
                }
                _ => (inside.trim(), None, remaining),
            }
        }
        None => {
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let (name, remaining) = rest.split_at(end);
            (name, None, remaining)
        }
    };
    if name.is_empty() || (dialect == Dialect::KeepCaptures && name.bytes().all(|b| b.is_ascii_digit())) {
        return None;
    }
    Some((Piece::Var(Var::parse(name), default.map(Into::into)), remaining))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    struct Request(BTreeMap<&'static str, &'static str>);

    impl Vars for Request {
        fn get<'a>(&'a self, var: &Var) -> Option<Cow<'a, str>> {
            self.0.get(var.to_string().as_str()).map(|value| Cow::Borrowed(*value))
        }

        fn value(&self, var: &Var) -> Option<serde_json::Value> {
            (var.to_string() == "post_arg.tags").then(|| serde_json::json!(["a", 1]))
        }
    }

    fn request() -> Request {
        Request(BTreeMap::from([
            ("host", "a.com"),
            ("uri", "/x"),
            ("arg_q", "1"),
            ("scheme", "https"),
            ("args", ""),
        ]))
    }

    #[test]
    fn variables_are_filled_in_as_in_apisix() {
        let cases = [
            ("plain", "plain"),
            ("", ""),
            ("$scheme://$host$uri?q=${arg_q}", "https://a.com/x?q=1"),
            ("${ host }/", "a.com/"),
            ("[$nothing]", "[]"),
            ("[$args]", "[]"),
            ("${nothing ?? none}", "none"),
            ("${host ?? none}", "a.com"),
            ("${args ?? none}", ""),
            (r"\$host", "$host"),
            (r"\\$host", r"\$host"),
            ("cost: 5$", "cost: 5$"),
            ("$$host", "$a.com"),
            ("${host", "${host"),
            ("${}x", "${}x"),
            ("$host.", ""),
            ("${host}.", "a.com."),
            ("$1", ""),
            ("tags: $post_arg.tags", r#"tags: ["a",1]"#),
            ("$h\u{f6}st", "\u{f6}st"),
        ];
        for (source, expected) in cases {
            assert_eq!(Template::parse(source).to_text(&request()), expected, "{source}");
        }
    }

    #[test]
    fn captures_stay_when_asked() {
        let template = Template::parse_keeping_captures("/$1/${2}/$host/$1a");
        assert_eq!(template.to_text(&request()), "/$1/${2}/a.com/");
        assert_eq!(template.vars().count(), 2);
    }

    #[test]
    fn log_formats_are_read_as_nginx_reads_them() {
        let template = Template::parse_log_format(r#"$host.log "$nothing" ${uri} \$arg_q"#);
        let mut out = String::new();
        template.render_with(&request(), &mut out, |out, value| out.push_str(value.unwrap_or("-")));
        assert_eq!(out, r#"a.com.log "-" /x \1"#);
    }

    #[test]
    fn literals_are_known() {
        assert_eq!(Template::parse("text").as_literal(), Some("text"));
        assert_eq!(Template::parse("").as_literal(), Some(""));
        assert!(Template::parse(r"\$x").is_literal());
        assert!(!Template::parse("$x").is_literal());
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_itself(source in "[^$]*") {
            let template = Template::parse(&source);
            prop_assert_eq!(template.as_literal(), Some(source.as_str()));
        }

        #[test]
        fn any_text_is_read(source in r"[$\\{}a-z?. 1]*") {
            for template in [Template::parse(&source), Template::parse_keeping_captures(&source), Template::parse_log_format(&source)] {
                let texts = template.pieces().windows(2);
                prop_assert!(texts.into_iter().all(|pair| !matches!(pair, [Piece::Text(_), Piece::Text(_)])));
            }
        }
    }
}
