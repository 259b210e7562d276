//! Bits that are set once, by whoever comes first.

use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed number of them.
pub(crate) struct Bits(Vec<AtomicU64>);

impl Bits {
    /// So many, none set.
    pub(crate) fn new(count: u32) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets one; whether it was not set before. False for one that does not exist.
    pub(crate) fn set(&self, number: u32) -> bool {
        let bit = 1 << (number % 64);
        let word = self.0.get(number as usize / 64);
        word.is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    /// Whether one is set.
    pub(crate) fn is_set(&self, number: u32) -> bool {
        let word = self.0.get(number as usize / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (number % 64) != 0)
    }
}

impl Bits {
    /// Those that are set, ascending.
    pub(crate) fn all(&self) -> Vec<u32> {
        let words = self.0.iter().zip(0u32..);
        let bits = words.flat_map(|(word, at)| {
            let word = word.load(Ordering::Relaxed);
            (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| at * 64 + bit)
        });
        bits.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_is_set_once_and_none_beyond_the_end() {
        let bits = Bits::new(65);
        for number in [0, 63, 64] {
            assert!(!bits.is_set(number) && bits.set(number), "{number}");
            assert!(bits.is_set(number) && !bits.set(number), "{number}");
        }
        assert!(!bits.set(128) && !bits.is_set(128));
        assert_eq!(bits.all(), [0, 63, 64]);
    }
}
