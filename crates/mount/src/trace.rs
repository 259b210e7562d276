//! What a start touches, recorded: names looked up and pages read, in order.
//!
//! What the kernel reads ahead is recorded as well, so a mount that records keeps the kernel's window small and hands out
//! nothing unasked. A start is over when nothing new was touched for a while, or with the unmount. What touches more than any
//! start does, or most files of an image, is none: a scan, a backup, a copy. Nothing is learned from that.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lamina_image::{Ino, PAGE_BYTES, PROFILE_ITEMS_MAX, Trace, TraceRun};
use parking_lot::Mutex;

use crate::Record;
use crate::bits::Bits;

/// Events of each kind: a fraction of what a profile may hold, some 20 MiB.
const EVENTS_MAX: usize = PROFILE_ITEMS_MAX;

/// Pages of one start: 1 GiB. Who reads more is not starting, and is slowed down by being recorded.
const PAGES_MAX: u64 = 1 << 18;
/// A start touches a few per cent of an image's files; of a small image it may be all.
const SCANNED_MIN: u32 = 2000;

/// Records one start.
pub(crate) struct Recorder {
    recording: AtomicBool,
    /// Whether all is kept that comes, whatever it looks like.
    exact: bool,
    inodes: u32,
    files: Bits,
    trace: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    trace: Trace,
    pages: u64,
    files: u32,
    last: Option<Instant>,
}

impl Recorder {
    /// One for a tree of so many inodes that records, or does nothing. An exact one was asked for, and keeps everything.
    pub(crate) fn new(record: Record, inodes: u32) -> Self {
        Self {
            recording: AtomicBool::new(record != Record::Off),
            exact: record == Record::Exact,
            inodes,
            files: Bits::new(inodes),
            trace: Mutex::default(),
        }
    }

    /// Whether it still records.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Whether only what is asked for may be recorded.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    /// A name was looked up.
    pub(crate) fn name(&self, dir: Ino, name: &[u8]) {
        if self.is_recording() {
            let mut recorded = self.trace.lock();
            if recorded.trace.names.len() < EVENTS_MAX {
                recorded.trace.names.push((dir, name.to_vec()));
            }
        }
    }

    /// Bytes of a file were read.
    pub(crate) fn read(&self, ino: Ino, offset: u64, size: u32, now: Instant) {
        if !self.is_recording() || size == 0 {
            return;
        }
        let first = offset / PAGE_BYTES;
        let pages = (offset + u64::from(size)).div_ceil(PAGE_BYTES) - first;
        let mut recorded = self.trace.lock();
        self.touched(&mut recorded, ino, now);
        match recorded.trace.runs.last_mut() {
            Some(run) if run.ino == ino && run.first + run.pages == first => run.pages += pages,
            _ => recorded.trace.runs.push(TraceRun { ino, first, pages }),
        }
        recorded.pages += pages;
        if recorded.pages >= PAGES_MAX || recorded.trace.runs.len() >= EVENTS_MAX {
            self.recording.store(false, Ordering::Relaxed);
        }
    }

    /// Something of a file was read that need not be recorded; the start goes on.
    pub(crate) fn busy(&self, ino: Ino, now: Instant) {
        if self.is_recording() {
            self.touched(&mut self.trace.lock(), ino, now);
        }
    }

    fn touched(&self, recorded: &mut Recorded, ino: Ino, now: Instant) {
        recorded.last = Some(now);
        if ino.index().is_some_and(|index| self.files.set(index)) {
            recorded.files += 1;
        }
    }

    /// How long nothing was read; `None` before the first read, and for ever where there is no room for more.
    pub(crate) fn quiet(&self, now: Instant) -> Option<Duration> {
        let last = self.trace.lock().last?;
        Some(if self.is_recording() { now.saturating_duration_since(last) } else { Duration::MAX })
    }

    /// Ends recording, and gives what was recorded; nothing the second time, and nothing of what was no start.
    pub(crate) fn take(&self) -> Option<Trace> {
        let is_full = !self.recording.swap(false, Ordering::Relaxed);
        let Recorded { trace, files, last, .. } = mem::take(&mut *self.trace.lock());
        let is_scan = files >= SCANNED_MIN && files > self.inodes / 2;
        last.filter(|_| self.exact || !(is_full || is_scan)).map(|_| trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_recorded_in_order_and_given_once() {
        let (recorder, now) = (Recorder::new(Record::Start, 10), Instant::now());
        assert_eq!(recorder.quiet(now), None);
        recorder.name(Ino(1), b"bin");
        recorder.read(Ino(2), 0, 4096, now);
        recorder.read(Ino(2), 4096, 100, now);
        recorder.read(Ino(3), 5000, 4096, now);
        assert_eq!(recorder.quiet(now + Duration::from_secs(2)), Some(Duration::from_secs(2)));
        let run = |ino, first, pages| TraceRun { ino: Ino(ino), first, pages };
        let runs = vec![run(2, 0, 2), run(3, 1, 2)];
        assert_eq!(
            recorder.take(),
            Some(Trace { names: vec![(Ino(1), b"bin".to_vec())], runs, boot: false })
        );
        recorder.read(Ino(3), 0, 1, now);
        assert_eq!(recorder.take(), None);
    }

    fn without_end(record: Record) -> Option<Trace> {
        let (recorder, now) = (Recorder::new(record, 10), Instant::now());
        for page in 0..PAGES_MAX + 10 {
            recorder.read(Ino(2), page * 2 * PAGE_BYTES, 4096, now);
        }
        assert!(!recorder.is_recording());
        assert_eq!(recorder.quiet(now), Some(Duration::MAX));
        recorder.take()
    }

    #[test]
    fn what_reads_more_than_a_start_does_is_none() {
        assert_eq!(without_end(Record::Start), None);
        let asked_for = without_end(Record::Exact).expect("who asks for a recording gets it");
        assert!(asked_for.runs.len() <= EVENTS_MAX);
    }

    #[test]
    fn what_touches_most_files_is_no_start() {
        let (inodes, now) = (2 * SCANNED_MIN, Instant::now());
        let scan = |files: u32, record| {
            let recorder = Recorder::new(record, inodes);
            for index in 0..files {
                match index % 2 {
                    0 => recorder.read(Ino::from_index(index), 0, 4096, now),
                    _ => recorder.busy(Ino::from_index(index), now),
                }
            }
            recorder.take()
        };
        assert_eq!(scan(SCANNED_MIN + 1, Record::Start), None);
        assert!(scan(SCANNED_MIN + 1, Record::Exact).is_some());
        assert_eq!(scan(SCANNED_MIN, Record::Start).expect("half of them").runs.len(), 1000);
    }
}
