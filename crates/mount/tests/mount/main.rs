//! Real mounts, by a real kernel. They need root and /dev/fuse, and fail without.

mod boot;
mod passthrough;
mod rig;
mod unpacked;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lamina_image::{Ino, Tree};
use lamina_mount::{Bringing, Contents, MountConfig, MountError, Record};
use rig::{Layer, Packs, Rig, is_mounted, noise, until};
use rustix::mount::{MountFlags, UnmountFlags};
use tar::EntryType;

/// A rig whose mount has nothing but the tree's names, and what says that the rest has come.
fn named_only(file: &[u8]) -> (Rig, Bringing) {
    let mut rig = Rig::new(Layer::new().file("d/file", file).link(EntryType::Symlink, "link", "d/file"));
    rig.mount().unmount(false).expect("unmounted");
    rig.ended();
    let names = Tree::open_names(rig.tree.as_bytes().clone()).expect("a tree");
    rig.tree = std::sync::Arc::new(names);
    let (come, contents) = Contents::coming();
    let config = MountConfig { record: Record::Start, ..MountConfig::new(rig.path("")) };
    rig.mount = Some(rig.start_with((rig.tree.clone(), contents), config).expect("mounted"));
    assert_eq!(fs::metadata(rig.path("link")).expect("names are there").len(), file.len() as u64);
    assert_eq!(fs::read_dir(rig.path("d")).expect("listed").count(), 1);
    (rig, come)
}

#[test]
fn before_the_contents_of_the_tree_have_come_names_are_answered_and_reads_wait() {
    let file = noise(300_000, 3);
    let (rig, come) = named_only(&file);
    let path = rig.path("link");
    let reader = std::thread::spawn(move || fs::read(path));
    until("a read waits", || rig.mount().snapshot().reads > 0);
    assert!(!reader.is_finished());
    rig.tree.set_contents(rig.tree.as_bytes().clone()).expect("the same tree");
    come.done();
    assert!(reader.join().expect("no panic").expect("read") == file);
    assert!(
        rig.mount().end_start().is_some_and(|trace| !trace.runs.is_empty()),
        "it is recorded all the same"
    );
}

#[test]
fn where_the_contents_of_the_tree_do_not_come_reads_fail_and_do_not_hang() {
    let (rig, come) = named_only(&noise(300_000, 3));
    drop(come);
    let error = fs::read(rig.path("d/file")).expect_err("nobody knows where it is");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
}

#[test]
fn every_attribute_is_the_images() {
    let layer = Layer::new()
        .entry(EntryType::Directory, b"d/", b"", |h| h.set_mode(0o1777))
        .pax(&[("mtime", b"1234567890.123456789")])
        .entry(EntryType::Regular, b"d/setuid", b"hello", |h| {
            h.set_mode(0o4755);
            h.set_uid(1234);
            h.set_gid(5678);
        })
        .pax(&[("mtime", b"-86399.5")])
        .file("d/old", b"")
        .link(EntryType::Link, "d/hard", "d/setuid")
        .link(EntryType::Symlink, "d/soft", "../no/where")
        .entry(EntryType::Fifo, b"d/fifo", b"", |h| h.set_mode(0o600))
        .entry(EntryType::Char, b"d/null", b"", |h| {
            h.set_device_major(1).expect("gnu");
            h.set_device_minor(3).expect("gnu");
        })
        .entry(EntryType::Block, b"d/block", b"", |h| {
            h.set_device_major(259).expect("gnu");
            h.set_device_minor(70_000).expect("gnu");
        })
        .entry(EntryType::Regular, b"d/\xff\xfe", b"not UTF-8", |_| {});
    let rig = Rig::new(layer);
    let stat = |path: &str| fs::symlink_metadata(rig.path(path)).expect(path);
    let file = stat("d/setuid");
    assert_eq!((file.mode(), file.uid(), file.gid(), file.size()), (0o104_755, 1234, 5678, 5));
    assert_eq!((file.mtime(), file.mtime_nsec(), file.nlink()), (1_234_567_890, 123_456_789, 2));
    assert_eq!((stat("d/old").mtime(), stat("d/old").mtime_nsec()), (-86_400, 500_000_000));
    assert_eq!(stat("d/hard").ino(), file.ino());
    assert_eq!((stat("d").mode(), stat("d").nlink()), (0o041_777, 2));
    assert_eq!(fs::read_link(rig.path("d/soft")).expect("read"), OsStr::new("../no/where"));
    assert!(stat("d/fifo").file_type().is_fifo() && stat("d/fifo").mode() & 0o777 == 0o600);
    let (null, block) = (stat("d/null"), stat("d/block"));
    assert!(null.file_type().is_char_device() && block.file_type().is_block_device());
    let device = |rdev| (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    assert_eq!((device(null.rdev()), device(block.rdev())), ((1, 3), (259, 70_000)));
    assert_eq!(fs::read(rig.path("d/null")).expect("a working device"), b"");
    assert_eq!(fs::read(rig.path("d").join(OsStr::from_bytes(b"\xff\xfe"))).expect("read"), b"not UTF-8");
    assert_eq!(fs::read(rig.path("d/hard")).expect("read"), b"hello");
    let refused = fs::write(rig.path("d/new"), "x").expect_err("read-only");
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let statvfs = rustix::fs::statvfs(rig.path("")).expect("statfs");
    assert_eq!((statvfs.f_files, statvfs.f_bfree), (u64::from(rig.tree.inodes()), 0));
}

#[test]
fn ten_thousand_names_are_listed_once_each() {
    let layer = (0..10_000).fold(Layer::new(), |layer, n| layer.file(&format!("many/{n:05}"), b""));
    let rig = Rig::new(layer);
    for round in 0..2 {
        let names: Vec<_> = fs::read_dir(rig.path("many"))
            .expect("listed")
            .map(|entry| entry.expect("listed").file_name())
            .collect();
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!((names.len(), distinct.len()), (10_000, 10_000), "round {round}");
    }
    let readdirs = rig.mount().snapshot().readdirs;
    fs::read_dir(rig.path("many")).expect("listed").for_each(drop);
    assert_eq!(rig.mount().snapshot().readdirs, readdirs, "the kernel keeps what was listed");
    assert_eq!(fs::metadata(rig.path("many/09999")).expect("there").size(), 0);
}

#[test]
fn extended_attributes_are_shown_where_there_are_any() {
    let layer = Layer::new()
        .pax(&[("SCHILY.xattr.user.colour", b"blue\0\xff"), ("SCHILY.xattr.user.empty", b"")])
        .file("with", b"x")
        .file("without", b"x");
    let rig = Rig::new(layer);
    let with = rig.path("with");
    assert_eq!(xattr::get(&with, "user.colour").expect("read").as_deref(), Some(&b"blue\0\xff"[..]));
    assert_eq!(xattr::get(&with, "user.empty").expect("read").as_deref(), Some(&b""[..]));
    assert_eq!(xattr::get(&with, "user.none").expect("read"), None);
    let names: Vec<_> = xattr::list(&with).expect("listed").collect();
    assert_eq!(names, ["user.colour", "user.empty"]);
    assert_eq!(xattr::list(rig.path("without")).expect("listed").count(), 0);

    let bare = Rig::new(Layer::new().file("a", b"x").file("b", b"x"));
    for name in ["a", "b", "a"] {
        // the system call itself is not supported there
        let _ = xattr::get(bare.path(name), "user.none");
    }
    assert_eq!(bare.mount().snapshot().xattrs, 1, "the kernel asks no more");
}

#[test]
fn a_name_that_does_not_exist_is_asked_for_once() {
    let rig = Rig::new(Layer::new().file("a", b"x"));
    for _ in 0..5 {
        let absent = fs::metadata(rig.path("absent")).expect_err("absent");
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        fs::metadata(rig.path("a")).expect("there");
    }
    let seen = rig.mount().snapshot();
    assert_eq!((seen.lookups, seen.lookups_absent), (2, 1));
}

#[test]
fn files_read_and_map_as_they_are_and_are_fetched_once() {
    let large = noise(1, 3_000_001);
    let layer = Layer::new().file("large", &large).file("small", b"small").file("empty", b"");
    let rig = Rig::new(layer);
    let file = File::open(rig.path("large")).expect("opened");
    let mut piece = vec![0; 5000];
    for at in [2_999_000u64, 0, 70_000, 1_500_000] {
        let len = file.read_at(&mut piece, at).expect("read");
        let at = usize::try_from(at).expect("small");
        assert_eq!(piece[..len], large[at..(at + 5000).min(large.len())]);
    }
    #[expect(unsafe_code, reason = "the file is immutable, so the mapping is")]
    // SAFETY: nothing can change the file under the mapping, since the mount is read-only.
    let map = unsafe { memmap2::Mmap::map(&file) }.expect("mapped");
    assert_eq!(map[..], large[..]);
    assert_eq!(fs::read(rig.path("large")).expect("read"), large);
    assert_eq!(fs::read(rig.path("small")).expect("read"), b"small");
    assert_eq!(fs::read(rig.path("empty")).expect("read"), b"");
    // noise is stored as it is: nothing came twice, and little that was not asked for
    assert!(rig.packs.bytes.load(Ordering::SeqCst) <= 3_010_000);
}

#[test]
fn holes_read_as_zeros_between_right_bytes() {
    let mut contents = noise(1, 10_000);
    contents.resize(2_000_000, 0);
    contents.extend(noise(2, 10_000));
    let rig = Rig::new(Layer::new().file("sparse", &contents));
    assert_eq!(fs::read(rig.path("sparse")).expect("read"), contents);
}

#[test]
fn many_processes_read_one_cold_file_and_each_byte_comes_once() {
    let large = noise(7, 8_000_000);
    let rig = Rig::new(Layer::new().file("large", &large));
    let twin = rig.directory.path().join("twin");
    fs::write(&twin, &large).expect("written");
    let readers: Vec<_> = (0..12)
        .map(|_| {
            Command::new("cmp").arg(rig.path("large")).arg(&twin).stdout(Stdio::null()).spawn().expect("cmp")
        })
        .collect();
    for mut reader in readers {
        assert!(reader.wait().expect("ended").success());
    }
    assert!(rig.packs.bytes.load(Ordering::SeqCst) <= 8_010_000);
}

#[test]
fn reading_every_file_in_order_takes_few_requests() {
    let files: Vec<_> = (0..600u64).map(|n| (format!("dir/{n:04}"), noise(n, 20_000))).collect();
    let layer = files.iter().fold(Layer::new(), |layer, (path, contents)| layer.file(path, contents));
    let rig = Rig::new(layer);
    for (path, contents) in &files {
        assert_eq!(&fs::read(rig.path(path)).expect("read"), contents);
    }
    let requests = rig.packs.requests.load(Ordering::SeqCst);
    assert!(requests < 120, "{requests} requests for 12 MB in 600 files; {:?}", rig.mount().snapshot());
    let seen = rig.cache.snapshot();
    assert!(seen.source_bytes < 12_100_000, "{seen:?}");
}

#[test]
fn the_kernel_reads_ahead_little_until_reading_is_dense() {
    let rig = Rig::new(Layer::new().file("large", &noise(1, 12 << 20)));
    let config = MountConfig::new(rig.path(""));
    assert_eq!(rig.window(), config.read_ahead_kb);
    fs::read(rig.path("large")).expect("read");
    assert_eq!(rig.window(), config.read_ahead_dense_kb);
}

#[test]
fn the_rest_of_a_frame_that_was_read_is_in_the_page_cache() {
    let contents = noise(5, 60_001);
    let rig = Rig::new(Layer::new().file("before", &noise(6, 3_000)).file("a", &contents));
    let file = File::open(rig.path("a")).expect("opened");
    let mut piece = [0; 100];
    file.read_exact_at(&mut piece, 30_000).expect("read");
    until("the kernel has the rest", || rig.mount().snapshot().stores == 2);
    let reads = rig.mount().snapshot().reads;
    assert_eq!(fs::read(rig.path("a")).expect("read"), contents);
    let asked = rig.mount().snapshot().reads - reads;
    // one, where the kernel has reclaimed some of it meanwhile
    assert!(asked <= 1, "{:?}", rig.mount().snapshot());
}

#[test]
fn small_files_beside_those_read_are_in_the_page_cache_where_files_are_read_in_a_stream() {
    const FILES: usize = 2_000;
    let name = |n: usize| format!("small/{n:04}");
    let contents = |n: usize| noise(n as u64, 5_000 + n % 7);
    let layer = (0..FILES).fold(Layer::new(), |layer, n| layer.file(&name(n), &contents(n)));
    let mut rig = Rig::new(layer);
    rig.mount = None;
    let mut config = MountConfig::new(rig.path(""));
    config.pack_ramp.run_min = 64 << 10;
    rig.mount = Some(rig.start(config).expect("mounted again"));
    // the kernel takes pages only of inodes that it knows
    (0..FILES).for_each(|n| assert!(fs::metadata(rig.path(&name(n))).expect("there").is_file()));
    for n in (0..FILES).step_by(10) {
        assert_eq!(fs::read(rig.path(&name(n))).expect("read"), contents(n), "{n}");
    }
    until("the kernel has most of the others", || rig.mount().snapshot().stores > FILES as u64 / 2);
    let before = rig.mount().snapshot();
    for n in 0..FILES {
        assert_eq!(fs::read(rig.path(&name(n))).expect("read"), contents(n), "{n}");
    }
    let asked = rig.mount().snapshot().reads - before.reads;
    assert!(asked < FILES as u64 / 2, "{asked} {:?}", rig.mount().snapshot());
}

#[test]
fn files_are_read_ahead_in_the_order_of_their_paths_however_they_were_packed() {
    const FILES: usize = 40;
    let name = |n: usize| format!("{}/{n:02}", n / 7);
    let contents = |n: usize| noise(n as u64, 200_000);
    let layer =
        (0..FILES).map(|n| n * 17 % FILES).fold(Layer::new(), |layer, n| layer.file(&name(n), &contents(n)));
    let mut rig = Rig::new(layer);
    rig.mount = None;
    let mut config = MountConfig::new(rig.path(""));
    (config.neighbour_bytes, config.dense_run_bytes) = (0, 64 << 10);
    (config.pack_ramp.run_min, config.path_ramp.run_min) = (u64::MAX, 512 << 10);
    rig.mount = Some(rig.start(config).expect("mounted again"));
    let last_frame = |n: usize| {
        let ino = Ino(fs::metadata(rig.path(&name(n))).unwrap().ino());
        let extent = rig.tree.extents(ino, 199_999, 200_000).unwrap().next().unwrap().unwrap();
        rig.tree.frame(extent.frame.expect("stored")).unwrap().0
    };
    // the order is laid while the first are read
    let comes = |n: usize| {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(200) && !rig.cache.is_near(last_frame(n)) {
            std::thread::yield_now();
        }
        rig.cache.is_near(last_frame(n))
    };
    let found = (0..FILES - 1).find(|n| {
        assert_eq!(fs::read(rig.path(&name(*n))).expect("read"), contents(*n), "{n}");
        // in other directories, and far away in the pack
        (n + 1..FILES.min(n + 4)).all(comes)
    });
    assert!(found.is_some_and(|n| n < FILES - 4), "those that follow come by themselves: {found:?}");
}

#[test]
fn reading_here_and_there_fetches_little_else() {
    let large = noise(3, 32 << 20);
    let rig = Rig::new(Layer::new().file("large", &large));
    let file = File::open(rig.path("large")).expect("opened");
    let mut byte = [0];
    for n in 0..40usize {
        let at = (n * 7919 % 40) * 800_000 + 123;
        file.read_exact_at(&mut byte, at as u64).expect("read");
        assert_eq!(byte[0], large[at]);
    }
    // one frame each, of at most 256 KiB
    let bytes = rig.packs.bytes.load(Ordering::SeqCst);
    assert!(bytes <= 40 * (256 << 10), "{bytes}; {:?}", rig.mount().snapshot());
}

/// Where an ELF file says that what the linker writes begins (`PT_GNU_RELRO`).
fn relocated(program: &[u8]) -> u64 {
    let word = |at: usize| u64::from_le_bytes(program[at..at + 8].try_into().unwrap());
    let headers = usize::try_from(word(32)).unwrap();
    let kind = |at: &usize| u32::from_le_bytes(program[*at..at + 4].try_into().unwrap());
    let relro = (headers..).step_by(56).take(20).find(|at| kind(at) == 0x6474_e552);
    word(relro.expect("a modern library") + 8)
}

#[test]
fn what_the_linker_will_touch_is_fetched_when_a_program_begins_to_be_read() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.lines().find(|line| line.contains("/libc.so.6")).expect("linked with a libc");
    let libc = Path::new(&libc[libc.find('/').unwrap()..]);
    let libm = fs::read(libc.with_file_name("libm.so.6")).unwrap();
    let libc = fs::read(libc).unwrap();
    // awk computes, so it needs libm; of these two nobody can say which is meant, so neither is looked into
    let layer = Layer::new().file("awk", &fs::read("/usr/bin/awk").unwrap()).file("libc.so.6", &libc);
    let layer = layer.file("a/libm.so.6", &libm).file("b/libm.so.6", &[&libm[..], b"other"].concat());
    let rig = Rig::new(layer);
    let frame = |path: &str, at: u64| {
        let ino = Ino(fs::metadata(rig.path(path)).unwrap().ino());
        let extent = rig.tree.extents(ino, at, at + 1).unwrap().next().unwrap().unwrap();
        rig.tree.frame(extent.frame.expect("stored")).unwrap().0
    };
    let wanted = [frame("libc.so.6", 0), frame("libc.so.6", relocated(&libc))];
    assert!(wanted.iter().all(|id| !rig.cache.is_near(*id)), "nothing was read yet");
    let mut head = [0; 512];
    File::open(rig.path("awk")).unwrap().read_exact(&mut head).unwrap();
    until("the library comes by itself", || wanted.iter().all(|id| rig.cache.is_near(*id)));
    assert!(!rig.cache.is_near(frame("a/libm.so.6", relocated(&libm))));
}

/// Where the names of the symbols of [`library`] are.
const NAMES: Range<u64> = 3 << 20..(3 << 20) + (128 << 10);

/// What its relocations write to: every other page.
const TARGETS: Range<u64> = (6 << 20) + (512 << 10)..(6 << 20) + (640 << 10);

/// A library of 8 MiB with relocations and one constructor, at 2 MiB, that calls what is at 4 MiB and points to what is at 6 MiB.
fn library() -> Vec<u8> {
    const LIST: u64 = 7 << 20;
    const TABLE: u64 = (7 << 20) + (512 << 10);
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut library = noise(11, 8 << 20);
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).unwrap();
        library[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
    put(32, &words(&[64, 0]));
    put(54, &[56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    // all of it is code, at 0
    put(64, &words(&[5 << 32 | 1, 0, 0, 0, 8 << 20, 8 << 20, 4096]));
    put(120, &words(&[6 << 32 | 2, 256, 256, 256, 96, 96, 8]));
    let relocations: Vec<u64> = TARGETS.step_by(8192).flat_map(|target| [target, 8, 0]).collect();
    put(256, &words(&[25, LIST, 27, 8, 5, NAMES.start, 10, NAMES.end - NAMES.start]));
    put(320, &words(&[7, TABLE, 8, relocations.len() as u64 * 8]));
    put(TABLE, &words(&relocations));
    put(LIST, &words(&[2 << 20]));
    // call .+2 MiB; lea rdi, [.+4 MiB]; ret
    let distance = |to: u64, end: u64| u32::try_from(to - end).unwrap().to_le_bytes();
    put(2 << 20, &[&b"\xe8"[..], &distance(4 << 20, (2 << 20) + 5)].concat());
    put((2 << 20) + 5, &[&b"\x48\x8d\x3d"[..], &distance(6 << 20, (2 << 20) + 12), &[0xc3; 300]].concat());
    library
}

/// How many pages of a part of a file the page cache has: mincore(2).
fn in_memory(file: &File, part: Range<u64>) -> usize {
    let len = usize::try_from(part.end - part.start).unwrap();
    #[expect(unsafe_code, reason = "the file is immutable, so the mapping is")]
    // SAFETY: nothing can change the file under the mapping, since the mount is read-only.
    let map = unsafe { memmap2::MmapOptions::new().offset(part.start).len(len).map(file) }.unwrap();
    let mut pages = vec![0_u8; len.div_ceil(4096)];
    #[expect(unsafe_code, reason = "rustix lacks mincore")]
    // SAFETY: the mapping is as long as is said, and there is a byte for each page of it.
    let done = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), len, pages.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    pages.iter().filter(|page| *page & 1 == 1).count()
}

#[test]
fn of_a_start_that_is_recorded_what_the_linker_walks_goes_out_together_and_counts_as_touched_and_nothing_else_does()
 {
    let rig = Rig::new(Layer::new().file("library", &library())).recording();
    let file = File::open(rig.path("library")).unwrap();
    let read = |at: u64| file.read_exact_at(&mut [0; 16], at).unwrap();
    read(0);
    let ino = Ino(file.metadata().unwrap().ino());
    let extent = rig.tree.extents(ino, 2 << 20, (2 << 20) + 1).unwrap().next().unwrap().unwrap();
    let constructor = rig.tree.frame(extent.frame.unwrap()).unwrap().0;
    until("the library to be looked into", || rig.cache.is_near(constructor));
    // another part, of which nobody knows anything, and the names
    read(5 << 20);
    assert_eq!(rig.mount().snapshot().stores, 0);
    read(NAMES.start + 8192);
    until("the names beside it to go out", || in_memory(&file, NAMES) > 1);
    read(TARGETS.start);
    until("what relocations write to beside it to go out", || in_memory(&file, TARGETS) > 1);
    let trace = rig.mount().end_start().expect("recorded");
    let pages: Vec<u64> = trace.runs.iter().flat_map(|run| run.first..run.first + run.pages).collect();
    let within = |range: Range<u64>| {
        pages.iter().filter(|page| (range.start / 4096..range.end / 4096).contains(page)).count()
    };
    // a frame has 16 KiB at least, and what is read is one page
    assert!(within(NAMES) >= 4 && within(5 << 20..6 << 20) == 1, "{pages:?}");
    let targets =
        |odd: u64| pages.iter().filter(|page| *page % 2 == odd && TARGETS.contains(&(*page * 4096))).count();
    assert!(targets(0) >= 2 && targets(1) == 0, "{pages:?}");
    let known = within(0..1 << 20) + within(NAMES) + within(5 << 20..6 << 20) + within(TARGETS);
    assert_eq!(known, pages.len(), "{pages:?}");
}

#[test]
fn of_an_exact_recording_nothing_goes_out_that_was_not_asked_for() {
    let small = noise(12, 40_000);
    let rig = Rig::new(Layer::new().file("library", &library()).file("small", &small));
    rig.mount().unmount(false).unwrap();
    rig.ended();
    let mount = rig.start(MountConfig { record: Record::Exact, ..MountConfig::new(rig.path("")) }).unwrap();
    let file = File::open(rig.path("library")).unwrap();
    for at in [0, NAMES.start, 5 << 20, TARGETS.start, NAMES.start + 8192] {
        file.read_exact_at(&mut [0; 16], at).unwrap();
    }
    File::open(rig.path("small")).unwrap().read_exact_at(&mut [0; 16], 16_384).unwrap();
    let trace = mount.end_start().expect("recorded");
    assert_eq!(trace.runs.iter().map(|run| run.pages).sum::<u64>(), 6, "{:?}", trace.runs);
    assert_eq!(mount.snapshot().stores, 0);
}

/// What its constructor touches comes when these bytes of a library are read, one after the other, and what lies elsewhere does not.
fn constructors_are_followed(reads: &[u64]) {
    let library = library();
    let rig = Rig::new(Layer::new().file("library", &library));
    let file = File::open(rig.path("library")).unwrap();
    let ino = Ino(file.metadata().unwrap().ino());
    let is_near = |at: u64| {
        let extent = rig.tree.extents(ino, at, at + 1).unwrap().next().unwrap().unwrap();
        rig.cache.is_near(rig.tree.frame(extent.frame.expect("stored")).unwrap().0)
    };
    let wanted = [2 << 20, 4 << 20, 6 << 20];
    let (first, last) = reads.split_at(reads.len() - 1);
    for at in first {
        file.read_exact_at(&mut [0; 16], *at).unwrap();
    }
    assert!(!wanted.into_iter().any(is_near), "nothing has named them");
    file.read_exact_at(&mut [0; 16], last[0]).unwrap();
    until("what the constructor names comes by itself", || wanted.into_iter().all(is_near));
    assert!(![3 << 20, 5 << 20].into_iter().any(is_near));
}

#[test]
fn what_the_constructors_of_a_library_name_is_fetched_when_its_head_is_read() {
    constructors_are_followed(&[0]);
}

#[test]
fn a_library_whose_head_was_never_asked_for_is_followed_when_it_lacks_something_twice() {
    constructors_are_followed(&[1 << 20, 3_500_000]);
}

#[test]
fn a_program_whose_tables_lie_beyond_every_end_costs_nothing() {
    // one segment at the end of all offsets, mapped at 0, and a dynamic section that puts relocations and names there
    let header = |kind: u32, words: [u64; 5]| {
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        [kind.to_le_bytes(), 4u32.to_le_bytes()]
            .concat()
            .into_iter()
            .chain(words)
            .chain([0; 8])
            .collect::<Vec<u8>>()
    };
    let mut program = b"\x7fELF\x02\x01".to_vec();
    program.resize(64, 0);
    program[32..40].copy_from_slice(&64u64.to_le_bytes());
    program[54..58].copy_from_slice(&[56, 0, 2, 0]);
    program.extend(header(1, [u64::MAX - 200, 0, 0, 0x1000, 0x1000]));
    program.extend(header(2, [176, 0, 0, 96, 96]));
    let dynamic: [u64; 12] = [7, 0, 8, 100, 5, 0, 1, 0, 6, 8, 0, 0];
    program.extend(dynamic.iter().flat_map(|word| word.to_le_bytes()));
    let programs: Vec<String> = (0..16).map(|number| format!("program{number}")).collect();
    let layer = programs.iter().fold(Layer::new(), |layer, name| {
        layer.file(name, &[&program[..], &noise(name.len() as u64, 100_000), name.as_bytes()].concat())
    });
    let rig = Rig::new(layer);
    for name in &programs {
        let mut head = [0; 512];
        File::open(rig.path(name)).unwrap().read_exact(&mut head).unwrap();
    }
    // whatever looks into them lets others work
    let others = (0..64).map(|_| rig.runtime.spawn(tokio::task::yield_now()));
    let others: Vec<_> = others.collect();
    rig.runtime.block_on(async {
        for other in others {
            tokio::time::timeout(Duration::from_secs(20), other).await.expect("in time").unwrap();
        }
    });
    assert_eq!(fs::read(rig.path("program3")).unwrap()[..program.len()], program[..]);
}

#[test]
fn a_source_that_fails_gives_eio_and_works_again_later() {
    let contents = noise(1, 300_000);
    let rig = Rig::new(Layer::new().file("a", &contents));
    rig.packs.down.store(true, Ordering::SeqCst);
    let error = fs::read(rig.path("a")).expect_err("down");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(rig.mount().snapshot().reads_failed > 0);
    rig.packs.down.store(false, Ordering::SeqCst);
    assert_eq!(fs::read(rig.path("a")).expect("up"), contents);
}

#[test]
fn wrong_bytes_never_reach_a_reader() {
    let contents = noise(1, 2_000_000);
    let rig = Rig::new(Layer::new().file("a", &contents).file("b", b"tiny"));
    rig.packs.lies.store(true, Ordering::SeqCst);
    for path in ["a", "b", "a"] {
        let mut file = File::open(rig.path(path)).expect("opened");
        let mut read = Vec::new();
        let error = file.read_to_end(&mut read).expect_err("lies");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
        assert!(read.is_empty(), "{} bytes", read.len());
    }
    rig.packs.lies.store(false, Ordering::SeqCst);
    assert_eq!(fs::read(rig.path("a")).expect("honest"), contents);
    assert_eq!(fs::read(rig.path("b")).expect("honest"), b"tiny");
}

#[test]
fn names_are_answered_while_reads_wait_and_a_lazy_unmount_leaves_them_alone() {
    let contents = noise(1, 40_000);
    let layer = Layer::new().file("a", &contents).file("dir/b", b"x");
    let rig = Rig::with(layer, Packs::gated());
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let path = rig.path("a");
            std::thread::spawn(move || fs::read(path))
        })
        .collect();
    until("a request", || rig.packs.requests.load(Ordering::SeqCst) > 0);
    // of who looks up a name while the kernel takes in the answer to another, it may have dropped the entry again: the file is the same
    let names = [rig.path("a"), rig.path("a (deleted)")];
    let is_a = |fd: &fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|link| names.contains(&link));
    let open = || fs::read_dir("/proc/self/fd").expect("listed").flatten().filter(is_a).count();
    until("every reader has it open", || open() == 8);
    assert_eq!(fs::read_dir(rig.path("dir")).expect("listed").count(), 1);
    assert_eq!(fs::metadata(rig.path("dir/b")).expect("there").size(), 1);
    assert!(matches!(rig.mount().unmount(false), Err(MountError::InUse(_))));
    let umount =
        |flags: &[&str]| Command::new("umount").args(flags).arg(rig.path("")).stderr(Stdio::null()).status();
    assert!(!umount(&[]).expect("umount").success());
    assert!(umount(&["-l"]).expect("umount").success());
    assert!(!is_mounted(&rig.path("")));
    assert!(matches!(rig.mount().unmount(true), Err(MountError::Gone(_))));
    rig.packs.gate.as_ref().expect("gated").add_permits(1000);
    for reader in readers {
        assert_eq!(reader.join().expect("ended").expect("read"), contents);
    }
    rig.ended();
}

#[test]
fn unmounting_ends_the_mount_and_so_does_dropping_it() {
    let mut rig = Rig::new(Layer::new().file("a", b"x"));
    assert!(is_mounted(&rig.path("")));
    rig.mount().unmount(false).expect("unmounted");
    rig.ended();
    assert!(!is_mounted(&rig.path("")));
    // of all tests that run now, so what there was before is none of it
    let threads = || -> BTreeSet<_> {
        let tasks = fs::read_dir("/proc/self/task").expect("listed");
        tasks
            .map(|task| task.expect("listed").path())
            .filter(|task| {
                fs::read_to_string(task.join("comm"))
                    .is_ok_and(|name| name.starts_with("fuser-") || name.starts_with("lamina-mount"))
            })
            .collect()
    };
    rig.mount = None;
    let before = threads();
    let again = rig.start(MountConfig::new(rig.path(""))).expect("mounted again");
    assert_eq!(fs::read(rig.path("a")).expect("read"), b"x");
    let its: BTreeSet<_> = &threads() - &before;
    assert!(!its.is_empty());
    drop(again);
    assert!(!is_mounted(&rig.path("")));
    until("its threads end", || (&its & &threads()).is_empty());
}

#[test]
fn what_was_read_needs_no_source_after_a_remount() {
    let contents = noise(1, 1_000_000);
    let mut rig = Rig::new(Layer::new().file("a", &contents));
    assert_eq!(fs::read(rig.path("a")).expect("read"), contents);
    rig.mount = None;
    rig.packs.down.store(true, Ordering::SeqCst);
    rig.mount = Some(rig.start(MountConfig::new(rig.path(""))).expect("mounted again"));
    assert_eq!(fs::read(rig.path("a")).expect("read"), contents);
}

#[test]
fn a_mount_point_that_will_not_do_is_named_with_the_reason() {
    let rig = Rig::new(Layer::new().file("a", b"x"));
    let dir = rig.directory.path();
    let start = |path: &str| rig.start(MountConfig::new(dir.join(path))).err().expect(path);
    fs::write(dir.join("file"), "x").expect("written");
    fs::create_dir_all(dir.join("full/of")).expect("created");
    assert!(matches!(start("missing"), MountError::Missing(_)));
    assert!(matches!(start("file"), MountError::NotDirectory(_)));
    assert!(matches!(start("full"), MountError::NotEmpty(_)));
    assert!(matches!(start("mnt"), MountError::Occupied(_)));
    assert_eq!(fs::read(rig.path("a")).expect("undisturbed"), b"x");
}

#[test]
fn overlayfs_on_top_reads_writes_and_copies_up() {
    let contents = noise(1, 500_000);
    let rig = Rig::new(Layer::new().file("dir/a", &contents).file("dir/b", b"b").file("gone", b"x"));
    let dir = |name: &str| {
        let path = rig.directory.path().join(name);
        fs::create_dir_all(&path).expect("created");
        path
    };
    // upper and work lie on a file system of their own, since this one may be an overlay itself
    let (top, merged) = (dir("top"), dir("merged"));
    rustix::mount::mount("tmpfs", &top, "tmpfs", MountFlags::empty(), None).expect("mounted");
    let (upper, work) = (dir("top/upper"), dir("top/work"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        rig.path("").display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options).expect("a path");
    rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())
        .expect("mounted");
    let check = || -> io::Result<()> {
        assert_eq!(fs::read(merged.join("dir/a"))?, contents);
        fs::write(merged.join("dir/b"), "changed")?;
        assert_eq!(fs::read(merged.join("dir/b"))?, b"changed");
        assert_eq!(fs::read(rig.path("dir/b"))?, b"b");
        let mut copied = File::options().append(true).open(merged.join("dir/a"))?;
        io::Write::write_all(&mut copied, b"tail")?;
        assert_eq!(fs::read(merged.join("dir/a"))?.len(), contents.len() + 4);
        fs::remove_file(merged.join("gone"))?;
        assert!(!merged.join("gone").exists() && rig.path("gone").exists());
        Ok(())
    };
    let checked = check();
    rustix::mount::unmount(&merged, UnmountFlags::DETACH).expect("unmounted");
    rustix::mount::unmount(&top, UnmountFlags::DETACH).expect("unmounted");
    checked.expect("overlayfs works on top");
}
