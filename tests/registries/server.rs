//! `lamina registry` over a bucket, and what is run beside it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::process::{Process, run};
use lamina_testkit::s3::S3;
use serde_json::Value;

use crate::rig::DEADLINE;

/// Where all of a test's registries keep everything.
const PREFIX: &str = "store";

pub(crate) struct Server {
    pub(crate) address: String,
    process: Process,
}

impl Server {
    /// Starts a registry that collects nothing by itself and often looks whether somebody does. The index is its own.
    pub(crate) fn start(s3: &S3, index: &Path) -> Result<Self> {
        let mut command = lamina(s3);
        command.args(["registry", "--listen", "127.0.0.1:0", "--gc-every", "0", "--poll-every", "1s"]);
        command.args(["--storage", &s3.url(PREFIX), "--index"]).arg(index);
        // thousands of lines of what was written help nobody
        command.args(["--log", "warn"]);
        let mut process = Process::spawn("a registry over a bucket", &mut command)?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        let address = line.rsplit('/').next().context("an address")?.to_owned();
        Ok(Self { address, process })
    }

    pub(crate) fn stop(self) -> Result<()> {
        let status = self.process.stop(DEADLINE)?;
        ensure!(status.success(), "a registry ended with {status}");
        Ok(())
    }
}

/// The binary, with what it needs to find the bucket.
fn lamina(s3: &S3) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.env_remove("LAMINA_CONFIG").envs(s3.settings());
    command
}

/// What a command says of the store.
pub(crate) fn report(s3: &S3, command: &str, arguments: &[&str]) -> Result<Value> {
    let mut run_it = lamina(s3);
    run_it.args([command, "--json", "--storage", &s3.url(PREFIX)]).args(arguments);
    Ok(serde_json::from_slice(&run(&mut run_it)?.stdout)?)
}

/// Nothing is damaged.
pub(crate) fn is_whole(s3: &S3) -> Result<()> {
    let index = tempfile::tempdir()?;
    let report = report(s3, "fsck", &["--index", &index.path().display().to_string()])?;
    ensure!(report["damaged"].as_array().is_some_and(Vec::is_empty), "{report:#}");
    Ok(())
}
