//! A registry of ours that passes on what another one has, with the clients that people have.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::compare::Compare;
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

use crate::access::{GOOD, WRONG, auth_file, guarded, small};
use crate::docker_registry::DockerRegistry;
use crate::rig::{DEADLINE, Rig, described, everything, skopeo, text};

/// `lamina registry --upstream`, with a storage of its own.
struct PassingOn {
    address: String,
    _process: Process,
}

impl PassingOn {
    fn start(rig: &Rig, more: &[&str]) -> Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["registry", "--listen", "127.0.0.1:0", "--storage"]).arg(rig.path("passing-on"));
        let mut process = Process::spawn("registry", command.args(more))?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        let address = line.rsplit('/').next().context("an address")?.to_owned();
        Ok(Self { address, _process: process })
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Mounts an image, as soon as it has its tree.
    fn mount(&self, rig: &Rig, name: &str) -> Result<()> {
        until("a mount", DEADLINE, || {
            let output = rig.lamina(&["mount", &self.name(name), &text(&rig.path("mount"))])?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success() || said.contains("converting"), "{said}");
            Ok(output.status.success().then_some(()))
        })
    }
}

fn copy(source: &str, name: &str) -> Result<()> {
    let name = format!("docker://{name}");
    skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", source, &name]).map(drop)
}

#[test]
fn an_image_of_docker_registry_mounts_through_ours_with_all_it_has_and_stays_when_that_is_gone() -> Result<()>
{
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let source = rig.layout("layout", &everything())?;
    copy(&source, &home.name("a:t"))?;
    let unpacked = rig.path("unpacked");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(source.trim_start_matches("oci:"))
        .arg(&unpacked))?;
    // as in a file that is there for good
    let config = rig.path("config.toml");
    std::fs::write(
        &config,
        format!("upstream = \"http://{}\"\nupstream-revalidate = \"0\"\n", home.address),
    )?;
    let passing = PassingOn::start(&rig, &["--config", &text(&config)])?;
    let mut home = Some(home);
    for _ in 0..2 {
        passing.mount(&rig, "a:t")?;
        let compared = Compare { directory_mtime: &described, ..Compare::default() };
        let compared = compared.trees(&rig.path("mount"), &unpacked.join("rootfs"))?;
        ensure!(compared.differences.is_empty() && compared.entries > 1, "{:?}", compared.differences);
        rig.unmount()?;
        rig.node_ended()?;
        std::fs::remove_dir_all(rig.path("cache"))?;
        drop(home.take());
    }
    let said = rig.fails(&["inspect", &passing.name("a:other")])?;
    ensure!(said.contains("the upstream does not answer"), "{said}");
    Ok(())
}

#[test]
fn an_image_that_comes_through_is_read_lazily() -> Result<()> {
    let rig = Rig::new()?;
    let home = DockerRegistry::start(&rig.path("home"), "")?;
    let big = noise(20_000_000, 1);
    let image = Image::new().layer(|layer| layer.file("big", big.clone()).file("small", "s").gzip());
    copy(&rig.layout("layout", &image)?, &home.name("a:t"))?;
    let passing = PassingOn::start(&rig, &["--upstream", &home.address])?;
    passing.mount(&rig, "a:t")?;
    ensure!(std::fs::read(rig.path("mount/small"))? == b"s");
    let came = rig.counter("source_bytes")?;
    ensure!(came < 10_000_000, "{came} bytes came for a small file");
    ensure!(std::fs::read(rig.path("mount/big"))? == big);
    rig.unmount()
}

#[test]
fn an_image_with_its_tree_mounts_through_at_once_and_is_pulled_whole_when_its_registry_is_gone() -> Result<()>
{
    let mut rig = Rig::new()?;
    let source = rig.layout("layout", &everything())?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let passing = PassingOn::start(&rig, &["--upstream", &rig.address])?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--require-bound", &passing.name("a:t"), &text(&mounted)])?;
    ensure!(std::fs::read(mounted.join("d/big"))? == noise(3_000_000, 1));
    rig.unmount()?;
    until("all of it to come", DEADLINE, || {
        let status = rig.json(&["inspect", &passing.name("a:t")])?;
        ensure!(status["conversion"]["state"] != "failed", "{status}");
        Ok((status["conversion"]["state"] == "done").then_some(()))
    })?;
    drop(rig.registry.take());
    // skopeo checks each layer, which is made from chunks
    let pulled = format!("oci:{}:t", text(&rig.path("pulled")));
    skopeo(&["copy", "-q", "--src-tls-verify=false", &format!("docker://{}", passing.name("a:t")), &pulled])?;
    Ok(())
}

#[test]
fn a_push_to_a_registry_that_passes_on_says_where_to_push() -> Result<()> {
    let rig = Rig::new()?;
    let passing = PassingOn::start(&rig, &["--upstream", &rig.address])?;
    let said = rig.fails(&["push", &small(&rig)?, &passing.name("a:t")])?;
    ensure!(said.contains("takes no pushes; push there"), "{said}");
    Ok(())
}

#[test]
fn the_upstreams_login_is_the_registrys_and_where_it_is_kept_is_told_to_nobody() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let ca = text(&certs.join("ca.crt"));
    let good = auth_file(&rig, "good.json", &home.address, GOOD)?;
    let wrong = auth_file(&rig, "wrong.json", &home.address, WRONG)?;
    rig.ok(&["push", &small(&rig)?, &home.name("a:t"), "--ca", &ca, "--auth-file", &good])?;
    let url = format!("https://{}", home.address);
    let options = |login| ["--upstream", &url, "--ca", &ca, "--auth-file", login].map(str::to_owned);
    for (login, may) in [(&wrong, false), (&good, true)] {
        let options = options(login);
        let passing = PassingOn::start(&rig, &options.each_ref().map(String::as_str))?;
        let inspect = ["inspect", &passing.name("a:t")];
        if may {
            rig.ok(&inspect)?;
            continue;
        }
        let said = rig.fails(&inspect)?;
        ensure!(said.contains("the upstream refuses") && said.contains(&home.address), "{said}");
        ensure!(!said.contains("alice") && !said.contains("wrong.json"), "{said}");
    }
    Ok(())
}

#[test]
fn an_upstream_is_not_spoken_to_in_the_clear_unless_somebody_says_so() -> Result<()> {
    let rig = Rig::new()?;
    let storage = text(&rig.path("passing-on"));
    let options = ["registry", "--storage", &storage, "--listen", "127.0.0.1:0", "--upstream"];
    let said = rig.fails(&[&options[..], &["http://registry.example"]].concat())?;
    ensure!(said.contains("registry.example") && said.contains("--plain-http"), "{said}");
    Ok(())
}
