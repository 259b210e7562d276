//! A registry that is killed in the middle of its work: what it leaves is garbage at most, and the same again ends well.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::rig::{DEADLINE, Rig, skopeo, text};

/// How many objects there are below a part of the storage.
fn objects(rig: &Rig, part: &str) -> usize {
    let mut open = vec![rig.path("storage/objects").join(part)];
    let mut found = 0;
    while let Some(directory) = open.pop() {
        // nothing is there before the first, and what is listed may be gone
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => open.push(entry.path()),
                // `#` ends the name of one that is being written
                false => found += usize::from(!entry.file_name().to_string_lossy().contains('#')),
            }
        }
    }
    found
}

/// Two layers that make three packs.
fn image() -> Image {
    let (one, two) = (noise(50_000_000, 1), noise(30_000_000, 2));
    Image::new().layer(|l| l.file("lib-one", one).gzip()).layer(|l| l.file("lib-two", two).gzip())
}

/// Kills the registry, and looks at what it has left.
fn kill(rig: &mut Rig) -> Result<()> {
    let mut registry = rig.registry.take().context("a registry")?;
    registry.signal(Signal::KILL)?;
    let _ = registry.wait(DEADLINE)?;
    is_whole(rig)
}

/// Nothing is damaged.
fn is_whole(rig: &Rig) -> Result<()> {
    let report = rig.json(&["fsck", "--storage", &text(&rig.path("storage"))])?;
    ensure!(report["damaged"].as_array().is_some_and(Vec::is_empty), "{report:#}");
    Ok(())
}

fn blobs(layout: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let files = std::fs::read_dir(layout.join("blobs/sha256"))?;
    files
        .map(|file| {
            let path = file?.path();
            Ok((path.file_name().context("a name")?.to_string_lossy().into_owned(), std::fs::read(&path)?))
        })
        .collect()
}

#[test]
fn killed_during_a_push_it_has_lost_nothing_and_the_push_again_completes() -> Result<()> {
    for (part, least) in
        [("blobs", 1), ("blobs", 3), ("arrived", 2), ("packs", 1), ("layers", 1), ("refs", 1)]
    {
        let mut rig = Rig::new()?;
        let source = rig.layout("layout", &image())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        let log = std::fs::File::create(rig.path("log"))?;
        command.args(["push", &source, &rig.name("a:t")]).stderr(log);
        let mut push = Process::spawn("push", &mut command)?;
        until(&format!("{least} of {part}"), DEADLINE, || Ok((objects(&rig, part) >= least).then_some(())))?;
        kill(&mut rig).with_context(|| format!("killed at {least} of {part}"))?;
        push.signal(Signal::KILL)?;
        let _ = push.wait(DEADLINE)?;
        rig.start_registry()?;
        rig.ok(&["push", &source, &rig.name("a:t")]).with_context(|| format!("after {least} of {part}"))?;
        let mounted = rig.mount("a:t")?;
        ensure!(std::fs::read(mounted.join("lib-two"))? == noise(30_000_000, 2));
        rig.unmount()?;
        is_whole(&rig)?;
    }
    Ok(())
}

#[test]
fn killed_during_a_conversion_it_has_lost_nothing_and_converts_when_it_is_back() -> Result<()> {
    for (part, least) in [("jobs", 1), ("packs", 1), ("packs", 2), ("layers", 1), ("layers", 3)] {
        let mut rig = Rig::new()?;
        let source = rig.layout("layout", &image())?;
        let name = format!("docker://{}", rig.name("a:t"));
        skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &name])?;
        until(&format!("{least} of {part}"), DEADLINE, || Ok((objects(&rig, part) >= least).then_some(())))?;
        kill(&mut rig).with_context(|| format!("killed at {least} of {part}"))?;
        rig.start_registry()?;
        rig.converted("a:t").with_context(|| format!("after {least} of {part}"))?;
        let (name, back) = (format!("docker://{}", rig.name("a:t")), rig.path("back"));
        let target = format!("oci:{}:t", back.display());
        skopeo(&["copy", "-q", "--preserve-digests", "--src-tls-verify=false", &name, &target])?;
        ensure!(blobs(&back)? == blobs(&rig.path("layout"))?, "other blobs came back");
        is_whole(&rig)?;
    }
    Ok(())
}
