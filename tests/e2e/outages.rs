//! Registries that go away while images are mounted, and come back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::until;
use rustix::fs::{Advice, fadvise};
use rustix::process::Signal;

use crate::proxy::{Fault, Proxy};
use crate::rig::{DEADLINE, Rig, text};

const BYTES: usize = 3_000_000;
/// How soon a registry that is back must be noticed.
const SOON: Duration = Duration::from_secs(2);

/// An image of two files, of which nothing is on the node.
fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("near", noise(BYTES, 5)).file("far", noise(BYTES, 6)));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

fn mount(rig: &Rig, deadline: &str) -> Result<PathBuf> {
    let point = rig.path("mount");
    rig.ok(&["mount", "--no-boot", "--no-trace", "--deadline", deadline, &rig.name("a:t"), &text(&point)])?;
    Ok(point)
}

/// Reads a file from the node, whatever the kernel has of it.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    fs::read(path)
}

/// Reads `near`, so that it is on disk.
fn cached(rig: &Rig, mounted: &Path) -> Result<()> {
    ensure!(read(&mounted.join("near"))? == noise(BYTES, 5));
    until("the cache to be written", DEADLINE, || {
        Ok((rig.counter("written_frames")? >= rig.counter("source_frames")?).then_some(()))
    })
}

/// Lets `away` happen, checks what that does to a mount, lets `back` happen, and checks again.
fn outage(
    rig: &mut Rig,
    away: impl FnOnce(&mut Rig) -> Result<()>,
    back: impl FnOnce(&mut Rig) -> Result<()>,
) -> Result<()> {
    let mounted = mount(rig, "60")?;
    cached(rig, &mounted)?;
    let before = rig.counter("waits")?;
    away(rig)?;
    for _ in 0..3 {
        ensure!(read(&mounted.join("near"))? == noise(BYTES, 5), "cached bytes need nobody");
    }
    ensure!(rig.counter("waits")? == before, "somebody waited for what is here");
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let path = mounted.join("far");
            thread::spawn(move || read(&path).map(|bytes| (bytes, Instant::now())))
        })
        .collect();
    until("a reader to wait and the outage to be noticed", DEADLINE, || {
        let stats = rig.json(&["stats"])?;
        let noticed = stats["sources"][0]["state"] == "away" && stats["cache"]["waiting"].as_u64() > Some(0);
        Ok(noticed.then_some(()))
    })?;
    ensure!(read(&mounted.join("near"))? == noise(BYTES, 5), "cached bytes, while others wait");
    back(rig)?;
    let returned = Instant::now();
    for reader in readers {
        let (bytes, done) = reader.join().expect("a reader does not panic").context("a reader")?;
        ensure!(bytes == noise(BYTES, 6), "wrong bytes after an outage");
        let took = done.saturating_duration_since(returned);
        ensure!(took < SOON, "a reader went on {took:?} after the registry was back");
    }
    until("the registry to be known to be back", DEADLINE, || {
        Ok((rig.json(&["stats"])?["sources"][0]["state"] == "here").then_some(()))
    })?;
    rig.unmount()
}

#[test]
fn reads_wait_for_a_killed_registry_and_go_on_within_two_seconds_of_its_return() -> Result<()> {
    let mut rig = pushed()?;
    let kill = |rig: &mut Rig| {
        rig.registry.take().context("a registry")?.signal(Signal::KILL)?;
        Ok(())
    };
    outage(&mut rig, kill, |rig| rig.start_registry_on(&rig.address.clone()))
}

#[test]
fn reads_wait_for_a_frozen_registry_and_go_on_within_two_seconds_of_its_return() -> Result<()> {
    let mut rig = pushed()?;
    let signal = |rig: &mut Rig, signal| rig.registry.as_mut().context("a registry")?.signal(signal);
    outage(&mut rig, |rig| signal(rig, Signal::STOP), |rig| signal(rig, Signal::CONT))
}

#[test]
fn a_read_that_nobody_answers_is_an_error_at_the_deadline_and_right_once_somebody_does() -> Result<()> {
    let mut rig = pushed()?;
    let mounted = mount(&rig, "2")?;
    drop(rig.registry.take());
    let begun = Instant::now();
    let error = read(&mounted.join("far")).err().and_then(|error| error.raw_os_error());
    let took = begun.elapsed();
    ensure!(error == Some(libc::EIO), "{error:?}");
    // the kernel asks once more, page by page, for what its readahead did not get
    ensure!((Duration::from_secs(2)..Duration::from_secs(9)).contains(&took), "{took:?}");
    rig.start_registry_on(&rig.address.clone())?;
    let back = Instant::now();
    ensure!(read(&mounted.join("far"))? == noise(BYTES, 6));
    ensure!(back.elapsed() < SOON, "{:?}", back.elapsed());
    rig.unmount()
}

#[test]
fn without_its_registry_a_node_mounts_what_it_has_by_digest_and_by_the_tag_last_known() -> Result<()> {
    let mut rig = pushed()?;
    let manifest = rig.json(&["inspect", &rig.name("a:t")])?["manifest"].clone();
    let mounted = mount(&rig, "5")?;
    cached(&rig, &mounted)?;
    rig.unmount()?;
    rig.node_ended()?;
    drop(rig.registry.take());
    let by_tag = rig.lamina(&["mount", "--json", &rig.name("a:t"), &text(&mounted)])?;
    let (said, report) = (String::from_utf8(by_tag.stderr)?, String::from_utf8(by_tag.stdout)?);
    ensure!(by_tag.status.success() && said.contains("when last asked"), "{said}");
    let report: serde_json::Value = serde_json::from_str(&report)?;
    ensure!(report["manifest"] == manifest && report["offline"].is_string(), "{report}");
    ensure!(read(&mounted.join("near"))? == noise(BYTES, 5));
    rig.unmount()?;
    rig.node_ended()?;
    let pinned = rig.name(&format!("a@{}", manifest.as_str().context("a digest")?));
    let report = rig.json(&["mount", &pinned, &text(&mounted)])?;
    ensure!(report["offline"].is_null() && report["requests"] == 0, "{report}");
    ensure!(read(&mounted.join("near"))? == noise(BYTES, 5));
    rig.unmount()?;
    let said = rig.fails(&["mount", &rig.name("a:other"), &text(&mounted)])?;
    ensure!(said.contains(&rig.address) && said.contains("is the registry running"), "{said}");
    Ok(())
}

#[test]
fn a_registry_that_hangs_holds_a_mount_up_for_the_deadline_and_no_longer() -> Result<()> {
    let rig = pushed()?;
    let proxy = Proxy::start(&rig.address, |_| Fault::Hang)?;
    let begun = Instant::now();
    let said = rig.fails(&["mount", "--deadline", "2", &proxy.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(said.contains(&proxy.address) && said.contains("no answer within"), "{said}");
    ensure!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn mirrors_are_asked_in_order_and_whoever_has_the_right_bytes_serves_them() -> Result<()> {
    let rig = pushed()?;
    let faults =
        [Fault::None, Fault::Status(503), Fault::Status(404), Fault::Status(401), Fault::Flip, Fault::Hang];
    for fault in faults {
        let first = Proxy::start(&rig.address, move |request| match request.ranged {
            true => fault,
            false => Fault::None,
        })?;
        let second = Proxy::start(&rig.address, |_| Fault::None)?;
        let (mirrors, point) =
            (format!("{0}={1},{0}={2}", rig.address, first.address, second.address), rig.path("mount"));
        let name = rig.name("a:t");
        rig.ok(&["mount", "--no-boot", "--no-trace", "--mirror", &mirrors, &name, &text(&point)])?;
        let begun = Instant::now();
        let far = read(&point.join("far")).with_context(|| format!("{fault:?}"))?;
        ensure!(far == noise(BYTES, 6), "{fault:?}");
        ensure!(begun.elapsed() < Duration::from_secs(10), "{fault:?}: {:?}", begun.elapsed());
        let stats = rig.json(&["stats"])?;
        let asked = |address: &str| {
            let all = stats["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
            let one = all.iter().find(|one| one["url"] == format!("http://{address}"));
            one.and_then(|one| one["counters"]["requests"].as_u64()).unwrap_or(0)
        };
        ensure!(asked(&first.address) > 0 && asked(&rig.address) == 0, "{fault:?}: {stats}");
        ensure!((asked(&second.address) > 0) == (fault != Fault::None), "{fault:?}: {stats}");
        rig.unmount()?;
        rig.node_ended()?;
        fs::remove_dir_all(rig.path("cache"))?;
    }
    Ok(())
}
