//! The aliases that decide whether the data path is `Send`.
//!
//! A worker is one thread with one current-thread runtime, so futures and shared values need no atomic counts.
//! Going back to a shared runtime means changing these lines and nothing else.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// A boxed future of the data path. Not `Send`: it never leaves its worker.
pub type LocalBox<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A value shared between the parts of one worker.
pub type Shared<T> = Rc<T>;
