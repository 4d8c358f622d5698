//! Where the body of an answer ends, and what of the bytes that come is content.
//!
//! Content leaves as slices of the bytes that came. Chunk extensions are read and dropped; trailers are collected up to
//! a bound.

use bytes::{Buf, Bytes};
use http_body::Frame;

use super::Defect;
use super::head::{self, Framing};

/// Hexadecimal digits of a chunk size: as many as 64 bits have.
const CHUNK_DIGITS: u8 = 16;
/// Bytes of chunk extensions, and of spaces in their place, in one body.
const MAX_EXTENSIONS: u32 = 16 * 1024;
/// Bytes of trailers.
const MAX_TRAILERS: usize = 16 * 1024;

/// What is left of a body.
#[derive(Debug, Default)]
pub struct Body {
    rest: Rest,
}

#[derive(Debug, Default)]
enum Rest {
    #[default]
    Nothing,
    Length(u64),
    UntilClose,
    Chunked(Chunked),
    /// It was broken right behind the content that was taken last.
    Broken(Defect),
}

#[derive(Debug, Default)]
struct Chunked {
    place: Place,
    extensions: u32,
    trailers: Vec<u8>,
}

/// Inside a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Size {
        value: u64,
        digits: u8,
    },
    /// Spaces between the size and what follows it.
    Space(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
    End,
}

impl Default for Place {
    fn default() -> Self {
        Self::Size { value: 0, digits: 0 }
    }
}

impl Body {
    /// The whole of a body.
    pub fn new(framing: Framing) -> Self {
        let rest = match framing {
            Framing::Empty => Rest::Nothing,
            Framing::Length(length) => Rest::Length(length),
            Framing::UntilClose => Rest::UntilClose,
            Framing::Chunked => Rest::Chunked(Chunked::default()),
        };
        Self { rest }
    }

    /// All of it was taken.
    pub fn is_end(&self) -> bool {
        matches!(self.rest, Rest::Nothing)
    }

    /// How many bytes are left, where that is known.
    pub fn left(&self) -> Option<u64> {
        match &self.rest {
            Rest::Nothing => Some(0),
            Rest::Length(left) => Some(*left),
            _ => None,
        }
    }

    /// Takes the next piece from the front of `bytes`; none when more bytes are needed, or at the end. What is behind
    /// the end stays in `bytes`.
    ///
    /// # Errors
    /// The chunks or the trailers are malformed.
    pub fn take(&mut self, bytes: &mut Bytes) -> Result<Option<Frame<Bytes>>, Defect> {
        match &mut self.rest {
            Rest::Nothing => Ok(None),
            Rest::Broken(defect) => Err(*defect),
            Rest::Length(_) | Rest::UntilClose if bytes.is_empty() => Ok(None),
            Rest::Length(left) => {
                let piece = front(bytes, *left);
                *left -= piece.len() as u64;
                if *left == 0 {
                    self.rest = Rest::Nothing;
                }
                Ok(Some(Frame::data(piece)))
            }
            Rest::UntilClose => Ok(Some(Frame::data(std::mem::take(bytes)))),
            Rest::Chunked(chunked) => {
                chunked.advance(bytes)?;
                if let Place::Data(left) = chunked.place {
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    let piece = front(bytes, left);
                    let left = left - piece.len() as u64;
                    chunked.place = if left == 0 { Place::DataCr } else { Place::Data(left) };
                    // The end is often there already; who knows it needs not ask again.
                    match chunked.advance(bytes) {
                        Ok(()) if chunked.place == Place::End && chunked.trailers.is_empty() => {
                            self.rest = Rest::Nothing;
                        }
                        Ok(()) => {}
                        Err(defect) => self.rest = Rest::Broken(defect),
                    }
                    return Ok(Some(Frame::data(piece)));
                }
                if chunked.place != Place::End {
                    return Ok(None);
                }
                let trailers = std::mem::take(&mut chunked.trailers);
                self.rest = Rest::Nothing;
                if trailers.is_empty() {
                    return Ok(None);
                }
                let trailers = head::trailers(&Bytes::from(trailers))?;
                Ok((!trailers.is_empty()).then(|| Frame::trailers(trailers)))
            }
        }
    }

    /// The connection has ended, and everything that came was taken.
    ///
    /// # Errors
    /// The body should have gone on.
    pub fn close(&mut self) -> Result<(), Defect> {
        match self.rest {
            Rest::Nothing => Ok(()),
            Rest::UntilClose => {
                self.rest = Rest::Nothing;
                Ok(())
            }
            _ => Err(Defect::CutShort),
        }
    }
}

/// Takes up to `limit` bytes. Nothing is left that would hold the memory when all are taken.
fn front(bytes: &mut Bytes, limit: u64) -> Bytes {
    match usize::try_from(limit) {
        Ok(limit) if limit < bytes.len() => bytes.split_to(limit),
        _ => std::mem::take(bytes),
    }
}

impl Chunked {
    /// Reads everything but content: to the next content, to the end, or as far as the bytes reach.
    fn advance(&mut self, bytes: &mut Bytes) -> Result<(), Defect> {
        let mut taken = 0;
        for &byte in bytes.iter() {
            if matches!(self.place, Place::Data(_) | Place::End) {
                break;
            }
            taken += 1;
            self.place = self.step(byte)?;
        }
        if taken == bytes.len() {
            *bytes = Bytes::new();
        } else {
            bytes.advance(taken);
        }
        Ok(())
    }

    fn step(&mut self, byte: u8) -> Result<Place, Defect> {
        Ok(match self.place {
            Place::Size { value, digits } => match (char::from(byte).to_digit(16), byte) {
                (Some(digit), _) if digits < CHUNK_DIGITS => {
                    Place::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }
                }
                (None, b'\r') if digits > 0 => Place::SizeLf(value),
                (None, b';') if digits > 0 => Place::Extension(value),
                (None, b' ' | b'\t') if digits > 0 => self.extension(Place::Space(value))?,
                _ => return Err(Defect::ChunkSize),
            },
            Place::Space(value) => match byte {
                b'\r' => Place::SizeLf(value),
                b';' => Place::Extension(value),
                b' ' | b'\t' => self.extension(Place::Space(value))?,
                _ => return Err(Defect::ChunkSize),
            },
            Place::Extension(value) => match byte {
                b'\r' => Place::SizeLf(value),
                b'\t' | b' '..=b'~' | 0x80.. => self.extension(Place::Extension(value))?,
                _ => return Err(Defect::ChunkExtension),
            },
            Place::SizeLf(value) => match (byte, value) {
                (b'\n', 0) => Place::TrailerStart,
                (b'\n', _) => Place::Data(value),
                _ => return Err(Defect::ChunkSize),
            },
            Place::DataCr if byte == b'\r' => Place::DataLf,
            Place::DataLf if byte == b'\n' => Place::default(),
            Place::DataCr | Place::DataLf => return Err(Defect::ChunkEnd),
            Place::TrailerStart => match byte {
                b'\r' => Place::EndLf,
                byte => self.trailer(byte)?,
            },
            Place::Trailer => self.trailer(byte)?,
            Place::TrailerLf if byte == b'\n' => {
                self.trailer(byte)?;
                Place::TrailerStart
            }
            Place::EndLf if byte == b'\n' => Place::End,
            Place::TrailerLf | Place::EndLf => return Err(Defect::Trailers),
            place @ (Place::Data(_) | Place::End) => place,
        })
    }

    fn extension(&mut self, place: Place) -> Result<Place, Defect> {
        self.extensions += 1;
        if self.extensions > MAX_EXTENSIONS { Err(Defect::ChunkExtension) } else { Ok(place) }
    }

    /// Keeps a byte of a trailer.
    fn trailer(&mut self, byte: u8) -> Result<Place, Defect> {
        let in_line = self.place != Place::TrailerLf;
        if self.trailers.len() >= MAX_TRAILERS || (in_line && byte == b'\n') {
            return Err(Defect::Trailers);
        }
        self.trailers.push(byte);
        Ok(if byte == b'\r' { Place::TrailerLf } else { Place::Trailer })
    }
}
