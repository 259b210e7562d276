//! Push, mount and ordinary pulls.

use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::compare::Compare;
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::run;
use serde_json::Value;

use crate::docker_registry::DockerRegistry;
use crate::rig::{Rig, described, everything, real_image, skopeo, text};

fn document(text: &str) -> Result<Value> {
    Ok(serde_json::from_str(text)?)
}

fn raw(name: &str) -> Result<Value> {
    document(&skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://{name}")])?)
}

#[test]
fn an_image_in_a_registry_without_referrers_mounts_with_all_it_has_and_is_pulled_as_ever() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let source = rig.layout("layout", &everything())?;
    let pushed = rig.json(&["push", &source, &home.name("a:t")])?;
    ensure!(pushed["layers_known"] == 0, "{pushed}");

    let unpacked = rig.path("unpacked");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(source.trim_start_matches("oci:"))
        .arg(&unpacked))?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--require-bound", &home.name("a:t"), &text(&mounted)])?;
    let compared = Compare { directory_mtime: &described, ..Compare::default() }
        .trees(&mounted, &unpacked.join("rootfs"))?;
    ensure!(compared.differences.is_empty() && compared.entries > 1, "{:?}", compared.differences);
    rig.unmount()?;

    // layers are the source's own, byte for byte
    let manifest = raw(&home.name("a:t"))?;
    let layout = text(&rig.path("pulled"));
    skopeo(&[
        "copy",
        "-q",
        "--src-tls-verify=false",
        &format!("docker://{}", home.name("a:t")),
        &format!("oci:{layout}:t"),
    ])?;
    let source = raw_layout(&rig.path("layout"))?;
    let digests = |manifest: &Value| -> Vec<Value> {
        manifest["layers"].as_array().into_iter().flatten().map(|layer| layer["digest"].clone()).collect()
    };
    ensure!(digests(&manifest) == digests(&source) && digests(&source).len() == 3, "{manifest}");
    Ok(())
}

/// The manifest of a layout's only image.
fn raw_layout(layout: &std::path::Path) -> Result<Value> {
    let index = document(&std::fs::read_to_string(layout.join("index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().unwrap_or_default().replace(':', "/");
    document(&std::fs::read_to_string(layout.join("blobs").join(digest))?)
}

#[test]
fn a_kept_manifest_keeps_its_digest_and_its_tree_is_found_by_the_referrers_tag() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let image = Image::new().layer(|layer| layer.file("f", noise(300_000, 1)).gzip());
    let source = rig.layout("layout", &image)?;
    let pushed = rig.json(&["push", "--keep-layers", &source, &home.name("a:t")])?;
    let index = document(&std::fs::read_to_string(rig.path("layout/index.json"))?)?;
    ensure!(pushed["manifest"] == index["manifests"][0]["digest"], "{pushed}");

    let tag = pushed["manifest"].as_str().unwrap_or_default().replace(':', "-");
    let referrers = raw(&home.name(&format!("a:{tag}")))?;
    let listed = &referrers["manifests"][0];
    ensure!(listed["artifactType"] == "application/vnd.lamina.tree.v1+zstd", "{referrers}");
    ensure!(listed["annotations"]["dev.lamina.tree"] == pushed["tree"], "{referrers}");

    let said = rig.fails(&["mount", "--require-bound", &home.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(said.contains("--require-bound"), "{said}");
    rig.ok(&["mount", &home.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(std::fs::read(rig.path("mount/f"))? == noise(300_000, 1));
    rig.unmount()
}

#[test]
fn a_second_push_sends_nothing_and_the_next_version_only_what_is_new() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let big = noise(6_000_000, 3);
    let first = Image::new().layer(|layer| layer.file("base", noise(2_000_000, 2)).gzip());
    let old = first.clone().layer(|layer| layer.file("big", big.clone()).gzip());
    let mut changed = big.clone();
    changed[3_000_000] ^= 1;
    let new = first.layer(|layer| layer.file("big", changed.clone()).gzip());
    let (old, new) = (rig.layout("old", &old)?, rig.layout("new", &new)?);
    rig.ok(&["push", &old, &home.name("a:1")])?;

    let again = rig.json(&["push", &old, &home.name("a:1")])?;
    ensure!(again["layers_known"] == 2 && again["sent_bytes"].as_u64() < Some(10_000), "{again}");

    let next = rig.json(&["push", &new, &home.name("a:2")])?;
    ensure!(
        next["layers_known"] == 1 && next["chunks_known"].as_u64() > next["chunks_new"].as_u64(),
        "{next}"
    );
    for (tag, expected) in [("a:1", &big), ("a:2", &changed)] {
        rig.ok(&["mount", &home.name(tag), &text(&rig.path("mount"))])?;
        ensure!(&std::fs::read(rig.path("mount/big"))? == expected, "{tag}");
        rig.unmount()?;
    }
    Ok(())
}

#[test]
fn a_directory_and_a_docker_archive_go_there_too() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let rootfs = rig.path("rootfs");
    std::fs::create_dir_all(rootfs.join("d"))?;
    std::fs::write(rootfs.join("d/f"), noise(200_000, 4))?;
    rig.ok(&["push", &format!("dir:{}", text(&rootfs)), &home.name("dir:t")])?;
    let image = Image::new().layer(|layer| layer.dir("d").file("d/f", noise(200_000, 4)).gzip());
    let layout = rig.layout("layout", &image)?;
    let archive = format!("docker-archive:{}", text(&rig.path("image.tar")));
    skopeo(&["copy", "-q", &layout, &format!("{archive}:x:t")])?;
    rig.ok(&["push", &archive, &home.name("archive:t")])?;
    for name in ["dir:t", "archive:t"] {
        rig.ok(&["mount", &home.name(name), &text(&rig.path("mount"))])?;
        ensure!(std::fs::read(rig.path("mount/d/f"))? == noise(200_000, 4), "{name}");
        rig.unmount()?;
        let layout = format!("oci:{}:t", text(&rig.path(&name.replace(':', "-"))));
        skopeo(&["copy", "-q", "--src-tls-verify=false", &format!("docker://{}", home.name(name)), &layout])?;
    }
    Ok(())
}

#[test]
fn a_program_of_a_real_image_runs_from_there() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    rig.ok(&["push", &real_image()?, &home.name("numpy:t")])?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", &home.name("numpy:t"), &text(&mounted)])?;
    let mut python = Command::new("chroot");
    python.arg(&mounted).args(["python3", "-c", "import numpy; print(numpy.arange(4).sum())"]);
    ensure!(run(&mut python)?.stdout == b"6\n");
    rig.unmount()
}

#[test]
fn an_image_that_somebody_else_pushed_there_says_what_to_do() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("f", "x").gzip()))?;
    skopeo(&["copy", "-q", "--dest-tls-verify=false", &source, &format!("docker://{}", home.name("a:t"))])?;
    let said = rig.fails(&["mount", &home.name("a:t"), &text(&rig.path("mount"))])?;
    ensure!(said.contains("its registry does not make any") && said.contains("lamina push"), "{said}");
    Ok(())
}
