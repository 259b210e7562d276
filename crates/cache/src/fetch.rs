//! Bringing in what is not in memory: from disk, else from a source.
//!
//! Every fetch runs as a task of its own, so a reader that goes away takes nothing from the others. A job is one range
//! of one pack; it takes its frames on only once it has a slot, so a frame that somebody waits for leaves a job that
//! still queues and goes ahead with the demand class.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lamina_chunk::{Chunk, Frame, FrameId, Opening, PackId, Place, Sealed};
use tokio::time::timeout;

use crate::body::Body;
use crate::cache::Shared;
use crate::flight::Flight;
use crate::metrics::add;
use crate::plan::{Bounds, runs, span};
use crate::{CacheError, Class};

/// A frame that is wanted, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The frame: the hash of its plaintext.
    pub id: FrameId,
    /// Where.
    pub place: Place,
}

/// Frames of at most this much plaintext are opened where they arrive (one of the largest: 280 µs); more go to
/// the blocking pool, where they do not hold up other tasks.
const OPEN_INLINE_BYTES: usize = 256 << 10;

/// A frame is asked for so often when what comes does not verify.
const WRONG_MAX: u32 = 4;
/// Before it is asked for the third time, and twice as long before the fourth: what is between here and there may mend.
const WRONG_PAUSE: Duration = Duration::from_millis(250);

/// One frame of a job.
#[derive(Clone)]
pub(crate) struct Leg {
    pub(crate) want: Want,
    pub(crate) flight: Arc<Flight>,
    /// Whether it was asked for, or only came along.
    pub(crate) needed: bool,
}

impl Leg {
    fn frame(&self) -> Frame {
        self.want.place.frame
    }
}

/// Legs that are fetched as one range of one pack, sorted by offset.
struct Job {
    pack: PackId,
    legs: Vec<Leg>,
}

/// Claimed legs. Those that have not landed when it is dropped land as stopped, so that nobody waits for ever.
struct Claimed {
    shared: Arc<Shared>,
    legs: Vec<Leg>,
}

impl Claimed {
    /// A leg is no longer ours to land.
    fn landed(&mut self, landed: &Leg) {
        self.legs.retain(|leg| leg.want.id != landed.want.id);
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        for leg in &self.legs {
            self.shared.flights.land(&leg.flight, Err(CacheError::Stopped(leg.want.id)));
        }
    }
}

/// Starts fetching `legs`: those on disk from there, the rest from the source.
pub(crate) fn start(shared: &Arc<Shared>, legs: Vec<Leg>, class: Class) {
    let (local, remote): (Vec<Leg>, Vec<Leg>) = legs.into_iter().partition(|leg| shared.on_disk(leg.want.id));
    if !local.is_empty() {
        let handle = shared.clone();
        shared.handle.spawn_blocking(move || from_disk(&handle, local, class));
    }
    from_source(shared, remote, class);
}

/// Reads and opens frames; what is damaged goes on to the source.
fn from_disk(shared: &Arc<Shared>, legs: Vec<Leg>, class: Class) {
    let mut missing = Vec::new();
    for leg in legs {
        match shared.read_disk(leg.want.id) {
            Some(chunk) => {
                if leg.flight.claim() {
                    let ahead = (class != Class::Demand).then_some(leg.frame().sealed_len as usize);
                    shared.memory.insert(chunk.clone(), ahead);
                    shared.flights.land(&leg.flight, Ok(chunk));
                }
            }
            None => missing.push(leg),
        }
    }
    from_source(shared, missing, class);
}

/// Plans the ranges and starts a task for each.
fn from_source(shared: &Arc<Shared>, mut legs: Vec<Leg>, class: Class) {
    legs.sort_by_key(|leg| (*leg.want.place.pack.as_bytes(), leg.frame().offset));
    let bounds = Bounds { gap: shared.config.gap_bytes_max, range: shared.config.range_bytes_max };
    for of_pack in legs.chunk_by(|a, b| a.want.place.pack == b.want.place.pack) {
        let frames: Vec<Frame> = of_pack.iter().map(Leg::frame).collect();
        for run in runs(&frames, bounds) {
            let job = Job { pack: of_pack[0].want.place.pack, legs: of_pack[run].to_vec() };
            shared.handle.spawn(fly(shared.clone(), job, class));
        }
    }
}

/// Counts a request that filling makes way for.
struct Busy(Arc<Shared>);

impl Busy {
    fn begin(shared: &Arc<Shared>) -> Self {
        shared.busy.send_modify(|busy| *busy += 1);
        Self(shared.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}

/// Waits for a slot, fetches, opens, delivers.
async fn fly(shared: Arc<Shared>, job: Job, class: Class) {
    let _busy = (class != Class::Fill).then(|| Busy::begin(&shared));
    // the semaphores live as long as the cache and are never closed
    let Ok(slot) = shared.slots(class).clone().acquire_owned().await else { return };
    let legs: Vec<Leg> = job.legs.into_iter().filter(|leg| leg.flight.claim()).collect();
    if legs.is_empty() {
        return;
    }
    let mut left = legs.clone();
    let mut claimed = Claimed { shared: shared.clone(), legs };
    let begun = Instant::now();
    let mut damaged = Vec::new();
    loop {
        let before = left.len();
        let received = receive(&mut claimed, job.pack, left, class, begun).await;
        damaged.extend(received.damaged);
        left = received.left;
        let Some(error) = received.error else { break };
        // a connection that breaks off may hold the next time: as long as frames come, the rest is asked for again
        if !error.is_passing() || left.len() == before {
            fail(&mut claimed, &left, &error);
            break;
        }
    }
    again(&mut claimed, job.pack, damaged, class).await;
    drop(slot);
}

/// What one request came to. The legs in it stay claimed.
#[derive(Default)]
struct Received {
    /// What did not verify.
    damaged: Vec<Leg>,
    /// What did not come.
    left: Vec<Leg>,
    /// Why it did not.
    error: Option<RequestError>,
}

/// One request: each frame is opened and landed as soon as its last byte has come.
async fn receive(
    claimed: &mut Claimed,
    pack: PackId,
    legs: Vec<Leg>,
    class: Class,
    begun: Instant,
) -> Received {
    let shared = claimed.shared.clone();
    let mut waiting = VecDeque::from(legs);
    if let Some(sample) = waiting.front_mut().filter(|_| class != Class::Demand) {
        // one is opened in any case, so that who sends wrong bytes is known soon
        sample.needed = true;
    }
    let frames: Vec<Frame> = waiting.iter().map(Leg::frame).collect();
    let range = span(&frames);
    let mut received = Received::default();
    let mut body = Body::new(range.start);
    add(&shared.counters.source_requests, 1);
    let source = waiting[0].flight.source.clone();
    let mut first = First::of(&waiting[0], class);
    let mut answer = match shared.within(begun, source.stream(pack, range.clone(), class)).await {
        Ok(answer) => answer,
        Err(error) => return Received { left: waiting.into(), error: Some(error), ..received },
    };
    while !waiting.is_empty() {
        let next = async { answer.next().await.unwrap_or_else(|| Err(ended_early(pack))) };
        let piece = match shared.within(begun, next).await {
            Ok(piece) => piece,
            Err(error) => {
                received.error = Some(error);
                break;
            }
        };
        add(&shared.counters.source_bytes, piece.len());
        if let Some(first) = &mut first {
            first.take(&piece);
        }
        body.push(piece);
        let mut ready = Vec::new();
        while let Some(leg) = waiting.pop_front_if(|leg| leg.frame().end() <= body.end()) {
            let sealed = body.cut_out(leg.frame());
            ready.push((leg, sealed));
        }
        if !ready.is_empty() {
            let damaged = deliver(claimed, ready, first.take(), class).await;
            if !damaged.is_empty() {
                source.distrust(pack, answer.origin);
            }
            received.damaged.extend(damaged);
        }
    }
    let come = frames.len() - waiting.len();
    let wanted: u64 = frames[..come].iter().map(|frame| u64::from(frame.sealed_len)).sum();
    let gaps = (body.end() - range.start).saturating_sub(wanted);
    add(&shared.counters.source_gap_bytes, usize::try_from(gaps).unwrap_or(usize::MAX));
    received.left = waiting.into();
    received
}

/// The frame that a reader waits for, opened while it comes.
struct First {
    id: FrameId,
    opening: Opening,
}

impl First {
    /// Of the first leg of a request, which its answer begins with.
    fn of(leg: &Leg, class: Class) -> Option<Self> {
        let Frame { sealed_len, plain_len, .. } = leg.frame();
        let opening = || Opening::new(leg.want.id, plain_len as usize, sealed_len as usize);
        let is_waited_for = class == Class::Demand && leg.needed;
        Some(Self { id: leg.want.id, opening: is_waited_for.then(opening).flatten()? })
    }

    /// Takes in what comes next of the answer.
    fn take(&mut self, piece: &[u8]) {
        let lacking = self.opening.sealed_len() - self.opening.taken();
        let piece = &piece[..piece.len().min(lacking)];
        if !piece.is_empty() {
            self.opening.take(piece);
        }
    }
}

/// What a source did whose answer is shorter than it said.
fn ended_early(pack: PackId) -> crate::SourceError {
    #[derive(Debug, thiserror::Error)]
    #[error("the answer ended before its last byte")]
    struct EndedEarly;
    crate::SourceError::Unreachable { pack, cause: Arc::new(EndedEarly) }
}

/// Tells everybody who waits for `legs` that the request failed.
fn fail(claimed: &mut Claimed, legs: &[Leg], error: &RequestError) {
    for leg in legs {
        claimed.landed(leg);
        claimed.shared.flights.land(&leg.flight, Err(error.of(leg.want.id)));
    }
}

/// Opens and lands what arrived, and gives it to the disk. Returns what did not verify, which stays claimed.
async fn deliver(
    claimed: &mut Claimed,
    ready: Vec<(Leg, Sealed)>,
    first: Option<First>,
    class: Class,
) -> Vec<Leg> {
    let shared = claimed.shared.clone();
    let mut opening = Vec::new();
    let mut keep = Vec::new();
    for (leg, sealed) in ready {
        let (id, sealed_too) = (leg.want.id, sealed.clone());
        let keep_sealed = || shared.memory.insert_sealed(id, sealed_too);
        if !leg.needed && shared.flights.land_unwatched(&leg.flight, keep_sealed) {
            shared.count_fetched(&sealed, true);
            claimed.landed(&leg);
            keep.push((id, sealed));
            continue;
        }
        opening.push((leg, sealed));
    }
    let ids: Vec<FrameId> = opening.iter().map(|(leg, _)| leg.want.id).collect();
    let plain: usize = opening.iter().map(|(leg, _)| leg.frame().plain_len as usize).sum();
    let opened = if plain <= OPEN_INLINE_BYTES {
        open_all(&shared, opening, first, class)
    } else {
        let opener = shared.clone();
        let opened = shared.handle.spawn_blocking(move || open_all(&opener, opening, first, class)).await;
        // stopping: what has not landed stays claimed, and lands as stopped
        let Ok(opened) = opened else { return Vec::new() };
        opened
    };
    let is_damaged = |id| opened.damaged.iter().any(|leg| leg.want.id == id);
    claimed.legs.retain(|leg| !ids.contains(&leg.want.id) || is_damaged(leg.want.id));
    keep.extend(opened.good);
    for (id, sealed) in keep {
        match class {
            Class::Demand => shared.writer.push(id, sealed),
            _ => shared.writer.push_when_room(id, sealed, class == Class::Fill).await,
        }
    }
    opened.damaged
}

#[derive(Default)]
struct Opened {
    /// To be kept on disk as soon as there is room.
    good: Vec<(FrameId, Sealed)>,
    damaged: Vec<Leg>,
}

/// Opens frames and lands each as soon as it is open.
fn open_all(shared: &Shared, frames: Vec<(Leg, Sealed)>, mut first: Option<First>, class: Class) -> Opened {
    let mut opened = Opened::default();
    for (leg, sealed) in frames {
        let chunk = match first.take_if(|first| first.id == leg.want.id) {
            // what only the other way of opening takes is good as well
            Some(first) => first.opening.finish().or_else(|_| sealed.open(leg.want.id)),
            None => sealed.open(leg.want.id),
        };
        match chunk {
            Ok(chunk) => {
                shared.arrived(&leg, chunk, &sealed, class);
                if class != Class::Demand {
                    opened.good.push((leg.want.id, sealed));
                }
            }
            Err(_) => {
                add(&shared.counters.verify_failures, 1);
                opened.damaged.push(leg);
            }
        }
    }
    opened
}

/// Fetches damaged frames anew, each alone and all of them between two pauses; it is an error when what comes is wrong each time.
async fn again(claimed: &mut Claimed, pack: PackId, damaged: Vec<Leg>, class: Class) {
    let mut wanting: Vec<(Leg, Option<RequestError>)> = damaged.into_iter().map(|leg| (leg, None)).collect();
    for times in 1..WRONG_MAX {
        if wanting.is_empty() {
            return;
        }
        tokio::time::sleep(WRONG_PAUSE * (times - 1)).await;
        let mut still = Vec::new();
        for (leg, _) in wanting {
            let mut received = receive(claimed, pack, vec![leg], class, Instant::now()).await;
            let Some(leg) = received.damaged.pop().or(received.left.pop()) else { continue };
            match received.error {
                Some(error) if !error.is_passing() => fail(claimed, &[leg], &error),
                error => still.push((leg, error)),
            }
        }
        wanting = still;
    }
    for (leg, error) in wanting {
        claimed.landed(&leg);
        let id = leg.want.id;
        let error = error.map_or(CacheError::Damaged(id), |error| error.of(id));
        claimed.shared.flights.land(&leg.flight, Err(error));
    }
}

/// An error of a request, before it is told to each frame.
pub(crate) enum RequestError {
    Source(crate::SourceError),
    Deadline(Duration),
}

impl RequestError {
    /// Whether asking again may help. Not after the deadline: whoever has time left asks by itself.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Source(crate::SourceError::Unreachable { .. }))
    }

    fn of(&self, id: FrameId) -> CacheError {
        match self {
            Self::Source(cause) => CacheError::Source { id, cause: cause.clone() },
            Self::Deadline(waited) => CacheError::Deadline { id, waited: *waited },
        }
    }
}

impl Shared {
    /// What a source does, as far as it is done before the deadline of a request that began then.
    async fn within<T>(
        &self,
        begun: Instant,
        work: impl Future<Output = Result<T, crate::SourceError>>,
    ) -> Result<T, RequestError> {
        let deadline = self.config.deadline;
        let result = match timeout(deadline.saturating_sub(begun.elapsed()), work).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(cause)) => RequestError::Source(cause),
            Err(_) => RequestError::Deadline(deadline),
        };
        add(&self.counters.source_failures, 1);
        Err(result)
    }

    /// Keeps a frame that was fetched and tells whoever waits.
    fn arrived(&self, leg: &Leg, chunk: Chunk, sealed: &Sealed, class: Class) {
        let ahead = !leg.flight.is_urgent();
        self.count_fetched(sealed, ahead);
        if class != Class::Fill || !ahead {
            self.memory.insert(chunk.clone(), ahead.then_some(sealed.bytes().len()));
        }
        if class == Class::Demand {
            // before the reader goes on, so that what was read once is kept however soon the process ends
            self.writer.push(leg.want.id, sealed.clone());
        }
        self.flights.land(&leg.flight, Ok(chunk));
    }

    fn count_fetched(&self, sealed: &Sealed, ahead: bool) {
        add(&self.counters.source_frames, 1);
        if ahead {
            add(&self.counters.ahead_frames, 1);
            add(&self.counters.ahead_bytes, sealed.bytes().len());
        }
    }
}
