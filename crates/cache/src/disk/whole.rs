//! Whole files: files of images as plain files, for the kernel to read without asking anybody.
//!
//! Each is named by its [`WholeId`] and the BLAKE3 of its bytes. It is written under another name, from frames that were verified,
//! synced, made read-only and renamed, so a crash leaves a name that is removed at the next open, or a whole file. Before a process
//! hands one out it has written it itself or read all of it and compared; after that nobody checks what the kernel reads.
//!
//! Their bytes count in the cap, as much as a segment's, and are counted before the first is written. Making one evicts nothing:
//! it is made where there is room, or not. What frames need later the whole file gives that was not used for longest, before any frame
//! goes, but none that somebody has open (`disk/lease.rs`): removing its name would free nothing.

mod adopt;

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, warn};

use super::{Disk, lease};
use crate::WholeId;
use crate::metrics::add;

/// One is made only where no more than so many quarters of the cap are taken then. The last quarter is for frames to come before
/// whole files go again: without it one would be written, thrown away for a few frames, and written again.
const TAKEN_QUARTERS: u64 = 3;
/// The name under which one is written. There is one at a time.
const NEW: &str = "new";

/// The whole files of a directory.
pub(super) struct Wholes {
    directory: PathBuf,
    files: Mutex<HashMap<WholeId, Whole>>,
    /// Counts uses.
    uses: AtomicU64,
    /// Held by whoever writes or checks one.
    making: Mutex<()>,
    /// Bytes of one under its first name that could not be removed: counted until that is gone.
    stuck_bytes: AtomicU64,
    /// Whether it was said that the file system gives no leases.
    said: AtomicBool,
}

/// One of them.
#[derive(Clone, Copy)]
struct Whole {
    /// The BLAKE3 of its bytes.
    content: blake3::Hash,
    len: u64,
    /// When it was used last, as a number of uses.
    used: u64,
    check: Check,
}

/// Whether a whole file holds what its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Nobody knows yet.
    Due,
    Passed,
    /// It does not, and cannot be removed yet.
    Failed,
}

impl Wholes {
    pub(super) fn new(directory: PathBuf) -> Self {
        let (files, making) = (Mutex::default(), Mutex::default());
        let (uses, stuck_bytes, said) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { directory, files, uses, making, stuck_bytes, said }
    }

    fn path(&self, id: WholeId, content: blake3::Hash) -> PathBuf {
        self.directory.join(format!("{id}.{content}"))
    }

    fn next_use(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Bytes of a whole file that is not there yet, counted. Dropping it gives them back.
pub(crate) struct Room<'a> {
    disk: &'a Disk,
    len: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.disk.uncount_whole(self.len);
    }
}

/// A file that is being written. Dropping it closes and removes it, and then gives its bytes back.
pub(crate) struct NewWhole<'a> {
    // dropped first: what is open frees nothing when it is removed
    pub(crate) file: File,
    name: NewName<'a>,
}

struct NewName<'a> {
    path: PathBuf,
    room: Option<Room<'a>>,
}

impl Drop for NewName<'_> {
    fn drop(&mut self) {
        if let Some(room) = self.room.take()
            && remove(&self.path).is_err()
        {
            room.disk.wholes.stuck_bytes.store(room.len, Ordering::Relaxed);
            std::mem::forget(room);
        }
    }
}

impl Disk {
    /// A new file without a name in their directory: to find out what the kernel does with such. *Errors*: who has one open cannot be
    /// known there.
    pub(crate) fn trial_whole(&self) -> io::Result<File> {
        lease::trial(&self.wholes.directory)
    }

    /// The whole file, open, where it is there and was checked: a use of it.
    pub(crate) fn whole(&self, id: WholeId) -> Option<File> {
        // nobody who holds this reads or writes a file, or frees one; and a name on which there is a lease has no entry
        let mut files = self.wholes.files.lock();
        let whole = files.get_mut(&id).filter(|whole| whole.check == Check::Passed)?;
        whole.used = self.wholes.next_use();
        let (len, opened) = (whole.len, File::open(self.wholes.path(id, whole.content)));
        if is_gone(&opened) {
            files.remove(&id);
            self.uncount_whole(len);
        }
        opened.ok()
    }

    /// Whether the whole file is there, and what is known of its bytes.
    pub(crate) fn whole_check(&self, id: WholeId) -> Option<Check> {
        Some(self.wholes.files.lock().get(&id)?.check)
    }

    /// Nobody else writes or checks a whole file as long as this lives.
    pub(crate) fn making_whole(&self) -> MutexGuard<'_, ()> {
        self.wholes.making.lock()
    }

    /// A whole file whose check is due, open, and what it must hash to.
    pub(crate) fn unchecked_whole(&self, id: WholeId) -> Option<(File, blake3::Hash)> {
        let mut files = self.wholes.files.lock();
        let whole = *files.get(&id).filter(|whole| whole.check == Check::Due)?;
        let opened = File::open(self.wholes.path(id, whole.content));
        if is_gone(&opened) {
            files.remove(&id);
            self.uncount_whole(whole.len);
        }
        Some((opened.ok()?, whole.content))
    }

    /// A whole file holds what its name says.
    pub(crate) fn whole_passed(&self, id: WholeId) {
        if let Some(whole) = self.wholes.files.lock().get_mut(&id) {
            whole.check = Check::Passed;
        }
    }

    /// It does not.
    pub(crate) fn whole_failed(&self, id: WholeId) {
        warn!(%id, "a whole file is damaged: whoever has it open reads what there is until he closes it");
        add(&self.counters.verify_failures, 1);
        if let Some(whole) = self.wholes.files.lock().get_mut(&id) {
            // nothing goes before it
            (whole.check, whole.used) = (Check::Failed, 0);
        }
    }

    /// Removes a whole file, if nobody has it open; whether it is gone.
    pub(crate) fn take_away_whole(&self, id: WholeId) -> bool {
        let mut files = self.wholes.files.lock();
        let Some(whole) = files.get(&id).copied() else { return true };
        let Some(removed) = self.remove_whole(id, whole) else { return false };
        files.remove(&id);
        // freeing a large file takes a while, and nobody who opens another shall wait for that; frames that come do, for the room
        drop(files);
        drop(removed);
        self.uncount_whole(whole.len);
        true
    }

    /// Room for a whole file of `len` bytes, counted; none where that takes more than [`TAKEN_QUARTERS`].
    pub(crate) fn room_for_whole(&self, len: u64) -> Option<Room<'_>> {
        // frames that come at the same time see it
        let _writing = self.writer.lock();
        let (used, used_max) = (self.used(), self.bytes_max / 4 * TAKEN_QUARTERS);
        if used.checked_add(len).is_none_or(|taken| taken > used_max) {
            if self.counters.whole_refused.fetch_add(1, Ordering::Relaxed) == 0 {
                debug!(len, used, used_max, "no room for a whole file: the cache is too full, or too small");
            }
            return None;
        }
        self.count_whole(len);
        Some(Room { disk: self, len })
    }

    /// Begins to write a whole file.
    pub(crate) fn begin_whole<'a>(&self, room: Room<'a>) -> io::Result<NewWhole<'a>> {
        let path = self.wholes.directory.join(NEW);
        remove(&path)?;
        self.uncount_whole(self.wholes.stuck_bytes.swap(0, Ordering::Relaxed));
        let file = File::options().write(true).create_new(true).open(&path)?;
        Ok(NewWhole { file, name: NewName { path, room: Some(room) } })
    }

    /// Keeps what was written: `content` is the BLAKE3 of its bytes, which were verified.
    pub(crate) fn keep_whole(
        &self,
        id: WholeId,
        content: blake3::Hash,
        mut new: NewWhole<'_>,
    ) -> io::Result<()> {
        new.file.set_permissions(Permissions::from_mode(0o400))?;
        new.file.sync_all()?;
        // who reads it next need not be soon
        let _ = rustix::fs::fadvise(&new.file, 0, None, rustix::fs::Advice::DontNeed);
        let mut files = self.wholes.files.lock();
        fs::rename(&new.name.path, self.wholes.path(id, content))?;
        if let Some(room) = new.name.room.take() {
            let whole = Whole { content, len: room.len, used: self.wholes.next_use(), check: Check::Passed };
            files.insert(id, whole);
            std::mem::forget(room);
        }
        add(&self.counters.whole_files, 1);
        Ok(())
    }

    /// Removes the whole file that was not used for longest of those that nobody has open; whether there was one.
    pub(super) fn evict_whole(&self) -> bool {
        let mut oldest: Vec<(u64, WholeId)> =
            self.wholes.files.lock().iter().map(|(id, whole)| (whole.used, *id)).collect();
        oldest.sort_unstable_by_key(|(used, _)| *used);
        let evicted = oldest.into_iter().any(|(_, id)| self.take_away_whole(id));
        add(&self.counters.evicted_whole_files, evicted.into());
        evicted
    }

    /// Removes the name of a whole file that nobody has open; its bytes are freed when what this gives is dropped. None where
    /// somebody has it open, or may have, or the disk refuses.
    fn remove_whole(&self, id: WholeId, whole: Whole) -> Option<Option<File>> {
        let path = self.wholes.path(id, whole.content);
        let file = match lease::alone(&path) {
            Ok(file) => file?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(None),
            Err(error) => {
                if !self.wholes.said.swap(true, Ordering::Relaxed) {
                    warn!(path = %path.display(), %error, "whether a whole file is open cannot be known: it stays");
                }
                return None;
            }
        };
        remove(&path).inspect_err(|error| self.write_failed(error)).ok().map(|()| Some(file))
    }

    fn count_whole(&self, len: u64) {
        self.counters.disk_used_bytes.fetch_add(len, Ordering::Relaxed);
        self.counters.whole_used_bytes.fetch_add(len, Ordering::Relaxed);
    }

    fn uncount_whole(&self, len: u64) {
        self.counters.disk_used_bytes.fetch_sub(len, Ordering::Relaxed);
        self.counters.whole_used_bytes.fetch_sub(len, Ordering::Relaxed);
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Whether somebody else has removed it.
fn is_gone(opened: &io::Result<File>) -> bool {
    opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn bytes_of_a_new_file_that_cannot_be_removed_count_once_until_it_is_gone() {
        let directory = tempfile::tempdir().expect("made");
        let disk = Disk::open(directory.path(), 1 << 20, None, Arc::default()).expect("opened");
        let begin = || disk.begin_whole(disk.room_for_whole(1000).expect("room"));
        drop(begin().expect("begun"));
        assert_eq!(disk.used(), 0);
        let new = begin().expect("begun");
        // what no remove takes away
        let path = disk.wholes.directory.join(NEW);
        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("made");
        drop(new);
        assert!(begin().is_err() && begin().is_err());
        assert_eq!(disk.used(), 1000);
        fs::remove_dir(&path).expect("removed");
        let new = begin().expect("begun");
        assert_eq!(disk.used(), 1000);
        drop(new);
        assert_eq!(disk.used(), 0);
    }
}
