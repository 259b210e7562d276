//! Mounts as their users meet them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounted_on;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run};
use rustix::process::Signal;

use crate::rig::{DEADLINE, Rig, real_image, text};

/// How often something is tried whose moment cannot be chosen from outside.
const AT_ONCE: usize = 20;

fn pushed() -> Result<Rig> {
    let rig = Rig::new()?;
    let image = Image::new().layer(|layer| layer.file("big", noise(4_000_000, 5)).file("small", "s").gzip());
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    Ok(rig)
}

/// `lamina mount -f` of an image, at the rig's `mount`.
fn in_the_foreground(rig: &Rig, image: &str) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["mount", "-f", "--json", "--cache"]).arg(rig.path("cache"));
    Process::spawn("mount", command.arg(image).arg(rig.path("mount")))
}

#[test]
fn a_program_starts_from_an_image_that_has_not_arrived() -> Result<()> {
    let rig = Rig::new()?;
    rig.ok(&["push", &real_image()?, &rig.name("real:t")])?;
    let mounted = rig.mount("real:t")?;
    let output = run(Command::new("chroot").arg(&mounted).args([
        "python3",
        "-c",
        "import numpy; print(numpy.ones(3).sum())",
    ]))?;
    ensure!(output.stdout == b"3.0\n");
    let received = rig.counter("source_bytes")?;
    ensure!((1..60 << 20).contains(&received), "{received} bytes came");
    rig.unmount()
}

#[test]
fn what_was_read_once_is_not_fetched_again_after_a_remount() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount_plain("a:t")?;
    ensure!(fs::read(mounted.join("big"))? == noise(4_000_000, 5));
    rig.unmount()?;
    // the first node goes with its last mount
    rig.node_ended()?;
    let mounted = rig.mount_plain("a:t")?;
    ensure!(fs::read(mounted.join("big"))? == noise(4_000_000, 5));
    let fetched = rig.counter("source_bytes")?;
    ensure!(fetched == 0, "{fetched} bytes were fetched again");
    rig.unmount()
}

#[test]
fn two_mounts_share_a_node_and_a_busy_one_is_not_unmounted() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    let second = rig.path("scratch");
    rig.ok(&["mount", &rig.name("a:t"), &text(&second)])?;
    ensure!(rig.json(&["stats"])?["mounts"].as_array().map(Vec::len) == Some(2));
    let mut open = File::open(mounted.join("big"))?;
    let busy = rig.fails(&["unmount", &text(&mounted)])?;
    ensure!(busy.contains("in use") && busy.contains(&text(&mounted)), "{busy}");
    rig.ok(&["unmount", "--lazy", &text(&mounted)])?;
    ensure!(mounted_on(&mounted)?.is_none());
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes)?;
    ensure!(bytes == noise(4_000_000, 5), "a file that was open is still whole");
    rig.ok(&["unmount", &text(&second)]).map(drop)
}

#[test]
fn an_unmount_does_not_wait_for_the_copy_that_another_mount_namespace_has() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    // it says so when it has its copy, and keeps it until its input ends
    let mut other = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "echo there; read line; cat \"$0\"/big | wc -c",
        ])
        .arg(&mounted)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = BufReader::new(other.stdout.take().context("its output")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    ensure!(line == "there\n", "{line}");
    let output = rig.lamina(&["unmount", &text(&mounted)])?;
    let warned = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && warned.contains("another mount namespace"), "{output:?}");
    ensure!(mounted_on(&mounted)?.is_none());
    writeln!(other.stdin.take().context("its input")?, "now")?;
    line.clear();
    said.read_line(&mut line)?;
    ensure!(line.trim() == "4000000", "the copy is served no more: {line}");
    ensure!(other.wait()?.success());
    rig.node_ended()
}

#[test]
fn a_mount_is_found_by_a_path_with_a_symlink_in_it() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    let link = rig.path("link");
    symlink(mounted.parent().context("a parent")?, &link)?;
    let by_link = text(&link.join(mounted.file_name().context("a name")?));
    ensure!(rig.json(&["stats", &by_link])?["mounts"].as_array().map(Vec::len) == Some(1));
    rig.ok(&["unmount", &by_link])?;
    ensure!(mounted_on(&mounted)?.is_none());
    Ok(())
}

#[test]
fn mount_points_that_will_not_do_are_named() -> Result<()> {
    let rig = pushed()?;
    let missing = text(&rig.path("nowhere"));
    let said = rig.fails(&["mount", &rig.name("a:t"), &missing])?;
    ensure!(said.contains(&missing) && said.contains("does not exist"), "{said}");
    let full = rig.path("scratch");
    fs::write(full.join("x"), "x")?;
    let said = rig.fails(&["mount", &rig.name("a:t"), &text(&full)])?;
    ensure!(said.contains("not empty") && said.contains(&text(&full)), "{said}");
    let said = rig.fails(&["mount", &rig.name("a:t"), &text(&full.join("x"))])?;
    ensure!(said.contains("not a directory"), "{said}");
    let mounted = rig.mount("a:t")?;
    let said = rig.fails(&["mount", &rig.name("a:t"), &text(&mounted)])?;
    ensure!(said.contains("already"), "{said}");
    let said = rig.fails(&["unmount", &text(&full)])?;
    ensure!(said.contains("nothing"), "{said}");
    rig.unmount()
}

/// It ends well, and leaves no mount.
fn ends_at_ctrl_c(rig: &Rig, mut process: Process) -> Result<()> {
    process.signal(Signal::INT)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}");
    ensure!(mounted_on(&rig.path("mount"))?.is_none(), "the mount is left behind");
    Ok(())
}

#[test]
fn in_the_foreground_it_stays_until_ctrl_c() -> Result<()> {
    let rig = pushed()?;
    let mut process = in_the_foreground(&rig, &rig.name("a:t"))?;
    process.wait_line("{", DEADLINE)?;
    ensure!(fs::read(rig.path("mount").join("small"))? == b"s");
    ends_at_ctrl_c(&rig, process)
}

#[test]
fn in_the_foreground_a_ctrl_c_that_comes_at_once_unmounts_too() -> Result<()> {
    let rig = pushed()?;
    for _ in 0..AT_ONCE {
        let mut process = in_the_foreground(&rig, &rig.name("a:t"))?;
        process.wait_line("{", DEADLINE)?;
        ends_at_ctrl_c(&rig, process)?;
    }
    Ok(())
}

#[test]
fn in_the_foreground_ctrl_c_ends_the_wait_for_a_registry_that_does_not_answer() -> Result<()> {
    let rig = Rig::new()?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let mut process = in_the_foreground(&rig, &format!("{}/a:t", silent.local_addr()?))?;
    let asked = silent.accept()?;
    process.signal(Signal::INT)?;
    let status = process.wait(DEADLINE)?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(mounted_on(&rig.path("mount"))?.is_none(), "something is mounted");
    drop(asked);
    Ok(())
}

#[test]
fn a_node_that_is_killed_leaves_nothing_that_the_next_mount_trips_over() -> Result<()> {
    let rig = pushed()?;
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("big"))?.len() == 4_000_000);
    let pid = rig.json(&["stats"])?["pid"].to_string();
    run(Command::new("kill").args(["-9", &pid]))?;
    run(Command::new("umount").arg("-l").arg(&mounted))?;
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("big"))? == noise(4_000_000, 5));
    rig.unmount()
}
