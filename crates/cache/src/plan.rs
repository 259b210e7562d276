//! Which frames are asked for together. Pure.

use std::ops::Range;

use lamina_chunk::Frame;

/// Bounds on one request, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) gap: u64,
    pub(crate) range: u64,
}

/// Groups `frames` of one pack, sorted by offset, into runs that are asked for as one range each: gaps within a run
/// are at most `bounds.gap`, and a run spans at most `bounds.range` unless a single frame is longer. The groups are
/// consecutive index ranges and cover all frames.
pub(crate) fn runs(frames: &[Frame], bounds: Bounds) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, frame) in frames.iter().enumerate() {
        if let Some(run) = runs.last_mut() {
            let first = u64::from(frames[run.start].offset);
            let end = span(&frames[run.clone()]).end;
            let near = u64::from(frame.offset) <= end.saturating_add(bounds.gap);
            if near && frame.end() - first <= bounds.range {
                run.end = at + 1;
                continue;
            }
        }
        runs.push(at..at + 1);
    }
    runs
}

/// The bytes of the pack from the first frame's beginning to the last end. `frames` are sorted by offset, not empty.
pub(crate) fn span(frames: &[Frame]) -> Range<u64> {
    let start = u64::from(frames.first().expect("a run has a frame").offset);
    let end = frames.iter().map(Frame::end).max().expect("a run has a frame");
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(at: &[(u32, u32)]) -> Vec<Frame> {
        at.iter().map(|&(offset, len)| Frame { offset, sealed_len: len, plain_len: len }).collect()
    }

    #[test]
    fn neighbours_share_a_request_within_bounds() {
        let bounds = Bounds { gap: 10, range: 100 };
        type Case<'a> = (&'a [(u32, u32)], &'a [Range<usize>]);
        let cases: [Case<'_>; 6] = [
            (&[], &[]),
            (&[(0, 30), (30, 30), (60, 30)], std::slice::from_ref(&(0..3))),
            (&[(0, 30), (40, 30)], std::slice::from_ref(&(0..2))),
            (&[(0, 30), (41, 30)], &[0..1, 1..2]),
            (&[(0, 60), (60, 41), (101, 5)], &[0..1, 1..3]),
            (&[(0, 500), (500, 20), (520, 20)], &[0..1, 1..3]),
        ];
        for (at, want) in cases {
            assert_eq!(runs(&frames(at), bounds), want, "{at:?}");
        }
    }

    #[test]
    fn a_run_spans_from_its_first_byte_to_its_last() {
        assert_eq!(span(&frames(&[(5, 100), (10, 20)])), 5..105);
    }
}
