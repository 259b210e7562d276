//! An image with every kind of file that a start may touch, and profiles of it.

use bytes::Bytes;
use lamina_image::{Digest, Profile, Tree, derive_tree, pack_tree};

use super::header::header;
use super::memory::{Memory, noise, take_in};

/// The regular files, in the order in which [`profile`] numbers them: larger than a frame of a boot pack, one
/// byte, none, whole pages, a hard link, holes.
pub(crate) const FILES: [&str; 6] = ["a/big", "a/small", "a/empty", "a/whole", "a/same", "holes"];

/// An image that somebody starts.
pub(crate) struct Image {
    pub(crate) sink: Memory,
    pub(crate) tree: Tree,
    /// The digest of the tree's blob.
    pub(crate) digest: Digest,
}

impl Image {
    /// `big_bytes` is the size of the one large file.
    pub(crate) fn new(big_bytes: usize) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut header(tar::EntryType::Directory, 0), "a", &b""[..]).unwrap();
        let file = |path: &str, bytes: &[u8], tar: &mut tar::Builder<Vec<u8>>| {
            tar.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64), path, bytes).unwrap();
        };
        file("a/big", &noise(big_bytes, 1), &mut tar);
        file("a/small", b"x", &mut tar);
        file("a/empty", b"", &mut tar);
        file("a/whole", &noise(8192, 2), &mut tar);
        tar.append_link(&mut header(tar::EntryType::Link, 0), "a/same", "a/small").unwrap();
        tar.append_link(&mut header(tar::EntryType::Symlink, 0), "a/link", "small").unwrap();
        append_holes(&mut tar);
        let sink = Memory::default();
        let recipes = take_in(&sink, vec![tar.into_inner().unwrap()]).unwrap();
        let flat = derive_tree(&recipes).unwrap();
        let digest = Digest::of(&pack_tree(&flat));
        Self { sink, tree: Tree::open(Bytes::from(flat)).unwrap(), digest }
    }
}

/// 100,000 bytes, of which only those from 40,000 to before 45,000 are stored.
fn append_holes(tar: &mut tar::Builder<Vec<u8>>) {
    let octal = |value: u64| -> [u8; 12] { format!("{value:011o}\0").into_bytes().try_into().unwrap() };
    let mut header = header(tar::EntryType::GNUSparse, 5_000);
    header.as_old_mut().name[..5].copy_from_slice(b"holes");
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize = octal(100_000);
    for (place, (offset, len)) in gnu.sparse.iter_mut().zip([(40_000, 5_000), (100_000, 0)]) {
        (place.offset, place.numbytes) = (octal(offset), octal(len));
    }
    header.set_cksum();
    tar.append(&header, &noise(5_000, 3)[..]).unwrap();
}

/// A profile of one start that reads these runs of [`FILES`]: number, first page, pages.
pub(crate) fn profile(names: &[&str], runs: &[(u32, u64, u64)]) -> Profile {
    let runs: Vec<_> = runs.iter().map(|(file, first, pages)| (file, first, pages, 1)).collect();
    let json = serde_json::json!({"version": 1, "starts": 1, "names": names, "files": FILES, "runs": runs});
    Profile::parse(&serde_json::to_vec(&json).unwrap()).unwrap()
}
