//! Which inodes the kernel knows, while names are being looked up.

use parking_lot::{Condvar, Mutex};

use crate::bits::Bits;
use lamina_image::Ino;

/// Filled by one thread, and waited for by another.
pub(super) struct Known {
    inodes: Bits,
    done: Mutex<bool>,
    more: Condvar,
}

impl Known {
    /// None of the tree's `inodes` yet.
    pub(super) fn new(inodes: u32) -> Self {
        Self { inodes: Bits::new(inodes), done: Mutex::new(false), more: Condvar::new() }
    }

    /// The kernel knows it now.
    pub(super) fn add(&self, ino: Ino) {
        if let Some(index) = ino.index() {
            self.inodes.set(index);
        }
        // under the lock, so that nobody begins to wait between looking and this
        let _done = self.done.lock();
        self.more.notify_all();
    }

    /// No more will come.
    pub(super) fn finish(&self) {
        *self.done.lock() = true;
        self.more.notify_all();
    }

    /// Returns once the kernel knows `ino`, or as much as it ever will. Blocks.
    pub(super) fn wait(&self, ino: Ino) {
        let Some(index) = ino.index() else { return };
        if self.inodes.is_set(index) {
            return;
        }
        let mut done = self.done.lock();
        while !*done && !self.inodes.is_set(index) {
            self.more.wait(&mut done);
        }
    }
}

/// Says that there will be no more, however the looking up ends.
pub(super) struct Finishing<'a>(pub(super) &'a Known);

impl Drop for Finishing<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_an_inode_goes_on_when_it_is_known_or_never_will_be() {
        let known = Known::new(10);
        std::thread::scope(|scope| {
            let (seven, nine) = (scope.spawn(|| known.wait(Ino(7))), scope.spawn(|| known.wait(Ino(9))));
            known.add(Ino(7));
            seven.join().expect("no panic");
            drop(Finishing(&known));
            nine.join().expect("no panic");
        });
        known.wait(Ino(1));
        known.wait(Ino(u64::MAX));
    }
}
