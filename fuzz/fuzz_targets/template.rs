//! Strings with variables, in the three dialects.

#![no_main]

use std::borrow::Cow;

use config::template::Piece;
use config::{Template, Var, Vars};
use libfuzzer_sys::fuzz_target;

struct Nothing;

impl Vars for Nothing {
    fn get<'a>(&'a self, _: &Var) -> Option<Cow<'a, str>> {
        None
    }
}

fuzz_target!(|text: &str| {
    let templates =
        [Template::parse(text), Template::parse_keeping_captures(text), Template::parse_log_format(text)];
    for template in &templates {
        let rendered = template.to_text(&Nothing);
        assert_eq!(template.is_literal(), template.vars().count() == 0);
        assert!(rendered.len() <= text.len());
        if !text.contains('$') {
            assert_eq!(rendered, text);
        }
        let mut previous = false;
        for piece in template.pieces() {
            let is_text = matches!(piece, Piece::Text(_));
            assert!(!(previous && is_text), "two texts in a row");
            previous = is_text;
        }
    }
});
