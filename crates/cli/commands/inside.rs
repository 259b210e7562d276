//! A program inside a mounted image: what `lamina run` and `lamina profile record` have in common.
//!
//! Between this process and the program stands the program's init: this binary again, as the first process of a namespace of
//! process ids, in a mount namespace of its own. It makes the root directory (see `root.rs`), starts the program and ends with it
//! (see `init.rs`). Whatever else the program has started is killed by the kernel then, and what is mounted there goes with the
//! last of them; nobody outside ever sees it. The kernel kills the init when this process dies, however that comes about.

mod init;
mod root;
mod user;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};

use anyhow::{Context, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, getpgrp, pidfd_open, pidfd_send_signal};
use rustix::termios::tcsetpgrp;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub(crate) use self::init::run as init;

/// What shells add to the number of the signal that ended a program.
const SIGNALLED: i32 = 128;
/// The standard streams have the descriptors below.
const STREAMS: libc::c_uint = 3;
/// What an init says once the program runs; otherwise it says why not.
const STARTED: &[u8] = &[0];
/// Longer reasons for not starting are cut, in bytes.
const REASON_BYTES_MAX: u64 = 64 << 10;

/// A program and the image that it is to run in.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// A directory to mount things in, absolute; the image is mounted at [`Plan::image`].
    pub(crate) directory: PathBuf,
    pub(crate) changes: Changes,
    pub(crate) volumes: Vec<Volume>,
    /// The program and its arguments; never empty.
    pub(crate) command: Vec<String>,
    /// `NAME=value` each; of one name the last counts.
    pub(crate) environment: Vec<String>,
    /// Where it starts; the root directory if this is empty.
    pub(crate) working_directory: String,
    /// `user[:group]`, by name or number as the image knows them; root if this is empty.
    pub(crate) user: String,
    /// Whether the program gets the terminal that is ours: a shell there wants to hand it on, and to have it back.
    pub(crate) terminal: bool,
}

impl Plan {
    /// Where the image has to be mounted.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.join("image")
    }
}

/// Where what the program writes goes to. None of it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Changes {
    Memory,
    /// [`Plan::directory`].
    Disk,
    /// Nothing can be written.
    Refused,
}

/// A file or directory of this machine that the program sees as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    /// Absolute.
    pub(crate) host: PathBuf,
    /// Absolute, in the image.
    pub(crate) inside: PathBuf,
    pub(crate) read_only: bool,
}

/// Why the program did not start, and what exit code docker has for that.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub(crate) struct Unstarted {
    pub(crate) code: u8,
    pub(crate) message: String,
}

/// A program's init. Dropping this kills the program.
pub(crate) struct Running {
    init: OwnedFd,
    terminal: bool,
    started: oneshot::Receiver<Result<()>>,
    ended: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Running {
    /// Begins to start the program. Its standard streams are ours. Signals are for it from here on.
    pub(crate) async fn start(plan: Plan) -> Result<Self> {
        let (began, init) = oneshot::channel();
        let (start, started) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let terminal = plan.terminal;
        // a thread of its own, since of its namespace nobody else wants to have children; and the kernel takes its end for that of
        // the init's parent
        std::thread::Builder::new().name("inside".into()).spawn(move || {
            let (mut child, mut line) = match spawn() {
                Ok(spawned) => spawned,
                Err(error) => return drop(began.send(Err(error))),
            };
            let init = begun(&child, &mut line);
            let has_begun = init.is_ok();
            if began.send(init).is_ok() && has_begun {
                // whoever waits for this may have gone; then the init is being killed
                let _ = start.send(agree(line, &plan));
            } else {
                // nobody could end it, so it does not begin
                let _ = child.kill();
            }
            let _ = end.send(child.wait());
        })?;
        let init = init.await.context("the thread that starts the program ended early")??;
        Ok(Self { init, terminal, started, ended })
    }

    /// Returns once the program runs. *Errors*: also [`Unstarted`]. Once.
    pub(crate) async fn started(&mut self) -> Result<()> {
        (&mut self.started).await.context("the program's init ended early")?
    }

    /// The exit code of the program, as shells have it, once neither it nor anything that it has started runs. Once.
    pub(crate) async fn ended(&mut self) -> Result<u8> {
        let status = (&mut self.ended).await.context("nobody waits for the program's init")??;
        if self.terminal {
            take_terminal_back();
        }
        let code = status.code().or_else(|| Some(SIGNALLED + status.signal()?));
        Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
    }

    /// Sends the program a signal; if it does not run yet, its init has it once it does.
    pub(crate) fn signal(&self, signal: Signal) {
        // it may have ended just now
        let _ = pidfd_send_signal(&self.init, signal);
    }

    /// Kills everything in there, and returns when it is dead.
    pub(crate) async fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.ended().await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Has the group of this process in the foreground of its terminal again.
#[expect(unsafe_code, reason = "rustix has no signal dispositions")]
fn take_terminal_back() {
    // SAFETY: nothing is called when the signal comes
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
    // an error means that the terminal has gone
    let _ = tcsetpgrp(io::stdin(), getpgrp());
}

/// Starts an init, in a namespace of process ids, and gives our end of the line to it. *Cost*: the calling thread has all
/// its later children there.
#[expect(unsafe_code, reason = "there is no safe call for namespaces")]
fn spawn() -> Result<(Child, UnixStream)> {
    // SAFETY: file descriptors stay shared
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.context("a namespace of process ids: are you root?")?;
    let (ours, theirs) = UnixStream::pair()?;
    // this very binary, though another may have taken its path
    let mut command = Command::new("/proc/self/exe");
    let line = theirs.as_raw_fd();
    command.arg("inside").arg(line.to_string());
    // SAFETY: two system calls, on a descriptor that is open until the child has been spawned
    unsafe { command.pre_exec(move || inherit_only(line)) };
    Ok((command.spawn().context("the program's init cannot be started")?, ours))
}

/// Has the next program of this process get no descriptor but its standard streams and the line. Of what whoever started us has
/// left open, a directory would be a way out of the image, by its `/proc/self/fd`.
#[expect(unsafe_code, reason = "rustix has no close_range(2)")]
fn inherit_only(line: RawFd) -> io::Result<()> {
    let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: closes nothing in this program
    if unsafe { libc::close_range(STREAMS, libc::c_uint::MAX, cloexec) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as the caller says
    Ok(fcntl_setfd(unsafe { BorrowedFd::borrow_raw(line) }, FdFlags::empty())?)
}

/// Returns when the init dies with us and hears signals.
fn begun(child: &Child, line: &mut UnixStream) -> Result<OwnedFd> {
    let init = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    line.read_exact(&mut [0]).context("the program's init ended early")?;
    Ok(init)
}

/// Tells the init what to do. Returns when the program runs.
fn agree(mut line: UnixStream, plan: &Plan) -> Result<()> {
    let plan = serde_json::to_vec(plan)?;
    line.write_all(&plan).context("the program's init does not listen")?;
    line.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    line.take(REASON_BYTES_MAX).read_to_end(&mut answer)?;
    if answer == STARTED {
        return Ok(());
    }
    ensure!(!answer.is_empty(), "the program's init ended before the program began");
    Err(serde_json::from_slice::<Unstarted>(&answer).context("what the program's init said")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of an init that says this once it has its plan.
    fn answered(answer: &[u8]) -> Result<()> {
        let plan = Plan {
            directory: PathBuf::new(),
            changes: Changes::Memory,
            volumes: Vec::new(),
            command: vec!["x".repeat(1 << 20)],
            environment: Vec::new(),
            working_directory: String::new(),
            user: String::new(),
            terminal: false,
        };
        let (ours, mut theirs) = UnixStream::pair()?;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                theirs.read_to_end(&mut Vec::new()).unwrap();
                theirs.write_all(answer).unwrap();
            });
            agree(ours, &plan)
        })
    }

    #[test]
    fn only_an_init_that_says_so_has_started_its_program() {
        answered(STARTED).unwrap();
        let unstarted = answered(br#"{"code":126,"message":"why"}"#).unwrap_err();
        assert_eq!(unstarted.downcast::<Unstarted>().unwrap().code, 126);
        for answer in [&b""[..], b"{", b"\x01", b"\0\0"] {
            assert!(answered(answer).unwrap_err().downcast::<Unstarted>().is_err(), "{answer:?}");
        }
    }
}
