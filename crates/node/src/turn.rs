//! Whose turn it is on a link that several things share: one waits until the one before it has come.

use std::convert::Infallible;

use tokio::sync::oneshot;

/// That something goes on. It is over when this is dropped, however that comes.
#[derive(Debug)]
pub(crate) struct TurnGuard {
    _over: oneshot::Sender<Infallible>,
}

/// For who waits until it is over.
#[derive(Debug)]
pub(crate) struct Turn(oneshot::Receiver<Infallible>);

/// Something that goes on, from now.
pub(crate) fn turn() -> (TurnGuard, Turn) {
    let (over, turn) = oneshot::channel();
    (TurnGuard { _over: over }, Turn(turn))
}

impl Turn {
    /// Returns once it is over.
    pub(crate) async fn over(self) {
        // nothing can be sent
        let _ = self.0.await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_over_when_its_guard_is_dropped_and_not_before() {
        let (guard, turn) = turn();
        let mut over = std::pin::pin!(turn.over());
        timeout(Duration::from_secs(1), over.as_mut()).await.expect_err("it goes on");
        drop(guard);
        over.await;
    }
}
