//! Whole files: made of frames, checked, counted and evicted.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lamina_cache::{Cache, CacheConfig, Class, Made, Part, Pieces, Source, SourceError, Want, WholeId};
use lamina_chunk::{Chunk, ChunkId, Frame, PackId, Place};
use tokio::runtime::{Handle, Runtime};

const FRAME_BYTES: u32 = 64 << 10;
const CAP: u64 = 16 << 20;

/// Frames that do not compress, one after the other.
struct Pack(Bytes);

impl Source for Pack {
    fn stream(&self, _: PackId, range: Range<u64>, _: Class) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        let small = |at: u64| usize::try_from(at).unwrap();
        let body = self.0.slice(small(range.start)..small(range.end));
        async move { Ok(Pieces::whole(body)) }.boxed()
    }
}

struct Rig {
    cache: Option<Cache>,
    wants: Vec<Want>,
    plain: Bytes,
    runtime: Runtime,
    directory: tempfile::TempDir,
}

impl Rig {
    /// A cache, and so many frames that are not in it yet.
    fn new(frames: u32) -> Self {
        let noise = |n: u32| -> Vec<u8> {
            let block = |at: u32| *ChunkId::of(&[n.to_le_bytes(), at.to_le_bytes()].concat()).as_bytes();
            (0..FRAME_BYTES / 32).flat_map(block).collect()
        };
        let plain: Bytes = (0..frames).flat_map(noise).collect();
        let want = |n: u32| {
            let frame = Frame { offset: n * FRAME_BYTES, sealed_len: FRAME_BYTES, plain_len: FRAME_BYTES };
            let id = Chunk::cut(noise(n).into()).id();
            Want { id, place: Place { pack: PackId::from_bytes([1; 32]), frame } }
        };
        let runtime = Runtime::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let wants = (0..frames).map(want).collect();
        let mut rig = Self { cache: None, wants, plain, runtime, directory };
        rig.reopen();
        rig
    }

    fn reopen(&mut self) {
        self.cache = None;
        let config = CacheConfig::new(self.directory.path().join("cache"), CAP);
        let handle: Handle = self.runtime.handle().clone();
        self.cache = Some(Cache::open(config, handle).unwrap());
    }

    fn cache(&self) -> &Cache {
        self.cache.as_ref().unwrap()
    }

    fn fill(&self, frames: Range<usize>) {
        let source: Arc<dyn Source> = Arc::new(Pack(self.plain.clone()));
        let wants = &self.wants[frames];
        self.runtime.block_on(self.cache().fill(&source, wants)).unwrap();
        let begun = Instant::now();
        while !wants.iter().all(|want| self.cache().is_on_disk(want.id)) {
            assert!(begun.elapsed() < Duration::from_secs(20), "frames that came are not on disk");
            std::thread::yield_now();
        }
        assert!(self.cache().flush());
    }

    /// A file of these frames.
    fn parts(&self, frames: Range<usize>) -> Vec<Part> {
        let part = |want: &Want| Part { frame: Some(want.id), skip: 0, len: FRAME_BYTES.into() };
        self.wants[frames].iter().map(part).collect()
    }

    fn make(&self, parts: &[Part]) -> Made {
        let (id, len) = (WholeId::of(parts.iter().copied()), parts.iter().map(|part| part.len).sum());
        self.cache().make_whole(id, len, || parts.iter().copied(), || true)
    }

    fn whole(&self, parts: &[Part]) -> Option<File> {
        self.cache().whole(WholeId::of(parts.iter().copied()))
    }

    fn directory(&self) -> PathBuf {
        self.directory.path().join("cache/whole")
    }

    fn counter(&self, name: &str) -> u64 {
        self.cache().snapshot().named().into_iter().find(|(it, _)| *it == name).unwrap().1
    }
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// What all files of segments and whole files are long together.
fn on_disk(rig: &Rig) -> u64 {
    let cache = rig.directory.path().join("cache");
    let all = ["segments", "whole"].into_iter().flat_map(|name| files(&cache.join(name)));
    all.map(|path| fs::metadata(path).unwrap().len()).sum()
}

#[test]
fn a_whole_file_has_the_bytes_of_its_parts_and_zeros_in_its_holes() {
    let rig = Rig::new(4);
    let [a, b] = [rig.wants[0].id, rig.wants[3].id];
    let parts = [
        Part { frame: None, skip: 0, len: 5_000 },
        Part { frame: Some(a), skip: 100, len: 60_000 },
        Part { frame: Some(a), skip: 7, len: 1 },
        Part { frame: None, skip: 0, len: 1 },
        Part { frame: Some(b), skip: 0, len: FRAME_BYTES.into() },
        Part { frame: None, skip: 0, len: 9_999 },
    ];
    assert_eq!(rig.make(&parts), Made::Incomplete);
    rig.fill(0..4);
    assert!(rig.whole(&parts).is_none());
    assert_eq!(rig.make(&parts), Made::Ready);
    let last = &rig.plain[3 * FRAME_BYTES as usize..];
    let truth =
        [&[0; 5_000][..], &rig.plain[100..60_100], &rig.plain[7..8], &[0], last, &[0; 9_999]].concat();
    let file = rig.whole(&parts).unwrap();
    assert!(bytes(&file) == truth);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o400);
    assert_eq!(rig.counter("whole_used_bytes"), truth.len() as u64);
    // once is enough
    let inode = file.metadata().unwrap().ino();
    assert_eq!((rig.make(&parts), rig.counter("whole_files")), (Made::Ready, 1));
    assert_eq!(rig.whole(&parts).unwrap().metadata().unwrap().ino(), inode);
}

#[test]
fn files_of_the_same_parts_have_one_name_and_no_others_do() {
    let rig = Rig::new(2);
    let parts = rig.parts(0..2);
    let changed = |change: fn(&mut Part)| {
        let mut parts = parts.clone();
        change(&mut parts[1]);
        WholeId::of(parts.into_iter())
    };
    let id = WholeId::of(parts.iter().copied());
    assert_eq!(id, changed(|_| ()));
    let others = [
        changed(|part| part.len -= 1),
        changed(|part| part.skip += 1),
        changed(|part| part.frame = None),
        changed(|part| part.frame = Some(ChunkId::from_bytes([0; 32]))),
        WholeId::of(parts[..1].iter().copied()),
    ];
    for (at, other) in others.iter().enumerate() {
        assert!(*other != id && !others[..at].contains(other), "{at}");
    }
}

#[test]
fn after_a_restart_a_whole_file_is_read_and_compared_before_it_is_used() {
    let mut rig = Rig::new(64);
    rig.fill(0..64);
    let [good, damaged, short] = [0..16, 16..32, 32..48].map(|frames| rig.parts(frames));
    for parts in [&good, &damaged, &short] {
        assert_eq!(rig.make(parts), Made::Ready);
    }
    let path_of = |parts: &[Part]| {
        let id = WholeId::of(parts.iter().copied()).to_string();
        files(&rig.directory()).into_iter().find(|path| path.to_str().unwrap().contains(&id)).unwrap()
    };
    let open = |path: PathBuf| File::options().write(true).open(path).unwrap();
    open(path_of(&damaged)).write_all_at(b"x", 1_000_000).unwrap();
    open(path_of(&short)).set_len(1_000_000).unwrap();
    rig.reopen();
    assert_eq!(rig.counter("whole_used_bytes"), 2 * 16 * u64::from(FRAME_BYTES) + 1_000_000);
    for (parts, at) in [(&good, 0), (&damaged, 16), (&short, 32)] {
        assert!(rig.whole(parts).is_none(), "{at} was used unchecked");
        // what is wrong is made again
        assert_eq!(rig.make(parts), Made::Ready);
        let from = at * FRAME_BYTES as usize;
        assert!(bytes(&rig.whole(parts).unwrap()) == rig.plain[from..from + 16 * FRAME_BYTES as usize]);
    }
    assert_eq!((rig.counter("verify_failures"), rig.counter("whole_files")), (2, 2));
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
}

#[test]
fn what_is_no_whole_file_is_removed_when_the_directory_is_opened() {
    let mut rig = Rig::new(16);
    rig.fill(0..16);
    let parts = rig.parts(0..16);
    assert_eq!(rig.make(&parts), Made::Ready);
    let [whole] = &files(&rig.directory())[..] else { panic!("one file") };
    let whole = whole.clone();
    for name in ["new", "a.b", ".tmp", "0000"] {
        fs::write(rig.directory().join(name), "x").unwrap();
    }
    fs::create_dir(rig.directory().join(whole.file_name().unwrap().to_str().unwrap().to_uppercase()))
        .unwrap();
    rig.reopen();
    assert_eq!(files(&rig.directory()), [whole]);
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
}

#[test]
fn whole_files_are_made_only_in_what_is_free_of_three_quarters_of_the_cap_and_go_before_frames_unless_open() {
    // of 16 MiB there are 6 MiB of frames, and whole files of 1 MiB each
    let rig = Rig::new(384);
    let is_exact = || on_disk(&rig) <= CAP && rig.counter("disk_used_bytes") == on_disk(&rig);
    rig.fill(0..96);
    let files: Vec<Vec<Part>> = (0..6).map(|n| rig.parts(16 * n..16 * n + 16)).collect();
    for parts in &files[..5] {
        assert!(rig.make(parts) == Made::Ready && is_exact());
    }
    // the sixth would go beyond: nothing makes way for it
    let here = |at: usize| rig.whole(&files[at]).is_some();
    assert!(rig.make(&files[5]) == Made::Not && is_exact());
    assert_eq!(rig.make(&[&files[5][..]; 20].concat()), Made::Not);
    assert_eq!((rig.counter("whole_refused"), rig.counter("whole_files")), (2, 5));
    assert_eq!((rig.counter("evicted_segments"), rig.counter("evicted_whole_files")), (0, 0));
    // used in this order, and the first of them is open
    let open = rig.whole(&files[0]).unwrap();
    assert_eq!([0, 1, 3, 2, 4].map(here), [true; 5]);
    // frames that come displace whole files, and no frame as long as there is a whole file that can go
    rig.fill(96..192);
    assert!(is_exact() && rig.wants[..192].iter().all(|want| rig.cache().is_on_disk(want.id)));
    assert_eq!([0, 1, 2, 3, 4].map(here), [true, false, true, false, true]);
    assert_eq!((rig.counter("evicted_segments"), rig.counter("evicted_whole_files")), (0, 2));
    // what comes then displaces frames
    rig.fill(192..288);
    assert_eq!([0, 1, 2, 3, 4].map(here), [true, false, false, false, false]);
    assert!(is_exact() && bytes(&open) == rig.plain[..16 * FRAME_BYTES as usize]);
    assert!(rig.make(&rig.parts(270..286)) == Made::Not && is_exact());
    drop(open);
    rig.fill(288..384);
    assert!(!here(0) && is_exact());
}

#[test]
fn frames_of_which_a_whole_file_was_made_stay_no_longer_than_others() {
    let rig = Rig::new(304);
    rig.fill(0..16);
    assert_eq!(rig.make(&rig.parts(0..16)), Made::Ready);
    rig.fill(16..160);
    rig.fill(160..304);
    assert!(rig.counter("evicted_segments") > 0 && !rig.cache().is_on_disk(rig.wants[0].id));
    assert_eq!(rig.counter("kept_frames"), 0);
}

#[test]
fn a_whole_file_that_somebody_has_removed_is_forgotten_and_its_bytes_are_free() {
    let mut rig = Rig::new(16);
    rig.fill(0..16);
    let parts = rig.parts(0..16);
    let remove = |rig: &Rig| files(&rig.directory()).iter().for_each(|path| fs::remove_file(path).unwrap());
    assert_eq!(rig.make(&parts), Made::Ready);
    remove(&rig);
    assert!(rig.whole(&parts).is_none() && rig.counter("whole_used_bytes") == 0);
    assert_eq!(rig.make(&parts), Made::Ready);
    // and the same where it was not checked yet
    rig.reopen();
    remove(&rig);
    assert_eq!(rig.make(&parts), Made::Ready);
    assert!(rig.whole(&parts).is_some());
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
}

#[test]
fn a_damaged_one_that_is_open_is_read_once_and_removed_when_it_is_closed() {
    let mut rig = Rig::new(16);
    rig.fill(0..16);
    let parts = rig.parts(0..16);
    assert_eq!(rig.make(&parts), Made::Ready);
    let [path] = &files(&rig.directory())[..] else { panic!("one file") };
    File::options().write(true).open(path).unwrap().write_all_at(b"x", 1_000_000).unwrap();
    rig.reopen();
    let open = File::open(path).unwrap();
    for _ in 0..3 {
        assert!(rig.make(&parts) == Made::Not && rig.whole(&parts).is_none());
        assert_eq!((rig.counter("verify_failures"), rig.counter("disk_used_bytes")), (1, on_disk(&rig)));
    }
    drop(open);
    assert_eq!((rig.make(&parts), rig.counter("verify_failures")), (Made::Ready, 1));
    assert!(bytes(&rig.whole(&parts).unwrap()) == rig.plain);
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
}

#[test]
fn of_two_files_for_one_name_the_older_goes_unless_it_is_open_and_then_it_counts() {
    let mut rig = Rig::new(16);
    rig.fill(0..16);
    assert_eq!(rig.make(&rig.parts(0..16)), Made::Ready);
    let [path] = &files(&rig.directory())[..] else { panic!("one file") };
    let other = path.with_extension("0".repeat(64));
    fs::copy(path, &other).unwrap();
    let open = File::open(path).unwrap();
    rig.reopen();
    assert!(path.exists() && other.exists());
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
    drop(open);
    rig.reopen();
    assert!(!path.exists() && other.exists());
    assert_eq!(rig.counter("disk_used_bytes"), on_disk(&rig));
}

#[test]
fn a_cache_works_where_there_can_be_no_whole_files() {
    let mut rig = Rig::new(16);
    assert!(rig.cache().trial_whole().is_ok());
    rig.cache = None;
    fs::remove_dir(rig.directory()).unwrap();
    fs::write(rig.directory(), "in the way").unwrap();
    rig.reopen();
    rig.fill(0..16);
    assert!(rig.cache().trial_whole().is_err());
    assert!(rig.make(&rig.parts(0..16)) == Made::Not && rig.counter("whole_used_bytes") == 0);
}

#[test]
fn nobody_waits_for_a_whole_file_that_nobody_wants_any_more() {
    let rig = Rig::new(16);
    rig.fill(0..16);
    let parts = rig.parts(0..16);
    let left = std::cell::Cell::new(5);
    let is_wanted = || left.replace(left.get() - 1) > 0;
    let (id, len) = (WholeId::of(parts.iter().copied()), 16 * u64::from(FRAME_BYTES));
    assert_eq!(rig.cache().make_whole(id, len, || parts.iter().copied(), is_wanted), Made::Not);
    assert!(files(&rig.directory()).is_empty() && rig.counter("whole_used_bytes") == 0);
}
