//! `lamina run`: a program from an image that has not arrived, in one command.
//!
//! The image is mounted in a scratch directory below the cache, by the daemon of the cache, which takes the mount away where this
//! process dies (`MountRequest::owner`); the program runs on it as `inside.rs` has it, and dies with this process. So of a run that
//! was killed nothing stays but its scratch directory, which the next run removes, and with it whatever its daemon may have left.

mod process;
mod scratch;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use lamina_image::{CommandKey, Process};
use lamina_node::Controller;
use lamina_wire::proto::{MountRequest, ProcessRequest, ProcessResponse, UnmountRequest};
use lamina_wire::{Reference, Version};
use rustix::process::{Signal, getpgrp};
use rustix::termios::tcgetpgrp;

use self::scratch::Scratch;
use super::inside::{Changes, Plan, Running, Volume};
use super::mount::{asked, make_cache, mount, report_offline};
use super::signals::Signals;
use super::{Ended, Interrupted};
use crate::args::{Common, RunArguments};

/// Runs the program. *Errors*: [`Ended`], with its exit code.
pub(crate) async fn run(arguments: RunArguments, common: Common) -> Result<()> {
    let mut signals = Signals::new()?;
    make_cache(&arguments.cache)?;
    let known = tokio::select! {
        known = find(&arguments.reference, &arguments, &common) => known?,
        _ = signals.next() => bail!(Interrupted),
    };
    let cache = arguments.cache.directory.canonicalize()?;
    let (scratch, dead) = tokio::task::spawn_blocking(move || Scratch::create(&cache)).await??;
    // nobody waits for what others have left before the program runs
    let tidied = tokio::task::spawn_blocking(move || dead.remove());
    let plan = plan(&arguments, known.process, scratch.path().to_owned())?;
    let key = arguments.key.clone().or_else(|| CommandKey::of(&plan.command)).context("a command")?;
    let request = MountRequest {
        reference: arguments.reference.to_string(),
        directory: plan.image().to_str().context("the cache directory's name must be UTF-8")?.to_owned(),
        plain_http: common.plain_http,
        require_bound: arguments.require_bound,
        command: key.to_string(),
        owner: std::process::id(),
        passthrough: arguments.passthrough,
        ..MountRequest::default()
    };
    let ended = async {
        let plan = tokio::select! {
            plan = mounted(&arguments, &common, &request, &known.manifest, plan) => plan?,
            _ = signals.next() => bail!(Interrupted),
        };
        follow(plan, &mut signals).await
    };
    let ended = ended.await;
    unmount(&arguments, request.directory).await;
    tokio::task::spawn_blocking(move || scratch.remove()).await?;
    tidied.await?;
    match ended? {
        0 => Ok(()),
        code => bail!(Ended(code)),
    }
}

/// Mounts the image. What is to run there, `plan` where the mounted image is the one that it was made for.
async fn mounted(
    arguments: &RunArguments,
    common: &Common,
    request: &MountRequest,
    planned: &str,
    plan: Plan,
) -> Result<Plan> {
    let reference = &arguments.reference;
    let mounted = mount(request, &arguments.cache, &arguments.settings, common).await?;
    report_offline(reference, &mounted);
    if mounted.manifest == planned {
        return Ok(plan);
    }
    // the tag was moved since, or the node last knew it as something else
    let pinned = Reference { version: Version::Digest(mounted.manifest.parse()?), ..reference.clone() };
    let known = find(&pinned, arguments, common).await;
    let known = known.with_context(|| format!("how {pinned}, which was mounted, is to be run"))?;
    self::plan(arguments, known.process, plan.directory)
}

/// An image, and what it wants its programs to be.
struct Known {
    /// The digest of its manifest.
    manifest: String,
    process: Process,
}

/// What an image wants its programs to be, as the node says, which asks mirrors as well: what it was when last asked, where nobody
/// answers.
async fn find(reference: &Reference, arguments: &RunArguments, common: &Common) -> Result<Known> {
    let request = ProcessRequest { reference: reference.to_string(), plain_http: common.plain_http };
    let ask = async |controller: &Controller| controller.process(&request).await;
    let answer = asked(&arguments.cache, &arguments.settings, common, ask).await?;
    let ProcessResponse { manifest, env, entrypoint, cmd, working_dir, user } = answer;
    Ok(Known { manifest, process: Process { env, entrypoint, cmd, working_dir, user } })
}

/// What runs.
fn plan(arguments: &RunArguments, image: Process, directory: PathBuf) -> Result<Plan> {
    let command = process::command(&image, arguments.entrypoint.as_deref(), &arguments.command);
    ensure!(
        !command.is_empty(),
        "{} does not say what to run; say it behind its name: -- COMMAND",
        arguments.reference
    );
    let volumes = arguments.volumes.iter().map(|(host, inside, read_only)| {
        Ok(Volume { host: std::path::absolute(host)?, inside: inside.clone(), read_only: *read_only })
    });
    let changes = match (arguments.read_only, arguments.in_memory) {
        (true, _) => Changes::Refused,
        (false, true) => Changes::Memory,
        (false, false) => Changes::Disk,
    };
    let environment = process::environment(&image.env, &arguments.env, |name| std::env::var_os(name));
    Ok(Plan {
        directory,
        changes,
        volumes: volumes.collect::<Result<_>>()?,
        command,
        environment: environment?,
        working_directory: arguments.workdir.clone().unwrap_or(image.working_dir),
        user: arguments.user.clone().unwrap_or(image.user),
        // in a pipeline it is the others' as well
        terminal: has_foreground(std::io::stdin()) && has_foreground(std::io::stdout()),
    })
}

/// Runs the program to its end, and hands signals on to it. Its exit code.
async fn follow(plan: Plan, signals: &mut Signals) -> Result<u8> {
    let mut running = Running::start(plan).await?;
    let mut has_signal = false;
    loop {
        let signal = tokio::select! {
            started = running.started() => match started {
                Ok(()) => break,
                // it has said why; its end takes what it has mounted along
                Err(error) => {
                    running.kill().await;
                    return Err(error);
                }
            },
            signal = signals.next() => signal,
        };
        // the program may run before we hear of it, and then the signal is for it; whoever does not want to wait says so twice
        if has_signal {
            running.kill().await;
            bail!(Interrupted)
        }
        has_signal = true;
        hand_on(&running, signal);
    }
    loop {
        tokio::select! {
            code = running.ended() => return code,
            signal = signals.next() => hand_on(&running, signal),
        }
    }
}

fn hand_on(running: &Running, signal: Signal) {
    if !is_from_terminal(signal) {
        running.signal(signal);
    }
}

/// Whether the program got that signal already, as it is in the terminal's foreground beside us, wherever our streams lead. Who
/// sent it cannot be seen: what somebody else than the terminal sends us in its foreground is taken for the terminal's.
fn is_from_terminal(signal: Signal) -> bool {
    matches!(signal, Signal::INT | Signal::QUIT) && File::open("/dev/tty").is_ok_and(has_foreground)
}

/// Whether that is a terminal in whose foreground we are.
fn has_foreground(stream: impl AsFd) -> bool {
    tcgetpgrp(stream).is_ok_and(|group| group == getpgrp())
}

/// Takes the mount away. Where the daemon cannot, having died, the scratch directory takes it along.
async fn unmount(arguments: &RunArguments, directory: String) {
    let controller = Controller::new(&arguments.cache.directory);
    let request = UnmountRequest { directory, lazy: false };
    if controller.unmount(&request).await.is_err() {
        let _ = controller.unmount(&UnmountRequest { lazy: true, ..request }).await;
    }
}
