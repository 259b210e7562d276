//! Images that were found false. A plain value.

use std::collections::{HashSet, VecDeque};

use lamina_image::Digest;

/// Images that are remembered: some 300 KiB. One that is forgotten comes again, and is checked again.
const REFUSED_MAX: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Refused {
    digests: HashSet<Digest>,
    /// The same, the oldest first.
    order: VecDeque<Digest>,
}

impl Refused {
    pub(super) fn has(&self, image: Digest) -> bool {
        self.digests.contains(&image)
    }

    pub(super) fn note(&mut self, image: Digest) {
        if !self.digests.insert(image) {
            return;
        }
        self.order.push_back(image);
        if self.order.len() > REFUSED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.digests.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten_first() {
        let (mut refused, digest) = (Refused::default(), |n: usize| Digest::of(&n.to_le_bytes()));
        for n in [0, 0].into_iter().chain(1..=REFUSED_MAX) {
            refused.note(digest(n));
        }
        assert!(!refused.has(digest(0)) && refused.has(digest(1)) && refused.has(digest(REFUSED_MAX)));
        assert_eq!((refused.digests.len(), refused.order.len()), (REFUSED_MAX, REFUSED_MAX));
    }
}
