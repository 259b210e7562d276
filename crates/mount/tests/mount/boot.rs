//! Boot packs: what they bring, and what happens when they bring something else.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lamina_image::{BOOT_HEAD_BYTES, BootError, Digest};
use lamina_mount::{BootFailure, BootUse, MountConfig, Record};

use crate::rig::{Layer, Packs, Rig, noise, until};

/// Large enough for several frames.
fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let text = b"what compresses well ".repeat(40_000);
    vec![
        ("large", noise(1, 3_000_123)),
        ("text", text),
        ("small", b"small".to_vec()),
        ("other", noise(2, 100_000)),
    ]
}

fn rig(packs: Packs) -> Rig {
    Rig::with(contents().iter().fold(Layer::new(), |layer, (path, bytes)| layer.file(path, bytes)), packs)
}

#[track_caller]
fn all_right(rig: &Rig) {
    for (path, bytes) in contents() {
        assert!(fs::read(rig.path(path)).expect("read") == bytes, "{path}");
    }
}

#[test]
fn what_a_boot_pack_brought_is_read_without_asking() {
    let rig = rig(Packs::default());
    let pack = rig.boot_pack(&["text", "large", "small"]);
    rig.boot(&pack).expect("booted");
    let (before, requests) = (rig.mount().snapshot(), rig.packs.requests.load(Ordering::SeqCst));
    assert_eq!(before.boot_bytes, pack.len() as u64);
    assert_eq!((before.boot_names, before.boot_refused, before.boot_failed), (4, 0, 0));
    for (path, bytes) in contents().iter().take(3) {
        assert!(&fs::read(rig.path(path)).expect("read") == bytes, "{path}");
    }
    let after = rig.mount().snapshot();
    // a kernel that reclaims memory all the time may have dropped some of it already: then the boot pack is asked again
    assert_eq!(after.reads - before.reads, after.boot_again, "{after:?}");
    assert!(rig.packs.requests.load(Ordering::SeqCst) - requests <= after.boot_again, "{after:?}");
    assert_eq!(after.reads_waited, 0, "{after:?}");
    let lookups = after.lookups;
    fs::metadata(rig.path("not there")).expect_err("it is not there");
    assert_eq!(rig.mount().snapshot().lookups, lookups, "the kernel knows it already");
    all_right(&rig);
}

/// What the boot calls the directory of its files.
const BROUGHT: &str = ".lamina-boot";

#[test]
fn files_of_a_boot_pack_are_made_known_in_a_directory_that_nobody_else_finds() {
    let rig = rig(Packs::default());
    let gone = |when: &str| {
        let found = fs::metadata(rig.path(BROUGHT)).expect_err(when);
        assert_eq!(found.kind(), std::io::ErrorKind::NotFound, "{when}");
    };
    gone("before");
    let pack = rig.boot_pack(&["text", "large", "small"]);
    rig.boot(&pack).expect("booted");
    let seen = rig.mount().snapshot();
    assert_eq!((seen.boot_files, seen.boot_refused), (3, 0), "{seen:?}");
    gone("afterwards");
    let listed = fs::read_dir(rig.path("")).expect("listed").count();
    assert_eq!(listed, contents().len());
    all_right(&rig);
}

#[test]
fn an_image_that_has_a_file_of_that_name_keeps_it() {
    let layer = Layer::new().file(&format!("{BROUGHT}/own"), b"its own").file("file", b"bytes");
    let rig = Rig::with(layer, Packs::default());
    let pack = rig.boot_pack(&["file", ".lamina-boot/own"]);
    rig.boot(&pack).expect("booted");
    let seen = rig.mount().snapshot();
    assert_eq!((seen.boot_files, seen.boot_refused, seen.boot_stored_runs), (0, 0, 2), "{seen:?}");
    assert_eq!(fs::read(rig.path(".lamina-boot/own")).expect("read"), b"its own");
}

#[test]
fn directories_that_a_start_listed_are_known_when_the_next_one_lists_them() {
    let files = ["d/one", "d/two", "d/sub/three", "e/four"];
    let rig =
        Rig::with(files.iter().fold(Layer::new(), |layer, path| layer.file(path, b"x")), Packs::default());
    let pack = rig.boot_pack_listing(&["d/one"], &["d", "d/sub"]);
    rig.boot(&pack).expect("booted");
    until("they are listed", || rig.mount().snapshot().boot_dirs == 2);
    let before = rig.mount().snapshot();
    assert_eq!(before.boot_failed, 0);
    let names = |dir: &str| {
        let entries = fs::read_dir(rig.path(dir)).expect("listed");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(
        (names("d"), names("d/sub")),
        (vec!["one".into(), "sub".into(), "two".into()], vec!["three".into()])
    );
    assert_eq!(rig.mount().snapshot().readdirs, before.readdirs, "the kernel knows them");
    assert_eq!(names("e"), ["four"]);
    assert!(rig.mount().snapshot().readdirs > before.readdirs);
}

#[test]
fn an_unmount_right_after_a_boot_waits_for_no_more_than_one_listing() {
    let dirs: Vec<String> = (0..500).map(|number| format!("d{number}")).collect();
    let file = |layer: Layer, dir: &String| layer.file(&format!("{dir}/f"), b"x");
    let rig = Rig::with(dirs.iter().fold(Layer::new(), file), Packs::default());
    let listed: Vec<&str> = dirs.iter().map(String::as_str).collect();
    let pack = rig.boot_pack_listing(&["d0/f"], &listed);
    rig.boot(&pack).expect("booted");
    rig.mount().unmount(false).expect("nothing of the boot is in its way");
    rig.ended();
}

#[test]
fn of_the_pages_that_a_boot_pack_stored_those_that_were_read_or_mapped_are_used_however_often_it_is_asked() {
    const PAGE: u64 = 4096;
    let rig = rig(Packs::default());
    let stored: u64 =
        contents().iter().take(3).map(|(_, bytes)| (bytes.len() as u64).next_multiple_of(PAGE)).sum();
    let used = || rig.mount().boot_use().expect("this test needs CAP_SYS_ADMIN");
    assert_eq!(used(), None, "nothing is stored yet");
    let pack = rig.boot_pack(&["text", "large", "small"]);
    rig.boot(&pack).expect("booted");
    until("the boot opens nothing any more", || used().is_some());
    let all = |used_bytes, dropped_bytes| {
        let unused_bytes = stored - used_bytes - dropped_bytes;
        Some(BootUse { used_bytes, unused_bytes, unseen_bytes: 0, dropped_bytes })
    };
    // the boot itself opens the smallest one, and reads nothing of it
    assert_eq!((used(), used()), (all(0, 0), all(0, 0)));
    let open = |path: &str| fs::File::open(rig.path(path)).expect("opened");
    let (large, text) = (open("large"), open("text"));
    large.read_exact_at(&mut vec![0; 65_536], 1 << 20).expect("read");
    assert_eq!(fs::read(rig.path("small")).expect("read"), b"small");
    assert_eq!((used(), used()), (all(17 * PAGE, 0), all(17 * PAGE, 0)));
    #[expect(unsafe_code, reason = "the file is immutable, so the mapping is")]
    // SAFETY: nothing can change the file under the mapping, since the mount is read-only.
    let map = unsafe { memmap2::Mmap::map(&text) }.expect("mapped");
    assert_eq!(used(), all(17 * PAGE, 0), "nothing of it was touched");
    assert_eq!(map[300_000], contents()[1].1[300_000]);
    let around = used().expect("as before").used_bytes - 17 * PAGE;
    assert!((PAGE..=16 * PAGE).contains(&around), "{around}");
    drop(map);
    assert_eq!(used(), all(17 * PAGE + around, 0), "also once it is mapped no more");
    rustix::fs::fadvise(&large, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
    assert_eq!(used(), all(PAGE + around, 3_000_123_u64.next_multiple_of(PAGE)));
    assert_eq!(rig.mount().snapshot().boot_again, 0, "what was dropped stays so");
    fs::metadata(rig.path(BROUGHT)).expect_err("nobody else finds the directory");
    rig.mount().unmount(true).expect("unmounted");
    assert_eq!(used(), None, "it is not there any more");
}

#[test]
fn who_looks_at_what_was_used_while_a_boot_pack_comes_is_not_in_its_way() {
    let files: Vec<String> = (0..1000).map(|number| format!("d{}/f{number}", number % 50)).collect();
    let paths: Vec<&str> = files.iter().map(String::as_str).collect();
    // of another mount, since to make it is to look its names up
    let pack = small_files(&files).boot_pack(&paths);
    let rig = small_files(&files);
    let (is_over, begun) = (AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(60) {
                rig.mount().boot_use().expect("seen");
            }
        });
        let booted = rig.boot(&pack);
        is_over.store(true, Ordering::Relaxed);
        booted.expect("booted");
    });
    until("the boot opens nothing any more", || rig.mount().boot_use().expect("seen").is_some());
    let (seen, used) = (rig.mount().snapshot(), rig.mount().boot_use().expect("seen").expect("all has come"));
    assert_eq!((seen.boot_refused, seen.boot_stored_runs), (0, 1000), "{seen:?}");
    assert_eq!(used, BootUse { unused_bytes: 1000 * 4096, ..BootUse::default() });
}

#[test]
fn an_unmount_is_not_refused_because_somebody_looks_at_what_was_used() {
    let files: Vec<String> = (0..300).map(|number| format!("f{number}")).collect();
    let paths: Vec<&str> = files.iter().map(String::as_str).collect();
    let rig = small_files(&files);
    rig.boot(&rig.boot_pack(&paths)).expect("booted");
    until("the boot opens nothing any more", || rig.mount().boot_use().expect("seen").is_some());
    let (is_over, looks, begun) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(60) {
                    let seen = matches!(rig.mount().boot_use(), Ok(Some(_)));
                    looks.fetch_add(usize::from(seen), Ordering::Relaxed);
                }
            });
        }
        until("some look all the time", || looks.load(Ordering::Relaxed) > 8);
        let unmounted = rig.mount().unmount(false);
        is_over.store(true, Ordering::Relaxed);
        unmounted.expect("it is not in use");
    });
    rig.ended();
}

#[test]
fn pages_that_the_kernel_drops_come_from_the_boot_pack_again() {
    let rig = rig(Packs::default());
    let pack = rig.boot_pack(&["text", "large", "small"]);
    rig.boot(&pack).expect("booted");
    let file = fs::File::open(rig.path("text")).expect("opened");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
    all_right(&rig);
    let seen = rig.mount().snapshot();
    assert!(seen.boot_again > 0, "{seen:?}");
}

#[test]
fn a_boot_pack_with_any_part_damaged_is_given_up_and_reading_stays_right() {
    let pack = rig(Packs::default()).boot_pack(&["large", "text", "other"]);
    let end = pack.len() - 1;
    for at in [0, 9, 30, 70, 100, BOOT_HEAD_BYTES, BOOT_HEAD_BYTES + 40, end / 2, end] {
        let rig = rig(Packs::default());
        let mut damaged = pack.to_vec();
        damaged[at] ^= 1;
        rig.boot(&damaged.into()).expect_err("damaged");
        assert_eq!(rig.mount().snapshot().boot_failed, 1);
        all_right(&rig);
    }
}

#[test]
fn a_boot_pack_cut_off_is_given_up_and_reading_stays_right() {
    let pack = rig(Packs::default()).boot_pack(&["large", "text"]);
    for len in [0, 10, BOOT_HEAD_BYTES, BOOT_HEAD_BYTES + 10, pack.len() / 2, pack.len() - 1] {
        let rig = rig(Packs::default());
        let failure = rig.boot(&pack.slice(..len)).expect_err("cut off");
        assert!(matches!(failure, BootFailure::Length(_) | BootFailure::Bad(_)), "{failure}");
        all_right(&rig);
    }
}

#[test]
fn a_boot_pack_of_another_image_is_not_believed() {
    let other = Rig::new(Layer::new().file("large", &noise(9, 3_000_123)));
    let pack = other.boot_pack(&["large"]);
    let rig = rig(Packs::default());
    let mut renamed = pack.to_vec();
    renamed[28] ^= 1;
    let failure = rig.boot(&renamed.into()).expect_err("another tree");
    assert!(matches!(failure, BootFailure::Bad(BootError::OtherImage)), "{failure}");
    all_right(&rig);
}

#[test]
fn a_boot_pack_that_is_not_there_or_does_not_come_leaves_an_ordinary_mount() {
    let rig = rig(Packs::default());
    rig.packs.down.store(true, Ordering::SeqCst);
    let failure = rig.boot(&Bytes::from(vec![1; 1000])).expect_err("down");
    assert!(matches!(failure, BootFailure::Source(_)), "{failure}");
    rig.packs.down.store(false, Ordering::SeqCst);
    all_right(&rig);
}

#[test]
fn reads_during_a_boot_are_right_whichever_way_they_come() {
    let rig = rig(Packs::gated());
    let pack = rig.boot_pack(&["large", "text", "small", "other"]);
    let gate = rig.packs.gate.as_ref().expect("gated");
    std::thread::scope(|scope| {
        let booting = scope.spawn(|| rig.boot(&pack));
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(|| all_right(&rig))).collect();
        // one answer after the other, for as long as anybody asks
        while !(booting.is_finished() && readers.iter().all(std::thread::ScopedJoinHandle::is_finished)) {
            gate.add_permits(1);
            std::thread::yield_now();
        }
        booting.join().expect("no panic").expect("booted");
    });
}

#[test]
fn while_a_boot_pack_comes_the_kernel_asks_for_no_page_that_is_not_read() {
    let rig = rig(Packs::gated());
    let pack = rig.boot_pack(&["text"]);
    let gate = rig.packs.gate.as_ref().expect("gated");
    std::thread::scope(|scope| {
        let booting = scope.spawn(|| rig.boot(&pack));
        until("it asks", || rig.packs.requests.load(Ordering::SeqCst) > 0);
        until("it is one page", || rig.window() == 4);
        gate.add_permits(1);
        booting.join().expect("no panic").expect("booted");
    });
    assert_eq!(rig.window(), MountConfig::new(rig.path("")).read_ahead_kb);
}

#[test]
fn a_boot_pack_is_fetched_at_once_and_opened_but_for_its_beginning_when_the_processors_are_free() {
    let rig = rig(Packs::default());
    let pack = rig.boot_pack(&["text", "small"]);
    let (free, is_free) = tokio::sync::oneshot::channel::<()>();
    std::thread::scope(|scope| {
        let booting = scope.spawn(|| rig.boot_once(&pack, async move { is_free.await.expect("told") }));
        until("it has come", || rig.packs.bytes.load(Ordering::SeqCst) == pack.len() as u64);
        until("names are looked up", || rig.mount().snapshot().boot_names > 0);
        until("the beginning is there", || rig.mount().snapshot().boot_stored_bytes == 448 << 10);
        // which takes longer than opening all of it does
        assert_eq!(fs::read(rig.path("large")).expect("read").len(), 3_000_123);
        assert_eq!(rig.mount().snapshot().boot_stored_bytes, 448 << 10, "and no more");
        free.send(()).expect("heard");
        booting.join().expect("no panic").expect("booted");
    });
    assert_eq!(rig.mount().snapshot().boot_stored_bytes, 840_005);
    all_right(&rig);
}

#[test]
fn a_boot_pack_that_is_damaged_before_there_is_a_mount_is_given_up_when_there_is_one() {
    let rig = rig(Packs::default());
    let mut pack = rig.boot_pack(&["text", "small"]).to_vec();
    *pack.last_mut().expect("bytes") ^= 1;
    let stream = rig.stream(&pack.into(), std::future::ready(()));
    until("it has come", || rig.packs.bytes.load(Ordering::SeqCst) > 0);
    assert!(matches!(rig.boot_from(stream), Err(BootFailure::Bad(BootError::Damaged(..)))));
    all_right(&rig);
}

#[test]
fn a_boot_pack_that_is_too_much_before_there_is_a_mount_waits_for_it_and_one_without_is_dropped() {
    let large = noise(3, 40 << 20);
    let rig = Rig::new(Layer::new().file("large", &large));
    let pack = rig.boot_pack(&["large"]);
    let dropped = rig.stream(&pack, std::future::ready(()));
    let stream = rig.stream(&pack, std::future::ready(()));
    until("it has come as far as it may", || rig.packs.bytes.load(Ordering::SeqCst) > 0);
    drop(dropped);
    rig.boot_from(stream).expect("booted");
    assert_eq!(rig.mount().snapshot().boot_stored_bytes, 40 << 20);
    let threads = || fs::read_dir("/proc/self/task").expect("listed").flatten();
    let names = || threads().filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    until("no thread is left", || !names().any(|name| name.trim() == "lamina-boot"));
}

/// An image with these files, one byte each.
fn small_files(files: &[String]) -> Rig {
    Rig::with(files.iter().fold(Layer::new(), |layer, path| layer.file(path, b"x")), Packs::default())
}

/// How many entries a directory has.
fn listed(rig: &Rig, dir: &str) -> usize {
    fs::read_dir(rig.path(dir)).expect("listed").count()
}

#[test]
fn a_directory_of_which_much_is_wanted_is_listed_and_its_names_are_not_looked_up() {
    let others: Vec<String> = (0..400).map(|number| format!("o{number}")).collect();
    let much: Vec<String> = (0..20).map(|number| format!("d/{number}")).collect();
    let files = others.iter().map(|dir| format!("{dir}/f")).chain(much.iter().cloned());
    let rig = small_files(&files.collect::<Vec<_>>());
    let wanted: Vec<&str> = much.iter().map(String::as_str).collect();
    let dirs: Vec<&str> = others.iter().map(String::as_str).chain(["d"]).collect();
    let pack = rig.boot_pack_listing(&wanted, &dirs);
    let rig = rig.recording();
    rig.boot(&pack).expect("booted");
    let booted = rig.mount().snapshot();
    assert_eq!(listed(&rig, "d"), 20);
    assert!(booted.lookups < 10 && booted.boot_stored_runs == 20, "{booted:?}");
    until("all are listed", || rig.mount().snapshot().boot_dirs == 401);
    let all = rig.mount().snapshot().readdirs;
    assert_eq!(listed(&rig, "d"), 20);
    assert_eq!(rig.mount().snapshot().readdirs, all, "the kernel knows it");
}

#[test]
fn names_that_are_wanted_of_a_directory_become_known_together_and_its_listing_is_the_kernels_afterwards() {
    let files =
        |dir: &str, count| (0..count).map(move |number| format!("{dir}/{number}")).collect::<Vec<_>>();
    // more than an answer holds, and a few of many
    let (many, few) = (files("many", 1500), files("few", 20));
    let rig = small_files(&[&many[..], &few].concat());
    let wanted: Vec<&str> = many.iter().chain(&few[..2]).map(String::as_str).collect();
    let pack = rig.boot_pack(&wanted);
    let rig = rig.recording();
    rig.boot(&pack).expect("booted");
    let booted = rig.mount().snapshot();
    assert!(booted.boot_names > 1500 && booted.lookups < 10, "{} lookups", booted.lookups);
    assert_eq!((booted.boot_dirs, booted.readdirs, booted.boot_stored_runs), (0, 0, 1502));
    for path in &wanted {
        assert_eq!(fs::read(rig.path(path)).expect("read"), b"x", "{path}");
    }
    assert_eq!(rig.mount().snapshot().lookups, booted.lookups, "the kernel knows them");
    // whoever lists one has all of it, and the next has it of the kernel
    assert_eq!((listed(&rig, "many"), listed(&rig, "few")), (1500, 20));
    let readdirs = rig.mount().snapshot().readdirs;
    assert!(readdirs > 0);
    assert_eq!((listed(&rig, "many"), listed(&rig, "few")), (1500, 20));
    assert_eq!(rig.mount().snapshot().readdirs, readdirs, "the kernel has kept them");
}

#[test]
fn an_unmount_ends_a_boot() {
    let rig = rig(Packs::gated());
    let pack = rig.boot_pack(&["large", "text"]);
    std::thread::scope(|scope| {
        let booting = scope.spawn(|| rig.boot(&pack));
        until("it asks", || rig.packs.requests.load(Ordering::SeqCst) > 0);
        rig.mount().unmount(false).expect("unmounted");
        assert!(matches!(booting.join().expect("no panic"), Err(BootFailure::Refused)));
    });
}

#[test]
fn a_boot_pack_is_no_longer_waited_for_once_files_are_read_from_end_to_end() {
    let (medium, large) = (noise(3, 12 << 20), noise(4, 40 << 20));
    let rig = Rig::new(Layer::new().file("medium", &medium).file("large", &large).file("small", b"small"));
    let pack = rig.boot_pack(&["small"]);
    *rig.packs.silent.lock() = Some(Digest::of(&pack).try_into().expect("a sha256"));
    std::thread::scope(|scope| {
        let booting = scope.spawn(|| rig.boot(&pack));
        until("it asks", || rig.packs.requests.load(Ordering::SeqCst) > 0);
        assert!(fs::read(rig.path("medium")).expect("read") == medium);
        assert!(!booting.is_finished(), "a start reads that");
        assert!(fs::read(rig.path("large")).expect("read") == large);
        until("it ends", || booting.is_finished());
        assert!(matches!(booting.join().expect("no panic"), Err(BootFailure::Overtaken)));
    });
    assert_eq!(rig.mount().snapshot().boot_failed, 0, "nothing was wrong with it");
}

#[test]
fn a_start_is_recorded_page_by_page_and_in_order() {
    let rig = rig(Packs::default());
    rig.mount().unmount(false).expect("unmounted");
    rig.ended();
    let config = MountConfig { record: Record::Exact, ..MountConfig::new(rig.path("")) };
    let mount = rig.start(config).expect("mounted again");
    assert_eq!(mount.quiet(), None);
    let file = fs::File::open(rig.path("other")).expect("opened");
    #[expect(unsafe_code, reason = "the file is immutable, so the mapping is")]
    // SAFETY: nothing can change the file under the mapping, since the mount is read-only.
    let map = unsafe { memmap2::Mmap::map(&file) }.expect("mapped");
    let touched = [50_000, 5_000, 90_000].map(|at| {
        std::hint::black_box(map[at]);
        at as u64 / 4096
    });
    assert!(mount.quiet() < Some(Duration::from_secs(20)));
    fs::metadata(rig.path("absent")).expect_err("absent");
    fs::read_dir(rig.path("")).expect("listed").for_each(drop);
    let trace = mount.end_start().expect("recorded");
    let ino = rig.tree.lookup(lamina_image::Ino::ROOT, b"other").expect("sound").expect("there");
    let pages: Vec<u64> = trace
        .runs
        .iter()
        .filter(|run| run.ino == ino)
        .flat_map(|run| run.first..run.first + run.pages)
        .collect();
    assert_eq!(pages, touched);
    assert!(trace.names.iter().any(|(_, name)| name == b"absent"));
    assert!(trace.names.contains(&(lamina_image::Ino::ROOT, b".".to_vec())), "it was listed");
    assert_eq!(mount.end_start(), None);
}

#[test]
fn what_a_boot_looks_up_and_lists_itself_is_not_recorded_as_the_starts() {
    let files = ["d/one", "d/two", "e/three"];
    let rig =
        Rig::with(files.iter().fold(Layer::new(), |layer, path| layer.file(path, b"x")), Packs::default());
    let pack = rig.boot_pack_listing(&["d/one"], &["d"]);
    let rig = rig.recording();
    rig.boot(&pack).expect("booted");
    until("it is listed", || rig.mount().snapshot().boot_dirs == 1);
    fs::read(rig.path("e/three")).expect("read");
    fs::metadata(rig.path("absent")).expect_err("absent");
    let trace = rig.mount().end_start().expect("recorded");
    let mut names: Vec<_> = trace.names.iter().map(|(_, name)| name.escape_ascii().to_string()).collect();
    names.sort();
    assert_eq!(names, ["absent", "e", "three"]);
}

#[test]
fn of_a_long_stream_only_the_beginning_is_recorded() {
    let rig = Rig::new(Layer::new().file("other", &noise(10, 8192)).file("weights", &noise(9, 4 << 20)));
    rig.mount().unmount(false).expect("unmounted");
    rig.ended();
    let recorded_run_bytes = 1 << 20;
    let config = MountConfig { record: Record::Start, recorded_run_bytes, ..MountConfig::new(rig.path("")) };
    let mount = rig.start(config).expect("mounted again");
    fs::read(rig.path("weights")).expect("read");
    fs::read(rig.path("other")).expect("read");
    assert!(mount.quiet() < Some(Duration::from_secs(20)), "the stream keeps the start going");
    let trace = mount.end_start().expect("recorded");
    let pages_of = |name: &[u8]| {
        let ino = rig.tree.lookup(lamina_image::Ino::ROOT, name).expect("sound").expect("there");
        trace.runs.iter().filter(|run| run.ino == ino).map(|run| run.pages).sum::<u64>()
    };
    let weights = pages_of(b"weights") * 4096;
    assert!((recorded_run_bytes / 2..2 * recorded_run_bytes).contains(&weights), "{weights}");
    assert!(pages_of(b"other") >= 2, "what is not in a stream is recorded all the same");
}
