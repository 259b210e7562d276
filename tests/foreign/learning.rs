//! Profiles and boot packs in a registry that does not learn.

use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{run, until};
use serde_json::Value;

use crate::docker_registry::DockerRegistry;
use crate::rig::{DEADLINE, Rig, real_image, text};

/// Counters of the only mount.
fn mount_counters(rig: &Rig) -> Result<Value> {
    Ok(rig.json(&["stats"])?["mounts"][0]["counters"].clone())
}

#[test]
fn a_recorded_start_becomes_a_boot_pack_that_the_next_start_uses() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let name = home.name("numpy:t");
    rig.ok(&["push", &real_image()?, &name])?;
    let said = rig.fails(&["profile", "push", &name])?;
    ensure!(said.contains("no start of"), "{said}");

    let recorded = rig.lamina(&["profile", "record", &name, "--", "python3", "-c", "import numpy"])?;
    let said = String::from_utf8_lossy(&recorded.stderr);
    ensure!(recorded.status.success() && said.contains("lamina profile push"), "{said}");
    rig.ok(&["profile", "push", &name])?;

    let shown = rig.json(&["profile", "show", &name])?;
    let key = shown["commands"][0].as_str().unwrap_or_default();
    ensure!(key.starts_with("python3-"), "{shown}");
    let own = rig.json(&["profile", "show", &name, "--command", key])?;
    ensure!(own["profile"] == shown["profile"] && own["boot"]["digest"].is_string(), "{own}");
    let pages = shown["profile"]["pages"].as_u64().unwrap_or_default();
    ensure!(
        pages > 500 && shown["profile"]["starts"] == 1 && shown["boot"]["bytes"].as_u64() > Some(1 << 20),
        "{shown}"
    );
    let said = rig.fails(&["profile", "push", &name])?;
    ensure!(said.contains("no start of"), "what was pushed is not pushed twice: {said}");

    // from a node that has nothing
    rig.node_ended()?;
    std::fs::remove_dir_all(rig.path("cache"))?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", &name, &text(&mounted)])?;
    let stored = until("the boot pack to be stored", DEADLINE, || {
        let stored = mount_counters(&rig)?["boot_stored_bytes"].as_u64();
        Ok(stored.filter(|stored| *stored > 0))
    })?;
    ensure!(stored <= pages * 4096, "{stored} bytes of {pages} pages");
    let mut python = Command::new("chroot");
    python.arg(&mounted).args(["python3", "-c", "import numpy; print(numpy.arange(4).sum())"]);
    ensure!(run(&mut python)?.stdout == b"6\n");
    rig.unmount()
}

#[test]
fn the_general_profile_hears_of_a_start_that_is_pushed_as_one_commands() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let name = home.name("numpy:t");
    rig.ok(&["push", &real_image()?, &name])?;
    for (starts, key) in [(1, "first"), (2, "second")] {
        let command = ["profile", "record", &name, "--command", key, "--", "python3", "-c", "pass"];
        let recorded = rig.lamina(&command)?;
        let said = String::from_utf8_lossy(&recorded.stderr);
        ensure!(recorded.status.success(), "{said}");
        rig.ok(&["profile", "push", &name, "--command", key])?;
        let shown = rig.json(&["profile", "show", &name])?;
        ensure!(shown["profile"]["starts"] == starts && shown["boot"]["digest"].is_string(), "{shown}");
        let own = rig.json(&["profile", "show", &name, "--command", key])?;
        ensure!(own["profile"]["starts"] == 1 && own["boot"]["digest"].is_string(), "{own}");
    }
    Ok(())
}

#[test]
fn profiles_are_exchanged_and_dropped_there_as_anywhere() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let name = home.name("a:t");
    let source =
        rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(300_000, 1)).file("g", "g")))?;
    rig.ok(&["push", &source, &name])?;
    let file = rig.path("profile.json");
    let profile = |pages: u64| {
        format!(r#"{{"version":1,"starts":1,"names":["f"],"files":["f"],"runs":[[0,0,{pages},1]]}}"#)
    };
    for pages in [7, 9] {
        std::fs::write(&file, profile(pages))?;
        let verb = if pages == 7 { "import" } else { "push" };
        rig.ok(&["profile", verb, &name, &text(&file)])?;
        let shown = rig.json(&["profile", "show", &name])?;
        ensure!(shown["profile"]["pages"] == pages && shown["boot"]["digest"].is_string(), "{shown}");
    }
    let exported = rig.path("exported.json");
    rig.ok(&["profile", "export", &name, &text(&exported)])?;
    ensure!(std::fs::read_to_string(&exported)?.contains("[[0,0,9,1]]"));
    // a command has a profile of its own beside that
    std::fs::write(&file, profile(3))?;
    rig.ok(&["profile", "push", &name, &text(&file), "--command", "f"])?;
    let shown = rig.json(&["profile", "show", &name, "--command", "f"])?;
    ensure!(shown["profile"]["pages"] == 3 && shown["boot"]["digest"].is_string(), "{shown}");
    let shown = rig.json(&["profile", "show", &name])?;
    ensure!(shown["profile"]["pages"] == 9 && shown["commands"] == serde_json::json!(["f"]), "{shown}");
    rig.ok(&["profile", "drop", &name, "--command", "f"])?;
    let shown = rig.json(&["profile", "show", &name])?;
    ensure!(shown["profile"]["pages"] == 9 && shown["commands"] == serde_json::json!([]), "{shown}");
    rig.ok(&["profile", "drop", &name])?;
    let shown = rig.json(&["profile", "show", &name])?;
    ensure!(shown["profile"].is_null() && shown["boot"].is_null(), "{shown}");
    // the tree is still there
    rig.ok(&["mount", &name, &text(&rig.path("mount"))])?;
    rig.unmount()
}
