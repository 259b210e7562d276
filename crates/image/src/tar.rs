//! Reading layers: a tar stream becomes entries.
//!
//! Takes what GNU tar, bsdtar, Go and Python write: ustar, GNU long names and sparse files, PAX with every
//! standard key, sparse maps of versions 0.0, 0.1 and 1.0, and `SCHILY.xattr`. Sources: POSIX.1-2017, pax(1),
//! "pax Interchange Format"; the GNU tar manual, appendix D ("Tar Internals").
//!
//! The reader asks a [`TarSource`] for framing (headers, extensions, padding) and for file contents. That is what
//! lets one reader serve both the real tar and a [`Recipe`](crate::Recipe), in which contents are only named.

mod fields;
mod pax;
mod sparse;

use std::io;

pub use fields::path_parts;
use fields::{BLOCK, checked_header, number, or_blank};
use pax::Extensions;
pub use sparse::Segment;

use crate::FileKind;

/// Extension data (long names, PAX records) over 1 MiB is refused: no file system has names that long.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// What goes wrong with a tar. None of these goes away by reading the same bytes again, except `Read`.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream below failed: decompression, disk or network.
    #[error("the layer cannot be read: {0}")]
    Read(#[from] io::Error),
    /// The stream ends inside an entry.
    #[error("the tar is cut off at byte {0}")]
    Truncated(u64),
    /// A header does not match its checksum, or a field in it is not a number.
    #[error("the tar is damaged at byte {at}: bad {field}")]
    Header {
        /// Where the header begins.
        at: u64,
        /// Which field.
        field: &'static str,
    },
    /// A name with `..`, a NUL, or a part over 255 bytes.
    #[error("the tar has an entry {name:?} whose name {reason}")]
    Name {
        /// The name as it stands there.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An entry of a kind that no image has.
    #[error("the tar has an entry {name:?} of unknown kind {kind:?}")]
    Kind {
        /// Its name.
        name: String,
        /// Its type flag.
        kind: char,
    },
    /// Something claims a size that is refused.
    #[error("the tar has an entry {name:?} with {what} over the limit of {limit} bytes")]
    TooLarge {
        /// The entry's name, as far as it is known.
        name: String,
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A recipe whose chunks do not lie where its tar has file contents.
    #[error("the recipe's chunks do not match the tar in it, at byte {0}")]
    Recipe(u64),
}

/// Where a tar's bytes come from.
pub trait TarSource {
    /// The next `len` bytes, none of them file contents. Fewer only at the end of the stream.
    fn framing(&mut self, len: usize) -> Result<Vec<u8>, TarError>;

    /// Takes the next `len` bytes as the contents of one file, and says in which frames they are. An error where
    /// the stream ends before.
    fn contents(&mut self, len: u64) -> Result<Vec<Piece>, TarError>;

    /// How many bytes of the tar were taken.
    fn position(&self) -> u64;
}

/// A piece of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In which frame, as the source numbers them.
    pub frame: u32,
    /// Bytes of the frame's plaintext before it.
    pub skip: u32,
    /// Its length in bytes.
    pub len: u32,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Its size with holes, in bytes.
        size: u64,
        /// Where the stored bytes lie in it; one segment from 0 where it is not sparse.
        segments: Vec<Segment>,
        /// The stored bytes.
        pieces: Vec<Piece>,
    },
    /// Another name for an earlier file, which is this path.
    HardLink(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A directory.
    Directory,
    /// A device, FIFO or socket, with the device number as Linux encodes it.
    Special(FileKind, u32),
}

/// One entry of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// The path as written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permissions, set-user-ID and the like: the lower 12 bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, seconds since 1970.
    pub mtime_s: i64,
    /// And nanoseconds.
    pub mtime_ns: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads a whole tar and hands each entry to `each`, in order.
///
/// Ends where the tar does: at two blocks of zeros, or where the stream ends between two entries. What follows
/// the end mark belongs to the tar's bytes but to no entry.
pub fn read_tar<S: TarSource>(
    source: &mut S,
    mut each: impl FnMut(TarEntry) -> Result<(), TarError>,
) -> Result<(), TarError> {
    let mut global = Extensions::default();
    let mut local = Extensions::default();
    while let Some(header) = next_header(source)? {
        let at = source.position() - BLOCK as u64;
        match header.entry_type().as_byte() {
            b'g' => {
                global.add(&extension(source, &header, at)?, at)?;
                global.check_global()?;
            }
            b'x' => local.add(&extension(source, &header, at)?, at)?,
            b'L' => local.long_name = Some(until_nul(extension(source, &header, at)?)),
            b'K' => local.long_link = Some(until_nul(extension(source, &header, at)?)),
            // the label of a volume names nothing
            b'V' => drop(extension(source, &header, at)?),
            kind => {
                let extensions = std::mem::take(&mut local).over(&global);
                each(entry(source, &header, kind, extensions, at)?)?;
            }
        }
    }
    Ok(())
}

/// The next header block, or `None` at the end of the archive.
fn next_header<S: TarSource>(source: &mut S) -> Result<Option<::tar::Header>, TarError> {
    let block = source.framing(BLOCK)?;
    if block.is_empty() {
        return Ok(None);
    }
    if block.iter().all(|byte| *byte == 0) && block.len() == BLOCK {
        let second = source.framing(BLOCK)?;
        if second.iter().any(|byte| *byte != 0) {
            return Err(TarError::Header { at: source.position() - second.len() as u64, field: "end mark" });
        }
        return Ok(None);
    }
    let at = source.position() - block.len() as u64;
    checked_header(&block, at).map(Some)
}

/// The data of an extension header, without padding.
fn extension<S: TarSource>(source: &mut S, header: &::tar::Header, at: u64) -> Result<Vec<u8>, TarError> {
    let len = number(header.entry_size(), "size", at)?;
    if len > EXTENSION_BYTES_MAX {
        let name = lossy(&header.path_bytes());
        return Err(TarError::TooLarge { name, what: "an extension", limit: EXTENSION_BYTES_MAX });
    }
    let len = usize::try_from(len).expect("at most 1 MiB");
    let mut data = framing_exactly(source, len.next_multiple_of(BLOCK))?;
    data.truncate(len);
    Ok(data)
}

fn framing_exactly<S: TarSource>(source: &mut S, len: usize) -> Result<Vec<u8>, TarError> {
    let bytes = source.framing(len)?;
    if bytes.len() < len { Err(TarError::Truncated(source.position())) } else { Ok(bytes) }
}

fn entry<S: TarSource>(
    source: &mut S,
    header: &::tar::Header,
    kind: u8,
    extensions: Extensions,
    at: u64,
) -> Result<TarEntry, TarError> {
    let path = extensions.path().unwrap_or_else(|| header.path_bytes().into_owned());
    let link = || {
        let plain = || header.link_name_bytes().unwrap_or_default().into_owned();
        extensions.link().unwrap_or_else(plain)
    };
    let device = |kind| {
        let major = header.device_major().ok().flatten().unwrap_or(0);
        let minor = header.device_minor().ok().flatten().unwrap_or(0);
        EntryKind::Special(kind, device_number(major, minor))
    };
    let kind = match kind {
        // before POSIX a directory was a file whose name ends in a slash
        b'\0' if path.ends_with(b"/") => EntryKind::Directory,
        b'0' | b'\0' | b'7' | b'S' => file(source, header, &extensions, kind == b'S', at)?,
        b'1' => EntryKind::HardLink(link()),
        b'2' => EntryKind::Symlink(link()),
        b'3' => device(FileKind::CharDevice),
        b'4' => device(FileKind::BlockDevice),
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Special(FileKind::Fifo, 0),
        other => return Err(TarError::Kind { name: lossy(&path), kind: char::from(other) }),
    };
    let old = header.as_old();
    let id = |from_pax: Option<u64>, raw: &[u8], field: io::Result<u64>, name| -> Result<u32, TarError> {
        let id = from_pax.map_or_else(|| or_blank(raw, field, name, at), Ok)?;
        u32::try_from(id).map_err(|_| TarError::Header { at, field: name })
    };
    let (mtime_s, mtime_ns) = match extensions.mtime {
        Some(time) => time,
        None => (fields::signed(&header.as_old().mtime, "mtime", at)?, 0),
    };
    Ok(TarEntry {
        path,
        kind,
        mode: or_blank(&old.mode, header.mode().map(u64::from), "mode", at)
            .map(|mode| (mode & 0o7777) as u32)?,
        uid: id(extensions.uid, &old.uid, header.uid(), "uid")?,
        gid: id(extensions.gid, &old.gid, header.gid(), "gid")?,
        mtime_s,
        mtime_ns,
        xattrs: extensions.xattrs.into_iter().collect(),
    })
}

/// The contents of a regular file, sparse or not.
fn file<S: TarSource>(
    source: &mut S,
    header: &::tar::Header,
    extensions: &Extensions,
    old_gnu: bool,
    at: u64,
) -> Result<EntryKind, TarError> {
    let stored = match extensions.size {
        Some(size) => size,
        None => or_blank(&header.as_old().size, header.entry_size(), "size", at)?,
    };
    if stored > i64::MAX as u64 {
        return Err(TarError::Header { at, field: "size" });
    }
    let (map, map_len) = if old_gnu {
        (Some(sparse::old_gnu(source, header, at)?), 0)
    } else {
        sparse::of_pax(source, extensions, at)?
    };
    let len = stored.checked_sub(map_len).ok_or(TarError::Header { at, field: "sparse map" })?;
    let (size, segments) = match map {
        None => (len, vec![Segment { offset: 0, len }]),
        Some(map) => map.checked(len, at)?,
    };
    let pieces = source.contents(len)?;
    let padding = len.next_multiple_of(BLOCK as u64) - len;
    let padding = usize::try_from(padding).expect("less than a block");
    // the last padding of an archive may be missing; every reader takes that
    source.framing(padding)?;
    Ok(EntryKind::File { size, segments: segments.into_iter().filter(|it| it.len > 0).collect(), pieces })
}

/// `new_encode_dev` of include/linux/kdev_t.h.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// A name for a message.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned()
}
