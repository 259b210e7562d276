//! Those that pull first and run then: podman and containerd.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lamina_testkit::mounts;
use lamina_testkit::process::{self, Process};

use crate::sample::{Evidence, Sample};
use crate::stage::{DEADLINE, Stage};

/// containerd listens within a second, or not at all.
const START: Duration = Duration::from_secs(20);
/// Open files and processes of the container: podman asks for more than a machine need allow otherwise.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000"];

/// `podman pull`, then `podman run`, with a storage of its own.
pub(crate) fn podman(stage: &Stage, round: u32) -> Sample {
    Sample::from_result(try_podman(stage, round))
}

/// `ctr images pull`, then `ctr run`, with a containerd of its own.
pub(crate) fn ctr(stage: &Stage, round: u32) -> Sample {
    Sample::from_result(try_ctr(stage, round))
}

fn try_podman(stage: &Stage, round: u32) -> Result<Sample> {
    let dir = Scratch(stage.fresh("podman", round)?);
    // podman takes no more than 50 characters here; /run is this bench's own
    let runroot = format!("/run/podman-{round}");
    let podman = || {
        let mut command = stage.link.node().command("podman");
        command.arg("--root").arg(dir.0.join("root")).arg("--runroot").arg(&runroot);
        command.args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]);
        command
    };
    let mut pull = podman();
    pull.args(["pull", "--quiet", "--tls-verify=false", &stage.plain_ref]);
    let mut run = podman();
    run.args(["run", "--rm", "--runtime", "runc", "--net=none"]).args(LIMITS);
    run.arg(&stage.plain_ref).args(&stage.workload);
    pull_and_run(stage, &dir.0, &mut pull, &mut run)
}

fn try_ctr(stage: &Stage, round: u32) -> Result<Sample> {
    let dir = Scratch(stage.fresh("ctr", round)?);
    // A socket's path has to be short, and /run is our own.
    let socket = format!("/run/containerd-{round}.sock");
    let config = dir.0.join("config.toml");
    let text = format!(
        "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", \
         \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
         \"io.containerd.snapshotter.v1.zfs\"]\n\
         [grpc]\naddress = \"{socket}\"\n[ttrpc]\naddress = \"{socket}.ttrpc\"\n",
        dir.0.display()
    );
    std::fs::write(&config, text)?;
    let mut command = stage.link.node().command("containerd");
    let _daemon = Process::spawn("containerd", command.arg("-c").arg(&config).stderr(Stdio::null()))?;
    process::until("containerd", START, || Ok(UnixStream::connect(&socket).ok().map(drop)))?;
    let ctr = || {
        let mut command = stage.link.node().command("ctr");
        command.args(["--address", &socket]);
        command
    };
    let mut pull = ctr();
    pull.args(["images", "pull", "--plain-http", &stage.plain_ref]);
    let mut run = ctr();
    run.args(["run", "--rm", &stage.plain_ref, "cold-start"]).args(&stage.workload);
    pull_and_run(stage, &dir.0, &mut pull, &mut run)
}

fn pull_and_run(stage: &Stage, dir: &Path, pull: &mut Command, run: &mut Command) -> Result<Sample> {
    let log = dir.join("log");
    stage.drop_caches()?;
    let sample = stage.measure(|| {
        let start = Instant::now();
        process::run_logged(pull, &log, DEADLINE).context("pull")?;
        let ready = start.elapsed();
        process::run_logged(run, &log, DEADLINE).context("run")?;
        Ok(ready)
    })?;
    Ok(sample.check(Evidence::Pulled, stage.image.layer_bytes))
}

/// A directory that is emptied, mounts and all, however the sample went.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = mounts::unmount_below(&self.0).and_then(|()| std::fs::remove_dir_all(&self.0));
        if let Err(error) = removed {
            eprintln!("{} stays until the end: {error}", self.0.display());
        }
    }
}
