//! Filling the disk with what nobody waits for: an image that is prefetched, or what a mount has left out.
//!
//! A job asks for frames in the order in which they lie in packs, some megabytes at a time. Between two such batches it makes way
//! for readers, keeps to its rate, and can be paused or cancelled.
//!
//! What is here when a job begins, such as what a start has read, stays until it ends: otherwise it would be the oldest, and the
//! first to go. `fill/stay.rs` says how much. A job whose own frames do not come to disk, or go again before it has ended, is of
//! no use any more, and ends.

mod job;
mod stay;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lamina_cache::{Cache, Source, Want};
use lamina_image::{Digest, Tree};
use lamina_mount::Mount;
use lamina_wire::Reference;
use lamina_wire::proto::{FillRequest, FillStats, MountRequest, PrefetchRequest, PrefetchResponse};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::field::Empty;
use tracing::{Span, info_span};

use self::job::{Job, State};
use self::stay::Stays;
use crate::daemon::Asked;
use crate::image::Wish;
use crate::resolve::resolve;
use crate::sources::Sources;
use crate::spans::Within;
use crate::tree::Turns;
use crate::{Found, Node, NodeError};

/// Asked for at once, in bytes of frames: several requests of the largest range, so that a link stays full, and little enough
/// that a reader who comes does not wait long for what is under way.
const BATCH_BYTES: u64 = 4 << 20;
/// A job asks again after this long when nobody answers.
const RETRY: Duration = Duration::from_secs(1);
/// How often what was touched is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// A start that has read nothing new for so long is over, and one that has not begun by then does not hold filling up.
const QUIET: Duration = Duration::from_secs(5);
/// Nor does one that never ends.
const START_MAX: Duration = Duration::from_secs(120);
/// What has come is on its way to the disk for no longer than this.
const WRITTEN: Duration = Duration::from_secs(20);
/// Jobs that have ended are remembered up to this many.
const ENDED_MAX: usize = 64;
/// What is filled may take this part of the cache, in percent: the rest is for what is read besides.
const CACHE_PERCENT: u64 = 90;

/// Why frames of a job do not stay, and what to do.
const FULL: &str =
    "the cache is full of what is read or pinned: make it larger (--cache-mib), or its disk fails";

/// What says that filling is paused, where it is kept.
pub(crate) const PAUSED: &str = "paused";

/// What is fetched though nobody reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    None,
    /// The rest of the files that were read, or booted, while this process has served the mount.
    Touched,
    /// Everything, once the start is over.
    All,
    /// Everything, at once and as fast as it comes.
    Bulk,
}

impl Policy {
    pub(crate) fn of(text: &str) -> Result<Self, NodeError> {
        match text {
            "" | "none" => Ok(Self::None),
            "touched" => Ok(Self::Touched),
            "all" => Ok(Self::All),
            "bulk" => Ok(Self::Bulk),
            _ => {
                Err(NodeError::Request(format!("a mount is filled none, touched, all or bulk, not {text:?}")))
            }
        }
    }
}

/// How fast a job may go.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Only while nobody reads.
    idle: bool,
    /// 0 for no bound.
    bytes_per_s: u64,
}

/// All jobs of a node.
#[derive(Debug)]
pub(crate) struct Fills {
    paused: watch::Sender<bool>,
    jobs: Mutex<BTreeMap<u64, Arc<Job>>>,
    next: AtomicU64,
    pub(crate) stays: Stays,
}

impl Fills {
    /// No jobs yet.
    pub(crate) fn new(paused: bool) -> Self {
        let (paused, _) = watch::channel(paused);
        Self { paused, jobs: Mutex::default(), next: AtomicU64::new(1), stays: Stays::default() }
    }

    fn begin(&self, reference: &Reference, directory: Option<PathBuf>) -> Arc<Job> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (cancelled, _) = watch::channel(false);
        let job = Arc::new(Job {
            number,
            reference: reference.to_string(),
            directory,
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            state: Mutex::new(State::Running),
            cancelled,
            within: Within::default(),
        });
        let mut jobs = self.jobs.lock();
        let ended: Vec<u64> =
            jobs.iter().filter(|(_, job)| job.has_ended()).map(|(number, _)| *number).collect();
        for old in ended.iter().take(ended.len().saturating_sub(ENDED_MAX - 1)) {
            jobs.remove(old);
        }
        jobs.insert(number, Arc::clone(&job));
        job
    }

    /// Pauses, goes on, or cancels.
    fn control(&self, request: &FillRequest) -> Result<(), NodeError> {
        match request.action.as_str() {
            "pause" => drop(self.paused.send_replace(true)),
            "resume" => drop(self.paused.send_replace(false)),
            "cancel" => {
                let job = self.jobs.lock().get(&request.job).cloned();
                let none = || NodeError::Request(format!("there is no job {}", request.job));
                job.ok_or_else(none)?.cancelled.send_replace(true);
            }
            other => return Err(NodeError::Request(format!("filling cannot {other:?}"))),
        }
        Ok(())
    }

    pub(crate) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    pub(crate) fn stats(&self) -> Vec<FillStats> {
        self.jobs.lock().values().map(|job| job.stats()).collect()
    }

    async fn fill(
        &self,
        job: &Job,
        cache: &Cache,
        source: &Arc<dyn Source>,
        wants: &[Want],
        pace: Pace,
    ) -> bool {
        let (mut first, mut first_here_max) = (&[][..], 0);
        for batch in batches(wants) {
            let came = loop {
                // the sender lives as long as this does
                let _ = self.paused.subscribe().wait_for(|paused| !paused).await;
                if pace.idle {
                    cache.idle().await;
                }
                let begun = Instant::now();
                match cache.fill(source, batch).await {
                    Ok(came) => break (came, begun.elapsed()),
                    Err(error) if error.is_passing() => {
                        job.set(State::Waiting(error.to_string()));
                        sleep(RETRY).await;
                    }
                    Err(error) => {
                        tracing::warn!(reference = job.reference, %error, "filling ends");
                        job.set(State::Failed(error.to_string()));
                        return false;
                    }
                }
            };
            job.set(State::Running);
            job.done.fetch_add(batch.iter().map(bytes).sum(), Ordering::Relaxed);
            if first.is_empty() {
                first = batch;
                written(|| first.iter().any(|want| cache.is_on_disk(want.id))).await;
            }
            let first_here = first.iter().filter(|want| cache.is_on_disk(want.id)).count();
            first_here_max = first_here.max(first_here_max);
            // a few may have been damaged
            if first_here == 0 || 2 * first_here < first_here_max {
                let what = if first_here_max == 0 { "does not come to disk" } else { "has gone again" };
                job.set(State::Failed(format!("what came first {what}; {FULL}")));
                return false;
            }
            if let Some(ms) = (came.0 * 1000).checked_div(pace.bytes_per_s) {
                sleep(Duration::from_millis(ms).saturating_sub(came.1)).await;
            }
        }
        true
    }
}

/// Waits until what has come is on disk, or will not be.
async fn written(is_on_disk: impl Fn() -> bool) {
    let waits = async {
        while !is_on_disk() {
            sleep(WRITTEN / 200).await;
        }
    };
    // what is missing then is for the caller to see
    let _ = timeout(WRITTEN, waits).await;
}

fn bytes(want: &Want) -> u64 {
    u64::from(want.place.frame.sealed_len)
}

/// Consecutive parts of about [`BATCH_BYTES`].
fn batches(wants: &[Want]) -> impl Iterator<Item = &[Want]> {
    let mut rest = wants;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let end = rest.iter().position(|want| {
            sum += bytes(want);
            sum >= BATCH_BYTES
        });
        let (batch, after) = rest.split_at(end.map_or(rest.len(), |at| at + 1));
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// Frames of a tree by number, in the order in which they lie in packs.
pub(crate) fn wants(tree: &Tree, numbers: impl Iterator<Item = u32>) -> Vec<Want> {
    let frame = |number| tree.frame(number).ok().map(|(id, place)| Want { id, place });
    let mut wants: Vec<Want> = numbers.filter_map(frame).collect();
    wants.sort_unstable_by_key(|want| (*want.place.pack.as_bytes(), want.place.frame.offset));
    wants.dedup_by_key(|want| want.id);
    wants
}

impl Node {
    /// Begins to bring an image to disk, without mounting it.
    pub async fn prefetch(self: &Arc<Self>, request: PrefetchRequest) -> Result<PrefetchResponse, NodeError> {
        let busy = self.busy();
        let reference: Reference = request.reference.parse()?;
        let (found, tree, sources) = self.image(&reference, request.plain_http).await?;
        let wants = wants(&tree, 0..tree.frames());
        self.must_fit(&reference.to_string(), &wants)?;
        let job = self.fills.begin(&reference, None);
        let pace = Pace { idle: request.idle, bytes_per_s: request.bytes_per_s };
        let (node, number) = (Arc::clone(self), job.number);
        let source: Arc<dyn Source> = Arc::new(sources.part_of(&job.within));
        tokio::spawn(async move {
            if node.bring(&job, &source, &wants, pace).await {
                node.finish(&job, &wants);
            }
            drop(busy);
        });
        let (manifest, pid) = (found.manifest.to_string(), std::process::id());
        Ok(PrefetchResponse { manifest, job: number, pid })
    }

    /// Pauses all jobs, goes on with them, or cancels one. That they are paused outlives this process where it has a holder: the
    /// next daemon would fill what the one before was told to leave alone.
    pub fn control_fills(&self, request: &FillRequest) -> Result<(), NodeError> {
        self.fills.control(request)?;
        if request.action == "pause" {
            // any descriptor does; this one is kept anyway
            let path = self.config.cache.directory.clone();
            self.held.keep(PAUSED, self.cache.lock().map_err(|error| NodeError::File { path, error })?);
        } else if request.action == "resume" {
            self.held.forget(PAUSED);
        }
        Ok(())
    }

    /// An image, its tree, and who has it.
    pub(crate) async fn image(
        &self,
        reference: &Reference,
        plain_http: bool,
    ) -> Result<(Found, Arc<Tree>, Sources), NodeError> {
        let sources = self.hosts.sources(reference, plain_http)?;
        let wish =
            Wish { platform: &self.config.platform, require_bound: false, start: false, command: None };
        let deadline = self.config.cache.deadline;
        let found = resolve(&sources, &self.known, reference, wish, deadline).await?.found;
        sources.are_of(found.manifest);
        let mut asked = Asked::new(reference.clone(), sources.clone());
        let tree = self.tree(&mut asked, &found, Turns::alone()).await?;
        Ok((found, tree, sources))
    }

    /// Fills a mount of `image` as it was asked for when it was made.
    pub(crate) fn fill_mount(self: &Arc<Self>, mount: &Arc<Mount>, request: &MountRequest, image: Digest) {
        // both were looked at before there was a mount
        let (Ok(policy), Ok(asked)) = (Policy::of(&request.fill), self.ask(request)) else { return };
        if policy == Policy::None {
            return;
        }
        asked.sources.are_of(image);
        let job = self.fills.begin(&asked.reference, Some(mount.mountpoint().to_owned()));
        let source: Arc<dyn Source> = Arc::new(asked.sources.part_of(&job.within));
        let (node, mount) = (Arc::clone(self), Arc::clone(mount));
        let (bytes_per_s, lazy) = (request.fill_bytes_per_s, request.require_lazy);
        tokio::spawn(async move {
            let filling = async {
                tokio::select! {
                    () = mount.contents(policy == Policy::Bulk) => {}
                    () = job.until_cancelled() => return job.set(State::Cancelled),
                }
                if policy != Policy::Bulk {
                    start_is_over(&mount).await;
                }
                let idle = policy != Policy::Bulk && (lazy || !is_dense(&mount));
                node.filling(&job, &mount, &source, policy, Pace { idle, bytes_per_s }).await;
            };
            tokio::select! {
                () = filling => {}
                () = mount.wait() => job.set(State::Cancelled),
            }
        });
    }

    async fn filling(&self, job: &Job, mount: &Mount, source: &Arc<dyn Source>, policy: Policy, pace: Pace) {
        loop {
            let tree = mount.tree();
            let wants = match policy {
                Policy::Touched => wants(tree, mount.touched_frames().into_iter()),
                _ => wants(tree, 0..tree.frames()),
            };
            if let Err(error) = self.must_fit(&job.reference, &wants) {
                tracing::warn!(%error, "a mount is not filled");
                return job.set(State::Failed(error.to_string()));
            }
            if !self.bring(job, source, &wants, pace).await {
                return;
            }
            if policy != Policy::Touched {
                // nothing is amiss where there is no room for whole files: the frames are here
                return tokio::select! {
                    () = mount.make_whole() => self.finish(job, &wants),
                    () = job.until_cancelled() => job.set(State::Cancelled),
                };
            }
            sleep(LOOK).await;
        }
    }

    /// Brings `wants` to disk, where what is there already stays meanwhile; whether all came, and the state is still to be set.
    /// What came is written by then, if the disk takes it.
    async fn bring(&self, job: &Job, source: &Arc<dyn Source>, wants: &[Want], pace: Pace) -> bool {
        let cache = &self.cache;
        let (here, far): (Vec<Want>, Vec<Want>) = wants.iter().partition(|want| cache.is_on_disk(want.id));
        job.total.store(wants.iter().map(bytes).sum(), Ordering::Relaxed);
        job.done.store(here.iter().map(bytes).sum(), Ordering::Relaxed);
        let span = match far.is_empty() {
            true => Span::none(),
            false => info_span!(
                "fill",
                image = job.reference,
                bytes = far.iter().map(bytes).sum::<u64>(),
                state = Empty
            ),
        };
        let _during = job.within.during(span.clone());
        let begin = || self.fills.stays.begin(cache, &self.pins, job.number, &here);
        let _stay = (!far.is_empty()).then(begin);
        let filled = tokio::select! {
            filled = self.fills.fill(job, cache, source, &far, pace) => filled,
            () = job.until_cancelled() => {
                job.set(State::Cancelled);
                false
            }
        };
        // what has come and is not written yet would push out what is to stay
        if filled {
            written(|| far.iter().all(|want| cache.is_on_disk(want.id))).await;
        } else {
            cache.flushed().await;
        }
        span.record("state", if filled { "done" } else { job.state() });
        filled
    }

    /// Everything came. Whether it is there is for the disk to say.
    fn finish(&self, job: &Job, wants: &[Want]) {
        let gone = wants.iter().filter(|want| !self.cache.is_on_disk(want.id)).count();
        job.set(match gone {
            0 => State::Done,
            _ => State::Failed(format!("{gone} of {} frames came and are not on disk; {FULL}", wants.len())),
        });
    }

    fn must_fit(&self, reference: &str, wants: &[Want]) -> Result<(), NodeError> {
        let bytes = wants.iter().map(bytes).sum();
        let bytes_max = self.config.cache.bytes_max / 100 * CACHE_PERCENT;
        match bytes > bytes_max {
            true => Err(NodeError::TooLarge { reference: reference.to_owned(), bytes, bytes_max }),
            false => Ok(()),
        }
    }
}

async fn start_is_over(mount: &Mount) {
    let begun = Instant::now();
    loop {
        sleep(LOOK / 4).await;
        let quiet = mount.quiet().unwrap_or_else(|| begun.elapsed());
        if quiet >= QUIET || begun.elapsed() >= START_MAX {
            return;
        }
    }
}

/// Whether the start alone read half of the image: then the rest is fetched as fast as it comes, since it will be read as well.
fn is_dense(mount: &Mount) -> bool {
    let seen = mount.snapshot();
    2 * (seen.read_bytes + seen.boot_stored_bytes) >= mount.tree().file_bytes()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use bytes::Bytes;
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use lamina_cache::{CacheConfig, Class, Pieces, SourceError};
    use lamina_chunk::{Chunk, Frame, FrameId, PackId, Place};
    use tokio::runtime::Handle;

    use super::*;

    #[test]
    fn batches_cover_everything_once_and_are_of_some_megabytes() {
        let want = |n: u32| {
            let frame = Frame { offset: n, sealed_len: 1 << 20, plain_len: 1 << 20 };
            Want {
                id: FrameId::of(&n.to_le_bytes()),
                place: Place { pack: PackId::from_bytes([1; 32]), frame },
            }
        };
        let wants: Vec<Want> = (0..10).map(want).collect();
        let lens: Vec<usize> = batches(&wants).map(<[Want]>::len).collect();
        assert_eq!(lens, [4, 4, 2]);
        assert_eq!(batches(&wants).flatten().count(), 10);
        assert_eq!(batches(&[]).count(), 0);
    }

    /// Frames that do not compress, one after the other, and how much of them was asked for.
    struct Pack {
        bytes: Bytes,
        asked_bytes: AtomicU64,
    }

    impl Source for Pack {
        fn stream(
            &self,
            _pack: PackId,
            range: Range<u64>,
            _class: Class,
        ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
            let small = |at: u64| usize::try_from(at).unwrap();
            self.asked_bytes.fetch_add(range.end - range.start, Ordering::SeqCst);
            let body = self.bytes.slice(small(range.start)..small(range.end));
            async move { Ok(Pieces::whole(body)) }.boxed()
        }
    }

    const FRAME_BYTES: u32 = 256 << 10;

    fn pack(count: u32) -> (Arc<Pack>, Vec<Want>) {
        let frame = |n: u32| n.to_le_bytes().repeat(FRAME_BYTES as usize / 4);
        let bytes: Bytes = (0..count).flat_map(frame).collect();
        let want = |n: u32| {
            let place = Frame { offset: n * FRAME_BYTES, sealed_len: FRAME_BYTES, plain_len: FRAME_BYTES };
            let id = Chunk::cut(Bytes::from(frame(n))).id();
            Want { id, place: Place { pack: PackId::from_bytes([1; 32]), frame: place } }
        };
        (Arc::new(Pack { bytes, asked_bytes: AtomicU64::new(0) }), (0..count).map(want).collect())
    }

    /// Fills a cache of so many bytes, in which the first 15 frames are pinned, with 49 others: how many were asked for, and the
    /// job's state.
    async fn filled(bytes_max: u64, doomed: bool) -> (u64, State) {
        let directory = tempfile::tempdir().unwrap();
        let config = CacheConfig::new(directory.path().join("cache"), bytes_max);
        let cache = Cache::open(config, Handle::current()).unwrap();
        let (pack, wants) = pack(64);
        let source: Arc<dyn Source> = pack.clone();
        let (pinned, far) = wants.split_at(15);
        cache.pin(pinned.iter().map(|want| want.id));
        cache.fill(&source, pinned).await.unwrap();
        written(|| pinned.iter().all(|want| cache.is_on_disk(want.id))).await;
        assert!(pinned.iter().all(|want| cache.is_on_disk(want.id)));
        let before = pack.asked_bytes.load(Ordering::SeqCst);
        if doomed {
            // nobody need wait for what does not come
            tokio::time::pause();
        }
        let fills = Fills::new(false);
        let job = fills.begin(&"registry/a:t".parse().unwrap(), None);
        let pace = Pace { idle: false, bytes_per_s: 0 };
        assert_eq!(fills.fill(&job, &cache, &source, far, pace).await, !doomed);
        let asked = pack.asked_bytes.load(Ordering::SeqCst) - before;
        (asked / u64::from(FRAME_BYTES), job.state.lock().clone())
    }

    #[tokio::test]
    async fn a_job_fetches_all_where_there_is_room_and_one_batch_where_nothing_comes_to_disk() {
        let (asked, state) = filled(64 << 20, false).await;
        assert!(asked == 49 && matches!(state, State::Running), "{asked} frames, {state:?}");
        let (asked, state) = filled(4 << 20, true).await;
        let State::Failed(reason) = state else { panic!("{asked} frames, {state:?}") };
        assert!(asked == 16 && reason.contains("--cache-mib"), "{asked} frames, {reason}");
    }
}
