//! Files that the kernel reads by itself, and the death of the node that told it to.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::until;
use memmap2::Mmap;

use crate::node::{daemon, kill, restored, successor};
use crate::rig::{DEADLINE, Rig, text};

const BIG_BYTES: usize = 3_000_000;
/// Of `include/uapi/asm-generic/fcntl.h`; libc does not have it.
const F_SETSIG: libc::c_int = 10;
const FILES: [(&str, u64); 3] = [("one", 1), ("two", 2), ("three", 3)];

/// An image of three big files, on a passthrough mount that has all of them as whole files.
fn mounted(rig: &Rig) -> Result<()> {
    let image = Image::new().layer(|layer| {
        FILES.iter().fold(layer, |layer, (name, seed)| layer.file(*name, noise(BIG_BYTES, *seed)))
    });
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    rig.ok(&["mount", "--passthrough", "--eager", &rig.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(rig.counter("whole_files")? == 3);
    Ok(())
}

fn of_mount(rig: &Rig, name: &str) -> Result<u64> {
    let stats = rig.json(&["stats"])?;
    stats["mounts"][0]["counters"][name].as_u64().with_context(|| format!("a counter {name}: {stats}"))
}

fn map(file: &File) -> Result<Mmap> {
    #[expect(unsafe_code, reason = "a mapping is what is tested")]
    // SAFETY: the image does not change
    let mapped = unsafe { Mmap::map(file) };
    Ok(mapped?)
}

/// How many whole files of the cache anybody has open, the kernel included: those on which it gives no lease.
fn open_wholes(rig: &Rig) -> Result<usize> {
    let mut open = 0;
    for entry in std::fs::read_dir(rig.path("cache/whole"))? {
        let file = File::open(entry?.path())?;
        #[expect(unsafe_code, reason = "rustix has no leases")]
        let ask = |command: libc::c_int, argument: libc::c_int| {
            // SAFETY: the descriptor is open, and both commands take a number
            unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }
        };
        // whoever opens it at this moment has a signal sent that nobody heeds
        ensure!(ask(F_SETSIG, libc::SIGURG) == 0);
        open += usize::from(ask(libc::F_SETLEASE, libc::F_WRLCK) != 0);
    }
    Ok(open)
}

fn is_right(path: &Path, seed: u64) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut bytes, truth) = (vec![0; BIG_BYTES], noise(BIG_BYTES, seed));
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == truth && map(&file)?[..] == truth[..], "wrong bytes of {}", path.display());
    Ok(())
}

#[test]
fn a_file_that_is_mapped_past_a_node_that_is_killed_can_be_opened_again_and_still_goes_past_the_next()
-> Result<()> {
    let rig = Rig::in_memory()?;
    mounted(&rig)?;
    let path = rig.path("mount").join("one");
    let file = File::open(&path)?;
    let mapped = map(&file)?;
    ensure!(of_mount(&rig, "passthrough_opens")? == 1);
    let before = daemon(&rig)?;
    kill(before)?;
    ensure!(mapped[..] == noise(BIG_BYTES, 1)[..], "while nobody serves");
    is_right(&path, 1)?;
    successor(&rig, before)?;
    is_right(&path, 1)?;
    ensure!(restored(&rig)? == ["resumed"]);
    ensure!(of_mount(&rig, "passthrough_opens")? == 2 && of_mount(&rig, "passthrough_misses")? == 0);
    // it is let go as if nothing had been
    let are_open = |count| until("whole files", DEADLINE, || Ok((open_wholes(&rig)? == count).then_some(())));
    are_open(1)?;
    drop((file, mapped));
    are_open(0)?;
    // once its bytes were read and compared
    until("it to be read past the next node", DEADLINE, || {
        is_right(&path, 1)?;
        Ok((of_mount(&rig, "passthrough_opens")? > 2).then_some(()))
    })?;
    rig.unmount()?;
    rig.node_ended()
}

#[test]
fn programs_that_open_read_and_map_notice_nothing_of_a_node_that_is_killed_again_and_again() -> Result<()> {
    let rig = Rig::in_memory()?;
    mounted(&rig)?;
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|n| {
            let (stop, mounted) = (Arc::clone(&stop), rig.path("mount"));
            std::thread::spawn(move || -> Result<usize> {
                for round in 0.. {
                    let (name, seed) = FILES[(n + round) % 3];
                    is_right(&mounted.join(name), seed)?;
                    if stop.load(Ordering::SeqCst) {
                        return Ok(round);
                    }
                }
                unreachable!("without end")
            })
        })
        .collect();
    for _ in 0..6 {
        let before = daemon(&rig)?;
        kill(before)?;
        is_right(&rig.path("mount").join("two"), 2)?;
        successor(&rig, before)?;
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        let rounds = reader.join().expect("readers do not panic")?;
        ensure!(rounds > 6, "{rounds} rounds of reading");
    }
    ensure!(of_mount(&rig, "reads_failed")? == 0);
    rig.unmount()
}

#[test]
fn a_file_that_pages_are_read_of_is_so_under_the_next_node_while_it_is_open() -> Result<()> {
    let rig = Rig::in_memory()?;
    let image = Image::new().layer(|layer| layer.file("one", noise(BIG_BYTES, 1)));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    rig.ok(&["mount", "--passthrough", "--no-boot", &rig.name("a:t"), &text(&rig.path("mount"))])?;
    let path = rig.path("mount").join("one");
    let file = File::open(&path)?;
    is_right(&path, 1)?;
    until("a whole file", DEADLINE, || {
        is_right(&path, 1)?;
        Ok((rig.counter("whole_files")? == 1).then_some(()))
    })?;
    let before = daemon(&rig)?;
    kill(before)?;
    successor(&rig, before)?;
    is_right(&path, 1)?;
    ensure!(of_mount(&rig, "passthrough_opens")? == 0, "two ways at once");
    drop(file);
    until("it to be read past the node", DEADLINE, || {
        is_right(&path, 1)?;
        Ok((of_mount(&rig, "passthrough_opens")? > 0).then_some(()))
    })?;
    rig.unmount()
}

#[test]
fn an_image_for_whose_copies_there_is_no_room_is_filled_all_the_same() -> Result<()> {
    let rig = Rig::in_memory()?;
    let image = Image::new()
        .layer(|layer| (0..4).fold(layer, |layer, n| layer.file(format!("file{n}"), noise(BIG_BYTES, n))));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let (name, mount) = (rig.name("a:t"), text(&rig.path("mount")));
    // of 12 MB of frames the first cache holds three quarters and no copy more, the second one copy of four
    for (cap, copies) in [("16", 0), ("20", 1)] {
        rig.ok(&["mount", "--passthrough", "--eager", "--cache-mib", cap, &name, &mount])?;
        let stats = rig.json(&["stats"])?;
        ensure!(stats["fills"][0]["state"] == "done", "{stats}");
        ensure!(rig.counter("whole_files")? == copies && rig.counter("evicted_segments")? == 0, "{stats}");
        for n in 0..4 {
            is_right(&rig.path("mount").join(format!("file{n}")), n)?;
        }
        // copies are made of nothing that has to come again, in no turns
        ensure!(rig.counter("evicted_whole_files")? == 0 && rig.counter("whole_files")? == copies);
        rig.unmount()?;
        rig.node_ended()?;
        rig.ok(&["mount", "--passthrough", "--fill", "all", "--cache-mib", cap, &name, &mount])?;
        until("it to be filled", DEADLINE, || {
            Ok((rig.json(&["stats"])?["fills"][0]["state"] == "done").then_some(()))
        })?;
        ensure!(rig.counter("evicted_segments")? == 0);
        rig.unmount()?;
        rig.node_ended()?;
    }
    Ok(())
}
