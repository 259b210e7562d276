//! What many wait for is done once.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ApiError;

/// Flights of one kind: twice as many as there are connections by default. Beyond them, clients come and go faster than the
/// upstream answers.
const FLIGHTS_MAX: usize = 2048;

type Running<K, P> = Arc<Mutex<HashMap<K, watch::Receiver<P>>>>;

/// What is being done, by what it is about. `P` is how far it is, and at the end, how it ended.
pub(super) struct Flights<K, P> {
    running: Running<K, P>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Tells those who wait. Who comes after it was dropped begins anew.
pub(super) struct Flight<K: Eq + Hash, P> {
    key: K,
    sender: watch::Sender<P>,
    running: Running<K, P>,
}

impl<K, P> Flights<K, P>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    P: Send + Sync + 'static,
{
    pub(super) fn new(tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { running: Arc::default(), tasks, stop }
    }

    /// Joins whoever is at it, or begins with the state `first`. It runs to its end, whoever goes away, unless the
    /// registry stops: then the sender is gone without an end.
    ///
    /// # Errors
    /// [`ApiError::Busy`] where too much is under way.
    pub(super) fn join<F>(
        &self,
        key: K,
        first: P,
        begin: impl FnOnce(Flight<K, P>) -> F,
    ) -> Result<watch::Receiver<P>, ApiError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut running = self.running.lock();
        if let Some(receiver) = running.get(&key) {
            return Ok(receiver.clone());
        }
        if running.len() >= FLIGHTS_MAX {
            return Err(ApiError::Busy);
        }
        let (sender, receiver) = watch::channel(first);
        running.insert(key.clone(), receiver.clone());
        // a runtime that is going down drops what it is given at once, and a flight that ends takes the lock
        drop(running);
        let flight = begin(Flight { key, sender, running: Arc::clone(&self.running) });
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(flight).await });
        Ok(receiver)
    }
}

impl<K, P> fmt::Debug for Flights<K, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flights({})", self.running.lock().len())
    }
}

impl<K: Eq + Hash, P> Flight<K, P> {
    /// What it is about.
    pub(super) fn key(&self) -> &K {
        &self.key
    }
}

impl<K: Eq + Hash, P> Deref for Flight<K, P> {
    type Target = watch::Sender<P>;

    fn deref(&self) -> &watch::Sender<P> {
        &self.sender
    }
}

impl<K: Eq + Hash, P> Drop for Flight<K, P> {
    fn drop(&mut self) {
        self.running.lock().remove(&self.key);
    }
}
