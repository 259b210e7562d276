//! Profiles: recorded, seen, exchanged and dropped.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::mounts::mounts;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{DEADLINE, Rig, programs, text};

/// An image in which `/bin/cat` runs: this machine's, with the libraries that it needs.
fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let cat = programs(Layer::new(), &["/bin/cat"])?;
    let image = Image::new().layer(|_| cat).layer(|layer| {
        let layer = layer.file("data/second", noise(100_000, 2)).file("data/first", noise(1_000_000, 1));
        layer.file("unread", noise(50_000, 3)).file("ready", "ready\n").fifo("fifo")
    });
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

fn record(rig: &Rig) -> Result<()> {
    let name = rig.name("a:t");
    let command = ["profile", "record", &name, "--", "cat", "/data/first", "/data/second"];
    let output = rig.lamina(&command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    ensure!(
        output.stdout == [noise(1_000_000, 1), noise(100_000, 2)].concat(),
        "the command read other bytes"
    );
    ensure!(said.starts_with("recorded ") && said.contains(" pages"), "{said}");
    Ok(())
}

/// The libraries of `/bin/cat`.
fn is_library(file: &Value) -> bool {
    file["path"].as_str().is_some_and(|path| path.contains(".so"))
}

/// Waits until an image has neither a profile nor a boot pack.
fn forgotten(rig: &Rig) -> Result<()> {
    until("the profile to be forgotten", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &rig.name("a:t")])?;
        Ok((shown["profile"].is_null() && shown["boot"].is_null()).then_some(()))
    })
}

/// What `show` says, once a part of it is there.
fn shown(rig: &Rig, part: &str) -> Result<Value> {
    until(part, DEADLINE, || {
        let shown = rig.json(&["profile", "show", &rig.name("a:t")])?;
        // a boot pack is there a moment before its profile
        Ok((!shown[part].is_null() && !shown["profile"].is_null()).then_some(shown))
    })
}

/// No mount and no directory of a recording.
fn nothing_is_left(rig: &Rig) -> Result<()> {
    let left = mounts()?.into_iter().find(|mount| mount.dir.starts_with(rig.path("tmp")));
    ensure!(left.is_none(), "{left:?}");
    let left = fs::read_dir(rig.path("tmp"))?.next();
    ensure!(left.is_none(), "{left:?}");
    Ok(())
}

/// A counter of the only mount.
fn counter(rig: &Rig, name: &str) -> Result<u64> {
    Ok(rig.json(&["stats"])?["mounts"][0]["counters"][name].as_u64().unwrap_or(0))
}

#[test]
fn a_recording_is_the_profile_of_what_the_command_read_in_its_order() -> Result<()> {
    let rig = pushed()?;
    record(&rig)?;
    nothing_is_left(&rig)?;
    let profile = &shown(&rig, "profile")?["profile"];
    ensure!(profile["starts"] == 1 && profile["inherited"] == false, "{profile}");
    let files = profile["files"].as_array().context("a list of files")?;
    let data: Vec<_> = files.iter().filter(|file| file["path"] != "bin/cat" && !is_library(file)).collect();
    let expected = [("data/first", 245), ("data/second", 25)];
    ensure!(data.len() == expected.len(), "{profile}");
    for (found, (path, pages)) in data.iter().zip(expected) {
        ensure!(found["path"] == path && found["pages"] == pages, "{profile}");
    }
    ensure!(files.iter().any(|file| file["path"] == "bin/cat"), "{profile}");
    ensure!(profile["names"].as_u64() > Some(2), "{profile}");
    let total: u64 = files.iter().filter_map(|file| file["pages"].as_u64()).sum();
    ensure!(profile["pages"] == total, "{profile}");
    Ok(())
}

#[test]
fn a_profile_gets_a_boot_pack_and_a_mount_uses_it_unless_told_not_to() -> Result<()> {
    let rig = pushed()?;
    record(&rig)?;
    let boot = &shown(&rig, "boot")?["boot"];
    ensure!(boot["bytes"].as_u64() > Some(500_000), "{boot}");
    let said = rig.ok(&["profile", "show", &rig.name("a:t")])?;
    let digest = boot["digest"].as_str().context("a digest")?;
    ensure!(said.contains(digest) && said.contains("frames") && said.contains("data/first"), "{said}");
    let mounted = rig.mount_plain("a:t")?;
    ensure!(fs::read(mounted.join("data/first"))? == noise(1_000_000, 1));
    ensure!(counter(&rig, "boot_stored_bytes")? == 0);
    rig.unmount()?;
    rig.node_ended()?;
    let mounted = rig.mount("a:t")?;
    until("pages out of the boot pack", DEADLINE, || {
        Ok((counter(&rig, "boot_stored_bytes")? > 0).then_some(()))
    })?;
    ensure!(fs::read(mounted.join("data/first"))? == noise(1_000_000, 1));
    let directory = mounted.display().to_string();
    let used = until("what the start used", DEADLINE, || {
        let stats = rig.json(&["stats", &directory])?;
        let mount = &stats["mounts"][0];
        Ok(Some(mount["counters"].clone()).filter(|counters| counters["boot_used_bytes"].as_u64() > Some(0)))
    })?;
    let bytes = |name: &str| used[name].as_u64().with_context(|| format!("{name} in {used}"));
    let known: u64 = ["used", "unused", "unseen", "dropped"]
        .iter()
        .map(|kind| bytes(&format!("boot_{kind}_bytes")))
        .sum::<Result<u64>>()?;
    ensure!(bytes("boot_used_bytes")? >= 1_000_000 && bytes("boot_unused_bytes")? > 0, "{used}");
    ensure!(known >= bytes("boot_stored_bytes")?, "{used}");
    rig.unmount()
}

/// Records a command under a key of its own; the boot pack that follows.
fn recorded(rig: &Rig, key: &str, command: &[&str]) -> Result<String> {
    let name = rig.name("a:t");
    let output = rig.lamina(&[&["profile", "record", &name, "--command", key, "--"], command].concat())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains(&format!("for {key}")), "{said}");
    until("the boot pack of the command", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &name, "--command", key])?;
        Ok(shown["boot"]["digest"].as_str().filter(|_| !shown["profile"].is_null()).map(str::to_owned))
    })
}

#[test]
fn each_command_starts_with_its_own_boot_pack_and_all_others_with_the_general_one() -> Result<()> {
    let rig = pushed()?;
    let name = rig.name("a:t");
    let first = recorded(&rig, "first", &["cat", "/data/first"])?;
    let second = recorded(&rig, "second", &["cat", "/data/second"])?;
    let shown = until("both in the general profile", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &name])?;
        let whole = shown["profile"]["starts"] == 2 && shown["boot"].is_object();
        Ok(whole.then_some(shown))
    })?;
    ensure!(shown["commands"] == serde_json::json!(["first", "second"]), "{shown}");
    let general = shown["boot"]["digest"].as_str().context("a digest")?.to_owned();
    ensure!(first != second && first != general && second != general);
    let said = rig.ok(&["profile", "show", &name])?;
    ensure!(said.contains("commands   first\n           second"), "{said}");
    let said = rig.ok(&["profile", "show", &name, "--command", "first"])?;
    ensure!(said.contains("data/first") && !said.contains("data/second"), "{said}");
    for (key, boot) in
        [(Some("first"), &first), (Some("second"), &second), (Some("third"), &general), (None, &general)]
    {
        let directory = text(&rig.path("mount"));
        let mut arguments = vec!["mount", "--no-trace", &name, &directory];
        arguments.extend(key.into_iter().flat_map(|key| ["--command", key]));
        rig.ok(&arguments)?;
        let mount = until("pages out of the boot pack", DEADLINE, || {
            let mount = rig.json(&["stats"])?["mounts"][0].clone();
            Ok((mount["counters"]["boot_us"].as_u64() > Some(0)).then_some(mount))
        })?;
        ensure!(mount["boot"] == *boot && mount["boot_own"] == (boot != &general), "{key:?}: {mount}");
        ensure!(mount["command"].as_str() == key, "{mount}");
        // what the boot pack has is in memory, and what only others read is not
        let before = counter(&rig, "read_bytes")?;
        fs::read(rig.path("mount/data/first"))?;
        let came = counter(&rig, "read_bytes")? - before;
        ensure!((came > 0) == (key == Some("second")), "{key:?}: {came} bytes came for a read");
        rig.unmount()?;
        rig.node_ended()?;
    }
    let said = rig.fails(&["profile", "show", &name, "--command", "third"])?;
    ensure!(said.contains("no profile of the command third"), "{said}");
    rig.ok(&["profile", "drop", &name, "--command", "first"])?;
    until("one command to be forgotten", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &name])?;
        Ok((shown["commands"] == serde_json::json!(["second"])).then_some(()))
    })
}

#[test]
fn a_mount_tells_the_registry_of_its_command() -> Result<()> {
    let rig = pushed()?;
    let name = rig.name("a:t");
    rig.ok(&["mount", "--command", "reader", &name, &text(&rig.path("mount"))])?;
    ensure!(fs::read(rig.path("mount/data/second"))? == noise(100_000, 2));
    rig.unmount()?;
    let own = until("a profile of the command", DEADLINE, || {
        let shown = rig.json(&["profile", "show", &name, "--command", "reader"])?;
        Ok((!shown["profile"].is_null() && !shown["boot"].is_null()).then_some(shown))
    })?;
    ensure!(own["profile"]["files"][0]["path"] == "data/second", "{own}");
    // and the general one knows as well
    shown(&rig, "boot").map(drop)
}

#[test]
fn a_key_that_is_none_is_refused_before_anybody_is_asked() -> Result<()> {
    let rig = Rig::new()?;
    let (name, long) = (rig.name("a:t"), "x".repeat(65));
    let directory = text(&rig.path("mount"));
    for key in ["", "..", "../x", "a b", "a\n", "\u{1b}[2J", &long] {
        let key = format!("--command={key}");
        let commands: [&[&str]; 3] = [
            &["mount", &key, &name, &directory],
            &["profile", "show", &key, &name],
            &["profile", "record", &key, &name, "--", "true"],
        ];
        for arguments in commands {
            let output = rig.lamina(arguments)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(2) && said.contains("command"), "{arguments:?}: {said}");
            ensure!(!said.contains('\u{1b}'), "{said:?}");
        }
    }
    Ok(())
}

#[test]
fn what_is_exported_can_be_imported_after_a_drop() -> Result<()> {
    let rig = pushed()?;
    let (name, file) = (rig.name("a:t"), text(&rig.path("profile.json")));
    record(&rig)?;
    shown(&rig, "boot")?;
    rig.ok(&["profile", "export", &name, &file])?;
    let exported = fs::read_to_string(&file)?;
    ensure!(rig.ok(&["profile", "export", &name])?.trim() == exported, "stdout and file differ");
    rig.ok(&["profile", "drop", &name])?;
    forgotten(&rig)?;
    for verb in ["show", "export"] {
        let said = rig.fails(&["profile", verb, &name])?;
        ensure!(said.contains("has no profile yet") && said.contains("lamina profile record"), "{said}");
    }
    rig.ok(&["profile", "drop", &name]).context("a second drop has nothing to do")?;
    rig.ok(&["profile", "import", &name, &file])?;
    shown(&rig, "boot")?;
    let again: Value = serde_json::from_str(&rig.ok(&["profile", "export", &name])?)?;
    ensure!(again == serde_json::from_str::<Value>(&exported)?, "{again}");
    Ok(())
}

#[test]
fn what_is_no_profile_is_refused_before_it_is_sent() -> Result<()> {
    let rig = pushed()?;
    let file = text(&rig.path("profile.json"));
    let cases = [
        ("", "not a profile"),
        ("{}", "not a profile"),
        (r#"{"version":9,"starts":1,"names":[],"files":[],"runs":[]}"#, "version 9"),
        (r#"{"version":1,"starts":1,"names":["../x"],"files":[],"runs":[]}"#, "../x"),
        (r#"{"version":1,"starts":1,"names":[],"files":["a"],"runs":[[1,0,1,1]]}"#, "run 0"),
    ];
    for (json, expected) in cases {
        fs::write(&file, json)?;
        let said = rig.fails(&["profile", "import", &rig.name("a:t"), &file])?;
        ensure!(said.contains(expected) && said.contains(&file), "{json}: {said}");
    }
    let said = rig.fails(&["profile", "import", &rig.name("a:t"), "/nowhere.json"])?;
    ensure!(said.contains("/nowhere.json"), "{said}");
    Ok(())
}

#[test]
fn an_unknown_image_is_named() -> Result<()> {
    let rig = Rig::new()?;
    let name = rig.name("none:t");
    let file = rig.path("profile.json");
    fs::write(&file, r#"{"version":1,"starts":1,"names":[],"files":[],"runs":[]}"#)?;
    let verbs: [&[&str]; 5] = [
        &["show", &name],
        &["export", &name],
        &["import", &name, &text(&file)],
        &["drop", &name],
        &["record", &name, "--", "true"],
    ];
    for arguments in verbs {
        let said = rig.fails(&[&["profile"], arguments].concat())?;
        ensure!(said.contains("/v2/none/manifests/t") && said.contains("not found"), "{said}");
    }
    nothing_is_left(&rig)
}

#[test]
fn a_command_that_fails_passes_its_exit_code_on_and_one_that_is_not_there_is_named() -> Result<()> {
    let rig = pushed()?;
    let name = rig.name("a:t");
    let output = rig.lamina(&["profile", "record", &name, "--", "cat", "/nowhere"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("/nowhere") && said.contains("recorded"),
        "{said}"
    );
    ensure!(!said.contains("lamina: "), "the command has said enough: {said}");
    let said = rig.fails(&["profile", "record", &name, "--", "no-such-program"])?;
    ensure!(said.contains("no-such-program") && said.contains("cannot be started"), "{said}");
    nothing_is_left(&rig)
}

#[test]
fn ctrl_c_ends_a_recording_and_leaves_nothing_mounted() -> Result<()> {
    let rig = pushed()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["profile", "record", &rig.name("a:t"), "--cache", &text(&rig.path("cache")), "--"]);
    // nobody ever writes to that pipe
    command.args(["cat", "/ready", "/fifo"]).env("TMPDIR", rig.path("tmp"));
    let mut process = Process::spawn("record", &mut command)?;
    process.wait_line("ready", DEADLINE)?;
    process.signal(Signal::INT)?;
    ensure!(process.wait(DEADLINE)?.code() == Some(130));
    nothing_is_left(&rig)
}
