//! Which frames of packs are named: how much of each pack lives.
//!
//! Memory: 8 bytes a frame, and nothing for a pack of which enough lives, so at most some 4 KiB for a usual pack where half of
//! it is enough.

use std::collections::HashMap;

use lamina_chunk::{Moved, PackId};

/// A frame in its pack: offset and sealed length, in bytes.
pub(crate) type Span = (u32, u32);

/// The frames that something names, by pack.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Of a pack that has so many percent of its bytes in named frames, nobody needs to know which; 0: of no pack is that
    /// asked.
    enough_percent: u8,
    packs: HashMap<PackId, Frames>,
}

/// Those of one pack.
#[derive(Debug)]
enum Frames {
    /// Sorted, each once.
    Some(Vec<Span>),
    /// There are enough, or nobody has asked.
    Unknown,
}

/// What is known of a pack before its frames are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    /// How long it is, in bytes; `None` where it is not there or nobody has looked.
    pub(crate) bytes: Option<u64>,
    /// It was moved, so all its frames matter.
    pub(crate) moved: bool,
}

impl Live {
    pub(crate) fn new(enough_percent: u8) -> Self {
        Self { enough_percent, packs: HashMap::new() }
    }

    /// Takes in that these frames of a pack are named. Whether any of them is new.
    pub(crate) fn add(&mut self, pack: PackId, counted: Counted, spans: Vec<Span>) -> bool {
        if self.enough_percent == 0 && !counted.moved {
            // a record may come before the next mark, and would seem to have all of them
            self.packs.insert(pack, Frames::Unknown);
            return false;
        }
        let frames = self.packs.entry(pack).or_insert_with(|| Frames::Some(Vec::new()));
        let Frames::Some(known) = frames else { return false };
        let before = known.len();
        known.extend(spans);
        known.sort_unstable();
        known.dedup();
        let grew = known.len() > before;
        let enough = |bytes: u64| sum(known) * 100 >= bytes.saturating_mul(self.enough_percent.into());
        if !counted.moved && counted.bytes.is_some_and(enough) {
            *frames = Frames::Unknown;
        }
        grew
    }

    /// The named frames of a pack in order; `None` where there are enough, or nobody has asked.
    pub(crate) fn of(&self, pack: PackId) -> Option<&[Span]> {
        match self.packs.get(&pack) {
            Some(Frames::Some(spans)) => Some(spans),
            Some(Frames::Unknown) => None,
            None => Some(&[]),
        }
    }

    /// How many bytes of a pack are in named frames; `None` as in [`of`](Self::of).
    pub(crate) fn bytes(&self, pack: PackId) -> Option<u64> {
        self.of(pack).map(sum)
    }

    /// Whether a record says of all named frames of a pack where they are now.
    pub(crate) fn are_moved(&self, pack: PackId, moved: &Moved) -> bool {
        self.of(pack).is_some_and(|spans| all_in_new(spans, moved).is_some())
    }

    /// The named frames of a pack that was moved, as they are in the new one.
    pub(crate) fn in_new(&self, pack: PackId, moved: &Moved) -> Vec<Span> {
        self.of(pack).into_iter().flatten().filter_map(|span| one_in_new(span, moved)).collect()
    }
}

fn one_in_new((offset, len): &Span, moved: &Moved) -> Option<Span> {
    let frame = moved.at(*offset).filter(|frame| frame.sealed_len == *len)?;
    Some((frame.new_offset, *len))
}

/// These frames as they are in the new pack; `None` where one was not moved.
pub(super) fn all_in_new(spans: &[Span], moved: &Moved) -> Option<Vec<Span>> {
    spans.iter().map(|span| one_in_new(span, moved)).collect()
}

fn sum(spans: &[Span]) -> u64 {
    spans.iter().map(|(_, len)| u64::from(*len)).sum()
}

#[cfg(test)]
mod tests {
    use lamina_chunk::Frame;

    use super::*;

    const PACK: PackId = PackId::from_bytes([1; 32]);
    const OTHER: PackId = PackId::from_bytes([2; 32]);

    fn pack_of(bytes: u64) -> Counted {
        Counted { bytes: Some(bytes), moved: false }
    }

    #[test]
    fn a_frame_counts_once_however_many_recipes_name_it() {
        let mut live = Live::new(50);
        assert!(live.add(PACK, pack_of(1000), vec![(100, 50), (0, 100)]));
        assert!(live.add(PACK, pack_of(1000), vec![(0, 100), (300, 10), (300, 10)]));
        assert!(!live.add(PACK, pack_of(1000), vec![(300, 10), (100, 50)]));
        assert_eq!(live.of(PACK), Some(&[(0, 100), (100, 50), (300, 10)][..]));
        assert_eq!((live.bytes(PACK), live.bytes(OTHER)), (Some(160), Some(0)));
    }

    #[test]
    fn of_a_pack_that_lives_enough_no_frames_are_kept() {
        let mut live = Live::new(50);
        live.add(PACK, pack_of(1000), vec![(0, 499)]);
        assert_eq!(live.bytes(PACK), Some(499));
        live.add(PACK, pack_of(1000), vec![(600, 1)]);
        assert_eq!(live.bytes(PACK), None);
        assert!(!live.add(PACK, pack_of(1000), vec![(700, 1)]));
    }

    #[test]
    fn where_nothing_is_repacked_only_frames_of_moved_packs_are_kept() {
        let mut live = Live::new(0);
        assert!(!live.add(PACK, pack_of(1000), vec![(0, 1)]));
        assert!(live.add(OTHER, Counted { bytes: Some(1), moved: true }, vec![(0, 100)]));
        assert_eq!((live.bytes(PACK), live.bytes(OTHER)), (None, Some(100)));
    }

    #[test]
    fn a_record_that_comes_after_frames_were_not_kept_makes_no_pack_dispensable() {
        let (mut live, moved) =
            (Live::new(0), Moved::new(OTHER, [Frame { offset: 0, sealed_len: 10, plain_len: 10 }]));
        live.add(PACK, pack_of(1000), vec![(20, 10)]);
        live.add(PACK, Counted { bytes: Some(1000), moved: true }, vec![(0, 10)]);
        assert!(!live.are_moved(PACK, &moved));
    }

    #[test]
    fn a_moved_pack_is_dispensable_only_where_all_its_named_frames_were_moved() {
        let frame = |offset| Frame { offset, sealed_len: 10, plain_len: 10 };
        let moved = Moved::new(OTHER, [frame(20), frame(40)]);
        let (mut live, counted) = (Live::new(50), Counted { bytes: Some(1), moved: true });
        live.add(PACK, counted, vec![(40, 10)]);
        assert!(live.are_moved(PACK, &moved));
        assert_eq!(live.in_new(PACK, &moved), [(10, 10)]);
        for wrong in [(60, 10), (20, 9)] {
            live.add(PACK, counted, vec![wrong]);
            assert!(!live.are_moved(PACK, &moved), "{wrong:?}");
            assert_eq!(live.in_new(PACK, &moved), [(10, 10)], "{wrong:?}");
        }
    }
}
