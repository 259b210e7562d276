//! What the registry knows of the image's starts: gone before a first start, there before one with a boot pack.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lamina_testkit::process;
use serde_json::Value;

use crate::lazy::Place;
use crate::stage::{DEADLINE, Stage};

/// A boot pack that has not been replaced for so long will not be.
const STEADY: Duration = Duration::from_secs(3);
/// Building one takes seconds.
const BUILT: Duration = Duration::from_secs(120);

/// Makes the registry forget it. Traces that were under way are waited for, so that none brings it back.
pub(crate) fn forget(stage: &Stage) -> Result<()> {
    stage.settle()?;
    process::run(&mut profile(stage, "drop"))?;
    process::until("the profile to be forgotten", BUILT, || {
        stage.settle()?;
        let known = show(stage)?;
        Ok((known["profile"].is_null() && known["boot"].is_null()).then_some(()))
    })
}

/// Makes sure that there is one, of this workload, with its boot pack. `first` may have left it.
pub(crate) fn ensure(stage: &Stage, round: u32) -> Result<()> {
    stage.settle()?;
    if stage.record {
        forget(stage)?;
        record(stage, round)?;
    } else if show(stage)?["profile"].is_null() {
        let mounted = Place::new(stage, "recording", round)?.mount(&[])?;
        let root = mounted.root()?;
        stage.run_in(&root.path, &mounted.log).context("the workload, recorded")?;
        drop(root);
        mounted.unmount()?;
        mounted.remove()?;
    }
    let mut last = (Value::Null, Instant::now());
    process::until("a boot pack that stays", BUILT, || {
        stage.settle()?;
        let boot = show(stage)?["boot"].take();
        if boot != last.0 {
            last = (boot, Instant::now());
        }
        Ok((!last.0.is_null() && last.1.elapsed() >= STEADY).then_some(()))
    })
}

/// `lamina profile record`, with a cache of its own.
fn record(stage: &Stage, round: u32) -> Result<()> {
    let dir = stage.fresh("recording", round)?;
    let mut command = profile(stage, "record");
    command.arg("--cache").arg(dir.join("cache")).arg("--").args(&stage.workload);
    process::run_logged(&mut command, &dir.join("log"), DEADLINE).context("lamina profile record")?;
    Ok(std::fs::remove_dir_all(&dir)?)
}

fn show(stage: &Stage) -> Result<Value> {
    let output = process::run(profile(stage, "show").arg("--json"))?;
    serde_json::from_slice(&output.stdout).context("what `lamina profile show --json` says")
}

fn profile(stage: &Stage, verb: &str) -> Command {
    let mut command = stage.lamina();
    command.args(["profile", verb, &stage.lazy_ref, "--plain-http"]);
    command
}
