//! What a whole file is, and how one is made of frames.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use lamina_chunk::{Chunk, FrameId};

use crate::cache::{Cache, Shared};
use crate::disk::{Check, Room, is_alone};
use crate::metrics::add;

/// What says how the hash is made, so that another way could not give the same.
const DOMAIN: &str = "lamina whole file 1";
/// Synced each time so much was written, in bytes: what is dirty is no more, whatever else the machine does.
const SYNC_BYTES: u64 = 32 << 20;
/// Read at once to check one, in bytes.
const READ_BYTES: usize = 1 << 20;
/// Zeros to hash.
const ZEROS: [u8; 4096] = [0; 4096];

/// A piece of a file. Pieces come in order and without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The frame that has its bytes; `None` is a hole, which reads as zeros.
    pub frame: Option<FrameId>,
    /// Where in the frame's plaintext they begin.
    pub skip: u32,
    /// How many bytes.
    pub len: u64,
}

/// The name of a whole file: the BLAKE3 of the parts that it is made of. Images that have a file in the same frames share one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct WholeId(blake3::Hash);

impl WholeId {
    /// The name of the file that is made of these.
    pub fn of(parts: impl Iterator<Item = Part>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(DOMAIN);
        for Part { frame, skip, len } in parts {
            hasher.update(frame.map_or([0; 32], |id| *id.as_bytes()).as_slice());
            hasher.update(&[u8::from(frame.is_some())]);
            hasher.update(&skip.to_le_bytes());
            hasher.update(&len.to_le_bytes());
        }
        Self(hasher.finalize())
    }

    pub(crate) fn from_hash(hash: blake3::Hash) -> Self {
        Self(hash)
    }
}

impl fmt::Display for WholeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for WholeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WholeId({self})")
    }
}

/// What became of the wish for a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It is there, and checked.
    Ready,
    /// Not all of its frames are on disk.
    Incomplete,
    /// There is no room for it, the disk did not take it, what is there is damaged and open, or nobody wants it any more.
    Not,
}

impl Cache {
    /// A whole file, open for reading, where it is there and was checked. Does no I/O but to open it. As long as it is open, or any
    /// mapping of it is left, it is not evicted.
    pub fn whole(&self, id: WholeId) -> Option<File> {
        self.shared().disk().whole(id)
    }

    /// Whether a whole file is there, checked or not.
    pub fn has_whole(&self, id: WholeId) -> bool {
        self.shared().disk().whole_check(id).is_some()
    }

    /// An empty file where whole files are: to find out what the kernel does with such. *Errors*: who has a file open cannot be known
    /// there (`F_SETLEASE` of fcntl(2)), so that nothing could ever be evicted.
    pub fn trial_whole(&self) -> io::Result<File> {
        self.shared().disk().trial_whole()
    }

    /// Has a whole file ready for [`Cache::whole`]: reads and checks what is there, or else makes it of `parts`, whose name `id`
    /// is and which have `len` bytes. Never fetches, and evicts nothing.
    ///
    /// Blocks, for as long as it takes to read and write the file; ends early once `is_wanted` says no. One is made at a time.
    pub fn make_whole<P: Iterator<Item = Part>>(
        &self,
        id: WholeId,
        len: u64,
        parts: impl Fn() -> P,
        is_wanted: impl Fn() -> bool,
    ) -> Made {
        let shared = self.shared();
        let disk = shared.disk();
        let _alone = disk.making_whole();
        if let Some((file, content)) = disk.unchecked_whole(id) {
            match hash(&file, &is_wanted) {
                Ok(None) => return Made::Not,
                Ok(Some(found)) if found == content => disk.whole_passed(id),
                Ok(Some(_)) | Err(_) => disk.whole_failed(id),
            }
        }
        match disk.whole_check(id) {
            Some(Check::Passed) => return Made::Ready,
            Some(Check::Due) => return Made::Not,
            Some(Check::Failed) if !disk.take_away_whole(id) => return Made::Not,
            Some(Check::Failed) | None => {}
        }
        let Some(room) = disk.room_for_whole(len) else { return Made::Not };
        if !parts().filter_map(|part| part.frame).all(|frame| disk.contains(frame)) {
            return Made::Incomplete;
        }
        shared.write_whole(id, len, room, parts(), is_wanted)
    }
}

impl Shared {
    fn write_whole(
        &self,
        id: WholeId,
        len: u64,
        room: Room<'_>,
        parts: impl Iterator<Item = Part>,
        is_wanted: impl Fn() -> bool,
    ) -> Made {
        let disk = self.disk();
        let written = disk.begin_whole(room).and_then(|new| {
            match self.write_parts(&new.file, len, parts, is_wanted)? {
                Ok(content) => disk.keep_whole(id, content, new).map(|()| Made::Ready),
                Err(made) => Ok(made),
            }
        });
        written.unwrap_or_else(|error| {
            tracing::debug!(%id, %error, "a whole file is not written");
            add(&self.counters.disk_failures, 1);
            Made::Not
        })
    }

    /// Writes the bytes of `parts`, and gives their BLAKE3; or why there are not all.
    fn write_parts(
        &self,
        file: &File,
        len: u64,
        parts: impl Iterator<Item = Part>,
        is_wanted: impl Fn() -> bool,
    ) -> io::Result<Result<blake3::Hash, Made>> {
        let mut hasher = blake3::Hasher::new();
        let (mut at, mut synced) = (0_u64, 0);
        let mut last: Option<Chunk> = None;
        file.set_len(len)?;
        for part in parts {
            let end = at.saturating_add(part.len);
            if end > len || !is_wanted() {
                return Ok(Err(Made::Not));
            }
            match part.frame {
                // what is not written of a file reads as zeros
                None => hash_zeros(&mut hasher, part.len),
                Some(frame) => {
                    let kept = last.take().filter(|chunk| chunk.id() == frame);
                    let Some(chunk) = kept.or_else(|| self.peek_disk(frame)) else {
                        return Ok(Err(Made::Incomplete));
                    };
                    let Some(bytes) = slice(&chunk, part) else { return Ok(Err(Made::Not)) };
                    hasher.update(bytes);
                    file.write_all_at(bytes, at)?;
                    last = Some(chunk);
                }
            }
            at = end;
            if at - synced >= SYNC_BYTES {
                file.sync_data()?;
                synced = at;
            }
        }
        Ok(if at == len { Ok(hasher.finalize()) } else { Err(Made::Not) })
    }
}

fn slice(chunk: &Chunk, part: Part) -> Option<&[u8]> {
    let (skip, len) = (usize::try_from(part.skip).ok()?, usize::try_from(part.len).ok()?);
    chunk.bytes().get(skip..skip.checked_add(len)?)
}

fn hash_zeros(hasher: &mut blake3::Hasher, len: u64) {
    let mut left = len;
    while left > 0 {
        let part = left.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..usize::try_from(part).expect("at most 4096")]);
        left -= part;
    }
}

/// The BLAKE3 of a file; none once nobody wants it any more. What is read of it does not stay in the page cache, unless somebody
/// else has it open, whose pages they may be.
fn hash(mut file: &File, is_wanted: impl Fn() -> bool) -> io::Result<Option<blake3::Hash>> {
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), vec![0; READ_BYTES]);
    while is_wanted() {
        match file.read(&mut bytes)? {
            0 => {
                if is_alone(file) {
                    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
                }
                return Ok(Some(hasher.finalize()));
            }
            read => hasher.update(&bytes[..read]),
        };
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_what_they_are() {
        let frame = Some(FrameId::from_bytes([7; 32]));
        let parts = [Part { frame, skip: 5, len: 1 << 33 }, Part { frame: None, skip: 0, len: 4096 }];
        let id = WholeId::of(parts.into_iter());
        // computed by another implementation
        assert_eq!(id.to_string(), "6f1c3a313b8622e7cc2555e9655b0c61d3ed7241f9cea26de71d911ddb5e683e");
    }
}
