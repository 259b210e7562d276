//! `lamina fsck`.

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use lamina_store::{FsckReport, Keeper, Storage, Store, StoreConfig};

use super::{Ended, Interrupted, interrupted, mib};
use crate::args::{Common, FsckArguments};

/// Everything that was damaged is good again.
const REPAIRED: u8 = 3;
/// Something damaged is left.
const DAMAGED: u8 = 4;

/// Looks at everything, and where it is wanted makes good what can be made good.
pub(crate) async fn run(arguments: FsckArguments, common: Common) -> Result<()> {
    let storage = arguments.storage.parse(&common)?;
    let keeper = Keeper::open(&storage).await.with_context(|| storage.to_string())?;
    let bar = crate::progress::bytes(keeper.blob_bytes().await?);
    let report = tokio::select! {
        report = check(&arguments, &storage, &keeper, &bar) => report.with_context(|| storage.to_string())?,
        () = interrupted() => bail!(Interrupted),
    };
    bar.finish_and_clear();
    match arguments.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print(&report, arguments.repair),
    }
    match (report.damaged.len(), report.left()) {
        (0, _) => Ok(()),
        (_, 0) => bail!(Ended(REPAIRED)),
        _ => bail!(Ended(DAMAGED)),
    }
}

async fn check(
    arguments: &FsckArguments,
    storage: &Storage,
    keeper: &Keeper,
    bar: &ProgressBar,
) -> Result<FsckReport> {
    let done = |bytes| bar.inc(bytes);
    if !arguments.repair {
        return Ok(keeper.fsck(&done).await?);
    }
    if matches!(storage, Storage::Bucket(_)) && keeper.is_served().await? {
        bail!(
            "registries are at work on it: stop them, or wait a minute after one has died, and repair then"
        );
    }
    let index = arguments.storage.index(storage);
    match std::fs::remove_dir_all(&index) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| index.display().to_string());
        }
        _ => {}
    }
    // the index is built anew by this
    let store = Store::open_storage(storage, StoreConfig::new(index)).await?;
    let report = keeper.repair(&store, &done).await?;
    store.close().await?;
    Ok(report)
}

fn print(report: &FsckReport, repair: bool) {
    let FsckReport { blobs, bytes, records, manifests, garbage_blobs, garbage_bytes, damaged } = report;
    for damage in damaged {
        println!("{}: {}", damage.key, damage.reason);
        for image in &damage.images {
            println!("  needed by {image}");
        }
        let state = match (damage.repaired, repair) {
            (true, _) => "repaired",
            (false, true) => "left",
            (false, false) => "with --repair",
        };
        println!("  {state}: {}", damage.remedy);
    }
    println!("{blobs} blobs, {manifests} manifests and {records} records, {} hashed", mib(*bytes));
    println!("{garbage_blobs} blobs of {} are garbage: `lamina gc` collects them", mib(*garbage_bytes));
    match (damaged.len(), report.left()) {
        (0, _) => println!("nothing is damaged"),
        (all, left) => println!("{all} damaged, {left} of them left"),
    }
}
