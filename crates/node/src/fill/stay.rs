//! What stays on disk while jobs run.
//!
//! Together with what is pinned it never takes more of the cache than pins alone may: what comes must find room. A job that would
//! go beyond that runs without, and a pin that comes later ends what stays for the newest jobs. A job that is paused keeps what
//! stays for it: what went meanwhile would be missing when it goes on.

use std::collections::BTreeMap;

use lamina_cache::{Cache, Want};
use lamina_chunk::FrameId;
use parking_lot::Mutex;

use crate::pins::Pins;

/// What stays for each job, by its number: frames and their bytes.
#[derive(Debug, Default)]
pub(crate) struct Stays(Mutex<BTreeMap<u64, Vec<(FrameId, u32)>>>);

impl Stays {
    /// Keeps `here` for as long as what this gives lives, if there is room for it beside what is pinned and stays already. One
    /// at a time for each job.
    pub(super) fn begin<'a>(&'a self, cache: &'a Cache, pins: &Pins, job: u64, here: &[Want]) -> Stay<'a> {
        let frames: Vec<_> = here.iter().map(|want| (want.id, want.place.frame.sealed_len)).collect();
        let mut stays = self.0.lock();
        stays.insert(job, frames);
        match pins.have_room_for(stays.values().flatten()) {
            true => cache.pin(ids(&stays[&job])),
            false => drop(stays.remove(&job)),
        }
        Stay { stays: self, cache, job }
    }

    /// Ends what finds no room any more beside what is pinned, the newest first.
    pub(crate) fn make_way(&self, cache: &Cache, pins: &Pins) {
        let mut stays = self.0.lock();
        while !pins.have_room_for(stays.values().flatten())
            && let Some((_, frames)) = stays.pop_last()
        {
            cache.unpin(ids(&frames));
        }
    }
}

/// Ends what stays for one job, if it has not ended.
pub(super) struct Stay<'a> {
    stays: &'a Stays,
    cache: &'a Cache,
    job: u64,
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if let Some(frames) = self.stays.0.lock().remove(&self.job) {
            self.cache.unpin(ids(&frames));
        }
    }
}

fn ids(frames: &[(FrameId, u32)]) -> impl Iterator<Item = FrameId> {
    frames.iter().map(|(id, _)| *id)
}

#[cfg(test)]
mod tests {
    use lamina_cache::CacheConfig;
    use lamina_chunk::{Frame, PackId, Place};
    use tokio::runtime::Handle;

    use super::*;

    /// So many frames of 1,000 bytes.
    fn frames(from: u32, count: u32) -> Vec<Want> {
        let want = |n: u32| {
            let frame = Frame { offset: 1000 * n, sealed_len: 1000, plain_len: 1000 };
            let place = Place { pack: PackId::from_bytes([1; 32]), frame };
            Want { id: FrameId::of(&n.to_le_bytes()), place }
        };
        (from..from + count).map(want).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn all_jobs_and_pins_have_one_bound_and_a_pin_is_worth_more() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(CacheConfig::new(directory.path().join("cache"), 100_000), Handle::current());
        let (cache, pins) = (cache.unwrap(), Pins::open(directory.path().join("pins"), 100_000).unwrap());
        let stays = Stays::default();
        let stay_of = || stays.0.lock().keys().copied().collect::<Vec<u64>>();
        let _first = stays.begin(&cache, &pins, 1, &frames(0, 60));
        // two mounts whose images are 60 % of the cache each
        let second = stays.begin(&cache, &pins, 2, &frames(100, 60));
        assert_eq!(stay_of(), [1]);
        drop(second);
        // what both want counts once
        let third = stays.begin(&cache, &pins, 3, &frames(40, 30));
        assert_eq!(stay_of(), [1, 3]);
        drop(third);
        assert_eq!(stay_of(), [1]);
        let _fourth = stays.begin(&cache, &pins, 4, &frames(100, 15));
        assert_eq!(stay_of(), [1, 4]);
        let pinned: Vec<_> = frames(200, 10).iter().map(|want| (want.id, 1000)).collect();
        pins.hold_frames(&cache, "a", pinned.into());
        stays.make_way(&cache, &pins);
        assert_eq!(stay_of(), [1]);
        let pinned: Vec<_> = frames(300, 65).iter().map(|want| (want.id, 1000)).collect();
        pins.hold_frames(&cache, "b", pinned.into());
        stays.make_way(&cache, &pins);
        assert_eq!(stay_of(), [0; 0]);
    }
}
