//! What is fetched though nobody reads it, and what stays.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::until;

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
    let (name, point) = (rig.name(name), rig.path("mount"));
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
