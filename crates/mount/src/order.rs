//! The frames of a tree laid end to end, whatever files they belong to: in the order in which they lie in packs, which an
//! unpacker would have met them in, and in that of the paths, which `find`, `grep -r` and `tar` meet them in.

use std::ops::Range;

use lamina_cache::Want;
use lamina_image::{FileKind, Ino, Tree};

use crate::bits::Bits;

/// All frames in one order. 16 bytes a frame.
pub(crate) struct Order {
    /// Frame numbers, in order.
    frames: Vec<u32>,
    /// Where each frame number stands in `frames`.
    rank: Vec<u32>,
    /// The sum of the lengths of all frames before each of `frames`, and of all.
    start: Vec<u64>,
}

/// A part of a frame's plaintext that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touch {
    /// The frame's number in the tree.
    pub(crate) frame: u32,
    /// Bytes of its plaintext before the part.
    pub(crate) skip: u32,
    /// The part's bytes.
    pub(crate) len: u64,
    /// The whole plaintext's bytes.
    pub(crate) plain_len: u32,
}

impl Order {
    /// By pack (in the order in which the tree meets them) and offset. Cost: about 10 ms for 100,000 frames.
    pub(crate) fn of_packs(tree: &Tree) -> Self {
        let packs: std::collections::HashMap<_, u64> = tree.packs().zip(0..).collect();
        let mut keyed: Vec<(u64, u32)> = Vec::with_capacity(tree.frames() as usize);
        for number in 0..tree.frames() {
            // a place that cannot be read is not read ahead; reading it will say why
            if let Ok((_, place)) = tree.frame(number) {
                let pack = packs.get(&place.pack).copied().unwrap_or(u64::from(u32::MAX));
                keyed.push((pack << 32 | u64::from(place.frame.offset), number));
            }
        }
        keyed.sort_unstable();
        Self::lay(tree, keyed.into_iter().map(|(_, number)| number))
    }

    /// As they are met by whoever reads all files, depth first and by name, each where it is met first. Cost: about 200 ns
    /// an inode and 20 ns an extent.
    pub(crate) fn of_paths(tree: &Tree) -> Self {
        let (seen, met) = (Bits::new(tree.inodes()), Bits::new(tree.frames()));
        let (mut frames, mut waiting) = (Vec::with_capacity(tree.frames() as usize), vec![Ino::ROOT]);
        while let Some(ino) = waiting.pop() {
            // a damaged tree may have a circle; it is found, and told, by reading
            let (true, Ok(inode)) = (ino.index().is_some_and(|index| seen.set(index)), tree.inode(ino))
            else {
                continue;
            };
            match inode.kind() {
                FileKind::Directory => {
                    let from = waiting.len();
                    let Ok(entries) = tree.entries(ino) else { continue };
                    waiting.extend(entries.iter().map_while(Result::ok).map(|entry| entry.ino));
                    waiting[from..].reverse();
                }
                FileKind::Regular => {
                    let extents = tree.extents(ino, 0, inode.size).into_iter().flatten();
                    let of_file = extents.filter_map(|extent| extent.ok()?.frame);
                    frames.extend(of_file.filter(|number| met.set(*number)));
                }
                _ => {}
            }
        }
        Self::lay(tree, frames.into_iter())
    }

    fn lay(tree: &Tree, numbers: impl ExactSizeIterator<Item = u32>) -> Self {
        let mut order = Self {
            frames: Vec::with_capacity(numbers.len()),
            rank: vec![u32::MAX; tree.frames() as usize],
            start: Vec::with_capacity(numbers.len() + 1),
        };
        let mut at = 0;
        for number in numbers {
            let Ok((_, place)) = tree.frame(number) else { continue };
            order.rank[number as usize] = u32::try_from(order.frames.len()).expect("each frame once");
            order.frames.push(number);
            order.start.push(at);
            at += u64::from(place.frame.sealed_len);
        }
        order.start.push(at);
        order
    }

    /// Where a frame lies among all frames laid end to end, in bytes.
    pub(crate) fn span(&self, number: u32) -> Option<Range<u64>> {
        let rank = *self.rank.get(number as usize)? as usize;
        Some(*self.start.get(rank)?..*self.start.get(rank + 1)?)
    }

    /// Where about the sealed bytes of a part of a frame lie among all frames laid end to end: a stream that reads a
    /// page here and there has then read no more than these pages.
    pub(crate) fn part(&self, touch: Touch) -> Option<Range<u64>> {
        let span = self.span(touch.frame)?;
        let (sealed, plain) = (span.end - span.start, u64::from(touch.plain_len.max(1)));
        let at = |plain_at: u64| span.start + plain_at.min(plain) * sealed / plain;
        Some(at(touch.skip.into())..at(u64::from(touch.skip) + touch.len))
    }

    /// The length of all frames.
    pub(crate) fn end(&self) -> u64 {
        self.start.last().copied().unwrap_or(0)
    }

    /// The frames that begin within `range`.
    pub(crate) fn within(&self, range: Range<u64>) -> &[u32] {
        let starts = &self.start[..self.frames.len()];
        let first = starts.partition_point(|start| *start < range.start);
        let last = starts.partition_point(|start| *start < range.end);
        &self.frames[first..last.max(first)]
    }
}

/// A frame of the tree as the cache wants it.
pub(crate) fn want(tree: &Tree, number: u32) -> Option<Want> {
    tree.frame(number).ok().map(|(id, place)| Want { id, place })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three frames of 100, 50 and 200 sealed bytes, which the tree numbers 2, 0, 1.
    fn order() -> Order {
        Order { frames: vec![2, 0, 1], rank: vec![1, 2, 0], start: vec![0, 100, 150, 350] }
    }

    #[test]
    fn frames_are_found_by_where_they_begin() {
        let order = order();
        assert_eq!((order.span(2), order.span(1), order.span(3)), (Some(0..100), Some(150..350), None));
        let cases: [(Range<u64>, &[u32]); 5] =
            [(0..350, &[2, 0, 1]), (1..151, &[0, 1]), (100..150, &[0]), (1..100, &[]), (350..900, &[])];
        for (range, want) in cases {
            assert_eq!(order.within(range.clone()), want, "{range:?}");
        }
        assert_eq!(order.end(), 350);
    }

    #[test]
    fn a_part_of_a_frame_is_the_same_part_of_its_sealed_bytes() {
        let touch = |skip, len| Touch { frame: 1, skip, len, plain_len: 400 };
        assert_eq!(order().part(touch(0, 400)), Some(150..350));
        assert_eq!(order().part(touch(100, 100)), Some(200..250));
        assert_eq!(order().part(touch(390, 1000)), Some(345..350));
    }
}
