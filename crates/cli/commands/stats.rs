//! `lamina stats`.

mod watch;

use std::time::Duration;

use anyhow::{Result, ensure};
use lamina_node::Controller;
use lamina_wire::proto::StatsResponse;

use super::mib;
use super::mount::mountpoint;
use crate::args::StatsArguments;

/// Prints the counters of a daemon and of its mounts.
pub(crate) async fn run(arguments: StatsArguments) -> Result<()> {
    let controller = Controller::new(&arguments.cache.directory);
    if arguments.watch {
        return watch::run(&controller, Duration::from_secs(arguments.interval)).await;
    }
    let wanted = arguments.directory.as_deref().map(mountpoint).transpose()?;
    let wanted = wanted.map(|directory| directory.display().to_string());
    let mut stats = controller.mount_stats(wanted.as_deref().unwrap_or_default()).await?;
    if let Some(wanted) = wanted {
        stats.mounts.retain(|mount| mount.directory == wanted);
        ensure!(!stats.mounts.is_empty(), "{wanted}: nothing of this cache's node is mounted there");
    }
    if arguments.json {
        println!("{}", json(&stats));
        return Ok(());
    }
    println!("node {}", stats.pid);
    print_counters(&stats.cache);
    for source in &stats.sources {
        let away = match source.away_ms {
            0 => String::new(),
            ms => format!(" for {}.{} s: {}", ms / 1000, ms / 100 % 10, source.reason),
        };
        println!("\n{} {}{away}", source.url, source.state);
        print_counters(&source.counters);
    }
    for fill in stats.fills.iter().filter(|fill| fill.state != "done") {
        let (done, total, paused) = (mib(fill.done_bytes), mib(fill.total_bytes), stats.fills_paused);
        let state = if paused { "paused" } else { &fill.state };
        println!(
            "\nfilling {} {state}: {done} of {total} {} {}",
            fill.reference, fill.directory, fill.reason
        );
    }
    for mount in &stats.mounts {
        let restored =
            if mount.restored.is_empty() { String::new() } else { format!(", {}", mount.restored) };
        println!("\n{} at {}{restored}", mount.reference, mount.directory);
        if !mount.command.is_empty() {
            println!("  {:28} {}", "command", mount.command);
        }
        if !mount.boot.is_empty() {
            let of = if mount.boot_own { "of the command" } else { "of all starts" };
            println!("  {:28} {}, {of}", "boot pack", mount.boot);
        }
        print_counters(&mount.counters);
        if !mount.boot_unseen.is_empty() {
            println!("  {:28} not seen: {}", "pages used", mount.boot_unseen);
        }
    }
    Ok(())
}

fn json(stats: &StatsResponse) -> serde_json::Value {
    let mounts = stats.mounts.iter().map(|mount| {
        serde_json::json!({
            "directory": mount.directory,
            "reference": mount.reference,
            "manifest": mount.manifest,
            "counters": mount.counters,
            "command": Some(&mount.command).filter(|command| !command.is_empty()),
            "boot": Some(&mount.boot).filter(|boot| !boot.is_empty()),
            "boot_own": mount.boot_own,
            "boot_unseen": Some(&mount.boot_unseen).filter(|reason| !reason.is_empty()),
            "restored": Some(&mount.restored).filter(|how| !how.is_empty()),
        })
    });
    let sources = stats.sources.iter().map(|source| {
        serde_json::json!({
            "url": source.url,
            "state": source.state,
            "reason": source.reason,
            "away_ms": source.away_ms,
            "counters": source.counters,
        })
    });
    let fills = stats.fills.iter().map(|fill| {
        serde_json::json!({
            "job": fill.job,
            "reference": fill.reference,
            "directory": Some(&fill.directory).filter(|directory| !directory.is_empty()),
            "total_bytes": fill.total_bytes,
            "done_bytes": fill.done_bytes,
            "state": fill.state,
            "reason": fill.reason,
        })
    });
    serde_json::json!({
        "pid": stats.pid,
        "cache": stats.cache,
        "sources": sources.collect::<Vec<_>>(),
        "fills": fills.collect::<Vec<_>>(),
        "fills_paused": stats.fills_paused,
        "mounts": mounts.collect::<Vec<_>>(),
    })
}

fn print_counters(counters: &std::collections::HashMap<String, u64>) {
    let mut sorted: Vec<_> = counters.iter().filter(|(_, value)| **value > 0).collect();
    sorted.sort();
    for (name, value) in sorted {
        match name.ends_with("_bytes") {
            true => println!("  {name:28} {}", mib(*value)),
            false => println!("  {name:28} {value}"),
        }
    }
}
