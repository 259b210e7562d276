//! Which part may know which, and what each must do without. These are the promises of `crates/README.md` that a
//! compiler does not check.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::process::run;
use serde_json::Value;

/// What each crate may use of the others. The root package is the binary and may use everything but the testkit.
const ARROWS: [(&str, &[&str]); 9] = [
    ("chunk", &[]),
    ("image", &["chunk"]),
    ("wire", &["chunk", "image"]),
    ("store", &["chunk", "image"]),
    ("registry", &["chunk", "image", "store", "wire"]),
    ("cache", &["chunk"]),
    ("mount", &["cache", "chunk", "image"]),
    ("node", &["cache", "chunk", "image", "mount", "wire"]),
    ("testkit", &[]),
];

/// What would let `chunk` and `image` block, or depend on where and when they run.
const IMPURE: [&str; 7] =
    ["tokio", "std::fs", "std::env", "std::net", "SystemTime::now", "Instant::now", "use std::{"];

/// The files that may name sled: an index anywhere else would soon hold what cannot be rebuilt.
const INDEXES: [&str; 2] = ["cache/src/disk/index.rs", "store/src/index.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The packages of the workspace, as cargo sees them.
fn packages() -> Result<Vec<Value>> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(root());
    let mut metadata: Value = serde_json::from_slice(&run(&mut cargo)?.stdout)?;
    serde_json::from_value(metadata["packages"].take()).context("a list of packages")
}

/// The dependencies of a package on crates of this workspace, without the common part of their names.
/// `kinds` are `normal`, `build`, `dev`.
fn uses(package: &Value, kinds: &[&str]) -> BTreeSet<String> {
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    let wanted = dependencies.filter(|one| kinds.contains(&one["kind"].as_str().unwrap_or("normal")));
    wanted.filter_map(|one| Some(one["name"].as_str()?.strip_prefix("lamina-")?.to_owned())).collect()
}

/// All Rust files below `directory`, with what they say outside comments and unit tests.
fn sources(directory: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && !path.ends_with("tests.rs") {
                found.insert(path.clone(), code(&std::fs::read_to_string(&path)?));
            }
        }
    }
    ensure!(!found.is_empty(), "no Rust file below {}", directory.display());
    Ok(found)
}

/// Unit tests stand at the end of a file.
fn code(text: &str) -> String {
    let shipped = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = shipped.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.map(|line| line.split(" // ").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn crates_know_only_those_below_them() -> Result<()> {
    let allowed: BTreeMap<&str, BTreeSet<String>> = ARROWS
        .into_iter()
        .map(|(name, below)| (name, below.iter().map(|name| (*name).to_owned()).collect()))
        .collect();
    let mut seen = BTreeSet::new();
    for package in packages()? {
        let name = package["name"].as_str().context("a name")?;
        let Some(short) = name.strip_prefix("lamina-") else { continue };
        let allowed = allowed.get(short).with_context(|| format!("{name}: no arrow says what it may use"))?;
        let used = uses(&package, &["normal", "build"]);
        let more: Vec<_> = used.difference(allowed).collect();
        ensure!(more.is_empty(), "{name} uses {more:?}; an arrow of the house does not allow it");
        seen.insert(short.to_owned());
    }
    let expected: BTreeSet<String> = ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect();
    ensure!(seen == expected, "the workspace has {seen:?}");
    Ok(())
}

#[test]
fn the_testkit_ships_with_nothing() -> Result<()> {
    for package in packages()? {
        let shipped = uses(&package, &["normal", "build"]);
        ensure!(!shipped.contains("testkit"), "{} ships the testkit", package["name"]);
    }
    Ok(())
}

#[test]
fn chunk_and_image_cannot_block_and_do_not_know_where_or_when_they_run() -> Result<()> {
    for name in ["chunk", "image"] {
        for (path, code) in sources(&root().join("crates").join(name).join("src"))? {
            for word in IMPURE {
                ensure!(!code.contains(word), "{} says {word}", path.display());
            }
        }
    }
    for package in packages()? {
        let pure = ["lamina-chunk", "lamina-image"].iter().any(|name| package["name"] == *name);
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        let tokio = dependencies.filter(|one| one["kind"].is_null()).any(|one| one["name"] == "tokio");
        ensure!(!(pure && tokio), "{} depends on tokio", package["name"]);
    }
    Ok(())
}

#[test]
fn only_indexes_that_can_be_rebuilt_use_sled() -> Result<()> {
    let crates = root().join("crates");
    for (path, code) in sources(&crates)? {
        let index = INDEXES.iter().any(|index| path == crates.join(index));
        ensure!(index || !code.contains("sled::"), "{} uses sled", path.display());
    }
    Ok(())
}

#[test]
fn no_library_reads_the_environment() -> Result<()> {
    for (path, code) in sources(&root().join("crates"))? {
        let below = path.strip_prefix(root().join("crates"))?;
        let library = below.components().nth(1).is_some_and(|part| part.as_os_str() == "src");
        let reads = ["std::env::var", "env::var_os", "env::vars"].iter().any(|word| code.contains(word));
        ensure!(!library || !reads, "{} reads the environment", path.display());
    }
    Ok(())
}
