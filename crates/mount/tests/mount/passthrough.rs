//! Big files that the kernel reads by itself.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lamina_cache::{Cache, CacheConfig};
use lamina_image::Ino;
use lamina_mount::{Contents, Mount, MountConfig};
use memmap2::Mmap;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::rig::{Layer, Rig, noise, until};

const BIG_BYTES: usize = 3_000_000;
const LONG_BYTES: usize = 4 * BIG_BYTES;

/// An image of four big files and a small one on a passthrough mount of its own.
struct Passthrough {
    mount: Option<Mount>,
    cache: Arc<Cache>,
    rig: Rig,
    mounted: PathBuf,
    /// On a file system that is not stacked, whatever the rest of the machine is on.
    _directory: tempfile::TempDir,
}

impl Passthrough {
    fn new(cap: u64) -> Self {
        let it = Self::not_begun(cap);
        // nothing is to outlive this process
        it.mount().begin_passthrough();
        it
    }

    /// One that has not begun.
    fn not_begun(cap: u64) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("memory");
        let cache = directory.path().join("cache");
        Self::with(directory, &cache, cap)
    }

    fn with(directory: tempfile::TempDir, cache: &Path, cap: u64) -> Self {
        let layer = Layer::new().file("big", &noise(1, BIG_BYTES)).file("small", b"s");
        let layer = layer.file("other", &noise(2, BIG_BYTES)).file("third", &noise(3, BIG_BYTES));
        let rig = Rig::new(layer.file("long", &noise(4, LONG_BYTES)));
        let config = CacheConfig::new(cache.to_owned(), cap);
        let cache = Arc::new(Cache::open(config, rig.runtime.handle().clone()).expect("opened"));
        let mounted = rig.directory.path().join("passthrough");
        fs::create_dir(&mounted).expect("created");
        let mut config = MountConfig { passthrough: true, ..MountConfig::new(mounted.clone()) };
        // there is room for whole files beside what is read, but not beside all of the image
        config.pack_ramp.run_min = u64::MAX;
        let (tree, packs, handle) = (rig.tree.clone(), rig.packs.clone(), rig.runtime.handle().clone());
        let mount =
            Mount::start((tree, Contents::here()), cache.clone(), packs, config, handle).expect("mounted");
        Self { mount: Some(mount), cache, rig, mounted, _directory: directory }
    }

    fn mount(&self) -> &Mount {
        self.mount.as_ref().expect("mounted")
    }

    fn open(&self, name: &str) -> File {
        File::open(self.mounted.join(name)).expect("opened")
    }

    /// Reads a file to its end, so that it is on disk, and waits until it is there as a whole.
    fn make(&self, name: &str) {
        let before = self.made();
        fs::read(self.mounted.join(name)).expect("read");
        self.wait_for_frames(name);
        // who opens it once more after that has it made
        drop(self.open(name));
        until("a whole file", || self.made() > before);
    }

    /// Waits until all frames of a file that was read are on disk: it is answered before.
    fn wait_for_frames(&self, name: &str) {
        let tree = &self.rig.tree;
        let ino = tree.lookup(Ino::ROOT, name.as_bytes()).expect("sound").expect("it is there");
        let extents = tree.extents(ino, 0, u64::MAX).expect("sound");
        let frames = extents.filter_map(|extent| extent.expect("sound").frame);
        let ids: Vec<_> = frames.map(|frame| tree.frame(frame).expect("sound").0).collect();
        let is_here = || ids.iter().all(|id| self.cache.is_on_disk(*id));
        until("all frames on disk", || self.cache.flush() && is_here());
    }

    /// Opens a file that is there as a whole, past us: not before all who had it open are heard to have closed it.
    fn open_past(&self, name: &str) -> File {
        let begun = Instant::now();
        loop {
            let (before, file) = (self.opens(), self.open(name));
            if self.opens() > before {
                return file;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "never opened past us: {name}");
        }
    }

    fn made(&self) -> u64 {
        self.cache.snapshot().whole_files
    }

    /// Opens past us so far.
    fn opens(&self) -> u64 {
        self.mount().snapshot().passthrough_opens
    }
}

fn all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; BIG_BYTES];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

fn map(file: &File) -> Mmap {
    #[expect(unsafe_code, reason = "a mapping is what is tested")]
    // SAFETY: the image does not change
    unsafe {
        Mmap::map(file).expect("mapped")
    }
}

#[test]
fn a_big_file_that_is_there_as_a_whole_is_read_and_mapped_past_us() {
    let it = Passthrough::new(64 << 20);
    it.make("big");
    let file = it.open_past("big");
    let (opens, reads) = (it.opens(), it.mount().snapshot().reads);
    assert!(all(&file) == noise(1, BIG_BYTES) && map(&file)[..] == noise(1, BIG_BYTES)[..]);
    assert_eq!(it.mount().snapshot().reads, reads);
    assert_eq!(fs::read(it.mounted.join("small")).expect("read"), b"s");
    assert_eq!(it.opens(), opens, "small files come from us");
    assert!(fs::read(it.rig.path("big")).expect("read") == noise(1, BIG_BYTES));
    // it goes on while there is a mapping, though no descriptor of ours is left
    let mapped = map(&file);
    drop(file);
    it.mount().unmount(true).expect("unmounted");
    assert!(mapped[..] == noise(1, BIG_BYTES)[..]);
}

#[test]
fn all_descriptors_of_a_file_go_the_way_of_the_first_until_the_last_is_closed() {
    let it = Passthrough::new(64 << 20);
    let first = it.open("big");
    assert!(all(&first) == noise(1, BIG_BYTES));
    it.wait_for_frames("big");
    drop(it.open("big"));
    until("a whole file", || it.made() == 1);
    // the first one is still open, by pages of ours
    let second = it.open("big");
    assert!(all(&second) == noise(1, BIG_BYTES) && map(&second)[..] == noise(1, BIG_BYTES)[..]);
    drop(first);
    let third = it.open("big");
    assert_eq!(it.opens(), 0);
    drop((second, third));
    let _past = it.open_past("big");
    let before = it.opens();
    let many: Vec<File> = (0..10).map(|_| it.open("big")).collect();
    assert_eq!(it.opens() - before, 10);
    assert!(many.iter().all(|file| all(file) == noise(1, BIG_BYTES)));
}

#[test]
fn who_opens_closes_and_maps_all_at_once_gets_the_right_bytes_while_whole_files_come_and_go() {
    // there is room for two whole files of three, and a fourth file's frames push them out again
    let cap = 20 << 20;
    let it = Passthrough::new(cap);
    let names = [("big", 1), ("other", 2), ("third", 3)];
    let seen = || (it.opens(), it.mount().snapshot().passthrough_misses);
    // the programs below may leave no moment in which nobody has a file open, and then it stays as it is
    for (name, _) in &names[..2] {
        it.make(name);
        drop(it.open_past(name));
    }
    let begun = Instant::now();
    let read_on = &|n: usize| {
        let (mut kept, mut pushed) = (Vec::new(), n > 0);
        for round in 0.. {
            let (name, seed) = names[(n + round) % 3];
            let file = File::open(it.mounted.join(name)).expect("no open fails");
            let (mapped, truth) = (map(&file), noise(seed, BIG_BYTES));
            assert!(all(&file) == truth && mapped[..] == truth[..], "wrong bytes of {name}");
            assert!(it.cache.snapshot().disk_used_bytes <= cap, "beyond the cap");
            // a mapping without its descriptor, for a while
            kept.push((mapped, truth));
            if round % 4 == 3 {
                assert!(kept.drain(..).all(|(mapped, truth)| mapped[..] == truth[..]));
            }
            let (past, by_pages) = seen();
            if past > 20 && !pushed {
                assert!(fs::read(it.mounted.join("long")).expect("read") == noise(4, LONG_BYTES));
                pushed = true;
            }
            if past > 20 && by_pages > 20 && pushed {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{past} past us and {by_pages} by pages");
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|n| drop(scope.spawn(move || read_on(n)))));
    assert_eq!(it.mount().snapshot().reads_failed, 0);
}

#[test]
fn nothing_is_opened_past_us_before_that_is_said_to_begin() {
    let it = Passthrough::not_begun(64 << 20);
    assert!(all(&it.open("big")) == noise(1, BIG_BYTES));
    it.wait_for_frames("big");
    drop(it.open("big"));
    it.rig.runtime.block_on(it.mount().make_whole());
    assert_eq!((it.opens(), it.made()), (0, 0), "nothing is made that nobody may open");
    it.mount().begin_passthrough();
    it.make("big");
    assert!(all(&it.open_past("big")) == noise(1, BIG_BYTES));
}

#[test]
fn overlayfs_on_a_passthrough_mount_reads_maps_and_copies_up() {
    let it = Passthrough::new(64 << 20);
    it.make("big");
    drop(it.open_past("big"));
    let before = it.opens();
    let top = tempfile::tempdir_in("/dev/shm").expect("memory");
    let dir = |name: &str| {
        let path = top.path().join(name);
        fs::create_dir(&path).expect("created");
        path
    };
    let (upper, work, merged) = (dir("upper"), dir("work"), dir("merged"));
    let paths = [&it.mounted, &upper, &work].map(|path| path.display().to_string());
    let options = format!("lowerdir={},upperdir={},workdir={}", paths[0], paths[1], paths[2]);
    let options = std::ffi::CString::new(options).expect("a path");
    rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())
        .expect("mounted");
    let check = || {
        let file = File::open(merged.join("big"))?;
        let right = all(&file) == noise(1, BIG_BYTES) && map(&file)[..] == noise(1, BIG_BYTES)[..];
        let changed = File::options().write(true).open(merged.join("big"))?;
        changed.write_all_at(b"changed", 0)?;
        Ok::<_, std::io::Error>((right, fs::read(merged.join("big"))?[..7].to_vec(), all(&it.open("big"))))
    };
    let checked = check();
    rustix::mount::unmount(&merged, UnmountFlags::DETACH).expect("unmounted");
    let (right, changed, below) = checked.expect("overlayfs works on top");
    assert!(right && it.opens() > before);
    assert!(changed == b"changed" && below == noise(1, BIG_BYTES));
}

#[test]
fn where_the_kernel_takes_no_backing_files_of_the_cache_the_mount_is_as_any_other() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("memory");
    let dir = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).expect("created");
        path
    };
    let (lower, upper, work, stacked) = (dir("lower"), dir("upper"), dir("work"), dir("stacked"));
    let paths = [lower, upper, work].map(|path| path.display().to_string());
    let options = format!("lowerdir={},upperdir={},workdir={}", paths[0], paths[1], paths[2]);
    let options = std::ffi::CString::new(options).expect("a path");
    rustix::mount::mount("overlay", &stacked, "overlay", MountFlags::empty(), options.as_c_str())
        .expect("mounted");
    let it = Passthrough::with(directory, &stacked.join("cache"), 64 << 20);
    it.mount().begin_passthrough();
    for _ in 0..3 {
        assert!(fs::read(it.mounted.join("big")).expect("read") == noise(1, BIG_BYTES));
        assert!(it.cache.flush());
    }
    let seen = it.mount().snapshot();
    assert_eq!((seen.passthrough_failed, seen.passthrough_opens, seen.passthrough_misses), (1, 0, 0));
    drop(it.mount);
    rustix::mount::unmount(&stacked, UnmountFlags::DETACH).expect("unmounted");
}
