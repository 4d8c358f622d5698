//! Log lines on their way to a file or standard output, off the data threads.
//!
//! Workers hand over finished lines by a bounded queue; one thread writes them in batches. When the queue is full the
//! line is dropped and counted: a blocked pipe or a full disk must not stop traffic.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

/// Lines that may wait; at some 300 bytes a line, 5 MB.
const QUEUE: usize = 16_384;

/// Bytes after which a batch is written though more lines wait.
const BATCH: usize = 64 * 1024;

enum Message {
    Line(String),
    Reopen,
    Close,
}

/// Where the lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(PathBuf),
}

impl Sink {
    /// From a path as nginx configurations write it; `/dev/stdout` and `/dev/stderr` are the streams.
    pub fn at(path: &Path) -> Self {
        match path.to_str() {
            Some("/dev/stdout") => Self::Stdout,
            Some("/dev/stderr") => Self::Stderr,
            _ => Self::File(path.to_owned()),
        }
    }

    fn open(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Self::Stdout => Box::new(io::stdout()),
            Self::Stderr => Box::new(io::stderr()),
            Self::File(path) => Box::new(append(path)?),
        })
    }
}

fn append(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

/// A log file and the thread that writes it. Dropping the last handle's owner ends the thread after what waits.
pub struct LogFile {
    handle: LogHandle,
    thread: Option<JoinHandle<()>>,
}

/// What workers hold.
#[derive(Clone)]
pub struct LogHandle {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl LogFile {
    /// Opens `sink` and starts its thread.
    ///
    /// # Errors
    /// The file cannot be opened or the thread cannot be started.
    pub fn start(sink: Sink) -> io::Result<Self> {
        let out = sink.open()?;
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::<AtomicU64>::default();
        let thread = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_lines(&sink, out, &lines))?;
        Ok(Self { handle: LogHandle { queue, dropped }, thread: Some(thread) })
    }

    /// A handle for a worker.
    pub fn handle(&self) -> LogHandle {
        self.handle.clone()
    }

    /// Opens the file again under its name, after a rotation has moved it.
    pub fn reopen(&self) {
        // A full queue means the writer is behind; the next signal tries again.
        let _ = self.handle.queue.try_send(Message::Reopen);
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        let _ = self.handle.queue.send(Message::Close);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl LogHandle {
    /// Hands over a line, without its line end. Dropped and counted when too many wait.
    pub fn line(&self, line: String) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(line)) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn write_lines(sink: &Sink, mut out: Box<dyn Write + Send>, lines: &Receiver<Message>) {
    let mut batch = Vec::with_capacity(BATCH);
    while let Ok(first) = lines.recv() {
        let mut next = Some(first);
        let mut reopen = false;
        let mut close = false;
        while let Some(message) = next {
            match message {
                Message::Line(line) => {
                    batch.extend_from_slice(line.as_bytes());
                    batch.push(b'\n');
                }
                Message::Reopen => reopen = true,
                Message::Close => close = true,
            }
            next = if batch.len() < BATCH && !close { lines.try_recv().ok() } else { None };
        }
        if let Err(error) = out.write_all(&batch).and_then(|()| out.flush()) {
            tracing::warn!(%error, lines = batch.iter().filter(|b| **b == b'\n').count(), "access log lines lost");
        }
        batch.clear();
        if reopen {
            match sink.open() {
                Ok(opened) => out = opened,
                Err(error) => {
                    tracing::error!(%error, ?sink, "the log cannot be reopened; the old file is still written")
                }
            }
        }
        if close {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_all_written_before_the_end_and_a_rotated_file_is_left() {
        let folder = std::env::temp_dir().join(format!("postern-log-{}", std::process::id()));
        let (path, moved) = (folder.join("access.log"), folder.join("access.log.1"));
        let log = LogFile::start(Sink::at(&path)).unwrap();
        log.handle().line("one".to_owned());
        while std::fs::read_to_string(&path).unwrap().is_empty() {
            std::thread::yield_now();
        }
        std::fs::rename(&path, &moved).unwrap();
        log.reopen();
        while !path.exists() {
            std::thread::yield_now();
        }
        log.handle().line("two".to_owned());
        drop(log);
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "one\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two\n");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
