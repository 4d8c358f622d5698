//! The words of the project: every APISIX resource as a checked type, and the graph of all of them.
//!
//! Nothing here waits, opens sockets or knows a plugin: text and JSON come in, typed objects or a list of
//! errors go out. It is all that an offline check needs, and everything else in the workspace stands on it.

pub mod apisix_yaml;
pub mod document;
pub mod env;
pub mod error;
pub mod expr;
pub mod id;
pub mod pattern;
pub mod plugin_catalog;
pub mod process;
pub mod template;
pub mod typed;
pub mod var;

pub use document::{Document, DocumentError, LocatedError};
pub use env::{Env, ProcessEnv};
pub use error::{ConfigError, ErrorKind};
pub use expr::Expr;
pub use id::{Id, Kind, ResourceKey};
pub use plugin_catalog::{PluginCatalog, PluginSchema};
pub use template::Template;
pub use var::{Var, Vars};
