//! What is filled, pinned and counted, when the daemon that does it is killed.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, until};

use crate::node::{daemon, kill, successor};
use crate::rig::{DEADLINE, Rig, text};

const BYTES: usize = 6_000_000;

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("one", noise(BYTES, 5)).file("two", noise(BYTES, 6)));
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

fn is_all_here(mounted: &Path) -> Result<()> {
    ensure!(fs::read(mounted.join("one"))? == noise(BYTES, 5));
    ensure!(fs::read(mounted.join("two"))? == noise(BYTES, 6));
    Ok(())
}

/// Waits until the newest job has brought more than `bytes` to disk and is not done.
fn under_way(rig: &Rig, bytes: u64) -> Result<()> {
    until("a job under way", DEADLINE, || {
        let stats = rig.json(&["stats"])?;
        let last = stats["fills"].as_array().and_then(|all| all.last().cloned()).unwrap_or_default();
        ensure!(last["state"] != "done", "the job is done already");
        Ok((last["done_bytes"].as_u64() >= Some(bytes) && last["total_bytes"].as_u64() > Some(0))
            .then_some(()))
    })
}

#[test]
fn an_eager_mount_is_whole_though_its_node_was_killed_twice() -> Result<()> {
    let mut rig = pushed()?;
    let (name, point) = (rig.name("a:t"), rig.path("mount"));
    let pinned = rig.json(&["pin", &name])?;
    thread::scope(|scope| -> Result<()> {
        let mounting = scope
            .spawn(|| rig.ok(&["mount", "--no-boot", "--eager", "--fill-rate", "4", &name, &text(&point)]));
        under_way(&rig, 4_000_000)?;
        let before = daemon(&rig)?;
        kill(before)?;
        mounting.join().expect("it does not panic")?;
        successor(&rig, before).map(drop)
    })?;
    let before = daemon(&rig)?;
    kill(before)?;
    successor(&rig, before)?;
    drop(rig.registry.take());
    is_all_here(&point)?;
    ensure!(rig.json(&["pin"])? == pinned, "a pin is lost");
    rig.unmount()
}

#[test]
fn a_prefetch_goes_on_with_the_next_node_and_stays_paused_until_it_is_resumed() -> Result<()> {
    let mut rig = pushed()?;
    let (name, point) = (rig.name("a:t"), rig.mount_plain("a:t")?);
    rig.ok(&["prefetch", "--pause"])?;
    thread::scope(|scope| -> Result<()> {
        let prefetching = scope.spawn(|| rig.json(&["prefetch", &name]));
        under_way(&rig, 0)?;
        let before = daemon(&rig)?;
        kill(before)?;
        successor(&rig, before)?;
        under_way(&rig, 0)?;
        let stats = rig.json(&["stats"])?;
        ensure!(stats["fills_paused"] == true && stats["fills"][0]["done_bytes"] == 0, "{stats}");
        rig.ok(&["prefetch", "--resume"])?;
        let report = prefetching.join().expect("it does not panic")?;
        ensure!(report["bytes"].as_u64() >= Some(2 * BYTES as u64), "{report}");
        Ok(())
    })?;
    // done means that it is on disk
    let before = daemon(&rig)?;
    kill(before)?;
    successor(&rig, before)?;
    ensure!(rig.json(&["stats"])?["fills_paused"] == false);
    drop(rig.registry.take());
    is_all_here(&point)?;
    rig.unmount()
}

#[test]
fn prometheus_finds_the_next_node_at_the_same_address() -> Result<()> {
    let rig = pushed()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["node", "--metrics", "127.0.0.1:0", "--cache"]).arg(rig.path("cache"));
    let mut node = Process::spawn("node", &mut command)?;
    let url = node.wait_line("metrics on ", DEADLINE)?;
    let host = url.trim_start_matches("metrics on http://").trim_end_matches("/metrics");
    node.wait_line("ready", DEADLINE)?;
    let mounted = rig.mount_plain("a:t")?;
    is_all_here(&mounted)?;
    let before = daemon(&rig)?;
    kill(before)?;
    until("the next node to have the mount", DEADLINE, || {
        let mut stream = TcpStream::connect(host).context("nobody listens there any more")?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.contains("\nlamina_mounts 1\n").then_some(()))
    })?;
    ensure!(successor(&rig, before)? != before);
    rig.unmount()?;
    ensure!(node.stop(DEADLINE)?.success());
    Ok(())
}
