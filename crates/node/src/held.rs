//! A node's end of its holder: what must stay open when the node dies.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::{error, warn};

use crate::line::{Line, MOUNT, pair, receive, send};

/// A holder answers at once; one that does not is stuck.
const ANSWER: Duration = Duration::from_secs(10);
/// Between two attempts to start another holder.
const PAUSE: Duration = Duration::from_secs(1);

/// What is kept open beyond this process's end, by name; or nothing, where there is no holder.
#[derive(Clone, Default)]
pub struct Held(Option<Arc<Inner>>);

struct Inner {
    socket: Mutex<OwnedFd>,
    /// Everything that the holder has, for another holder if it dies.
    kept: Mutex<BTreeMap<String, Arc<OwnedFd>>>,
    state: Mutex<State>,
    again: bool,
    /// The command line of a holder that takes this process over, but for its id.
    arguments: Vec<OsString>,
    answers: (SyncSender<Line>, Mutex<Receiver<Line>>),
}

#[derive(Clone, Copy, Default)]
struct State {
    ready: bool,
    done: bool,
}

impl Held {
    /// A process that has no holder: what it has open ends with it.
    pub fn by_nobody() -> Self {
        Self::default()
    }

    /// A process that was started by a holder, whose socket is its standard input. If the holder dies, another is started with
    /// `arguments` and `--adopt=PID`. Blocks until all that was kept has come.
    pub fn by_holder(arguments: Vec<OsString>) -> io::Result<Self> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let (mut kept, mut again) = (BTreeMap::new(), false);
        loop {
            match receive(&socket)? {
                Some((Line::Have(name), Some(descriptor))) => {
                    kept.insert(name, Arc::new(descriptor));
                }
                Some((Line::Again, _)) => again = true,
                Some((Line::End, _)) => break,
                Some(_) => {}
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its holder has ended")),
            }
        }
        let (answer, answers) = sync_channel(1);
        let inner = Arc::new(Inner {
            socket: Mutex::new(socket.try_clone()?),
            kept: Mutex::new(kept),
            state: Mutex::default(),
            again,
            arguments,
            answers: (answer, Mutex::new(answers)),
        });
        let watched = Arc::clone(&inner);
        std::thread::Builder::new().name("lamina-holder".to_owned()).spawn(move || watched.watch(socket))?;
        Ok(Self(Some(inner)))
    }

    /// Whether this process follows one that has died.
    pub fn is_again(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.again)
    }

    /// Whether anything outlives this process.
    pub(crate) fn is_held(&self) -> bool {
        self.0.is_some()
    }

    /// What is kept under a name.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<OwnedFd>> {
        self.0.as_ref()?.kept.lock().get(name).cloned()
    }

    /// The names of all that is kept.
    pub(crate) fn names(&self) -> Vec<String> {
        self.0.as_ref().map(|inner| inner.kept.lock().keys().cloned().collect()).unwrap_or_default()
    }

    /// Has it kept open until it is forgotten, whatever becomes of this process; whether it has arrived. One that has not is kept
    /// by the next holder. Where there is no holder nothing outlives this process, and so nothing is missing.
    pub(crate) fn keep(&self, name: &str, descriptor: OwnedFd) -> bool {
        let Some(inner) = &self.0 else { return true };
        let descriptor = Arc::new(descriptor);
        // first here: a holder that is started at this moment gets everything that is here
        inner.kept.lock().insert(name.to_owned(), Arc::clone(&descriptor));
        inner.say(&Line::Keep(name.to_owned()), Some(&descriptor))
    }

    /// Closes what is kept under a name.
    pub(crate) fn forget(&self, name: &str) {
        let Some(inner) = &self.0 else { return };
        if inner.kept.lock().remove(name).is_some() {
            inner.say(&Line::Forget(name.to_owned()), None);
        }
    }

    /// This process serves.
    pub(crate) fn ready(&self) {
        let Some(inner) = &self.0 else { return };
        inner.state.lock().ready = true;
        inner.say(&Line::Ready, None);
    }

    /// This process ends on purpose, and the holder with it.
    pub(crate) fn done(&self) {
        let Some(inner) = &self.0 else { return };
        inner.state.lock().done = true;
        inner.say(&Line::Done, None);
    }

    /// Has another program started when this process ends. *Errors*: why the holder does not want it. Blocks.
    pub(crate) fn upgrade(&self, program: PathBuf) -> Result<(), String> {
        let inner =
            self.0.as_ref().ok_or("nothing would keep its mounts alive: it was started without a holder")?;
        let answers = inner.answers.1.lock();
        while answers.try_recv().is_ok() {}
        inner.say(&Line::Upgrade(program), None);
        match answers.recv_timeout(ANSWER) {
            Ok(Line::Upgrading) => Ok(()),
            Ok(Line::Refused(reason)) => Err(reason),
            _ => Err(format!("its holder did not answer within {ANSWER:?}")),
        }
    }
}

impl Inner {
    /// Whether a line arrives. One that does not is made good for when the next holder starts: it gets all there is.
    fn say(&self, line: &Line, descriptor: Option<&OwnedFd>) -> bool {
        let said = send(&*self.socket.lock(), line, descriptor.map(AsFd::as_fd));
        said.inspect_err(|error| warn!(?line, %error, "the holder does not hear")).is_ok()
    }

    /// Hears the holder, and starts another when it dies.
    fn watch(&self, mut socket: OwnedFd) {
        loop {
            match receive(&socket) {
                Ok(Some((line @ (Line::Upgrading | Line::Refused(_)), _))) => {
                    let _ = self.answers.0.try_send(line);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    if self.state.lock().done {
                        return;
                    }
                    error!("the holder has died; starting another");
                    socket = self.next_holder();
                }
            }
        }
    }

    /// Starts holders until one lives.
    fn next_holder(&self) -> OwnedFd {
        loop {
            match self.start_holder() {
                Ok(socket) => return socket,
                Err(error) => error!(%error, "no holder can be started; mounts end if this process does"),
            }
            std::thread::park_timeout(PAUSE);
        }
    }

    fn start_holder(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = pair()?;
        // whoever keeps or forgets something waits, so that nothing falls between the two
        let mut socket = self.socket.lock();
        let mut holder = Command::new("/proc/self/exe")
            .args(&self.arguments)
            .arg(format!("--adopt={}", std::process::id()))
            .stdin(Stdio::from(theirs))
            .spawn()?;
        // it is no zombie when it dies
        std::thread::Builder::new().name("lamina-reaper".to_owned()).spawn(move || holder.wait())?;
        let kept = self.kept.lock().clone();
        // connections last: what goes with one must be kept where it is
        let (connections, others): (Vec<_>, Vec<_>) =
            kept.iter().partition(|(name, _)| name.starts_with(MOUNT));
        for (name, descriptor) in others.into_iter().chain(connections) {
            send(&ours, &Line::Keep(name.clone()), Some(descriptor.as_fd()))?;
        }
        if self.state.lock().ready {
            send(&ours, &Line::Ready, None)?;
        }
        *socket = ours.try_clone()?;
        Ok(ours)
    }
}
