//! Readahead for the dynamic linker: what it will touch is written in the libraries themselves.
//!
//! A linker maps a program's libraries one after the other, and then makes their relocations one after the other; each step waits
//! for a page that the step before has named. So once the head of an ELF file was read, everything is fetched that the linker is
//! bound to touch ([`crate::elf`]): the sections with the relocations, the pages that these write to and the symbols that they
//! name, and the same of the libraries that it needs, all at once. When a library's relocations were followed, its constructors are
//! ([`constructors`]). Nothing is fetched on a guess but which file a needed name means, one of that name beside the library that
//! needs it, or the only one in the image; and that a constructor touches what it names.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use lamina_cache::{Class, Want};
use lamina_image::{FileKind, Ino, Tree, elf_name, is_elf};
use tokio::sync::Semaphore;

use crate::ahead::Ahead;
use crate::bits::Bits;
use crate::boot::Boot;
use crate::bound::{Bound, BoundPages};
use crate::elf::{Elf, Linked, RELOCATION_BYTES};
use crate::order::want;
use crate::trace::Recorder;

mod constructors;

/// Libraries that are looked into at the same time: each waits for the network most of the time.
const AT_ONCE: usize = 8;
/// Libraries whose constructors are followed at the same time. They run one after the other.
const CONSTRUCTED_AT_ONCE: usize = 2;
/// Libraries whose constructors wait for their turn, some 100 KiB each. Those of more are not followed.
const QUEUED_MAX: usize = 64;
/// How much of a file is read to find its program headers.
const HEAD_BYTES: u64 = 4096;
/// Relocations are read in pieces of so many bytes.
const PIECE_BYTES: u64 = 43_690 * RELOCATION_BYTES as u64;
/// For the relocations of one library, and again for its constructors, no more frames are fetched, and a piece's worth more of its
/// pages looked at than these: the largest ones of CUDA have relocations in some 20,000.
const FRAMES_MAX: usize = 4096;
const PAGES_MAX: usize = 1 << 18;
/// Smaller files are not looked into for something else than their first bytes: readahead has the whole of them soon.
const LIBRARY_BYTES_MIN: u64 = 1 << 20;
/// Links that are followed from a library's name to its file.
const LINKS_MAX: usize = 4;

/// A directory, and a library in it.
type Library = (Ino, Ino);

/// Follows what is loaded from one mount.
pub(crate) struct Loading {
    ahead: Arc<Ahead>,
    boot: Arc<Boot>,
    recorder: Arc<Recorder>,
    /// What a start that is recorded will touch of the libraries that are followed.
    bound: Bound,
    /// Files that were looked into.
    seen: Bits,
    /// Large files of which something was not here.
    missed: Bits,
    turns: Semaphore,
    /// Places of those whose constructors are followed, or wait for that; the turns of the former.
    queue: Semaphore,
    calls: Semaphore,
    /// Known some milliseconds after the first program was read.
    libraries: OnceLock<HashMap<Box<[u8]>, Vec<Library>>>,
}

impl Loading {
    pub(crate) fn new(ahead: Arc<Ahead>, boot: Arc<Boot>, recorder: Arc<Recorder>) -> Self {
        let (seen, missed) = (Bits::new(ahead.tree.inodes()), Bits::new(ahead.tree.inodes()));
        Self {
            ahead,
            boot,
            recorder,
            bound: Bound::default(),
            seen,
            missed,
            turns: Semaphore::new(AT_ONCE),
            queue: Semaphore::new(CONSTRUCTED_AT_ONCE + QUEUED_MAX),
            calls: Semaphore::new(CONSTRUCTED_AT_ONCE),
            libraries: OnceLock::new(),
        }
    }

    /// Takes note that the first bytes of a file were read, and follows it if it is a program or a library. Returns at once.
    pub(crate) fn note(self: &Arc<Self>, ino: Ino, head: &[u8]) {
        if is_elf(head) && !self.ahead.is_lean() && first(&self.seen, ino) {
            self.follow(ino, None);
        }
    }

    /// Takes note that something of a file is not here, whose first bytes may never have been asked for: a boot pack brought them.
    /// One that was learnt from another version of a library lacks most of what this one touches.
    pub(crate) fn missed(self: &Arc<Self>, ino: Ino) {
        let is_large = || self.ahead.tree.inode(ino).is_ok_and(|inode| inode.size >= LIBRARY_BYTES_MIN);
        if !self.ahead.is_lean() && is_large() && !first(&self.missed, ino) && first(&self.seen, ino) {
            self.follow(ino, None);
        }
    }

    /// The pages of a file that a start which is recorded will touch, as far as they are known by now.
    pub(crate) fn bound(&self, ino: Ino) -> Option<Arc<BoundPages>> {
        self.bound.find(ino)
    }

    /// Looks into a file, whose directory is `dir` if it is known, as it is of libraries that others need.
    fn follow(self: &Arc<Self>, ino: Ino, dir: Option<Ino>) {
        let loading = Arc::clone(self);
        self.ahead.spawn(async move {
            // it is never closed; whoever cannot be read is read again by the linker, and told why
            let Ok(turn) = loading.turns.acquire().await else { return };
            let Some(relocated) = loading.look_into(ino, dir).await else { return };
            let Ok(_place) = loading.queue.try_acquire() else { return };
            // so that the constructors of one do not hold up the relocations of another, which come first
            drop(turn);
            let Ok(_turn) = loading.calls.acquire().await else { return };
            let _ = loading.construct(ino, relocated).await;
        });
    }

    /// Fetches what making a library's relocations touches.
    async fn look_into(self: &Arc<Self>, ino: Ino, dir: Option<Ino>) -> Option<Relocated> {
        let size = self.ahead.tree.inode(ino).ok()?.size;
        let elf = Elf::parse(&self.read(ino, 0..HEAD_BYTES).await?)?;
        let linked = elf.linked(&self.read(ino, elf.dynamic.clone()).await?);
        for range in &linked.needed {
            if let Some(name) = elf_name(&self.read(ino, range.clone()).await?) {
                self.need(dir, name).await;
            }
        }
        let tables = linked.relocations.clone();
        let is_recorded = self.recorder.is_recording() && !self.recorder.is_exact();
        let bound = is_recorded.then(|| self.bound.begin(ino, size)).flatten();
        if let Some(bound) = &bound {
            for walked in tables.iter().chain(&linked.names) {
                bound.mark(walked.start..walked.end.min(size));
            }
        }
        let mut relocated = Relocated { elf, linked, size, pages: HashSet::new(), frames: HashSet::new() };
        for table in tables {
            // what a file says of itself may lie beyond its end
            let mut at = table.start;
            while at < table.end.min(size) && !relocated.is_full() && !self.ahead.is_lean() {
                let end = table.end.min(size).min(at.saturating_add(PIECE_BYTES));
                let piece = self.read(ino, at..end).await?;
                let (loading, bound) = (Arc::clone(self), bound.clone());
                // milliseconds of work
                let looking = tokio::task::spawn_blocking(move || {
                    let new = relocated.take(&piece, |page| {
                        if let Some(bound) = &bound {
                            bound.mark(page..page + 1);
                        }
                        loading.frame(ino, page)
                    });
                    (relocated, new)
                });
                let (looked, new) = looking.await.ok()?;
                relocated = looked;
                self.ahead.fetch(new);
                at = end;
            }
        }
        // its pages were only to be met once each
        Some(Relocated { pages: HashSet::new(), ..relocated })
    }

    /// Follows a library that is needed by one in `dir`.
    async fn need(self: &Arc<Self>, dir: Option<Ino>, name: &[u8]) {
        if self.libraries.get().is_none() {
            let loading = Arc::clone(self);
            let find = move || loading.libraries.get_or_init(|| libraries(&loading.ahead.tree)).len();
            let _ = tokio::task::spawn_blocking(find).await;
        }
        let Some(found) = self.libraries.get().and_then(|libraries| libraries.get(name)) else { return };
        let beside = found.iter().find(|(of, _)| Some(*of) == dir);
        let only = || found.first().filter(|first| found.iter().all(|(_, ino)| *ino == first.1));
        let Some((dir, ino)) = beside.or_else(only) else { return };
        // of one that a boot pack brings nothing is missing, until it is
        if !self.boot.has(*ino, 0) && first(&self.seen, *ino) {
            self.follow(*ino, Some(*dir));
        }
    }

    /// Bytes of a file, fewer at its end.
    async fn read(&self, ino: Ino, range: Range<u64>) -> Option<Vec<u8>> {
        let Ahead { tree, cache, source, .. } = &*self.ahead;
        let (mut pieces, mut wants) = (Vec::new(), Vec::<Want>::new());
        for extent in tree.extents(ino, range.start, range.end).ok()? {
            let extent = extent.ok()?;
            pieces.push((extent.frame.is_some(), extent.skip as usize, usize::try_from(extent.len).ok()?));
            wants.extend(extent.frame.and_then(|number| want(tree, number)));
        }
        let chunks = cache.fetch(source, &wants, &[], Class::Background).await.ok()?;
        let (mut bytes, mut chunks) = (Vec::new(), chunks.into_iter());
        for (is_stored, skip, len) in pieces {
            match is_stored {
                true => bytes.extend_from_slice(chunks.next()?.bytes().get(skip..skip.checked_add(len)?)?),
                false => bytes.resize(bytes.len() + len, 0),
            }
        }
        Some(bytes)
    }

    /// The frame that a page of a file begins in, unless a boot pack brings the page.
    fn frame(&self, ino: Ino, page: u64) -> Option<u32> {
        if self.boot.has(ino, page) {
            return None;
        }
        self.ahead.tree.extents(ino, page, page + 1).ok()?.next()?.ok()?.frame
    }
}

/// Whether a file is one of these for the first time.
fn first(files: &Bits, ino: Ino) -> bool {
    ino.index().is_some_and(|index| files.set(index))
}

/// What making a library's relocations touches, as far as they were read.
struct Relocated {
    elf: Elf,
    linked: Linked,
    /// Bytes of the file.
    size: u64,
    pages: HashSet<u64>,
    frames: HashSet<u32>,
}

impl Relocated {
    fn is_full(&self) -> bool {
        self.frames.len() >= FRAMES_MAX || self.pages.len() >= PAGES_MAX
    }

    /// The frames that these relocations touch, and no earlier ones did.
    fn take(&mut self, relocations: &[u8], frame: impl Fn(u64) -> Option<u32>) -> Vec<u32> {
        let touched = self.elf.touched(&self.linked, relocations, self.size, &mut self.pages);
        let left = FRAMES_MAX.saturating_sub(self.frames.len());
        let new = touched.into_iter().filter_map(frame).filter(|frame| self.frames.insert(*frame));
        new.take(left).collect()
    }
}

/// All files that are named like libraries. Cost: about 100 ns a name in the image.
fn libraries(tree: &Tree) -> HashMap<Box<[u8]>, Vec<Library>> {
    let mut found = HashMap::<Box<[u8]>, Vec<Library>>::new();
    for index in 0..tree.inodes() {
        let dir = Ino::from_index(index);
        // a damaged tree is found, and told, by reading
        let Ok(entries) = tree.entries(dir) else { continue };
        for entry in entries.iter().map_while(Result::ok) {
            if entry.name.windows(3).any(|part| part == b".so")
                && let Some(ino) = file(tree, dir, entry.ino)
            {
                found.entry(entry.name.into()).or_default().push((dir, ino));
            }
        }
    }
    found
}

/// The file that an entry of `dir` leads to within `dir`.
fn file(tree: &Tree, dir: Ino, mut ino: Ino) -> Option<Ino> {
    for _ in 0..LINKS_MAX {
        match tree.inode(ino).ok()?.kind() {
            FileKind::Regular => return Some(ino),
            FileKind::Symlink => ino = tree.lookup(dir, tree.symlink(ino).ok()?).ok()??,
            _ => return None,
        }
    }
    None
}
