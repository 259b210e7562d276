//! Mounts that come and go leave nothing behind.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lamina_node::Controller;
use lamina_testkit::image::Image;
use lamina_testkit::mounts::mounts;
use lamina_testkit::process::until;
use lamina_wire::proto::{MountRequest, UnmountRequest};
use rustix::process::Pid;

use crate::node::{daemon, holder, kill, successor};
use crate::rig::{DEADLINE, Rig, text};

/// Cycles; a thousand by `LAMINA_MOUNT_CYCLES=1000`.
const CYCLES: usize = 300;
/// What caches, allocators and counters may take for themselves, in KiB: a leak of 30 KiB a cycle shows.
const MEMORY_KIB: u64 = 8 << 10;

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
struct Has {
    descriptors: usize,
    /// Those of mounts; tokio's come and go by themselves.
    threads: usize,
}

fn has(pid: Pid) -> Result<Has> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        threads +=
            usize::from(["lamina-mount", "lamina-pages", "fuser-"].iter().any(|ours| name.starts_with(ours)));
    }
    Ok(Has { descriptors, threads })
}

/// Its own memory, without what it shares with files, in KiB.
fn memory_kib(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn mounting_and_unmounting_hundreds_of_times_leaks_no_descriptor_thread_memory_or_mount() -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "how many is chosen where the test is started")]
    let cycles =
        std::env::var("LAMINA_MOUNT_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(CYCLES);
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("a", "a").file("b", "b")))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    // one that stays, so that the daemon does
    rig.ok(&["mount", &rig.name("a:t"), &text(&rig.path("scratch"))])?;
    // and that was resumed once: its descriptors count as well
    let first = daemon(&rig)?;
    kill(first)?;
    let pid = successor(&rig, first)?;
    let holder = holder(&rig)?;
    let controller = Controller::new(&rig.path("cache"));
    let directory = text(&rig.path("mount"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cycle = || {
        let request = MountRequest {
            reference: rig.name("a:t"),
            directory: directory.clone(),
            no_boot: true,
            no_trace: true,
            ..MountRequest::default()
        };
        runtime.block_on(async {
            controller.mount(&request).await?;
            ensure!(fs::read(format!("{directory}/a"))? == b"a");
            let unmount = UnmountRequest { directory: directory.clone(), lazy: false };
            let deadline = Instant::now() + DEADLINE;
            // what other tests start has the files of this process open as well, from fork to exec
            while let Err(error) = controller.unmount(&unmount).await {
                ensure!(error.to_string().contains("is in use") && Instant::now() < deadline, "{error}");
                tokio::task::yield_now().await;
            }
            Ok(())
        })
    };
    for _ in 0..50 {
        cycle()?;
    }
    let settled = |pid| {
        until("a process to settle", DEADLINE, || {
            let before = has(pid)?;
            std::thread::park_timeout(std::time::Duration::from_millis(50));
            Ok((has(pid)? == before).then_some(before))
        })
    };
    let (before, held, memory) = (settled(pid)?, settled(holder)?, memory_kib(pid)?);
    for _ in 0..cycles {
        cycle()?;
    }
    let (after, grown) = (settled(pid)?, memory_kib(pid)?.saturating_sub(memory));
    ensure!(after == before, "the daemon had {before:?} and has {after:?}");
    ensure!(settled(holder)? == held, "the holder had {held:?}");
    ensure!(grown < MEMORY_KIB, "{grown} KiB more after {cycles} cycles");
    let below = mounts()?.into_iter().filter(|mount| mount.dir.starts_with(rig.path("")));
    ensure!(below.count() == 1, "a mount is left behind");
    ensure!(fs::read_dir(rig.path("cache/mounts"))?.count() == 1, "a record is left behind");
    println!(
        "{cycles} cycles: {after:?}, {grown} KiB more; the holder {held:?}, {} KiB",
        memory_kib(holder)?
    );
    rig.ok(&["unmount", &text(&rig.path("scratch"))]).map(drop)
}
