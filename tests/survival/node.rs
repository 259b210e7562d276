//! The processes of a node: its daemon and its holder.

use anyhow::{Context, Result, ensure};
use lamina_testkit::process::until;
use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{DEADLINE, Rig};

/// The daemon that serves the rig's cache.
pub(crate) fn daemon(rig: &Rig) -> Result<Pid> {
    let stats = rig.json(&["stats"])?;
    let pid = stats["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    pid.and_then(Pid::from_raw).context("a process id")
}

/// The holder of the rig's cache: the process of the same command line, but for what says that it is none.
pub(crate) fn holder(rig: &Rig) -> Result<Pid> {
    let cache = rig.path("cache").display().to_string();
    let daemon = daemon(rig)?;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let (Some(pid), Ok(words)) = (pid, std::fs::read(entry.path().join("cmdline"))) else { continue };
        let words = String::from_utf8_lossy(&words);
        if pid != daemon && words.contains(&cache) && words.contains("\0node\0") && !words.contains("--held")
        {
            return Ok(pid);
        }
    }
    anyhow::bail!("no process holds the node of {cache}")
}

/// Ends a process as a crash does.
pub(crate) fn kill(pid: Pid) -> Result<()> {
    kill_process(pid, Signal::KILL).with_context(|| format!("kill {pid}"))
}

/// Waits for a daemon other than `before`, which must not take long, and gives it.
pub(crate) fn successor(rig: &Rig, before: Pid) -> Result<Pid> {
    until("another daemon", DEADLINE, || Ok(daemon(rig).ok().filter(|pid| *pid != before)))
}

/// How each mount came to the daemon that has it.
pub(crate) fn restored(rig: &Rig) -> Result<Vec<String>> {
    let stats = rig.json(&["stats"])?;
    let mounts = stats["mounts"].as_array().context("mounts")?;
    let mut restored = Vec::new();
    for mount in mounts {
        restored.push(mount["restored"].as_str().unwrap_or("requested").to_owned());
    }
    ensure!(!restored.is_empty(), "there are no mounts: {stats}");
    Ok(restored)
}
