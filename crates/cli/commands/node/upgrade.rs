//! `lamina node upgrade`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lamina_node::Controller;
use lamina_wire::proto::StatsResponse;

use crate::args::NodeUpgrade;

/// A new daemon looks through its cache before it answers.
const START: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Has the daemon of a cache replaced, and waits until another serves.
pub(super) async fn upgrade(arguments: NodeUpgrade) -> Result<()> {
    let controller = Controller::new(&arguments.cache.directory);
    let program = match arguments.program {
        Some(program) => program.canonicalize().with_context(|| program.display().to_string())?,
        None => std::env::current_exe()?,
    };
    let before = controller.stats().await?;
    let name = program.to_str().context("the program's name must be UTF-8")?;
    let version = controller.upgrade(name.to_owned()).await?.version;
    let after = successor(&controller, before.pid).await?;
    if !is(after.pid, &program) {
        bail!(
            "{name} did not serve, so the program of before goes on, as process {}; {} says more",
            after.pid,
            arguments.cache.directory.join("node.log").display()
        );
    }
    println!("{version} serves as process {}, with {} mounts", after.pid, after.mounts.len());
    Ok(())
}

/// What the next daemon says.
async fn successor(controller: &Controller, before: u32) -> Result<StatsResponse> {
    let begun = Instant::now();
    loop {
        // a daemon that dies while it answers is no answer
        match controller.stats().await {
            Ok(after) if after.pid != before => return Ok(after),
            Err(error) if begun.elapsed() > START => return Err(error.into()),
            Ok(_) if begun.elapsed() > START => bail!("process {before} does not make room"),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Whether a process runs a program.
fn is(pid: u32, program: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)
}
