//! What a node says of itself.

use lamina_wire::proto::{MountStats, SourceStats, StatsResponse};

use crate::Node;
use crate::sources::State;

impl Node {
    /// The counters of each mount.
    pub(crate) fn mount_counters(&self) -> Vec<Vec<(&'static str, u64)>> {
        self.mounts.lock().values().map(|mounted| mounted.mount.snapshot().named()).collect()
    }

    /// All counters.
    pub fn stats(&self) -> StatsResponse {
        let named = |counters: Vec<(&'static str, u64)>| {
            counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let mounts = self.mounts.lock();
        let mounts = mounts.iter().map(|(directory, mounted)| MountStats {
            directory: directory.display().to_string(),
            reference: mounted.record.image.clone().unwrap_or_default().reference,
            manifest: mounted.record.image.clone().unwrap_or_default().manifest,
            restored: mounted.restored.to_owned(),
            command: mounted.record.request.clone().unwrap_or_default().command,
            boot: mounted.chosen.get().map_or_else(String::new, |chosen| chosen.pack.blob.to_string()),
            boot_own: mounted.chosen.get().is_some_and(|chosen| chosen.own),
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
