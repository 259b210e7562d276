//! Mounts that belong to a process, over the death of their daemon.

use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::mounts::mounts;
use lamina_testkit::process::{Process, until};
use rustix::process::Signal;

use crate::node::{daemon, kill, restored, successor};
use crate::rig::{DEADLINE, Rig, programs};

/// A program that runs by `lamina run`, and reads a line after it has said `ready`.
fn started(rig: &Rig) -> Result<Process> {
    let layer = programs(Layer::new(), &["/bin/sh", "/bin/cat"])?;
    let image = Image::new().layer(|_| layer).layer(|layer| layer.file("data", "data\n").fifo("fifo"));
    rig.ok(&["push", &rig.layout("layout", &image)?, &rig.name("a:t")])?;
    let script = "trap 'cat /data' USR1; echo ready; while :; do read line < /fifo; done";
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["run", &rig.name("a:t"), "--", "/bin/sh", "-c", script]);
    let mut process = Process::spawn("run", command.env("LAMINA_CACHE", rig.path("cache")))?;
    process.wait_line("ready", DEADLINE)?;
    Ok(process)
}

fn is_mounted(rig: &Rig) -> Result<bool> {
    Ok(mounts()?.iter().any(|mount| mount.dir.starts_with(rig.path("cache"))))
}

#[test]
fn a_program_goes_on_when_the_node_is_killed_and_its_mount_still_goes_when_it_is_killed_itself() -> Result<()>
{
    let rig = Rig::new()?;
    let mut process = started(&rig)?;
    let before = daemon(&rig)?;
    kill(before)?;
    successor(&rig, before)?;
    ensure!(restored(&rig)? == ["resumed"]);
    process.signal(Signal::USR1)?;
    process.wait_line("data", DEADLINE)?;
    process.signal(Signal::KILL)?;
    until("its mount to go", DEADLINE, || Ok((!is_mounted(&rig)?).then_some(())))
}
