//! Buffers that frames are opened into, again and again: memory that is fresh from the kernel costs as much as decompressing into it.

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

/// The buffers of one boot. Those that nobody uses are freed with it.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// Makes some, and has the kernel give the memory for them: better while a start waits for the network than while it waits for
    /// these. Blocks for some 5 ms; ends early where `this` is not needed any more.
    pub(super) fn prepare(this: &Weak<Self>) {
        for _ in 0..PREPARED {
            let mut buffer = Vec::with_capacity(BOOT_FRAME_BYTES);
            // what it is does not matter, but that it was written to
            buffer.resize(BOOT_FRAME_BYTES, 1);
            buffer.clear();
            let Some(this) = this.upgrade() else { return };
            this.0.lock().push(buffer);
        }
    }

    /// One to fill with so many bytes: where these are few, none of those that a long frame needs.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        if len <= SHORT_BYTES { Vec::new() } else { self.0.lock().pop().unwrap_or_default() }
    }

    /// What is in it now, to be shared; once nobody has it any more, it is there to be filled again.
    pub(super) fn share(self: &Arc<Self>, plain: Vec<u8>) -> Bytes {
        Bytes::from_owner(Filled { plain, of: Arc::downgrade(self) })
    }
}

struct Filled {
    plain: Vec<u8>,
    of: Weak<Buffers>,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        &self.plain
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let Some(of) = self.of.upgrade().filter(|_| self.plain.capacity() > SHORT_BYTES) else { return };
        let mut idle = of.0.lock();
        if idle.len() < BUFFERS_MAX {
            idle.push(std::mem::take(&mut self.plain));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_prepared_is_there_to_be_filled_and_for_nobody_nothing_is() {
        let buffers = Arc::new(Buffers::default());
        Buffers::prepare(&Arc::downgrade(&buffers));
        for _ in 0..PREPARED {
            let buffer = buffers.take(BOOT_FRAME_BYTES);
            assert!(buffer.is_empty() && buffer.capacity() >= BOOT_FRAME_BYTES);
        }
        assert_eq!(buffers.take(BOOT_FRAME_BYTES).capacity(), 0);
        Buffers::prepare(&Weak::new());
    }

    #[test]
    fn a_buffer_is_filled_again_once_nobody_has_its_bytes() {
        let buffers = Arc::new(Buffers::default());
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
