//! What the cache's eviction keeps, beside an exact LRU and a plain FIFO of the same size: recorded traces, replayed.
//!
//! ```text
//! cargo bench --bench eviction [-- --trace FILE…] [--caps 10,25,50,75]
//! ```
//!
//! A trace is what real mounts asked a cache for that was not in its memory, frame by frame; `trace.rs` says how it looks. It goes
//! through the real cache, whose directory is a temporary one and whose source answers at once, and through two models of which
//! each frame takes as much as its record on disk. Nothing depends on how fast the machine is. To record one:
//!
//! ```text
//! lamina node --cache DIR --cache-mib 20000 --log warn,lamina_cache::asked=trace --log-format json 2>start.json
//! lamina mount --cache DIR --no-boot --no-trace REF MOUNTPOINT      # and run something in it
//! cargo bench --bench eviction -- --record out.frames.zst start.json…
//! ```
//!
//! Each log becomes a phase of its file's name; what is before the first `-` of it is only for its order.

mod models;
mod replay;
mod trace;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::models::{Fifo, Lru};
use crate::replay::{Keeps, Outcome, replay};
use crate::trace::Trace;

#[derive(Parser)]
struct Arguments {
    /// A recorded trace [default: all that lie beside this benchmark]
    #[arg(long)]
    trace: Vec<PathBuf>,
    /// Sizes of the cache, in percent of the bytes of all frames in the trace
    #[arg(long, value_delimiter = ',', default_value = "10,25,50,75")]
    caps: Vec<u64>,
    /// Makes a trace of logs, in their order, and measures nothing
    #[arg(long, requires = "logs", value_name = "FILE")]
    record: Option<PathBuf>,
    /// Logs of a node, in JSON
    #[arg(requires = "record")]
    logs: Vec<PathBuf>,
    /// Where the cache's directory is meanwhile [default: the system's temporary directory]
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.record {
        let trace = Trace::of_logs(&arguments.logs)?;
        println!("{}", trace.summary());
        return trace.write(path);
    }
    let traces = match arguments.trace.is_empty() {
        true => beside_this()?,
        false => arguments.trace,
    };
    for path in traces {
        let trace = Trace::read(&path).with_context(|| path.display().to_string())?;
        println!("{}: {}", path.display(), trace.summary());
        println!(
            "{:>8} {:<12} {:>7} {:>7} {:>12} {:>10} {:>12}",
            "cap", "policy", "frames", "bytes", "starts again", "fetched", "written"
        );
        for percent in &arguments.caps {
            let bytes_max = trace.bytes() / 100 * percent;
            let scratch = match &arguments.scratch {
                Some(directory) => tempfile::tempdir_in(directory)?,
                None => tempfile::tempdir()?,
            };
            let mut cache = replay::Disk::open(&trace, scratch.path(), bytes_max)?;
            show(*percent, "cache", &run(&mut cache, &trace, bytes_max)?);
            show(*percent, "LRU", &run(&mut Lru::new(bytes_max), &trace, bytes_max)?);
            show(*percent, "FIFO", &run(&mut Fifo::new(bytes_max), &trace, bytes_max)?);
        }
    }
    Ok(())
}

/// The traces that were recorded of real images.
fn beside_this() -> Result<Vec<PathBuf>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/eviction");
    let paths = std::fs::read_dir(&directory)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "zst"));
    paths.sort();
    ensure!(!paths.is_empty(), "there is no trace in {}", directory.display());
    Ok(paths)
}

fn run(keeps: &mut dyn Keeps, trace: &Trace, bytes_max: u64) -> Result<Outcome> {
    let outcome = replay(keeps, trace)?;
    ensure!(
        outcome.bytes_used_max <= bytes_max,
        "{} bytes where {bytes_max} are the cap",
        outcome.bytes_used_max
    );
    Ok(outcome)
}

fn show(percent: u64, policy: &str, outcome: &Outcome) {
    let of = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    println!(
        "{percent:>6} % {policy:<12} {:>5.1} % {:>5.1} % {:>10.1} % {:>6} MiB {:>8} MiB",
        of(outcome.all.hits, outcome.all.asked),
        of(outcome.all.hit_bytes, outcome.all.asked_bytes),
        of(outcome.again.hit_bytes, outcome.again.asked_bytes),
        outcome.fetched_bytes >> 20,
        outcome.written_bytes >> 20,
    );
}
