//! What the next version of an image takes over of a profile.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use lamina_chunk::{Chunk, FrameId, Place};

use crate::files::Files;
use crate::profile::{PAGE_BYTES, PROFILE_PAGES_MAX, PathBudget, file_size, find};
use crate::{Ino, Profile, ProfileRun, Tree, TreeError};

mod rebuilt;

use rebuilt::{Following, Library, Rebuilt};

/// Bytes of libraries that are looked at, of both images together: all that torch and its libraries say of themselves has 50 MiB.
const LOOKED_AT_BYTES_MAX: u64 = 512 << 20;
/// Frames that are opened for it, each of at most 256 KiB.
const OPENED_MAX: usize = 8192;
/// Parts of libraries that are kept, at most 72 bytes each. Torch and its libraries have 300,000.
const PARTS_MAX: usize = 4 << 20;

/// Takes over profiles of one image for the next version of it.
#[derive(Debug)]
pub struct Inheritance {
    /// Nothing where no more is looked at.
    old: Option<Files>,
    new: Files,
    /// How the files differ that were looked at; nothing where they do not, or in no way that is known.
    known: HashMap<Pair, Option<Rebuilt>>,
    left: Left,
}

/// A file in both images.
type Pair = (Ino, Ino);

/// What may still be looked at.
#[derive(Debug)]
struct Left {
    bytes: u64,
    frames: usize,
    parts: usize,
}

/// It was enough, or something cannot be had.
struct GaveUp;

impl Inheritance {
    /// Between two images; without the tree of the old one nobody knows what has changed.
    pub fn new(old: Option<&Tree>, new: &Tree) -> Self {
        let left = Left { bytes: LOOKED_AT_BYTES_MAX, frames: OPENED_MAX, parts: PARTS_MAX };
        Self { old: old.map(Files::of), new: Files::of(new), known: HashMap::new(), left }
    }

    /// The same profile for the new image: files that are there under the same path, cut to their size. Of a file that is the same
    /// there, the same pages. Of a library (ELF) that is another build of the same, the pages that have now what those had: a whole
    /// section where nearly all of it was read, and otherwise by symbols. Of any other file the same pages. Names stay, since it may
    /// matter as well that a name is not there.
    ///
    /// `open` gives frames of either image. Where it fails, or a bound is reached, no more libraries are looked at: pages of the
    /// others stay what they were.
    ///
    /// Cost: for each library that differs, its symbols and their names are read, of all at most 512 MiB; what follows from these is
    /// kept for the next profile, at most 288 MiB.
    ///
    /// # Errors
    /// The new tree is damaged.
    pub fn of<E>(
        &mut self,
        profile: &Profile,
        mut open: impl FnMut(FrameId, Place) -> Result<Chunk, E>,
    ) -> Result<Profile, TreeError> {
        let mut read = vec![BTreeSet::new(); profile.files.len()];
        for ProfileRun(file, first, pages, _) in profile.runs.iter().copied() {
            read[file as usize].extend(first..first + pages);
        }
        let (mut sizes, mut pairs) = (Vec::new(), Vec::new());
        for (path, read) in profile.files.iter().zip(&read) {
            let new = regular(self.new.tree(), path)?.filter(|_| !read.is_empty());
            sizes.push(new.map(|(_, size)| size));
            pairs.push(new.and_then(|new| self.look_at(path, new, &mut open)));
        }
        // the profile's boot pack is built next, and holds as many
        self.new.let_go();
        self.old.iter_mut().for_each(Files::let_go);
        let rebuilt = pairs.iter().map(|pair| self.known.get(pair.as_ref()?)?.as_ref());
        let following: Vec<Option<Following<'_>>> = rebuilt
            .zip(&read)
            .map(|(rebuilt, read)| rebuilt.map(|rebuilt| rebuilt.following(read)))
            .collect();
        let (mut taken, mut followed) = (Taken::of(profile), HashSet::new());
        for run in profile.runs.iter().copied() {
            let number = run.0 as usize;
            let Some(end) = sizes[number].map(|size| size.div_ceil(PAGE_BYTES)) else { continue };
            for page in (run.1..run.1 + run.2).filter(|page| followed.insert((run.0, *page))) {
                let has_room = match &following[number] {
                    Some(following) => {
                        following.pages(page).into_iter().all(|page| taken.add(run, page, end))
                    }
                    None => taken.add(run, page, end),
                };
                if !has_room {
                    return Ok(taken.inherited);
                }
            }
        }
        Ok(taken.inherited)
    }

    /// Looks how a file differs, once. Nothing where it is not in both.
    fn look_at<E>(
        &mut self,
        path: &str,
        (new, new_size): (Ino, u64),
        open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
    ) -> Option<Pair> {
        let files = self.old.as_mut()?;
        let looked = match regular(files.tree(), path) {
            Ok(None) => return None,
            Ok(Some((old, _))) if self.known.contains_key(&(old, new)) => return Some((old, new)),
            Ok(Some((old, old_size))) => {
                let both = Both { old: (old, old_size), new: (new, new_size) };
                differing(files, &mut self.new, both, &mut self.left, open).map(|found| ((old, new), found))
            }
            Err(_) => Err(GaveUp),
        };
        match looked {
            Ok((pair, found)) => {
                self.known.insert(pair, found);
                Some(pair)
            }
            Err(GaveUp) => {
                self.old = None;
                None
            }
        }
    }
}

/// A file in both images, and its sizes.
#[derive(Clone, Copy)]
struct Both {
    old: (Ino, u64),
    new: (Ino, u64),
}

/// How a library differs. What has one page in both is read whole anyway.
fn differing<E>(
    old: &mut Files,
    new: &mut Files,
    both: Both,
    left: &mut Left,
    open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
) -> Result<Option<Rebuilt>, GaveUp> {
    let is_short = both.old.1.max(both.new.1) <= PAGE_BYTES;
    if is_short || is_same(old.tree(), new.tree(), both).map_err(|_| GaveUp)? {
        return Ok(None);
    }
    let Some(was) = library(old, both.old, left, open)? else { return Ok(None) };
    let Some(is) = library(new, both.new, left, open)? else { return Ok(None) };
    let rebuilt = Rebuilt::between(&was, &is);
    left.parts = left.parts.checked_sub(rebuilt.parts()).ok_or(GaveUp)?;
    Ok(Some(rebuilt))
}

/// The regular file at a path, and its size.
fn regular(tree: &Tree, path: &str) -> Result<Option<(Ino, u64)>, TreeError> {
    Ok(find(tree, path)?.and_then(|ino| Some((ino, file_size(tree, ino)?))))
}

/// Whether a file is made of the same frames in both images.
fn is_same(old: &Tree, new: &Tree, both: Both) -> Result<bool, TreeError> {
    let ((old_ino, old_size), (new_ino, new_size)) = (both.old, both.new);
    if old_size != new_size {
        return Ok(false);
    }
    let (mut old_extents, mut new_extents) =
        (old.extents(old_ino, 0, old_size)?, new.extents(new_ino, 0, new_size)?);
    loop {
        let (one, other) = (old_extents.next().transpose()?, new_extents.next().transpose()?);
        let (Some(one), Some(other)) = (one, other) else { return Ok(one.is_none() && other.is_none()) };
        let frame = |tree: &Tree, number: Option<u32>| {
            number.map(|number| tree.frame(number).map(|(id, _)| id)).transpose()
        };
        if (one.offset, one.len, one.skip) != (other.offset, other.len, other.skip)
            || frame(old, one.frame)? != frame(new, other.frame)?
        {
            return Ok(false);
        }
    }
}

/// What a library says of itself.
fn library<E>(
    files: &mut Files,
    (ino, size): (Ino, u64),
    left: &mut Left,
    open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
) -> Result<Option<Library>, GaveUp> {
    let Left { bytes: bytes_left, frames, .. } = left;
    let mut open = |id, place| {
        *frames = frames.checked_sub(1).ok_or(GaveUp)?;
        open(id, place).map_err(|_| GaveUp)
    };
    Library::read(size, |bytes: Range<u64>| {
        *bytes_left = bytes_left.checked_sub(bytes.end - bytes.start).ok_or(GaveUp)?;
        let mut plain = Vec::new();
        files.read(ino, bytes, &mut open, &mut plain).map_err(|_| GaveUp)?;
        Ok(plain)
    })
}

/// What was taken over so far.
struct Taken<'a> {
    profile: &'a Profile,
    inherited: Profile,
    /// The files' numbers there, and nothing where there is no room for its path.
    numbers: HashMap<u32, Option<u32>>,
    paths: PathBudget,
    pages: HashSet<(u32, u64)>,
}

impl<'a> Taken<'a> {
    fn of(profile: &'a Profile) -> Self {
        let inherited = profile.heir();
        Self { profile, inherited, numbers: HashMap::new(), paths: PathBudget::full(), pages: HashSet::new() }
    }

    /// Adds a page of the file of `run`, if it lies before the file's `end` and is not there already. False where there is no room
    /// for more.
    fn add(&mut self, run: ProfileRun, page: u64, end: u64) -> bool {
        if page >= end || self.pages.contains(&(run.0, page)) {
            return true;
        }
        let Self { inherited, paths, .. } = self;
        let path = &self.profile.files[run.0 as usize];
        let number = self.numbers.entry(run.0);
        let number = *number.or_insert_with(|| paths.take(path).then(|| inherited.add_file(path.clone())));
        let Some(file) = number else { return true };
        self.pages.insert((run.0, page));
        self.pages.len() as u64 <= PROFILE_PAGES_MAX && inherited.add_page(file, page, run.3)
    }
}
