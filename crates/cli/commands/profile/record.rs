//! `lamina profile record`: one start of a command, recorded page by page.
//!
//! The image is mounted at a temporary directory, and the command runs in it with everything writable (see `inside.rs`).
//! Whatever way this ends short of a kill, the mount goes; what is mounted on top of it goes with the command.

mod inside;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use anyhow::{Context, Result, bail};
use lamina_image::{CommandKey, Document, MANIFEST_BYTES_MAX, PAGE_BYTES, parse_config};
use lamina_node::Controller;
use lamina_wire::proto::{MountRequest, UnmountRequest, UnmountResponse};
use tokio::task::JoinHandle;

use self::inside::{Inside, start};
use super::Image;
use crate::args::{Common, ProfileRecord};
use crate::commands::mount::{make_cache, mount};
use crate::commands::{Ended, Interrupted, interrupted, mib};

/// What shells add to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;

/// Runs the command and says how much was recorded. *Errors*: also [`Ended`], where the command fails.
pub(super) async fn run(arguments: ProfileRecord, common: &Common) -> Result<()> {
    let reference = &arguments.reference;
    let image = Image::find(reference, common).await?;
    let process = process(&image).await?;
    make_cache(&arguments.cache)?;
    let directory = tempfile::Builder::new().prefix("lamina-record-").tempdir()?;
    let path = directory.path().canonicalize()?;
    let inside = Inside {
        directory: path.clone(),
        command: arguments.command.clone(),
        environment: process.env,
        working_directory: process.working_dir,
    };
    let key = arguments.key.clone().or_else(|| CommandKey::of(&arguments.command)).context("a command")?;
    let mount_point = inside.image();
    std::fs::create_dir(&mount_point)?;
    let request = MountRequest {
        reference: reference.to_string(),
        directory: mount_point.to_str().context("the temporary directory's name must be UTF-8")?.to_owned(),
        plain_http: common.plain_http,
        require_bound: arguments.require_bound,
        record: true,
        command: key.to_string(),
        ..MountRequest::default()
    };
    // from here on Ctrl-C is only a wish, so that the mount goes
    let stop = tokio::spawn(interrupted());
    mount(&request, &arguments.cache, &arguments.settings, common).await?;
    let ended = follow(inside, stop).await;
    let unmounted = unmount(&arguments.cache.directory, request.directory).await;
    let ended = ended?;
    let Some(recorded) = unmounted? else {
        bail!("{reference}: the command has left processes behind, so its recording has no end and is lost");
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
    match code(ended) {
        0 => Ok(()),
        code => bail!(Ended(code)),
    }
}

/// How the image wants its programs run.
async fn process(image: &Image<'_>) -> Result<lamina_image::Process> {
    let Document::Manifest(manifest) = &image.document else {
        bail!("{} has no image for this machine", image.reference);
    };
    if !manifest.is_image() {
        bail!("{} is an artifact of type {}", image.reference, manifest.config.media_type);
    }
    let max = MANIFEST_BYTES_MAX as u64;
    let bytes = image.client.blob(image.repository(), manifest.config.digest, max).await?;
    let config =
        parse_config(manifest, &bytes).with_context(|| format!("{}: its config", image.reference))?;
    Ok(config.config.unwrap_or_default())
}

/// Runs the command to its end, or to ours.
async fn follow(inside: Inside, stop: JoinHandle<()>) -> Result<ExitStatus> {
    if stop.is_finished() {
        bail!(Interrupted);
    }
    let mut child = start(inside).await?;
    tokio::select! {
        status = child.wait() => Ok(status?),
        _ = stop => {
            child.kill().await?;
            bail!(Interrupted)
        }
    }
}

/// Takes the mount away and gives what was recorded on it. Nothing if that had to be lazily, from processes that the
/// command has left behind.
async fn unmount(cache: &Path, directory: String) -> Result<Option<UnmountResponse>> {
    let controller = Controller::new(cache);
    let request = UnmountRequest { directory, lazy: false };
    if let Ok(recorded) = controller.unmount(&request).await {
        return Ok(Some(recorded));
    }
    controller.unmount(&UnmountRequest { lazy: true, ..request }).await?;
    Ok(None)
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(SIGNALLED + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
