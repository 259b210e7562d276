//! Original layers that are dropped, as operators and clients see it.

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::rig::{DEADLINE, Rig, skopeo, text};

/// What collects at once, if it is told what to do with originals.
const AT_ONCE: [&str; 4] = ["--gc-grace", "0", "--gc-quarantine", "0"];

/// A registry that has an image of a plain and a compressed layer from skopeo, and holds nothing of it any more.
fn pushed() -> Result<Rig> {
    let mut rig = Rig::new()?;
    let image = Image::new()
        .layer(|l| l.file("f", noise(3_000_000, 1)).symlink("link", "f").plain())
        .layer(|l| l.file("g", "hi").gzip());
    let source = rig.layout("layout", &image)?;
    let name = format!("docker://{}", rig.name("a:t"));
    skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &name])?;
    rig.converted("a:t")?;
    let registry = rig.registry.take().context("a registry")?;
    ensure!(registry.stop(DEADLINE)?.success());
    Ok(rig)
}

/// The image can be pulled byte for byte, and mounted, and nothing is damaged.
fn is_whole(rig: &Rig) -> Result<()> {
    let back = rig.path("back");
    let (name, target) = (format!("docker://{}", rig.name("a:t")), format!("oci:{}:t", back.display()));
    skopeo(&["copy", "-q", "--preserve-digests", "--src-tls-verify=false", &name, &target])?;
    for blob in std::fs::read_dir(rig.path("layout/blobs/sha256"))? {
        let blob = blob?;
        let pulled = std::fs::read(back.join("blobs/sha256").join(blob.file_name()))?;
        ensure!(pulled == std::fs::read(blob.path())?, "{} came back as other bytes", blob.path().display());
    }
    let mounted = rig.mount_plain("a:t")?;
    ensure!(
        std::fs::read(mounted.join("link"))? == noise(3_000_000, 1)
            && std::fs::read(mounted.join("g"))? == b"hi"
    );
    rig.unmount()?;
    rig.ok(&["fsck", "--storage", &text(&rig.path("storage"))]).map(drop)
}

#[test]
fn gc_drops_what_its_dry_run_says_and_inspect_says_what_was_dropped() -> Result<()> {
    let mut rig = pushed()?;
    let storage = text(&rig.path("storage"));
    let gc = |more: &[&str]| rig.json(&[&["gc", "--storage", &storage], &AT_ONCE[..], more].concat());
    // what was written within this second is young
    let dry = until("a second to pass", DEADLINE, || {
        let dry = gc(&["--originals", "drop", "--dry-run"])?;
        Ok((dry["originals"]["blobs"] == 1 && dry["quarantined"]["bytes"] == 0).then_some(dry))
    })?;
    ensure!(gc(&[])?["freed"]["blobs"] == 0, "originals are kept unless somebody says otherwise");
    let wet = gc(&["--originals", "drop"])?;
    ensure!(dry["freed"] == wet["freed"] && dry["originals"] == wet["originals"], "{dry} {wet}");
    rig.start_registry()?;
    is_whole(&rig)?;
    let said = rig.ok(&["inspect", &rig.name("a:t")])?;
    let layers: Vec<&str> = said.lines().filter(|line| line.starts_with("layer ")).collect();
    let rebuilt: Vec<bool> = layers.iter().map(|line| line.contains("rebuilt")).collect();
    ensure!(rebuilt == [true, false], "{said}");
    let status = rig.json(&["inspect", &rig.name("a:t")])?;
    ensure!(status["conversion"]["rebuilt"].as_array().is_some_and(|layers| layers.len() == 1), "{status}");
    Ok(())
}

#[test]
fn what_becomes_of_originals_is_said_by_a_flag_before_the_environment_before_the_file() -> Result<()> {
    let rig = pushed()?;
    let (storage, config) = (text(&rig.path("storage")), rig.path("config.toml"));
    let gc = |file: Option<&str>, variable: Option<&str>, flag: Option<&str>| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["gc", "--dry-run", "--json", "--storage", &storage]).args(AT_ONCE);
        command.env_remove("LAMINA_CONFIG").env_remove("LAMINA_ORIGINALS");
        if let Some(policy) = file {
            std::fs::write(&config, format!("originals = \"{policy}\"\n"))?;
            command.env("LAMINA_CONFIG", &config);
        }
        command.envs(variable.map(|policy| ("LAMINA_ORIGINALS", policy)));
        command.args(flag.map(|policy| format!("--originals={policy}")));
        Ok::<_, anyhow::Error>(command.output()?)
    };
    let drops = |file, variable, flag| {
        let report: serde_json::Value = serde_json::from_slice(&gc(file, variable, flag)?.stdout)?;
        Ok::<_, anyhow::Error>(report["originals"]["blobs"] == 1)
    };
    let (keep, drop) = (Some("keep"), Some("drop"));
    // what was written within this second is young
    until("a second to pass", DEADLINE, || Ok(drops(None, None, drop)?.then_some(())))?;
    let cases = [
        (None, None, None, false),
        (drop, None, None, true),
        (None, drop, None, true),
        (drop, keep, None, false),
        (keep, drop, None, true),
        (drop, drop, keep, false),
        (keep, keep, drop, true),
    ];
    for (file, variable, flag, expected) in cases {
        ensure!(drops(file, variable, flag)? == expected, "file {file:?}, {variable:?}, flag {flag:?}");
    }
    for wrong in [gc(Some("burn"), None, None)?, gc(None, Some("burn"), None)?] {
        let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
        ensure!(wrong.status.code() == Some(2) && said.contains("burn") && said.contains("drop"), "{said}");
    }
    Ok(())
}

#[test]
fn a_registry_drops_originals_by_itself_where_its_configuration_says_so() -> Result<()> {
    let mut rig = pushed()?;
    let config = rig.path("registry.toml");
    let lines = "originals = \"drop\"\ngc-every = \"1s\"\ngc-grace = \"0\"\ngc-quarantine = \"0\"\n";
    std::fs::write(&config, lines)?;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["registry", "--listen", "127.0.0.1:0", "--poll-every", "1", "--config"]).arg(&config);
    let mut registry = Process::spawn("registry", command.arg("--storage").arg(rig.path("storage")))?;
    let line = registry.wait_line("listening on ", DEADLINE)?;
    rig.address = line.rsplit('/').next().context("an address")?.to_owned();
    until("a layer to be dropped", DEADLINE, || {
        let status = rig.json(&["inspect", &rig.name("a:t")])?;
        Ok(status["conversion"]["rebuilt"].as_array().is_some_and(|layers| layers.len() == 1).then_some(()))
    })?;
    is_whole(&rig)?;
    registry.signal(Signal::TERM)?;
    ensure!(registry.wait(DEADLINE)?.success());
    let said = rig.lamina(&["gc", "--originals", "perhaps"])?;
    ensure!(said.status.code() == Some(2), "{said:?}");
    Ok(())
}
