//! What the file system answers, from tree and cache; no kernel is needed to ask.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use lamina_cache::{CacheError, Class, Want};
use lamina_chunk::Chunk;
use lamina_image::{Ino, TreeError};
use tokio::time::timeout;

use crate::ahead::Ahead;
use crate::bits::Bits;
use crate::boot::{Boot, Booted, Dropped, Waiting};
use crate::loading::Loading;
use crate::metrics::{add, one, us_since};
use crate::order::{Touch, want};
use crate::pages::{Pages, Run, bound_rest};
use crate::small::SMALL_FILE_BYTES;
use crate::trace::Recorder;

/// Why there is no answer. `fuse.rs` has the errno for each.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum FsError {
    /// The tree is damaged, or the kernel asks a thing of the wrong kind.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The bytes cannot be had.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The inode does not have this attribute.
    #[error("no such attribute")]
    NoXattr,
    /// No inode of the image has any.
    #[error("the image has no extended attributes")]
    NoXattrs,
}

/// The files of one image.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) ahead: Arc<Ahead>,
    pub(crate) pages: Arc<Pages>,
    pub(crate) boot: Arc<Boot>,
    pub(crate) recorder: Arc<Recorder>,
    /// Inodes that were read.
    pub(crate) touched: Arc<Bits>,
    pub(crate) loading: Arc<Loading>,
}

/// A longer read is the kernel's own readahead, which asks for the rest by itself, in few requests.
const STORE_READ_MAX: u32 = 64 << 10;

/// What a read came to.
pub(crate) enum Answer {
    /// All the bytes.
    Now(Bytes),
    /// Some are not here.
    Later(Unread),
    /// The boot pack has them.
    Soon(Soon),
}

/// How a boot pack has what is not in memory.
pub(crate) enum Soon {
    /// It comes.
    Comes(Waiting),
    /// It came, and is kept.
    Again(Dropped),
}

/// A read that lacks frames.
pub(crate) struct Unread {
    /// The file and the offset that were read.
    at: (Ino, u64),
    pieces: Vec<Piece>,
    len: usize,
    wants: Vec<Want>,
    neighbours: Vec<Want>,
    begun: Instant,
}

/// Some bytes of an answer.
struct Piece {
    from: From,
    skip: usize,
    len: usize,
}

enum From {
    Zeros,
    Here(Chunk),
    /// The position among the wanted.
    Wanted(usize),
}

impl Files {
    /// The bytes of `ino` from `offset`, `size` of them or up to the end of the file, and which parts of frames they are;
    /// `None` where the boot pack has them. Never waits for the network; reads the disk.
    pub(crate) fn read(
        &self,
        ino: Ino,
        offset: u64,
        size: u32,
    ) -> Result<(Answer, Option<Vec<Touch>>), FsError> {
        let end = offset.saturating_add(size.into()).min(self.ahead.tree.inode(ino)?.size);
        self.touched.set(u32::try_from(ino.0).unwrap_or(u32::MAX));
        match self.boot.read(ino, offset, end) {
            Booted::Here(bytes) => {
                one(&self.ahead.counters.boot_reads);
                Ok((Answer::Now(bytes), None))
            }
            Booted::Near(waiting) => Ok((Answer::Soon(Soon::Comes(waiting)), None)),
            Booted::Again(dropped) => Ok((Answer::Soon(Soon::Again(dropped)), None)),
            missed => {
                if matches!(missed, Booted::Far) {
                    one(&self.ahead.counters.boot_far);
                }
                let (answer, touched) = self.read_frames(ino, offset, size)?;
                Ok((answer, Some(touched)))
            }
        }
    }

    /// Waits for the tree's contents. *Errors*: they did not come in time.
    pub(crate) async fn contents(&self) -> Result<(), FsError> {
        let begun = Instant::now();
        let Ahead { tree, contents, counters, cache, .. } = &*self.ahead;
        // nobody may be bringing them any more
        let _ = timeout(cache.deadline(), contents.need()).await;
        one(&counters.reads_waited);
        add(&counters.read_wait_us_total, us_since(begun));
        if tree.has_contents() { Ok(()) } else { Err(TreeError::Coming.into()) }
    }

    /// Takes note of a read that the boot pack did not have: fetches ahead, and records it. What comes in a long stream is not
    /// recorded, since readahead brings it as fast as a boot pack would. Whether it belongs
    /// to a stream that is read ahead across files.
    pub(crate) fn note(&self, ino: Ino, offset: u64, size: u32, touched: &[Touch]) -> bool {
        let run = self.ahead.note(ino, offset..offset.saturating_add(size.into()), touched);
        match run < self.ahead.config.recorded_run_bytes {
            true => self.recorder.read(ino, offset, size, Instant::now()),
            false => self.recorder.busy(ino, Instant::now()),
        }
        run >= self.ahead.config.pack_ramp.run_min
    }

    /// Waits for the boot pack; if that does not come in time, reads in the ordinary way.
    pub(crate) async fn soon(&self, ino: Ino, offset: u64, size: u32, soon: Soon) -> Result<Bytes, FsError> {
        let (counters, begun) = (&self.ahead.counters, Instant::now());
        let bytes = match soon {
            Soon::Comes(waiting) => waiting.bytes().await,
            Soon::Again(dropped) => {
                one(&counters.boot_again);
                dropped.bytes(&self.ahead.source).await
            }
        };
        let us = us_since(begun);
        one(&counters.boot_waits);
        add(&counters.boot_wait_us_total, us);
        if let Some(bytes) = bytes {
            one(&counters.boot_reads);
            return Ok(bytes);
        }
        self.recorder.read(ino, offset, size, Instant::now());
        if !self.ahead.tree.has_contents() {
            self.contents().await?;
        }
        match self.read_frames(ino, offset, size)? {
            (Answer::Later(unread), _) => self.complete(unread).await,
            (Answer::Now(bytes), _) => Ok(bytes),
            (Answer::Soon(_), _) => unreachable!("frames do not come with the boot pack"),
        }
    }

    fn read_frames(&self, ino: Ino, offset: u64, size: u32) -> Result<(Answer, Vec<Touch>), FsError> {
        let Ahead { tree, cache, .. } = &*self.ahead;
        let end = offset.saturating_add(u64::from(size));
        let (mut pieces, mut wants, mut touched) = (Vec::new(), Vec::<Want>::new(), Vec::new());
        let (mut len, mut last_missing) = (0, None);
        for extent in tree.extents(ino, offset, end)? {
            let extent = extent?;
            // an answer is at most `size` bytes, so each part of it fits
            let piece_len = usize::try_from(extent.len).map_err(|_| TreeError::TooLarge("read"))?;
            let from = match extent.frame {
                None => From::Zeros,
                Some(number) => {
                    let (id, place) = tree.frame(number)?;
                    let plain_len = place.frame.plain_len;
                    touched.push(Touch { frame: number, skip: extent.skip, len: extent.len, plain_len });
                    match cache.try_local(id) {
                        Some(chunk) => From::Here(chunk),
                        None => {
                            last_missing = Some(number);
                            // neighbouring pieces often lie in one frame
                            let known = wants.iter().position(|want| want.id == id);
                            From::Wanted(known.unwrap_or_else(|| {
                                wants.push(Want { id, place });
                                wants.len() - 1
                            }))
                        }
                    }
                }
            };
            pieces.push(Piece { from, skip: extent.skip as usize, len: piece_len });
            len += piece_len;
        }
        let Some(last) = last_missing else {
            return Ok((Answer::Now(assemble(pieces, &[], len)?), touched));
        };
        let neighbours = self.ahead.neighbours(ino, offset, &wants, last);
        let unread = Unread { at: (ino, offset), pieces, len, wants, neighbours, begun: Instant::now() };
        Ok((Answer::Later(unread), touched))
    }

    /// Waits for what a read lacks.
    pub(crate) async fn complete(&self, unread: Unread) -> Result<Bytes, FsError> {
        let Unread { at: (ino, offset), pieces, len, wants, neighbours, begun } = unread;
        let Ahead { cache, source, counters, .. } = &*self.ahead;
        let fetched = cache.fetch(source, &wants, &neighbours, Class::Demand).await;
        let us = us_since(begun);
        tracing::trace!(?ino, offset, us, frames = wants.len(), "a read waited");
        one(&counters.reads_waited);
        add(&counters.read_wait_us_total, us);
        counters.read_wait_us_max.fetch_max(us, std::sync::atomic::Ordering::Relaxed);
        assemble(pieces, &fetched?, len)
    }

    /// After a read of `size` bytes at `offset` was answered: gives the kernel the rest of the frames that it touched. In a
    /// stream across files also the other small files in them: each saves its reader a question that costs more than the file.
    pub(crate) fn store_rest(&self, ino: Ino, offset: u64, size: u32, touched: &[Touch], in_stream: bool) {
        let Ahead { tree, cache, .. } = &*self.ahead;
        if size > STORE_READ_MAX {
            return;
        }
        let is_recording = self.recorder.is_recording();
        if is_recording {
            if self.recorder.is_exact() {
                return;
            }
            // what is handed out unasked is not seen when it is used; a small file is used whole, mostly
            match tree.inode(ino) {
                Ok(inode) if inode.size <= SMALL_FILE_BYTES => {
                    self.recorder.read(ino, 0, u32::try_from(inode.size).expect("small"), Instant::now());
                }
                _ => return self.store_bound(ino, offset, size, touched),
            }
        }
        let small = (in_stream && !is_recording).then(|| self.ahead.small_files());
        let small = match small {
            // they are being looked for: the next read in the frame finds them
            Some(None) => return,
            small => small.flatten(),
        };
        let read = offset..offset.saturating_add(u64::from(size));
        // a frame of which all was read has no rest
        let partly = touched.iter().filter(|touch| touch.len < u64::from(touch.plain_len));
        for touch in partly.filter(|touch| self.pages.is_first(touch.frame)) {
            let here = want(tree, touch.frame).and_then(|want| cache.try_memory(want.id));
            if let Some(chunk) = here {
                // a damaged tree is found, and told, by reading
                let _ = self.pages.store_rest(tree, ino, read.clone(), *touch, chunk.bytes());
                if let Some(small) = small {
                    let others = small.in_frame(touch.frame).filter(|other| *other != ino);
                    let _ = self.pages.store_whole(tree, others, chunk.bytes());
                }
            }
        }
    }

    /// The same while a start is recorded: only what the program is bound to touch as well, which counts as read then. It is
    /// recorded before it goes out, since what the kernel does not take it asks for.
    fn store_bound(&self, ino: Ino, offset: u64, size: u32, touched: &[Touch]) {
        let read = offset..offset.saturating_add(u64::from(size));
        let Some(bound) = self.loading.bound(ino).filter(|bound| bound.read(read.clone())) else { return };
        let Ahead { tree, cache, .. } = &*self.ahead;
        // what a boot pack brings is not missed
        let is_bound = |page| !self.boot.has(ino, page) && bound.give(page);
        for touch in touched {
            let here = want(tree, touch.frame).and_then(|want| cache.try_memory(want.id));
            let Some(chunk) = here else { continue };
            // a damaged tree is found, and told, by reading
            let rest =
                bound_rest(tree, ino, read.clone(), *touch, chunk.bytes(), is_bound).unwrap_or_default();
            for (offset, size) in rest.iter().map(Run::place) {
                self.recorder.read(ino, offset, size, Instant::now());
            }
            self.pages.send(rest);
        }
    }

    /// The value of an extended attribute.
    pub(crate) fn xattr(&self, ino: Ino, name: &[u8]) -> Result<&[u8], FsError> {
        if !self.ahead.tree.has_xattrs() {
            return Err(FsError::NoXattrs);
        }
        self.ahead.tree.xattr(ino, name)?.ok_or(FsError::NoXattr)
    }

    /// The names of all extended attributes, each ended by a NUL.
    pub(crate) fn xattr_names(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        if !self.ahead.tree.has_xattrs() {
            return Err(FsError::NoXattrs);
        }
        let mut names = Vec::new();
        for (name, _) in self.ahead.tree.xattrs(ino)? {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }
}

/// Puts an answer together. One that lies in a single frame is not copied.
fn assemble(pieces: Vec<Piece>, fetched: &[Chunk], len: usize) -> Result<Bytes, FsError> {
    let part = |piece: &Piece, chunk: &Chunk| {
        let bytes = chunk.bytes();
        // the tree said how long the frame is, and the frame is what it says: checked all the same
        match bytes.get(piece.skip..piece.skip + piece.len) {
            Some(_) => Ok(bytes.slice(piece.skip..piece.skip + piece.len)),
            None => Err(TreeError::Bounds("extent", piece.skip as u64)),
        }
    };
    let whole = |piece: &Piece| {
        Ok(match &piece.from {
            From::Zeros => Bytes::from(vec![0; piece.len]),
            From::Here(chunk) => part(piece, chunk)?,
            From::Wanted(position) => part(piece, &fetched[*position])?,
        })
    };
    if let [piece] = &pieces[..] {
        return whole(piece);
    }
    let mut answer = Vec::with_capacity(len);
    for piece in &pieces {
        match &piece.from {
            From::Zeros => answer.resize(answer.len() + piece.len, 0),
            From::Here(_) | From::Wanted(_) => answer.extend_from_slice(&whole(piece)?),
        }
    }
    Ok(answer.into())
}
