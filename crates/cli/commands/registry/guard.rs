//! The table `[access]` of the configuration file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lamina_registry::{Access, AccessConfig, Action, DedupScope, Rule, Users, Who};
use serde::Deserialize;

/// A token is good for five minutes: long enough for the requests of a pull, short enough for a right that is taken away.
const TOKEN_SECONDS: u64 = 300;
/// A day: whoever holds a token keeps its rights until it ends.
const TOKEN_SECONDS_MAX: u64 = 24 * 3600;
/// A key that is shorter can be guessed (RFC 7518, 3.2).
const KEY_BYTES_MIN: usize = 32;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Table {
    /// The htpasswd file.
    users: PathBuf,
    /// Whether nobody in particular may read everything.
    #[serde(default)]
    anonymous_pull: bool,
    deduplication: Option<String>,
    token_seconds: Option<u64>,
    token_key_file: Option<PathBuf>,
    external_url: Option<String>,
    #[serde(default)]
    rules: Vec<RuleTable>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RuleTable {
    repositories: Vec<String>,
    users: Vec<String>,
    allow: Vec<String>,
}

/// Reads what guards the registry. Paths are relative to the file that the table is in.
pub(super) fn read(file: &Path, table: toml::Table, has_tls: bool) -> Result<Arc<Access>> {
    let named = || format!("{}: [access]", file.display());
    // its own message ends with empty lines
    let table: Table =
        table.try_into().map_err(|error| anyhow!("{}: {}", named(), error.to_string().trim()))?;
    let directory = file.parent().unwrap_or(Path::new("."));
    let mut rules = Vec::new();
    for rule in &table.rules {
        rules.push(parse(rule).with_context(named)?);
    }
    if table.anonymous_pull {
        let everywhere = ["**".to_owned()];
        if rules.is_empty() {
            let all = vec![Action::Pull, Action::Push, Action::Delete];
            rules.push(Rule::new(&everywhere, vec![Who::Users], all)?);
        }
        rules.push(Rule::new(&everywhere, vec![Who::Anonymous], vec![Action::Pull])?);
    }
    let dedup = table.deduplication.as_deref().map(str::parse::<DedupScope>).transpose();
    let dedup = dedup.with_context(named)?.unwrap_or_default();
    let seconds = table.token_seconds.unwrap_or(TOKEN_SECONDS);
    ensure!(
        (1..=TOKEN_SECONDS_MAX).contains(&seconds),
        "{}: token-seconds must be from 1 to {TOKEN_SECONDS_MAX}",
        named()
    );
    let token_key = match &table.token_key_file {
        Some(path) => {
            let path = directory.join(path);
            let key = std::fs::read(&path).with_context(|| path.display().to_string())?;
            ensure!(
                key.len() >= KEY_BYTES_MIN,
                "{}: a key has at least {KEY_BYTES_MIN} bytes",
                path.display()
            );
            key
        }
        None => random_key(),
    };
    // behind a proxy the Host header says what clients asked for, but not whether by TLS
    let external_url = table.external_url.map(|url| url.trim_end_matches('/').to_owned());
    if let Some(url) = &external_url {
        ensure!(
            (url.starts_with("http://") || url.starts_with("https://")) && !url.contains(['"', ' ', '\\']),
            "{}: external-url must be http[s]://host[:port]",
            named()
        );
    }
    Ok(Arc::new(Access::new(AccessConfig {
        users: Users::open(directory.join(&table.users)).with_context(named)?,
        rules,
        dedup,
        token_lifetime: Duration::from_secs(seconds),
        token_key,
        external_url,
        is_secure: has_tls,
    })))
}

fn parse(rule: &RuleTable) -> Result<Rule> {
    let who = rule.users.iter().map(|user| match user.as_str() {
        "anonymous" => Who::Anonymous,
        "*" => Who::Users,
        name => Who::User(name.to_owned()),
    });
    let actions = rule.allow.iter().map(|action| action.parse()).collect::<Result<Vec<Action>, _>>()?;
    Ok(Rule::new(&rule.repositories, who.collect(), actions)?)
}

/// 366 bits from the system; tokens are good until this process ends.
fn random_key() -> Vec<u8> {
    (0..3).flat_map(|_| *uuid::Uuid::new_v4().as_bytes()).collect()
}
