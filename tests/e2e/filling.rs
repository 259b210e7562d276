//! What is fetched though nobody reads it, and what stays.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::until;

use crate::disk::segment_bytes;
use crate::rig::{DEADLINE, Rig, text};

const BYTES: usize = 3_000_000;

/// An image `name` of two files that do not compress.
fn push(rig: &Rig, name: &str, seed: u64, bytes: usize) -> Result<()> {
    let image =
        Image::new().layer(|layer| layer.file("one", noise(bytes, seed)).file("two", noise(bytes, seed + 1)));
    let source = rig.layout(&format!("layout-{seed}"), &image)?;
    rig.ok(&["push", &source, &rig.name(name)]).map(drop)
}

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    push(&rig, "a:t", 5, BYTES)?;
    Ok(rig)
}

fn mount(rig: &Rig, name: &str, more: &[&str]) -> Result<PathBuf> {
    mount_at(rig, name, "mount", more)
}

fn mount_at(rig: &Rig, name: &str, point: &str, more: &[&str]) -> Result<PathBuf> {
    let (name, point) = (rig.name(name), rig.path(point));
    let point_text = text(&point);
    let mut arguments = vec!["mount", "--no-boot", "--no-trace", "--deadline", "3", &name, &point_text];
    arguments.extend(more);
    rig.ok(&arguments)?;
    Ok(point)
}

/// Waits until the node's newest job is in `state`; its bytes on disk.
fn job(rig: &Rig, state: &str) -> Result<u64> {
    until(&format!("a job to be {state}"), DEADLINE, || {
        let stats = rig.json(&["stats"])?;
        let last = stats["fills"].as_array().and_then(|all| all.last()).context("a job")?;
        Ok((last["state"] == state).then(|| last["done_bytes"].as_u64()).flatten())
    })
}

#[test]
fn a_prefetched_image_needs_no_registry_any_more() -> Result<()> {
    let mut rig = pushed()?;
    let report = rig.json(&["prefetch", &rig.name("a:t")])?;
    ensure!(report["bytes"].as_u64() >= Some(2 * BYTES as u64), "{report}");
    ensure!(
        rig.json(&["prefetch", &rig.name("a:t")])?["bytes"] == report["bytes"],
        "again, with nothing to do"
    );
    rig.node_ended()?;
    drop(rig.registry.take());
    let mounted = mount(&rig, "a:t", &[])?;
    ensure!(
        fs::read(mounted.join("one"))? == noise(BYTES, 5)
            && fs::read(mounted.join("two"))? == noise(BYTES, 6)
    );
    rig.unmount()
}

#[test]
fn a_mount_fills_itself_as_it_is_told() -> Result<()> {
    let rig = pushed()?;
    let mounted = mount(&rig, "a:t", &["--fill", "touched"])?;
    fs::File::open(mounted.join("one"))?.read_exact(&mut [0])?;
    until("the file that was read to be here", DEADLINE, || {
        let done = rig.json(&["stats"])?["fills"][0]["done_bytes"].as_u64();
        Ok((done >= Some(BYTES as u64)).then_some(()))
    })?;
    let frames = rig.counter("source_bytes")?;
    ensure!(frames < (BYTES + BYTES / 2) as u64, "{frames} bytes for one of two files");
    rig.unmount()?;
    let mounted = mount(&rig, "a:t", &["--fill", "all"])?;
    ensure!(job(&rig, "done")? >= 2 * BYTES as u64);
    let before = rig.counter("source_bytes")?;
    ensure!(fs::read(mounted.join("two"))? == noise(BYTES, 6));
    ensure!(rig.counter("source_bytes")? == before, "it was fetched again");
    rig.unmount()
}

#[test]
fn filling_keeps_to_its_rate_and_can_be_paused_and_cancelled() -> Result<()> {
    let rig = Rig::new()?;
    push(&rig, "a:t", 5, 10_000_000)?;
    // what keeps the node while nothing else does
    mount(&rig, "a:t", &[])?;
    rig.ok(&["prefetch", "--pause"])?;
    let name = rig.name("a:t");
    thread::scope(|scope| -> Result<()> {
        let prefetch = scope.spawn(|| rig.ok(&["prefetch", "--fill-rate", "8", &name]));
        let paused = until("the job to be there", DEADLINE, || {
            let stats = rig.json(&["stats"])?;
            let total = stats["fills"][0]["total_bytes"].as_u64() > Some(0);
            Ok(total.then(|| stats["fills"][0]["done_bytes"].as_u64()).flatten())
        })?;
        ensure!(paused == 0, "{paused} bytes came while it was paused");
        let begun = Instant::now();
        rig.ok(&["prefetch", "--resume"])?;
        prefetch.join().expect("it does not panic")?;
        // 20 MB at 8 MiB/s
        ensure!(begun.elapsed() > Duration::from_millis(1900), "it took {:?}", begun.elapsed());
        Ok(())
    })?;
    rig.unmount()
}

#[test]
fn an_eager_mount_is_whole_when_it_appears_and_one_that_does_not_fit_does_not_appear() -> Result<()> {
    let mut rig = pushed()?;
    push(&rig, "large:t", 20, 10_000_000)?;
    let small = ["--eager", "--cache-mib", "16"];
    let (name, point) = (rig.name("large:t"), text(&rig.path("mount")));
    let said = rig.fails(&[&["mount"], &small[..], &[&name, &point]].concat())?;
    ensure!(said.contains("large:t") && said.contains("--cache-mib"), "{said}");
    ensure!(mounted_on(&rig.path("mount"))?.is_none());
    let mounted = mount(&rig, "a:t", &small)?;
    drop(rig.registry.take());
    ensure!(
        fs::read(mounted.join("one"))? == noise(BYTES, 5)
            && fs::read(mounted.join("two"))? == noise(BYTES, 6)
    );
    rig.unmount()
}

#[test]
fn a_pinned_image_stays_while_others_pass_through_a_small_cache() -> Result<()> {
    let mut rig = pushed()?;
    push(&rig, "large:t", 20, 20_000_000)?;
    let small = ["--cache-mib", "16"];
    let pinned = rig.json(&[&["pin", &rig.name("a:t")], &small[..]].concat())?;
    ensure!(
        pinned["pins"][0]["reference"] == rig.name("a:t")
            && pinned["bytes"].as_u64() >= Some(2 * BYTES as u64)
    );
    rig.json(&[&["prefetch", &rig.name("a:t")], &small[..]].concat())?;
    let said = rig.fails(&[&["pin", &rig.name("large:t")], &small[..]].concat())?;
    ensure!(said.contains("large:t") && said.contains("MiB"), "{said}");
    let mounted = mount(&rig, "large:t", &small)?;
    for _ in 0..2 {
        ensure!(fs::read(mounted.join("one"))? == noise(20_000_000, 20));
        ensure!(fs::read(mounted.join("two"))? == noise(20_000_000, 21));
    }
    ensure!(rig.counter("evicted_segments")? > 10);
    rig.unmount()?;
    rig.node_ended()?;
    drop(rig.registry.take());
    // the pin outlives its node
    let mounted = mount(&rig, "a:t", &small)?;
    ensure!(
        fs::read(mounted.join("one"))? == noise(BYTES, 5)
            && fs::read(mounted.join("two"))? == noise(BYTES, 6)
    );
    ensure!(rig.json(&["pin", "--remove", &rig.name("a:t")])?["bytes"] == 0);
    rig.unmount()
}

/// The most that the segment files of a cache took while `act` ran.
fn most_bytes(cache: &Path, act: impl FnOnce() -> Result<()>) -> Result<u64> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = 0;
            while !ended.load(Ordering::SeqCst) {
                most = most.max(segment_bytes(cache));
            }
            most
        });
        let done = act();
        ended.store(true, Ordering::SeqCst);
        let most = watcher.join().expect("it does not panic");
        done.map(|()| most)
    })
}

/// The beginning of a file.
fn read_start(path: &Path, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    fs::File::open(path)?.read_exact(&mut bytes).with_context(|| path.display().to_string())?;
    Ok(bytes)
}

const CAP: u64 = 16 << 20;

#[test]
fn what_a_start_has_read_stays_while_the_rest_fills_a_cache_that_is_too_small_and_the_cap_holds() -> Result<()>
{
    let mut rig = pushed()?;
    push(&rig, "b:t", 30, 7_200_000)?;
    fs::create_dir(rig.path("other"))?;
    let small = ["--cache-mib", "16"];
    fs::read(mount(&rig, "a:t", &small)?.join("one"))?;
    rig.unmount()?;
    rig.node_ended()?;
    // what is read from disk again is worth more than what is only filled, so the other image will not find room for all of it
    let mounted = mount(&rig, "a:t", &small)?;
    fs::read(mounted.join("one"))?;
    fs::read(mounted.join("two"))?;
    let start = 3_000_000;
    let most = most_bytes(&rig.path("cache"), || {
        let other = mount_at(&rig, "b:t", "other", &["--fill", "all"])?;
        ensure!(read_start(&other.join("two"), start)? == noise(start, 31));
        job(&rig, "failed").map(drop)
    })?;
    ensure!(most <= CAP && most > CAP / 2, "{most} bytes where {CAP} are the cap");
    let reason = rig.json(&["stats"])?["fills"][0]["reason"].to_string();
    ensure!(reason.contains("--cache-mib"), "{reason}");
    ensure!(rig.counter("evicted_bytes")? > 0, "it never was full");
    rig.ok(&["unmount", &text(&rig.path("other"))])?;
    rig.unmount()?;
    rig.node_ended()?;
    drop(rig.registry.take());
    let mounted = mount(&rig, "a:t", &small)?;
    ensure!(fs::read(mounted.join("one"))? == noise(BYTES, 5));
    let other = mount_at(&rig, "b:t", "other", &[])?;
    ensure!(read_start(&other.join("two"), start)? == noise(start, 31));
    rig.ok(&["unmount", &text(&other)])?;
    rig.unmount()
}

#[test]
fn an_image_larger_than_the_cache_is_not_filled_and_neither_are_files_that_are() -> Result<()> {
    let rig = Rig::new()?;
    push(&rig, "large:t", 20, 10_000_000)?;
    for policy in ["all", "touched"] {
        let most = most_bytes(&rig.path("cache"), || {
            let mounted = mount(&rig, "large:t", &["--cache-mib", "16", "--fill", policy])?;
            for name in ["one", "two"] {
                read_start(&mounted.join(name), 1_000_000)?;
            }
            job(&rig, "failed").map(drop)
        })?;
        ensure!(most <= CAP, "{policy}: {most} bytes where {CAP} are the cap");
        let reason = rig.json(&["stats"])?["fills"].to_string();
        ensure!(reason.contains("large:t") && reason.contains("--cache-mib"), "{policy}: {reason}");
        // readahead of what was read may still have been under way
        ensure!(rig.counter("source_bytes")? < CAP / 2, "{policy}: more came than was read");
        rig.unmount()?;
        rig.node_ended()?;
    }
    Ok(())
}
