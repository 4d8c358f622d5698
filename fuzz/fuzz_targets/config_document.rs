//! `config.yaml`, `apisix.yaml` and `apisix.json`: the first byte chooses, the rest is the file.

#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use config::plugin_catalog::NoPlugins;
use config::{ApisixYaml, Document, LocatedError, Process, Resource};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let env = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "x: y".to_owned())]);
    // YAML ends lines at a carriage return, too.
    let lines = text.matches(['\n', '\r']).count() + 2;
    let inside = |errors: &[LocatedError]| {
        assert!(!errors.is_empty());
        assert!(errors.iter().all(|error| error.line as usize <= lines), "{errors:?}");
    };
    match choice % 3 {
        0 => {
            let Ok(mut document) = Document::yaml("config.yaml", text) else { return };
            places(&document, document.value(), &mut String::new());
            if let Err(errors) = Process::read(&mut document, Path::new(""), &env) {
                inside(&errors);
            }
        }
        1 => {
            if let Ok(document) = Document::json("apisix.json", text) {
                places(&document, document.value(), &mut String::new());
                // What is read as JSON is JSON, but for references outside of quotes and files of blanks.
                if !text.contains("${{") && !text.trim().is_empty() {
                    assert!(serde_json::from_str::<Value>(text.trim_start_matches('\u{feff}')).is_ok());
                }
            }
            match ApisixYaml::parse("apisix.json", text, &env) {
                Ok(file) => resources(&file, &env),
                Err(errors) => inside(&errors),
            }
        }
        _ => match ApisixYaml::parse("apisix.yaml", &format!("{text}\n#END"), &env) {
            Ok(file) => resources(&file, &env),
            Err(errors) => assert!(!errors.is_empty()),
        },
    }
});

/// Every node has a place.
fn places(document: &Document, value: &Value, pointer: &mut String) {
    assert!(document.line_of(pointer).is_some(), "{pointer}");
    let length = pointer.len();
    let mut below = |token: &str, value: &Value| {
        pointer.push('/');
        pointer.push_str(&config::error::escape(token));
        places(document, value, pointer);
        pointer.truncate(length);
    };
    match value {
        Value::Array(items) if items.len() < 64 => {
            items.iter().enumerate().for_each(|(index, item)| below(&index.to_string(), item));
        }
        Value::Object(members) if members.len() < 64 => {
            members.iter().for_each(|(key, item)| below(key, item));
        }
        _ => {}
    }
}

/// Every item becomes a resource or errors that can be placed.
fn resources(file: &ApisixYaml, env: &BTreeMap<String, String>) {
    for item in file.items() {
        match Resource::parse_with(&item.key, &item.value(), &NoPlugins, env) {
            Ok(resource) => {
                resource.to_value();
            }
            Err(errors) => {
                assert!(!errors.is_empty());
                errors.into_iter().for_each(|error| assert!(file.locate(&item.key, error).line > 0));
            }
        }
    }
}
