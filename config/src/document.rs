//! A YAML or JSON file as a value that remembers where everything was written.
//!
//! Errors in configuration name file, line and column; the model speaks in JSON pointers. A [`Document`] translates.
//! Plain YAML scalars mean what lyaml, and so APISIX, makes of them: `yes`, `no`, `on` and `off` are booleans, `0644` is
//! octal, `1_000` is a number; times (`1:30`), dates, `.inf` and `.nan` stay text. Anchors, aliases and merge keys work
//! within a budget. A key written twice is an error, where lyaml silently keeps the last.

mod json;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, StrInput, Tag};
use serde_json::{Map, Number, Value};

use self::json::JsonReader;
use crate::error::ConfigError;

/// Largest file, in bytes: about a million routes.
const SIZE_LIMIT: usize = 256 << 20;
/// Deepest nesting of arrays and objects.
const DEPTH_LIMIT: usize = 128;
/// What all aliases of a file together may add: nodes, and bytes of text.
const ALIAS_NODES: usize = 1_000_000;
const ALIAS_BYTES: usize = 64 << 20;

/// A parsed file.
#[derive(Clone, Debug)]
pub struct Document {
    name: Arc<str>,
    value: Value,
    marks: Vec<Mark>,
    may_substitute: bool,
}

/// Where one node stands. The marks of a document are in the order of its nodes, parents first.
#[derive(Clone, Copy, Debug)]
struct Mark {
    line: u32,
    column: u32,
    /// Number of marks of the node and everything below it.
    size: u32,
    /// A YAML scalar without quotes: what it means is decided by what it says.
    plain: bool,
}

/// Why a file cannot be read at all, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentError {
    /// The name the document was given.
    pub file: Arc<str>,
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
    pub problem: Problem,
}

/// What stands against reading a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{0}")]
    Syntax(String),
    #[error("`{key}` is written twice, first at line {first}: keep one of them")]
    DuplicateKey { key: String, first: u32 },
    #[error("a key must be text, not an array or an object")]
    BadKey,
    #[error("`<<` takes an object, an alias of one, or an array of them")]
    BadMerge,
    #[error("`{text}` is not what its tag `!!{tag}` says")]
    BadTag { tag: String, text: String },
    #[error("an alias refers to the node that contains it")]
    Recursive,
    #[error("the aliases of the file unfold to more than {ALIAS_NODES} nodes or 64 MiB")]
    TooManyAliases,
    #[error("nested deeper than {DEPTH_LIMIT} levels")]
    TooDeep,
    #[error("the file is larger than 256 MiB")]
    TooBig,
    #[error("a second document begins here: keep everything in one")]
    SecondDocument,
    #[error("the file is not UTF-8")]
    NotText,
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.problem)
    }
}

impl std::error::Error for DocumentError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.problem)
    }
}

/// A configuration error with the place in the file it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatedError {
    pub file: Arc<str>,
    /// From 1; 0 when the error is about the file as a whole.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
    /// The pointer is from the root of the file.
    pub error: ConfigError,
}

impl fmt::Display for LocatedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            return write!(f, "{}: {}", self.file, self.error);
        }
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.error)
    }
}

impl std::error::Error for LocatedError {}

impl From<DocumentError> for LocatedError {
    fn from(error: DocumentError) -> Self {
        let DocumentError { file, line, column, problem } = error;
        LocatedError { file, line, column, error: ConfigError::invalid("", problem.to_string()) }
    }
}

impl Document {
    /// Read a file's text; a name that ends in `.json` is JSON, any other YAML.
    ///
    /// # Errors
    /// If the text is not well-formed, or breaks one of the limits above. The first error only.
    pub fn parse(name: &str, text: &str) -> Result<Document, DocumentError> {
        if name.ends_with(".json") { Document::json(name, text) } else { Document::yaml(name, text) }
    }

    /// As [`Document::parse`], from bytes.
    ///
    /// # Errors
    /// As [`Document::parse`], and if the bytes are not UTF-8.
    pub fn parse_bytes(name: &str, bytes: &[u8]) -> Result<Document, DocumentError> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Document::parse(name, text),
            Err(error) => {
                let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
                let line = valid.iter().filter(|byte| **byte == b'\n').count() + 1;
                let at = Mark { line: number_of(line), ..Mark::START };
                Err(at.error(&name.into(), Problem::NotText))
            }
        }
    }

    /// Read YAML.
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn yaml(name: &str, text: &str) -> Result<Document, DocumentError> {
        let name: Arc<str> = name.into();
        check_size(&name, text)?;
        let shielded = shield(text);
        let mut builder = Builder::default();
        builder.run(&shielded).map_err(|(mark, problem)| mark.error(&name, problem))?;
        let value = builder.root.unwrap_or(Value::Null);
        Ok(Document::new(name, text, value, builder.marks))
    }

    /// Read JSON.
    ///
    /// # Errors
    /// As [`Document::parse`].
    pub fn json(name: &str, text: &str) -> Result<Document, DocumentError> {
        let name: Arc<str> = name.into();
        check_size(&name, text)?;
        let mut reader = JsonReader::new(text.strip_prefix('\u{feff}').unwrap_or(text));
        let value = reader.document().map_err(|(mark, problem)| mark.error(&name, problem))?;
        Ok(Document::new(name, text, value, reader.marks))
    }

    /// A file without content.
    pub fn empty(name: &str) -> Document {
        Document::new(name.into(), "", Value::Null, Vec::new())
    }

    fn new(name: Arc<str>, text: &str, value: Value, mut marks: Vec<Mark>) -> Document {
        if marks.is_empty() {
            marks.push(Mark::START);
        }
        Document { name, value, marks, may_substitute: text.contains("${{") }
    }

    /// The name given when it was read.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The content; null for an empty file.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The content, the places forgotten.
    pub fn into_value(self) -> Value {
        self.value
    }

    /// Line and column, both from 1, of the node a JSON pointer names; of an object's member, those of its key.
    pub fn line_of(&self, pointer: &str) -> Option<(u32, u32)> {
        let (mark, whole) = self.mark_of(pointer);
        whole.then_some((mark.line, mark.column))
    }

    /// As [`Document::line_of`], or the nearest node above it that exists: a missing field is reported where it is
    /// missing.
    pub fn locate(&self, pointer: &str) -> (u32, u32) {
        let (mark, _) = self.mark_of(pointer);
        (mark.line, mark.column)
    }

    /// An error of this document, with its place.
    pub fn error(&self, error: ConfigError) -> LocatedError {
        let (line, column) = self.locate(&error.pointer);
        LocatedError { file: Arc::clone(&self.name), line, column, error }
    }

    /// Whether the source has anything that looks like `${{VAR}}`.
    pub(crate) fn may_substitute(&self) -> bool {
        self.may_substitute
    }

    /// Whether the node with this number, in the order of the file, is a YAML scalar without quotes.
    pub(crate) fn is_plain(&self, index: usize) -> bool {
        self.marks.get(index).is_some_and(|mark| mark.plain)
    }

    /// For changes that keep the shape: the places are kept by position, not by name.
    pub(crate) fn value_mut(&mut self) -> &mut Value {
        &mut self.value
    }

    /// The content, taken out. From now on places are found by [`Document::locate_in`] alone.
    pub(crate) fn take(&mut self) -> Value {
        std::mem::take(&mut self.value)
    }

    /// Number of nodes of the subtree that begins at node `index`, in the order of the file.
    pub(crate) fn nodes(&self, index: usize) -> usize {
        self.marks.get(index).map_or(1, |mark| mark.size as usize)
    }

    /// Line and column of the place a pointer names inside `value`, which is node `index` of the file as it was read, or
    /// of the nearest node above it that exists.
    pub(crate) fn locate_in(&self, index: usize, value: &Value, pointer: &str) -> (u32, u32) {
        let (mark, _) = self.mark_in(index, value, pointer);
        (mark.line, mark.column)
    }

    fn mark_of(&self, pointer: &str) -> (Mark, bool) {
        self.mark_in(0, &self.value, pointer)
    }

    fn mark_in(&self, index: usize, value: &Value, pointer: &str) -> (Mark, bool) {
        let mut index = index;
        let mut value = value;
        let mut mark = self.marks.get(index).copied().unwrap_or(Mark::START);
        for token in pointer.split('/').skip(1) {
            let (position, child) = match value {
                Value::Array(items) => {
                    let position = token.parse().unwrap_or(usize::MAX);
                    (position, items.get(position))
                }
                Value::Object(members) => {
                    let name = token.replace("~1", "/").replace("~0", "~");
                    let position = members.keys().position(|key| *key == name).unwrap_or(usize::MAX);
                    (position, members.values().nth(position))
                }
                _ => (0, None),
            };
            let Some(child) = child else { return (mark, false) };
            index += 1;
            for _ in 0..position {
                index += self.nodes(index);
            }
            let Some(found) = self.marks.get(index) else { return (mark, false) };
            mark = *found;
            value = child;
        }
        (mark, true)
    }
}

fn check_size(name: &Arc<str>, text: &str) -> Result<(), DocumentError> {
    if text.len() > SIZE_LIMIT {
        return Err(Mark::START.error(name, Problem::TooBig));
    }
    Ok(())
}

/// Stand-ins for the braces of `${{NAME}}`: as wide, and without a meaning in YAML.
const OPEN: &str = "$\u{e0f0}\u{e0f0}";
const CLOSE: &str = "\u{e0f1}\u{e0f1}";

/// The text with the braces of all `${{NAME}}` taken out of the sight of the YAML parser: in flow mappings they would
/// open and close objects. APISIX substitutes before it parses and has no such trouble.
fn shield(text: &str) -> Cow<'_, str> {
    if !text.contains("${{") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some((before, inner)) = rest.split_once("${{") {
        out.push_str(before);
        match inner.split_once("}}") {
            Some((name, after)) if !name.contains(['\n', '{']) => {
                out.push_str(OPEN);
                out.push_str(name);
                out.push_str(CLOSE);
                rest = after;
            }
            _ => {
                out.push_str("${{");
                rest = inner;
            }
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

fn unshield(text: &str) -> Cow<'_, str> {
    if !text.contains(OPEN) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace(OPEN, "${{").replace(CLOSE, "}}"))
}

fn number_of(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl Mark {
    const START: Mark = Mark { line: 1, column: 1, size: 1, plain: false };

    fn at(marker: Marker) -> Mark {
        Mark { line: number_of(marker.line()), column: number_of(marker.col() + 1), ..Mark::START }
    }

    fn error(self, file: &Arc<str>, problem: Problem) -> DocumentError {
        DocumentError { file: Arc::clone(file), line: self.line, column: self.column, problem }
    }
}

type Failed = (Mark, Problem);

/// Builds a value from YAML events.
#[derive(Default)]
struct Builder {
    marks: Vec<Mark>,
    stack: Vec<Frame>,
    root: Option<Value>,
    anchors: HashMap<usize, Branch>,
    alias_nodes: usize,
    alias_bytes: usize,
}

/// A container that is not closed yet.
struct Frame {
    at: Mark,
    /// Its own mark.
    index: usize,
    anchor: usize,
    items: Items,
}

enum Items {
    Array(Vec<Value>),
    Object {
        members: Map<String, Value>,
        /// A key without its value.
        key: Option<(Key, Mark)>,
        /// Objects named by `<<`, first one strongest.
        merged: Vec<Branch>,
    },
}

enum Key {
    Name(String),
    Merge,
}

/// A value with its marks, kept for aliases and merges.
#[derive(Clone)]
struct Branch {
    value: Value,
    marks: Vec<Mark>,
}

impl Builder {
    fn run(&mut self, text: &str) -> Result<(), Failed> {
        let mut parser: Parser<'_, StrInput<'_>> = Parser::new_from_str(text);
        let mut documents = 0;
        while let Some(next) = parser.next_event() {
            let (event, span) =
                next.map_err(|error| (Mark::at(*error.marker()), Problem::Syntax(error.info().to_owned())))?;
            let at = Mark::at(span.start);
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        return Err((at, Problem::SecondDocument));
                    }
                }
                Event::Scalar(text, style, anchor, tag) => {
                    self.scalar(at, &text, style, anchor, tag.as_deref())?
                }
                Event::SequenceStart(anchor, _) => self.open(at, anchor, Items::Array(Vec::new()))?,
                Event::MappingStart(anchor, _) => {
                    self.open(
                        at,
                        anchor,
                        Items::Object { members: Map::new(), key: None, merged: Vec::new() },
                    )?;
                }
                Event::SequenceEnd | Event::MappingEnd => self.close()?,
                Event::Alias(anchor) => self.alias(at, anchor)?,
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        Ok(())
    }

    /// Whether the next node is a key, and not a value.
    fn expects_key(&self) -> bool {
        matches!(self.stack.last(), Some(Frame { items: Items::Object { key: None, .. }, .. }))
    }

    /// The mark of a value that begins at `at`: members of objects are found at their key.
    fn value_mark(&self, at: Mark) -> Mark {
        match self.stack.last() {
            Some(Frame { items: Items::Object { key: Some((_, key_at)), .. }, .. }) => *key_at,
            _ => at,
        }
    }

    fn scalar(
        &mut self,
        at: Mark,
        text: &str,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
    ) -> Result<(), Failed> {
        let plain = style == ScalarStyle::Plain;
        let text = &*unshield(text);
        if self.expects_key() {
            if anchor != 0 {
                self.keep(anchor, Branch { value: text.into(), marks: vec![at] }, at)?;
            }
            let key = if plain && text == "<<" { Key::Merge } else { Key::Name(text.to_owned()) };
            return self.key(at, key);
        }
        let value = match tag {
            Some(tag) if tag.is_yaml_core_schema() => tagged(&tag.suffix, text)
                .ok_or_else(|| (at, Problem::BadTag { tag: tag.suffix.clone(), text: text.to_owned() }))?,
            Some(tag) if tag.handle.is_empty() && tag.suffix == "!" => text.into(),
            _ if plain => plain_scalar(text),
            _ => text.into(),
        };
        let index = self.marks.len();
        self.marks.push(Mark { plain: plain && tag.is_none(), ..self.value_mark(at) });
        self.done(index, anchor, value, at)
    }

    fn key(&mut self, at: Mark, key: Key) -> Result<(), Failed> {
        let Some(Frame { index, items: Items::Object { members, key: pending, .. }, .. }) =
            self.stack.last_mut()
        else {
            return Err((at, Problem::BadKey));
        };
        if let Key::Name(name) = &key
            && members.contains_key(name)
        {
            let first = line_of_member(&self.marks, *index, members, name);
            return Err((at, Problem::DuplicateKey { key: name.clone(), first }));
        }
        *pending = Some((key, at));
        Ok(())
    }

    fn open(&mut self, at: Mark, anchor: usize, items: Items) -> Result<(), Failed> {
        if self.expects_key() {
            return Err((at, Problem::BadKey));
        }
        if self.stack.len() >= DEPTH_LIMIT {
            return Err((at, Problem::TooDeep));
        }
        let index = self.marks.len();
        self.marks.push(self.value_mark(at));
        self.stack.push(Frame { at, index, anchor, items });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Failed> {
        let Some(Frame { at, index, anchor, items }) = self.stack.pop() else {
            return Ok(());
        };
        let value = match items {
            Items::Array(items) => Value::Array(items),
            Items::Object { mut members, merged, .. } => {
                for branch in merged {
                    self.merge(&mut members, branch, at)?;
                }
                Value::Object(members)
            }
        };
        let size = number_of(self.marks.len() - index);
        if let Some(mark) = self.marks.get_mut(index) {
            mark.size = size;
        }
        self.done(index, anchor, value, at)
    }

    /// Members of a merged object that are not there yet, in its order.
    fn merge(&mut self, members: &mut Map<String, Value>, branch: Branch, at: Mark) -> Result<(), Failed> {
        match branch.value {
            Value::Object(merged) => {
                let mut index = 1;
                for (key, value) in merged {
                    let size = branch.marks.get(index).map_or(1, |mark| mark.size as usize);
                    if !members.contains_key(&key) {
                        self.marks
                            .extend_from_slice(branch.marks.get(index..index + size).unwrap_or_default());
                        members.insert(key, value);
                    }
                    index += size;
                }
                Ok(())
            }
            Value::Array(items) => {
                let mut index = 1;
                for value in items {
                    let size = branch.marks.get(index).map_or(1, |mark| mark.size as usize);
                    let marks = branch.marks.get(index..index + size).unwrap_or_default().to_vec();
                    index += size;
                    if !value.is_object() {
                        return Err((at, Problem::BadMerge));
                    }
                    self.merge(members, Branch { value, marks }, at)?;
                }
                Ok(())
            }
            _ => Err((at, Problem::BadMerge)),
        }
    }

    /// A node is complete: its marks begin at `index`.
    fn done(&mut self, index: usize, anchor: usize, value: Value, at: Mark) -> Result<(), Failed> {
        if anchor != 0 {
            let marks = self.marks.get(index..).unwrap_or_default().to_vec();
            self.keep(anchor, Branch { value: value.clone(), marks }, at)?;
        }
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(value);
            return Ok(());
        };
        match &mut frame.items {
            Items::Array(items) => items.push(value),
            Items::Object { members, key, merged } => match key.take() {
                Some((Key::Name(name), _)) => {
                    members.insert(name, value);
                }
                Some((Key::Merge, _)) => {
                    if !(value.is_object() || value.is_array()) {
                        return Err((at, Problem::BadMerge));
                    }
                    merged.push(Branch { value, marks: self.marks.split_off(index) });
                }
                None => return Err((at, Problem::BadKey)),
            },
        }
        Ok(())
    }

    /// Copies count, whether they are kept for an alias or put in place of one.
    fn keep(&mut self, anchor: usize, branch: Branch, at: Mark) -> Result<(), Failed> {
        self.spend(&branch, at)?;
        self.anchors.insert(anchor, branch);
        Ok(())
    }

    fn spend(&mut self, branch: &Branch, at: Mark) -> Result<(), Failed> {
        self.alias_nodes += branch.marks.len();
        self.alias_bytes += text_bytes(&branch.value);
        if self.alias_nodes > ALIAS_NODES || self.alias_bytes > ALIAS_BYTES {
            return Err((at, Problem::TooManyAliases));
        }
        Ok(())
    }

    fn alias(&mut self, at: Mark, anchor: usize) -> Result<(), Failed> {
        // The parser refuses names it never saw; one without a value is still open around us.
        let Some(branch) = self.anchors.get(&anchor).cloned() else {
            return Err((at, Problem::Recursive));
        };
        self.spend(&branch, at)?;
        if self.expects_key() {
            let key = match &branch.value {
                Value::String(text) => text.clone(),
                Value::Array(_) | Value::Object(_) => return Err((at, Problem::BadKey)),
                value => value.to_string(),
            };
            return self.key(at, Key::Name(key));
        }
        if branch.marks.len() > 1 && self.stack.len() + depth(&branch.value) > DEPTH_LIMIT {
            return Err((at, Problem::TooDeep));
        }
        let index = self.marks.len();
        let own = self.value_mark(at);
        self.marks.extend_from_slice(&branch.marks);
        if let Some(mark) = self.marks.get_mut(index) {
            *mark = Mark { line: own.line, column: own.column, ..*mark };
        }
        self.done(index, 0, branch.value, at)
    }
}

/// The line of a member of the object whose mark is at `index`.
fn line_of_member(marks: &[Mark], index: usize, members: &Map<String, Value>, name: &str) -> u32 {
    let mut child = index + 1;
    for _ in members.keys().take_while(|key| *key != name) {
        child += marks.get(child).map_or(1, |mark| mark.size as usize);
    }
    marks.get(child).map_or(0, |mark| mark.line)
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(members) => members.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 0,
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// A scalar with a tag of the core schema; `None` if the text does not fit the tag.
fn tagged(tag: &str, text: &str) -> Option<Value> {
    let value = plain_scalar(text);
    match tag {
        "str" => Some(text.into()),
        "int" => value.as_f64().is_some_and(|number| number.fract() == 0.0).then_some(value),
        "float" => value.is_number().then_some(value),
        "bool" => value.is_boolean().then_some(value),
        "null" => value.is_null().then_some(value),
        _ => Some(text.into()),
    }
}

/// What a plain YAML scalar means to lyaml.
pub(crate) fn plain_scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => return Value::Bool(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    // Most scalars are words: a number begins with a digit, a sign or a point.
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return text.into();
    }
    yaml_number(text).map_or_else(|| text.into(), Value::Number)
}

fn yaml_number(text: &str) -> Option<Number> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let digits: Cow<'_, str> =
        if digits.contains('_') { digits.replace('_', "").into() } else { digits.into() };
    let integer = |digits: &str, radix: u32| {
        let value = u64::from_str_radix(digits, radix).ok()?;
        if negative { 0i64.checked_sub_unsigned(value).map(Number::from) } else { Some(Number::from(value)) }
    };
    if let Some(hex) = digits.strip_prefix("0x").filter(|rest| !rest.starts_with('+')) {
        return integer(hex, 16);
    }
    if let Some(binary) = digits.strip_prefix("0b").filter(|rest| !rest.starts_with('+')) {
        return integer(binary, 2);
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        let octal = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b < b'8');
        if let Some(number) = integer(&digits, if octal { 8 } else { 10 }) {
            return Some(number);
        }
    } else if !digits.contains(['.', 'e', 'E']) {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    float(if negative { -value } else { value })
}

/// A Lua number has one type: what is whole is an integer.
fn float(value: f64) -> Option<Number> {
    // 2^53, to which every whole double is exact.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        return Some(Number::from(value as i64));
    }
    Number::from_f64(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::error::escape;

    fn yaml(text: &str) -> Value {
        Document::parse("a.yaml", text).unwrap_or_else(|error| panic!("{error}")).into_value()
    }

    #[test]
    fn plain_scalars_mean_what_lyaml_makes_of_them() {
        let cases = [
            ("yes", json!(true)),
            ("On", json!(true)),
            ("off", json!(false)),
            ("NO", json!(false)),
            ("y", json!("y")),
            ("yEs", json!("yEs")),
            ("'yes'", json!("yes")),
            ("\"on\"", json!("on")),
            ("~", json!(null)),
            ("", json!(null)),
            ("null", json!(null)),
            ("10", json!(10)),
            ("-3", json!(-3)),
            ("+3", json!(3)),
            ("0", json!(0)),
            ("00", json!(0)),
            ("0644", json!(420)),
            ("089", json!(89)),
            ("0x1F", json!(31)),
            ("0b101", json!(5)),
            ("1_000", json!(1000)),
            ("_1", json!("_1")),
            ("1.5", json!(1.5)),
            ("1.0", json!(1)),
            (".5", json!(0.5)),
            ("1e3", json!(1000)),
            ("18446744073709551615", json!(18446744073709551615u64)),
            ("-9223372036854775808", json!(-9223372036854775808i64)),
            ("1.1.1", json!("1.1.1")),
            ("10.0.0.1", json!("10.0.0.1")),
            ("1:30", json!("1:30")),
            ("127.0.0.1:80", json!("127.0.0.1:80")),
            ("2024-01-01", json!("2024-01-01")),
            (".inf", json!(".inf")),
            (".nan", json!(".nan")),
            ("1e999", json!("1e999")),
            ("+", json!("+")),
            (".", json!(".")),
            ("0x", json!("0x")),
            ("0x+1", json!("0x+1")),
            ("10m", json!("10m")),
            ("$host", json!("$host")),
            ("!!str 10", json!("10")),
            ("!!int \"10\"", json!(10)),
            ("!!bool yes", json!(true)),
            ("!own 10", json!(10)),
        ];
        for (text, expected) in cases {
            assert_eq!(yaml(&format!("a: {text}"))["a"], expected, "{text}");
        }
    }

    #[test]
    fn keys_are_text_in_their_own_order() {
        let value = yaml("z: 1\n80: 2\nyes: 3\n\"a b\": 4\nnull: 5\n");
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["z", "80", "yes", "a b", "null"]);
    }

    #[test]
    fn anchors_aliases_and_merges_unfold() {
        let value = yaml(
            "base: &base {type: roundrobin, retries: 1}\n\
             more: &more\n  retries: 2\n  scheme: https\n\
             list: [*base]\n\
             a:\n  <<: *base\n  retries: 5\n\
             b:\n  retries: 6\n  <<: [*more, *base]\n\
             c: {<<: {x: 1}, y: 2}\n\
             d: &k word\n\
             e: {*k : 1}\n",
        );
        assert_eq!(value["list"], json!([{"type": "roundrobin", "retries": 1}]));
        assert_eq!(value["a"], json!({"retries": 5, "type": "roundrobin"}));
        assert_eq!(value["b"], json!({"retries": 6, "scheme": "https", "type": "roundrobin"}));
        assert_eq!(value["c"], json!({"y": 2, "x": 1}));
        assert_eq!(value["e"], json!({"word": 1}));
    }

    #[test]
    fn every_node_is_found_at_its_line() {
        let text = "\
routes:
  - id: 1
    uri: /a
    upstream: &up
      nodes:
        \"127.0.0.1:80\": 1
        \"a/b~c\": 2
  - {id: 2, uri: /b,
     upstream: *up}
base: &base
  x: 1
  y: 2
merged:
  y: 3
  <<: *base
last: [a,
  b]
";
        let document = Document::parse("conf/apisix.yaml", text).unwrap();
        let cases = [
            ("", (1, 1)),
            ("/routes", (1, 1)),
            ("/routes/0", (2, 5)),
            ("/routes/0/uri", (3, 5)),
            ("/routes/0/upstream", (4, 5)),
            ("/routes/0/upstream/nodes/127.0.0.1:80", (6, 9)),
            ("/routes/0/upstream/nodes/a~1b~0c", (7, 9)),
            ("/routes/1", (8, 5)),
            ("/routes/1/id", (8, 6)),
            ("/routes/1/upstream", (9, 6)),
            ("/routes/1/upstream/nodes", (5, 7)),
            ("/merged/y", (14, 3)),
            ("/merged/x", (11, 3)),
            ("/last/0", (16, 8)),
            ("/last/1", (17, 3)),
        ];
        for (pointer, place) in cases {
            assert_eq!(document.line_of(pointer), Some(place), "{pointer}");
        }
        assert_eq!(document.line_of("/routes/0/hosts"), None);
        assert_eq!(document.locate("/routes/0/hosts/1"), (2, 5));
        assert_eq!(document.locate("/routes/7"), (1, 1));
        let error = document.error(ConfigError::invalid("/routes/0/uri", "wrong"));
        assert_eq!(error.to_string(), "conf/apisix.yaml:3:5: /routes/0/uri: wrong");
    }

    #[test]
    fn json_has_places_too() {
        let text = "\u{feff}{\n  \"routes\": [\n    {\"id\": 1, \"uri\": \"/\\u00e9\",\n     \"weight\": 1.0, \"x\": -2.5e1}, {}\n  ],\n  \"b\": [true, false, null, []]\n}\n";
        let document = Document::parse("apisix.json", text).unwrap();
        assert_eq!(
            document.value(),
            &json!({"routes": [{"id": 1, "uri": "/\u{e9}", "weight": 1, "x": -25}, {}], "b": [true, false, null, []]})
        );
        for (pointer, place) in [
            ("", (1, 1)),
            ("/routes", (2, 3)),
            ("/routes/0", (3, 5)),
            ("/routes/0/uri", (3, 15)),
            ("/routes/0/weight", (4, 6)),
            ("/routes/1", (4, 35)),
            ("/b/3", (6, 28)),
        ] {
            assert_eq!(document.line_of(pointer), Some(place), "{pointer}");
        }
    }

    #[test]
    fn what_cannot_be_read_says_where() {
        let cases = [
            ("a.yaml", "a: 1\nb: 2\na: 3\n", "a.yaml:3:1: `a` is written twice, first at line 1"),
            (
                "a.yaml",
                "x:\n  - b: {c: 1}\n    d: 1\n    b: 2\n",
                "a.yaml:4:5: `b` is written twice, first at line 2",
            ),
            ("a.yaml", "a: [1, 2\n", "a.yaml:2:"),
            ("a.yaml", "? [1]\n: 2\n", "a.yaml:1:3: a key must be text"),
            ("a.yaml", "a: &a [*a]\n", "a.yaml:1:8: an alias refers to the node that contains it"),
            ("a.yaml", "a: *b\n", "a.yaml:1:4:"),
            ("a.yaml", "a:\n  <<: 1\n", "a.yaml:2:7: `<<` takes"),
            ("a.yaml", "a:\n  <<: [1]\n", "a.yaml:2:3: `<<` takes"),
            ("a.yaml", "a: 1\n---\nb: 2\n", "a.yaml:2:1: a second document"),
            ("a.yaml", "a: !!int x\n", "a.yaml:1:4: `x` is not what its tag `!!int` says"),
            ("a.json", "{\"a\": 1,\n \"a\": 2}", "a.json:2:2: `a` is written twice, first at line 1"),
            ("a.json", "{\"a\": 1,}", "a.json:1:9: found '}', expected a key"),
            ("a.json", "[1, 2", "a.json:1:6: the text ends, expected `,` or `]`"),
            ("a.json", "[01]", "a.json:1:2: `01` is not a number"),
            ("a.json", "{} x", "a.json:1:4: text after the end"),
            ("a.json", "[\"a]", "a.json:1:2: text without a closing quote"),
            ("a.json", "[\"\\x\"]", "a.json:1:2: text with a wrong escape"),
            ("a.json", "[tru]", "a.json:1:2: found 't', expected a value"),
        ];
        for (name, text, expected) in cases {
            let error = Document::parse(name, text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
        let error = Document::parse_bytes("a.yaml", b"a: 1\nb: \xff\n").unwrap_err();
        assert_eq!(error.to_string(), "a.yaml:2:1: the file is not UTF-8");
    }

    #[test]
    fn alias_bombs_and_deep_nesting_are_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        assert_eq!(Document::yaml("a", &bomb).unwrap_err().problem, Problem::TooManyAliases);

        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), vec!["*a"; 100].join(", "));
        assert_eq!(Document::yaml("a", &long).unwrap_err().problem, Problem::TooManyAliases);

        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        assert_eq!(Document::yaml("a", &deep).unwrap_err().problem, Problem::TooDeep);
        assert_eq!(Document::json("a", &deep).unwrap_err().problem, Problem::TooDeep);

        let mut nested = String::from("a0: &a0 [x]\n");
        for level in 1..200 {
            nested.push_str(&format!("a{level}: &a{level} [*a{}]\n", level - 1));
        }
        assert_eq!(Document::yaml("a", &nested).unwrap_err().problem, Problem::TooDeep);
    }

    #[test]
    fn an_empty_file_is_null() {
        for text in ["", "\n", "# nothing\n", "---\n", "#END"] {
            assert_eq!(yaml(text), Value::Null, "{text:?}");
        }
        assert_eq!(Document::json("a", " \n").unwrap().value(), &Value::Null);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,8}".prop_map(Value::from),
            prop::sample::select(vec!["yes", "1:30", "0x1", " a", "a: b", "#", "-", "<<", "\n", "\u{1F600}"])
                .prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 5, |node| {
            prop_oneof![
                prop::collection::vec(node.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("\\PC{0,6}", node, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Every pointer of a value.
    fn pointers(value: &Value, prefix: String, into: &mut Vec<String>) {
        match value {
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    pointers(item, format!("{prefix}/{index}"), into);
                }
            }
            Value::Object(members) => {
                for (key, item) in members {
                    pointers(item, format!("{prefix}/{}", escape(key)), into);
                }
            }
            _ => {}
        }
        into.push(prefix);
    }

    proptest! {
        #[test]
        fn json_is_read_as_serde_json_reads_it(value in any_json()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            let document = Document::json("a", &text).unwrap();
            prop_assert_eq!(document.value(), &value);
            let mut all = Vec::new();
            pointers(&value, String::new(), &mut all);
            prop_assert_eq!(document.marks.len(), all.len());
            for pointer in all {
                prop_assert!(document.line_of(&pointer).is_some(), "{}", pointer);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[-a:\\[\\]{}&*<!?|>\"' \n0-9,#]{0,60}") {
            for document in [Document::yaml("a", &text), Document::json("a", &text)].into_iter().flatten() {
                let mut all = Vec::new();
                pointers(document.value(), String::new(), &mut all);
                for pointer in all {
                    prop_assert!(document.line_of(&pointer).is_some(), "{}", pointer);
                }
            }
        }
    }
}
