//! Debian's `docker-registry`, on a free port of loopback.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use lamina_testkit::process::{Process, until};

use crate::rig::DEADLINE;

pub(crate) struct DockerRegistry {
    pub(crate) address: String,
    _process: Process,
}

impl DockerRegistry {
    /// Starts one that keeps everything below `directory`; `more` is added to its configuration.
    pub(crate) fn start(directory: &Path, more: &str) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let config = directory.join("config.yml");
        let storage = directory.join("storage");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n\
             http:\n  addr: 127.0.0.1:0\n{more}",
            storage.display()
        );
        std::fs::write(&config, text)?;
        let log = directory.join("log");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stderr(File::create(&log)?);
        let process = Process::spawn("docker-registry", &mut command)?;
        let address = until("docker-registry to listen", DEADLINE, || {
            let said = std::fs::read_to_string(&log)?;
            let after = said.split("listening on ").nth(1);
            Ok(after.and_then(|rest| rest.split(['"', ',', ' ']).next()).map(str::to_owned))
        })?;
        Ok(Self { address, _process: process })
    }

    /// A reference to it.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }
}
