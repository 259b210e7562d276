//! kill -9 of the daemon, of its holder, and of both.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::{run, until};

use crate::node::{daemon, holder, kill, restored, successor};
use crate::proxy::Proxy;
use crate::rig::{DEADLINE, Rig, text};

const BIG_BYTES: usize = 4_000_000;
/// A daemon is back sooner than this, however busy the machine.
const BACK: Duration = Duration::from_secs(20);

fn image(rig: &Rig) -> Result<()> {
    let image = Image::new().layer(|layer| {
        let layer = layer.file("big", noise(BIG_BYTES, 5)).file("small", "s").dir("d");
        (0..50).fold(layer, |layer, n| layer.file(format!("d/{n}"), format!("file {n}")))
    });
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")]).map(drop)
}

/// Drops what the kernel has of a file, so that the next read asks the daemon.
fn forget_pages(file: &File) -> Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

#[test]
fn reads_that_were_under_way_when_the_node_was_killed_get_their_bytes() -> Result<()> {
    let rig = Rig::new()?;
    image(&rig)?;
    let (proxy, hanging) = Proxy::hanging(&rig.address)?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--no-boot", "--no-trace", &proxy.name("a:t"), &text(&mounted)])?;
    let before = daemon(&rig)?;
    let open = File::open(mounted.join("big"))?;
    let readers: Vec<_> = (0..4)
        .map(|part| {
            let path = mounted.join("big");
            std::thread::spawn(move || -> Result<(usize, Vec<u8>)> {
                let (from, mut bytes) = (part * BIG_BYTES / 4, vec![0; BIG_BYTES / 4]);
                File::open(path)?.read_exact_at(&mut bytes, from as u64)?;
                Ok((from, bytes))
            })
        })
        .collect();
    until("four reads under way", DEADLINE, || Ok((proxy.faults() >= 4).then_some(())))?;
    ensure!(readers.iter().all(|reader| !reader.is_finished()), "a read did not wait for its bytes");
    kill(before)?;
    hanging.store(false, Ordering::SeqCst);
    // names too, while nobody serves
    ensure!(fs::read_dir(mounted.join("d"))?.count() == 50);
    successor(&rig, before)?;
    let truth = noise(BIG_BYTES, 5);
    for reader in readers {
        let (from, bytes) = reader.join().expect("readers do not panic")?;
        ensure!(bytes == truth[from..from + bytes.len()], "wrong bytes at {from}");
    }
    let mut bytes = vec![0; BIG_BYTES];
    open.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == truth, "a file that was open before");
    drop(open);
    ensure!(restored(&rig)? == ["resumed"]);
    rig.unmount()?;
    ensure!(mounted_on(&mounted)?.is_none());
    rig.node_ended()
}

#[test]
fn programs_that_read_map_and_run_notice_nothing_of_a_node_that_is_killed_again_and_again() -> Result<()> {
    let rig = Rig::new()?;
    image(&rig)?;
    let mounted = rig.mount_plain("a:t")?;
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|n| {
            let (stop, path) = (Arc::clone(&stop), mounted.join("big"));
            std::thread::spawn(move || read_on(&stop, &path, n))
        })
        .collect();
    let mut longest = Duration::ZERO;
    for _ in 0..6 {
        let before = daemon(&rig)?;
        kill(before)?;
        let begun = Instant::now();
        ensure!(fs::read(mounted.join("small"))? == b"s");
        successor(&rig, before)?;
        longest = longest.max(begun.elapsed());
    }
    stop.store(true, Ordering::SeqCst);
    let mut rounds = 0;
    for reader in readers {
        rounds += reader.join().expect("readers do not panic")?;
    }
    ensure!(rounds > 6, "{rounds} rounds of reading");
    ensure!(longest < BACK, "it took {longest:?}");
    rig.unmount()
}

/// Reads the file through new and old descriptors until it shall stop; how often.
fn read_on(stop: &AtomicBool, path: &Path, seed: u64) -> Result<usize> {
    let truth = noise(BIG_BYTES, 5);
    let (open, mut rounds) = (File::open(path)?, 0);
    while !stop.load(Ordering::SeqCst) {
        forget_pages(&open)?;
        let mut at = (seed * 977) as usize;
        while at < BIG_BYTES {
            let mut bytes = [0; 512];
            let len = open.read_at(&mut bytes, at as u64).with_context(|| format!("read at {at}"))?;
            ensure!(bytes[..len] == truth[at..at + len], "wrong bytes at {at}");
            at += 40_961;
        }
        ensure!(fs::read(path)? == truth, "wrong bytes");
        rounds += 1;
    }
    Ok(rounds)
}

#[test]
fn a_node_whose_holder_dies_first_gets_another_and_survives_as_before() -> Result<()> {
    let rig = Rig::new()?;
    image(&rig)?;
    let mounted = rig.mount_plain("a:t")?;
    let (before, first) = (daemon(&rig)?, holder(&rig)?);
    kill(first)?;
    let second = until("another holder", DEADLINE, || Ok(holder(&rig).ok().filter(|pid| *pid != first)))?;
    ensure!(daemon(&rig)? == before, "the daemon went with its holder");
    // it has everything once it is quiet: what it is told comes before it sees the daemon's end
    kill(before)?;
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    successor(&rig, before)?;
    ensure!(holder(&rig)? == second && restored(&rig)? == ["resumed"]);
    rig.unmount()?;
    rig.node_ended()?;
    until("the holder to end", DEADLINE, || Ok(holder_words(second).is_none().then_some(())))
}

fn holder_words(pid: rustix::process::Pid) -> Option<Vec<u8>> {
    fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|words| !words.is_empty())
}

#[test]
fn when_holder_and_node_are_both_gone_the_next_one_takes_the_dead_mount_away_and_mounts_it_again()
-> Result<()> {
    let rig = Rig::new()?;
    image(&rig)?;
    let mounted = rig.mount_plain("a:t")?;
    let open = File::open(mounted.join("big"))?;
    // the holder cannot start another, and the daemon no other holder
    let (daemon, holder) = (daemon(&rig)?, holder(&rig)?);
    run(Command::new("kill").args(["-STOP", &holder.to_string()]))?;
    kill(daemon)?;
    kill(holder)?;
    until("the mount to be dead", DEADLINE, || {
        forget_pages(&open)?;
        Ok(open.read_at(&mut [0; 10], 0).is_err().then_some(()))
    })?;
    drop(open);
    let second: PathBuf = rig.path("scratch");
    rig.ok(&["mount", &rig.name("a:t"), &text(&second)])?;
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5), "the mount of before is not there again");
    let mut how = restored(&rig)?;
    how.sort();
    ensure!(how == ["mounted again", "requested"], "{how:?}");
    rig.ok(&["unmount", &text(&second)])?;
    rig.unmount()
}

#[test]
fn a_lazily_unmounted_image_is_served_to_who_has_it_open_beyond_a_kill() -> Result<()> {
    let rig = Rig::new()?;
    image(&rig)?;
    let mounted = rig.mount_plain("a:t")?;
    let open = File::open(mounted.join("big"))?;
    rig.ok(&["unmount", "--lazy", &text(&mounted)])?;
    let before = daemon(&rig)?;
    kill(before)?;
    let mut bytes = vec![0; BIG_BYTES];
    open.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == noise(BIG_BYTES, 5));
    successor(&rig, before)?;
    ensure!(rig.json(&["stats"])?["mounts"].as_array().map(Vec::len) == Some(0));
    drop(open);
    rig.node_ended()
}
