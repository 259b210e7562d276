//! The threads that do a boot's work. They step back for the program that starts, as long as nobody waits for them.
//!
//! A program runs on one processor while it starts, and on a small machine a boot takes all that there are: then each takes turns
//! with the other, and the program comes late to what it could do long since. A boot that is ahead of it loses nothing by waiting.

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread;

use parking_lot::Mutex;
use rustix::process::{Pid, getpriority_process, setpriority_process};
use tokio::sync::oneshot;

/// A tenth of a program's share where both want the same processor (sched(7): each step is a quarter).
const BEHIND: i32 = 10;
/// The lowest there is.
const NICE_MAX: i32 = 19;

/// The threads of one boot.
#[derive(Debug, Default)]
pub(super) struct Crew(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    threads: Vec<(Pid, Role)>,
    /// How many wait for what they do.
    waiting: usize,
    /// Whether programs read what is opened and not stored.
    late: bool,
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Opens,
    Stores,
}

/// Somebody waits, as long as this lives.
pub(super) struct Awaited<'a>(&'a Crew);

struct Member<'a>(&'a Crew, Pid);

impl Crew {
    /// Does `work` on a thread of its own that steps back, as [`spawn`] does.
    pub(super) fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        role: Role,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<oneshot::Receiver<T>> {
        let this = Arc::clone(self);
        spawn(move || {
            let _member = this.join(role);
            work()
        })
    }

    /// Somebody waits from now on, and so they step back for nobody.
    pub(super) fn awaited(&self) -> Awaited<'_> {
        let mut state = self.0.lock();
        state.waiting += 1;
        if state.waiting == 1 {
            state.give_way();
        }
        Awaited(self)
    }

    /// Whoever stores goes first, as long as this says, from now on, that it is late: that programs read what is opened and not stored,
    /// by requests that cost them more than storing does.
    pub(super) fn set_late(&self, is_late: impl FnOnce() -> bool) {
        let mut state = self.0.lock();
        let is_late = is_late();
        if state.late != is_late {
            state.late = is_late;
            state.give_way();
        }
    }

    fn join(&self, role: Role) -> Member<'_> {
        // found out before anybody waits for the lock
        ordinary();
        let member = Member(self, rustix::thread::gettid());
        let mut state = self.0.lock();
        state.threads.push((member.1, role));
        give_way(member.1, state.is_behind(role));
        drop(state);
        member
    }
}

/// Does `work` on a thread of its own. What comes of it is not sent where that panics. *Errors*: there is no thread.
pub(super) fn spawn<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (sender, done) = oneshot::channel();
    // nobody may want it
    let work = move || drop(sender.send(work()));
    thread::Builder::new().name("lamina-boot".to_owned()).spawn(work)?;
    Ok(done)
}

impl State {
    fn is_behind(&self, role: Role) -> bool {
        self.waiting == 0 && !(self.late && role == Role::Stores)
    }

    fn give_way(&self) {
        self.threads.iter().for_each(|(thread, role)| give_way(*thread, self.is_behind(*role)));
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        let mut state = self.0.0.lock();
        state.waiting -= 1;
        if state.waiting == 0 {
            state.give_way();
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.0.0.lock().threads.retain(|(thread, _)| *thread != self.1);
    }
}

/// Puts a thread behind programs, or where it was; leaves it where it would not come back from there.
fn give_way(thread: Pid, behind: bool) {
    let Some(ordinary) = ordinary() else { return };
    let nice = if behind { (ordinary + BEHIND).min(NICE_MAX) } else { ordinary };
    // it may have ended
    let _ = setpriority_process(Some(thread), nice);
}

/// Puts this thread behind all others, for good.
pub(super) fn step_back() {
    let _ = setpriority_process(Some(rustix::thread::gettid()), NICE_MAX);
}

/// The nice value of this process, where a thread may come back to it: who has not CAP_SYS_NICE may only go away from it
/// (setpriority(2)).
fn ordinary() -> Option<i32> {
    static ORDINARY: OnceLock<Option<i32>> = OnceLock::new();
    *ORDINARY.get_or_init(|| {
        let there_and_back = || {
            let thread = Some(rustix::thread::gettid());
            let ordinary = getpriority_process(thread)?;
            setpriority_process(thread, (ordinary + 1).min(NICE_MAX))?;
            setpriority_process(thread, ordinary)?;
            rustix::io::Result::Ok(ordinary)
        };
        // a thread that does not come back ends there
        thread::Builder::new().spawn(there_and_back).ok()?.join().ok()?.ok()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn they_step_back_unless_somebody_waits() {
        let crew = Arc::new(Crew::default());
        let ordinary = ordinary().expect("this test needs CAP_SYS_NICE");
        let ((end, ended), (tell, told)) = (mpsc::sync_channel::<()>(1), mpsc::sync_channel(1));
        let done = crew.spawn(Role::Opens, move || {
            tell.send(rustix::thread::gettid()).expect("heard");
            ended.recv().is_err()
        });
        let thread = told.recv().expect("told");
        let nice = || getpriority_process(Some(thread)).expect("it is there");
        let behind = (ordinary + BEHIND).min(NICE_MAX);
        assert_eq!(nice(), behind);
        let (one, other) = (crew.awaited(), crew.awaited());
        assert_eq!(nice(), ordinary);
        drop(one);
        assert_eq!(nice(), ordinary);
        drop(other);
        assert_eq!(nice(), behind);
        drop(end);
        assert!(done.expect("a thread").blocking_recv().expect("done"));
    }

    #[test]
    fn while_storing_is_late_whoever_stores_steps_back_no_more_and_the_others_do() {
        let crew = Arc::new(Crew::default());
        let ordinary = ordinary().expect("this test needs CAP_SYS_NICE");
        let behind = (ordinary + BEHIND).min(NICE_MAX);
        let thread = |role| {
            let ((end, ended), (tell, told)) = (mpsc::sync_channel::<()>(1), mpsc::sync_channel(1));
            let made = crew.spawn(role, move || {
                tell.send(rustix::thread::gettid()).expect("heard");
                ended.recv().is_err()
            });
            made.expect("a thread");
            (end, told.recv().expect("told"))
        };
        let ((_opening, opens), (_storing, stores)) = (thread(Role::Opens), thread(Role::Stores));
        let nice = || [opens, stores].map(|thread| getpriority_process(Some(thread)).expect("it is there"));
        assert_eq!(nice(), [behind, behind]);
        crew.set_late(|| true);
        assert_eq!(nice(), [behind, ordinary]);
        let awaited = crew.awaited();
        assert_eq!(nice(), [ordinary, ordinary]);
        crew.set_late(|| false);
        drop(awaited);
        assert_eq!(nice(), [behind, behind]);
    }

    #[test]
    fn what_panics_sends_nothing_and_is_no_member_any_more() {
        let crew = Arc::new(Crew::default());
        let done = crew.spawn(Role::Opens, || panic!("as it should")).expect("a thread");
        done.blocking_recv().map(|(): ()| ()).expect_err("nothing");
        assert!(crew.0.lock().threads.is_empty());
    }
}
