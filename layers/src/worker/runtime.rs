//! Starts the workers and sees them end. Each is a named thread with a current-thread runtime, its own sockets, stack
//! and clock; a panic of one is caught and told. The control side keeps this handle and nothing else of them.

use std::any::Any;
use std::io;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use crate::stack::HttpService;
use crate::worker::accept::{Acceptor, ListenOptions, Listening};
use crate::worker::context::{Stats, WorkerContext};
use crate::worker::deadlines::{Ended, TICK, Timeouts};
use crate::worker::drain::{Casualty, Drain, Report, Stage};
use crate::worker::serve::{ServeSettings, Server};

/// Threads of one worker for what blocks: name look-ups of the system, files.
const BLOCKING_THREADS: usize = 16;
/// What connections get to be taken apart after they were cut.
const AFTER_CUT: Duration = Duration::from_millis(500);

/// How workers run.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// How many there are; nginx `worker_processes`.
    pub workers: usize,
    /// Client connections of one worker; nginx `worker_connections`.
    pub connections: usize,
    /// What clients may take their time for.
    pub timeouts: Timeouts,
    /// How connections are served.
    pub serve: ServeSettings,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            connections: 10_620,
            timeouts: Timeouts::default(),
            serve: ServeSettings::default(),
        }
    }
}

/// A worker ended although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerFailure {
    #[error("worker {worker} panicked: {message}")]
    Panicked { worker: usize, message: String },
    #[error("worker {worker} failed: {error}")]
    Failed { worker: usize, error: io::Error },
}

/// The running workers.
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
    drain: Drain,
    stats: Vec<Arc<Stats>>,
    failures: mpsc::UnboundedReceiver<WorkerFailure>,
    casualties: mpsc::UnboundedReceiver<Casualty>,
}

impl Workers {
    /// Starts the workers. `make` builds the stack of each, on its thread and inside its runtime.
    ///
    /// # Errors
    /// A thread cannot be started; those that were end again.
    pub fn start<S, F>(settings: &WorkerSettings, listeners: Vec<Listening>, make: F) -> io::Result<Self>
    where
        S: HttpService,
        F: Fn(&Rc<WorkerContext>) -> S + Send + Sync + 'static,
    {
        let (drain, stage) = Drain::new();
        let (failed, failures) = mpsc::unbounded_channel();
        let (fell, casualties) = mpsc::unbounded_channel();
        let make = Arc::new(make);
        let workers = settings.workers.max(1);
        let mut sockets: Vec<Vec<(TcpListener, ListenOptions)>> = (0..workers).map(|_| Vec::new()).collect();
        for Listening { sockets: bound, options } in listeners {
            for (worker, socket) in sockets.iter_mut().zip(bound) {
                worker.push((socket, options.clone()));
            }
        }
        let mut handle = Self { threads: Vec::new(), drain, stats: Vec::new(), failures, casualties };
        for (index, listeners) in sockets.into_iter().enumerate() {
            let stats = Arc::new(Stats::default());
            handle.stats.push(stats.clone());
            let worker = Worker {
                index,
                settings: WorkerSettings { workers, ..settings.clone() },
                listeners,
                stats,
                stage: stage.clone(),
                casualties: fell.clone(),
            };
            let (make, failed) = (make.clone(), failed.clone());
            let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                let failure = match catch_unwind(AssertUnwindSafe(|| worker.run(&*make))) {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => WorkerFailure::Failed { worker: index, error },
                    Err(panic) => WorkerFailure::Panicked { worker: index, message: message(&*panic) },
                };
                tracing::error!(%failure, "a worker ended");
                let _ = failed.send(failure);
            })?;
            handle.threads.push(thread);
        }
        Ok(handle)
    }

    /// Starts and asks about the drain.
    pub fn drain(&self) -> &Drain {
        &self.drain
    }

    /// The counters, by worker.
    pub fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    /// Waits for a worker to fail. Pending for ever while all is well and after they have ended in order.
    pub async fn failed(&mut self) -> WorkerFailure {
        match self.failures.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Waits until all workers have ended, which they do once [`drain`](Self::drain) was started, but no longer
    /// than `patience`.
    pub async fn ended(mut self, patience: Duration) -> Report {
        let started = Instant::now();
        let mut report = Report::default();
        let all = async {
            while let Some(casualty) = self.casualties.recv().await {
                report.casualties.push(casualty);
            }
            // Every worker has let go of its end; its thread is about to be over.
            while self.threads.iter().any(|thread| !thread.is_finished()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = tokio::time::timeout(patience, all).await;
        for (index, thread) in self.threads.into_iter().enumerate() {
            if thread.is_finished() {
                // A panic was told when it happened.
                let _ = thread.join();
            } else {
                report.stuck.push(index);
            }
        }
        report.took = started.elapsed();
        report
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}

/// What a worker's thread starts with.
struct Worker {
    index: usize,
    settings: WorkerSettings,
    listeners: Vec<(TcpListener, ListenOptions)>,
    stats: Arc<Stats>,
    stage: watch::Receiver<Stage>,
    casualties: mpsc::UnboundedSender<Casualty>,
}

impl Worker {
    fn run<S: HttpService>(self, make: &impl Fn(&Rc<WorkerContext>) -> S) -> io::Result<()> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(format!("worker-{}-blocking", self.index))
            .build_local(LocalOptions::default())?;
        let done = runtime.block_on(self.serve(make));
        // What blocks is not waited for.
        runtime.shutdown_background();
        done
    }

    async fn serve<S: HttpService>(self, make: &impl Fn(&Rc<WorkerContext>) -> S) -> io::Result<()> {
        let Self { index, settings, listeners, stats, mut stage, casualties } = self;
        let context =
            WorkerContext::reporting(index, settings.workers, &settings.timeouts, stats, Some(casualties));
        let server = Server::new(&context, make(&context), settings.serve.clone());
        let acceptors: Vec<_> = listeners
            .into_iter()
            .map(|(socket, options)| {
                let acceptor = Acceptor {
                    server: server.clone(),
                    context: context.clone(),
                    options: Rc::new(options),
                    limit: settings.connections,
                };
                tokio::task::spawn_local(acceptor.run(socket, stage.clone()))
            })
            .collect();
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut until = None;
        while until.is_none() {
            tokio::select! {
                _ = ticker.tick() => context.tick(),
                changed = stage.changed() => until = draining(&stage, changed.is_ok()),
            }
        }
        context.start_draining();
        for acceptor in acceptors {
            match acceptor.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "a listener ended"),
                Err(error) => tracing::error!(%error, "a listener panicked"),
            }
        }
        let mut cut = None;
        loop {
            let gone = context.empty.notified();
            if context.connections() == 0 {
                return Ok(());
            }
            context.deadlines().each(|watch| watch.wake());
            let now = Instant::now();
            if cut.is_none() && until.flatten().is_some_and(|until| until <= now) {
                cut = Some(now + AFTER_CUT);
                context.deadlines().each(|watch| watch.end(Ended::Drain));
            }
            if cut.is_some_and(|cut| cut <= now) {
                return Ok(());
            }
            tokio::select! {
                () = gone => {}
                _ = ticker.tick() => context.tick(),
                changed = stage.changed(), if cut.is_none() => {
                    until = draining(&stage, changed.is_ok()).or(until);
                }
            }
        }
    }
}

/// Until when to drain, if that is the order. With nobody left to give orders, at once.
fn draining(stage: &watch::Receiver<Stage>, ordered: bool) -> Option<Option<Instant>> {
    match *stage.borrow() {
        _ if !ordered => Some(Some(Instant::now())),
        Stage::Draining { until } => Some(until),
        Stage::Serving => None,
    }
}
