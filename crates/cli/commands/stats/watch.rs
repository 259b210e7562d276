//! `lamina stats --watch`: the counters as rates, drawn anew every second.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use anyhow::Result;
use lamina_node::Controller;
use lamina_wire::proto::StatsResponse;

use crate::commands::{interrupted, mib};

type Counters = HashMap<String, u64>;

/// Draws until Ctrl-C. Where stdout is no terminal each picture follows the last one.
pub(super) async fn run(controller: &Controller, every: Duration) -> Result<()> {
    let screen = Screen::open();
    let mut before = controller.stats().await?;
    let mut at = Instant::now();
    let mut ended = std::pin::pin!(interrupted());
    loop {
        tokio::select! {
            () = &mut ended => return Ok(()),
            () = tokio::time::sleep(every) => {}
        }
        let now = controller.stats().await?;
        screen.show(&picture(&before, &now, at.elapsed()))?;
        (before, at) = (now, Instant::now());
    }
}

/// A terminal's other screen, given back when dropped.
struct Screen(bool);

impl Screen {
    fn open() -> Self {
        let terminal = std::io::stdout().is_terminal();
        if terminal {
            // the other screen, without a cursor
            print!("\x1b[?1049h\x1b[?25l");
        }
        Self(terminal)
    }

    fn show(&self, text: &str) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        if self.0 {
            // to the top; each line clears what was behind it, and the end what was below
            write!(stdout, "\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\r\n"))?;
        } else {
            writeln!(stdout, "{text}")?;
        }
        stdout.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.0 {
            print!("\x1b[?25h\x1b[?1049l");
            let _ = std::io::stdout().flush();
        }
    }
}

/// What was counted in between, and what is now.
struct Between<'a> {
    before: Option<&'a Counters>,
    now: &'a Counters,
    seconds: f64,
}

impl Between<'_> {
    fn value(&self, name: &str) -> u64 {
        self.now.get(name).copied().unwrap_or(0)
    }

    fn grown(&self, name: &str) -> u64 {
        let before = self.before.and_then(|before| before.get(name)).copied().unwrap_or(0);
        self.value(name).saturating_sub(before)
    }

    fn rate(&self, name: &str) -> f64 {
        self.grown(name) as f64 / self.seconds
    }

    fn mib_rate(&self, name: &str) -> f64 {
        self.rate(name) / f64::from(1 << 20)
    }
}

fn picture(before: &StatsResponse, now: &StatsResponse, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64().max(0.001);
    let cache = Between { before: Some(&before.cache), now: &now.cache, seconds };
    let mut text = format!("node {} · {} mounts\n\n", now.pid, now.mounts.len());
    cache_lines(&mut text, &cache);
    text.push('\n');
    for source in &now.sources {
        let old = before.sources.iter().find(|old| old.url == source.url).map(|old| &old.counters);
        let of = Between { before: old, now: &source.counters, seconds };
        let away = match source.away_ms {
            0 => String::new(),
            ms => format!(" for {} s: {}", ms / 1000, source.reason),
        };
        let (requests, rate) = (of.rate("requests"), of.mib_rate("received_bytes"));
        let (failures, hedges) = (of.value("failures"), of.value("hedges"));
        let _ = writeln!(
            text,
            "source   {:<32} {:<7} {requests:7.1}/s {rate:8.2} MiB/s  {failures} failures  {hedges} hedges{away}",
            source.url, source.state
        );
    }
    text.push('\n');
    for mount in &now.mounts {
        let old = before.mounts.iter().find(|old| old.directory == mount.directory);
        let of = Between { before: old.map(|old| &old.counters), now: &mount.counters, seconds };
        let (reads, rate, waited) = (of.rate("reads"), of.mib_rate("read_bytes"), of.rate("reads_waited"));
        let failed = of.value("reads_failed");
        let _ = writeln!(
            text,
            "mount    {:<32} {reads:8.1} reads/s {rate:8.2} MiB/s  {waited:.1}/s waited  {failed} failed  {}",
            mount.directory, mount.reference
        );
    }
    text
}

fn cache_lines(text: &mut String, cache: &Between<'_>) {
    let (used, most) = (cache.value("disk_used_bytes"), cache.value("disk_max_bytes"));
    let part = (used * 100).checked_div(most).unwrap_or(0);
    let (evicted, kept) = (mib(cache.value("evicted_bytes")), cache.value("kept_frames"));
    let _ = writeln!(
        text,
        "cache    {} of {} ({part} %)  evicted {evicted}, {kept} frames kept  pinned {}",
        mib(used),
        mib(most),
        mib(cache.value("pinned_bytes")),
    );
    let tiers = ["memory_frames", "disk_frames", "waits"].map(|name| cache.rate(name));
    let all: f64 = tiers.iter().sum();
    let hits = if all > 0.0 { format!("{:.1} %", (1.0 - tiers[2] / all) * 100.0) } else { "–".into() };
    let _ = writeln!(
        text,
        "frames   memory {:.1}/s  disk {:.1}/s  waited for {:.1}/s  hits {hits}",
        tiers[0], tiers[1], tiers[2]
    );
    let _ = writeln!(
        text,
        "network  {:.2} MiB/s  {:.1} requests/s  {} failures",
        cache.mib_rate("source_bytes"),
        cache.rate("source_requests"),
        cache.value("source_failures"),
    );
    let mean_us = cache.grown("wait_us_total").checked_div(cache.grown("waits")).unwrap_or(0);
    let _ = writeln!(
        text,
        "waiting  {} readers now  mean {:.1} ms  longest so far {:.1} ms",
        cache.value("waiting"),
        mean_us as f64 / 1000.0,
        cache.value("wait_us_max") as f64 / 1000.0,
    );
    let _ = writeln!(
        text,
        "trouble  {} frames did not verify  {} failures of the disk  {} frames not kept",
        cache.value("verify_failures"),
        cache.value("disk_failures"),
        cache.value("write_dropped"),
    );
}

#[cfg(test)]
mod tests {
    use lamina_wire::proto::{MountStats, SourceStats};

    use super::*;

    fn counters(values: &[(&str, u64)]) -> Counters {
        values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn counters_become_rates_and_states_stay() {
        let stats = |reads: u64| StatsResponse {
            pid: 7,
            cache: counters(&[
                ("memory_frames", reads * 3),
                ("waits", reads),
                ("waiting", 2),
                ("disk_used_bytes", 1 << 20),
                ("disk_max_bytes", 4 << 20),
            ]),
            sources: vec![SourceStats {
                url: "http://r".into(),
                state: "away".into(),
                reason: "it is off".into(),
                away_ms: 3000,
                counters: counters(&[("requests", reads)]),
            }],
            version: String::new(),
            mounts: vec![MountStats {
                restored: String::new(),
                directory: "/m".into(),
                reference: "r/a:t".into(),
                manifest: String::new(),
                counters: counters(&[("reads", reads)]),
                ..MountStats::default()
            }],
            ..StatsResponse::default()
        };
        let text = picture(&stats(100), &stats(120), Duration::from_secs(2));
        for part in
            ["(25 %)", "memory 30.0/s", "hits 75.0 %", "2 readers now", "for 3 s: it is off", "10.0 reads/s"]
        {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }
}
