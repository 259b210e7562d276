//! Trees on this machine's disk, ready to be mapped.
//!
//! A tree's file is its flat bytes and behind them their BLAKE3 hash. It appears whole, by rename, and is hashed again
//! whenever it is opened (5 GB/s: 35 ms for a million files), so that a disk's error is found before it is believed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use lamina_image::{Digest, Tree, TreeError, unpack_tree};
use memmap2::Mmap;

use crate::NodeError;

/// What stands behind the flat bytes.
const HASH_BYTES: usize = 32;

/// The directory of trees.
#[derive(Clone, Debug)]
pub(crate) struct Trees(PathBuf);

impl Trees {
    pub(crate) fn open(directory: PathBuf) -> Result<Self, NodeError> {
        let failed = |error| NodeError::File { path: directory.clone(), error };
        fs::create_dir_all(&directory).map_err(failed)?;
        // files that a crash left half written have names of their own
        for entry in fs::read_dir(&directory).map_err(failed)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(Self(directory))
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.0.join(format!("{}.tree", digest.hex()))
    }

    /// The tree, if it is here and sound. A damaged one is removed. Blocks.
    pub(crate) fn load(&self, digest: Digest) -> Option<Tree> {
        let path = self.path(digest);
        match map(&path) {
            Ok(tree) => tree,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a local tree is damaged and will be fetched again");
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Unpacks a verified blob, keeps it, and gives it back from the disk's page cache: memory holds it only for a
    /// moment. Blocks.
    pub(crate) fn store(&self, reference: &str, digest: Digest, blob: &[u8]) -> Result<Tree, NodeError> {
        let wrong = |error| NodeError::Tree { reference: reference.to_owned(), error };
        let flat = Bytes::from(unpack_tree(blob).map_err(wrong)?);
        let in_memory = Tree::open(flat.clone()).map_err(wrong)?;
        let path = self.path(digest);
        let kept = self.keep(&path, &flat).and_then(|()| map(&path));
        match kept {
            Ok(Some(tree)) => Ok(tree),
            // without a disk the mount still works, from memory
            Ok(None) => Err(wrong(TreeError::Header)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the tree cannot be kept on disk");
                Ok(in_memory)
            }
        }
    }

    fn keep(&self, path: &Path, flat: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".tmp").tempfile_in(&self.0)?;
        file.write_all(flat)?;
        file.write_all(blake3::hash(flat).as_bytes())?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// Maps a tree and checks it against the hash behind it. `None` where it is sound but no tree.
fn map(path: &Path) -> io::Result<Option<Tree>> {
    let file = File::open(path)?;
    #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
    // SAFETY: files in this directory are written under another name, renamed, and never written again; the
    // directory belongs to this daemon alone
    let map = unsafe { Mmap::map(&file)? };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its hash does not match");
    let (flat, hash) = map.split_last_chunk::<HASH_BYTES>().ok_or_else(damaged)?;
    if blake3::hash(flat).as_bytes() != hash {
        return Err(damaged());
    }
    let len = flat.len();
    Ok(Tree::open(Bytes::from_owner(map).slice(..len)).ok())
}

#[cfg(test)]
mod tests {
    use lamina_image::{Recipe, derive_tree, pack_tree};

    use super::*;

    fn stored() -> (tempfile::TempDir, Trees, Digest) {
        let directory = tempfile::tempdir().unwrap();
        let trees = Trees::open(directory.path().to_owned()).unwrap();
        let blob = pack_tree(&derive_tree(&[] as &[Recipe]).unwrap());
        let digest = Digest::of(&blob);
        trees.store("image", digest, &blob).unwrap();
        (directory, trees, digest)
    }

    #[test]
    fn a_tree_is_found_again() {
        let (_directory, trees, digest) = stored();
        assert_eq!(trees.load(digest).unwrap().inodes(), 1);
        assert!(trees.load(Digest::of(b"another")).is_none());
    }

    #[test]
    fn a_tree_with_any_byte_changed_on_disk_is_removed_and_not_believed() {
        let (_directory, trees, digest) = stored();
        let path = trees.path(digest);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert!(trees.load(digest).is_none(), "byte {at}");
            assert!(!path.exists());
        }
        fs::write(&path, &good[..10]).unwrap();
        assert!(trees.load(digest).is_none());
    }

    #[test]
    fn a_blob_that_is_no_tree_is_refused() {
        let (_directory, trees, _) = stored();
        let blob = b"\x04\0\0\0\0\0\0\0junk";
        assert!(matches!(trees.store("image", Digest::of(blob), blob), Err(NodeError::Tree { .. })));
    }
}
