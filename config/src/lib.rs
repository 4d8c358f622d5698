//! The words of the project: every APISIX resource as a checked type, and the graph of all of them.
//!
//! Nothing here waits, opens sockets or knows a plugin: text and JSON come in, typed objects or a list of
//! errors go out. It is all that an offline check needs, and everything else in the workspace stands on it.

pub mod apisix_yaml;
pub mod capture;
pub mod check;
pub mod consumer;
pub mod consumer_group;
pub mod credential;
pub mod discovery;
pub mod document;
pub mod env;
pub mod error;
pub mod expr;
pub mod fields;
pub mod global_rule;
pub mod graph;
pub mod id;
pub mod listed_plugins;
pub mod lookup_table;
pub mod mesh;
pub mod meta;
pub mod pattern;
pub mod plugin_catalog;
pub mod plugin_config;
pub mod plugin_metadata;
pub mod process;
pub mod proto;
pub mod resource;
pub mod route;
mod rules;
pub mod schema;
pub mod secret;
pub mod secret_ref;
pub mod sensitive;
pub mod service;
pub mod sidecar;
pub mod ssl;
pub mod stream_route;
mod strict;
pub mod template;
#[cfg(test)]
mod testing;
pub mod typed;
pub mod upstream;
pub mod var;

pub use apisix_yaml::ApisixYaml;
pub use check::{Report, check_directory};
pub use consumer::Consumer;
pub use consumer_group::ConsumerGroup;
pub use credential::Credential;
pub use document::{Document, DocumentError, LocatedError};
pub use env::{Env, ProcessEnv};
pub use error::{ConfigError, ErrorKind};
pub use expr::Expr;
pub use fields::Plugins;
pub use global_rule::GlobalRule;
pub use graph::{Change, Graph, Item, Rejected};
pub use id::{Id, Kind, ResourceKey};
pub use listed_plugins::ListedPlugins;
pub use meta::Meta;
pub use plugin_catalog::{PluginCatalog, PluginSchema};
pub use plugin_config::PluginConfig;
pub use plugin_metadata::PluginMetadata;
pub use process::Process;
pub use proto::Proto;
pub use resource::Resource;
pub use route::Route;
pub use secret::Secret;
pub use service::Service;
pub use sidecar::Sidecar;
pub use ssl::Ssl;
pub use stream_route::StreamRoute;
pub use template::Template;
pub use upstream::Upstream;
pub use var::{Var, Vars};
