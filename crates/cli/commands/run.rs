//! `lamina run`: a program from an image that has not arrived, in one command.
//!
//! The image is mounted in a scratch directory below the cache, by the daemon of the cache, which takes the mount away where this
//! process dies (`MountRequest::owner`); the program runs on it as `inside.rs` has it, and dies with this process. So of a run that
//! was killed nothing stays but its scratch directory, which the next run removes, and with it whatever its daemon may have left.

mod configs;
mod process;
mod scratch;

use std::os::fd::AsFd;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lamina_image::{CommandKey, Process};
use lamina_node::Controller;
use lamina_wire::WireError;
use lamina_wire::proto::{MountRequest, UnmountRequest};
use rustix::process::{Signal, getpgrp};
use rustix::termios::tcgetpgrp;

use self::configs::{Configs, Known};
use self::scratch::Scratch;
use super::inside::{Changes, Plan, Running, Volume};
use super::mount::{make_cache, mount, report_offline};
use super::profile::Image;
use super::signals::Signals;
use super::{Ended, Interrupted};
use crate::args::{Common, RunArguments};

/// Runs the program. *Errors*: [`Ended`], with its exit code.
pub(crate) async fn run(arguments: RunArguments, common: Common) -> Result<()> {
    let mut signals = Signals::new()?;
    make_cache(&arguments.cache)?;
    let known = tokio::select! {
        known = find(&arguments, &common) => known?,
        _ = signals.next() => bail!(Interrupted),
    };
    let cache = arguments.cache.directory.canonicalize()?;
    let scratch = tokio::task::spawn_blocking(move || Scratch::create(&cache)).await??;
    let plan = plan(&arguments, known.process, &scratch)?;
    let key = arguments.key.clone().or_else(|| CommandKey::of(&plan.command)).context("a command")?;
    let request = MountRequest {
        reference: arguments.reference.to_string(),
        directory: plan.image().to_str().context("the cache directory's name must be UTF-8")?.to_owned(),
        plain_http: common.plain_http,
        require_bound: arguments.require_bound,
        command: key.to_string(),
        owner: std::process::id(),
        ..MountRequest::default()
    };
    let mounted = mount(&request, &arguments.cache, &arguments.settings, &common).await?;
    report_offline(&arguments.reference, &mounted);
    let ended = match mounted.manifest == known.manifest {
        true => follow(plan, &mut signals).await,
        false => Err(anyhow!("{} was pushed anew this moment; run it again", arguments.reference)),
    };
    unmount(&arguments, request.directory).await;
    tokio::task::spawn_blocking(move || scratch.remove()).await?;
    match ended? {
        0 => Ok(()),
        code => bail!(Ended(code)),
    }
}

/// What the image wants its programs to be. As it was when last asked, where nobody answers: the node says the same of the rest.
async fn find(arguments: &RunArguments, common: &Common) -> Result<Known> {
    let reference = &arguments.reference;
    let configs = Configs::of(&arguments.cache.directory);
    let known = configs.find(reference);
    let image = match (Image::find(reference, common).await, known) {
        (Ok(image), Some(known)) if known.manifest == image.manifest.to_string() => return Ok(known),
        (Ok(image), _) => image,
        (Err(error), Some(known)) if is_passing(&error) => return Ok(known),
        (Err(error), _) => return Err(error),
    };
    Ok(configs.remember(reference, image.manifest.to_string(), image.process().await?))
}

fn is_passing(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(WireError::is_passing)
}

/// What runs.
fn plan(arguments: &RunArguments, image: Process, scratch: &Scratch) -> Result<Plan> {
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
        directory: scratch.path().to_owned(),
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
    let started = tokio::select! {
        started = running.started() => Some(started),
        _ = signals.next() => None,
    };
    match started {
        Some(Ok(())) => {}
        // it has said why; its end takes what it has mounted along
        Some(Err(error)) => {
            running.kill().await;
            return Err(error);
        }
        None => {
            running.kill().await;
            bail!(Interrupted)
        }
    }
    loop {
        let signal = tokio::select! {
            code = running.ended() => return code,
            signal = signals.next() => signal,
        };
        if !is_from_terminal(signal) {
            running.signal(signal);
        }
    }
}

/// Whether the program got that signal already, as it is in the terminal's foreground beside us.
fn is_from_terminal(signal: Signal) -> bool {
    matches!(signal, Signal::INT | Signal::QUIT)
        && (has_foreground(std::io::stdin())
            || has_foreground(std::io::stdout())
            || has_foreground(std::io::stderr()))
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
