//! What a registry sends in one go to whoever starts an image, and what becomes of a start where that goes wrong.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use lamina_image::media_type;
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::noise;
use lamina_testkit::process::until;
use serde_json::Value;

use crate::faulty::forget;
use crate::proxy::{Fault, Proxy};
use crate::rig::{DEADLINE, Rig, programs, text};

const READ_BYTES: usize = 1_000_000;

/// An image whose boot pack is its one large file, and with it most of its prelude.
fn started_before() -> Result<Rig> {
    let rig = Rig::new()?;
    let cat = programs(Layer::new(), &["/bin/cat"])?;
    let image = Image::new().layer(|_| cat).layer(|layer| layer.file("read", noise(READ_BYTES, 1)));
    let name = rig.name("a:t");
    rig.ok(&["push", &rig.layout("layout", &image)?, &name])?;
    let recorded = rig.lamina(&["profile", "record", &name, "--", "cat", "/read"])?;
    ensure!(recorded.status.success(), "{}", String::from_utf8_lossy(&recorded.stderr));
    until("a boot pack", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &name])?;
        Ok((!shown["boot"].is_null() && !shown["profile"].is_null()).then_some(()))
    })?;
    // what the recording has left here
    rig.node_ended()?;
    fs::remove_dir_all(rig.path("cache"))?;
    Ok(rig)
}

/// Mounts an image, and says how.
fn mounted(rig: &Rig, name: &str) -> Result<(PathBuf, Value)> {
    let point = rig.path("mount");
    let report = rig.json(&["mount", name, &text(&point)])?;
    Ok((point, report))
}

/// What is known of the only mount, once its boot pack has come, or has failed to.
fn booted(rig: &Rig) -> Result<Value> {
    until("the end of the boot", DEADLINE, || {
        let mount = rig.json(&["stats"])?["mounts"][0].clone();
        let counters = &mount["counters"];
        let is_over = [&counters["boot_us"], &counters["boot_failed"]].iter().any(|it| it.as_u64() > Some(0));
        Ok(is_over.then_some(mount))
    })
}

/// A proxy that does something to manifests, and how often what is behind them was asked for there: names, what hangs on the image, and
/// the boot pack.
fn proxy(rig: &Rig, fault: Fault) -> Result<(Proxy, Arc<AtomicUsize>)> {
    let shown = rig.json(&["profile", "show", &rig.name("a:t")])?;
    let boot = shown["boot"]["digest"].as_str().context("a digest")?.to_owned();
    let tree = rig.json(&["inspect", &rig.name("a:t")])?["tree"].as_str().context("a digest")?.to_owned();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let proxy = Proxy::start(&rig.address, move |request| {
        let begins = ["bytes=0-", "range:"].map(|what| request.says(what));
        let names = request.line.contains(&tree) && begins != [false, true];
        let asks = names || request.line.contains("/referrers/") || request.line.contains(&boot);
        count.fetch_add(usize::from(asks), Ordering::SeqCst);
        if request.line.contains("/manifests/") { fault } else { Fault::None }
    })?;
    Ok((proxy, asked))
}

#[test]
fn the_first_mount_of_an_image_takes_one_request_and_brings_its_boot_pack() -> Result<()> {
    let rig = started_before()?;
    let (proxy, asked) = proxy(&rig, Fault::None)?;
    let (point, report) = mounted(&rig, &proxy.name("a:t"))?;
    ensure!(report["requests"] == 1, "{report}");
    let mount = booted(&rig)?;
    ensure!(mount["counters"]["boot_stored_bytes"].as_u64() >= Some(READ_BYTES as u64), "{mount}");
    ensure!(fs::read(point.join("read"))? == noise(READ_BYTES, 1));
    ensure!(asked.load(Ordering::SeqCst) == 0, "more was asked for");
    rig.unmount()
}

#[test]
fn a_boot_pack_waits_in_a_prelude_for_names_that_come_slowly() -> Result<()> {
    let rig = started_before()?;
    // a zstd frame's first bytes (RFC 8878, 3.1.1): the names are the first one
    let (proxy, asked) = proxy(&rig, Fault::PauseBehind(b"\x28\xb5\x2f\xfd"))?;
    mounted(&rig, &proxy.name("a:t"))?;
    let mount = booted(&rig)?;
    ensure!(proxy.faults() == 1 && asked.load(Ordering::SeqCst) == 0, "the boot pack was asked for");
    ensure!(mount["counters"]["boot_stored_bytes"].as_u64() >= Some(READ_BYTES as u64), "{mount}");
    let failures = rig.json(&["stats"])?["sources"][0]["counters"]["failures"].clone();
    ensure!(failures.as_u64().unwrap_or(0) == 0, "{failures} failures of a host that sends");
    rig.unmount()
}

#[test]
fn a_boot_pack_that_breaks_off_in_a_prelude_goes_on_and_one_that_is_wrong_is_done_without() -> Result<()> {
    let rig = started_before()?;
    // the middle and the end of it are in the boot pack
    for fault in [Fault::Cut, Fault::Flip] {
        let (proxy, asked) = proxy(&rig, fault)?;
        let (point, _) = mounted(&rig, &proxy.name("a:t"))?;
        let mount = booted(&rig)?;
        ensure!(proxy.faults() == 1, "nothing was changed");
        ensure!(fs::read(point.join("read"))? == noise(READ_BYTES, 1), "{fault:?}");
        let counter = |name: &str| mount["counters"][name].as_u64().unwrap_or(0);
        let (stored, failed) = (counter("boot_stored_bytes"), counter("boot_failed"));
        match fault {
            Fault::Cut => {
                ensure!(stored >= READ_BYTES as u64 && failed == 0, "{mount}");
                ensure!(asked.load(Ordering::SeqCst) == 1, "the rest was not asked for once");
            }
            _ => ensure!(failed == 1 && stored < READ_BYTES as u64, "{mount}"),
        }
        forget(&rig)?;
    }
    Ok(())
}

#[test]
fn where_names_are_wrong_in_a_prelude_the_tree_is_asked_for() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("read", noise(READ_BYTES, 1)));
    rig.ok(&["push", &rig.layout("layout", &image)?, &rig.name("a:t")])?;
    // without a boot pack they are the end of it
    let proxy = Proxy::start(&rig.address, |request| match request.line.contains("/manifests/") {
        true => Fault::Flip,
        false => Fault::None,
    })?;
    let (point, _) = mounted(&rig, &proxy.name("a:t"))?;
    ensure!(proxy.faults() == 1, "nothing was changed");
    ensure!(fs::read(point.join("read"))? == noise(READ_BYTES, 1));
    rig.unmount()
}

#[test]
fn a_registry_whose_preludes_cannot_be_read_is_asked_for_the_manifest_alone() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("read", noise(READ_BYTES, 1)));
    rig.ok(&["push", &rig.layout("layout", &image)?, &rig.name("a:t")])?;
    // of an image as small as this the middle is in the head or the manifest
    for fault in [Fault::FlipFirst, Fault::Cut, Fault::Status(406)] {
        let proxy = Proxy::start(&rig.address, move |request| match request.says(media_type::PRELUDE) {
            true => fault,
            false => Fault::None,
        })?;
        let (point, _) = mounted(&rig, &proxy.name("a:t"))?;
        ensure!(proxy.faults() == 1, "{fault:?}: {} faults", proxy.faults());
        ensure!(fs::read(point.join("read"))? == noise(READ_BYTES, 1), "{fault:?}");
        forget(&rig)?;
    }
    Ok(())
}
