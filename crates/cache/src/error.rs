//! What a caller of the cache has to decide about.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lamina_chunk::FrameId;

use crate::{SourceError, Unfit};

/// Why a cache cannot be opened, or a frame not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CacheError {
    /// Another process owns the directory. Use another directory, or that process.
    #[error("cache directory {directory:?} is in use by process {pid}", pid = pid.as_deref().unwrap_or("(unknown)"))]
    Busy {
        /// The directory.
        directory: PathBuf,
        /// The owner's process id, if it wrote it down.
        pid: Option<String>,
    },
    /// The directory cannot be used at all.
    #[error("cache directory {directory:?} cannot be used: {cause}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What the system said.
        cause: Arc<io::Error>,
    },
    /// The directory must not be used, and was not touched.
    #[error("cache directory {directory:?} cannot be used: {why}")]
    Unfit {
        /// The directory.
        directory: PathBuf,
        /// Why, and what to do.
        why: Unfit,
    },
    /// The source failed. Its own error says whether retrying can help.
    #[error("frame {id} not fetched: {cause}")]
    Source {
        /// The frame.
        id: FrameId,
        /// The source's error.
        cause: SourceError,
    },
    /// No answer before the deadline. Retrying may help.
    #[error("frame {id} not fetched within {waited:?}")]
    Deadline {
        /// The frame.
        id: FrameId,
        /// How long was waited.
        waited: Duration,
    },
    /// The source sent other bytes than the frame, four times. Retrying helps only if the source changes.
    #[error("the source sends wrong bytes for frame {0}")]
    Damaged(FrameId),
    /// The process is stopping.
    #[error("frame {0} not fetched: the cache is closing")]
    Stopped(FrameId),
}

impl CacheError {
    /// Whether the same read may succeed soon: nobody said no, it only did not come.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Source { cause: SourceError::Unreachable { .. }, .. } | Self::Deadline { .. })
    }
}
