//! The init of a program: starts it, hands signals on, buries who has no parent any more, and ends with the program.
//!
//! It is there since the kernel keeps signals from the first process of a namespace unless that handles them, and programs do
//! not.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FileType, FsWord, fchown, fstat, fstatfs};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, kill_process_group, set_parent_process_death_signal, setpgid,
    wait,
};
use rustix::termios::tcsetpgrp;
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use tokio::signal::unix::{SignalKind, signal};

use super::user::{User, user};
use super::{Plan, SIGNALLED, STARTED, Unstarted, root};
use crate::args::InsideArguments;
use crate::commands::Ended;
use crate::commands::signals::Signals;

/// Where programs are looked for if the image does not say: as the runtimes of containers have it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What docker's exit codes mean: not our program's fault, not to be executed, not there.
const REFUSED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// The kernel's file system of pipes that have no name, as statfs(2) has it.
const PIPES: FsWord = 0x5049_5045;

/// Runs the program that it is told to run. *Errors*: [`Ended`], with the program's exit code.
pub(crate) async fn run(arguments: InsideArguments) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut line = take(arguments.line)?;
    let mut signals = Signals::new()?;
    let mut children = signal(SignalKind::child())?;
    // a parent that died before it was asked for does not answer
    line.write_all(&[0])?;
    let mut plan = Vec::new();
    line.read_to_end(&mut plan)?;
    let plan: Plan = serde_json::from_slice(&plan).context("a plan of `lamina run`")?;
    let program = match start(&plan) {
        Ok(program) => program,
        Err(unstarted) => {
            line.write_all(&serde_json::to_vec(&unstarted)?)?;
            bail!(Ended(unstarted.code));
        }
    };
    line.write_all(STARTED)?;
    drop(line);
    if plan.terminal {
        // we are in its foreground, so that is ours to give
        let _ = tcsetpgrp(std::io::stdin(), program);
    }
    // what a terminal sends reaches the program by itself, and is not for us to send again
    setpgid(None, None)?;
    loop {
        tokio::select! {
            signal = signals.next() => drop(kill_process(program, signal)),
            _ = children.recv() => {
                if let Some(code) = bury(program, plan.terminal) {
                    bail!(Ended(code));
                }
            }
        }
    }
}

/// The line to whoever started this, which nobody else is to inherit.
#[expect(unsafe_code, reason = "a descriptor that is known by its number")]
fn take(line: RawFd) -> Result<UnixStream> {
    let meant = "this is for `lamina run` to start";
    // SAFETY: no more is asked of it than whether it is there
    let found = fstat(unsafe { BorrowedFd::borrow_raw(line) }).context(meant)?;
    ensure!(FileType::from_raw_mode(found.st_mode) == FileType::Socket, meant);
    // SAFETY: it was opened for this process, and the first that looks at it is this
    let line = unsafe { UnixStream::from_raw_fd(line) };
    fcntl_setfd(&line, FdFlags::CLOEXEC)?;
    Ok(line)
}

/// Waits for all that have ended. The program's exit code, if it is among them.
///
/// A program that has the terminal and is stopped by it goes on at once, since nobody outside would have it go on: the terminal was
/// not its own yet, or somebody pressed Ctrl-Z.
fn bury(program: Pid, terminal: bool) -> Option<u8> {
    let mut code = None;
    while let Some((pid, status)) = wait(WaitOptions::NOHANG | WaitOptions::UNTRACED).unwrap_or(None) {
        let stopped = status.stopping_signal().is_some_and(|signal| signal != Signal::STOP.as_raw());
        if pid == program && stopped && terminal {
            let _ = kill_process_group(program, Signal::CONT);
        }
        if pid == program && !status.stopped() {
            let ended = status.exit_status().or_else(|| Some(SIGNALLED + status.terminating_signal()?));
            code = ended.and_then(|code| u8::try_from(code).ok());
        }
    }
    code
}

fn start(plan: &Plan) -> Result<Pid, Unstarted> {
    let refused = |error: anyhow::Error| Unstarted { code: REFUSED, message: format!("{error:#}") };
    let ours = root::enter(plan).map_err(refused)?;
    let user = user(&plan.user).map_err(refused)?;
    ours.go_to(&plan.working_directory).map_err(refused)?;
    give_pipes(&user);
    let (program, arguments) = plan.command.split_first().expect("never empty");
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).env("HOME", &user.home);
    command.envs(plan.environment.iter().filter_map(|assignment| assignment.split_once('=')));
    if plan.terminal {
        command.process_group(0);
    }
    // a thread is somebody else without the process being so; the program inherits it
    let spawned = std::thread::scope(|scope| {
        let spawning = scope.spawn(|| {
            become_user(&user).map_err(|error| refused(error.into()))?;
            command.spawn().map_err(|error| Unstarted {
                code: if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE },
                message: format!("{program} cannot be started in the image: {error}"),
            })
        });
        spawning.join().expect("it does not panic")
    });
    Ok(Pid::from_child(&spawned?))
}

/// Has the user own the standard streams that are pipes, as the runtimes of containers have it: programs open them anew, as
/// /dev/stdout. Nothing else, whose owner would stay another once the program has ended: a terminal, a FIFO in a directory.
fn give_pipes(user: &User) {
    let Some((uid, _)) = user.ids else { return };
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [input.as_fd(), output.as_fd(), errors.as_fd()] {
        if fstatfs(stream).is_ok_and(|found| found.f_type == PIPES) {
            // the program still has it as it is
            let _ = fchown(stream, Some(uid), None);
        }
    }
}

/// Makes the calling thread the user's.
fn become_user(user: &User) -> rustix::io::Result<()> {
    let Some((uid, gid)) = user.ids else { return Ok(()) };
    set_thread_groups(&user.groups)?;
    set_thread_gid(gid)?;
    set_thread_uid(uid)
}
