//! `lamina profile record`: one start of a command, recorded page by page.
//!
//! The image is mounted at a temporary directory, and the command runs in it with everything writable (see `inside.rs`).
//! Whatever way this ends, the mount goes; what is mounted on top of it goes with the command.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use lamina_image::{CommandKey, PAGE_BYTES};
use lamina_node::Controller;
use lamina_wire::proto::{MountRequest, UnmountRequest, UnmountResponse};
use tokio::task::JoinHandle;

use super::Image;
use crate::args::{Common, ProfileRecord};
use crate::commands::inside::{Changes, Plan, Running, Unstarted};
use crate::commands::mount::{make_cache, mount};
use crate::commands::{Ended, Interrupted, interrupted, mib};

/// Runs the command and says how much was recorded. *Errors*: also [`Ended`], where the command fails.
pub(super) async fn run(arguments: ProfileRecord, common: &Common) -> Result<()> {
    let reference = &arguments.reference;
    let image = Image::find(reference, common).await?;
    let process = image.process().await?;
    make_cache(&arguments.cache)?;
    let directory = tempfile::Builder::new().prefix("lamina-record-").tempdir()?;
    let plan = Plan {
        directory: directory.path().canonicalize()?,
        changes: Changes::Memory,
        volumes: Vec::new(),
        command: arguments.command.clone(),
        environment: process.env,
        working_directory: process.working_dir,
        user: String::new(),
        terminal: false,
    };
    let key = arguments.key.clone().or_else(|| CommandKey::of(&arguments.command)).context("a command")?;
    let mount_point = plan.image();
    std::fs::create_dir(&mount_point)?;
    let request = MountRequest {
        reference: reference.to_string(),
        directory: mount_point.to_str().context("the temporary directory's name must be UTF-8")?.to_owned(),
        plain_http: common.plain_http,
        require_bound: arguments.require_bound,
        record: true,
        command: key.to_string(),
        owner: std::process::id(),
        ..MountRequest::default()
    };
    // from here on Ctrl-C is only a wish, so that the mount goes
    let stop = tokio::spawn(interrupted());
    mount(&request, &arguments.cache, &arguments.settings, common).await?;
    let ended = follow(plan, stop).await;
    let unmounted = unmount(&arguments.cache.directory, request.directory).await;
    let ended = ended?;
    let Some(recorded) = unmounted? else {
        bail!(
            "{reference}: somebody else uses the image where it is mounted, so its recording has no end and is lost"
        );
    };
    let (names, pages) = (recorded.trace_names, recorded.trace_pages);
    if !recorded.trace_refused.is_empty() && !recorded.trace_kept {
        bail!(
            "{reference}: {names} names and {pages} pages were recorded in vain: {}",
            recorded.trace_refused
        );
    }
    // the command has stdout for itself
    eprintln!("recorded {names} names and {pages} pages ({}) for {key}", mib(pages * PAGE_BYTES));
    if recorded.trace_kept {
        eprintln!("{}; `lamina profile push {reference}` makes the profile", recorded.trace_refused);
    }
    match ended {
        0 => Ok(()),
        code => bail!(Ended(code)),
    }
}

/// Runs the command to its end, or to ours. Its exit code.
async fn follow(plan: Plan, stop: JoinHandle<()>) -> Result<u8> {
    if stop.is_finished() {
        bail!(Interrupted);
    }
    let mut running = Running::start(plan).await?;
    let ended = async {
        running.started().await?;
        running.ended().await
    };
    let ended = tokio::select! {
        ended = ended => ended,
        _ = stop => Err(Interrupted.into()),
    };
    if ended.is_err() {
        running.kill().await;
    }
    // a recording is no start: what docker has exit codes for is a failure like any other here
    ended.map_err(|error| error.downcast::<Unstarted>().map_or_else(|error| error, |it| anyhow!(it.message)))
}

/// Takes the mount away and gives what was recorded on it. Nothing if that had to be lazily, from somebody who looks into it.
async fn unmount(cache: &Path, directory: String) -> Result<Option<UnmountResponse>> {
    let controller = Controller::new(cache);
    let request = UnmountRequest { directory, lazy: false };
    if let Ok(recorded) = controller.unmount(&request).await {
        return Ok(Some(recorded));
    }
    controller.unmount(&UnmountRequest { lazy: true, ..request }).await?;
    Ok(None)
}
