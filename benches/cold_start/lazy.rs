//! Lamina: mounted cold, and run again warm on the same mount.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use lamina_testkit::mounts::{self, MountGuard};
use lamina_testkit::process;

use crate::sample::{Evidence, Sample};
use crate::stage::{DEADLINE, Root, Stage};

/// The cold start, then the warm one.
pub(crate) fn measure(stage: &Stage, round: u32) -> (Sample, Sample) {
    match try_measure(stage, round) {
        Ok((cold, warm)) => (cold, Sample::from_result(warm)),
        Err(error) => {
            let reason = format!("{error:#}");
            (
                Sample::from_result(Err(error)),
                Sample::from_result(Err(anyhow::anyhow!("no cold start: {reason}"))),
            )
        }
    }
}

fn try_measure(stage: &Stage, round: u32) -> Result<(Sample, Result<Sample>)> {
    let dir = stage.fresh("lamina", round)?;
    let (mount, cache, log) = (dir.join("mount"), dir.join("cache"), dir.join("log"));
    std::fs::create_dir(&mount)?;
    let guard = MountGuard::new(&mount);
    let layer_bytes = stage.image.layer_bytes;
    stage.drop_caches()?;
    let mut root = None;
    let cold = stage.measure(|| {
        let start = Instant::now();
        let mut command = stage.lamina();
        command.args(["mount", &stage.lazy_ref]).arg(&mount).arg("--cache").arg(&cache).arg("--plain-http");
        process::run_logged(&mut command, &log, DEADLINE).context("lamina mount")?;
        let root = root.insert(Root::new(std::slice::from_ref(&mount), &dir)?);
        let ready = start.elapsed();
        stage.run_in(&root.path, &log).context("the workload on lamina's mount")?;
        Ok(ready)
    })?;
    let mut cold = cold.check(Evidence::Lazy, layer_bytes);
    match mounts::mounted_on(&mount)? {
        Some(mounted) if mounted.kind.starts_with("fuse") => {}
        other => cold.void_because(&format!("no FUSE mount: {other:?}")),
    }
    cold.counters = counters(stage, &mount, &cache);
    let Some(root) = root else { bail!("no root file system") };
    let warm = stage.measure(|| stage.run_in(&root.path, &log).map(|()| std::time::Duration::ZERO));
    let mut warm = warm.map(|warm| warm.check(Evidence::Local, layer_bytes));
    if let Ok(warm) = &mut warm {
        warm.counters = counters(stage, &mount, &cache);
    }
    drop(root);
    let mut unmount = stage.lamina();
    unmount.arg("unmount").arg(&mount).arg("--cache").arg(&cache);
    if let Err(error) = process::run_logged(&mut unmount, &log, DEADLINE) {
        cold.void_because(&format!("lamina unmount: {error:#}"));
    }
    drop(guard);
    std::fs::remove_dir_all(&dir)?;
    if let (Ok(warm), Some(reason)) = (&mut warm, &cold.void) {
        warm.void_because(&format!("its cold start is void: {reason}"));
    }
    Ok((cold, warm))
}

/// What `lamina stats` says; a bench does not depend on it.
fn counters(stage: &Stage, mount: &Path, cache: &Path) -> Option<serde_json::Value> {
    let mut command = stage.lamina();
    command.arg("stats").arg(mount).arg("--cache").arg(cache).arg("--json");
    let output = process::run(&mut command).ok()?;
    serde_json::from_slice(&output.stdout).ok()
}
