//! A node that is stopped and started again has what it had, whether or not its registry can be reached.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::Process;

use crate::node::restored;
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
