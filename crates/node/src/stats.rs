//! What a node says of itself.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use lamina_wire::proto::{MountStats, SourceStats, StatsResponse};
use tokio::task::spawn_blocking;

use crate::Node;
use crate::sources::State;

impl Node {
    /// The counters of each mount.
    pub(crate) fn mount_counters(&self) -> Vec<Vec<(&'static str, u64)>> {
        self.mounts.lock().values().map(|mounted| mounted.mount.snapshot().named()).collect()
    }

    /// All counters, and what became of the pages that the boot pack of the mount at `directory` stored, where there is one.
    pub async fn stats(&self, directory: &Path) -> StatsResponse {
        let looked_at = self.mounts.lock().get(directory).map(|mounted| Arc::clone(&mounted.mount));
        let used = match looked_at {
            Some(mount) => spawn_blocking(move || mount.boot_use()).await.expect("the work does not panic"),
            None => Ok(None),
        };
        let mut stats = self.counted();
        let directory = directory.display().to_string();
        let asked = stats.mounts.iter_mut().find(|mount| mount.directory == directory);
        match (asked, used) {
            (Some(mount), Ok(Some(used))) => mount.counters.extend(named(used.named())),
            (Some(mount), Ok(None)) if !mount.boot.is_empty() => {
                mount.boot_unseen = "not all of it has come, or not to this process".to_owned();
            }
            (Some(mount), Err(error)) => mount.boot_unseen = error.to_string(),
            _ => {}
        }
        stats
    }

    fn counted(&self) -> StatsResponse {
        let mounts = self.mounts.lock();
        let mounts = mounts.iter().map(|(directory, mounted)| MountStats {
            directory: directory.display().to_string(),
            reference: mounted.record.image.clone().unwrap_or_default().reference,
            manifest: mounted.record.image.clone().unwrap_or_default().manifest,
            restored: mounted.restored.to_owned(),
            command: mounted.record.request.clone().unwrap_or_default().command,
            boot: mounted.chosen.get().map_or_else(String::new, |chosen| chosen.pack.blob.to_string()),
            boot_own: mounted.chosen.get().is_some_and(|chosen| chosen.own),
            boot_unseen: String::new(),
            counters: named(mounted.mount.snapshot().named()),
        });
        let mounts = mounts.collect();
        let sources = self.hosts.all().into_iter().map(|(url, host)| {
            let (state, reason, away_ms) = match host.state() {
                State::Here => ("here", String::new(), 0),
                State::Doubted => ("doubted", String::new(), 0),
                State::Away(since, reason) => ("away", reason, since.elapsed().as_millis()),
            };
            let away_ms = u64::try_from(away_ms).unwrap_or(u64::MAX);
            SourceStats {
                url,
                state: state.to_owned(),
                reason,
                away_ms,
                counters: named(host.counters.named()),
            }
        });
        let cache = named(self.cache.snapshot().named());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (fills, fills_paused) = (self.fills.stats(), self.fills.is_paused());
        let (pid, sources) = (std::process::id(), sources.collect());
        StatsResponse { pid, cache, mounts, sources, fills, fills_paused, version }
    }
}

/// Counters as they are sent.
fn named(counters: impl IntoIterator<Item = (&'static str, u64)>) -> HashMap<String, u64> {
    counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
