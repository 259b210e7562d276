//! Trees on this machine's disk, ready to be mapped.
//!
//! A tree's file is its flat bytes and behind them their BLAKE3 hash. It appears whole, by rename, and is hashed again
//! whenever it is opened (5 GB/s: 35 ms for a million files), so that a disk's error is found before it is believed.
//!
//! To check a tree and to sort its frames touches every page of it, and a mount that is at rest few of them. So what was touched is
//! given back some time after a mount: it stays in the page cache, but is not counted as this process's memory any more.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use lamina_image::{
    Digest, FlatSink, Hasher, Tree, TreeContents, TreeError, TreeNames, TreeUnpacking, unpack_tree,
};
use memmap2::{Mmap, UncheckedAdvice};
use parking_lot::Mutex;
use tempfile::NamedTempFile;

use crate::NodeError;

/// What stands behind the flat bytes.
const HASH_BYTES: usize = 32;

/// The directory of trees.
#[derive(Clone, Debug)]
pub(crate) struct Trees {
    directory: PathBuf,
    /// Those that somebody may still use.
    mapped: Arc<Mutex<Vec<Weak<Mmap>>>>,
}

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
        Ok(Self { directory, mapped: Arc::default() })
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.directory.join(format!("{}.tree", digest.hex()))
    }

    /// Whether there is one, sound or not. Asks the disk for a name only.
    pub(crate) fn has(&self, digest: Digest) -> bool {
        self.path(digest).exists()
    }

    /// The tree, if it is here and sound. A damaged one is removed. Blocks.
    pub(crate) fn load(&self, digest: Digest) -> Option<Tree> {
        let path = self.path(digest);
        match self.map(&path) {
            Ok(tree) => tree,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a local tree is damaged and will be fetched again");
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Unpacks a blob while it comes, and keeps it if it is what the digest names. Blocks.
    ///
    /// *Errors*: those of `blob`; and the disk's, after which [`Trees::store`] does without one.
    pub(crate) fn receive(&self, digest: Digest, blob: impl Read) -> io::Result<Tree> {
        let mut blob = Hashed { bytes: blob, hasher: Hasher::new(digest.algorithm()) };
        let packed = TreeUnpacking::begin(&mut blob)?;
        let file = self.begin(packed.flat_len())?;
        packed.unpack(&mut blob, &mut FlatFile(file.as_file()))?;
        blob.must_end_as(digest)?;
        let tree = self.tree(Mapped::of(file.as_file())?, Tree::open).ok_or_else(damaged)?;
        self.keep(file, digest, tree.as_bytes())?;
        Ok(tree)
    }

    /// Unpacks the names that a blob begins with while they come: `part` is what `names` is of. Blocks.
    ///
    /// *Errors*: those of `part`, and of the disk; and names that are not what they should be.
    pub(crate) fn receive_names(
        &self,
        digest: Digest,
        names: TreeNames,
        part: impl Read,
    ) -> io::Result<(Tree, Named)> {
        // the blob's digest is over these bytes as well
        if names.digest.algorithm() != digest.algorithm() {
            return Err(other_names());
        }
        let mut part = Hashed { bytes: part.take(names.bytes), hasher: Hasher::new(digest.algorithm()) };
        let packed = TreeUnpacking::begin(&mut part)?;
        if packed.names_len() != Some(names.bytes) {
            return Err(other_names());
        }
        let file = self.begin(packed.flat_len())?;
        let contents = packed.unpack_names(&mut part, &mut FlatFile(file.as_file()))?;
        // what was unpacked is shown to nobody before this
        if part.hasher.clone().finish() != names.digest {
            return Err(other_names());
        }
        let tree = self.tree(Mapped::of(file.as_file())?, Tree::open_names).ok_or_else(damaged)?;
        Ok((tree, Named { digest, file, contents, bytes: names.bytes, hasher: part.hasher }))
    }

    /// Unpacks what comes behind the names of `tree`, which `named` is of, and keeps the tree, which has its contents then. `rest` is
    /// the blob from the first byte behind the names. Blocks.
    ///
    /// *Errors*: as of [`receive_names`](Self::receive_names); with the names, what came is not what the digest names.
    pub(crate) fn receive_contents(&self, tree: &Tree, named: Named, rest: impl Read) -> io::Result<()> {
        let Named { digest, file, contents, hasher, .. } = named;
        let mut rest = Hashed { bytes: rest, hasher };
        contents.unpack(&mut rest, &mut FlatFile(file.as_file()))?;
        rest.must_end_as(digest)?;
        // the file's, and mapped: what was written behind the names is there
        let flat = tree.as_bytes().clone();
        self.keep(file, digest, &flat)?;
        tree.set_contents(flat).map_err(io::Error::other)
    }

    /// Unpacks a verified blob, keeps it, and gives it back from the disk's page cache: memory holds it only for a
    /// moment. Blocks.
    pub(crate) fn store(&self, reference: &str, digest: Digest, blob: &[u8]) -> Result<Tree, NodeError> {
        let wrong = |error| NodeError::Tree { reference: reference.to_owned(), error };
        let flat = Bytes::from(unpack_tree(blob).map_err(wrong)?);
        let in_memory = Tree::open(flat.clone()).map_err(wrong)?;
        let path = self.path(digest);
        let kept = || {
            let file = self.begin(flat.len() as u64)?;
            file.as_file().write_all_at(&flat, 0)?;
            self.keep(file, digest, &flat)?;
            self.map(&path)
        };
        match kept() {
            Ok(Some(tree)) => Ok(tree),
            // without a disk the mount still works, from memory
            Ok(None) => Err(wrong(TreeError::Header)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the tree cannot be kept on disk");
                Ok(in_memory)
            }
        }
    }

    /// A file for a flat tree of `len` bytes, which has no name yet that anybody would look for.
    fn begin(&self, len: u64) -> io::Result<NamedTempFile> {
        let file = tempfile::Builder::new().prefix(".tmp").tempfile_in(&self.directory)?;
        file.as_file().set_len(len + HASH_BYTES as u64)?;
        Ok(file)
    }

    /// Keeps a file that has all of the tree with this digest, which is `flat`.
    fn keep(&self, file: NamedTempFile, digest: Digest, flat: &[u8]) -> io::Result<()> {
        file.as_file().write_all_at(blake3::hash(flat).as_bytes(), flat.len() as u64)?;
        file.persist(self.path(digest)).map_err(|error| error.error)?;
        Ok(())
    }

    /// Maps a tree and checks it against the hash behind it. `None` where it is sound but no tree.
    fn map(&self, path: &Path) -> io::Result<Option<Tree>> {
        let mapped = Mapped::of(&File::open(path)?)?;
        let (flat, hash) = mapped.0.split_last_chunk::<HASH_BYTES>().ok_or_else(damaged)?;
        if blake3::hash(flat).as_bytes() != hash {
            return Err(damaged());
        }
        Ok(self.tree(mapped, Tree::open))
    }

    /// The tree before the hash, if it is one.
    fn tree(&self, mapped: Mapped, open: impl FnOnce(Bytes) -> Result<Tree, TreeError>) -> Option<Tree> {
        let (len, map) = (mapped.0.len().checked_sub(HASH_BYTES)?, Arc::downgrade(&mapped.0));
        let tree = open(Bytes::from_owner(mapped).slice(..len)).ok()?;
        let mut mapped = self.mapped.lock();
        mapped.retain(|map| map.strong_count() > 0);
        mapped.push(map);
        drop(mapped);
        Some(tree)
    }

    /// Gives the pages of all trees back to the kernel. Those that are needed come again from its page cache.
    pub(crate) fn let_go(&self) {
        for map in self.mapped.lock().iter().filter_map(Weak::upgrade) {
            #[expect(unsafe_code, reason = "of memory that is no file's this would lose what was written")]
            // SAFETY: it maps a file, to be read only, of which nobody changes what was read: the same bytes come again
            let given_back = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
            if let Err(error) = given_back {
                tracing::debug!(%error, "the pages of a tree stay");
            }
        }
    }
}

/// A tree on its way to its file, of which the names have come.
#[derive(Debug)]
pub(crate) struct Named {
    digest: Digest,
    file: NamedTempFile,
    contents: TreeContents,
    /// How many bytes of the blob that took.
    bytes: u64,
    /// Over these.
    hasher: Hasher,
}

impl Named {
    /// How many bytes of the blob have come.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Hashes what is read of it.
struct Hashed<R> {
    bytes: R,
    hasher: Hasher,
}

impl<R: Read> Hashed<R> {
    /// Checks that nothing more comes, and that what came is what the digest names.
    fn must_end_as(mut self, digest: Digest) -> io::Result<()> {
        match self.read(&mut [0])? == 0 && self.hasher.finish() == digest {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "it is not what the digest names")),
        }
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let read = self.bytes.read(to)?;
        self.hasher.update(&to[..read]);
        Ok(read)
    }
}

/// A tree's file, which is long enough.
struct FlatFile<'a>(&'a File);

impl FlatSink for FlatFile<'_> {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }
}

fn other_names() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its names are not what they should be")
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its hash does not match")
}

/// The file of a tree, mapped.
struct Mapped(Arc<Mmap>);

impl Mapped {
    fn of(file: &File) -> io::Result<Self> {
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
        // SAFETY: files in this directory are written under another name, renamed, and never written again; the
        // directory belongs to this daemon alone. Of one that is still being written nothing is read but its names, which are there:
        // a tree looks at its contents only once it was given them
        let map = unsafe { Mmap::map(file)? };
        Ok(Self(Arc::new(map)))
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use lamina_image::{Algorithm, Recipe, derive_tree, pack_tree};

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
    fn what_was_let_go_takes_no_memory_and_is_read_as_before() {
        let (_directory, trees, digest) = stored();
        let tree = trees.load(digest).unwrap();
        let resident = || {
            let maps = fs::read_to_string("/proc/self/smaps").unwrap();
            let name = trees.path(digest).display().to_string();
            let of = maps.split(&name).nth(1).expect("it is mapped");
            let line = of.lines().find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        assert!(resident() > 0);
        trees.let_go();
        assert_eq!(resident(), 0);
        assert_eq!(tree.inodes(), 1);
        drop(tree);
        let _again = trees.load(digest);
        assert_eq!(trees.mapped.lock().len(), 1);
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
    fn a_tree_that_comes_is_there_once_all_of_it_was_right() {
        let (directory, trees, digest) = stored();
        let blob = pack_tree(&derive_tree(&[] as &[Recipe]).unwrap());
        fs::remove_file(trees.path(digest)).unwrap();
        for len in 0..blob.len() {
            assert!(trees.receive(digest, &blob[..len]).is_err(), "{len} bytes");
        }
        trees.receive(digest, &[&blob[..], b"more"].concat()[..]).expect_err("too long");
        for at in 0..blob.len() {
            let mut flipped = blob.clone();
            flipped[at] ^= 1;
            trees.receive(digest, &flipped[..]).expect_err("another byte");
        }
        assert!(trees.load(digest).is_none());
        assert_eq!(trees.receive(digest, &blob[..]).unwrap().inodes(), 1);
        assert_eq!(trees.load(digest).unwrap().inodes(), 1);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing half written stays");
    }

    #[test]
    fn a_tree_in_two_parts_shows_its_names_once_these_were_right_and_is_kept_once_all_of_it_was() {
        let (directory, trees, digest) = stored();
        let blob = pack_tree(&derive_tree(&[] as &[Recipe]).unwrap());
        let names = TreeNames::of(&blob).unwrap();
        let (part, rest) = blob.split_at(usize::try_from(names.bytes).unwrap());
        fs::remove_file(trees.path(digest)).unwrap();
        for len in 0..part.len() {
            assert!(trees.receive_names(digest, names, &part[..len]).is_err(), "{len} bytes");
        }
        let others = TreeNames { digest: Digest::of(b"others"), ..names };
        let by_another = TreeNames { digest: Digest::by(Algorithm::Sha512, part), ..names };
        let longer = TreeNames { bytes: names.bytes + 1, ..names };
        for wrong in [others, by_another, longer] {
            let error = trees.receive_names(digest, wrong, &blob[..]).expect_err("other names");
            assert!(error.to_string().contains("names"), "{error}");
        }
        let named = || trees.receive_names(digest, names, part).unwrap();
        let mut wrong: Vec<Vec<u8>> = (0..rest.len()).map(|len| rest[..len].to_vec()).collect();
        wrong.push([rest, b"more"].concat());
        for at in 0..rest.len() {
            let mut flipped = rest.to_vec();
            flipped[at] ^= 1;
            wrong.push(flipped);
        }
        for wrong in wrong {
            let (tree, named) = named();
            assert!(trees.receive_contents(&tree, named, &wrong[..]).is_err());
            assert!(!tree.has_contents() && tree.inodes() == 1);
            assert!(trees.load(digest).is_none());
        }
        let (tree, named) = trees.receive_names(digest, names, &blob[..]).unwrap();
        assert_eq!(named.bytes(), names.bytes);
        trees.receive_contents(&tree, named, rest).unwrap();
        assert!(tree.has_contents());
        assert_eq!(trees.load(digest).unwrap().as_bytes(), tree.as_bytes());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing half written stays");
    }

    #[test]
    fn a_blob_that_is_no_tree_is_refused() {
        let (_directory, trees, _) = stored();
        let blob = b"\x04\0\0\0\0\0\0\0junk";
        assert!(matches!(trees.store("image", Digest::of(blob), blob), Err(NodeError::Tree { .. })));
    }
}
