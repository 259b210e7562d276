//! Buffers that frames are opened into, again and again: memory that is fresh from the kernel costs as much as decompressing into it.

use std::mem;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use lamina_image::BOOT_FRAME_BYTES;
use parking_lot::Mutex;

use super::{KEPT, OPENED};

/// No more are kept than frames are held.
const BUFFERS_MAX: usize = OPENED + KEPT;
/// So many are there before the first frame has come. What a small start takes is not much more, and a large one uses them again.
const PREPARED: usize = 8;
/// A frame that is not longer has memory of its own.
const SHORT_BYTES: usize = BOOT_FRAME_BYTES / 2;

/// Buffers for the next boot, which outlive each.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Vec<Vec<u8>>>);

/// The buffers of one boot. Those that nobody uses go back with it.
#[derive(Debug)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Vec<u8>>>,
    spare: Arc<Spare>,
}

impl Spare {
    /// Makes what is missing, and has the kernel give the memory for it: better while nobody starts, or a start waits for the network,
    /// than while one waits for these. Blocks for some 5 ms; ends early where nobody else has `self`.
    pub(super) fn prepare(self: &Arc<Self>) {
        while Arc::strong_count(self) > 1 && self.0.lock().len() < PREPARED {
            self.give(prepared());
        }
    }

    /// All that there are, for one boot.
    pub(super) fn take(self: &Arc<Self>) -> Arc<Buffers> {
        let idle = Mutex::new(mem::take(&mut *self.0.lock()));
        Arc::new(Buffers { idle, spare: Arc::clone(self) })
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock();
        if spare.len() < PREPARED && buffer.capacity() >= BOOT_FRAME_BYTES {
            spare.push(buffer);
        }
    }
}

fn prepared() -> Vec<u8> {
    let mut buffer = Vec::with_capacity(BOOT_FRAME_BYTES);
    // what it is does not matter, but that it was written to
    buffer.resize(BOOT_FRAME_BYTES, 1);
    buffer.clear();
    buffer
}

impl Buffers {
    /// Makes those that were not to be had when they were taken, as [`Spare::prepare`] does; ends early where nobody else has `self`.
    pub(super) fn prepare(self: &Arc<Self>) {
        for _ in 0..self.missing() {
            if Arc::strong_count(self) == 1 {
                return;
            }
            let buffer = prepared();
            self.idle.lock().push(buffer);
        }
    }

    /// How many there are less than a small start takes.
    pub(super) fn missing(&self) -> usize {
        PREPARED.saturating_sub(self.idle.lock().len())
    }

    /// One to fill with so many bytes: where these are few, none of those that a long frame needs.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        if len <= SHORT_BYTES { Vec::new() } else { self.idle.lock().pop().unwrap_or_default() }
    }

    /// What is in it now, to be shared; once nobody has it any more, it is there to be filled again.
    pub(super) fn share(self: &Arc<Self>, plain: Vec<u8>) -> Bytes {
        Bytes::from_owner(Filled { plain, of: Arc::downgrade(self), spare: Arc::clone(&self.spare) })
    }
}

struct Filled {
    plain: Vec<u8>,
    of: Weak<Buffers>,
    spare: Arc<Spare>,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        &self.plain
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        if self.plain.capacity() <= SHORT_BYTES {
            return;
        }
        let plain = mem::take(&mut self.plain);
        // the last frames outlive their boot
        let Some(of) = self.of.upgrade() else { return self.spare.give(plain) };
        let mut idle = of.idle.lock();
        if idle.len() < BUFFERS_MAX {
            idle.push(plain);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.idle.get_mut().drain(..).for_each(|buffer| self.spare.give(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_prepared_is_there_to_be_filled_and_for_nobody_nothing_is() {
        let spare = Arc::<Spare>::default();
        spare.prepare();
        assert_eq!(spare.take().missing(), PREPARED, "nobody else has it");
        let other = Arc::clone(&spare);
        other.prepare();
        let buffers = spare.take();
        assert_eq!(buffers.missing(), 0);
        for _ in 0..PREPARED {
            let buffer = buffers.take(BOOT_FRAME_BYTES);
            assert!(buffer.is_empty() && buffer.capacity() >= BOOT_FRAME_BYTES);
        }
        assert_eq!(buffers.take(BOOT_FRAME_BYTES).capacity(), 0);
        buffers.prepare();
        assert_eq!(buffers.missing(), PREPARED, "nobody else has them");
        Arc::clone(&buffers).prepare();
        assert_eq!(buffers.missing(), 0);
    }

    #[test]
    fn the_next_boot_has_the_buffers_of_the_one_before_and_no_more_than_a_small_one_takes_are_kept() {
        let spare = Arc::<Spare>::default();
        let (one, other) = (spare.take(), spare.take());
        for buffers in [&one, &other] {
            Arc::clone(buffers).prepare();
        }
        // a frame that is there longer than its boot
        let mut buffer = one.take(BOOT_FRAME_BYTES);
        buffer.resize(BOOT_FRAME_BYTES, 1);
        let (at, last) = (buffer.as_ptr(), one.share(buffer));
        drop(one);
        drop(last);
        drop(other);
        assert_eq!(spare.0.lock().len(), PREPARED);
        let again = spare.take();
        assert!(again.missing() == 0 && again.idle.lock().iter().any(|buffer| buffer.as_ptr() == at));
    }

    #[test]
    fn a_buffer_is_filled_again_once_nobody_has_its_bytes() {
        let buffers = Arc::<Spare>::default().take();
        let mut buffer = buffers.take(BOOT_FRAME_BYTES);
        buffer.resize(BOOT_FRAME_BYTES, 1);
        buffer[1] = 2;
        let at = buffer.as_ptr();
        let bytes = buffers.share(buffer);
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!(buffers.take(BOOT_FRAME_BYTES).capacity(), 0, "a part of it is still there");
        assert_eq!(part[..], [2, 1]);
        drop(part);
        assert_eq!(buffers.take(SHORT_BYTES).capacity(), 0, "a short frame needs none");
        let again = buffers.take(BOOT_FRAME_BYTES);
        assert_eq!(again.as_ptr(), at);
        drop(buffers.share(vec![1]));
        assert_eq!(buffers.take(BOOT_FRAME_BYTES).capacity(), 0, "a short one is not kept");
        let late = buffers.share(vec![1]);
        drop(buffers);
        assert_eq!(&late[..], [1], "bytes outlive their boot");
    }
}
