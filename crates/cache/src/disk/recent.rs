//! What was written last stays in the kernel's page cache, and what was written before that goes from it.
//!
//! An image that is read from one end to the other lies in the page cache as the files that were read. Without this it lies there
//! a second time, as the frames that were written, and the kernel lets them wait until a tenth of the memory is dirty, then writes
//! all of it while programs run. So bulk reading leaves no more behind than a start needs when it comes again.
//!
//! Windows of a segment queue up as they are written. One that has waited long enough is named to fadvise(2) twice:
//! `POSIX_FADV_DONTNEED` begins to write dirty pages and drops clean ones (`mm/fadvise.c` of the kernel), so the first time sends to
//! the disk what is still dirty, and the second time, a window later, drops it. Neither waits.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::{Arc, Weak};

use rustix::fs::{Advice, fadvise};

use super::segment::Segment;

/// What is named at once, in bytes.
const WINDOW_BYTES: u64 = 8 << 20;
/// What stays, in bytes: more than the start of any image that was measured reads.
const RECENT_BYTES: u64 = 256 << 20;

/// What was written last.
#[derive(Debug)]
pub(super) struct Recent {
    /// From the oldest to the newest. A segment that was evicted is not kept open.
    windows: VecDeque<(Weak<Segment>, Range<u64>)>,
    window_bytes: u64,
    windows_max: usize,
}

impl Default for Recent {
    fn default() -> Self {
        Self::new(WINDOW_BYTES, RECENT_BYTES)
    }
}

impl Recent {
    fn new(window_bytes: u64, recent_bytes: u64) -> Self {
        let windows_max = usize::try_from(recent_bytes / window_bytes).unwrap_or(usize::MAX);
        Self { windows: VecDeque::new(), window_bytes, windows_max }
    }

    /// Takes note that bytes were written to a segment, behind what was written to it before.
    pub(super) fn note(&mut self, segment: &Arc<Segment>, written: Range<u64>) {
        let grown = self.windows.back_mut().filter(|(last, range)| {
            std::ptr::eq(last.as_ptr(), Arc::as_ptr(segment))
                && range.end == written.start
                && range.end - range.start < self.window_bytes
        });
        match grown {
            Some((_, range)) => range.end = written.end,
            None => self.begin(segment, written),
        }
    }

    fn begin(&mut self, segment: &Arc<Segment>, written: Range<u64>) {
        self.windows.push_back((Arc::downgrade(segment), written));
        if self.windows.len() > self.windows_max {
            self.windows.iter().take(2).for_each(|(segment, range)| let_go(segment, range));
            self.windows.pop_front();
        }
    }
}

/// Best effort: where the kernel refuses, its own ways with the page cache remain.
fn let_go(segment: &Weak<Segment>, range: &Range<u64>) {
    if let (Some(segment), Some(len)) = (segment.upgrade(), NonZeroU64::new(range.end - range.start)) {
        let _ = fadvise(&segment.file, range.start, Some(len), Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicU64;

    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::super::segment::Kind;
    use super::*;

    const WINDOW: u64 = 1 << 20;

    fn segment() -> Arc<Segment> {
        let file = tempfile::tempfile().expect("a file");
        Arc::new(Segment { file, len: AtomicU64::new(0), kind: Kind::New })
    }

    fn write(recent: &mut Recent, segment: &Arc<Segment>, windows: Range<u64>) {
        for at in windows.start * 4..windows.end * 4 {
            let written = at * WINDOW / 4..(at + 1) * WINDOW / 4;
            segment.file.write_all_at(&[1; WINDOW as usize / 4], written.start).expect("written");
            segment.file.sync_data().expect("synced");
            recent.note(segment, written);
        }
    }

    /// Whether the middle of a window can be read without the disk.
    fn is_in_memory(segment: &Segment, window: u64) -> bool {
        let (mut byte, at) = ([0], window * WINDOW + WINDOW / 2);
        match preadv2(&segment.file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) {
            Ok(read) => read == 1,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_was_written_last_stays_in_memory_and_what_came_before_goes() {
        let (mut recent, one, two) = (Recent::new(WINDOW, 4 * WINDOW), segment(), segment());
        write(&mut recent, &one, 0..6);
        write(&mut recent, &two, 0..2);
        let in_memory = |segment: &Segment, windows: Range<u64>| -> Vec<bool> {
            windows.map(|window| is_in_memory(segment, window)).collect()
        };
        assert_eq!(in_memory(&one, 0..4), [false; 4]);
        assert_eq!((in_memory(&one, 5..6), in_memory(&two, 0..2)), (vec![true], vec![true; 2]));
        assert!(recent.windows.len() <= 4);
    }

    #[test]
    fn a_segment_that_was_evicted_is_not_kept_open() {
        let (mut recent, gone) = (Recent::new(WINDOW, 4 * WINDOW), segment());
        write(&mut recent, &gone, 0..3);
        assert_eq!(Arc::strong_count(&gone), 1);
        drop(gone);
        write(&mut recent, &segment(), 0..8);
        assert_eq!(recent.windows.len(), 4);
    }
}
