//! Everything at once: programs read, map and run files of ten mounts while the node, its holder and the registry are killed, the
//! lines are cut, slowed and, one at a time, made to lie, frames rot on disk, the disk fills, the clock is stepped by hours and
//! years, and the cache, far too small, evicts all the time. Every byte that is read is compared with what was pushed.
//!
//! It shows: no wrong byte, no error, nobody stuck, and no wait beyond [`programs::STALL_MAX`]. It takes a minute; longer with
//! `LAMINA_CHAOS_SECONDS=600`, and again as it was with the `LAMINA_CHAOS_SEED` that it prints.
//!
//! Needs root, `/dev/fuse` and libfaketime. Without them it fails; it is not skipped.

#[path = "chaos/clock.rs"]
mod clock;
#[path = "chaos/faults.rs"]
mod faults;
#[path = "chaos/line.rs"]
mod line;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "survival/node.rs"]
mod node;
#[path = "chaos/programs.rs"]
mod programs;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "cli/rig.rs"]
mod rig;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::MountGuard;
use lamina_testkit::noise;
use lamina_testkit::process::run;

use crate::clock::Clock;
use crate::faults::{Chance, Fault, World};
use crate::line::Line;
use crate::programs::{Programs, Truth};
use crate::rig::{Rig, text};

const IMAGES: u64 = 4;
const MOUNTS: usize = 10;
/// All contents together are some 40 MB; the cache may keep this much of it, in MiB.
const CACHE_MIB: &str = "16";
/// The cache's disk: with everything beside the cache's frames, and room for a moment.
const DISK: &str = "size=64m";
/// Readers wait this long, in seconds: longer than any fault lasts, so none gets an error.
const DEADLINE: &str = "60";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, directory] = &arguments[..]
        && word == programs::MAP
    {
        return programs::map_on(directory.as_ref());
    }
    if arguments.iter().any(|word| word == "--list") {
        println!("chaos: test");
        return ExitCode::SUCCESS;
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "how long and which chaos is chosen where the test is started"
    )]
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("LAMINA_CHAOS_SEED").unwrap_or_else(|| u64::from(std::process::id()) * 2_654_435_761);
    let seconds = number("LAMINA_CHAOS_SECONDS").unwrap_or(45);
    println!("chaos for {seconds} s with LAMINA_CHAOS_SEED={seed}");
    match chaos(seed, Duration::from_secs(seconds)) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("chaos with LAMINA_CHAOS_SEED={seed} failed: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// Files of one image, and what is in them.
fn truth(image: u64) -> Truth {
    let mut files = BTreeMap::new();
    files.insert("big".to_owned(), noise(6_000_000, image));
    // shared by all images
    files.insert("shared".to_owned(), noise(2_000_000, 99));
    for n in 0..100 {
        files.insert(format!("small/{n}"), noise(100 + n * 97, image * 1000 + n as u64));
    }
    let tool = fs::read(programs::TOOL).expect("every Debian has it");
    files.insert("tool".to_owned(), tool);
    files
}

fn chaos(seed: u64, time: Duration) -> Result<String> {
    let clock = Clock::new()?;
    let mut environment = clock.environment()?;
    // what a daemon logs shows its clock
    environment.push(("LAMINA_LOG", "warn,lamina_node=info".to_owned()));
    let mut rig = Rig::with_environment(environment)?;
    let cache = rig.path("cache");
    fs::create_dir(&cache)?;
    run(Command::new("mount").args(["-t", "tmpfs", "-o", DISK, "none"]).arg(&cache))?;
    let disk = MountGuard::new(cache.clone());
    let truths: Vec<Truth> = (0..IMAGES).map(truth).collect();
    for (number, truth) in truths.iter().enumerate() {
        let image = Image::new().layer(|layer| {
            truth.iter().fold(layer.dir("small"), |layer, (path, contents)| {
                let layer = layer.file(path, contents.clone());
                if path == "tool" { layer.mode(0o755) } else { layer }
            })
        });
        let source = rig.layout(&format!("layout-{number}"), &image)?;
        rig.ok(&["push", &source, &rig.name(&format!("image{number}:t"))])?;
    }
    // the registry is also its own mirror by another line, so that while one lies somebody has the right bytes
    let lines = [Line::start(&rig.address)?, Line::start(&rig.address)?];
    let mirror = format!("{}=http://{}", lines[0].address, lines[1].address);
    let mut mounts = Vec::new();
    for number in 0..MOUNTS {
        let (image, directory) = (number % truths.len(), rig.path(&format!("mount-{number}")));
        fs::create_dir(&directory)?;
        let reference = format!("{}/image{image}:t", lines[0].address);
        let mut words = vec!["mount", "--cache-mib", CACHE_MIB, "--deadline", DEADLINE, "--mirror", &mirror];
        // the first of each image starts as ever, the others ask for everything themselves
        words.extend((number >= truths.len()).then_some(["--no-boot", "--no-trace"]).into_iter().flatten());
        let directory = text(&directory);
        words.extend([reference.as_str(), &directory]);
        rig.ok(&words)?;
        mounts.push((directory.into(), &truths[image]));
    }
    let programs = Programs::start(&mounts, seed)?;
    let mut chance = Chance::new(seed);
    let (begun, mut counts) = (Instant::now(), BTreeMap::<Fault, u32>::new());
    while begun.elapsed() < time {
        let fault = Fault::any(&mut chance);
        World { rig: &mut rig, lines: &lines, cache: &cache, clock: &clock, chance: &mut chance }
            .suffer(fault)
            .with_context(|| format!("{fault:?}"))?;
        *counts.entry(fault).or_default() += 1;
        programs.check().with_context(|| format!("after {fault:?}"))?;
    }
    // of the daemon that there is now
    let failures = rig.counter("verify_failures")?;
    clock.must_be_gone_by(&rig, &cache)?;
    let done = programs.stop()?;
    for (directory, truth) in &mounts {
        programs::compare(directory, truth).context("when all is well again")?;
    }
    ensure!(counts.len() > 3, "there were hardly any faults: {counts:?}");
    let mut report = format!("{done}; faults: {counts:?}; {failures} frames did not verify");
    for (directory, _) in &mounts {
        rig.ok(&["unmount", &text(directory)])?;
    }
    rig.node_ended()?;
    drop(disk);
    report.push_str("; everything unmounted");
    Ok(report)
}
