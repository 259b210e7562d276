//! One job, and how it is doing.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_wire::proto::FillStats;
use parking_lot::Mutex;
use tokio::sync::watch;

/// How a job is doing.
#[derive(Clone, Debug)]
pub(super) enum State {
    Running,
    /// Nobody answers.
    Waiting(String),
    Done,
    Cancelled,
    Failed(String),
}

/// One job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(super) number: u64,
    pub(super) reference: String,
    pub(super) directory: Option<PathBuf>,
    pub(super) total: AtomicU64,
    pub(super) done: AtomicU64,
    pub(super) state: Mutex<State>,
    pub(super) cancelled: watch::Sender<bool>,
}

impl Job {
    pub(super) fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    pub(super) fn has_ended(&self) -> bool {
        !matches!(*self.state.lock(), State::Running | State::Waiting(_))
    }

    pub(super) fn stats(&self) -> FillStats {
        let (state, reason) = match self.state.lock().clone() {
            State::Running => ("running", String::new()),
            State::Waiting(reason) => ("waiting", reason),
            State::Done => ("done", String::new()),
            State::Cancelled => ("cancelled", String::new()),
            State::Failed(reason) => ("failed", reason),
        };
        let directory = self.directory.as_ref().map(|path| path.display().to_string());
        FillStats {
            job: self.number,
            reference: self.reference.clone(),
            directory: directory.unwrap_or_default(),
            total_bytes: self.total.load(Ordering::Relaxed),
            done_bytes: self.done.load(Ordering::Relaxed),
            state: state.to_owned(),
            reason,
        }
    }
}
