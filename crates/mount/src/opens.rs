//! Which big files of a passthrough mount are open, and how the kernel reads each.
//!
//! While any descriptor of an inode is open, all of them go the same way: by pages that we answer, or past us to one backing file
//! that the kernel knows by a number (`fs/fuse/iomode.c`; anything else fails the open with `EIO`). So the first open decides, and
//! the last release ends it.
//!
//! What was decided is in a table that outlives this process, a memory file that its holder keeps beside the connection, and so
//! the next process goes on with it. Order is the safety argument: an open is in the table before it is answered, and a release has
//! been answered before it is. A process that is killed between the two leaves an inode that looks open for longer than it is:
//! then it stays as it is until the unmount, which is right, if not always fast. A backing file leaves the table before its number
//! is given back; a number that nobody gives back keeps a file on disk until the unmount, and nothing else.

mod table;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::BackingId;
use lamina_image::Ino;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::ioctl::{Setter, opcode};
use tracing::warn;

use self::table::Open;
pub(crate) use self::table::Table;

/// `FUSE_DEV_IOC_BACKING_CLOSE` of `include/uapi/linux/fuse.h`: `_IOW(229, 2, uint32_t)`.
const BACKING_CLOSE: rustix::ioctl::Opcode = opcode::write::<u32>(229, 2);

/// The open inodes of one mount, at most as many as the image has.
pub(crate) struct Opens {
    connection: OwnedFd,
    table: Table,
    open: Mutex<HashMap<Ino, Open>>,
    /// Whether there are new backing files.
    past: AtomicBool,
}

impl Opens {
    /// Goes on with what `table` says is open. There are no new backing files before [`Opens::go_past`].
    pub(crate) fn new(connection: OwnedFd, table: Table) -> io::Result<Self> {
        let open = Mutex::new(table.read()?);
        Ok(Self { connection, table, open, past: AtomicBool::new(false) })
    }

    /// From now on files are opened past us. By then whoever is to go on after this process must have the table: who does not have it
    /// cannot tell which file has pages of ours. *Errors*: the kernel takes no backing file like `trial` from this process.
    pub(crate) fn go_past(&self, trial: &File) -> io::Result<()> {
        self.end(BackingId::create_raw(&self.connection, trial)?);
        self.past.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether that has begun.
    pub(crate) fn is_past(&self) -> bool {
        self.past.load(Ordering::Acquire)
    }

    /// A copy of the table's descriptor, for whoever keeps it open beyond this process.
    pub(crate) fn table(&self) -> io::Result<OwnedFd> {
        self.table.descriptor()
    }

    /// Counts one more descriptor of `ino`: the number of the backing file that it reads, if any. `whole` is asked for one where
    /// the file is not open yet.
    pub(crate) fn open(&self, ino: Ino, whole: impl FnOnce() -> Option<File>) -> Option<u32> {
        let mut open = self.open.lock();
        let mut now = open.get(&ino).copied().unwrap_or_else(|| {
            let whole = if self.is_past() { whole() } else { None };
            let backing = whole.and_then(|file| self.begin(&file));
            Open { count: 0, backing: backing.unwrap_or_default() }
        });
        now.count = now.count.saturating_add(1);
        self.table.write(ino, now);
        open.insert(ino, now);
        Some(now.backing).filter(|backing| *backing > 0)
    }

    /// Counts one descriptor less; whether it was the last.
    pub(crate) fn release(&self, ino: Ino) -> bool {
        let mut open = self.open.lock();
        let Some(now) = open.get(&ino).copied() else { return false };
        if now.count > 1 {
            let now = Open { count: now.count - 1, ..now };
            self.table.write(ino, now);
            open.insert(ino, now);
            return false;
        }
        self.table.write(ino, Open::default());
        open.remove(&ino);
        if now.backing > 0 {
            self.end(now.backing);
        }
        true
    }

    fn begin(&self, file: &File) -> Option<u32> {
        let begun = BackingId::create_raw(&self.connection, file);
        begun.inspect_err(|error| warn!(%error, "the kernel takes no backing file")).ok()
    }

    /// Gives a backing file's number back.
    fn end(&self, backing: u32) {
        #[expect(unsafe_code, reason = "rustix cannot know what an ioctl takes")]
        // SAFETY: this one takes a pointer to a u32, and reads it
        let ended =
            unsafe { rustix::ioctl::ioctl(&self.connection, Setter::<BACKING_CLOSE, u32>::new(backing)) };
        match ended {
            // the mount is gone, and its backing files with it
            Ok(()) | Err(Errno::PERM | Errno::NODEV | Errno::NOTCONN) => {}
            Err(error) => warn!(%error, "a backing file is not given back before the unmount"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is open as a process finds it, behind a connection that is none.
    fn found(table: Table) -> Opens {
        Opens::new(File::open("/dev/null").expect("it is there").into(), table).expect("read")
    }

    #[test]
    fn what_was_open_goes_the_same_way_in_the_next_process_until_it_is_released_as_often() {
        let before = found(Table::new(2, 0).expect("memory"));
        let (past, by_pages) = (Ino(1), Ino(2));
        let begun = Open { count: 2, backing: 7 };
        before.table.write(past, begun);
        assert_eq!([(); 2].map(|()| before.open(by_pages, || None)), [None, None]);
        let next = |opens: &Opens| found(Table::of(opens.table().expect("a copy"), 2).expect("a table"));
        let after = next(&before);
        after.past.store(true, Ordering::Release);
        assert_eq!(
            *after.open.lock(),
            HashMap::from([(past, begun), (by_pages, Open { count: 2, backing: 0 })])
        );
        let none = || -> Option<File> { panic!("it is open already") };
        assert_eq!((after.open(past, none), after.open(by_pages, none)), (Some(7), None));
        for ino in [past, by_pages] {
            assert_eq!([(); 4].map(|()| after.release(ino)), [false, false, true, false]);
        }
        assert!(next(&after).open.lock().is_empty());
    }

    #[test]
    fn nobody_is_asked_for_a_whole_file_before_files_are_opened_past_us() {
        let opens = found(Table::new(1, 0).expect("memory"));
        assert_eq!(opens.open(Ino(1), || panic!("asked")), None);
        opens.past.store(true, Ordering::Release);
        // it is open by pages
        assert_eq!(opens.open(Ino(1), || panic!("asked")), None);
        assert!(!opens.release(Ino(1)) && opens.release(Ino(1)));
        let mut asked = false;
        opens.open(Ino(1), || {
            asked = true;
            None
        });
        assert!(asked);
    }
}
