//! The signals that are meant for a program which runs in our stead.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

/// What is asked of programs from outside; the others are about a process itself, or cannot be handed on.
const HANDED_ON: [Signal; 6] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// From its making on these signals do nothing by themselves.
pub(crate) struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// Must be made within a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        let watched = HANDED_ON.map(|it| Ok((it, signal(SignalKind::from_raw(it.as_raw()))?)));
        Ok(Self(watched.into_iter().collect::<io::Result<_>>()?))
    }

    /// The next one. Cancelling it loses none.
    pub(crate) async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            let come = self
                .0
                .iter_mut()
                .find_map(|(signal, watched)| watched.poll_recv(context).is_ready().then_some(*signal));
            come.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
