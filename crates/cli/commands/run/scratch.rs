//! A directory for one run, below the cache: where its image is mounted, and where what it writes goes.
//!
//! Whoever has one holds its lock (flock(2)), so the kernel says when a run has died. A directory and its lock appear under the
//! lock of all, under which the dead are looked for as well: so none is taken for dead before it has its lock. The dead ones are
//! taken away without that, each under its own, however large; and so are those whose runs end. So whoever looks may see one that
//! goes the next moment.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

/// Where scratch directories are in a cache directory.
const RUNS: &str = "run";
/// The lock of all in there.
const LOCK: &str = "lock";

/// A scratch directory. Dropping it removes it too, but for what is mounted in it.
pub(super) struct Scratch {
    directory: TempDir,
    /// Open as long as this is there.
    _lock: File,
}

impl Scratch {
    /// Makes one, with the mount point of an image in it, and finds what runs that died have left. Blocks for a moment.
    pub(super) fn create(cache: &Path) -> Result<(Self, Dead)> {
        let runs = cache.join(RUNS);
        take(&runs).with_context(|| format!("a scratch directory in {}", runs.display()))
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Removes it with everything in it.
    pub(super) fn remove(self) {
        clear(self.path());
        let path = self.path().to_owned();
        if let Err(error) = self.directory.close() {
            tracing::warn!(path = %path.display(), %error, "a scratch directory cannot be removed; the next run tries again");
        }
    }
}

/// Scratch directories of runs that died, and their locks.
pub(super) struct Dead(Vec<(PathBuf, File)>);

impl Dead {
    /// Removes them. Blocks for as long as that takes.
    pub(super) fn remove(self) {
        for (path, _lock) in self.0 {
            clear(&path);
            // somebody else may have done it before it was locked
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "a run that died has left what cannot be removed");
            }
        }
    }
}

/// Makes a scratch directory, and locks those whose owners have died.
fn take(runs: &Path) -> io::Result<(Scratch, Dead)> {
    fs::create_dir_all(runs)?;
    let all = File::create(runs.join(LOCK))?;
    all.lock()?;
    let mut dead = Vec::new();
    for entry in fs::read_dir(runs)? {
        let path = entry?.path();
        let lock = match File::open(&path) {
            Ok(found) if found.metadata()?.is_dir() => found,
            Ok(_) => continue,
            // its run has ended since the directory was read
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match lock.try_lock() {
            Ok(()) => dead.push((path, lock)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    let directory = tempfile::Builder::new().prefix("").rand_bytes(8).tempdir_in(runs)?;
    let lock = File::open(directory.path())?;
    lock.lock()?;
    fs::create_dir(directory.path().join("image"))?;
    Ok((Scratch { directory, _lock: lock }, Dead(dead)))
}

/// Takes away what is still mounted in a scratch directory: an image whose daemon has died as well.
fn clear(path: &Path) {
    while unmount(path.join("image"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_that_died_has_left_goes_with_the_next_and_what_one_that_lives_has_stays() {
        let cache = tempfile::tempdir().unwrap();
        let (living, _) = Scratch::create(cache.path()).unwrap();
        let (Scratch { directory, _lock }, _) = Scratch::create(cache.path()).unwrap();
        let dead = directory.keep();
        fs::write(dead.join("image/x"), "left").unwrap();
        drop(_lock);
        let (next, left) = Scratch::create(cache.path()).unwrap();
        left.remove();
        assert!(!dead.exists() && living.path().exists() && next.path().exists());
        living.remove();
        next.remove();
        let left: Vec<_> = fs::read_dir(cache.path().join(RUNS)).unwrap().flatten().collect();
        assert!(left.len() == 1 && left[0].file_name() == LOCK, "{left:?}");
    }

    #[test]
    fn runs_begin_while_others_end() {
        let cache = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for round in 0..200 {
                        let (scratch, dead) = Scratch::create(cache.path()).unwrap();
                        dead.remove();
                        match round % 4 {
                            0 => drop(scratch.directory.keep()),
                            _ => scratch.remove(),
                        }
                    }
                });
            }
        });
        let (last, dead) = Scratch::create(cache.path()).unwrap();
        dead.remove();
        last.remove();
        assert_eq!(fs::read_dir(cache.path().join(RUNS)).unwrap().count(), 1, "but for the lock");
    }
}
