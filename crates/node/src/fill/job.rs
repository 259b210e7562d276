//! One job, and how it is doing.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_wire::proto::FillStats;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::spans::Within;

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

impl State {
    /// In a word.
    fn name(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Waiting(_) => "waiting",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed(_) => "failed",
        }
    }
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
    /// What its fetches are part of.
    pub(super) within: Within,
}

impl Job {
    pub(super) fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    /// Returns once it is cancelled.
    pub(super) async fn until_cancelled(&self) {
        // the sender lives as long as this does
        let _ = self.cancelled.subscribe().wait_for(|cancelled| *cancelled).await;
    }

    /// How it is doing, in a word.
    pub(super) fn state(&self) -> &'static str {
        self.state.lock().name()
    }

    pub(super) fn has_ended(&self) -> bool {
        !matches!(*self.state.lock(), State::Running | State::Waiting(_))
    }

    pub(super) fn stats(&self) -> FillStats {
        let state = self.state.lock().clone();
        let reason = match &state {
            State::Waiting(reason) | State::Failed(reason) => reason.clone(),
            State::Running | State::Done | State::Cancelled => String::new(),
        };
        let directory = self.directory.as_ref().map(|path| path.display().to_string());
        FillStats {
            job: self.number,
            reference: self.reference.clone(),
            directory: directory.unwrap_or_default(),
            total_bytes: self.total.load(Ordering::Relaxed),
            done_bytes: self.done.load(Ordering::Relaxed),
            state: state.name().to_owned(),
            reason,
        }
    }
}
