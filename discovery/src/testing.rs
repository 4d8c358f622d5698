//! The suite of conduct: what every source has to do, run over each of them against its own registry.
//!
//! A source's test implements [`Registry`] for the registry it starts (a real one, or a fake where none can be had) and
//! calls [`conduct`].

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::source::Source;

/// A registry under the control of a test.
pub trait Registry: Send {
    /// A source that speaks to it.
    fn source(&self) -> Arc<dyn Source>;

    /// How `service` is named in `service_name`.
    fn service_name(&self, service: &str) -> String;

    /// Registers `host:port` as an instance of `service`, healthy, or changes its weight.
    fn register<'a>(&'a mut self, service: &'a str, address: &'a str, weight: u32) -> BoxFuture<'a, ()>;

    /// Takes an instance out, in the registry's own way.
    fn deregister<'a>(&'a mut self, service: &'a str, address: &'a str) -> BoxFuture<'a, ()>;

    /// Makes the registry misbehave, or behave again.
    fn behave(&mut self, how: Conduct) -> BoxFuture<'_, Able>;
}

/// How a registry behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    Well,
    /// Answers with its kind of internal error.
    Errors,
    /// Begins an answer and does not end it.
    SlowBody,
    /// Accepts connections and says nothing.
    Silent,
    /// Ends an answer in the middle.
    HalfBody,
    /// Answers with something that is not its protocol.
    Garbage,
    /// Is gone and comes back with what it knew.
    Restarts,
    /// Is gone and comes back empty, and its index, version or generation begins again.
    RestartsEmpty,
    /// The index, version or generation goes backwards while the contents stay.
    Rewinds,
}

/// Whether a registry of the test can be made to behave so. One that cannot be skips that part of the suite, and the
/// suite says which parts it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Able {
    Yes,
    No,
}
