//! A node that is stopped and started again has what it had, whether or not its registry can be reached.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::node::restored;
use crate::proxy::{Fault, Proxy};
use crate::rig::{DEADLINE, Rig, text};

/// `lamina node`, as a service runs it.
fn node(rig: &Rig) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["node", "--cache", &text(&rig.path("cache"))]);
    let mut process = Process::spawn("node", &mut command)?;
    process.wait_line("ready", DEADLINE)?;
    Ok(process)
}

#[test]
fn a_node_that_was_stopped_mounts_everything_again_without_its_registry_and_says_so() -> Result<()> {
    let mut rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(3_000_000, 5)).file("small", "s"));
    let source = rig.layout("layout", &image)?;
    let pushed = rig.json(&["push", &source, &rig.name("a:t")])?;
    let pinned = format!("a@{}", pushed["manifest"].as_str().context("a digest")?);
    let first = node(&rig)?;
    let (by_tag, by_digest) = (rig.mount_plain("a:t")?, rig.path("scratch"));
    rig.ok(&["mount", "--no-boot", "--no-trace", &rig.name(&pinned), &text(&by_digest)])?;
    ensure!(fs::read(by_tag.join("big"))? == noise(3_000_000, 5));
    ensure!(first.stop(DEADLINE)?.success());
    ensure!(mounted_on(&by_tag)?.is_none() && mounted_on(&by_digest)?.is_none(), "a mount is left behind");
    rig.registry.take().context("running")?.stop(DEADLINE)?;

    let second = node(&rig)?;
    for mounted in [&by_tag, &by_digest] {
        ensure!(fs::read(mounted.join("big"))? == noise(3_000_000, 5));
        ensure!(fs::read(mounted.join("small"))? == b"s");
    }
    ensure!(restored(&rig)? == ["mounted again", "mounted again"]);
    // what is unmounted on purpose does not come again
    rig.unmount()?;
    ensure!(second.stop(DEADLINE)?.success());
    let third = node(&rig)?;
    ensure!(mounted_on(&by_tag)?.is_none() && mounted_on(&by_digest)?.is_some());
    rig.ok(&["unmount", &text(&by_digest)])?;
    ensure!(third.stop(DEADLINE)?.success());
    Ok(())
}

#[test]
fn what_was_unmounted_does_not_come_again_though_its_node_is_stopped_before_it_has_told_of_the_start()
-> Result<()> {
    let mut rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("small", "s")))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let (goes, stays) = (rig.path("mount"), rig.path("scratch"));
    let first = node(&rig)?;
    rig.ok(&["mount", "--no-boot", "--no-trace", &rig.name("a:t"), &text(&stays)])?;
    rig.ok(&["mount", &rig.name("a:t"), &text(&goes)])?;
    ensure!(fs::read(goes.join("small"))? == b"s");
    // nobody can be told, and the node waits for an answer
    rig.registry.as_mut().context("running")?.signal(Signal::STOP)?;
    let unmounted = rig.ok(&["unmount", &text(&goes)]);
    let stopped = first.stop(DEADLINE);
    rig.registry.as_mut().context("running")?.signal(Signal::CONT)?;
    unmounted?;
    ensure!(stopped?.success());
    let second = node(&rig)?;
    ensure!(restored(&rig)? == ["mounted again"], "what was unmounted came again");
    ensure!(mounted_on(&goes)?.is_none() && fs::read(stays.join("small"))? == b"s");
    rig.ok(&["unmount", &text(&stays)])?;
    ensure!(second.stop(DEADLINE)?.success());
    Ok(())
}

#[test]
fn a_node_that_is_stopped_after_a_start_tells_the_registry_of_it_first() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("small", "s")))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let released = Arc::new(AtomicBool::new(false));
    let release = Arc::clone(&released);
    let proxy = Proxy::start(&rig.address, move |request| {
        if request.line.contains("/traces/") {
            let _ = until("the release", DEADLINE, || Ok(release.load(Ordering::SeqCst).then_some(())));
        }
        Fault::None
    })?;
    let mut node = node(&rig)?;
    let point = rig.path("mount");
    rig.ok(&["mount", &proxy.name("a:t"), &text(&point)])?;
    ensure!(fs::read(point.join("small"))? == b"s");
    rig.ok(&["unmount", &text(&point)])?;
    node.signal(Signal::TERM)?;
    let ended = node.wait(Duration::from_secs(1)).is_ok();
    released.store(true, Ordering::SeqCst);
    ensure!(!ended, "it did not wait");
    ensure!(node.wait(DEADLINE)?.success());
    until("the profile", DEADLINE, || {
        Ok((!rig.json(&["profile", "show", &rig.name("a:t")])?["profile"].is_null()).then_some(()))
    })
}
