//! Lines of heads and of trailers. What a name or a value may hold is for the types to say that are made of them.

use memchr::memchr;

use super::Defect;

/// The complete lines that some bytes begin with, without their ends.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes of the lines that were read, with their ends.
    pub(super) fn read(&self) -> usize {
        self.at
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let line = rest.get(..memchr(b'\n', rest)?)?;
        self.at += line.len() + 1;
        // LF alone ends a line too (RFC 9112, section 2.2); a CR anywhere else is in no name and no value.
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    }
}

/// Name and value of a field.
pub(super) fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Defect> {
    let (name, value) =
        memchr(b':', line).and_then(|colon| line.split_at_checked(colon)).ok_or(Defect::Field)?;
    let mut value = value.get(1..).unwrap_or_default();
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    Ok((name, value))
}
