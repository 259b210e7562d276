//! Pages that a program is bound to touch, as the files themselves say.
//!
//! What is handed out unasked is not seen when it is used, so while a start is recorded little is. But the linker walks all of a
//! library's relocations, writes to all pages that they name, and looks up nearly every name: such pages go out together, and count
//! as touched, once one of them was read. Of a start of torch they are two pages of five.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_image::{Ino, PAGE_BYTES};
use parking_lot::RwLock;

use crate::bits::Bits;

/// Pages of all libraries together, two bits each: 16 MiB of memory for 256 GiB of libraries. What lies beyond is not known to be
/// bound.
const PAGES_MAX: u64 = 1 << 26;

/// The libraries of one mount.
pub(crate) struct Bound {
    files: RwLock<HashMap<Ino, Arc<BoundPages>>>,
    left: AtomicU64,
}

/// The pages of one library.
pub(crate) struct BoundPages {
    bound: Bits,
    /// Those that went out.
    given: Bits,
}

impl Default for Bound {
    fn default() -> Self {
        Self { files: RwLock::default(), left: AtomicU64::new(PAGES_MAX) }
    }
}

impl Bound {
    /// The pages of a file of `size` bytes, for whoever finds out which are bound; none where there is no room.
    pub(crate) fn begin(&self, ino: Ino, size: u64) -> Option<Arc<BoundPages>> {
        let count = u32::try_from(size.div_ceil(PAGE_BYTES)).ok()?;
        let take = |left: u64| left.checked_sub(count.into());
        self.left.try_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        let pages = Arc::new(BoundPages { bound: Bits::new(count), given: Bits::new(count) });
        self.files.write().insert(ino, Arc::clone(&pages));
        Some(pages)
    }

    /// Those of a file that are known by now.
    pub(crate) fn find(&self, ino: Ino) -> Option<Arc<BoundPages>> {
        self.files.read().get(&ino).cloned()
    }
}

impl BoundPages {
    /// All pages that have some of these bytes are bound.
    pub(crate) fn mark(&self, bytes: Range<u64>) {
        for page in numbers(bytes) {
            self.bound.set(page);
        }
    }

    /// These bytes were asked for. Whether a page that has some of them is bound; then it is not to go out any more.
    pub(crate) fn read(&self, bytes: Range<u64>) -> bool {
        let mut is_bound = false;
        for page in numbers(bytes).filter(|page| self.bound.is_set(*page)) {
            self.given.set(page);
            is_bound = true;
        }
        is_bound
    }

    /// Whether the page that begins at `offset` is bound and has not gone out yet. From now on it has.
    pub(crate) fn give(&self, offset: u64) -> bool {
        numbers(offset..offset + 1).all(|page| self.bound.is_set(page) && self.given.set(page))
    }
}

/// The numbers of the pages that have some of these bytes.
fn numbers(bytes: Range<u64>) -> Range<u32> {
    let number = |page: u64| u32::try_from(page).unwrap_or(u32::MAX);
    number(bytes.start / PAGE_BYTES)..number(bytes.end.div_ceil(PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_pages_as_long_as_there_is_room() {
        let bound = Bound::default();
        let of = |ino, size| bound.begin(Ino(ino), size).is_some();
        assert!(bound.find(Ino(1)).is_none());
        assert!(of(1, PAGE_BYTES + 1) && of(2, (PAGES_MAX - 3) * PAGE_BYTES) && of(3, 1));
        assert!(!of(4, 1) && bound.find(Ino(4)).is_none());
    }

    #[test]
    fn a_bound_page_goes_out_once_and_not_after_it_was_read() {
        let bound = Bound::default();
        let begun = bound.begin(Ino(1), 10 * PAGE_BYTES).expect("room");
        let pages = bound.find(Ino(1)).expect("begun");
        begun.mark(PAGE_BYTES + 1..3 * PAGE_BYTES + 1);
        assert!(!pages.read(0..PAGE_BYTES) && !pages.read(4 * PAGE_BYTES..20 * PAGE_BYTES));
        // one page that is not bound, and one that is
        assert!(pages.read(PAGE_BYTES - 1..PAGE_BYTES + 1));
        let given = |at: u64| [pages.give(at * PAGE_BYTES), pages.give(at * PAGE_BYTES)];
        assert_eq!([0, 1, 4, 10].map(given), [[false; 2]; 4]);
        assert_eq!([2, 3].map(given), [[true, false]; 2]);
        // what is found out later goes out then
        begun.mark(5 * PAGE_BYTES..6 * PAGE_BYTES);
        assert_eq!(given(5), [true, false]);
    }
}
