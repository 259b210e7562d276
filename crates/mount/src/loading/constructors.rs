//! Readahead for the constructors of a library, which the linker calls when it has loaded it.
//!
//! Large libraries have thousands: each registers something and returns. Where they begin is written in the file, and what they do is
//! mostly to call a function or two and to hand on pointers to names and tables, which lie all over the library: each is a page that
//! the program waits for, one after the other. Measured on `import torch` with CUDA: of the frames that the beginnings of constructors
//! name, nine of ten are touched, and 450 of its 1,160 waits were for these.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use lamina_cache::{Class, Want};
use lamina_image::{Ino, PAGE_BYTES};

use super::{FRAMES_MAX, Loading, PAGES_MAX, Relocated};
use crate::ahead::Ahead;
use crate::elf::{Elf, Linked};
use crate::order::want;

/// So much of a constructor is looked at, in bytes. What follows is run less surely: twice as much received 1 % more, and made no
/// difference that could be measured.
const CODE_BYTES: usize = 256;
/// Code is read together with what lies at most this far from it, and in pieces of at most this length, in bytes.
const GAP_BYTES: u64 = 16 << 10;
const PIECE_BYTES: u64 = 1 << 20;
/// Of one library no more pieces are read, and together no more bytes. Libraries of CUDA have at most some 50 of them, and 5 MiB.
const PIECES_MAX: usize = 256;
const PIECES_BYTES: u64 = 16 << 20;
/// Frames asked for at once: some 1.5 MiB. Others' relocations, which are needed sooner, come between.
const BATCH: usize = 32;

/// What a library's constructors name, as far as they were looked at.
struct Called {
    elf: Elf,
    /// Bytes of the file.
    size: u64,
    pages: HashSet<u64>,
    /// With those that its relocations touch.
    frames: HashSet<u32>,
    frames_max: usize,
}

impl Called {
    fn is_full(&self) -> bool {
        self.frames.len() >= self.frames_max || self.pages.len() >= PAGES_MAX
    }

    /// The frames that these constructors name, and nothing before did, in their order. `code` begins at `at` in the file.
    fn take(
        &mut self,
        code: &[u8],
        at: u64,
        constructors: &[u64],
        frame: impl Fn(u64) -> Option<u32>,
    ) -> Vec<u32> {
        let mut new = Vec::new();
        for start in constructors {
            for place in self.elf.named(beginning(code, start - at), *start) {
                if self.is_full() {
                    return new;
                }
                if place < self.size && self.pages.insert(place / PAGE_BYTES) {
                    new.extend(frame(place).filter(|frame| self.frames.insert(*frame)));
                }
            }
        }
        new
    }
}

impl Loading {
    /// Fetches what the constructors of a library touch, whose relocations were followed: their own code, and what it names, in the
    /// order in which they are called. `None` where something could not be read.
    pub(super) async fn construct(self: &Arc<Self>, ino: Ino, relocated: Relocated) -> Option<()> {
        let Relocated { elf, linked, size, frames, .. } = relocated;
        let starts = self.constructors(ino, &elf, &linked).await?;
        let frames_max = frames.len() + FRAMES_MAX;
        let mut called = Called { elf, size, pages: HashSet::new(), frames, frames_max };
        let (mut left, mut code_left) = (&starts[..], PIECES_BYTES);
        for _ in 0..PIECES_MAX {
            if left.is_empty() || called.is_full() || self.ahead.is_lean() {
                break;
            }
            let (piece, count) = piece(left);
            code_left = code_left.checked_sub(piece.end - piece.start)?;
            let code = self.read(ino, piece.clone()).await?;
            let (now, later) = left.split_at(count);
            let (loading, now) = (Arc::clone(self), now.to_vec());
            // milliseconds of work
            let looking = tokio::task::spawn_blocking(move || {
                let new = called.take(&code, piece.start, &now, |place| loading.frame(ino, place));
                (called, new)
            });
            let new;
            (called, new) = looking.await.ok()?;
            for batch in new.chunks(BATCH) {
                self.bring(batch).await?;
            }
            left = later;
        }
        Some(())
    }

    /// Where constructors begin whose code can be looked at, each once, in the order in which they are called.
    async fn constructors(&self, ino: Ino, elf: &Elf, linked: &Linked) -> Option<Vec<u64>> {
        if !elf.is_x86_64 {
            return None;
        }
        let mut starts = match linked.constructors.clone() {
            Some(list) => elf.constructors(&self.read(ino, list).await?),
            None => {
                let sections = self.read(ino, elf.sections.as_ref()?.headers.clone()).await?;
                let names = self.read(ino, elf.section_names(&sections)?).await?;
                let list = Elf::old_constructors(&sections, &names)?;
                let mut starts = elf.constructors(&self.read(ino, list).await?);
                starts.reverse();
                starts
            }
        };
        let mut seen = HashSet::new();
        starts.retain(|start| seen.insert(*start));
        Some(starts)
    }

    /// Fetches frames that nobody waits for yet, and is back when they are here. `None` where that failed, or nothing is to be fetched.
    async fn bring(&self, frames: &[u32]) -> Option<()> {
        if self.ahead.is_lean() {
            return None;
        }
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
    use crate::elf;

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

    #[test]
    fn what_is_named_again_and_again_is_looked_up_once_and_not_without_end() {
        let elf = || Elf::parse(&elf::tests::code_of(1 << 40)).unwrap();
        let called = |frames_max| Called {
            elf: elf(),
            size: 1 << 40,
            pages: HashSet::new(),
            frames: HashSet::new(),
            frames_max,
        };
        // call after call, each to another page
        let code: Vec<u8> =
            (0..2000u32).flat_map(|n| [&[0xe8][..], &(n * 4096).to_le_bytes()].concat()).collect();
        let starts: Vec<u64> = (0..9000).collect();
        let looked_up = std::cell::Cell::new(0);
        let frame = |place: u64| {
            looked_up.set(looked_up.get() + 1);
            u32::try_from(place >> 16).ok()
        };
        let mut all = called(usize::MAX);
        let new = all.take(&code, 0, &starts, frame);
        assert!(new.len() > 100 && looked_up.get() == all.pages.len(), "{} {}", new.len(), looked_up.get());
        let before = looked_up.get();
        assert!(all.take(&code, 0, &starts, frame).is_empty() && looked_up.get() == before, "each page once");
        assert_eq!(called(7).take(&code, 0, &starts, frame).len(), 7);
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
