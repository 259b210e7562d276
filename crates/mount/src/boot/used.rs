//! Which of the pages that a boot pack stored were used.
//!
//! Nobody tells a file system when its pages are read or mapped, but the kernel keeps what it needs to choose which ones to drop, and
//! shows it (`Documentation/admin-guide/mm/pagemap.rst` in its sources): how often a page was referenced, and how often it is mapped.
//! To be stored is the first reference (`fuse_notify_store` in fs/fuse/dev.c), and the second makes a page active, and forgets the first
//! (`folio_mark_accessed` in mm/swap.c). A mapping counts as one when it ends. What lies within 64 KiB of a fault was mapped along with it
//! (`filemap_map_pages` in mm/filemap.c), and counts as used.
//!
//! Two things are not seen: a page that a program wrote to in a mapping of its own, as most data of libraries, is copied at once and leaves
//! no trace (`do_cow_fault` in mm/memory.c). And where the kernel has its pages in generations (CONFIG_LRU_GEN) it counts otherwise.
//!
//! To learn where a page lies it must be mapped here. That is done as little as possible: no page is brought back that was dropped, and
//! none counts as referenced afterwards (`vma_has_recency` in mm/internal.h), so whoever asks again is told the same.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use memmap2::{Advice, Mmap, MmapOptions};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, fstat, memfd_create, openat};
use rustix::param::page_size;

use super::brought::BROUGHT_NAME;
use super::names::{Asking, open_inside};
use super::{BROUGHT, Boot, Coming, Listing, Place};
use crate::elf::Elf;
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
    pub(crate) fn used(&self, mountpoint: &Path, device: Device) -> io::Result<Option<BootUse>> {
        let Some(coming) = self.coming.get() else { return Ok(None) };
        // whoever unmounts waits for this, and says so
        let listing = self.listing.lock();
        if !matches!(*listing, Listing::Over) || !coming.opened.has_ended() {
            return Ok(None);
        }
        let root =
            openat(CWD, mountpoint, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if Device::of(fstat(&root)?.st_dev) != device {
            return Ok(None);
        }
        let frames = PageFrames::open()?;
        let _asking = Asking::begin(self);
        let files = open_inside(&root, BROUGHT_NAME, OFlags::DIRECTORY)?;
        if fstat(&files)?.st_ino != BROUGHT.0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the image has a {BROUGHT_NAME}"),
            ));
        }
        let mut used = BootUse::default();
        for (ino, position) in coming.order.iter().zip(1..) {
            if self.ending.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let name = position.to_string();
            let file =
                openat(&files, &name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            frames.add_file(&file, coming.stored_of(*ino), &mut used)?;
        }
        Ok(Some(used))
    }
}

impl Coming {
    /// What was stored of a file.
    fn stored_of(&self, ino: lamina_image::Ino) -> impl Iterator<Item = &Place> {
        let stored = self.stored.load(Ordering::Relaxed);
        self.files.get(&ino).into_iter().flatten().filter(move |place| (place.frame as usize) < stored)
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

    /// Adds what became of these places of a file.
    fn add_file<'a>(
        &self,
        file: &impl AsFd,
        places: impl Iterator<Item = &'a Place>,
        used: &mut BootUse,
    ) -> io::Result<()> {
        let page = page_size() as u64;
        let len = fstat(file)?.st_size.unsigned_abs();
        let mut pages = places.flat_map(|place| {
            let end = (place.offset + u64::from(place.len)).min(len);
            (place.offset / page..end.div_ceil(page))
                .map(|at| usize::try_from(at).expect("below the file's length"))
        });
        let Some(first) = pages.next() else { return Ok(()) };
        let file = file.as_fd().try_clone_to_owned()?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
        // SAFETY: the mount is read-only, and nothing here looks at what is mapped
        let map = unsafe { MmapOptions::new().map(&file) }?;
        map.advise(Advice::Random)?;
        let in_memory = in_memory(&map)?;
        let written = if in_memory[0] { self.written(&map) } else { Vec::new() };
        let mut entries = Entries { frames: self, map: &map, first: 0, entries: Vec::new() };
        for at in std::iter::once(first).chain(pages) {
            let frame = match in_memory[at] {
                true => entries.frame(at)?,
                false => None,
            };
            let bytes = match frame {
                Some(frame) if self.is_used(frame)? => &mut used.used_bytes,
                Some(_) if written.iter().any(|pages| pages.contains(&at)) => &mut used.unseen_bytes,
                Some(_) => &mut used.unused_bytes,
                None => &mut used.dropped_bytes,
            };
            *bytes += page;
        }
        Ok(())
    }

    /// Which pages of a file, if it is a library, programs map to write to.
    fn written(&self, map: &Mmap) -> Vec<Range<usize>> {
        let mut head = vec![0; HEAD_BYTES.min(map.len())];
        let copied = rustix::io::pwrite(&self.scratch, &map[..head.len()], 0)
            .and_then(|_| rustix::io::pread(&self.scratch, &mut head[..], 0));
        let page = page_size() as u64;
        let pages = |bytes: Range<u64>| {
            let at = |page| usize::try_from(page).unwrap_or(usize::MAX);
            at(bytes.start / page)..at(bytes.end.div_ceil(page))
        };
        let elf = copied.ok().and_then(|_| Elf::parse(&head));
        elf.iter().flat_map(Elf::written).map(pages).collect()
    }

    /// Whether a page was referenced after it was stored, or is mapped by anybody else.
    fn is_used(&self, frame: u64) -> io::Result<bool> {
        let word = |file: &File| Ok::<_, io::Error>(words(file, frame, 1)?[0]);
        Ok(word(&self.flags)? & (REFERENCED | ACTIVE) != REFERENCED || word(&self.counts)? > 1)
    }
}

/// The frames of a few pages that are mapped, as far as they have been looked at.
struct Entries<'a> {
    frames: &'a PageFrames,
    map: &'a Mmap,
    /// Of the first page.
    first: usize,
    entries: Vec<u64>,
}

impl Entries<'_> {
    /// The frame of a page that was in memory; `None` where it is no more. *Errors*: it is not shown.
    fn frame(&mut self, at: usize) -> io::Result<Option<u64>> {
        if self.entry(at).is_none_or(|entry| entry & PRESENT == 0) {
            let byte = at * page_size();
            // it may have been dropped, and cannot be had
            if rustix::io::pwrite(&self.frames.scratch, &self.map[byte..=byte], 0).is_err() {
                return Ok(None);
            }
            self.look_at(at)?;
        }
        match self.entry(at).filter(|entry| entry & PRESENT != 0).map(|entry| entry & FRAME) {
            Some(0) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "page frames are not shown without CAP_SYS_ADMIN",
            )),
            frame => Ok(frame),
        }
    }

    fn entry(&self, at: usize) -> Option<u64> {
        self.entries.get(at.checked_sub(self.first)?).copied()
    }

    /// Looks at what a fault at this page may have mapped.
    fn look_at(&mut self, at: usize) -> io::Result<()> {
        let pages = self.map.len().div_ceil(page_size());
        let before = self.map.as_ptr().addr() / page_size();
        let entries = words(&self.frames.map, (before + at) as u64, AROUND.min(pages - at))?;
        (self.first, self.entries) = (at, entries);
        Ok(())
    }
}

/// `count` words of one of the kernel's files, from word `first` on.
#[expect(clippy::host_endian_bytes, reason = "it shows words as the processor has them")]
fn words(file: &File, first: u64, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, first * 8)?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes"))).collect())
}

/// Which pages of a mapped file are in memory: mincore(2).
fn in_memory(map: &Mmap) -> io::Result<Vec<bool>> {
    let mut pages = vec![0_u8; map.len().div_ceil(page_size())];
    #[expect(unsafe_code, reason = "rustix lacks mincore")]
    // SAFETY: the mapping is that long, and there is a byte for each of its pages
    let done = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    match done {
        0 => Ok(pages.into_iter().map(|page| page & 1 == 1).collect()),
        _ => Err(io::Error::last_os_error()),
    }
}
