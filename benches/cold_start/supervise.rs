//! The outer process: makes a directory and namespaces, runs the bench inside them, and cleans up after it.
//!
//! The inner bench lives in a PID namespace whose first process dies with this one, and takes every other along;
//! its mounts are in a mount namespace that nobody else sees. So all that is left to remove is one directory.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Args;

/// As a shell says it: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;
/// The first process of a PID namespace has to reap orphans, such as daemons; a shell that waits does.
const INIT: &str = r#""$0" "$@" & wait $!"#;

/// Runs this program again, inside, with `argv`; gives its exit code.
pub(crate) fn run(argv: &[OsString], args: &Args) -> Result<ExitCode> {
    ensure!(rustix::process::geteuid().is_root(), "needs root, for namespaces and mounts");
    let mut builder = tempfile::Builder::new();
    builder.prefix("lamina-cold-start-");
    let dir = match &args.scratch {
        Some(scratch) => builder.tempdir_in(scratch),
        None => builder.tempdir(),
    }
    .context("a directory for images and caches")?;
    let mut command = Command::new("setpriv");
    command
        .args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=SIGKILL",
            "--mount-proc",
        ])
        .args(["sh", "-c", INIT])
        .arg(std::env::current_exe()?)
        .arg("--state")
        .arg(dir.path())
        .args(argv)
        .kill_on_drop(true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut inside = command.spawn().context("start setpriv and unshare (Debian: util-linux)")?;
        let status = tokio::select! {
            status = inside.wait() => status?,
            _ = interrupt.recv() => { inside.kill().await?; return Ok(INTERRUPTED) }
            _ = terminate.recv() => { inside.kill().await?; return Ok(INTERRUPTED) }
        };
        anyhow::Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(2))
    })?;
    remove(&dir)?;
    Ok(ExitCode::from(code))
}

/// Removes the directory. The kernel may take a moment to finish off the last process in it, hence the retries.
fn remove(dir: &tempfile::TempDir) -> Result<()> {
    let deadline = std::time::Duration::from_secs(10);
    lamina_testkit::process::until("the last file to be closed", deadline, || {
        Ok(std::fs::remove_dir_all(dir.path()).ok())
    })
    .with_context(|| format!("{} stays behind", dir.path().display()))
}
