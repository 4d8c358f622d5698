//! JSON with places. Strings and numbers are left to serde_json; what is done here is to know line and column of
//! every node, and to see a key that is written twice.

use serde_json::{Map, Number, Value};

use super::{DEPTH_LIMIT, Failed, Mark, Problem, float, line_of_member, number_of};

/// Reads one document.
pub(super) struct JsonReader<'a> {
    text: &'a str,
    position: usize,
    /// Line and column of `counted`, a position not behind `position`.
    line: u32,
    column: u32,
    counted: usize,
    pub(super) marks: Vec<Mark>,
}

impl<'a> JsonReader<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        JsonReader { text, position: 0, line: 1, column: 1, counted: 0, marks: Vec::new() }
    }

    pub(super) fn document(&mut self) -> Result<Value, Failed> {
        let at = self.skip_blanks();
        if self.peek().is_none() {
            return Ok(Value::Null);
        }
        let value = self.value(at, 0)?;
        let at = self.skip_blanks();
        match self.peek() {
            None => Ok(value),
            Some(_) => Err((at, Problem::Syntax("text after the end of the document".into()))),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    fn skip_blanks(&mut self) -> Mark {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.peek() {
            self.position += 1;
        }
        self.here()
    }

    /// Counts on from where it stopped last: a document may be one long line.
    fn here(&mut self) -> Mark {
        let passed = self.text.get(self.counted..self.position).unwrap_or_default();
        match passed.rfind('\n') {
            Some(last) => {
                self.line += number_of(passed.matches('\n').count());
                let behind = passed.get(last + 1..).unwrap_or_default();
                self.column = number_of(behind.chars().count() + 1);
            }
            None => self.column += number_of(passed.chars().count()),
        }
        self.counted = self.position;
        Mark { line: self.line, column: self.column, ..Mark::START }
    }

    fn unexpected(&mut self, expected: &str) -> Failed {
        let found = match self.text.get(self.position..).and_then(|rest| rest.chars().next()) {
            Some(c) => format!("found {c:?}, expected {expected}"),
            None => format!("the text ends, expected {expected}"),
        };
        (self.here(), Problem::Syntax(found))
    }

    /// A value whose mark is `at`: its own place, or that of its key.
    fn value(&mut self, at: Mark, depth: usize) -> Result<Value, Failed> {
        let index = self.marks.len();
        self.marks.push(at);
        match self.peek() {
            Some(b'{' | b'[') if depth >= DEPTH_LIMIT => Err((self.here(), Problem::TooDeep)),
            Some(b'{') => {
                let members = self.members(index, depth)?;
                self.close(index);
                Ok(Value::Object(members))
            }
            Some(b'[') => {
                let items = self.items(depth)?;
                self.close(index);
                Ok(Value::Array(items))
            }
            Some(b'"') => self.string().map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'$') => self.reference(index),
            Some(b't') => self.word("true", Value::Bool(true)),
            Some(b'f') => self.word("false", Value::Bool(false)),
            Some(b'n') => self.word("null", Value::Null),
            _ => Err(self.unexpected("a value")),
        }
    }

    fn close(&mut self, index: usize) {
        let size = number_of(self.marks.len() - index);
        if let Some(mark) = self.marks.get_mut(index) {
            mark.size = size;
        }
    }

    fn members(&mut self, index: usize, depth: usize) -> Result<Map<String, Value>, Failed> {
        self.position += 1;
        let mut members = Map::new();
        let mut at = self.skip_blanks();
        if self.peek() == Some(b'}') {
            self.position += 1;
            return Ok(members);
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.unexpected("a key in double quotes"));
            }
            let key = self.string()?;
            if members.contains_key(&key) {
                let first = line_of_member(&self.marks, index, &members, &key);
                return Err((at, Problem::DuplicateKey { key, first }));
            }
            self.skip_blanks();
            if self.peek() != Some(b':') {
                return Err(self.unexpected("`:`"));
            }
            self.position += 1;
            self.skip_blanks();
            let value = self.value(at, depth + 1)?;
            members.insert(key, value);
            self.skip_blanks();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b'}') => {
                    self.position += 1;
                    return Ok(members);
                }
                _ => return Err(self.unexpected("`,` or `}`")),
            }
            at = self.skip_blanks();
        }
    }

    fn items(&mut self, depth: usize) -> Result<Vec<Value>, Failed> {
        self.position += 1;
        let mut items = Vec::new();
        let mut at = self.skip_blanks();
        if self.peek() == Some(b']') {
            self.position += 1;
            return Ok(items);
        }
        loop {
            items.push(self.value(at, depth + 1)?);
            self.skip_blanks();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b']') => {
                    self.position += 1;
                    return Ok(items);
                }
                _ => return Err(self.unexpected("`,` or `]`")),
            }
            at = self.skip_blanks();
        }
    }

    fn string(&mut self) -> Result<String, Failed> {
        let at = self.here();
        let rest = self.text.get(self.position + 1..).unwrap_or_default();
        let mut escaped = false;
        let mut bytes = rest.bytes().enumerate();
        let end = loop {
            match bytes.next() {
                Some((end, b'"')) => break end,
                Some((_, b'\\')) => {
                    escaped = true;
                    bytes.next();
                }
                Some((_, 0..=0x1f)) => {
                    return Err((at, Problem::Syntax("a control character in text: escape it".into())));
                }
                Some(_) => {}
                None => return Err((at, Problem::Syntax("text without a closing quote".into()))),
            }
        };
        let start = self.position;
        self.position += end + 2;
        if !escaped {
            return Ok(rest.get(..end).unwrap_or_default().to_owned());
        }
        let quoted = self.text.get(start..self.position).unwrap_or_default();
        serde_json::from_str(quoted).map_err(|_| (at, Problem::Syntax("text with a wrong escape".into())))
    }

    fn number(&mut self) -> Result<Value, Failed> {
        let at = self.here();
        let rest = self.text.get(self.position..).unwrap_or_default();
        let is_part = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
        let text = rest.get(..rest.find(|c| !is_part(c)).unwrap_or(rest.len())).unwrap_or_default();
        self.position += text.len();
        let number: Number = serde_json::from_str(text)
            .map_err(|_| (at, Problem::Syntax(format!("`{text}` is not a number"))))?;
        if number.is_f64() {
            return Ok(number.as_f64().and_then(float).map_or(Value::Number(number), Value::Number));
        }
        Ok(Value::Number(number))
    }

    /// `${{NAME}}` outside of quotes, whose type is that of the variable's text.
    fn reference(&mut self, index: usize) -> Result<Value, Failed> {
        let rest = self.text.get(self.position..).unwrap_or_default();
        let length =
            rest.strip_prefix("${{").and_then(|inner| inner.split_once("}}")).map(|(name, _)| name.len() + 5);
        let Some(text) = length.and_then(|length| rest.get(..length)).filter(|text| !text.contains('\n'))
        else {
            return Err(self.unexpected("a value"));
        };
        self.position += text.len();
        if let Some(mark) = self.marks.get_mut(index) {
            mark.plain = true;
        }
        Ok(text.into())
    }

    fn word(&mut self, word: &str, value: Value) -> Result<Value, Failed> {
        let rest = self.text.get(self.position..).unwrap_or_default();
        if !rest.starts_with(word) {
            return Err(self.unexpected("a value"));
        }
        self.position += word.len();
        Ok(value)
    }
}
