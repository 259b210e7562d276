//! One fetch for each frame, however many wait for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lamina_chunk::{Chunk, FrameId};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{CacheError, Source};

/// How a flight ended.
pub(crate) type Outcome = Result<Chunk, CacheError>;

/// A frame on its way.
pub(crate) struct Flight {
    pub(crate) id: FrameId,
    /// Whom it is fetched from.
    pub(crate) source: Arc<dyn Source>,
    outcome: watch::Sender<Option<Outcome>>,
    claimed: AtomicBool,
    urgent: AtomicBool,
}

impl Flight {
    /// Takes the fetch on. True exactly once: several jobs may carry the same flight.
    pub(crate) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }

    /// Whether a reader waits.
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire)
    }

    /// Marks that a reader waits. True if it is the first one, and nobody has taken the fetch on yet: then it needs
    /// a job of the demand class.
    pub(crate) fn urge(&self) -> bool {
        !self.urgent.swap(true, Ordering::AcqRel) && !self.claimed.load(Ordering::Acquire)
    }
}

/// What a reader waits on.
pub(crate) struct Waiter {
    pub(crate) flight: Arc<Flight>,
    pub(crate) outcome: watch::Receiver<Option<Outcome>>,
}

impl Waiter {
    /// The frame, or why there is none.
    pub(crate) async fn landed(&mut self) -> Outcome {
        let stopped = CacheError::Stopped(self.flight.id);
        let outcome = self.outcome.wait_for(Option::is_some).await.map_err(|_| stopped.clone())?;
        outcome.clone().unwrap_or(Err(stopped))
    }
}

/// What a frame asked for turned out to be.
pub(crate) enum Boarding {
    /// In memory by now.
    Here(Chunk),
    /// Somebody else fetches it.
    Joined(Waiter),
    /// The caller has to.
    Fresh(Waiter),
}

/// All frames on their way.
#[derive(Default)]
pub(crate) struct Flights(Mutex<HashMap<FrameId, Arc<Flight>>>);

impl Flights {
    /// Joins the flight of `id` or begins one. `memory` is asked under the lock, since a flight lands there before it
    /// leaves the table.
    pub(crate) fn board(
        &self,
        id: FrameId,
        source: &Arc<dyn Source>,
        memory: impl FnOnce() -> Option<Chunk>,
    ) -> Boarding {
        let mut flights = self.0.lock();
        if let Some(flight) = flights.get(&id) {
            let outcome = flight.outcome.subscribe();
            return Boarding::Joined(Waiter { flight: flight.clone(), outcome });
        }
        if let Some(chunk) = memory() {
            return Boarding::Here(chunk);
        }
        let (sender, outcome) = watch::channel(None);
        let flight = Arc::new(Flight {
            id,
            source: source.clone(),
            outcome: sender,
            claimed: AtomicBool::new(false),
            urgent: AtomicBool::new(false),
        });
        flights.insert(id, flight.clone());
        Boarding::Fresh(Waiter { flight, outcome })
    }

    /// Whether `id` is on its way.
    pub(crate) fn contains(&self, id: FrameId) -> bool {
        self.0.lock().contains_key(&id)
    }

    /// Ends a flight. What was fetched must be in memory already.
    pub(crate) fn land(&self, flight: &Arc<Flight>, outcome: Outcome) {
        self.remove(&mut self.0.lock(), flight);
        // the first outcome stands
        flight.outcome.send_if_modified(|landed| {
            let first = landed.is_none();
            landed.get_or_insert(outcome);
            first
        });
    }

    /// Ends a flight that nobody waits for, after running `keep`. False, and nothing done, if somebody does.
    pub(crate) fn land_unwatched(&self, flight: &Arc<Flight>, keep: impl FnOnce()) -> bool {
        let mut flights = self.0.lock();
        if flight.outcome.receiver_count() > 0 {
            return false;
        }
        keep();
        self.remove(&mut flights, flight);
        true
    }

    fn remove(&self, flights: &mut HashMap<FrameId, Arc<Flight>>, flight: &Arc<Flight>) {
        if flights.get(&flight.id).is_some_and(|current| Arc::ptr_eq(current, flight)) {
            flights.remove(&flight.id);
        }
    }
}
