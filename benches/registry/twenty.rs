//! What twenty builds of one application take without a build cache: the same dependencies with other times in each, one file of
//! them another one, and a few modules of the application changed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use lamina_testkit::noise;
use lamina_testkit::process::run;
use serde::Serialize;
use serde_json::Value;

use crate::servers::{Lamina, docker_registry, mountable, push};

const BUILDS: u64 = 20;
const MODULES: u64 = 200;
const MODULES_CHANGED: u64 = 3;
/// Assignments in a module.
const LINES: usize = 300;

/// All in bytes.
#[derive(Debug, Serialize)]
struct Taken {
    /// Sum of all images, each by itself.
    each_by_itself: u64,
    docker_registry: u64,
    lamina_push: u64,
    /// When all were converted.
    skopeo_copy: u64,
}

/// Builds the images upon the one in `made`, stores them in each way, and prints the table.
pub(crate) fn measure(lamina: &Path, made: &Path, scratch: &Path, json: Option<&Path>) -> Result<()> {
    let layout = scratch.join("oci");
    run(Command::new("cp").arg("-a").arg(made.join("oci")).arg(&layout))?;
    build(made, scratch, &layout).context("building the images")?;
    let (docker, pushed, copied) = (scratch.join("docker"), scratch.join("pushed"), scratch.join("copied"));
    {
        let (_process, docker) = docker_registry(scratch)?;
        let (pushed, copied) = (Lamina::start(lamina, &pushed)?, Lamina::start(lamina, &copied)?);
        for number in 1..=BUILDS {
            let (image, tag) = (format!("oci:{}:v{number}", layout.display()), format!("v{number}"));
            push(&image, docker, &tag)?;
            push(&image, copied.address, &tag)?;
            run(Command::new(lamina).args(["push", &image, &format!("{}/a:{tag}", pushed.address)]))?;
        }
        for number in 1..=BUILDS {
            mountable(copied.address, &format!("v{number}"))?;
        }
    }
    let taken = Taken {
        each_by_itself: each_by_itself(&layout)?,
        docker_registry: bytes_in(&docker)?,
        lamina_push: bytes_in(&pushed)?,
        skopeo_copy: bytes_in(&copied)?,
    };
    let mib = |bytes: u64| (bytes + (1 << 19)) >> 20;
    println!("| stored by | MiB |\n|---|---:|");
    println!("| each image by itself | {} |", mib(taken.each_by_itself));
    println!("| docker-registry: every layer once | {} |", mib(taken.docker_registry));
    println!("| `lamina push` | {} |", mib(taken.lamina_push));
    println!(
        "| `skopeo copy` into `lamina registry`: every layer once, and the chunks | {} |",
        mib(taken.skopeo_copy)
    );
    match json {
        Some(file) => {
            fs::write(file, serde_json::to_vec_pretty(&taken)?).context("writing what was measured")
        }
        None => Ok(()),
    }
}

/// Adds the builds to a layout, under the tags `v1` and on.
fn build(made: &Path, scratch: &Path, layout: &Path) -> Result<()> {
    let (dependencies, application) = (scratch.join("dependencies"), scratch.join("application"));
    run(Command::new("cp").arg("-a").arg(made.join("numpy")).arg(&dependencies))?;
    fs::create_dir(&application)?;
    let module = |number: u64| application.join(format!("m{number:03}.py"));
    for number in 0..MODULES {
        fs::write(module(number), text(number))?;
    }
    let layout = layout.display();
    for number in 1..=BUILDS {
        fs::write(dependencies.join("BUILD"), format!("build {number}\n"))?;
        for change in 0..MODULES_CHANGED {
            let path = module((number * 37 + change * 71) % MODULES);
            let changed = format!("{}y = {number}\n", fs::read_to_string(&path)?);
            fs::write(path, changed)?;
        }
        let time = format!("2026-01-01 +{number} hours");
        let touch = ["-exec", "touch", "-h", "-d", &time, "{}", "+"];
        run(Command::new("find").arg(&dependencies).arg(&application).args(touch))?;
        let tag = format!("v{number}");
        let below = format!("{layout}:numpy");
        insert(&["--image", &below, "--tag", &tag], &dependencies, "/opt/dependencies")?;
        insert(&["--image", &format!("{layout}:{tag}")], &application, "/opt/application")?;
    }
    Ok(())
}

/// Adds a layer to an image.
fn insert(image: &[&str], directory: &Path, target: &str) -> Result<()> {
    run(Command::new("umoci").arg("insert").args(image).arg(directory).arg(target)).map(drop)
}

/// A module that compresses about as programs do.
fn text(number: u64) -> String {
    let words = noise(LINES * 4, number);
    let line = |(at, word): (usize, &[u8])| {
        let value = u32::from_le_bytes(word.try_into().expect("words of four bytes"));
        format!("x{at} = {value}\n")
    };
    words.chunks_exact(4).enumerate().map(line).collect()
}

/// How long all blobs of each build are together.
fn each_by_itself(layout: &Path) -> Result<u64> {
    let json = |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let index = json(&layout.join("index.json"))?;
    let mut bytes = 0;
    for named in index["manifests"].as_array().context("an index without manifests")? {
        let tag = named["annotations"]["org.opencontainers.image.ref.name"].as_str().unwrap_or_default();
        let digest = named["digest"].as_str().context("a manifest without a digest")?;
        if !tag.starts_with('v') {
            continue;
        }
        let manifest = json(&layout.join("blobs").join(digest.replace(':', "/")))?;
        let layers = manifest["layers"].as_array().context("a manifest without layers")?;
        let blobs = layers.iter().chain([&manifest["config"]]);
        bytes += blobs.filter_map(|blob| blob["size"].as_u64()).sum::<u64>();
    }
    Ok(bytes)
}

/// How long all files below a directory are together.
fn bytes_in(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        bytes += match entry.file_type()?.is_dir() {
            true => bytes_in(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(bytes)
}
