//! Sources that lie or lack something, and layers packed in every way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_image::Digest;
use lamina_testkit::compare::Compare;
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::run;
use serde_json::Value;

use crate::rig::{Rig, described, everything, skopeo, text};

fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().context("a digest")?;
    Ok(layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:")))
}

fn document(path: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Stores a document and makes `descriptor` name it.
fn store(layout: &Path, document: &Value, descriptor: &mut Value) -> Result<()> {
    let bytes = serde_json::to_vec(document)?;
    descriptor["digest"] = Digest::of(&bytes).to_string().into();
    descriptor["size"] = bytes.len().into();
    Ok(fs::write(blob(layout, descriptor)?, bytes)?)
}

/// Changes the config of a layout's image; all digests are right again afterwards.
fn change_config(layout: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut index = document(&layout.join("index.json"))?;
    let mut manifest = document(&blob(layout, &index["manifests"][0])?)?;
    let mut config = document(&blob(layout, &manifest["config"])?)?;
    change(&mut config);
    store(layout, &config, &mut manifest["config"])?;
    store(layout, &manifest, &mut index["manifests"][0])?;
    Ok(fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?)
}

/// Puts other bytes in place of the only layer, as a plain tar; all digests are right.
fn replace_layer(layout: &Path, bytes: &[u8]) -> Result<()> {
    let mut index = document(&layout.join("index.json"))?;
    let mut manifest = document(&blob(layout, &index["manifests"][0])?)?;
    let layer = &mut manifest["layers"][0];
    layer["digest"] = Digest::of(bytes).to_string().into();
    layer["size"] = bytes.len().into();
    fs::write(blob(layout, layer)?, bytes)?;
    store(layout, &manifest, &mut index["manifests"][0])?;
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    change_config(layout, |config| config["rootfs"]["diff_ids"][0] = Digest::of(bytes).to_string().into())
}

fn small() -> Image {
    Image::new().layer(|layer| layer.file("f", noise(50_000, 1)))
}

#[test]
fn a_layer_that_is_not_the_one_of_its_diff_id_is_refused_and_its_conversion_fails_with_the_reason()
-> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &small())?;
    let lie = Digest::of(b"another tar").to_string();
    change_config(&rig.path("layout"), |config| config["rootfs"]["diff_ids"][0] = lie.clone().into())?;
    let said = rig.fails(&["push", &source, &rig.name("a:t")])?;
    ensure!(said.contains(&lie), "{said}");
    ensure!(rig.fails(&["inspect", &rig.name("a:t")])?.contains("not found"));

    let target = format!("docker://{}", rig.name("b:t"));
    skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &target])?;
    let status = rig.converted("b:t")?;
    let conversion = &status["conversion"];
    ensure!(conversion["state"] == "failed" && conversion["reason"].to_string().contains(&lie), "{status}");
    let said = rig.fails(&["mount", &rig.name("b:t"), &text(&rig.path("mount"))])?;
    ensure!(said.contains("cannot be mounted lazily") && said.contains(&lie), "{said}");
    Ok(())
}

#[test]
fn a_layer_that_is_no_tar_is_refused_though_all_digests_are_right() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("f", noise(50_000, 1)).plain());
    let source = rig.layout("layout", &image)?;
    let tar = image.layers()[0].tar();
    let mut wrong_sum = tar.clone();
    wrong_sum[0] ^= 1;
    let mut long = tar.clone();
    // a size of 2^33 bytes less one, and the sum of the header put right
    long[124..136].copy_from_slice(b"77777777777\0");
    long[148..156].fill(b' ');
    let sum: u32 = long[..512].iter().map(|byte| u32::from(*byte)).sum();
    long[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let cases = [
        ("cut in a file", &tar[..20_000]),
        ("cut in a header", &tar[..300]),
        ("noise", &noise(20_000, 2)),
        ("a wrong sum", &wrong_sum),
        ("a size beyond the end", &long),
    ];
    for (number, (how, bytes)) in cases.into_iter().enumerate() {
        replace_layer(&rig.path("layout"), bytes)?;
        let said = rig.fails(&["push", &source, &rig.name("a:t")])?;
        ensure!(said.contains(&Digest::of(bytes).to_string()), "{how}: {said}");
        ensure!(rig.fails(&["inspect", &rig.name("a:t")])?.contains("not found"), "{how}");
        let name = format!("b{number}:t");
        let target = format!("docker://{}", rig.name(&name));
        skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &target])?;
        let status = rig.converted(&name)?;
        ensure!(status["conversion"]["state"] == "failed", "{how}: {status}");
        ensure!(status["conversion"]["reason"].is_string() && status["tree"].is_null(), "{how}: {status}");
    }
    Ok(())
}

#[test]
fn documents_that_are_missing_or_make_no_sense_are_named() -> Result<()> {
    let rig = Rig::new()?;
    let layout = rig.path("layout");
    let source = rig.layout("layout", &small())?;
    let index = document(&layout.join("index.json"))?;
    let manifest = blob(&layout, &index["manifests"][0])?;
    let config = blob(&layout, &document(&manifest)?["config"])?;
    for path in [config, manifest, layout.join("index.json")] {
        let good = fs::read(&path)?;
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        for damage in [None, Some(&b"{"[..]), Some(&good[..good.len() / 2])] {
            match damage {
                None => fs::remove_file(&path)?,
                Some(bytes) => fs::write(&path, bytes)?,
            }
            let said = rig.fails(&["push", &source, &rig.name("a:t")])?;
            ensure!(said.contains(&name), "{name}: {said}");
            ensure!(rig.fails(&["inspect", &rig.name("a:t")])?.contains("not found"));
        }
        fs::write(&path, good)?;
    }
    rig.ok(&["push", &source, &rig.name("a:t")]).map(drop)
}

#[test]
fn layers_packed_in_any_way_by_any_client_mount_alike() -> Result<()> {
    let rig = Rig::new()?;
    let gzip = everything().layer(|layer| {
        layer
            .dir("times")
            .file("times/just-before-1970", "")
            .mtime(-1, 999_999_999)
            .file("times/long-before", "x")
            .mtime(-2_000_000_000, 1)
            .file(format!("times/{}", "n".repeat(250)), "a long name")
            .symlink("times/far", "t".repeat(300))
    });
    let layers = gzip.layers();
    let zstd = layers.iter().fold(Image::new(), |image, layer| image.layer(|_| layer.clone().zstd()));
    let source = rig.layout("gzip", &gzip)?;
    let layout = source.trim_start_matches("oci:");
    run(Command::new("umoci").args(["unpack", "--image", layout]).arg(rig.path("bundle")))?;
    let rootfs = rig.path("bundle/rootfs");
    let compare = Compare { directory_mtime: &described, ..Compare::default() };

    let other = rig.layout("zstd", &zstd)?;
    let target = format!("docker://{}", rig.name("other:t"));
    skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &other, &target])?;
    ensure!(rig.converted("other:t")?["conversion"]["state"] == "done");
    rig.must_equal("other:t", &rootfs, &compare)?;
    // every layer of it is known by its diff ID, however it is packed
    let summary = rig.json(&["push", &source, &rig.name("gzip:t")])?;
    ensure!(summary["layers_known"] == 4 && summary["read_bytes"] == 0, "{summary}");
    rig.must_equal("gzip:t", &rootfs, &compare)?;
    rig.ok(&["push", &other, &rig.name("zstd:t")])?;
    rig.must_equal("zstd:t", &rootfs, &compare)
}

#[test]
fn plain_http_is_not_spoken_beyond_loopback_unless_it_is_said() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &small())?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    // no loopback address by its looks, though the kernel delivers it here
    let port = rig.address.rsplit(':').next().context("a port")?;
    let name = format!("0.0.0.0:{port}/a:t");
    let point = text(&rig.path("mount"));
    for words in [&["inspect", &name][..], &["push", &source, &name], &["mount", &name, &point]] {
        let said = rig.fails(words)?;
        ensure!(said.contains(&format!("https://0.0.0.0:{port}/")), "{said}");
    }
    rig.ok(&["mount", "--plain-http", &name, &point])?;
    ensure!(fs::read(rig.path("mount/f"))? == noise(50_000, 1));
    rig.unmount()
}

#[test]
fn names_and_links_that_point_out_of_the_image_stay_inside() -> Result<()> {
    let rig = Rig::new()?;
    let outside = rig.path("outside");
    fs::create_dir(&outside)?;
    let image = Image::new().layer(|layer| {
        layer
            .file(text(&outside.join("absolute")), "inside")
            .dir("etc")
            .symlink("etc/up", "../../../..")
            .symlink("out", text(&outside))
            .file("out/through", "inside")
    });
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let mounted = rig.mount("a:t")?;
    // an absolute name begins at the image's root, and so does the target of a link that a name passes through
    let within = mounted.join(outside.strip_prefix("/")?);
    for name in ["absolute", "through"] {
        ensure!(fs::read(within.join(name))? == b"inside", "{name}");
    }
    ensure!(fs::read_link(mounted.join("out"))? == outside);
    rig.unmount()?;
    ensure!(fs::read_dir(&outside)?.count() == 0, "something was written outside");
    Ok(())
}

#[test]
fn what_does_not_parse_is_a_usage_error_that_quotes_it() -> Result<()> {
    for words in [["mount", "a:t:u", "/tmp"], ["push", "oci:/x", "UPPER/case:t"], ["push", "/x", "r/a:t"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_lamina")).args(words).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{words:?}: {}: {said}", output.status);
        ensure!(words.iter().skip(1).any(|word| said.contains(&format!("'{word}'"))), "{said}");
    }
    Ok(())
}
