//! Another program in the daemon's place.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;

use crate::node::{daemon, kill, restored, successor};
use crate::rig::{Rig, text};

const BIG_BYTES: usize = 2_000_000;

fn mounted() -> Result<(Rig, PathBuf)> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(BIG_BYTES, 5)));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let mounted = rig.mount_plain("a:t")?;
    Ok((rig, mounted))
}

/// A program of its own in the rig's directory.
fn program(rig: &Rig, name: &str, contents: &[u8]) -> Result<PathBuf> {
    let path = rig.path(name);
    fs::write(&path, contents)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn an_upgraded_node_goes_on_with_every_mount_and_stays_what_it_is_when_its_file_goes() -> Result<()> {
    let (rig, mounted) = mounted()?;
    let open = File::open(mounted.join("big"))?;
    let before = daemon(&rig)?;
    let next = program(&rig, "lamina-next", &fs::read(env!("CARGO_BIN_EXE_lamina"))?)?;
    let said = rig.ok(&["node", "upgrade", &text(&next)])?;
    ensure!(said.contains(env!("CARGO_PKG_VERSION")) && said.contains("1 mounts"), "{said}");
    let after = daemon(&rig)?;
    ensure!(after != before && fs::read_link(format!("/proc/{after}/exe"))? == next);
    let mut bytes = vec![0; BIG_BYTES];
    open.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == noise(BIG_BYTES, 5) && restored(&rig)? == ["resumed"]);
    drop(open);
    fs::remove_file(&next)?;
    kill(after)?;
    let last = successor(&rig, after)?;
    let runs = fs::read_link(format!("/proc/{last}/exe"))?;
    ensure!(text(&runs).starts_with(&text(&next)), "{runs:?} was started");
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    rig.unmount()?;
    rig.node_ended()
}

#[test]
fn what_is_no_lamina_or_does_not_serve_is_refused_or_left_again_and_the_mounts_stay() -> Result<()> {
    let (rig, mounted) = mounted()?;
    let before = daemon(&rig)?;
    let missing = text(&rig.path("nowhere"));
    ensure!(rig.fails(&["node", "upgrade", &missing])?.contains(&missing));
    let other = program(&rig, "other", b"#!/bin/sh\necho other 1.0\n")?;
    let said = rig.fails(&["node", "upgrade", &text(&other)])?;
    ensure!(said.contains("not lamina") && said.contains(&text(&other)), "{said}");
    ensure!(daemon(&rig)? == before, "a refused program has taken its place");
    let broken = program(&rig, "broken", b"#!/bin/sh\n[ \"$1\" = --version ] && echo lamina 9.9\n")?;
    let said = rig.fails(&["node", "upgrade", &text(&broken)])?;
    ensure!(said.contains("did not serve") && said.contains("node.log"), "{said}");
    ensure!(fs::read(mounted.join("big"))? == noise(BIG_BYTES, 5));
    ensure!(daemon(&rig)? != before && restored(&rig)? == ["resumed"]);
    rig.unmount()
}
