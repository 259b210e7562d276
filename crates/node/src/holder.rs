//! The small process that outlives a node: it keeps descriptors open and starts the node again when it dies.
//!
//! The kernel ends a FUSE mount when the last descriptor of its connection is closed, so the holder has one of each. It has no
//! cache, no threads and no configuration, and so hardly a reason to die. If it does, the node starts another.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Resource, Signal, getrlimit, kill_process, pidfd_open, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{interval, sleep};
use tracing::{error, info, warn};

use crate::line::{Line, MOUNT, pair, receive, send};

/// A node that lived shorter is started again after a pause, so that one that cannot live does not eat a core.
const SHORT_LIFE: Duration = Duration::from_secs(5);
/// The first pause; each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause: readers wait meanwhile.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How often a process is looked at that cannot quite die: one of its threads may wait in the kernel for a page that only
/// its successor can bring.
const LOOK: Duration = Duration::from_millis(250);
/// As shells count an end by a signal.
const SIGNALLED: i32 = 128;

/// What a holder starts.
#[derive(Debug)]
pub struct HolderConfig {
    /// The arguments of a node, but for `--held`.
    pub arguments: Vec<OsString>,
    /// The process of a node whose holder has died. Its socket is the standard input.
    pub adopt: Option<u32>,
}

/// Holds a node until it ends on purpose, or fails before it has ever served; its exit code.
pub async fn hold(config: HolderConfig) -> io::Result<u8> {
    // two descriptors a mount, in the node even more
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
    let mut holder = Holder {
        kept: BTreeMap::new(),
        arguments: config.arguments,
        program: Program::ourselves(),
        previous: None,
        served: false,
        stopping: false,
    };
    let mut node = match config.adopt {
        Some(pid) => Node::adopt(pid)?,
        None => holder.start(false).await?,
    };
    let mut pause = Duration::ZERO;
    loop {
        let begun = Instant::now();
        let end = holder.see(&mut node).await?;
        if end.done || holder.stopping {
            return Ok(code(end.status));
        }
        if let Some(program) = end.upgrade {
            info!("starting another program in the node's place");
            holder.previous = Some(std::mem::replace(&mut holder.program, program));
        } else {
            let mounts = holder.kept.keys().any(|name| name.starts_with(MOUNT));
            if !end.ready && holder.previous.is_none() && !(holder.served && mounts) {
                // it has said why, and nobody waits for it
                return Ok(code(end.status));
            }
            if !end.ready
                && let Some(previous) = holder.previous.take()
            {
                error!("the program that the node was upgraded to does not serve; going back");
                holder.program = previous;
            }
            error!(pid = node.pid.as_raw_nonzero(), status = ?end.status, "the node has died; starting it again");
            if begun.elapsed() > SHORT_LIFE {
                pause = Duration::ZERO;
            }
            sleep(pause).await;
            pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
        node = loop {
            match holder.start(true).await {
                Ok(node) => break node,
                Err(error) => error!(%error, "the node cannot be started"),
            }
            match holder.previous.take() {
                Some(previous) => holder.program = previous,
                None => sleep(PAUSE_MAX).await,
            }
        };
    }
}

struct Holder {
    kept: BTreeMap<String, OwnedFd>,
    arguments: Vec<OsString>,
    program: Program,
    /// What served before an upgrade that has not served yet.
    previous: Option<Program>,
    /// Whether any node served.
    served: bool,
    /// Whether somebody told us to end.
    stopping: bool,
}

/// A program that stays the same when its file is replaced.
#[derive(Debug)]
struct Program(Option<File>);

impl Program {
    /// The one that runs.
    fn ourselves() -> Self {
        Self(File::open("/proc/self/exe").ok())
    }

    fn open(path: &Path) -> Result<Self, String> {
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(format!("{} is no program", path.display()));
        }
        Ok(Self(Some(file)))
    }

    fn path(&self) -> PathBuf {
        match &self.0 {
            Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            None => "/proc/self/exe".into(),
        }
    }
}

/// A node that runs.
struct Node {
    pid: Pid,
    child: Option<Child>,
    ended: AsyncFd<OwnedFd>,
    socket: AsyncFd<OwnedFd>,
}

/// How a node ended.
#[derive(Default)]
struct End {
    ready: bool,
    done: bool,
    upgrade: Option<Program>,
    status: Option<ExitStatus>,
}

impl Node {
    fn new(pid: Pid, child: Option<Child>, socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let ended = watched(pidfd_open(pid, PidfdFlags::empty())?, Interest::READABLE)?;
        Ok(Self { pid, child, ended, socket: watched(socket, Interest::READABLE | Interest::WRITABLE)? })
    }

    fn adopt(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        Self::new(pid, None, io::stdin().as_fd().try_clone_to_owned()?)
    }

    /// Returns when all of its threads have ended that can end without a successor.
    async fn ended(&self) {
        let mut looks = interval(LOOK);
        let mut zombie = false;
        loop {
            tokio::select! {
                _ = self.ended.readable() => return,
                _ = looks.tick() => {}
            }
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
            // the name before it is in brackets and may hold anything
            let dead = stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X']));
            if dead && zombie {
                warn!(
                    pid = self.pid.as_raw_nonzero(),
                    "a dead node waits in the kernel; its successor will free it"
                );
                return;
            }
            zombie = dead;
        }
    }

    async fn say(&self, line: &Line, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let send = |socket: &OwnedFd| send(socket, line, descriptor.map(AsFd::as_fd));
        self.socket.async_io(Interest::WRITABLE, send).await
    }
}

impl Holder {
    /// Starts a node and gives it everything that is kept.
    async fn start(&mut self, again: bool) -> io::Result<Node> {
        let (ours, theirs) = pair()?;
        let mut command = Command::new(self.program.path());
        command.arg0("lamina").args(&self.arguments).arg("--held").stdin(Stdio::from(theirs));
        let child = command.spawn()?;
        let node = Node::new(Pid::from_child(&child), Some(child), ours)?;
        // one that dies at once is found dead
        let _ = self.give(&node, again).await;
        Ok(node)
    }

    async fn give(&self, node: &Node, again: bool) -> io::Result<()> {
        if again {
            node.say(&Line::Again, None).await?;
        }
        for (name, descriptor) in &self.kept {
            let line = Line::Have(name.clone());
            tokio::select! {
                said = node.say(&line, Some(descriptor)) => said?,
                () = node.ended() => return Ok(()),
            }
        }
        node.say(&Line::End, None).await
    }

    /// Sees a node through to its end.
    async fn see(&mut self, node: &mut Node) -> io::Result<End> {
        let mut end = End::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hung_up = false;
        loop {
            tokio::select! {
                biased;
                line = next(&node.socket), if !hung_up => match line? {
                    Some((line, descriptor)) => self.hear(node, line, descriptor, &mut end).await,
                    None => hung_up = true,
                },
                () = node.ended() => break,
                _ = terminate.recv() => self.stop(node),
                _ = interrupt.recv() => self.stop(node),
            }
        }
        // what it said before it died
        while !hung_up && let Ok(Some((line, descriptor))) = receive(node.socket.get_ref()) {
            self.hear(node, line, descriptor, &mut end).await;
        }
        end.status = node.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        Ok(end)
    }

    fn stop(&mut self, node: &Node) {
        self.stopping = true;
        let _ = kill_process(node.pid, Signal::TERM);
    }

    async fn hear(&mut self, node: &Node, line: Line, descriptor: Option<OwnedFd>, end: &mut End) {
        match (line, descriptor) {
            (Line::Keep(name), Some(descriptor)) => {
                self.kept.insert(name, descriptor);
            }
            (Line::Forget(name), _) => {
                self.kept.remove(&name);
            }
            (Line::Ready, _) => {
                end.ready = true;
                self.served = true;
                self.previous = None;
            }
            (Line::Upgrade(path), _) => {
                let answer = match Program::open(&path) {
                    Ok(program) => {
                        end.upgrade = Some(program);
                        Line::Upgrading
                    }
                    Err(reason) => Line::Refused(reason),
                };
                let _ = node.say(&answer, None).await;
            }
            (Line::Done, _) => {
                end.done = true;
                self.kept.clear();
            }
            (line, _) => warn!(?line, "the node says something that has no meaning here"),
        }
    }
}

/// A descriptor that tokio waits on.
pub(crate) fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "any type may say that it has another descriptor each time")]
    // SAFETY: an OwnedFd has the same descriptor for as long as it lives, and closes it when it ends
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(watched?)
}

async fn next(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<(Line, Option<OwnedFd>)>> {
    socket.async_io(Interest::READABLE, |socket| receive(socket)).await
}

/// An exit status as our own.
fn code(status: Option<ExitStatus>) -> u8 {
    let Some(status) = status else { return 0 };
    let code = status.code().or(status.signal().map(|signal| SIGNALLED + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
