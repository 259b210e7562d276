//! Which of the pages that a boot pack stored were used.
//!
//! Nobody tells a file system when its pages are read or mapped, but the kernel keeps what it needs to choose which ones to drop, and
//! shows it (`Documentation/admin-guide/mm/pagemap.rst` in its sources): how often a page was referenced, and how often it is mapped.
//! To be stored is the first reference (`fuse_notify_store` in fs/fuse/dev.c), and the second makes a page active, and forgets the first
//! (`folio_mark_accessed` in mm/swap.c). A mapping counts as one when it ends. What lies within 64 KiB of a fault was mapped along with it
//! (`filemap_map_pages` in mm/filemap.c), and counts as used.
//!
//! So it is an account and no proof. A page that a program wrote to in a mapping of its own, as most data of libraries, is copied at once
//! and leaves no trace (`do_cow_fault` in mm/memory.c), nor does a mapping that was advised to be read at random. Where memory is short the
//! kernel takes references back. The last few pages wait in lists of each processor for what was said of them. And where the kernel has
//! its pages in generations (CONFIG_LRU_GEN) it counts otherwise, and nothing is seen.
//!
//! To learn where a page lies it must be mapped here. None counts as referenced by that (`vma_has_recency` in mm/internal.h), so whoever
//! asks again is told the same, and each is touched right after it was seen to be in memory, so that nothing comes back that was dropped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use fuser::Notifier;
use memmap2::{Advice, Mmap, MmapOptions};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, fstat, memfd_create, openat};
use rustix::param::page_size;

use super::brought::BROUGHT_NAME;
use super::names::{Asking, open_inside};
use super::{BROUGHT, Boot, Listing, Place};
use crate::elf::written;
use crate::mountpoint::Device;

/// Of an entry in /proc/self/pagemap: the page is mapped, and the number of its frame, which is 0 for whoever may not see it.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// `KPF_REFERENCED` and `KPF_ACTIVE` of /proc/kpageflags.
const REFERENCED: u64 = 1 << 2;
const ACTIVE: u64 = 1 << 6;
/// Bits that are set where the kernel has its pages in generations; no such file where it cannot.
const GENERATIONS: &str = "/sys/kernel/mm/lru_gen/enabled";
/// Of a file that may be a library, in bytes: its program headers are among them.
const HEAD_BYTES: usize = 4096;
/// One fault maps so many pages at most: `fault_around_bytes` in mm/memory.c.
const AROUND: usize = 16;

/// What became of the pages that a boot pack stored, in bytes, by whole pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootUse {
    /// Read or mapped since, or within 64 KiB of what was mapped.
    pub used_bytes: u64,
    /// Touched by nobody.
    pub unused_bytes: u64,
    /// Touched by nobody, unless by a program that wrote to it: parts of libraries that are mapped for that.
    pub unseen_bytes: u64,
    /// Dropped by the kernel, used or not.
    pub dropped_bytes: u64,
}

impl BootUse {
    /// All of it by name, as a mount's counters are named.
    pub fn named(&self) -> [(&'static str, u64); 4] {
        let Self { used_bytes, unused_bytes, unseen_bytes, dropped_bytes } = *self;
        [
            ("boot_used_bytes", used_bytes),
            ("boot_unused_bytes", unused_bytes),
            ("boot_unseen_bytes", unseen_bytes),
            ("boot_dropped_bytes", dropped_bytes),
        ]
    }
}

impl Boot {
    /// What became of the pages, now; `None` where there are none, or not all have come. `device` is the mount's. Blocks for some
    /// 2 µs a page. *Errors*: where this process may not see it (CAP_SYS_ADMIN), or the kernel does not show it (CONFIG_PROC_PAGE_MONITOR).
    pub(crate) fn used(
        &self,
        mountpoint: &Path,
        device: Device,
        notifier: &Notifier,
    ) -> io::Result<Option<BootUse>> {
        let Some(coming) = self.coming.get() else { return Ok(None) };
        // whoever unmounts waits for this, and says so
        let listing = self.listing.lock();
        // not before every file is known by a name of its own, since those in the directory are forgotten afterwards
        let is_over = matches!(*listing, Listing::Over) && self.asker.load(Ordering::Relaxed) == 0;
        if !is_over || !coming.opened.has_ended() {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = openat(CWD, mountpoint, flags | OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        if Device::of(fstat(&root)?.st_dev) != device {
            return Ok(None);
        }
        let frames = PageFrames::open()?;
        let _hiding = Hiding(notifier);
        let _asking = Asking::begin(&self.looker);
        let files = open_inside(&root, BROUGHT_NAME, OFlags::DIRECTORY)?;
        if fstat(&files)?.st_ino != BROUGHT.0 {
            let reason = format!("the image has a {BROUGHT_NAME}");
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let (mut used, stored) = (BootUse::default(), coming.stored.load(Ordering::Relaxed));
        for (ino, position) in coming.order.iter().zip(1..) {
            let mut places =
                coming.files[ino].iter().filter(|place| (place.frame as usize) < stored).peekable();
            if places.peek().is_none() {
                continue;
            }
            let file =
                StoredFile::open(&frames, openat(&files, position.to_string(), flags, Mode::empty())?)?;
            for place in places {
                if self.is_ending() {
                    return Ok(None);
                }
                file.add(place, &mut used)?;
            }
        }
        Ok(Some(used))
    }
}

/// Has the directory of files forgotten when nobody looks into it any more, so that nobody else finds it.
struct Hiding<'a>(&'a Notifier);

impl Drop for Hiding<'_> {
    fn drop(&mut self) {
        Boot::hide_brought(self.0);
    }
}

/// What the kernel shows of its page frames.
struct PageFrames {
    /// For each page of this process the number of its frame.
    map: File,
    /// For each frame its flags,
    flags: File,
    /// and how often it is mapped.
    counts: File,
    /// Where bytes are written to so that the kernel maps them: it meets what is not there any more by an error, and not by a signal.
    scratch: OwnedFd,
}

impl PageFrames {
    fn open() -> io::Result<Self> {
        if std::fs::read_to_string(GENERATIONS).is_ok_and(|bits| bits.trim() != "0x0000") {
            let reason = format!("the kernel has its pages in generations ({GENERATIONS})");
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let open = |path: &str| {
            File::open(path).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
        };
        let (map, flags) = (open("/proc/self/pagemap")?, open("/proc/kpageflags")?);
        let counts = open("/proc/kpagecount")?;
        Ok(Self { map, flags, counts, scratch: memfd_create("lamina-used", MemfdFlags::CLOEXEC)? })
    }

    /// Whether a page was referenced after it was stored, or is mapped by anybody else.
    fn is_used(&self, frame: u64) -> io::Result<bool> {
        let word = |file: &File| Ok::<_, io::Error>(words(file, frame, 1)?[0]);
        Ok(word(&self.flags)? & (REFERENCED | ACTIVE) != REFERENCED || word(&self.counts)? > 1)
    }
}

/// A file of which pages were stored, mapped.
struct StoredFile<'a> {
    frames: &'a PageFrames,
    map: Mmap,
    /// Pages that programs map to write to.
    written: Vec<Range<usize>>,
}

impl<'a> StoredFile<'a> {
    fn open(frames: &'a PageFrames, file: OwnedFd) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
        // SAFETY: the mount is read-only, and nothing here looks at what is mapped
        let map = unsafe { MmapOptions::new().map(&file) }?;
        map.advise(Advice::Random)?;
        let mut opened = Self { frames, map, written: Vec::new() };
        opened.written = opened.find_written()?;
        Ok(opened)
    }

    /// All of it where its beginning is not in memory: it may be a library.
    fn find_written(&self) -> io::Result<Vec<Range<usize>>> {
        let (all, page) = (0..usize::MAX, page_size() as u64);
        let mut head = vec![0; HEAD_BYTES.min(self.map.len())];
        if !self.in_memory(0..1)?[0] {
            return Ok(vec![all]);
        }
        // not by reading, which is a reference
        let copied = rustix::io::pwrite(&self.frames.scratch, &self.map[..head.len()], 0)
            .and_then(|_| rustix::io::pread(&self.frames.scratch, &mut head[..], 0));
        if copied.is_err() {
            return Ok(vec![all]);
        }
        let at = |page| usize::try_from(page).unwrap_or(usize::MAX);
        Ok(written(&head).map(|bytes| at(bytes.start / page)..at(bytes.end.div_ceil(page))).collect())
    }

    /// Adds what became of the pages of a place.
    fn add(&self, place: &Place, used: &mut BootUse) -> io::Result<()> {
        let page = page_size();
        let first = usize::try_from(place.offset).unwrap_or(usize::MAX) / page;
        let pages = first..(first + (place.len as usize).div_ceil(page)).min(self.map.len().div_ceil(page));
        let in_memory = self.in_memory(pages.clone())?;
        let mut entries = vec![0; in_memory.len()];
        for (at, number) in pages.clone().zip(0..) {
            if in_memory[number] && entries[number] & PRESENT == 0 {
                self.touch(at, &mut entries[number..])?;
            }
            let bytes = match entries[number] {
                entry if entry & PRESENT == 0 => &mut used.dropped_bytes,
                entry if self.frames.is_used(entry & FRAME)? => &mut used.used_bytes,
                _ if self.written.iter().any(|pages| pages.contains(&at)) => &mut used.unseen_bytes,
                _ => &mut used.unused_bytes,
            };
            *bytes += page as u64;
        }
        Ok(())
    }

    /// Has a page mapped, if it is still in memory, and takes note of what was mapped with it: `entries` are those from it on.
    /// *Errors*: that is not shown.
    fn touch(&self, at: usize, entries: &mut [u64]) -> io::Result<()> {
        let byte = at * page_size();
        // what was dropped meanwhile and cannot be had is met by an error here, and not by a signal
        if !self.in_memory(at..at + 1)?[0]
            || rustix::io::pwrite(&self.frames.scratch, &self.map[byte..=byte], 0).is_err()
        {
            return Ok(());
        }
        let before = self.map.as_ptr().addr() / page_size();
        let seen = words(&self.frames.map, (before + at) as u64, AROUND.min(entries.len()))?;
        if seen[0] & PRESENT != 0 && seen[0] & FRAME == 0 {
            let reason = "page frames are not shown without CAP_SYS_ADMIN";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        entries[..seen.len()].copy_from_slice(&seen);
        Ok(())
    }

    /// Which of these pages are in memory: mincore(2).
    fn in_memory(&self, pages: Range<usize>) -> io::Result<Vec<bool>> {
        let page = page_size();
        let part = &self.map[pages.start * page..(pages.end * page).min(self.map.len())];
        let mut here = vec![0_u8; pages.len()];
        #[expect(unsafe_code, reason = "rustix lacks mincore")]
        // SAFETY: this is a part of the mapping, from the beginning of a page on, and there is a byte for each page of it
        let done = unsafe { libc::mincore(part.as_ptr().cast_mut().cast(), part.len(), here.as_mut_ptr()) };
        match done {
            0 => Ok(here.into_iter().map(|page| page & 1 == 1).collect()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// `count` words of one of the kernel's files, from word `first` on.
#[expect(clippy::host_endian_bytes, reason = "it shows words as the processor has them")]
fn words(file: &File, first: u64, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, first * 8)?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes"))).collect())
}
