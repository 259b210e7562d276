//! The kernel's readahead, changed while running: small while reading is sparse, large while it is dense. A file takes
//! the value over when it is opened.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tracing::debug;

/// Reads in a row that belong to no dense stream before the window is lowered again.
const SPARSE_READS: u32 = 256;

/// The window of one mount.
#[derive(Debug)]
pub(crate) struct Window {
    path: PathBuf,
    sparse_kb: AtomicU32,
    dense_kb: u32,
    dense_run: u64,
    dense: AtomicBool,
    sparse_reads: AtomicU32,
}

impl Window {
    /// Takes over the window in the file `path` and makes it small.
    pub(crate) fn new(path: PathBuf, sparse_kb: u32, dense_kb: u32, dense_run: u64) -> Self {
        let (dense, sparse_reads) = (AtomicBool::new(false), AtomicU32::new(0));
        let window = Self { path, sparse_kb: sparse_kb.into(), dense_kb, dense_run, dense, sparse_reads };
        window.set(sparse_kb);
        window
    }

    /// Changes what it is while reading is sparse.
    pub(crate) fn settle(&self, sparse_kb: u32) {
        let before = self.sparse_kb.swap(sparse_kb, Ordering::Relaxed);
        if before != sparse_kb && !self.dense.load(Ordering::Relaxed) {
            self.set(sparse_kb);
        }
    }

    /// Takes note of a read that belongs to a stream of `run` bytes.
    pub(crate) fn note(&self, run: u64) {
        if run >= self.dense_run {
            self.sparse_reads.store(0, Ordering::Relaxed);
            if !self.dense.swap(true, Ordering::Relaxed) {
                self.set(self.dense_kb);
            }
        } else if self.dense.load(Ordering::Relaxed)
            && self.sparse_reads.fetch_add(1, Ordering::Relaxed) + 1 >= SPARSE_READS
            && self.dense.swap(false, Ordering::Relaxed)
        {
            self.set(self.sparse_kb.load(Ordering::Relaxed));
        }
    }

    fn set(&self, kb: u32) {
        match fs::write(&self.path, kb.to_string()) {
            Ok(()) => debug!(kb, "kernel readahead"),
            // a container may not have /sys: slower, nothing else
            Err(error) => debug!(path = %self.path.display(), %error, "kernel readahead cannot be set"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_large_while_reading_is_dense() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let now = || fs::read_to_string(file.path()).expect("read");
        let window = Window::new(file.path().to_owned(), 16, 1024, 100);
        assert_eq!(now(), "16");
        window.note(99);
        assert_eq!(now(), "16");
        window.note(100);
        assert_eq!(now(), "1024");
        for _ in 0..SPARSE_READS - 1 {
            window.note(1);
        }
        assert_eq!(now(), "1024");
        window.note(1);
        assert_eq!(now(), "16");
    }
}
