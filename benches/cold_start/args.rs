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
    /// The link between node and registry
    #[arg(long, value_enum, default_value_t = LinkProfile::OneGigabit)]
    link: LinkProfile,
    /// Rate of the link, in millions of bits a second, instead of that of --link
    #[arg(long)]
    rate_mbit: Option<f64>,
    /// Round-trip time of the link, in milliseconds, instead of that of --link
    #[arg(long)]
    rtt_ms: Option<f64>,
    /// Samples of each system
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// What to measure, in this order in each round
    #[arg(long, value_delimiter = ',', default_value = "lamina,first,boot,podman,ctr")]
    pub(crate) systems: Vec<System>,
    /// Make the profile for `boot` by `lamina profile record`, instead of taking it from an ordinary start
    #[arg(long)]
    pub(crate) record: bool,
    /// Have a daemon (`lamina node`) run before each of lamina's starts, which has just been asked for its counters; without it each
    /// start begins with all of the node on disk only, and starts a daemon
    #[arg(long)]
    pub(crate) daemon: bool,
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
    /// What to run in the container [default: torch, with --quick numpy]
    #[arg(long, value_enum)]
    workload: Option<Workload>,
    /// What to run in the container instead of a --workload
    #[arg(last = true)]
    command: Vec<String>,
}

/// A link worth measuring over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LinkProfile {
    /// Within a rack: 1 Gbit/s, 1 ms
    #[value(name = "1g")]
    OneGigabit,
    /// Within a good rack: 10 Gbit/s, 0.2 ms
    #[value(name = "10g")]
    TenGigabit,
    /// From far away: 200 Mbit/s, 20 ms
    #[value(name = "200m")]
    Far,
}

/// What python3 is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// `import torch`
    Torch,
    /// `from transformers import AutoModelForCausalLM`
    Transformers,
    /// `import json, http.server`
    Json,
    /// `import numpy`
    Numpy,
}

/// What can start a container from a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum System {
    /// `lamina mount --no-boot --no-trace`, then the workload in a chroot on an overlayfs over the mount; then the same once
    /// more, warm
    Lamina,
    /// The same with neither flag on an image without a profile, so that the start is recorded
    First,
    /// The same with neither flag on an image with a profile, so that the start has a boot pack
    Boot,
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

    /// Millions of bits a second.
    pub(crate) fn rate_mbit(&self) -> f64 {
        self.rate_mbit.unwrap_or(match self.link {
            LinkProfile::OneGigabit => 1_000.0,
            LinkProfile::TenGigabit => 10_000.0,
            LinkProfile::Far => 200.0,
        })
    }

    /// Milliseconds of a round trip.
    pub(crate) fn rtt_ms(&self) -> f64 {
        self.rtt_ms.unwrap_or(match self.link {
            LinkProfile::OneGigabit => 1.0,
            LinkProfile::TenGigabit => 0.2,
            LinkProfile::Far => 20.0,
        })
    }

    /// The program in the container and its arguments.
    pub(crate) fn workload(&self) -> Vec<String> {
        if !self.command.is_empty() {
            return self.command.clone();
        }
        let default = if self.quick { Workload::Numpy } else { Workload::Torch };
        let import = match self.workload.unwrap_or(default) {
            Workload::Torch => "import torch",
            Workload::Transformers => "from transformers import AutoModelForCausalLM",
            Workload::Json => "import json, http.server",
            Workload::Numpy => "import numpy",
        };
        ["python3", "-c", import].map(str::to_owned).to_vec()
    }

    /// Whether anything is mounted.
    pub(crate) fn has_lazy(&self) -> bool {
        self.systems.iter().any(System::is_lazy)
    }

    /// Whether anything is pulled in the ordinary way.
    pub(crate) fn has_peers(&self) -> bool {
        !self.systems.iter().all(System::is_lazy)
    }

    /// Whether `boot` would find the profile gone that it was to use.
    pub(crate) fn first_undoes_boot(&self) -> bool {
        let place = |wanted| self.systems.iter().position(|system| *system == wanted);
        place(System::First).zip(place(System::Boot)).is_some_and(|(first, boot)| boot < first)
    }
}

impl System {
    /// Whether it mounts instead of pulling.
    fn is_lazy(&self) -> bool {
        matches!(self, Self::Lamina | Self::First | Self::Boot)
    }
}
