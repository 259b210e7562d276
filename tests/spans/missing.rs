//! Collectors that are not there, or as good as not.

use std::fs::{self, File};
use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};

use crate::collector::{Collector, Manner};
use crate::rig::{DEADLINE, Rig, text};

/// Nothing listens there.
const NOWHERE: &str = "http://127.0.0.1:1";
/// What is said of spans that do not arrive.
const WARNING: &str = "spans do not arrive";

/// A node of the rig's cache, with its log beside.
fn node(rig: &Rig, url: &str, environment: &[(&str, &str)]) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["node", "--otlp", url, "--cache"]).arg(rig.path("cache"));
    command.envs(environment.iter().copied()).stderr(File::create(rig.path("log"))?);
    let mut node = Process::spawn("node", &mut command)?;
    node.wait_line("ready", DEADLINE)?;
    Ok(node)
}

fn warnings(rig: &Rig) -> Result<usize> {
    Ok(fs::read_to_string(rig.path("log"))?.matches(WARNING).count())
}

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("file", noise(3_000_000, 1)));
    rig.ok(&["push", &rig.layout("layout", &image)?, &rig.name("a:t")])?;
    Ok(rig)
}

fn mount_and_read(rig: &Rig) -> Result<()> {
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("file"))? == noise(3_000_000, 1));
    rig.unmount()
}

#[test]
fn a_collector_that_is_not_there_or_fails_costs_one_warning() -> Result<()> {
    let failing = Collector::new(Manner::Fails)?;
    for url in [NOWHERE, &failing.url()] {
        let rig = pushed()?;
        // many batches, so that there is much to warn of
        let node = node(&rig, url, &[("OTEL_BSP_SCHEDULE_DELAY", "10")])?;
        mount_and_read(&rig)?;
        until("a warning", DEADLINE, || Ok((warnings(&rig)? > 0).then_some(())))?;
        mount_and_read(&rig)?;
        ensure!(node.stop(DEADLINE)?.success());
        ensure!(warnings(&rig)? == 1, "{}", fs::read_to_string(rig.path("log"))?);
    }
    ensure!(failing.requests() > 1, "nothing was sent more than once");
    Ok(())
}

#[test]
fn a_collector_that_hangs_neither_holds_a_mount_up_nor_the_end_of_its_node() -> Result<()> {
    let rig = pushed()?;
    let hanging = Collector::new(Manner::Hangs)?;
    let busy =
        node(&rig, &hanging.url(), &[("OTEL_BSP_SCHEDULE_DELAY", "10"), ("OTEL_BSP_MAX_QUEUE_SIZE", "1")])?;
    mount_and_read(&rig)?;
    until("a batch to hang", DEADLINE, || Ok((hanging.requests() > 0).then_some(())))?;
    // the queue is full now, and what more there is to tell is dropped
    mount_and_read(&rig)?;
    ensure!(busy.stop(DEADLINE)?.success());
    let rig = pushed()?;
    // here the end is the first to send anything; had it waited for that to fail, it would have said so
    let node = node(&rig, &hanging.url(), &[("OTEL_BSP_SCHEDULE_DELAY", "3600000")])?;
    mount_and_read(&rig)?;
    let before = hanging.requests();
    ensure!(node.stop(DEADLINE)?.success());
    ensure!(hanging.requests() == before + 1, "the end did not try");
    ensure!(warnings(&rig)? == 0, "{}", fs::read_to_string(rig.path("log"))?);
    Ok(())
}

#[test]
fn a_url_that_is_none_is_refused_before_anything_begins() -> Result<()> {
    let rig = Rig::new()?;
    for (url, why) in
        [("localhost:4318", "http://host"), ("http://u:p@localhost", "OTEL_EXPORTER_OTLP_HEADERS")]
    {
        for command in [&["node"][..], &["registry"], &["mount", &rig.name("a:t"), &text(&rig.path("mount"))]]
        {
            let output = rig.lamina(&[command, &["--otlp", url]].concat())?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(2) && said.contains("--otlp") && said.contains(why),
                "{said}"
            );
        }
    }
    let variable = "OTEL_EXPORTER_OTLP_ENDPOINT";
    for command in ["node", "registry"] {
        let mut command_line = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command_line.arg(command).env(variable, "ftp://o.example").env("LAMINA_CACHE", rig.path("cache"));
        let output = command_line.env("LAMINA_STORAGE", rig.path("other")).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{command}: {}: {said}", output.status);
        ensure!(
            said.lines().count() == 1 && said.contains(variable) && said.contains("http://host"),
            "{said}"
        );
    }
    Ok(())
}
