//! Templates in the form of lua-resty-template: text with `{{expression}}` (escaped for HTML) and `{*expression*}`.
//!
//! An expression looks into the body (`a.b[1]`), into variables (`_ctx.var.host`), has Lua's operators and a few of its
//! functions. Rendering has no loops, so that its time is bounded by the size of template and body.

use config::var::Var;
use serde_json::{Number, Value};

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    pieces: Vec<Piece>,
    vars: Vec<Var>,
}

#[derive(Debug)]
enum Piece {
    Text(String),
    Escaped(Expr),
    Raw(Expr),
}

#[derive(Debug)]
enum Expr {
    Literal(Value),
    /// The whole decoded body.
    Root,
    /// The body as text.
    Body,
    Var(usize),
    Field(Box<Expr>, Box<Expr>),
    Call(Function, Vec<Expr>),
    Not(Box<Expr>),
    Minus(Box<Expr>),
    Length(Box<Expr>),
    Binary(Operator, Box<Expr>, Box<Expr>),
}

#[derive(Clone, Copy, Debug)]
enum Function {
    EscapeJson,
    EscapeXml,
    ToString,
    ToNumber,
    Upper,
    Lower,
    Len,
    Sub,
}

const FUNCTIONS: [(&str, Function); 8] = [
    ("_escape_json", Function::EscapeJson),
    ("_escape_xml", Function::EscapeXml),
    ("tostring", Function::ToString),
    ("tonumber", Function::ToNumber),
    ("string.upper", Function::Upper),
    ("string.lower", Function::Lower),
    ("string.len", Function::Len),
    ("string.sub", Function::Sub),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Or,
    And,
    Less,
    Greater,
    LessOrEqual,
    GreaterOrEqual,
    NotEqual,
    Equal,
    Concat,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
}

/// Longest first, with the strength of each; `..` binds to the right.
const OPERATORS: [(&str, Operator, u8); 14] = [
    ("or", Operator::Or, 1),
    ("and", Operator::And, 2),
    ("<=", Operator::LessOrEqual, 3),
    (">=", Operator::GreaterOrEqual, 3),
    ("~=", Operator::NotEqual, 3),
    ("==", Operator::Equal, 3),
    ("<", Operator::Less, 3),
    (">", Operator::Greater, 3),
    ("..", Operator::Concat, 4),
    ("+", Operator::Add, 5),
    ("-", Operator::Subtract, 5),
    ("*", Operator::Multiply, 6),
    ("/", Operator::Divide, 6),
    ("%", Operator::Modulo, 6),
];
const UNARY: u8 = 7;

/// Expressions nested deeper are no templates that people write.
const DEPTH: usize = 64;

/// Tags that hold Lua or other files.
const REFUSED: [(&str, &str, &str); 3] = [
    ("{%", "%}", "Lua statements are not run here: use `{{expression}}` or `{*expression*}`, with `and` and `or` for a choice"),
    ("{(", ")}", "other templates cannot be included: write the text into this one"),
    ("{[", "]}", "other templates cannot be included: write the text into this one"),
];

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// What is wrong, or not offered, with the place.
    pub fn compile(source: &str) -> Result<Self, String> {
        let mut template = Self { pieces: Vec::new(), vars: Vec::new() };
        let mut text = String::new();
        let mut rest = source;
        while let Some(at) = rest.find('{') {
            let (before, tag) = rest.split_at(at);
            text.push_str(before);
            if let Some((open, _, why)) =
                REFUSED.iter().find(|(open, close, _)| tag.starts_with(open) && tag.contains(close))
            {
                let shown: String = tag.chars().take(40).collect();
                return Err(format!("`{open}` in `{shown}`: {why}"));
            }
            let inner = |open: &str, close: &str| tag.strip_prefix(open)?.split_once(close);
            if let Some((_, after)) = inner("{#", "#}") {
                rest = after;
            } else if let Some((code, after)) = inner("{{", "}}") {
                let expr = template.expression(code)?;
                template.push(&mut text, Piece::Escaped(expr));
                rest = after;
            } else if let Some((code, after)) = inner("{*", "*}") {
                let expr = template.expression(code)?;
                template.push(&mut text, Piece::Raw(expr));
                rest = after;
            } else {
                text.push('{');
                rest = tag.get(1..).unwrap_or_default();
            }
        }
        text.push_str(rest);
        if !text.is_empty() {
            template.pieces.push(Piece::Text(text));
        }
        Ok(template)
    }

    fn push(&mut self, text: &mut String, piece: Piece) {
        if !text.is_empty() {
            self.pieces.push(Piece::Text(std::mem::take(text)));
        }
        self.pieces.push(piece);
    }

    fn expression(&mut self, code: &str) -> Result<Expr, String> {
        let mut parser = Parser { rest: code, vars: &mut self.vars };
        let expr = parser.expr(0, 0).and_then(|expr| {
            parser.space();
            if parser.rest.is_empty() { Ok(expr) } else { Err(format!("`{}` is not expected", parser.rest.trim())) }
        });
        expr.map_err(|problem| format!("in the expression `{}`: {problem}", code.trim()))
    }

    /// The variables that it asks for; [`render`](Self::render) takes their values in this order.
    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// The text for one body.
    ///
    /// # Errors
    /// An expression does not fit the body: as in Lua, nothing has no fields, and only numbers are added.
    pub fn render(&self, root: &Value, body: &str, vars: &[Option<String>]) -> Result<String, String> {
        let scope = Scope { root, body, vars };
        let mut out = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Escaped(expr) => {
                    let value = scope.eval(expr)?;
                    escape_html(&text_of(&value), &mut out);
                }
                Piece::Raw(expr) => {
                    let value = scope.eval(expr)?;
                    out.push_str(&text_of(&value));
                }
            }
        }
        Ok(out)
    }
}

struct Parser<'a> {
    rest: &'a str,
    vars: &'a mut Vec<Var>,
}

impl Parser<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, word: &str) -> bool {
        self.space();
        match self.rest.strip_prefix(word) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn name(&mut self) -> Option<String> {
        self.space();
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        self.rest = rest;
        Some(name.to_owned())
    }

    fn operator(&self, least: u8) -> Option<(&'static str, Operator, u8)> {
        let rest = self.rest.trim_start();
        OPERATORS.into_iter().find(|(word, _, strength)| {
            let word_ends = !word.starts_with(|c: char| c.is_ascii_alphabetic())
                || !rest.get(word.len()..).unwrap_or_default().starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            rest.starts_with(word) && word_ends && *strength > least
        })
    }

    fn expr(&mut self, least: u8, depth: usize) -> Result<Expr, String> {
        if depth > DEPTH {
            return Err("it is nested too deep".into());
        }
        let mut left = self.unary(depth)?;
        while let Some((word, operator, strength)) = self.operator(least) {
            self.take(word);
            let least = if operator == Operator::Concat { strength - 1 } else { strength };
            let right = self.expr(least, depth + 1)?;
            left = Expr::Binary(operator, Box::new(left), Box::new(right));
        }
        Ok(left)
    }

    fn unary(&mut self, depth: usize) -> Result<Expr, String> {
        if depth > DEPTH {
            return Err("it is nested too deep".into());
        }
        self.space();
        let not = self.rest.strip_prefix("not").is_some_and(|rest| rest.starts_with([' ', '(']));
        if not {
            self.take("not");
            return Ok(Expr::Not(Box::new(self.expr(UNARY, depth + 1)?)));
        }
        if self.take("-") {
            return Ok(Expr::Minus(Box::new(self.expr(UNARY, depth + 1)?)));
        }
        if self.take("#") {
            return Ok(Expr::Length(Box::new(self.expr(UNARY, depth + 1)?)));
        }
        self.postfix(depth)
    }

    fn postfix(&mut self, depth: usize) -> Result<Expr, String> {
        let mut expr = self.primary(depth)?;
        loop {
            self.space();
            if self.rest.starts_with('.') && !self.rest.starts_with("..") {
                self.take(".");
                let name = self.name().ok_or("a name has to follow `.`")?;
                expr = Expr::Field(Box::new(expr), Box::new(Expr::Literal(name.into())));
            } else if self.take("[") {
                let index = self.expr(0, depth + 1)?;
                if !self.take("]") {
                    return Err("`]` is missing".into());
                }
                expr = Expr::Field(Box::new(expr), Box::new(index));
            } else if self.rest.starts_with(['(', ':']) {
                let all: Vec<_> = FUNCTIONS.iter().map(|(name, _)| format!("`{name}`")).collect();
                return Err(format!("of functions there are {}", all.join(", ")));
            } else {
                return Ok(expr);
            }
        }
    }

    fn primary(&mut self, depth: usize) -> Result<Expr, String> {
        if self.take("(") {
            let expr = self.expr(0, depth + 1)?;
            return if self.take(")") { Ok(expr) } else { Err("`)` is missing".into()) };
        }
        self.space();
        if self.rest.starts_with(['"', '\'']) {
            return self.string();
        }
        if self.rest.starts_with(|c: char| c.is_ascii_digit()) {
            let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(self.rest.len());
            // `1..x` is a number and an operator.
            let end = self.rest.find("..").map_or(end, |at| at.min(end));
            let (digits, rest) = self.rest.split_at(end);
            self.rest = rest;
            let number: f64 = digits.parse().map_err(|_| format!("`{digits}` is not a number"))?;
            return Ok(Expr::Literal(number_of(number)));
        }
        for (name, function) in FUNCTIONS {
            let called = self.rest.strip_prefix(name).map(str::trim_start).and_then(|rest| rest.strip_prefix('('));
            if let Some(rest) = called {
                self.rest = rest;
                return self.arguments(function, name, depth);
            }
        }
        let name = self.name().ok_or("a value is expected")?;
        Ok(match name.as_str() {
            "nil" => Expr::Literal(Value::Null),
            "true" => Expr::Literal(true.into()),
            "false" => Expr::Literal(false.into()),
            "context" => Expr::Root,
            "_body" => Expr::Body,
            "_ctx" => {
                let var = (self.take(".") && self.name().as_deref() == Some("var") && self.take(".")).then(|| self.name());
                let name = var.flatten().ok_or("of `_ctx` there is `_ctx.var.NAME` alone")?;
                self.vars.push(Var::parse(&name));
                Expr::Var(self.vars.len() - 1)
            }
            "function" | "return" | "local" | "if" | "for" | "while" | "require" | "ngx" | "io" | "os" | "_multipart" => {
                return Err(format!("`{name}` is Lua, which is not run here"));
            }
            _ => Expr::Field(Box::new(Expr::Root), Box::new(Expr::Literal(name.into()))),
        })
    }

    fn arguments(&mut self, function: Function, name: &str, depth: usize) -> Result<Expr, String> {
        let mut arguments = Vec::new();
        if !self.take(")") {
            loop {
                arguments.push(self.expr(0, depth + 1)?);
                if self.take(")") {
                    break;
                }
                if !self.take(",") {
                    return Err("`)` is missing".into());
                }
            }
        }
        let fits = match function {
            Function::Sub => (2..=3).contains(&arguments.len()),
            _ => arguments.len() == 1,
        };
        if fits { Ok(Expr::Call(function, arguments)) } else { Err(format!("`{name}` takes another number of values")) }
    }

    fn string(&mut self) -> Result<Expr, String> {
        let mut chars = self.rest.char_indices();
        let quote = chars.next().map(|(_, quote)| quote);
        let mut text = String::new();
        while let Some((at, c)) = chars.next() {
            match c {
                c if Some(c) == quote => {
                    self.rest = self.rest.get(at + 1..).unwrap_or_default();
                    return Ok(Expr::Literal(text.into()));
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 'r')) => text.push('\r'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, c @ ('\\' | '"' | '\''))) => text.push(c),
                    _ => return Err("a string has an escape that is not known".into()),
                },
                c => text.push(c),
            }
        }
        Err("a string has no end".into())
    }
}

struct Scope<'a> {
    root: &'a Value,
    body: &'a str,
    vars: &'a [Option<String>],
}

type Seen<'a> = std::borrow::Cow<'a, Value>;

fn own<'a>(value: impl Into<Value>) -> Seen<'a> {
    Seen::Owned(value.into())
}

impl<'a> Scope<'a> {
    fn eval(&self, expr: &'a Expr) -> Result<Seen<'a>, String> {
        Ok(match expr {
            Expr::Literal(value) => Seen::Borrowed(value),
            Expr::Root => Seen::Borrowed(self.root),
            Expr::Body => own(self.body),
            Expr::Var(index) => match self.vars.get(*index) {
                Some(Some(text)) => own(text.as_str()),
                _ => own(Value::Null),
            },
            Expr::Field(of, name) => {
                let name = self.eval(name)?;
                match self.eval(of)? {
                    Seen::Borrowed(value) => field(value, &name)?.map_or_else(|| own(Value::Null), Seen::Borrowed),
                    Seen::Owned(value) => own(field(&value, &name)?.cloned().unwrap_or_default()),
                }
            }
            Expr::Call(function, arguments) => {
                let values = arguments.iter().map(|argument| self.eval(argument)).collect::<Result<Vec<_>, _>>()?;
                let values: Vec<&Value> = values.iter().map(|value| &**value).collect();
                own(call(*function, &values)?)
            }
            Expr::Not(of) => {
                let value = self.eval(of)?;
                own(!is_true(&value))
            },
            Expr::Minus(of) => {
                let value = self.eval(of)?;
                own(number_of(-number(&value)?))
            },
            Expr::Length(of) => match &*self.eval(of)? {
                Value::String(text) => own(text.len()),
                Value::Array(list) => own(list.len()),
                other => return Err(format!("{} has no length", kind(other))),
            },
            Expr::Binary(Operator::And, left, right) => {
                let left = self.eval(left)?;
                if is_true(&left) { self.eval(right)? } else { left }
            }
            Expr::Binary(Operator::Or, left, right) => {
                let left = self.eval(left)?;
                if is_true(&left) { left } else { self.eval(right)? }
            }
            Expr::Binary(operator, left, right) => {
                {
                let (left, right) = (self.eval(left)?, self.eval(right)?);
                own(binary(*operator, &left, &right)?)
            }
            }
        })
    }
}

/// What stands under a name or index; lists begin with 1.
fn field<'v>(value: &'v Value, name: &Value) -> Result<Option<&'v Value>, String> {
    match (value, name) {
        (Value::Object(object), name) => Ok(object.get(&text_of(name))),
        (Value::Array(list), name) => {
            let index = number(name).ok().filter(|index| *index >= 1.0);
            Ok(index.and_then(|index| list.get(index as usize - 1)))
        }
        (other, name) => Err(format!("{} has no field `{}`", kind(other), text_of(name))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nil",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) | Value::Object(_) => "a table",
    }
}

fn is_true(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false))
}

fn number(value: &Value) -> Result<f64, String> {
    let found = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    found.filter(|number| number.is_finite()).ok_or_else(|| format!("{} is no number", kind(value)))
}

fn number_of(number: f64) -> Value {
    // Whole numbers are written without a point.
    if number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0 {
        return Value::from(number as i64);
    }
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}

fn text_of(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn binary(operator: Operator, left: &Value, right: &Value) -> Result<Value, String> {
    let both = || Ok::<_, String>((number(left)?, number(right)?));
    let order = || match (left, right) {
        (Value::String(left), Value::String(right)) => Ok(left.cmp(right)),
        (Value::Number(_), Value::Number(_)) => {
            let (left, right) = both()?;
            left.partial_cmp(&right).ok_or_else(|| "numbers cannot be compared".to_owned())
        }
        _ => Err(format!("{} and {} cannot be compared", kind(left), kind(right))),
    };
    let same = || match (left, right) {
        (Value::Number(_), Value::Number(_)) => number(left) == number(right),
        _ => left == right,
    };
    Ok(match operator {
        Operator::Equal => same().into(),
        Operator::NotEqual => (!same()).into(),
        Operator::Less => order()?.is_lt().into(),
        Operator::Greater => order()?.is_gt().into(),
        Operator::LessOrEqual => order()?.is_le().into(),
        Operator::GreaterOrEqual => order()?.is_ge().into(),
        Operator::Concat => {
            for value in [left, right] {
                if !matches!(value, Value::String(_) | Value::Number(_)) {
                    return Err(format!("{} cannot be joined", kind(value)));
                }
            }
            (text_of(left) + &text_of(right)).into()
        }
        Operator::Add => both().map(|(left, right)| number_of(left + right))?,
        Operator::Subtract => both().map(|(left, right)| number_of(left - right))?,
        Operator::Multiply => both().map(|(left, right)| number_of(left * right))?,
        Operator::Divide => both().map(|(left, right)| number_of(left / right))?,
        Operator::Modulo => both().map(|(left, right)| number_of(left - (left / right).floor() * right))?,
        // Answered before, without looking at the right side.
        Operator::And | Operator::Or => Value::Null,
    })
}

fn call(function: Function, values: &[&Value]) -> Result<Value, String> {
    let first = values.first().copied().unwrap_or(&Value::Null);
    Ok(match function {
        Function::EscapeJson => first.to_string().into(),
        Function::EscapeXml => {
            let mut out = String::new();
            for c in text_of(first).chars() {
                match c {
                    '&' => out.push_str("&amp;"),
                    '<' => out.push_str("&lt;"),
                    '>' => out.push_str("&gt;"),
                    '\'' => out.push_str("&apos;"),
                    '"' => out.push_str("&quot;"),
                    c => out.push(c),
                }
            }
            out.into()
        }
        Function::ToString => match first {
            Value::Null => "nil".into(),
            other => text_of(other).into(),
        },
        Function::ToNumber => number(first).map_or(Value::Null, number_of),
        Function::Upper => text_of(first).to_ascii_uppercase().into(),
        Function::Lower => text_of(first).to_ascii_lowercase().into(),
        Function::Len => text_of(first).len().into(),
        Function::Sub => {
            let text = text_of(first);
            let bytes = text.as_bytes();
            let length = bytes.len() as f64;
            let place = |value: Option<&&Value>, default: f64| -> Result<f64, String> {
                let place = value.map_or(Ok(default), |value| number(value))?;
                Ok(if place < 0.0 { length + place + 1.0 } else { place })
            };
            let from = place(values.get(1), 1.0)?.max(1.0) as usize;
            let to = place(values.get(2), -1.0)?.clamp(0.0, length) as usize;
            String::from_utf8_lossy(bytes.get(from - 1..to).unwrap_or_default()).into_owned().into()
        }
    })
}

fn escape_html(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '/' => out.push_str("&#47;"),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(source: &str) -> Result<String, String> {
        let root = json!({
            "name": "hello", "age": 20, "half": 0.5, "list": ["a", {"b": "c"}], "html": "<a href='/'>&\"",
            "nested": {"deep": {"x": true}}, "text": "5", "quote": "say \"x\"", "e": {"1": "first"},
        });
        let template = Template::compile(source)?;
        assert!(template.vars().len() <= 1);
        template.render(&root, "the body", &[Some("value".into())])
    }

    #[test]
    fn expressions_are_worth_what_they_are_in_lua() {
        let cases = [
            ("{\"foo\":\"{{name .. \" world\"}}\",\"bar\":{{age+10}}}", "{\"foo\":\"hello world\",\"bar\":30}"),
            ("plain { text } {x}", "plain { text } {x}"),
            ("{{name}}{# nothing #}!", "hello!"),
            ("{{_ctx.var.arg_name .. \"!\"}}", "value!"),
            ("{*_body*}", "the body"),
            ("{{html}}", "&lt;a href=&#39;&#47;&#39;&gt;&amp;&quot;"),
            ("{*html*}", "<a href='/'>&\""),
            ("{*_escape_json(quote)*}", "\"say \\\"x\\\"\""),
            ("{*_escape_xml(html)*}", "&lt;a href=&apos;/&apos;&gt;&amp;&quot;"),
            ("{{list[1]}}{{list[2].b}}{{list[3]}}", "ac"),
            ("{{e[1]}}", "first"),
            ("{{nested.deep.x}} {{nested['deep'].x}} {{context.name}}", "true true hello"),
            ("{{missing}}", ""),
            ("{{missing or 'none'}} {{missing and missing.x or 1}}", "none 1"),
            ("{{age > 18 and 'adult' or 'minor'}}", "adult"),
            ("{{not missing}} {{#list}} {{#name}}", "true 2 5"),
            ("{{1 + 2 * 3 - 4 / 2}} {{(1 + 2) * 3}} {{7 % 3}} {{-7 % 3}} {{-age}}", "5 9 1 2 -20"),
            ("{{half * 3}} {{text + 1}} {{10 / 4}}", "1.5 6 2.5"),
            ("{{1 .. 2}} {{'a' .. 'b' .. 'c'}}", "12 abc"),
            ("{{1 == 1.0}} {{'1' == 1}} {{name ~= 'x'}} {{'a' < 'b'}} {{2 >= 3}}", "true false true true false"),
            ("{{tonumber('7') + 1}} {{tostring(nil)}} {{string.upper(name)}} {{string.sub(name, 2, -2)}}", "8 nil HELLO ell"),
            ("{*nested*}", "{\"deep\":{\"x\":true}}"),
            ("{{order}}", ""),
        ];
        for (source, expected) in cases {
            assert_eq!(rendered(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn what_is_not_offered_is_refused_when_it_is_read() {
        let deep = format!("{{{{{}1}}}}", "(".repeat(100));
        let cases = [
            ("{% if x then %}a{% end %}", "Lua statements"),
            ("{%\nlocal x = 1\n%}", "Lua statements"),
            ("{(header.html)}", "included"),
            ("{[name]}", "included"),
            ("{* string.gsub(_body, 'a', 'b') *}", "of functions there are"),
            ("{{_body:sub(1, 2)}}", "of functions there are"),
            ("{{ngx.time()}}", "`ngx` is Lua"),
            ("{{_ctx.headers}}", "`_ctx.var.NAME`"),
            ("{{a b}}", "not expected"),
            ("{{}}", "a value is expected"),
            ("{{(a}}", "`)` is missing"),
            ("{{a[1}}", "`]` is missing"),
            ("{{'a}}", "no end"),
            ("{{1x}}", "not a number"),
            ("{{tonumber()}}", "another number"),
            (&deep, "too deep"),
        ];
        for (source, words) in cases {
            let problem = Template::compile(source).err().unwrap_or_default();
            assert!(problem.contains(words), "{source}: {problem}");
        }
    }

    #[test]
    fn what_does_not_fit_the_body_is_told() {
        for (source, words) in [
            ("{{missing.x}}", "nil has no field `x`"),
            ("{{name + 1}}", "a string is no number"),
            ("{{missing .. 'x'}}", "nil cannot be joined"),
            ("{{name < 1}}", "cannot be compared"),
            ("{{#age}}", "a number has no length"),
        ] {
            let problem = rendered(source).err().unwrap_or_default();
            assert!(problem.contains(words), "{source}: {problem}");
        }
    }
}
