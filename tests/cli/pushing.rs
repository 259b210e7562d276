//! Every kind of source, what a second push costs, and what other clients see.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_image::Digest;
use lamina_testkit::compare::Compare;
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

use crate::rig::{DEADLINE, Rig, described, everything, real_image, skopeo, text};

/// The image unpacked by umoci.
fn unpacked(rig: &Rig, source: &str) -> Result<std::path::PathBuf> {
    let bundle = rig.path("bundle");
    let image = source.strip_prefix("oci:").context("a layout")?;
    run(Command::new("umoci").args(["unpack", "--image", image]).arg(&bundle))?;
    Ok(bundle.join("rootfs"))
}

#[test]
fn a_mount_equals_the_same_layers_unpacked_whatever_the_source() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &everything())?;
    let rootfs = unpacked(&rig, &source)?;
    let compare = Compare { directory_mtime: &described, ..Compare::default() };
    let archives = [("oci-archive", rig.path("oci.tar")), ("docker-archive", rig.path("docker.tar"))];
    let mut sources = vec![("layout", source.clone())];
    for (kind, path) in &archives {
        let target = format!("{kind}:{}", text(path));
        skopeo(&["copy", "--quiet", &source, &target])?;
        sources.push((kind, target));
    }
    for (name, source) in &sources {
        rig.ok(&["push", source, &rig.name(&format!("{name}:t"))])?;
        rig.must_equal(&format!("{name}:t"), &rootfs, &compare)?;
    }
    let remote = format!("docker://{}", rig.name("layout:t"));
    rig.ok(&["push", &remote, &rig.name("again:t")])?;
    rig.must_equal("again:t", &rootfs, &compare)?;
    // a directory says everything about itself, so nothing is left out
    rig.ok(&["push", &format!("dir:{}", text(&rootfs)), &rig.name("dir:t")])?;
    rig.must_equal("dir:t", &rootfs, &Compare::default())
}

#[test]
fn a_real_image_mounts_as_its_layers_unpack() -> Result<()> {
    let rig = Rig::new()?;
    let source = real_image()?;
    let rootfs = unpacked(&rig, &source)?;
    rig.ok(&["push", &source, &rig.name("real:t")])?;
    rig.must_equal("real:t", &rootfs, &Compare::default())
}

fn sha256(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

#[test]
fn a_layer_that_is_not_what_the_config_says_is_refused_and_named() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("a", noise(300_000, 1))))?;
    let blobs = rig.path("layout/blobs/sha256");
    let find = |word: &str| {
        let blobs = fs::read_dir(&blobs)?.map(|entry| Ok(fs::read(entry?.path())?));
        let found = blobs.filter_map(|bytes: Result<Vec<u8>>| String::from_utf8(bytes.ok()?).ok());
        found.into_iter().find(|text| text.contains(word)).context("a document")
    };
    let config = find("\"diff_ids\"")?;
    let layer = config.split("\"diff_ids\":[\"").nth(1).context("a layer")?[..71].to_owned();
    let lie = sha256(b"something else");
    let lying = config.replace(&layer, &lie);
    let (was, is) = (sha256(config.as_bytes()), sha256(lying.as_bytes()));
    let manifest = find("\"layers\"")?;
    let lying_manifest = manifest
        .replace(&was, &is)
        .replace(&format!("\"size\":{}", config.len()), &format!("\"size\":{}", lying.len()));
    let write = |text: &str| fs::write(blobs.join(&sha256(text.as_bytes())[7..]), text);
    write(&lying)?;
    write(&lying_manifest)?;
    let index = fs::read_to_string(rig.path("layout/index.json"))?;
    let index = index.replace(&sha256(manifest.as_bytes()), &sha256(lying_manifest.as_bytes()));
    fs::write(rig.path("layout/index.json"), index)?;
    let complaint = rig.fails(&["push", &source, &rig.name("app:t")])?;
    ensure!(complaint.contains(&lie), "{complaint}");
    let absent = rig.fails(&["inspect", &rig.name("app:t")])?;
    ensure!(absent.contains("app"), "{absent}");
    Ok(())
}

#[test]
fn a_second_push_reads_and_sends_nothing() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &everything())?;
    let first = rig.json(&["push", &source, &rig.name("a:t")])?;
    ensure!(first["layers_known"] == 0 && first["chunks_new"].as_u64() > Some(0), "{first}");
    let second = rig.json(&["push", &source, &rig.name("b:t")])?;
    ensure!(second["read_bytes"] == 0 && second["layers_known"] == second["layers"], "{second}");
    ensure!(second["manifest"] == first["manifest"], "{first} {second}");
    Ok(())
}

#[test]
fn other_clients_pull_the_rebuilt_layers_and_the_image_keeps_its_id() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &everything())?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let name = format!("docker://{}", rig.name("a:t"));
    // skopeo hashes every layer that it copies
    skopeo(&[
        "copy",
        "--quiet",
        "--src-tls-verify=false",
        &name,
        &format!("oci:{}:back", text(&rig.path("back"))),
    ])?;
    let config = |of: &str| skopeo(&["inspect", "--config", "--raw", "--tls-verify=false", of]);
    ensure!(config(&name)? == config(&source)?, "the config has changed");
    Ok(())
}

#[test]
fn kept_layers_keep_the_manifest_and_an_ordinary_push_becomes_mountable() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &everything())?;
    let rootfs = unpacked(&rig, &source)?;
    let compare = Compare { directory_mtime: &described, ..Compare::default() };
    let raw = skopeo(&["inspect", "--raw", &source])?;
    rig.ok(&["push", "--keep-layers", &source, &rig.name("kept:t")])?;
    ensure!(
        skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://{}", rig.name("kept:t"))])?
            == raw
    );
    let status = rig.converted("kept:t")?;
    ensure!(status["conversion"]["state"] == "done" && status["bound"] == false, "{status}");
    rig.must_equal("kept:t", &rootfs, &compare)?;
    let refused = rig.fails(&["mount", "--require-bound", &rig.name("kept:t"), &text(&rig.path("mount"))])?;
    ensure!(refused.contains("--require-bound"), "{refused}");

    let other =
        rig.layout("other", &Image::new().layer(|layer| layer.file("f", noise(100_000, 9)).zstd()))?;
    let target = format!("docker://{}", rig.name("plain:t"));
    skopeo(&["copy", "--quiet", "--dest-tls-verify=false", &other, &target])?;
    rig.converted("plain:t")?;
    let mounted = rig.mount("plain:t")?;
    ensure!(fs::read(mounted.join("f"))? == noise(100_000, 9));
    rig.unmount()
}

#[test]
fn a_push_that_is_killed_names_nothing_and_the_next_one_sends_only_the_rest() -> Result<()> {
    let rig = Rig::new()?;
    let layers = Image::new().layer(|layer| layer.file("big", noise(300_000_000, 3)).plain());
    let source = rig.layout("layout", &layers)?;
    let packs = |least: usize| {
        until("packs to arrive", DEADLINE, || {
            // nothing is there before the first
            let arrived = fs::read_dir(rig.path("storage/objects/arrived")).map_or(0, Iterator::count);
            Ok((arrived >= least).then_some(()))
        })
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["push", &source, &rig.name("a:t")]);
    let mut push = Process::spawn("push", &mut command)?;
    packs(2)?;
    push.signal(rustix::process::Signal::KILL)?;
    let _ = push.wait(DEADLINE)?;
    let missing = rig.fails(&["mount", &rig.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(missing.contains("not found") && missing.contains("/manifests/t"), "{missing}");
    let again = rig.json(&["push", &source, &rig.name("a:t")])?;
    ensure!(again["chunks_known"].as_u64() > Some(500), "{again}");
    ensure!(again["sent_bytes"].as_u64() < Some(250_000_000), "{again}");
    Ok(())
}

#[test]
fn an_interrupted_push_ends_with_130() -> Result<()> {
    let rig = Rig::new()?;
    let source =
        rig.layout("layout", &Image::new().layer(|layer| layer.file("big", noise(200_000_000, 4)).plain()))?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["push", &source, &rig.name("a:t")]);
    let mut push = Process::spawn("push", &mut command)?;
    until("a first pack", DEADLINE, || Ok((walk(&rig.path("storage/objects"), 1 << 20)? > 0).then_some(())))?;
    push.signal(rustix::process::Signal::INT)?;
    let status = push.wait(DEADLINE)?;
    ensure!(status.code() == Some(130), "{status}");
    Ok(())
}

/// How many files below `directory` are at least `least` bytes long.
fn walk(directory: &Path, least: u64) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let Ok(entry) = entry else { continue };
        // uploads come and go
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            count += walk(&entry.path(), least).unwrap_or(0);
        } else if metadata.len() >= least {
            count += 1;
        }
    }
    Ok(count)
}
