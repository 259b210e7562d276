//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Times cold starts of one container image over a shaped link.
#[derive(Debug, Parser)]
#[command(name = "cold_start")]
pub(crate) struct Args {
    /// The image, as an OCI layout on this machine; scripts/small-image and scripts/torch-image make one
    #[arg(long, value_name = "oci:DIR:TAG")]
    pub(crate) image: String,
    /// Rate of the link, in millions of bits a second
    #[arg(long, default_value_t = 1000.0)]
    pub(crate) rate_mbit: f64,
    /// Round-trip time of the link, in milliseconds
    #[arg(long, default_value_t = 1.0)]
    pub(crate) rtt_ms: f64,
    /// Samples of each system
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// What to measure, in this order in each round
    #[arg(long, value_delimiter = ',', default_value = "lamina,podman,ctr")]
    pub(crate) systems: Vec<System>,
    /// Let podman and ctr pull from docker-registry instead of lamina's
    #[arg(long)]
    pub(crate) peer_registry: bool,
    /// Write all samples, with the machine they were taken on, to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw the medians to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// One sample of each: checks that every path works and leaves its evidence; the times mean little
    #[arg(long)]
    pub(crate) quick: bool,
    /// Where to put images and caches for the time of the run; a real disk, not an overlay
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// Measure this program instead of the lamina that was built with the bench
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_lamina"), hide_default_value = true)]
    pub(crate) lamina: PathBuf,
    /// Set for the process inside the namespaces: its directory
    #[arg(long, hide = true)]
    pub(crate) state: Option<PathBuf>,
    /// What to run in the container [default: import torch, with --quick import numpy, in python3]
    #[arg(last = true)]
    workload: Vec<String>,
}

/// What can start a container from a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum System {
    /// `lamina mount`, then the workload in a chroot on an overlayfs over the mount; then the same once more, warm
    Lamina,
    /// `podman pull`, then `podman run`
    Podman,
    /// containerd: `ctr images pull`, then `ctr run`
    Ctr,
}

impl Args {
    /// Samples of each system.
    pub(crate) fn runs(&self) -> u32 {
        if self.quick { 1 } else { self.runs.max(1) }
    }

    /// The program in the container and its arguments.
    pub(crate) fn workload(&self) -> Vec<String> {
        if !self.workload.is_empty() {
            return self.workload.clone();
        }
        let import = if self.quick { "import numpy" } else { "import torch" };
        ["python3", "-c", import].map(str::to_owned).to_vec()
    }

    /// Whether anything is pulled in the ordinary way.
    pub(crate) fn has_peers(&self) -> bool {
        self.systems.iter().any(|system| *system != System::Lamina)
    }
}
