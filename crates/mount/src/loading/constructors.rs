//! Readahead for the constructors of a library, which the linker calls when it has loaded it.
//!
//! Large libraries have thousands: each registers something and returns. Where they begin is written in the file, and what they do is
//! mostly to call a function or two and to hand on pointers to names and tables, which lie all over the library: each is a page that
//! the program waits for, one after the other. Measured on `import torch` with CUDA: of the frames that the beginnings of constructors
//! name, nine of ten are touched, and 450 of its 1,160 waits were for these.

use std::ops::Range;

use lamina_cache::{Class, Want};
use lamina_image::Ino;

use super::{FRAMES_MAX, Loading, Relocated};
use crate::ahead::Ahead;
use crate::elf::{Elf, Linked};
use crate::order::want;

/// So much of a constructor is looked at, in bytes. What follows is run less surely: twice as much received 1 % more, and made no
/// difference that could be measured.
const CODE_BYTES: usize = 256;
/// Code is read together with what lies at most this far from it, and in pieces of at most this length, in bytes.
const GAP_BYTES: u64 = 16 << 10;
const PIECE_BYTES: u64 = 1 << 20;
/// Frames asked for at once: some 1.5 MiB. Others' relocations, which are needed sooner, come between.
const BATCH: usize = 32;

impl Loading {
    /// Fetches what the constructors of a library touch, whose relocations were followed: their own code, and what it names, in the
    /// order in which they are called. `None` where something could not be read.
    pub(super) async fn construct(&self, ino: Ino, relocated: Relocated) -> Option<()> {
        let Relocated { elf, linked, size, mut frames, .. } = relocated;
        let starts = self.constructors(ino, &elf, &linked).await?;
        let frames_max = frames.len() + FRAMES_MAX;
        let mut left = &starts[..];
        while !left.is_empty() && frames.len() < frames_max && !self.ahead.is_lean() {
            let (piece, count) = piece(left);
            let code = self.read(ino, piece.clone()).await?;
            let (now, later) = left.split_at(count);
            let named = now.iter().flat_map(|start| elf.named(beginning(&code, start - piece.start), *start));
            let new = named.filter(|place| *place < size).filter_map(|place| self.frame(ino, place));
            let new: Vec<u32> = new.filter(|frame| frames.insert(*frame)).collect();
            for batch in new.chunks(BATCH) {
                self.bring(batch).await?;
            }
            left = later;
        }
        Some(())
    }

    /// Where constructors begin, in the order in which they are called.
    async fn constructors(&self, ino: Ino, elf: &Elf, linked: &Linked) -> Option<Vec<u64>> {
        if let Some(list) = linked.constructors.clone() {
            return Some(elf.constructors(&self.read(ino, list).await?));
        }
        let sections = self.read(ino, elf.sections.clone()).await?;
        let names = self.read(ino, elf.section_names(&sections)?).await?;
        let list = Elf::old_constructors(&sections, &names)?;
        let mut starts = elf.constructors(&self.read(ino, list).await?);
        starts.reverse();
        Some(starts)
    }

    /// Fetches frames that nobody waits for yet, and is back when they are here.
    async fn bring(&self, frames: &[u32]) -> Option<()> {
        let Ahead { tree, cache, source, .. } = &*self.ahead;
        let wants: Vec<Want> = frames.iter().filter_map(|number| want(tree, *number)).collect();
        cache.fetch(source, &wants, &[], Class::Background).await.ok().map(drop)
    }
}

/// The beginning of the constructor that is `skip` bytes into this code.
fn beginning(code: &[u8], skip: u64) -> &[u8] {
    let code = usize::try_from(skip).ok().and_then(|skip| code.get(skip..)).unwrap_or_default();
    &code[..code.len().min(CODE_BYTES)]
}

/// The bytes of a file to read for the first few of `starts`, and how many these are; one at least, where there is one.
fn piece(starts: &[u64]) -> (Range<u64>, usize) {
    let code = |start: u64| start..start.saturating_add(CODE_BYTES as u64);
    let mut piece = code(starts.first().copied().unwrap_or(0));
    for (count, start) in starts.iter().enumerate() {
        let code = code(*start);
        let wider = piece.start.min(code.start)..piece.end.max(code.end);
        let is_near = code.start <= piece.end.saturating_add(GAP_BYTES)
            && piece.start <= code.end.saturating_add(GAP_BYTES);
        if !is_near || wider.end - wider.start > PIECE_BYTES {
            return (piece, count);
        }
        piece = wider;
    }
    (piece, starts.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn constructors_that_lie_together_are_read_together() {
        const CODE: u64 = CODE_BYTES as u64;
        let far = 64 << 20;
        assert_eq!(piece(&[]).1, 0);
        assert_eq!(piece(&[far, 0]), (far..far + CODE, 1));
        assert_eq!(piece(&[far, far + 100, far + GAP_BYTES, 0]), (far..far + GAP_BYTES + CODE, 3));
        assert_eq!(
            piece(&[far, far - 100, far - GAP_BYTES, 0]),
            (far - GAP_BYTES..far + CODE, 3),
            "backward"
        );
        let dense: Vec<u64> = (0..10_000).map(|n| n * 500).collect();
        let (read, count) = piece(&dense);
        assert!(read.end <= PIECE_BYTES && count > 2000, "{read:?} {count}");
    }

    proptest! {
        #[test]
        fn every_constructor_gets_its_piece(starts in prop::collection::vec(any::<u64>(), 1..100)) {
            let mut left = &starts[..];
            while !left.is_empty() {
                let (read, count) = piece(left);
                prop_assert!(count >= 1 && read.end - read.start <= PIECE_BYTES);
                prop_assert!(left[..count].iter().all(|start| read.contains(start) || *start == u64::MAX));
                left = &left[count..];
            }
        }

        #[test]
        fn the_beginning_of_code_is_found_wherever_it_is_said_to_be(len in 0usize..2000, skip in any::<u64>()) {
            let code = vec![0; len];
            prop_assert!(beginning(&code, skip).len() <= CODE_BYTES);
            prop_assert_eq!(beginning(&code, skip % 3000).is_empty(), skip % 3000 >= len as u64);
        }
    }
}
