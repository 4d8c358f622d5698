//! How a worker sees what control publishes. Control swaps an `Arc`; a worker compares one number per request and
//! hands out an `Rc`, so a request sees one value from its start to its end and no counter is shared between cores.
//! What a worker no longer needs goes back to control to be freed there: a large snapshot takes milliseconds.

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

/// A value that control replaces and workers read.
pub struct Published<T> {
    current: ArcSwap<T>,
    /// Counts publications; written after `current`, so who sees the number sees at least that value.
    revision: AtomicU64,
    retired: mpsc::UnboundedSender<Arc<T>>,
}

impl<T: Send + Sync + 'static> Published<T> {
    /// A first value, and the place where former ones arrive to be freed.
    pub fn new(value: Arc<T>) -> (Arc<Self>, Retired<T>) {
        let (retired, receiver) = mpsc::unbounded_channel();
        let published = Self { current: ArcSwap::new(value), revision: AtomicU64::new(0), retired };
        (Arc::new(published), Retired(receiver))
    }

    /// Replaces the value. Every worker uses it from its next request on.
    pub fn publish(&self, value: Arc<T>) {
        let former = self.current.swap(value);
        self.revision.fetch_add(1, Ordering::Release);
        self.retire(former);
    }

    /// The value now, for readers that are no workers.
    pub fn load(&self) -> Arc<T> {
        self.current.load_full()
    }

    fn retire(&self, value: Arc<T>) {
        // With control gone the process is ending; then it is freed right here.
        let _ = self.retired.send(value);
    }
}

/// Frees former values away from the workers.
pub struct Retired<T>(mpsc::UnboundedReceiver<Arc<T>>);

impl<T: Send + Sync + 'static> Retired<T> {
    /// Frees what comes back, on threads that may block, until nobody publishes any more.
    pub async fn run(mut self) {
        while let Some(value) = self.0.recv().await {
            let freed = tokio::task::spawn_blocking(move || drop(value)).await;
            if freed.is_err() {
                tracing::error!("freeing a former snapshot panicked");
            }
        }
    }
}

/// One worker's sight of a published value.
pub struct View<T: Send + Sync + 'static> {
    published: Arc<Published<T>>,
    seen: RefCell<(u64, Rc<Held<T>>)>,
}

impl<T: Send + Sync + 'static> View<T> {
    /// Begins with the value of now.
    pub fn new(published: Arc<Published<T>>) -> Self {
        let revision = published.revision.load(Ordering::Acquire);
        let held = Held::new(&published);
        Self { published, seen: RefCell::new((revision, held)) }
    }

    /// The current value. Keep it as long as the request needs one configuration, and no longer: a tunnel that
    /// holds it for days keeps the whole former snapshot alive.
    pub fn current(&self) -> Rc<Held<T>> {
        self.refresh();
        self.seen.borrow().1.clone()
    }

    /// Lets go of a former value. A worker without requests does it now and then, or it would keep one for ever.
    pub fn refresh(&self) {
        let revision = self.published.revision.load(Ordering::Acquire);
        let mut seen = self.seen.borrow_mut();
        if seen.0 != revision {
            *seen = (revision, Held::new(&self.published));
        }
    }
}

/// A worker's share of a published value.
pub struct Held<T: Send + Sync + 'static> {
    value: Option<Arc<T>>,
    published: Arc<Published<T>>,
}

impl<T: Send + Sync + 'static> Held<T> {
    fn new(published: &Arc<Published<T>>) -> Rc<Self> {
        Rc::new(Self { value: Some(published.load()), published: published.clone() })
    }

    /// The value itself, for what outlives the worker.
    pub fn arc(&self) -> Option<&Arc<T>> {
        self.value.as_ref()
    }
}

impl<T: Send + Sync + 'static> Deref for Held<T> {
    type Target = T;

    #[expect(clippy::expect_used, reason = "taken only while it is dropped")]
    fn deref(&self) -> &T {
        self.value.as_deref().expect("a held value is there until it is dropped")
    }
}

impl<T: Send + Sync + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.published.retire(value);
        }
    }
}

#[cfg(test)]
mod tests {

    use std::sync::Mutex;
    use std::thread::ThreadId;

    use super::*;

    /// Notes which thread frees it.
    struct Noted(u32, Arc<Mutex<Vec<(u32, ThreadId)>>>);

    impl Drop for Noted {
        fn drop(&mut self) {
            self.1.lock().unwrap().push((self.0, std::thread::current().id()));
        }
    }

    #[tokio::test]
    async fn a_request_keeps_the_value_it_started_with() {
        let (published, _retired) = Published::new(Arc::new(1));
        let view = View::new(published.clone());
        let before = view.current();
        published.publish(Arc::new(2));
        let after = view.current();
        assert_eq!((**before, **after), (1, 2));
        assert!(Rc::ptr_eq(&after, &view.current()), "no new value, no new share");
    }

    #[tokio::test]
    async fn former_values_are_freed_on_the_control_side() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let (published, retired) = Published::new(Arc::new(Noted(1, log.clone())));
        let worker = std::thread::spawn({
            let published = published.clone();
            move || {
                let view = View::new(published.clone());
                let request = view.current();
                published.publish(Arc::new(Noted(2, log.clone())));
                view.refresh();
                drop(request);
                assert_eq!(log.lock().unwrap().len(), 0, "not on the worker");
                log
            }
        });
        let (worker_id, log) = (worker.thread().id(), worker.join().unwrap());
        drop(published);
        retired.run().await;
        let freed = log.lock().unwrap();
        assert_eq!(freed.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2]);
        assert!(freed.iter().all(|(_, thread)| *thread != worker_id));
    }
}
