//! `lamina gc`.

use std::time::SystemTime;

use anyhow::{Context, Result};
use lamina_store::{GcAmount, GcConfig, GcRepacked, GcReport, Keeper};

use super::{Interrupted, interrupted, mib};
use crate::args::{Common, GcArguments};

/// Collects garbage, beside the registries that serve the storage or without them.
pub(crate) async fn run(arguments: GcArguments, common: Common) -> Result<()> {
    let storage = arguments.storage.parse(&common)?;
    let keeper = Keeper::open(&storage).await.with_context(|| storage.to_string())?;
    let mut config = GcConfig { dry_run: arguments.dry_run, ..arguments.settings.config() };
    config.lost_after = arguments.lost_after.unwrap_or(config.lost_after);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is before 1970")?;
    let report = tokio::select! {
        report = keeper.gc(&config, now.as_secs()) => report.with_context(|| storage.to_string())?,
        // whatever was deleted was garbage, and the next collection goes on
        () = interrupted() => anyhow::bail!(Interrupted),
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print(&report),
    }
    Ok(())
}

fn print(report: &GcReport) {
    let freed = if report.dry_run { "would free" } else { "freed" };
    println!("{freed:12} {}", amount(&report.freed));
    if report.originals.blobs > 0 {
        println!("{:12} {} originals of these, which are rebuilt from now on", "", report.originals.blobs);
    }
    if report.repacked.packs > 0 {
        let GcRepacked { packs, bytes, bytes_left } = report.repacked;
        let repacked = if report.dry_run { "would repack" } else { "repacked" };
        let (freed, left) = (mib(bytes.saturating_sub(bytes_left)), mib(bytes_left));
        println!("{repacked:12} {freed:>12} of {packs} packs; {left} of them live on");
    }
    println!("{:12} {}", "quarantined", amount(&report.quarantined));
    println!("{:12} {}", "kept", amount(&report.kept));
    if report.unproven > 0 {
        println!(
            "{} originals were due and stay: they cannot be made again, see `lamina fsck`",
            report.unproven
        );
    }
    if report.held > 0 {
        println!("{} objects were due and stay: pushes under way hold them", report.held);
    }
}

fn amount(amount: &GcAmount) -> String {
    let GcAmount { manifests, blobs, records, bytes } = amount;
    format!("{:>12} in {blobs} blobs, {manifests} manifests, {records} records", mib(*bytes))
}
