//! The table and the file.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::floor;
use crate::machine::Machine;
use crate::sample::{Row, Sample};
use crate::stage::Stage;

/// Prints the table to standard output.
pub(crate) fn print(stage: &Stage, rows: &[Row]) {
    println!("{}", headline(stage));
    println!("{}", Machine::here().line());
    if stage.quick {
        println!("quick: the paths were checked; the times mean little");
    }
    println!(
        "{:<8} {:>9} {:>9} {:>9} {:>8} {:>13}  samples",
        "", "median s", "min s", "max s", "x warm", "MiB received"
    );
    for row in rows {
        let void = row.samples.iter().filter(|sample| sample.void.is_some()).count();
        let samples = format!("{} valid, {void} void", row.samples.len() - void);
        let (Some([median, least, greatest]), Some(mib)) = (row.seconds(), row.received_mib()) else {
            println!("{:<8} no valid sample  {samples}", row.name);
            continue;
        };
        let ratio = ratio(rows, median).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!(
            "{:<8} {median:>9.2} {least:>9.2} {greatest:>9.2} {ratio:>8} {mib:>13.1}  {samples}",
            row.name
        );
    }
    if let Some(seconds) = floor::seconds(stage, rows) {
        let ratio = ratio(rows, seconds).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!(
            "{:<8} {seconds:>9.2} {:>9} {:>9} {ratio:>8} {:>13}  computed: {}",
            "floor",
            "-",
            "-",
            "-",
            floor::MEANING
        );
    }
}

/// Writes every sample, and what is needed to judge and repeat it.
pub(crate) fn write_json(stage: &Stage, rows: &[Row], argv: &[OsString], path: &Path) -> Result<()> {
    let machine = Machine::here();
    // the first two are the supervisor's
    let command: Vec<_> = argv.iter().skip(2).map(|word| word.to_string_lossy()).collect();
    let systems: Vec<_> = rows
        .iter()
        .map(|row| {
            let [median, least, greatest] = row.seconds().map_or([None; 3], |seconds| seconds.map(Some));
            json!({
                "name": row.name,
                "seconds_median": median,
                "seconds_min": least,
                "seconds_max": greatest,
                "ratio_to_warm": median.and_then(|median| ratio(rows, median)),
                "received_mib_median": row.received_mib(),
                "samples": row.samples.iter().map(Sample::json).collect::<Vec<_>>(),
            })
        })
        .collect();
    let document = json!({
        "bench": "cold_start",
        "lamina": env!("CARGO_PKG_VERSION"),
        "date": machine.date,
        "command": command,
        "machine": machine.json(),
        "link": { "rate_mbit": stage.spec.rate_mbit, "rtt_ms": rtt_ms(stage) },
        "image": {
            "tag": stage.image.tag,
            "digest": stage.image.digest,
            "layers": stage.image.layers.len(),
            "layer_bytes": stage.image.layer_bytes,
        },
        "workload": stage.workload,
        "quick": stage.quick,
        "record": stage.record,
        "floor_seconds": floor::seconds(stage, rows),
        "systems": systems,
    });
    let text = serde_json::to_string_pretty(&document)?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}

/// What was run, on what, over what.
pub(crate) fn headline(stage: &Stage) -> String {
    format!(
        "{} in {} ({} MiB of layers), {} Mbit/s, {} ms round trip",
        stage.workload.join(" "),
        stage.image.tag,
        stage.image.layer_bytes >> 20,
        stage.spec.rate_mbit,
        rtt_ms(stage),
    )
}

fn rtt_ms(stage: &Stage) -> f64 {
    stage.spec.delay_one_way.as_secs_f64() * 2000.0
}

/// How often lamina's warm start fits into `seconds`.
fn ratio(rows: &[Row], seconds: f64) -> Option<f64> {
    let [warm, ..] = rows.iter().find(|row| row.name == "warm")?.seconds()?;
    Some(seconds / warm)
}
