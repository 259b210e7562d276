//! Which pages go into which frame of a boot pack.

use std::collections::HashSet;

use super::{FIRST_FRAME_BYTES, FRAME_BYTES};
use crate::profile::{PAGE_BYTES, file_size, find};
use crate::{Ino, Profile, Tree, TreeError};

/// Pages of a file: their first, how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PlannedRun {
    pub(super) ino: Ino,
    pub(super) first: u64,
    pub(super) pages: u64,
}

/// The runs of each frame, in order of need from frame to frame; the first is short, and each twice as long as the one before, up to the
/// length of all others. Within a frame they are sorted, and
/// neighbours are one run, so that they become one store. Each page comes once; what the tree does not have
/// is left out.
pub(super) fn plan(tree: &Tree, profile: &Profile) -> Result<Vec<Vec<PlannedRun>>, TreeError> {
    let files = profile.files.iter().map(|path| find(tree, path)).collect::<Result<Vec<_>, _>>()?;
    let (mut frames, mut frame, mut bytes, mut full) = (Vec::new(), Vec::new(), 0, FIRST_FRAME_BYTES);
    let mut planned = HashSet::new();
    for run in &profile.runs {
        let Some(ino) = files[run.0 as usize] else { continue };
        let Some(pages) = file_size(tree, ino).map(|size| size.div_ceil(PAGE_BYTES)) else { continue };
        // a page's number has 32 bits in the table: files of up to 16 TiB
        for page in run.1..(run.1 + run.2).min(pages).min(u32::MAX.into()) {
            if !planned.insert((ino, page)) {
                continue;
            }
            frame.push(PlannedRun { ino, first: page, pages: 1 });
            bytes += PAGE_BYTES;
            if bytes >= full {
                frames.push(joined(std::mem::take(&mut frame)));
                (bytes, full) = (0, (2 * full).min(FRAME_BYTES));
            }
        }
    }
    if !frame.is_empty() {
        frames.push(joined(frame));
    }
    Ok(frames)
}

/// Pages of one frame, each once, as runs.
fn joined(mut pages: Vec<PlannedRun>) -> Vec<PlannedRun> {
    pages.sort_unstable();
    let mut runs: Vec<PlannedRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.ino == page.ino && last.first + last.pages == page.first => {
                last.pages += 1;
            }
            _ => runs.push(page),
        }
    }
    runs
}
