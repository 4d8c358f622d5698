//! Bodies as values that a template can look into.

use quick_xml::Reader;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The form of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// XML: elements by name without prefix, attributes in `_attr`.
    Xml,
    /// JSON.
    Json,
    /// A form, `a=1&b=2`.
    Encoded,
    /// The query of the request.
    Args,
    /// Text, which is `_body` alone.
    Plain,
    /// Parts with names.
    Multipart,
}

impl Format {
    /// What a media type tells.
    pub fn of(kind: &[u8]) -> Option<Self> {
        let kind = kind.to_ascii_lowercase();
        let has = |word: &[u8]| kind.windows(word.len()).any(|part| part == word);
        if has(b"text/xml") {
            Some(Self::Xml)
        } else if has(b"application/json") {
            Some(Self::Json)
        } else if has(b"application/x-www-form-urlencoded") {
            Some(Self::Encoded)
        } else if has(b"multipart/") {
            Some(Self::Multipart)
        } else {
            None
        }
    }
}

/// Elements nested deeper are refused.
const DEPTH: usize = 128;

/// The value of a body.
///
/// # Errors
/// It has not that form.
pub fn decode(format: Format, body: &[u8], query: &str, kind: &[u8]) -> Result<Value, String> {
    match format {
        Format::Json => match serde_json::from_slice(body) {
            Ok(value @ (Value::Object(_) | Value::Array(_))) => Ok(value),
            Ok(_) => Err("neither an object nor an array".into()),
            Err(error) => Err(error.to_string()),
        },
        Format::Xml => xml(body),
        Format::Encoded => Ok(form(body)),
        Format::Args => Ok(form(query.as_bytes())),
        Format::Plain => Ok(Value::Object(Map::new())),
        Format::Multipart => multipart(body, kind),
    }
}

/// Puts a value beside those of the same name.
fn add(object: &mut Map<String, Value>, name: &str, value: Value) {
    match object.get_mut(name) {
        None => {
            object.insert(name.to_owned(), value);
        }
        Some(Value::Array(list)) => list.push(value),
        Some(before) => {
            let first = before.take();
            *before = Value::Array(vec![first, value]);
        }
    }
}

fn form(text: &[u8]) -> Value {
    let mut object = Map::new();
    for pair in text.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
        let mut parts = pair.splitn(2, |byte| *byte == b'=');
        let plain = |part: &[u8]| {
            let part: Vec<u8> = part.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
            percent_encoding::percent_decode(&part).decode_utf8_lossy().into_owned()
        };
        let name = plain(parts.next().unwrap_or_default());
        add(&mut object, &name, parts.next().map_or(Value::Bool(true), |text| plain(text).into()));
    }
    Value::Object(object)
}

/// An element that is being read.
#[derive(Default)]
struct Element {
    name: String,
    fields: Map<String, Value>,
    text: String,
}

impl Element {
    fn new(start: &BytesStart<'_>) -> Result<Self, String> {
        let mut element = Self { name: start.local_name().as_ref().to_owned(), ..Self::default() };
        let mut attributes = Map::new();
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| error.to_string())?;
            let value = quick_xml::escape::unescape(&attribute.value).map_err(|error| error.to_string())?.into_owned();
            attributes.insert(attribute.key.local_name().as_ref().to_owned(), value.into());
        }
        if !attributes.is_empty() {
            element.fields.insert("_attr".into(), Value::Object(attributes));
        }
        Ok(element)
    }

    /// Text alone is text; beside attributes or elements it is the first entry.
    fn value(mut self) -> Value {
        let text = self.text.trim();
        if self.fields.is_empty() {
            return text.into();
        }
        if !text.is_empty() {
            self.fields.insert("1".into(), text.into());
        }
        Value::Object(self.fields)
    }
}

fn xml(body: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(body).map_err(|error| error.to_string())?;
    let mut reader = Reader::from_str(text);
    let mut open = vec![Element::default()];
    loop {
        let event = reader.read_event().map_err(|error| error.to_string())?;
        let Some(current) = open.last_mut() else { return Err("an element ends that has not begun".into()) };
        match event {
            Event::Start(start) => {
                let element = Element::new(&start)?;
                if open.len() > DEPTH {
                    return Err(format!("elements are nested deeper than {DEPTH}"));
                }
                open.push(element);
            }
            Event::Empty(start) => {
                let element = Element::new(&start)?;
                let name = element.name.clone();
                add(&mut current.fields, &name, element.value());
            }
            Event::End(_) => {
                let Some(element) = open.pop() else { return Err("an element ends that has not begun".into()) };
                let name = element.name.clone();
                match open.last_mut() {
                    Some(parent) => add(&mut parent.fields, &name, element.value()),
                    None => return Err("an element ends that has not begun".into()),
                }
            }
            Event::Text(text) => current.text.push_str(&text),
            Event::CData(text) => current.text.push_str(&text),
            Event::GeneralRef(reference) => {
                let name: &str = &reference;
                match reference.resolve_char_ref().map_err(|error| error.to_string())? {
                    Some(character) => current.text.push(character),
                    // Entities of the document are not expanded: that is how a short text becomes a long one.
                    None => current.text.push_str(
                        resolve_predefined_entity(name).ok_or_else(|| format!("the entity `{name}` is not known"))?,
                    ),
                }
            }
            Event::Eof => break,
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    match (open.pop(), open.is_empty()) {
        (Some(root), true) if !root.fields.is_empty() => Ok(Value::Object(root.fields)),
        (_, false) => Err("an element has no end".into()),
        _ => Err("there is no element".into()),
    }
}

fn multipart(body: &[u8], kind: &[u8]) -> Result<Value, String> {
    let kind = String::from_utf8_lossy(kind);
    let boundary = parameter(&kind, "boundary").ok_or("the media type names no boundary")?;
    let text = String::from_utf8_lossy(body);
    let mark = format!("--{boundary}");
    let mut object = Map::new();
    for part in text.split(&mark).skip(1) {
        if part.starts_with("--") {
            return Ok(Value::Object(object));
        }
        let part = part.strip_prefix("\r\n").or(part.strip_prefix('\n')).unwrap_or(part);
        let Some((head, content)) = part.split_once("\r\n\r\n").or_else(|| part.split_once("\n\n")) else {
            return Err("a part has no head".into());
        };
        let disposition = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
        });
        if let Some(name) = disposition.and_then(|value| parameter(value, "name")) {
            let content = content.strip_suffix("\r\n").or(content.strip_suffix('\n')).unwrap_or(content);
            add(&mut object, name, content.into());
        }
    }
    Err("the last boundary is missing".into())
}

/// A parameter of a header value.
fn parameter<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    value.split(';').skip(1).find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bodies_become_values() {
        let mixed = "multipart/form-data; boundary=\"xx\"";
        let parts = "--xx\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--xx\r\ncontent-disposition: form-data; name=b\r\nContent-Type: text/plain\r\n\r\ntwo\r\nlines\r\n--xx--\r\n";
        let cases = [
            (Format::Json, r#"{"a": [1, {"b": null}]}"#, "", json!({"a": [1, {"b": null}]})),
            (Format::Encoded, "a=1&b=x+y%21&a=2&c&d=", "", json!({"a": ["1", "2"], "b": "x y!", "c": true, "d": ""})),
            (Format::Plain, "{", "", json!({})),
            (Format::Multipart, parts, mixed, json!({"a": "1", "b": "two\r\nlines"})),
            (
                Format::Xml,
                r#"<?xml version="1.0"?><s:E xmlns:s="u"><s:Body id="7"><x> a &amp; &#98; </x><x/><y><![CDATA[<&>]]></y></s:Body></s:E>"#,
                "",
                json!({"E": {"_attr": {"s": "u"}, "Body": {"_attr": {"id": "7"}, "x": ["a & b", ""], "y": "<&>"}}}),
            ),
            (Format::Xml, r#"<a k="v">text</a>"#, "", json!({"a": {"_attr": {"k": "v"}, "1": "text"}})),
        ];
        for (format, body, kind, expected) in cases {
            assert_eq!(decode(format, body.as_bytes(), "", kind.as_bytes()), Ok(expected), "{body}");
        }
        assert_eq!(decode(Format::Args, b"", "a=1", b""), Ok(json!({"a": "1"})));
    }

    #[test]
    fn what_has_another_form_is_refused() {
        let deep = "<a>".repeat(DEPTH + 2);
        let cases = [
            (Format::Json, "{", ""),
            (Format::Json, "7", ""),
            (Format::Xml, "", ""),
            (Format::Xml, "text", ""),
            (Format::Xml, "<a>", ""),
            (Format::Xml, "<a></b>", ""),
            (Format::Xml, "</a>", ""),
            (Format::Xml, "<!DOCTYPE a [<!ENTITY b \"x\">]><a>&b;</a>", ""),
            (Format::Xml, &deep, ""),
            (Format::Multipart, "--xx\r\n", "multipart/form-data; boundary=xx"),
            (Format::Multipart, "", "multipart/form-data"),
        ];
        for (format, body, kind) in cases {
            assert!(decode(format, body.as_bytes(), "", kind.as_bytes()).is_err(), "{body}");
        }
    }
}
