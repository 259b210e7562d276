//! A mount whose registry misbehaves: the right bytes or an error, in time, and never anything else.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::proxy::{Fault, Proxy, Request};
use crate::rig::{DEADLINE, Rig, text};

const BIG_BYTES: usize = 3_000_000;
/// How long readers wait here, in seconds.
const WAIT: &str = "2";

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(BIG_BYTES, 5)).file("small", "s"));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

/// Mounts what the proxy serves; readers give up soon.
fn mount(rig: &Rig, proxy: &Proxy) -> Result<std::path::PathBuf> {
    let point = rig.path("mount");
    rig.ok(&["mount", "--deadline", WAIT, &proxy.name("a:t"), &text(&point)])?;
    Ok(point)
}

/// Unmounts, and has the next mount find a node that knows nothing.
pub(crate) fn forget(rig: &Rig) -> Result<()> {
    rig.unmount()?;
    rig.node_ended()?;
    Ok(fs::remove_dir_all(rig.path("cache"))?)
}

/// The reader gets EIO, within a time that has to do with its deadline.
fn is_error(path: &Path) -> Result<()> {
    let begun = Instant::now();
    let error = fs::read(path).err();
    let number = error.as_ref().and_then(std::io::Error::raw_os_error);
    ensure!(number == Some(libc::EIO), "{}: {error:?}", path.display());
    ensure!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
    Ok(())
}

/// Tells whether the tree of an image is asked for, and not only its names.
fn asks_for_tree(rig: &Rig) -> Result<impl Fn(&Request) -> bool + Send + Sync + use<>> {
    let tree = rig.json(&["inspect", &rig.name("a:t")])?["tree"].clone();
    let path = format!("/blobs/{}", tree.as_str().context("the tree's digest")?);
    let is_names = |request: &Request| String::from_utf8_lossy(&request.head).contains("bytes=0-");
    Ok(move |request: &Request| request.line.contains(&path) && !is_names(request))
}

#[test]
fn a_tree_that_breaks_off_behind_its_names_is_mounted_and_comes_once_somebody_has_it() -> Result<()> {
    let rig = pushed()?;
    let (asked, away) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
    let (count, is_away) = (Arc::clone(&asked), Arc::clone(&away));
    let asks_for_tree = asks_for_tree(&rig)?;
    let proxy = Proxy::start(&rig.address, move |request| {
        match (asks_for_tree(request) && is_away.load(Ordering::SeqCst))
            .then(|| count.fetch_add(1, Ordering::SeqCst))
        {
            Some(0) => Fault::Cut,
            Some(_) => Fault::Status(503),
            None => Fault::None,
        }
    })?;
    let point = mount(&rig, &proxy)?;
    ensure!(fs::metadata(point.join("big"))?.len() == BIG_BYTES as u64, "its names are there");
    is_error(&point.join("big"))?;
    away.store(false, Ordering::SeqCst);
    until("the right bytes", DEADLINE, || {
        let read = fs::read(point.join("big")).ok();
        ensure!(read.as_ref().is_none_or(|bytes| *bytes == noise(BIG_BYTES, 5)), "other bytes");
        Ok(read.map(drop))
    })?;
    ensure!(asked.load(Ordering::SeqCst) > 1, "it was asked for again");
    rig.ok(&["unmount", &text(&point)])?;
    Ok(())
}

#[test]
fn a_tree_that_never_comes_is_asked_for_no_more_once_nothing_shows_it() -> Result<()> {
    let rig = pushed()?;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let asks_for_tree = asks_for_tree(&rig)?;
    let proxy = Proxy::start(&rig.address, move |request| {
        match asks_for_tree(request).then(|| count.fetch_add(1, Ordering::SeqCst)) {
            Some(0) => Fault::Cut,
            Some(_) => Fault::Status(503),
            None => Fault::None,
        }
    })?;
    // another mount keeps the daemon
    let other = rig.path("other");
    fs::create_dir(&other)?;
    rig.ok(&[
        "push",
        &rig.layout("other-layout", &Image::new().layer(|layer| layer.file("f", "x")))?,
        &rig.name("b:t"),
    ])?;
    rig.ok(&["mount", &rig.name("b:t"), &text(&other)])?;
    let point = mount(&rig, &proxy)?;
    until("it is asked for again", DEADLINE, || Ok((asked.load(Ordering::SeqCst) > 2).then_some(())))?;
    rig.ok(&["unmount", &text(&point)])?;
    let mut last = (0, Instant::now());
    until("nobody asks", DEADLINE, || {
        let now = asked.load(Ordering::SeqCst);
        if now != last.0 {
            last = (now, Instant::now());
        }
        Ok((last.1.elapsed() > Duration::from_secs(8)).then_some(()))
    })
}

#[test]
fn documents_other_than_those_asked_for_mount_nothing() -> Result<()> {
    let rig = pushed()?;
    let manifest = rig.json(&["inspect", &rig.name("a:t")])?["manifest"].clone();
    let pinned = format!("a@{}", manifest.as_str().unwrap_or_default());
    let expected = "other bytes than";
    let in_manifest = Fault::FlipBehind(b"\"schemaVersion\":");
    // the tree, of which the names come behind the manifest
    let cases = [("a:t", [Fault::Flip, Fault::FlipFirst]), (&pinned, [in_manifest, Fault::None])];
    for (name, [manifests, blobs]) in cases {
        let proxy = Proxy::start(&rig.address, move |request| match &request.line {
            line if line.contains("/manifests/") => manifests,
            line if line.contains("/blobs/") => blobs,
            _ => Fault::None,
        })?;
        let said = rig.fails(&["mount", &proxy.name(name), &text(&rig.path("mount"))])?;
        ensure!(said.contains(expected) && said.contains(&proxy.address), "{name}: {said}");
        ensure!(proxy.faults() > 0, "nothing was changed");
        ensure!(mounted_on(&rig.path("mount"))?.is_none(), "{name} is mounted");
    }
    Ok(())
}

#[test]
fn of_a_tree_that_is_wrong_behind_its_names_nothing_is_read() -> Result<()> {
    let rig = pushed()?;
    let asks_for_tree = asks_for_tree(&rig)?;
    let proxy = Proxy::start(&rig.address, move |request| match asks_for_tree(request) {
        true => Fault::Flip,
        false => Fault::None,
    })?;
    let point = mount(&rig, &proxy)?;
    ensure!(fs::metadata(point.join("big"))?.len() == BIG_BYTES as u64, "its names are there, and right");
    is_error(&point.join("big"))?;
    ensure!(proxy.faults() > 1, "it was asked for again");
    rig.ok(&["unmount", &text(&point)])?;
    Ok(())
}

#[test]
fn packs_that_stay_wrong_are_an_error_to_the_reader_and_the_mount_stays() -> Result<()> {
    let rig = pushed()?;
    let faults = [Fault::Flip, Fault::Cut, Fault::Status(401), Fault::Status(404), Fault::Status(500)];
    for fault in faults {
        let broken = Arc::new(AtomicBool::new(true));
        let policy = Arc::clone(&broken);
        let proxy = Proxy::start(&rig.address, move |request| {
            match request.ranged && policy.load(Ordering::SeqCst) {
                true => fault,
                false => Fault::None,
            }
        })?;
        let mounted = rig.path("mount");
        // what was read of it once would come with its boot pack, which is no pack
        let without = ["mount", "--no-boot", "--deadline", WAIT];
        rig.ok(&[&without[..], &[&proxy.name("a:t"), &text(&mounted)]].concat())?;
        is_error(&mounted.join("big")).map_err(|error| error.context(format!("{fault:?}")))?;
        ensure!(proxy.faults() > 0 && fs::read_dir(&mounted)?.count() == 2);
        // once the registry is well again, so is the file
        broken.store(false, Ordering::SeqCst);
        ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5), "after {fault:?}");
        forget(&rig)?;
    }
    Ok(())
}

#[test]
fn a_registry_that_hangs_costs_a_reader_its_deadline_and_no_more() -> Result<()> {
    let rig = pushed()?;
    let (proxy, hanging) = Proxy::hanging(&rig.address)?;
    let mounted = mount(&rig, &proxy)?;
    is_error(&mounted.join("big"))?;
    ensure!(proxy.faults() > 0);
    hanging.store(false, Ordering::SeqCst);
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    rig.unmount()
}

#[test]
fn what_a_busy_registry_refuses_twice_is_asked_for_again_and_readers_do_not_notice() -> Result<()> {
    let rig = pushed()?;
    for fault in [Fault::Status(429), Fault::Status(503)] {
        let asked: Mutex<HashMap<Vec<u8>, u32>> = Mutex::default();
        let proxy = Proxy::start(&rig.address, move |request| {
            let mut asked = asked.lock().expect("no thread panics with it");
            let times = asked.entry(request.head.clone()).or_default();
            *times += 1;
            if *times <= 2 { fault } else { Fault::None }
        })?;
        let point = rig.path("mount");
        rig.ok(&["mount", &proxy.name("a:t"), &text(&point)])?;
        let read = fs::read(point.join("big")).map_err(|error| anyhow::anyhow!("{fault:?}: {error}"))?;
        ensure!(read == noise(BIG_BYTES, 5), "{fault:?}");
        ensure!(proxy.faults() > 1);
        forget(&rig)?;
    }
    Ok(())
}

#[test]
fn ctrl_c_while_the_registry_hangs_mounts_nothing_then_or_later() -> Result<()> {
    let rig = pushed()?;
    for more in [&[][..], &["-f"]] {
        let proxy = Proxy::start(&rig.address, |_| Fault::Hang)?;
        // as a terminal starts it: what a shell puts into the background ignores Ctrl-C, and so would this
        let mut command = Command::new("env");
        command
            .args(["--default-signal=INT", env!("CARGO_BIN_EXE_lamina"), "mount"])
            .args(more)
            .args(["--cache", &text(&rig.path("cache"))]);
        command.args([&proxy.name("a:t"), &text(&rig.path("mount"))]);
        let mut process = Process::spawn("mount", &mut command)?;
        proxy.faulted()?;
        process.signal(Signal::INT)?;
        ensure!(!process.wait(DEADLINE)?.success());
        rig.node_ended()?;
        ensure!(mounted_on(&rig.path("mount"))?.is_none());
    }
    Ok(())
}

#[test]
fn a_killed_node_takes_neither_the_mount_point_nor_its_cache_along() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    until("the cache to be written", DEADLINE, || {
        Ok((rig.counter("written_frames")? >= rig.counter("source_frames")?).then_some(()))
    })?;
    let pid = rig.json(&["stats"])?["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(rustix::process::Pid::from_raw).ok_or_else(|| anyhow::anyhow!("a process id"))?;
    rustix::process::kill_process(pid, Signal::KILL)?;
    ensure!(fs::read(mounted.join("small"))? == b"s");
    let said = rig.fails(&["mount", &rig.name("a:t"), &text(&mounted)])?;
    ensure!(said.contains("mounted") && said.contains(&text(&mounted)), "{said}");
    rig.unmount()?;
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    ensure!(rig.counter("source_bytes")? == 0, "{} bytes came again", rig.counter("source_bytes")?);
    rig.unmount()
}
