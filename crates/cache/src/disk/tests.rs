//! The disk tier against a map, through reopening, kills and damage.

use std::collections::HashMap;

use bytes::Bytes;
use lamina_chunk::Chunk;
use proptest::prelude::*;

use super::*;

/// A frame that is 40 to 2,079 bytes long and differs for each seed.
fn chunk(seed: u16) -> Chunk {
    let len = 40 + usize::from(seed) * 37 % 2040;
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (usize::from(seed) * 31 + at * 7 + (at >> 8)).to_le_bytes()[0];
    }
    bytes[..2].copy_from_slice(&seed.to_le_bytes());
    Chunk::cut(Bytes::from(bytes))
}

fn frame(chunk: &Chunk) -> (FrameId, Sealed) {
    (chunk.id(), Sealed::new(chunk.bytes().clone(), chunk.bytes().len()))
}

fn open(directory: &Path, bytes_max: u64) -> Disk {
    Disk::open(directory, bytes_max, None, Arc::default()).expect("opened")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("created");
    for entry in fs::read_dir(from).expect("listed") {
        let entry = entry.expect("listed");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory.join("segments")).expect("listed");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("listed").path()).collect();
    files.sort();
    files
}

fn bytes_on_disk(directory: &Path) -> u64 {
    files(directory).iter().map(|path| fs::metadata(path).expect("known").len()).sum()
}

#[derive(Debug, Clone)]
enum Op {
    Append(Vec<u16>),
    Reopen,
    /// Goes on with a copy of the directory as it is while still open.
    Kill,
    LoseIndex,
    FlipByte(prop::sample::Index, prop::sample::Index),
    TearEnd(prop::sample::Index, u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::collection::vec(0u16..300, 1..40).prop_map(Op::Append),
        1 => Just(Op::Reopen),
        1 => Just(Op::Kill),
        1 => Just(Op::LoseIndex),
        1 => (any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(|(f, b)| Op::FlipByte(f, b)),
        1 => (any::<prop::sample::Index>(), 1u64..3000).prop_map(|(f, n)| Op::TearEnd(f, n)),
    ]
}

/// A disk whose directory may move.
struct Rig {
    root: tempfile::TempDir,
    generation: u32,
    bytes_max: u64,
    disk: Option<Disk>,
}

impl Rig {
    fn new(bytes_max: u64) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let mut rig = Self { root, generation: 0, bytes_max, disk: None };
        rig.disk = Some(open(&rig.directory(), bytes_max));
        rig
    }

    fn directory(&self) -> PathBuf {
        self.root.path().join(self.generation.to_string())
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("open")
    }

    fn closed(&mut self, act: impl FnOnce(&Path)) {
        self.disk.take().expect("open").close();
        act(&self.directory());
        self.disk = Some(open(&self.directory(), self.bytes_max));
    }

    fn kill(&mut self) {
        let old = self.directory();
        self.generation += 1;
        copy(&old, &self.directory());
        self.disk = Some(open(&self.directory(), self.bytes_max));
    }

    /// Applies `op`; whether what was appended before may be gone afterwards.
    fn apply(&mut self, op: &Op, model: &mut HashMap<FrameId, Chunk>) -> bool {
        match op {
            Op::Append(seeds) => {
                let chunks: Vec<Chunk> = seeds.iter().map(|seed| chunk(*seed)).collect();
                self.disk().append(&chunks.iter().map(frame).collect::<Vec<_>>());
                model.extend(chunks.into_iter().map(|chunk| (chunk.id(), chunk)));
                return false;
            }
            Op::Reopen => self.closed(|_| {}),
            Op::Kill => self.kill(),
            Op::LoseIndex => self.closed(|dir| fs::remove_dir_all(dir.join("index")).expect("removed")),
            Op::FlipByte(file, at) => self.closed(|dir| {
                damage(dir, file, |path, len| {
                    let mut bytes = fs::read(path).expect("read");
                    bytes[at.index(usize::try_from(len).expect("small"))] ^= 0x40;
                    fs::write(path, bytes).expect("written");
                })
            }),
            Op::TearEnd(file, n) => self.closed(|dir| {
                damage(dir, file, |path, len| {
                    let file = File::options().write(true).open(path).expect("opened");
                    file.set_len(len.saturating_sub(*n)).expect("cut");
                })
            }),
        }
        matches!(op, Op::FlipByte(..) | Op::TearEnd(..))
    }
}

fn damage(directory: &Path, file: &prop::sample::Index, act: impl FnOnce(&Path, u64)) {
    let files = files(directory);
    if !files.is_empty() {
        let path = file.get(&files);
        let len = fs::metadata(path).expect("known").len();
        if len > 0 {
            act(path, len);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_found_is_right_through_reopening_kills_and_damage(ops in prop::collection::vec(op(), 1..14)) {
        let mut rig = Rig::new(64 << 20);
        let (mut model, mut whole) = (HashMap::new(), true);
        for op in &ops {
            whole &= !rig.apply(op, &mut model);
            for (id, chunk) in &model {
                match rig.disk().read(*id).map(|sealed| sealed.open(*id)) {
                    Some(Ok(found)) => prop_assert_eq!(&found, chunk),
                    Some(Err(_)) | None => prop_assert!(!whole, "{} is lost", id),
                }
            }
            prop_assert!(rig.disk().read(FrameId::of(b"never appended")).is_none());
        }
    }

    #[test]
    fn the_cap_holds_to_the_byte(ops in prop::collection::vec(op(), 1..14), bytes_max in 100u64..40_000) {
        let mut rig = Rig::new(bytes_max);
        let mut model = HashMap::new();
        for op in &ops {
            rig.apply(op, &mut model);
            let on_disk = bytes_on_disk(&rig.directory());
            prop_assert!(on_disk <= bytes_max, "{} of {}", on_disk, bytes_max);
            prop_assert_eq!(on_disk, rig.disk().counters.snapshot().disk_used_bytes);
            for (id, chunk) in &model {
                if let Some(Ok(found)) = rig.disk().read(*id).map(|sealed| sealed.open(*id)) {
                    prop_assert_eq!(&found, chunk);
                }
            }
        }
    }
}

#[test]
fn the_cap_holds_after_each_write_while_whole_cold_segments_go() {
    let rig = Rig::new(1 << 20);
    let chunks: Vec<Chunk> =
        (0..60u8).map(|n| Chunk::cut(Bytes::from(vec![n; 60_000 + usize::from(n)]))).collect();
    for chunk in &chunks {
        rig.disk().append(&[frame(chunk)]);
        // the first is in use all the time
        assert!(rig.disk().read(chunks[0].id()).is_some(), "a segment in use went first");
        assert!(bytes_on_disk(&rig.directory()) <= 1 << 20);
    }
    assert!(rig.disk().read(chunks[59].id()).is_some());
    assert!(rig.disk().read(chunks[20].id()).is_none());
    let seen = rig.disk().counters.snapshot();
    assert!(seen.evicted_segments > 5 && seen.evicted_bytes > 1 << 20, "{seen:?}");
    assert!(seen.disk_used_bytes > 512 << 10, "the cap is made use of: {seen:?}");
}

/// Frames of 60,000 bytes that are like no other's, numbered from `from` on.
fn large(from: u64, count: u64) -> Vec<Chunk> {
    let one = |n: u64| n.to_le_bytes().repeat(60_000 / 8);
    (from..from + count).map(|n| Chunk::cut(Bytes::from(one(n)))).collect()
}

/// Pins what comes until so many percent of the cap are pinned frames on disk.
fn pin_percent(disk: &Disk, percent: u64) -> Vec<Chunk> {
    let pinned = large(0, disk.bytes_max * percent / 100 / 60_080);
    disk.pin(pinned.iter().map(Chunk::id));
    pinned.iter().for_each(|chunk| disk.append(&[frame(chunk)]));
    assert!(pinned.iter().all(|chunk| disk.contains(chunk.id())), "they fit");
    pinned
}

#[test]
fn pinned_frames_stay_at_the_hard_cap_though_each_segment_has_to_be_copied_in_pieces() {
    let mut rig = Rig::new(60 << 20);
    let disk = rig.disk.as_mut().expect("open");
    disk.segment_bytes = 5 << 20;
    disk.marks = Marks::of(disk.bytes_max, disk.segment_bytes);
    let pinned = pin_percent(disk, 98);
    for chunk in large(10_000, 200) {
        disk.append(&[frame(&chunk)]);
        assert!(disk.used() <= disk.bytes_max);
    }
    let gone = pinned.iter().filter(|chunk| !disk.contains(chunk.id())).count();
    assert_eq!(gone, 0, "of {} pinned frames", pinned.len());
}

#[test]
fn what_is_pinned_above_the_low_mark_is_not_written_again_for_each_frame_that_comes() {
    let rig = Rig::new(16 << 20);
    let pinned = pin_percent(rig.disk(), 99);
    let before = rig.disk().counters.snapshot();
    for chunk in large(10_000, 200) {
        rig.disk().append(&[frame(&chunk)]);
    }
    let seen = rig.disk().counters.snapshot();
    let (written, came) = (seen.kept_frames - before.kept_frames, 200);
    assert!(written <= pinned.len() as u64, "{written} pinned frames were written again where {came} came");
    assert!(pinned.iter().all(|chunk| rig.disk().contains(chunk.id())));
}

#[test]
fn what_is_not_pinned_comes_and_goes_beside_what_is() {
    let rig = Rig::new(16 << 20);
    let pinned = pin_percent(rig.disk(), 75);
    for chunk in large(10_000, 400) {
        rig.disk().append(&[frame(&chunk)]);
        assert!(rig.disk().contains(chunk.id()), "there is room for it");
    }
    let seen = rig.disk().counters.snapshot();
    assert!(pinned.iter().all(|chunk| rig.disk().contains(chunk.id())));
    assert_eq!(seen.write_dropped, 0);
    assert!(seen.kept_frames <= 2 * pinned.len() as u64, "{seen:?}");
}

#[test]
fn a_lower_cap_is_kept_at_the_next_open() {
    let mut rig = Rig::new(8 << 20);
    let chunks: Vec<Chunk> = (0..100u8).map(|n| Chunk::cut(Bytes::from(vec![n; 60_000]))).collect();
    rig.disk().append(&chunks.iter().map(frame).collect::<Vec<_>>());
    rig.bytes_max = 2 << 20;
    rig.closed(|_| {});
    assert!(bytes_on_disk(&rig.directory()) <= 2 << 20);
    assert!(rig.disk().read(chunks[99].id()).is_some(), "the newest stay");
}

#[test]
fn a_second_owner_is_told_who_the_first_is() {
    let rig = Rig::new(1 << 20);
    let error = Disk::open(&rig.directory(), 1 << 20, None, Arc::default()).err().expect("busy");
    let pid = std::process::id().to_string();
    assert!(matches!(&error, crate::CacheError::Busy { pid: Some(owner), .. } if *owner == pid), "{error}");
}

#[test]
fn a_full_disk_is_counted_and_what_was_written_stays() {
    let root = tempfile::tempdir().expect("a directory");
    let flags = rustix::mount::MountFlags::empty();
    let size = c"size=3m";
    rustix::mount::mount("tmpfs", root.path(), "tmpfs", flags, size).expect("mounting needs root");
    let disk = open(&root.path().join("cache"), 64 << 20);
    let chunks: Vec<Chunk> = (0..100u8).map(|n| Chunk::cut(Bytes::from(vec![n; 60_000]))).collect();
    for chunk in &chunks {
        disk.append(&[frame(chunk)]);
    }
    let seen = disk.counters.snapshot();
    let wrong = chunks.iter().filter(|chunk| {
        let read = disk.read(chunk.id());
        read.is_some_and(|sealed| sealed.open(chunk.id()).is_err())
    });
    assert_eq!(wrong.count(), 0);
    assert!(disk.read(chunks[0].id()).is_some());
    assert!(seen.disk_failures > 0 && seen.written_frames > 10, "{seen:?}");
    disk.close();
    drop(disk);
    rustix::mount::unmount(root.path(), rustix::mount::UnmountFlags::DETACH).expect("unmounted");
}
