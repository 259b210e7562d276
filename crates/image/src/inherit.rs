//! What the next version of an image takes over of a profile.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use lamina_chunk::{Chunk, FrameId, Place};

use crate::files::{Files, ReadError};
use crate::profile::{PAGE_BYTES, file_size, find};
use crate::{Ino, Profile, ProfileRun, Tree, TreeError};

mod moved;

use moved::{Layout, Moved};

/// Bytes of libraries that are looked at, of both images together: all that torch and its libraries say of themselves has 50 MiB.
const LOOKED_AT_BYTES_MAX: u64 = 512 << 20;

/// Takes over profiles of one image for the next version of it.
#[derive(Debug)]
pub struct Inheritance {
    old: Option<Files>,
    new: Files,
    /// How the files are that changed and were looked at.
    moved: HashMap<String, Option<Moved>>,
    bytes_left: u64,
}

/// A file in both images.
#[derive(Clone, Copy)]
struct Both {
    old: (Ino, u64),
    new: (Ino, u64),
}

impl Inheritance {
    /// Between two images; without the tree of the old one nobody knows what has changed.
    pub fn new(old: Option<&Tree>, new: &Tree) -> Self {
        let old = old.map(Files::of);
        Self { old, new: Files::of(new), moved: HashMap::new(), bytes_left: LOOKED_AT_BYTES_MAX }
    }

    /// The same profile for the new image: files that are there under the same path, cut to their size. Of a file that is the same
    /// there, the same pages. Of a library that is not (ELF), the pages that have now what those had: whole sections where nearly all
    /// of one was read, and otherwise by symbols. Of any other file the same pages. Names stay, since it may matter as well that a name is not
    /// there.
    ///
    /// `open` gives frames of either image; where it fails, no more libraries are looked at, and pages stay what they were.
    ///
    /// Cost: for each library that has changed, its symbols and their names are read, of all at most 512 MiB; these are kept
    /// for the next profile.
    pub fn of<E>(
        &mut self,
        profile: &Profile,
        mut open: impl FnMut(FrameId, Place) -> Result<Chunk, E>,
    ) -> Result<Profile, TreeError> {
        let mut read = vec![BTreeSet::new(); profile.files.len()];
        for ProfileRun(file, first, pages, _) in profile.runs.iter().copied() {
            read[file as usize].extend(first..first + pages);
        }
        let mut sizes = Vec::with_capacity(profile.files.len());
        for path in &profile.files {
            sizes.push(regular(self.new.tree(), path)?.map(|(_, size)| size));
            self.look_at(path, &mut open)?;
        }
        let mut following = HashMap::new();
        for (number, path) in profile.files.iter().enumerate() {
            if let Some(moved) = self.moved.get(path).and_then(Option::as_ref) {
                following.insert(number, moved.following(&read[number]));
            }
        }
        let mut taken = Taken::of(profile);
        for run in profile.runs.iter().copied() {
            let number = run.0 as usize;
            let Some(end) = sizes[number].map(|size| size.div_ceil(PAGE_BYTES)) else { continue };
            for page in run.1..run.1 + run.2 {
                match following.get(&number) {
                    Some(following) => {
                        let pages = following.pages(page);
                        pages.into_iter().for_each(|page| taken.add(run, page, end));
                    }
                    None => taken.add(run, page, end),
                }
            }
        }
        Ok(taken.inherited)
    }

    /// Looks how a file has changed, once.
    fn look_at<E>(
        &mut self,
        path: &str,
        open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
    ) -> Result<(), TreeError> {
        let Some(old) = self.old.as_ref().filter(|_| !self.moved.contains_key(path)) else { return Ok(()) };
        let (old, new) = (regular(old.tree(), path)?, regular(self.new.tree(), path)?);
        let Some(both) = old.zip(new).map(|(old, new)| Both { old, new }) else { return Ok(()) };
        match self.changed(both, open) {
            Ok(moved) => {
                self.moved.insert(path.to_owned(), moved);
            }
            Err(ReadError::Frame(_)) => self.old = None,
            Err(ReadError::Tree(error)) => return Err(error),
        }
        Ok(())
    }

    fn changed<E>(
        &mut self,
        both: Both,
        open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
    ) -> Result<Option<Moved>, ReadError<E>> {
        let Some(old) = &mut self.old else { return Ok(None) };
        if is_same(old.tree(), self.new.tree(), both)? {
            return Ok(None);
        }
        let Some(was) = layout(old, both.old, &mut self.bytes_left, open)? else { return Ok(None) };
        let Some(is) = layout(&mut self.new, both.new, &mut self.bytes_left, open)? else { return Ok(None) };
        Ok(Some(Moved::between(&was, &is)))
    }
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

/// Where a file has what, as long as there are bytes left that may be looked at.
fn layout<E>(
    files: &mut Files,
    (ino, size): (Ino, u64),
    bytes_left: &mut u64,
    open: &mut impl FnMut(FrameId, Place) -> Result<Chunk, E>,
) -> Result<Option<Layout>, ReadError<E>> {
    Layout::read(size, |bytes: Range<u64>| {
        let mut plain = Vec::new();
        // nothing in the place of what is too much: no part of a library
        if let Some(left) = bytes_left.checked_sub(bytes.end - bytes.start) {
            *bytes_left = left;
            files.read(ino, bytes, open, &mut plain)?;
        }
        Ok(plain)
    })
}

/// What was taken over so far.
struct Taken<'a> {
    profile: &'a Profile,
    inherited: Profile,
    /// The files' numbers there.
    numbers: Vec<Option<u32>>,
    pages: HashSet<(u32, u64)>,
}

impl<'a> Taken<'a> {
    fn of(profile: &'a Profile) -> Self {
        let numbers = vec![None; profile.files.len()];
        Self { profile, inherited: profile.heir(), numbers, pages: HashSet::new() }
    }

    /// One page for one of this run, if there is room, and it lies before the file's `end`.
    fn add(&mut self, run: ProfileRun, page: u64, end: u64) {
        if page >= end
            || self.pages.len() as u64 == crate::PROFILE_PAGES_MAX
            || !self.pages.insert((run.0, page))
        {
            return;
        }
        let (number, inherited) = (run.0 as usize, &mut self.inherited);
        let file = *self.numbers[number]
            .get_or_insert_with(|| inherited.add_file(self.profile.files[number].clone()));
        self.inherited.add_page(file, page, run.3);
    }
}
