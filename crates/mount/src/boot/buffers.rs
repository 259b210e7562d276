//! Buffers that frames are opened into, again and again: memory that is fresh from the kernel costs as much as decompressing into it.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{KEPT, OPENED};

/// No more are kept than frames are held.
const BUFFERS_MAX: usize = OPENED + KEPT;

/// The buffers of one boot. Those that nobody uses are freed with it.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// One to fill.
    pub(super) fn take(&self) -> Vec<u8> {
        self.0.lock().pop().unwrap_or_default()
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
        let Some(of) = self.of.upgrade() else { return };
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
    fn a_buffer_is_filled_again_once_nobody_has_its_bytes() {
        let buffers = Arc::new(Buffers::default());
        let mut buffer = buffers.take();
        buffer.extend_from_slice(b"first");
        let at = buffer.as_ptr();
        let bytes = buffers.share(buffer);
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!(buffers.take().capacity(), 0, "a part of it is still there");
        assert_eq!(&part[..], b"ir");
        drop(part);
        let again = buffers.take();
        assert_eq!(again.as_ptr(), at);
        let late = buffers.share(vec![1]);
        drop(buffers);
        assert_eq!(&late[..], [1], "bytes outlive their boot");
    }
}
