//! An answer of a source, taken apart into frames while it comes.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use lamina_chunk::{Frame, Sealed};

/// An answer, in the pieces in which it comes. What nobody will ask for any more is let go.
pub(crate) struct Body {
    pieces: VecDeque<Bytes>,
    /// Where the first piece begins in the pack.
    start: u64,
    /// The pieces' bytes.
    len: u64,
}

impl Body {
    /// One that begins there in the pack.
    pub(crate) fn new(start: u64) -> Self {
        Self { pieces: VecDeque::new(), start, len: 0 }
    }

    /// Where in the pack ends what has come.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }

    pub(crate) fn push(&mut self, piece: Bytes) {
        self.len += piece.len() as u64;
        self.pieces.push_back(piece);
    }

    /// A frame's bytes, copied so that they do not keep the whole answer in memory, and lets go what lies before them. Of a
    /// frame that is not all here, which cannot be opened, it has less.
    pub(crate) fn cut_out(&mut self, frame: Frame) -> Sealed {
        let from = u64::from(frame.offset);
        while let Some(passed) = self.pieces.pop_front_if(|piece| self.start + piece.len() as u64 <= from) {
            self.start += passed.len() as u64;
            self.len -= passed.len() as u64;
        }
        let mut bytes = BytesMut::with_capacity(frame.sealed_len as usize);
        let mut skip = usize::try_from(from.saturating_sub(self.start)).unwrap_or(usize::MAX);
        for piece in &self.pieces {
            let left = frame.sealed_len as usize - bytes.len();
            let part = piece.get(skip..).unwrap_or_default();
            bytes.extend_from_slice(&part[..part.len().min(left)]);
            skip = skip.saturating_sub(piece.len());
            if bytes.len() == frame.sealed_len as usize {
                break;
            }
        }
        Sealed::new(bytes.freeze(), frame.plain_len as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(offset: u64, len: usize) -> Frame {
        let len = u32::try_from(len).expect("small");
        Frame { offset: u32::try_from(offset).expect("small"), sealed_len: len, plain_len: len }
    }

    proptest! {
        #[test]
        fn frames_are_what_the_answer_has_there_however_it_comes(
            pieces in prop::collection::vec(0usize..50, 0..40),
            frames in prop::collection::vec((0u64..30, 1usize..80), 0..40),
            start in 0u64..1000,
        ) {
            let len: usize = pieces.iter().sum();
            let answer: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
            let (mut body, mut at) = (Body::new(start), 0);
            for piece in &pieces {
                body.push(Bytes::copy_from_slice(&answer[at..at + piece]));
                at += piece;
            }
            prop_assert_eq!(body.end(), start + len as u64);
            // sorted by offset, with gaps, and some that reach into the next
            let mut offset = start;
            for (step, frame_len) in frames {
                offset += step;
                let here = usize::try_from(offset - start).expect("small").min(len);
                let there = (here + frame_len).min(len);
                let sealed = body.cut_out(frame(offset, frame_len));
                prop_assert_eq!(&sealed.bytes()[..], &answer[here..there]);
                prop_assert_eq!(body.end(), start + len as u64);
            }
        }
    }

    #[test]
    fn what_lies_before_a_frame_is_let_go() {
        let mut body = Body::new(100);
        (0..10).for_each(|n| body.push(Bytes::from(vec![n; 10])));
        assert_eq!(body.cut_out(frame(155, 10)).bytes()[..], [5, 5, 5, 5, 5, 6, 6, 6, 6, 6]);
        assert_eq!(body.pieces.len(), 5);
    }
}
