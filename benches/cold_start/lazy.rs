//! Lamina: mounted cold, and run again warm on the same mount.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lamina_testkit::mounts::{self, MountGuard};
use lamina_testkit::process::{self, Process};
use serde_json::Value;

use crate::profile;
use crate::sample::{Evidence, Sample};
use crate::stage::{DEADLINE, Root, START, Stage};

/// A daemon without mounts ends at once.
const STOP: Duration = Duration::from_secs(20);

/// What the mount has to help it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nothing, and nothing is recorded.
    Plain,
    /// Nothing, and the start is recorded.
    First,
    /// A boot pack.
    Boot,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "lamina",
            Self::First => "first",
            Self::Boot => "boot",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["--no-boot", "--no-trace"],
            Self::First | Self::Boot => &[],
        }
    }

    /// Voids a sample whose mount had a boot pack where it should not, or none where it should.
    fn check(self, cold: &mut Sample) {
        let stored = cold.counters.as_ref().and_then(stored_bytes);
        match (self, stored) {
            (Self::Boot, Some(1..)) | (Self::Plain | Self::First, None | Some(0)) => {}
            (Self::Boot, _) => {
                cold.void_because(&format!("the boot pack brought nothing: {stored:?} bytes stored"))
            }
            (_, Some(stored)) => cold.void_because(&format!("a boot pack stored {stored} bytes")),
        }
    }
}

/// The cold start, then the warm one.
pub(crate) fn measure(stage: &Stage, way: Way, round: u32) -> (Sample, Sample) {
    match try_measure(stage, way, round) {
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

fn try_measure(stage: &Stage, way: Way, round: u32) -> Result<(Sample, Result<Sample>)> {
    match way {
        Way::Plain => {}
        Way::First => profile::forget(stage).context("an image without a profile")?,
        Way::Boot => profile::ensure(stage, round).context("an image with a boot pack")?,
    }
    let layer_bytes = stage.image.layer_bytes;
    let (mut under, place) = (None, Place::new(stage, way.name(), round)?);
    stage.drop_caches()?;
    place.wake()?;
    let cold = stage.measure(|| {
        let start = Instant::now();
        let (mounted, root) = under.insert(place.mount(way.flags()).and_then(with_root)?);
        let ready = start.elapsed();
        stage.run_in(&root.path, &mounted.log).context("the workload on lamina's mount")?;
        Ok(ready)
    })?;
    let Some((mounted, root)) = under else { bail!("no root file system") };
    let mut cold = cold.check(Evidence::Lazy, layer_bytes);
    match mounts::mounted_on(&mounted.point)? {
        Some(found) if found.kind.starts_with("fuse") => {}
        other => cold.void_because(&format!("no FUSE mount: {other:?}")),
    }
    cold.counters = mounted.counters();
    way.check(&mut cold);
    let run_again = || stage.measure(|| stage.run_in(&root.path, &mounted.log).map(|()| Duration::ZERO));
    let warm = stage.rest().and_then(|()| run_again());
    let mut warm = warm.map(|warm| warm.check(Evidence::Local, layer_bytes));
    if let Ok(warm) = &mut warm {
        warm.counters = mounted.counters();
    }
    drop(root);
    if let Err(error) = mounted.unmount() {
        cold.void_because(&format!("lamina unmount: {error:#}"));
    }
    mounted.remove()?;
    if let (Ok(warm), Some(reason)) = (&mut warm, &cold.void) {
        warm.void_because(&format!("its cold start is void: {reason}"));
    }
    Ok((cold, warm))
}

fn with_root(mounted: Mounted<'_>) -> Result<(Mounted<'_>, Root)> {
    let root = mounted.root()?;
    Ok((mounted, root))
}

/// Where the image can be mounted by a node with a cache of its own.
pub(crate) struct Place<'a> {
    stage: &'a Stage,
    dir: PathBuf,
    point: PathBuf,
    cache: PathBuf,
    log: PathBuf,
    daemon: Option<Process>,
}

impl<'a> Place<'a> {
    /// With a daemon where that is asked for.
    pub(crate) fn new(stage: &'a Stage, name: &str, round: u32) -> Result<Self> {
        let dir = stage.fresh(name, round)?;
        let (point, cache, log) = (dir.join("mount"), dir.join("cache"), dir.join("log"));
        std::fs::create_dir(&point)?;
        let daemon = stage.daemon.then(|| {
            let mut command = stage.lamina();
            command.env("LAMINA_LOG", "warn").arg("node").arg("--cache").arg(&cache);
            let mut daemon = Process::spawn("lamina node", &mut command)?;
            daemon.wait_line("ready", START)?;
            Ok::<_, anyhow::Error>(daemon)
        });
        Ok(Self { stage, dir, point, cache, log, daemon: daemon.transpose()? })
    }

    /// Has the daemon do something, if there is one: it and the program are in memory then.
    fn wake(&self) -> Result<()> {
        if self.daemon.is_some() {
            let mut command = self.stage.lamina();
            process::run(command.arg("stats").arg("--cache").arg(&self.cache)).context("lamina stats")?;
        }
        Ok(())
    }

    /// `lamina mount` with `flags`.
    pub(crate) fn mount(self, flags: &[&str]) -> Result<Mounted<'a>> {
        let mut command = self.stage.lamina();
        command.args(["mount", &self.stage.lazy_ref]).arg(&self.point);
        command.arg("--cache").arg(&self.cache).arg("--plain-http").args(flags);
        process::run_logged(&mut command, &self.log, DEADLINE).context("lamina mount")?;
        let Self { stage, dir, point, cache, log, daemon } = self;
        Ok(Mounted { stage, guard: MountGuard::new(&point), dir, point, cache, log, daemon })
    }
}

/// The image, mounted there.
pub(crate) struct Mounted<'a> {
    stage: &'a Stage,
    dir: PathBuf,
    point: PathBuf,
    cache: PathBuf,
    /// What commands print.
    pub(crate) log: PathBuf,
    guard: MountGuard,
    daemon: Option<Process>,
}

impl Mounted<'_> {
    /// A root directory on top of it.
    pub(crate) fn root(&self) -> Result<Root> {
        Root::new(std::slice::from_ref(&self.point), &self.dir)
    }

    /// `lamina unmount`.
    pub(crate) fn unmount(&self) -> Result<()> {
        let mut command = self.stage.lamina();
        command.arg("unmount").arg(&self.point).arg("--cache").arg(&self.cache);
        process::run_logged(&mut command, &self.log, DEADLINE)
    }

    /// Removes all that belongs to it.
    pub(crate) fn remove(self) -> Result<()> {
        drop(self.guard);
        if let Some(daemon) = self.daemon {
            daemon.stop(STOP)?;
        }
        std::fs::remove_dir_all(&self.dir).with_context(|| self.dir.display().to_string())
    }

    /// What `lamina stats` says, where it says anything.
    fn counters(&self) -> Option<Value> {
        counters(self.stage, &self.point, &self.cache)
    }
}

fn counters(stage: &Stage, mount: &Path, cache: &Path) -> Option<Value> {
    let mut command = stage.lamina();
    command.arg("stats").arg(mount).arg("--cache").arg(cache).arg("--json");
    let output = process::run(&mut command).ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

/// What a boot pack has put into the page cache.
fn stored_bytes(counters: &Value) -> Option<u64> {
    counters["mounts"].as_array()?.first()?["counters"]["boot_stored_bytes"].as_u64()
}
