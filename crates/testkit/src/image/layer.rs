//! One layer: entries in order, and how the tar is packed.

use super::entry::{Entry, Kind};

/// A layer of an [`Image`](super::Image).
///
/// What follows an entry (`mode`, `owner`, `mtime`, `xattr`) changes that entry. Without them it belongs to root,
/// was last changed at the epoch, and has mode 755 (directories), 777 (symbolic links) or 644.
#[derive(Clone, Debug)]
pub struct Layer {
    entries: Vec<Entry>,
    packing: Packing,
}

/// How the tar of a layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Layer {
    /// A layer without entries.
    pub fn new() -> Self {
        Self { entries: Vec::new(), packing: Packing::Gzip }
    }

    /// A directory.
    pub fn dir(self, name: impl AsRef<[u8]>) -> Self {
        self.entry(name, Kind::Dir, 0o755)
    }

    /// A regular file.
    pub fn file(self, name: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) -> Self {
        self.entry(name, Kind::File(bytes.as_ref().to_vec()), 0o644)
    }

    /// A regular file of `len` bytes, zero but for `pieces` of an offset and bytes: a PAX 1.0 sparse entry.
    /// Pieces are in order, do not overlap, and all but the last are whole blocks of 512 bytes: readers disagree
    /// about where the next one begins otherwise.
    pub fn sparse(self, name: impl AsRef<[u8]>, len: u64, pieces: &[(u64, &[u8])]) -> Self {
        let pieces = pieces.iter().map(|(offset, bytes)| (*offset, bytes.to_vec())).collect();
        self.entry(name, Kind::Sparse { len, pieces }, 0o644)
    }

    /// A symbolic link.
    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(name, Kind::Symlink(target.as_ref().to_vec()), 0o777)
    }

    /// Another name for the entry `target`, which comes before it or in a lower layer.
    pub fn hardlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(name, Kind::Hardlink(target.as_ref().to_vec()), 0o644)
    }

    /// A named pipe.
    pub fn fifo(self, name: impl AsRef<[u8]>) -> Self {
        self.entry(name, Kind::Fifo, 0o644)
    }

    /// A character device.
    pub fn device(self, name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        self.entry(name, Kind::Device { block: false, major, minor }, 0o644)
    }

    /// A block device.
    pub fn block_device(self, name: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        self.entry(name, Kind::Device { block: true, major, minor }, 0o644)
    }

    /// Hides what lower layers have at `name`.
    pub fn whiteout(self, name: impl AsRef<[u8]>) -> Self {
        let name = name.as_ref();
        let start = name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let marker = [&name[..start], b".wh.", &name[start..]].concat();
        self.entry(marker, Kind::File(Vec::new()), 0o644)
    }

    /// Hides all that lower layers have in the directory `name`, not the directory itself.
    pub fn opaque(self, name: impl AsRef<[u8]>) -> Self {
        let marker = [name.as_ref(), b"/.wh..wh..opq"].concat();
        self.entry(marker, Kind::File(Vec::new()), 0o644)
    }

    /// Permission bits, with set-user-ID and the like, of the last entry.
    pub fn mode(mut self, mode: u32) -> Self {
        self.last().mode = mode;
        self
    }

    /// Who owns the last entry.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.last().uid, self.last().gid) = (uid, gid);
        self
    }

    /// When the last entry was changed: seconds since the epoch, and nanoseconds after those.
    pub fn mtime(mut self, seconds: i64, nanos: u32) -> Self {
        self.last().mtime = (seconds, nanos);
        self
    }

    /// An extended attribute of the last entry.
    pub fn xattr(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.last().xattrs.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Stores the layer as a tar, not compressed.
    pub fn plain(mut self) -> Self {
        self.packing = Packing::Plain;
        self
    }

    /// Compresses the layer with gzip, as is done where nothing else is said.
    pub fn gzip(mut self) -> Self {
        self.packing = Packing::Gzip;
        self
    }

    /// Compresses the layer with zstd.
    pub fn zstd(mut self) -> Self {
        self.packing = Packing::Zstd;
        self
    }

    /// The layer's tar.
    pub fn tar(&self) -> Vec<u8> {
        let mut tar = Vec::new();
        for entry in &self.entries {
            entry.append(&mut tar);
        }
        tar.resize(tar.len() + 1024, 0);
        tar
    }

    pub(super) fn packing(&self) -> Packing {
        self.packing
    }

    fn entry(mut self, name: impl AsRef<[u8]>, kind: Kind, mode: u32) -> Self {
        self.entries.push(Entry::new(name.as_ref(), kind, mode));
        self
    }

    fn last(&mut self) -> &mut Entry {
        self.entries.last_mut().expect("an attribute follows the entry it belongs to")
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}
