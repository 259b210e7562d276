//! Readahead for who walks through a file in strides. Pure; positions are bytes in a file.
//!
//! When a library is loaded, its constructors run and its relocations are made; what they touch lies some 200 KB apart. The
//! large CUDA libraries run through one part from the last to the first, and through another from the first to the last with
//! looks back on the way. So a start touches hundreds of frames of one file, each one before or behind the last, with other
//! reads in between, and reads too little of each for [`streams`](crate::streams) to see a stream.
//!
//! The rule is the same: ahead of a walk that has come `run` bytes, up to `run` bytes are fetched.

use std::ops::Range;

/// A read this far from where a walk stands belongs to it, in bytes: two frames, so that at least every other frame that is
/// fetched will be read.
const STRIDE_MAX: u64 = 512 << 10;
/// A walk with fewer steps gets no readahead: anything may step the same way three times.
const STEPS_MIN: u32 = 4;
/// No walk gets more, in bytes of the file: some 0.5 MiB of frames, what a 1 Gbit/s link carries in 4 ms. With four times as much,
/// 4 % more were received for `import torch`, and no fewer reads waited.
const AHEAD_MAX: u64 = 1 << 20;
/// Walks followed in one file and direction; the one that moved least recently is given up for a new one.
const WALKS_MAX: usize = 8;
/// Positions forward are walked backward from here: beyond every file.
const FAR: u64 = 1 << 63;

#[derive(Clone, Debug)]
struct Walk {
    at: u64,
    /// Bytes from where it began to here.
    run: u64,
    steps: u32,
    /// Everything from here up to where it stands was fetched.
    ahead: u64,
    moved: u64,
}

/// The walks in one file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Walks {
    backward: Backward,
    /// Walks forward, seen in a mirror at [`FAR`].
    forward: Backward,
}

impl Walks {
    /// Takes note of a read that begins at `start`, and says which bytes to fetch ahead.
    pub(crate) fn note(&mut self, start: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let back = self.backward.note(start);
        let mirrored = self.forward.note(FAR.saturating_sub(start));
        let ahead = mirrored.map(|range| FAR - range.end..FAR - range.start);
        back.into_iter().chain(ahead)
    }

    /// Whether a read at `start` belongs to a walk that gets readahead.
    pub(crate) fn is_walking(&self, start: u64) -> bool {
        self.backward.is_walking(start) || self.forward.is_walking(FAR.saturating_sub(start))
    }
}

/// The walks in one direction.
#[derive(Clone, Debug, Default)]
struct Backward {
    walks: Vec<Walk>,
    clock: u64,
}

impl Backward {
    fn is_walking(&self, start: u64) -> bool {
        self.walks.iter().any(|walk| walk.steps >= STEPS_MIN && start.abs_diff(walk.at) <= STRIDE_MAX)
    }

    fn note(&mut self, start: u64) -> Option<Range<u64>> {
        self.clock += 1;
        let near = |walk: &&mut Walk| start.abs_diff(walk.at) <= STRIDE_MAX;
        let Some(walk) = self.walks.iter_mut().filter(near).min_by_key(|walk| start.abs_diff(walk.at)) else {
            self.begin(start);
            return None;
        };
        walk.moved = self.clock;
        if start >= walk.at {
            // a look back over the shoulder
            return None;
        }
        walk.run += walk.at - start;
        walk.at = start;
        walk.steps += 1;
        walk.ahead = walk.ahead.min(start);
        if walk.steps < STEPS_MIN {
            return None;
        }
        let window = walk.run.min(AHEAD_MAX);
        let target = start.saturating_sub(window);
        // ask in pieces of half a window, so that requests are few and large
        let due = start - walk.ahead <= window / 2 && target < walk.ahead;
        due.then(|| target..std::mem::replace(&mut walk.ahead, target))
    }

    fn begin(&mut self, start: u64) {
        let walk = Walk { at: start, run: 0, steps: 0, ahead: start, moved: self.clock };
        if self.walks.len() < WALKS_MAX {
            self.walks.push(walk);
        } else if let Some(oldest) = self.walks.iter_mut().min_by_key(|walk| walk.moved) {
            *oldest = walk;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Half a window each, for 200 steps of 200,000 bytes, and some while it grows.
    const REQUESTS_MAX: usize = 200 * 200_000 / (AHEAD_MAX as usize / 2) + 20;

    fn fetches(reads: &[u64]) -> Vec<Range<u64>> {
        let mut walks = Walks::default();
        reads.iter().flat_map(|start| walks.note(*start)).collect()
    }

    #[test]
    fn a_walk_backward_is_met_without_gaps_and_with_other_reads_between() {
        let far = 500 << 20;
        let reads: Vec<u64> = (0..200).flat_map(|n| [(100 << 20) - n * 200_000, far + n % 2]).collect();
        let fetched = fetches(&reads);
        assert!(fetched.windows(2).all(|pair| pair[1].end == pair[0].start), "{fetched:?}");
        assert!(fetched[0].start < (100 << 20) - 1_000_000, "{fetched:?}");
        assert!((2..REQUESTS_MAX).contains(&fetched.len()), "{fetched:?}");
    }

    #[test]
    fn a_walk_forward_is_met_without_gaps_and_with_looks_back() {
        let start = |n: u64| (100 << 20) + n * 200_000;
        let reads: Vec<u64> = (0..200).flat_map(|n| [start(n), start(n) - 90_000]).collect();
        let fetched = fetches(&reads);
        assert!(fetched.windows(2).all(|pair| pair[0].end == pair[1].start), "{fetched:?}");
        assert!(fetched[0].end > (100 << 20) + 1_000_000, "{fetched:?}");
        assert!((2..REQUESTS_MAX).contains(&fetched.len()), "{fetched:?}");
    }

    #[test]
    fn reading_anywhere_fetches_nothing() {
        assert_eq!(fetches(&(0..100).map(|n| (n * 7_919_000_011) % (1 << 36)).collect::<Vec<_>>()), []);
        assert_eq!(fetches(&[5, 4, 3]), []);
        assert_eq!(fetches(&[3, 4, 5]), []);
    }

    proptest! {
        #[test]
        fn never_more_is_fetched_than_was_walked(reads in prop::collection::vec(0u64..(64 << 20), 1..300)) {
            let mut walks = Walks::default();
            let (mut walked, mut fetched, mut before) = (0, 0, None::<u64>);
            for start in reads {
                walked += before.map_or(0, |before| before.abs_diff(start)) + STRIDE_MAX;
                before = Some(start);
                for range in walks.note(start) {
                    prop_assert!(range.start < range.end);
                    prop_assert!(range.end <= start || range.start >= start);
                    prop_assert!(range.end - range.start <= AHEAD_MAX);
                    fetched += range.end - range.start;
                }
            }
            prop_assert!(fetched <= 4 * walked);
            prop_assert!(walks.backward.walks.len() <= WALKS_MAX);
        }
    }
}
