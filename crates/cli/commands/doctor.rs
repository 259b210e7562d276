//! `lamina doctor`: what this machine has and lacks, each line ok or what to do.

mod calls;
mod machine;
mod registry;

use anyhow::{Result, bail};
use lamina_node::Controller;

use super::client_config;
use crate::args::{Common, DoctorArguments};

/// One line of the report.
pub(crate) struct Check {
    /// What was looked at.
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do. Empty where it is ok.
    advice: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// It works, and less well than it could.
    Poor,
    /// It does not work.
    Bad,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), advice: String::new() }
    }

    fn poor(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Poor, found: found.into(), advice: advice.into() }
    }

    fn bad(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Bad, found: found.into(), advice: advice.into() }
    }
}

/// Looks at everything, prints it, and fails where something does not work.
pub(crate) async fn run(arguments: DoctorArguments, common: Common) -> Result<()> {
    let mut checks = machine::checks();
    checks.push(calls::check());
    let cache = arguments.cache.directory.clone();
    let bytes_max = arguments.cache_mib << 20;
    checks.extend(tokio::task::spawn_blocking(move || machine::cache(&cache, bytes_max)).await?);
    let node = Controller::new(&arguments.cache.directory).stats().await;
    let mut registries = arguments.registries.clone();
    match &node {
        Ok(stats) => {
            let mounts = stats.mounts.len();
            checks.push(Check::ok("node", format!("process {} serves {mounts} mounts", stats.pid)));
            if registries.is_empty() {
                let hosts = stats.sources.iter().filter_map(|source| source.url.split("://").nth(1));
                registries.extend(hosts.map(str::to_owned));
            }
        }
        Err(lamina_node::ControlError::NoDaemon(_)) => {
            checks.push(Check::ok("node", "none runs for this cache; `lamina mount` starts one"));
        }
        Err(error) => checks.push(Check::bad("node", error.to_string(), "end it, and mount again")),
    }
    for name in &registries {
        checks.extend(registry::checks(name, client_config(&common)?).await);
    }
    print(&checks, arguments.json);
    let bad = checks.iter().filter(|check| check.verdict == Verdict::Bad).count();
    match bad {
        0 => Ok(()),
        1 => bail!("one thing does not work"),
        _ => bail!("{bad} things do not work"),
    }
}

fn print(checks: &[Check], json: bool) {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Poor => "poor",
        Verdict::Bad => "bad",
    };
    if json {
        let all: Vec<_> = checks
            .iter()
            .map(|check| {
                let advice = Some(&check.advice).filter(|advice| !advice.is_empty());
                serde_json::json!({
                    "check": check.name,
                    "verdict": word(check.verdict),
                    "found": check.found,
                    "advice": advice,
                })
            })
            .collect();
        println!("{}", serde_json::json!({ "checks": all }));
        return;
    }
    for check in checks {
        println!("{:<5} {:<14} {}", word(check.verdict), check.name, check.found);
        if !check.advice.is_empty() {
            println!("{:<5} {:<14} → {}", "", "", check.advice);
        }
    }
}
