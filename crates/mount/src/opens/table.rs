//! The table of what is open of one mount, as one process leaves it to the next: a memory file.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `lamopens` |
//! | 4 | the version, 1 |
//! | 4 | zero |
//! | 8 | files of so many bytes and more are big: for smaller ones nothing is counted |
//! | 8 for each inode | how many descriptors are open, and the number of the backing file or 0 |
//!
//! Numbers are little-endian, those of an inode u32. A table of another version, or of another image, is none: nobody knows then what
//! is open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use lamina_image::Ino;
use rustix::fs::{FallocateFlags, MemfdFlags};
use tracing::warn;

const MAGIC: &[u8; 8] = b"lamopens";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 24;
const ENTRY_BYTES: usize = 8;
/// Entries read at once.
const ENTRIES: usize = 4096;

/// The table of one mount.
pub(crate) struct Table {
    file: File,
    inodes: u32,
    big_bytes: u64,
}

/// How an inode is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) count: u32,
    /// The backing file's number; 0 where there is none.
    pub(super) backing: u32,
}

impl Table {
    /// Nothing is open of so many inodes. *Errors*: there is no memory for it.
    pub(crate) fn new(inodes: u32, big_bytes: u64) -> io::Result<Self> {
        let file: File = rustix::fs::memfd_create(c"lamina-opens", MemfdFlags::CLOEXEC)?.into();
        // all of it is there from the beginning, so that writing to it cannot fail
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, position(inodes))?;
        file.write_all_at(&head(big_bytes), 0)?;
        Ok(Self { file, inodes, big_bytes })
    }

    /// What a process before has left. *Errors*: it is no table of so many inodes.
    pub(crate) fn of(left: OwnedFd, inodes: u32) -> io::Result<Self> {
        let (file, mut bytes) = (File::from(left), [0; HEAD_BYTES]);
        let none = || io::Error::new(io::ErrorKind::InvalidData, "a table of open files of another kind");
        if file.metadata()?.len() != position(inodes) {
            return Err(none());
        }
        file.read_exact_at(&mut bytes, 0)?;
        let big_bytes = u64::from_le_bytes(bytes[16..].try_into().expect("eight bytes"));
        match bytes == head(big_bytes) {
            true => Ok(Self { file, inodes, big_bytes }),
            false => Err(none()),
        }
    }

    /// From how many bytes on a file is big.
    pub(crate) fn big_bytes(&self) -> u64 {
        self.big_bytes
    }

    /// A copy of its descriptor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// All that is open.
    pub(super) fn read(&self) -> io::Result<HashMap<Ino, Open>> {
        let (mut open, mut bytes) = (HashMap::new(), vec![0; ENTRIES * ENTRY_BYTES]);
        for first in (0..self.inodes).step_by(ENTRIES) {
            let count = ENTRIES.min((self.inodes - first) as usize);
            let bytes = &mut bytes[..count * ENTRY_BYTES];
            self.file.read_exact_at(bytes, position(first))?;
            for (entry, index) in bytes.chunks_exact(ENTRY_BYTES).zip(first..) {
                let now = Open::of(entry.try_into().expect("eight bytes"));
                if now.count > 0 {
                    open.insert(Ino::from_index(index), now);
                }
            }
        }
        Ok(open)
    }

    /// Says how an inode is open from now on.
    pub(super) fn write(&self, ino: Ino, now: Open) {
        let Some(index) = ino.index().filter(|index| *index < self.inodes) else { return };
        if let Err(error) = self.file.write_all_at(&now.bytes(), position(index)) {
            warn!(%error, "what is open is not remembered");
        }
    }
}

impl Open {
    fn of(bytes: [u8; ENTRY_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Self { count: word(0), backing: word(4) }
    }

    fn bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..4].copy_from_slice(&self.count.to_le_bytes());
        bytes[4..].copy_from_slice(&self.backing.to_le_bytes());
        bytes
    }
}

fn head(big_bytes: u64) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..].copy_from_slice(&big_bytes.to_le_bytes());
    bytes
}

/// Where an inode's entry begins.
fn position(index: u32) -> u64 {
    HEAD_BYTES as u64 + u64::from(index) * ENTRY_BYTES as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INODES: u32 = 5000;

    fn table() -> Table {
        Table::new(INODES, 1 << 20).expect("memory")
    }

    /// As the next process finds it.
    fn left(table: &Table) -> io::Result<Table> {
        Table::of(table.descriptor().expect("a copy"), INODES)
    }

    #[test]
    fn the_next_process_finds_what_was_written_and_the_size_from_which_a_file_is_counted() {
        let before = table();
        assert_eq!(before.file.metadata().expect("known").len(), 24 + 8 * u64::from(INODES));
        let (first, last) = (Ino(1), Ino(u64::from(INODES)));
        let (one, two) = (Open { count: 1, backing: 7 }, Open { count: 2, backing: 0 });
        before.write(first, one);
        before.write(last, two);
        let after = left(&before).expect("a table");
        assert_eq!(after.big_bytes(), 1 << 20);
        assert_eq!(after.read().expect("read"), HashMap::from([(first, one), (last, two)]));
    }

    #[test]
    fn a_table_of_another_length_version_or_kind_is_none() {
        for (at, byte) in [(0, b'L'), (7, 0), (8, 0), (8, 2), (11, 1), (12, 1), (15, 1)] {
            let table = table();
            table.file.write_all_at(&[byte], at).expect("written");
            assert!(left(&table).is_err(), "{at} {byte}");
        }
        for bytes in [0, 1, 23, 24, position(INODES) - 1, position(INODES) + 1] {
            let table = table();
            table.file.set_len(bytes).expect("set");
            assert!(left(&table).is_err(), "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn any_entry_is_read_as_it_was_written(count: u32, backing: u32) {
            let open = Open { count, backing };
            prop_assert_eq!(Open::of(open.bytes()), open);
        }

        #[test]
        fn any_bytes_are_a_table_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let table = Table::new(4, 0).expect("memory");
            table.file.write_all_at(&bytes, 0).expect("written");
            if let Ok(table) = Table::of(table.descriptor().expect("a copy"), 4) {
                prop_assert!(table.read().expect("read").len() <= 4);
            }
        }
    }
}
