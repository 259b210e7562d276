//! A push that ends at its last step: everything is there, and nothing has a name.

use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::Process;
use rustix::process::Signal;

use crate::proxy::{Fault, Proxy};
use crate::rig::{DEADLINE, Rig};

const BIG_BYTES: usize = 8_000_000;

/// A registry that takes everything but the manifest.
fn without_names(rig: &Rig) -> Result<Proxy> {
    Proxy::start(&rig.address, |request| match request.line.starts_with("PUT ") {
        true if request.line.contains("/manifests/") => Fault::Hang,
        _ => Fault::None,
    })
}

#[test]
fn a_push_that_ends_before_its_manifest_names_nothing_and_the_next_sends_no_chunk() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(BIG_BYTES, 6)));
    let source = rig.layout("layout", &image)?;
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::KILL, None)] {
        let proxy = without_names(&rig)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["push", &source, &proxy.name("a:t")]);
        let mut push = Process::spawn("push", &mut command)?;
        proxy.faulted()?;
        push.signal(signal)?;
        let status = push.wait(DEADLINE)?;
        ensure!(status.code() == code, "{status}");
        let said = rig.fails(&["inspect", &rig.name("a:t")])?;
        ensure!(said.contains("not found"), "{said}");
    }
    let last = rig.json(&["push", &source, &rig.name("a:t")])?;
    ensure!(last["chunks_new"] == 0 && last["sent_bytes"].as_u64() < Some(20_000), "{last}");
    let mounted = rig.mount("a:t")?;
    ensure!(std::fs::read(mounted.join("big"))? == noise(BIG_BYTES, 6));
    rig.unmount()
}

#[test]
fn a_push_that_is_interrupted_while_packs_go_out_says_only_that() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(BIG_BYTES, 7)));
    let source = rig.layout("layout", &image)?;
    for _ in 0..10 {
        let proxy = Proxy::start(&rig.address, |request| match request.line.contains("/blobs/uploads/") {
            true => Fault::Hang,
            false => Fault::None,
        })?;
        let log = rig.path("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["push", &source, &proxy.name("a:t")]).stderr(std::fs::File::create(&log)?);
        let mut push = Process::spawn("push", &mut command)?;
        proxy.faulted()?;
        push.signal(Signal::INT)?;
        ensure!(push.wait(DEADLINE)?.code() == Some(130));
        let said = std::fs::read_to_string(&log)?;
        ensure!(said == "lamina: interrupted\n", "{said}");
    }
    Ok(())
}

#[test]
fn a_registry_that_refuses_the_push_is_quoted() -> Result<()> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("f", noise(100_000, 6)));
    let source = rig.layout("layout", &image)?;
    for (status, expected) in [(401, "no credential"), (404, "Lamina registry"), (500, "500")] {
        let proxy = Proxy::start(&rig.address, move |_| Fault::Status(status))?;
        let said = rig.fails(&["push", &source, &proxy.name("a:t")])?;
        ensure!(said.contains(expected) && said.contains(&proxy.address), "{status}: {said}");
    }
    Ok(())
}
