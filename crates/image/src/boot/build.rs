//! Making a boot pack from a tree, a profile, and the image's frames.

use std::collections::HashSet;

use lamina_chunk::{Chunk, FrameId, Place};

use super::plan::{PlannedRun, plan};
use super::{BOOT_BYTES_MAX, BootHead, FRAME_RECORD_BYTES, NAMES_MAX, RUN_RECORD_BYTES, TABLE_BYTES_MAX};
use crate::files::{Files, ReadError};
use crate::profile::PAGE_BYTES;
use crate::{Digest, Profile, Tree, TreeError};

/// A small start is as long as its bytes take, and the highest level saves a seventh of these, for 3 s of work at most.
const SMALL_BYTES: u64 = 16 << 20;
const SMALL_LEVEL: i32 = 19;
/// Of 240 MiB level 6 saves 3 % in 3 s; what the highest saves, 8 %, takes 90.
const LEVEL: i32 = 6;
const TABLE_LEVEL: i32 = 9;

/// Why there is no boot pack.
#[derive(Debug, thiserror::Error)]
pub enum BuildError<E> {
    /// The tree is damaged.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A frame cannot be had.
    #[error("a frame for the boot pack: {0}")]
    Frame(E),
    /// More than a boot pack holds.
    #[error("too much for a boot pack")]
    TooLarge,
}

impl<E> From<ReadError<E>> for BuildError<E> {
    fn from(error: ReadError<E>) -> Self {
        match error {
            ReadError::Tree(error) => Self::Tree(error),
            ReadError::Frame(error) => Self::Frame(error),
        }
    }
}

/// Builds the boot pack of `profile` for the tree whose blob has this digest. `open` gives the image's
/// frames, several times each in the worst case. Cost: all of it in memory, a third of the pages' bytes.
/// Nothing for a profile without pages and names.
pub fn build_boot<E>(
    tree: &Tree,
    digest: Digest,
    profile: &Profile,
    mut open: impl FnMut(FrameId, Place) -> Result<Chunk, E>,
) -> Result<Option<Vec<u8>>, BuildError<E>> {
    let frames = plan(tree, profile)?;
    if frames.is_empty() && profile.names.is_empty() {
        return Ok(None);
    }
    let pages: u64 = frames.iter().flatten().map(|run| run.pages).sum();
    let level = if pages * PAGE_BYTES <= SMALL_BYTES { SMALL_LEVEL } else { LEVEL };
    let mut files = Files::of(tree);
    let (mut records, mut body) = (Vec::new(), Vec::new());
    for frame in &frames {
        let mut plain = Vec::new();
        for run in frame {
            let from = run.first * PAGE_BYTES;
            files.read(run.ino, from..from + run.pages * PAGE_BYTES, &mut open, &mut plain)?;
        }
        let sealed = zstd::bulk::compress(&plain, level).ok().filter(|sealed| sealed.len() < plain.len());
        let sealed = sealed.as_ref().unwrap_or(&plain);
        for word in [sealed.len(), plain.len(), frame.len()] {
            records.extend_from_slice(&small(word).to_le_bytes());
        }
        records.extend_from_slice(blake3::hash(sealed).as_bytes());
        body.extend_from_slice(sealed);
    }
    assert_eq!(records.len(), frames.len() * FRAME_RECORD_BYTES, "one record a frame");
    let runs = frames.concat();
    let (names, names_count) = names(profile);
    let table = [records, columns(&runs), names].concat();
    let sealed = zstd::bulk::compress(&table, TABLE_LEVEL).map_err(|_| BuildError::TooLarge)?;
    if table.len().max(sealed.len()) > TABLE_BYTES_MAX as usize {
        return Err(BuildError::TooLarge);
    }
    let mut head = BootHead {
        table_sealed: small(sealed.len()),
        table_plain: small(table.len()),
        frames: small(frames.len()),
        runs: small(runs.len()),
        names: small(names_count),
        tree: digest,
        hash: [0; 32],
    };
    head.hash = head.hash_with(&sealed);
    let boot = [&head.to_bytes()[..], &sealed, &body].concat();
    if boot.len() as u64 > BOOT_BYTES_MAX { Err(BuildError::TooLarge) } else { Ok(Some(boot)) }
}

/// A length or count that a profile's and a frame's bounds keep far below 2³².
fn small(number: usize) -> u32 {
    u32::try_from(number).expect("bounded by the profile")
}

/// All inodes, then all first pages, then all counts.
fn columns(runs: &[PlannedRun]) -> Vec<u8> {
    let word = |number: u64| u32::try_from(number).expect("the plan leaves out what a table cannot say");
    let inodes = runs.iter().map(|run| run.ino.index().expect("from a tree"));
    let firsts = runs.iter().map(|run| word(run.first));
    let counts = runs.iter().map(|run| word(run.pages));
    let mut bytes = Vec::with_capacity(runs.len() * RUN_RECORD_BYTES);
    inodes.chain(firsts).chain(counts).for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes
}

/// What is looked up: the profile's names, and the files that a start knew from listing their directory; then the directories
/// that are listed, again. Each after its length.
fn names(profile: &Profile) -> (Vec<u8>, usize) {
    let mut seen = HashSet::new();
    let mut names: Vec<&str> = Vec::new();
    let once = profile.names.iter().chain(&profile.files).map(String::as_str);
    names.extend(once.filter(|name| seen.insert(*name)));
    let mut listed = HashSet::new();
    for dir in profile.dirs.iter().map(String::as_str).filter(|dir| listed.insert(*dir)) {
        if names.len() + 2 > NAMES_MAX {
            break;
        }
        names.extend(seen.insert(dir).then_some(dir).into_iter().chain([dir]));
    }
    let mut bytes = Vec::new();
    for name in &names {
        let len = u16::try_from(name.len()).expect("a profile's paths have at most 4096 bytes");
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
    }
    (bytes, names.len())
}
