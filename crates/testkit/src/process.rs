//! Children that do not outlive their test, and waiting for them with a deadline.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How often a condition is looked at that nothing announces.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Lines that nobody has asked for yet; more are dropped, so that a talkative child is never held up.
const LINES_WAITING: usize = 1024;
/// How long a connection may take where a port is probed.
const PROBE: Duration = Duration::from_millis(500);

/// A running child whose standard output is read; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// In a mutex so that tests may share what has a child between threads; nobody ever waits for it.
    lines: Mutex<Receiver<String>>,
}

impl Process {
    /// Starts `command` under a `name` for messages. Its standard output is read here; the rest stays as set.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        let stdout = child.stdout.take().expect("it was asked for");
        let (sender, lines) = sync_channel(LINES_WAITING);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Full or gone, the pipe is still emptied.
                let _ = sender.try_send(line);
            }
        });
        Ok(Self { name: name.to_owned(), child, lines: Mutex::new(lines) })
    }

    /// The first line of its output that begins with `prefix`, the lines before it being lost.
    ///
    /// # Errors
    /// When it ends, closes its output, or says nothing of the kind within `deadline`.
    pub fn wait_line(&mut self, prefix: &str, deadline: Duration) -> Result<String> {
        let until = Instant::now() + deadline;
        loop {
            let lines = self.lines.get_mut().expect("no thread panics with it");
            match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with(prefix) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("{}: no line `{prefix}…` in {deadline:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait(deadline)?;
                    bail!("{} ended without the line `{prefix}…`: {status}", self.name)
                }
            }
        }
    }

    /// Waits until `address`, in the network namespace of the caller, takes a connection.
    ///
    /// # Errors
    /// When the child ends first, or nothing listens within `deadline`.
    pub fn wait_port(&mut self, address: SocketAddr, deadline: Duration) -> Result<()> {
        let what = format!("{} to listen on {address}", self.name);
        until(&what, deadline, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended: {status}", self.name);
            }
            Ok(TcpStream::connect_timeout(&address, PROBE).ok().map(drop))
        })
    }

    /// Its exit status, once it has ended by itself.
    ///
    /// # Errors
    /// When it still runs after `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        wait_child(&mut self.child, deadline)?
            .with_context(|| format!("{} still runs after {deadline:?}", self.name))
    }

    /// Asks it to end by SIGTERM and gives its exit status.
    ///
    /// # Errors
    /// When it still runs after `grace`; it is killed then.
    pub fn stop(mut self, grace: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(grace)
    }

    /// Sends it a signal. One to a child that has ended is no error.
    ///
    /// # Errors
    /// What kill(2) says.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(self.pid(), signal).with_context(|| format!("signal {}", self.name))?;
        }
        Ok(())
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `look` gives once it gives something; looked at every 5 ms.
///
/// # Errors
/// What `look` says, or that `what` did not come within `deadline`.
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("waited {deadline:?} for {what}");
        }
        std::thread::park_timeout(LOOK_AGAIN);
    }
}

/// Waits until the process `pid`, all its threads together, has used under a tenth of one core for `quiet`.
///
/// # Errors
/// When it has ended, or is still busy after `deadline`.
pub fn wait_idle(pid: Pid, quiet: Duration, deadline: Duration) -> Result<()> {
    let (mut since, mut used) = (Instant::now(), cpu_time(pid)?);
    until(&format!("process {pid} to be idle"), deadline, || {
        if since.elapsed() < quiet {
            return Ok(None);
        }
        let (before, elapsed) = (used, since.elapsed());
        (since, used) = (Instant::now(), cpu_time(pid)?);
        Ok((used.saturating_sub(before) < elapsed / 10).then_some(()))
    })
}

/// CPU time that the process `pid` has used so far, in user space and kernel together.
///
/// # Errors
/// When there is no such process.
pub fn cpu_time(pid: Pid) -> Result<Duration> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The name is in brackets and may hold anything; utime and stime are the 12th and 13th fields after it.
    let fields = stat.rsplit_once(')').context("a line of /proc/PID/stat")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1)))
}

/// Runs `command` to its end and gives what it printed.
///
/// # Errors
/// When it cannot be started or does not end with 0; the message has the end of what it wrote to stderr.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, tail(&output.stderr));
    }
    Ok(output)
}

/// Runs `command` to its end, with all that it prints going to the file `log`.
///
/// Unlike [`run`] it does not wait for whoever inherits the output, such as a daemon that the command leaves behind.
///
/// # Errors
/// When it cannot be started, does not end with 0, or still runs after `deadline`, where it is killed.
/// The message has the end of the log.
pub fn run_logged(command: &mut Command, log: &Path, deadline: Duration) -> Result<()> {
    let file = File::create(log).with_context(|| log.display().to_string())?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    let ended = wait_child(&mut child, deadline)?;
    if ended.is_none() {
        child.kill()?;
        child.wait()?;
    }
    if ended.is_some_and(|status| status.success()) {
        return Ok(());
    }
    let reason = ended.map_or(format!("killed after {deadline:?}"), |status| status.to_string());
    bail!("{command:?}: {reason}\n{}", tail(&std::fs::read(log)?))
}

/// The exit status as soon as there is one, or nothing after `deadline`.
fn wait_child(child: &mut Child, deadline: Duration) -> Result<Option<ExitStatus>> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    // Readable once the process has ended: a wait without polling, so that it can be timed.
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let until = Instant::now() + deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&left.try_into()?)) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(child.wait()?)),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The last lines of what a program wrote.
fn tail(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_line_is_found_behind_others() {
        let mut process = Process::spawn("talker", &mut shell("echo no; echo ready at 7; exec cat")).unwrap();
        assert_eq!(process.wait_line("ready", SOON).unwrap(), "ready at 7");
    }

    #[test]
    fn a_child_that_ends_early_is_an_error_and_not_a_timeout() {
        let mut process = Process::spawn("quitter", &mut shell("echo no; exit 3")).unwrap();
        let error = process.wait_line("ready", SOON).unwrap_err();
        assert!(error.to_string().contains("ended without"), "{error}");
    }

    #[test]
    fn a_dropped_child_is_dead() {
        let mut process = Process::spawn("sleeper", &mut shell("echo ready; exec sleep 1000")).unwrap();
        process.wait_line("ready", SOON).unwrap();
        let pid = process.pid();
        drop(process);
        assert!(cpu_time(pid).is_err());
    }

    #[test]
    fn a_child_is_stopped_by_sigterm() {
        let mut process = Process::spawn("sleeper", &mut shell("echo ready; exec sleep 1000")).unwrap();
        process.wait_line("ready", SOON).unwrap();
        assert!(!process.stop(SOON).unwrap().success());
    }

    #[test]
    fn an_idle_process_is_seen_as_idle_while_the_time_of_a_busy_one_grows() {
        let idle = Process::spawn("idle", &mut shell("exec sleep 1000")).unwrap();
        wait_idle(idle.pid(), Duration::from_millis(100), SOON).unwrap();
        let busy = Process::spawn("busy", &mut shell("while :; do :; done")).unwrap();
        let worked = || Ok((cpu_time(busy.pid())? > Duration::from_millis(50)).then_some(()));
        until("a busy process to use its core", SOON, worked).unwrap();
        assert!(cpu_time(idle.pid()).unwrap() < Duration::from_millis(50));
    }

    #[test]
    fn a_failed_command_tells_what_it_wrote() {
        let error = run(&mut shell("echo the reason >&2; exit 4")).unwrap_err();
        assert!(format!("{error:#}").contains("the reason"), "{error:#}");
    }

    #[test]
    fn a_daemon_left_behind_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let mut command = shell("sleep 1000 & echo $! > \"$0\"; echo started");
        run_logged(command.arg(&pid), &dir.path().join("log"), SOON).unwrap();
        let pid = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"started\n");
    }

    #[test]
    fn a_command_that_takes_too_long_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = shell("echo the reason; exec sleep 1000");
        let error =
            run_logged(&mut command, &dir.path().join("log"), Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("killed after"), "{error}");
    }
}
