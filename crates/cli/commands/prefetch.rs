//! `lamina prefetch`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lamina_node::{ControlError, Controller};
use lamina_wire::proto::{FillRequest, FillStats, PrefetchRequest};

use super::mount::{asked, make_cache};
use super::{Interrupted, interrupted};
use crate::args::{Common, PrefetchArguments};

/// How often is looked how far a job is.
const LOOK: Duration = Duration::from_millis(200);

/// A job is begun again by so many daemons, one after the other: more of them hardly die by chance.
const BEGUN_MAX: u32 = 8;

/// Brings an image into the cache, or pauses whatever fills it.
pub(crate) async fn run(arguments: PrefetchArguments, common: Common) -> Result<()> {
    let controller = Controller::new(&arguments.cache.directory);
    let Some(reference) = &arguments.reference else {
        let action = if arguments.pause { "pause" } else { "resume" };
        controller.fill(&FillRequest { action: action.to_owned(), job: 0 }).await?;
        return Ok(());
    };
    make_cache(&arguments.cache)?;
    let request = PrefetchRequest {
        reference: reference.to_string(),
        plain_http: common.plain_http,
        bytes_per_s: arguments.fill_rate.unwrap_or(0) << 20,
        idle: arguments.idle,
    };
    let (cache, settings) = (&arguments.cache, &arguments.settings);
    let mut begun = 0;
    let (began, done) = loop {
        let began =
            asked(cache, settings, &common, async |controller| controller.prefetch(&request).await).await?;
        begun += 1;
        let done = tokio::select! {
            done = filled(&controller, Some(began.pid), |fill| fill.job == began.job) => done,
            () = interrupted() => {
                controller.fill(&FillRequest { action: "cancel".to_owned(), job: began.job }).await?;
                return Err(Interrupted.into());
            }
        };
        match done {
            // another daemon has what came, and goes on from there
            Err(error) if error.is::<Gone>() && begun < BEGUN_MAX => {}
            done => break (began, done?),
        }
    };
    match arguments.json {
        true => println!(
            "{}",
            serde_json::json!({
                "reference": reference.to_string(),
                "manifest": began.manifest,
                "bytes": done.total_bytes,
            })
        ),
        false => println!("{}", began.manifest),
    }
    Ok(())
}

/// The daemon that had the job has ended.
#[derive(Debug, thiserror::Error)]
#[error("the node that was filling the cache has ended; the same command goes on from there")]
struct Gone;

/// Waits until a job of the node is done; with `pid`, of no other process.
pub(crate) async fn filled(
    controller: &Controller,
    pid: Option<u32>,
    which: impl Fn(&FillStats) -> bool,
) -> Result<FillStats> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bytes} of {total_bytes} {wide_bar} {bytes_per_sec} {msg}");
    bar.set_style(style.expect("the template is right"));
    let mut unheard = 0;
    loop {
        let stats = match (controller.stats().await, pid) {
            (Ok(stats), _) => stats,
            (Err(_), Some(_)) => bail!(Gone),
            // one that was killed has a successor, which knows the mount
            (Err(ControlError::Broken { .. }), None) if unheard < BEGUN_MAX => {
                unheard += 1;
                tokio::time::sleep(LOOK).await;
                continue;
            }
            (Err(error), None) => return Err(error.into()),
        };
        if pid.is_some_and(|pid| pid != stats.pid) {
            bail!(Gone);
        }
        // the newest job of a mount is the one that is meant
        let fill = stats
            .fills
            .into_iter()
            .rev()
            .find(|fill| which(fill))
            .context("the node has forgotten the job")?;
        bar.set_length(fill.total_bytes);
        bar.set_position(fill.done_bytes);
        match fill.state.as_str() {
            "done" => {
                bar.finish_and_clear();
                return Ok(fill);
            }
            "failed" => bail!("{}: {}", fill.reference, fill.reason),
            "cancelled" => bail!("{}: cancelled", fill.reference),
            _ if stats.fills_paused => bar.set_message("paused"),
            "waiting" => bar.set_message(fill.reason),
            _ => bar.set_message(""),
        }
        tokio::time::sleep(LOOK).await;
    }
}
