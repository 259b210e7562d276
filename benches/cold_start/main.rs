//! Time from nothing on a node to a program's exit, over a link with a known rate and delay.
//!
//! ```text
//! cargo bench --bench cold_start -- --image oci:DIR:TAG [-- COMMAND…]
//! ```
//!
//! The bench makes the link itself, starts the registry at one end and each system at the other, drops the page
//! cache before each cold start, and prints a table; `--json` and `--svg` keep it. A sample counts only if the bytes
//! that crossed the link, and for boot packs the mount's own counters, show that the system did what its name says. Without one valid sample of each system the
//! exit code is 1.
//!
//! Everything happens in mount and PID namespaces of its own: whatever way the bench ends, no process and no mount
//! outlives it. Needs root, and for the peers podman, runc, containerd and skopeo.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::args::{Args, System};
use crate::lazy::Way;
use crate::sample::{Row, Sample};
use crate::stage::Stage;

mod args;
mod chart;
mod floor;
mod layout;
mod lazy;
mod machine;
mod native;
mod page_cache;
mod peers;
mod profile;
mod report;
mod sample;
mod stage;
mod supervise;

fn main() -> ExitCode {
    // cargo adds this behind everything else, so it would end up in the workload
    let mut argv: Vec<_> = std::env::args_os().collect();
    argv.pop_if(|last| last == "--bench");
    let args = Args::parse_from(&argv);
    let done = match &args.state {
        None => supervise::run(&argv[1..], &args),
        Some(state) => bench(&args, state, &argv[1..]),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cold_start: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// All of it, in the namespaces that [`supervise`] made.
fn bench(args: &Args, state: &std::path::Path, argv: &[std::ffi::OsString]) -> Result<ExitCode> {
    ensure!(!args.systems.is_empty(), "no system to measure");
    ensure!(!args.first_undoes_boot(), "`first` drops the profile that `boot` starts with: name it before");
    let stage = Stage::new(args, state)?;
    let native = native::Native::unpack(&stage)?;
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..args.runs() {
        for system in &args.systems {
            match system {
                System::Lamina => add_lazy(&mut rows, "lamina", lazy::measure(&stage, Way::Plain, round)),
                System::First => add_lazy(&mut rows, "first", lazy::measure(&stage, Way::First, round)),
                System::Boot => add_lazy(&mut rows, "boot", lazy::measure(&stage, Way::Boot, round)),
                System::Podman => add(&mut rows, "podman", peers::podman(&stage, round)),
                System::Ctr => add(&mut rows, "ctr", peers::ctr(&stage, round)),
            }
        }
        add(&mut rows, "native", native.measure(&stage, round));
    }
    report::print(&stage, &rows);
    if let Some(path) = &args.json {
        report::write_json(&stage, &rows, argv, path)?;
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, chart::draw(&stage, &rows))?;
    }
    Ok(if rows.iter().all(Row::is_valid) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Files a sample under its row, and says at once how it went.
fn add(rows: &mut Vec<Row>, name: &'static str, sample: Sample) {
    eprintln!("{name:>7}: {sample}");
    match rows.iter_mut().find(|row| row.name == name) {
        Some(row) => row.samples.push(sample),
        None => rows.push(Row { name, samples: vec![sample] }),
    }
}

/// The same for a cold start and the warm one after it. All warm ones are one row: nothing of them crosses the link.
fn add_lazy(rows: &mut Vec<Row>, name: &'static str, (cold, warm): (Sample, Sample)) {
    add(rows, name, cold);
    add(rows, "warm", warm);
}
