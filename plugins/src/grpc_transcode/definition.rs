//! Definitions of services: the text of a `.proto` file with its imports, or a descriptor set in base64.
//!
//! Compiled on the control side, once for all objects that use the same text. An import is one of Google's own files or
//! another proto resource: the one with that `name`, with that id, or whose id is the last part of the path.

use std::cell::RefCell;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use config::error::{ConfigError, ErrorKind};
use config::id::{Kind, ResourceKey};
use layers::plugin::{BuildEnv, Upstreams};
use prost_reflect::DescriptorPool;
use protox::Compiler;
use protox::file::{File, FileResolver, GoogleFileResolver};
use sha2::{Digest, Sha256};

/// A compiled definition, or what is wrong with it.
pub type Compiled = Arc<Result<DescriptorPool, String>>;

/// The name of the file that a resource is.
const MAIN: &str = "main.proto";

/// Files that one definition may import, those of its imports included.
const FILES: usize = 256;

/// Compiles the proto resource `id`.
///
/// # Errors
/// There is none.
pub fn compile(id: &str, env: &BuildEnv<'_>) -> Result<Compiled, ConfigError> {
    let Some(content) = env.upstreams.proto(id) else {
        let target = ResourceKey::new(Kind::Proto, id);
        return Err(ConfigError::new("/proto_id", ErrorKind::MissingReference { target }));
    };
    if let Some(pool) = descriptors(&content) {
        let key = format!("grpc-transcode/{}", digest([content.as_str()]));
        return Ok(env.carry.get_or(&key, || Ok(pool)));
    }
    // The texts decide, imports included: an edit of any of them makes another definition.
    let resolver = Resolver { google: GoogleFileResolver::new(), protos: env.upstreams, texts: RefCell::default() };
    resolver.texts.borrow_mut().push((MAIN.to_owned(), content));
    let compiled = protos(&resolver);
    let texts = resolver.texts.into_inner();
    let key = format!("grpc-transcode/{}", digest(texts.iter().flat_map(|(name, text)| [name.as_str(), text])));
    Ok(env.carry.get_or(&key, || compiled))
}

fn digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    STANDARD.encode(digest.finalize())
}

/// The descriptor set that `content` is in base64, if it is one.
fn descriptors(content: &str) -> Option<DescriptorPool> {
    let text: String = content.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let bytes = STANDARD.decode(text).ok()?;
    let pool = DescriptorPool::decode(&*bytes).ok()?;
    let empty = pool.files().len() == 0;
    (!empty).then_some(pool)
}

fn protos(resolver: &Resolver<'_>) -> Result<DescriptorPool, String> {
    // A compiler wants to own what it reads: everything is read before.
    let mut files = Vec::new();
    let mut wanted = vec![MAIN.to_owned()];
    while let Some(name) = wanted.pop() {
        if files.iter().any(|file: &File| file.name() == name) {
            continue;
        }
        if files.len() >= FILES {
            return Err(format!("it imports more than {FILES} files"));
        }
        let file = resolver.open_file(&name).map_err(|error| told(&error))?;
        wanted.extend(file.file_descriptor_proto().dependency.iter().cloned());
        files.push(file);
    }
    let mut compiler = Compiler::with_file_resolver(Read(files));
    compiler.include_imports(true);
    compiler.open_file(MAIN).map_err(|error| told(&error))?;
    Ok(compiler.descriptor_pool())
}

/// The error with the file that it is in.
fn told(error: &protox::Error) -> String {
    match error.file() {
        Some(file) if file != MAIN && !error.is_file_not_found() => format!("{file}: {error}"),
        _ => error.to_string(),
    }
}

/// Files that have been read.
struct Read(Vec<File>);

impl FileResolver for Read {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        self.0
            .iter()
            .find(|file| file.name() == name)
            .cloned()
            .ok_or_else(|| protox::Error::file_not_found(name))
    }
}

/// Finds files among the proto resources.
struct Resolver<'a> {
    google: GoogleFileResolver,
    protos: &'a dyn Upstreams,
    /// What was read of the resources.
    texts: RefCell<Vec<(String, String)>>,
}

impl Resolver<'_> {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        if let Ok(file) = self.google.open_file(name) {
            return Ok(file);
        }
        let known = self.texts.borrow().iter().find(|(known, _)| known == name).map(|(_, text)| text.clone());
        let text = match known {
            Some(text) => text,
            None => {
                let last = name.rsplit('/').next().unwrap_or(name);
                let text = self.protos.proto(name).or_else(|| self.protos.proto(last));
                let text = text.or_else(|| self.protos.proto(last.strip_suffix(".proto")?));
                let text = text.ok_or_else(|| protox::Error::file_not_found(name))?;
                self.texts.borrow_mut().push((name.to_owned(), text.clone()));
                text
            }
        };
        File::from_source(name, &text)
    }
}
