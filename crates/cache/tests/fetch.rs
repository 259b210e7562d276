//! Fetching from a source that counts, stalls and lies.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::{FutureExt, StreamExt, stream};
use lamina_cache::{Cache, CacheConfig, CacheError, Class, Pieces, Source, SourceError, Want};
use lamina_chunk::{Chunk, Level, PackBuilder, PackId, PackedChunk, Place, Sealer};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// How the next answers go wrong, one each.
#[derive(Clone, Copy)]
enum Fault {
    Missing,
    FlipBits,
    CutShort,
    Hang,
    /// Nobody is there.
    Down,
    /// Half of it comes, then the connection breaks.
    BreakOff,
}

/// Packs in memory.
struct MemorySource {
    packs: HashMap<PackId, Bytes>,
    requests: Mutex<Vec<(Range<u64>, Class)>>,
    faults: Mutex<Vec<Fault>>,
    /// One permit lets one answer out.
    gate: Semaphore,
    begun: AtomicUsize,
}

impl MemorySource {
    async fn whole(&self, pack: PackId, range: Range<u64>, class: Class) -> Result<Bytes, SourceError> {
        self.requests.lock().push((range.clone(), class));
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await.expect("open").forget();
        let fault = self.faults.lock().pop();
        let pack = self.packs.get(&pack).ok_or(SourceError::Missing(pack))?;
        let range = usize::try_from(range.start).expect("small")..usize::try_from(range.end).expect("small");
        let body = pack.slice(range);
        match fault {
            None => Ok(body),
            Some(Fault::Missing) => Err(SourceError::Missing(PackId::from_bytes([9; 32]))),
            Some(Fault::FlipBits) => Ok(body.iter().map(|byte| byte ^ 1).collect()),
            Some(Fault::CutShort) => Ok(body.slice(..body.len() / 2)),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Down | Fault::BreakOff) => Err(unreachable(PackId::from_bytes([7; 32]))),
        }
    }
}

impl Source for MemorySource {
    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        async move {
            let breaks = matches!(self.faults.lock().last(), Some(Fault::BreakOff));
            if breaks {
                self.faults.lock().pop();
            }
            let body = self.whole(pack, range, class).await?;
            let pieces = match breaks {
                true => vec![Ok(body.slice(..body.len() / 2)), Err(unreachable(pack))],
                false => vec![Ok(body)],
            };
            Ok(Pieces::new(stream::iter(pieces).boxed()))
        }
        .boxed()
    }
}

fn unreachable(pack: PackId) -> SourceError {
    SourceError::Unreachable { pack, cause: Arc::new(std::io::Error::other("nobody is there")) }
}

struct Rig {
    cache: Arc<Cache>,
    memory: Arc<MemorySource>,
    source: Arc<dyn Source>,
    chunks: Vec<Chunk>,
    wants: Vec<Want>,
    _directory: tempfile::TempDir,
}

/// Many chunks of about 10,000 bytes that do not compress.
fn chunks(count: u32) -> Vec<Chunk> {
    let noise = |n: u32| {
        (0..300u32).flat_map(move |at| {
            *lamina_chunk::ChunkId::of(&[n.to_le_bytes(), at.to_le_bytes()].concat()).as_bytes()
        })
    };
    (0..count).map(|n| Chunk::cut(noise(n).collect())).collect()
}

fn packed(chunks: &[Chunk]) -> (PackId, Bytes, Vec<Want>) {
    let (mut pack, mut sealer) = (PackBuilder::default(), Sealer::new(Level::default()));
    for chunk in chunks {
        let len = u32::try_from(chunk.bytes().len()).expect("small");
        pack.push(chunk.id(), &sealer.seal(chunk), vec![PackedChunk { id: chunk.id(), len }]);
    }
    let (bytes, records) = pack.finish();
    let id = PackId::from_bytes([7; 32]);
    let wants = records.iter().map(|r| Want { id: r.id, place: Place { pack: id, frame: r.frame } });
    (id, bytes, wants.collect())
}

fn config(directory: &Path) -> CacheConfig {
    CacheConfig { deadline: Duration::from_secs(5), ..CacheConfig::new(directory.to_owned(), 64 << 20) }
}

fn rig_with(gate: usize, change: impl FnOnce(&mut CacheConfig)) -> Rig {
    let directory = tempfile::tempdir().expect("a directory");
    let chunks = chunks(200);
    let (id, bytes, wants) = packed(&chunks);
    let memory = Arc::new(MemorySource {
        packs: HashMap::from([(id, bytes)]),
        requests: Mutex::default(),
        faults: Mutex::default(),
        gate: Semaphore::new(gate),
        begun: AtomicUsize::new(0),
    });
    let mut config = config(directory.path());
    change(&mut config);
    let cache = Arc::new(Cache::open(config, Handle::current()).expect("opened"));
    Rig { cache, source: memory.clone(), memory, chunks, wants, _directory: directory }
}

const OPEN: usize = 1 << 20;

fn rig() -> Rig {
    rig_with(OPEN, |_| {})
}

/// Lets other tasks run until `true_yet`.
async fn until(true_yet: impl Fn() -> bool) {
    let wait = async {
        while !true_yet() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("it never became true");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_readers_of_one_chunk_make_one_request() {
    let rig = rig_with(0, |_| {});
    let readers = (0..64).map(|_| {
        let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[3]);
        tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await })
    });
    let readers: Vec<_> = readers.collect();
    until(|| rig.cache.snapshot().joined == 63).await;
    rig.memory.gate.add_permits(OPEN);
    for reader in join_all(readers).await {
        assert_eq!(reader.expect("ended").expect("fetched"), [rig.chunks[3].clone()]);
    }
    assert_eq!(rig.memory.requests.lock().len(), 1);
    assert_eq!(rig.cache.try_memory(rig.wants[3].id), Some(rig.chunks[3].clone()));
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbouring_misses_share_requests_and_come_back_in_order() {
    let rig = rig();
    let wants: Vec<Want> = (0..200).rev().map(|at| rig.wants[at]).collect();
    let fetched = rig.cache.fetch(&rig.source, &wants, &[], Class::Demand).await.expect("fetched");
    assert!(fetched.iter().eq(rig.chunks.iter().rev()));
    // 200 x 9,600 bytes in ranges of at most 1 MiB
    assert_eq!(rig.memory.requests.lock().len(), 2);
    let seen = rig.cache.snapshot();
    assert_eq!((seen.source_frames, seen.source_gap_bytes, seen.source_bytes), (200, 0, 200 * 9600));
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_come_along_unopened_and_are_used_without_another_request() {
    let rig = rig();
    let (first, near) = (&rig.wants[..1], &rig.wants[1..5]);
    rig.cache.fetch(&rig.source, first, near, Class::Demand).await.expect("fetched");
    until(|| rig.cache.snapshot().source_frames == 5).await;
    assert_eq!(rig.cache.try_memory(near[0].id), Some(rig.chunks[1].clone()));
    let seen = rig.cache.snapshot();
    assert_eq!((seen.source_requests, seen.ahead_frames, seen.ahead_used_frames), (1, 4, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_fetched_is_there_after_a_restart_without_the_source() {
    let rig = rig();
    rig.cache.fetch(&rig.source, &rig.wants, &[], Class::Demand).await.expect("fetched");
    let Rig { cache, memory, source, chunks, wants, _directory } = rig;
    until(|| Arc::strong_count(&cache) == 1).await;
    drop(cache);
    memory.requests.lock().clear();
    let cache = Cache::open(config(_directory.path()), Handle::current()).expect("opened");
    for (want, chunk) in wants.iter().zip(&chunks).take(100) {
        assert!(cache.is_near(want.id));
        assert_eq!(cache.try_local(want.id).as_ref(), Some(chunk));
    }
    let fetched = cache.fetch(&source, &wants, &[], Class::Background).await.expect("fetched");
    assert_eq!(fetched, chunks);
    assert!(memory.requests.lock().is_empty());
    assert_eq!(cache.snapshot().disk_frames, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_frame_on_disk_is_dropped_counted_and_fetched_again() {
    let rig = rig_with(OPEN, |config| config.memory_bytes = 0);
    rig.cache.fetch(&rig.source, &rig.wants, &[], Class::Demand).await.expect("fetched");
    assert!(rig.cache.flush());
    let segments = std::fs::read_dir(rig._directory.path().join("segments")).expect("listed");
    for segment in segments {
        let path = segment.expect("listed").path();
        let mut bytes = std::fs::read(&path).expect("read");
        let len = bytes.len();
        bytes[len - 5000] ^= 1;
        std::fs::write(&path, bytes).expect("written");
    }
    for (want, chunk) in rig.wants.iter().zip(&rig.chunks) {
        let fetched = rig.cache.fetch(&rig.source, &[*want], &[], Class::Demand).await.expect("fetched");
        assert_eq!(&fetched[0], chunk);
    }
    let seen = rig.cache.snapshot();
    assert!(seen.verify_failures > 0 && seen.source_frames == 200 + seen.verify_failures, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_fetched_again_and_four_times_are_an_error() {
    let rig = rig();
    for fault in [Fault::FlipBits, Fault::CutShort] {
        rig.memory.faults.lock().push(fault);
        let wants = if matches!(fault, Fault::FlipBits) { &rig.wants[..1] } else { &rig.wants[1..9] };
        let fetched = rig.cache.fetch(&rig.source, wants, &[], Class::Demand).await.expect("fetched");
        assert!(fetched.iter().zip(wants).all(|(chunk, want)| chunk.id() == want.id));
    }
    rig.memory.faults.lock().extend([Fault::FlipBits; 3]);
    rig.cache.fetch(&rig.source, &rig.wants[19..20], &[], Class::Demand).await.expect("right at last");
    rig.memory.faults.lock().extend([Fault::FlipBits; 4]);
    let error =
        rig.cache.fetch(&rig.source, &rig.wants[20..21], &[], Class::Demand).await.expect_err("damaged");
    assert!(matches!(error, CacheError::Damaged(id) if id == rig.wants[20].id), "{error}");
    let fetched = rig.cache.fetch(&rig.source, &rig.wants[20..21], &[], Class::Demand).await;
    assert_eq!(fetched.expect("fetched"), rig.chunks[20..21]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_reaches_all_that_wait_and_the_next_read_tries_again() {
    let rig = rig_with(0, |_| {});
    rig.memory.faults.lock().push(Fault::Missing);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[3]);
            tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await })
        })
        .collect();
    until(|| rig.cache.snapshot().joined == 7).await;
    rig.memory.gate.add_permits(OPEN);
    for reader in join_all(readers).await {
        let error = reader.expect("ended").expect_err("missing");
        assert!(matches!(error, CacheError::Source { cause: SourceError::Missing(_), .. }), "{error}");
    }
    rig.cache.fetch(&rig.source, &rig.wants[3..4], &[], Class::Demand).await.expect("fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_hangs_is_an_error_at_the_deadline() {
    let rig = rig_with(OPEN, |config| config.deadline = Duration::from_millis(50));
    rig.memory.faults.lock().push(Fault::Hang);
    let error = rig.cache.fetch(&rig.source, &rig.wants[..1], &[], Class::Demand).await.expect_err("hangs");
    assert!(matches!(error, CacheError::Deadline { .. }), "{error}");
    until(|| rig.cache.snapshot().source_failures == 1).await;
    rig.cache.fetch(&rig.source, &rig.wants[..1], &[], Class::Demand).await.expect("fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_takes_nothing_from_the_others() {
    let rig = rig_with(0, |_| {});
    let spawn = || {
        let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[3]);
        tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await })
    };
    let first = spawn();
    until(|| rig.memory.begun.load(Ordering::SeqCst) == 1).await;
    let second = spawn();
    until(|| rig.cache.snapshot().joined == 1).await;
    first.abort();
    assert!(first.await.is_err());
    rig.memory.gate.add_permits(OPEN);
    assert_eq!(second.await.expect("ended").expect("fetched"), [rig.chunks[3].clone()]);
    assert_eq!(rig.memory.requests.lock().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn demand_overtakes_readahead_and_promotes_what_still_queues() {
    let rig = rig_with(0, |config| {
        config.in_flight.background = 1;
        config.range_bytes_max = 10_000;
    });
    rig.cache.prefetch(&rig.source, &rig.wants[..20], Class::Background);
    until(|| rig.memory.begun.load(Ordering::SeqCst) == 1).await;
    let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[15]);
    let demand = tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await });
    until(|| rig.memory.begun.load(Ordering::SeqCst) == 2).await;
    rig.memory.gate.add_permits(2);
    assert_eq!(demand.await.expect("ended").expect("fetched"), [rig.chunks[15].clone()]);
    let second = rig.memory.requests.lock()[1].clone();
    assert_eq!(second.1, Class::Demand);
    assert_eq!(second.0.start, u64::from(rig.wants[15].place.frame.offset));
    rig.memory.gate.add_permits(OPEN);
    until(|| rig.cache.snapshot().source_frames == 20).await;
    assert_eq!(rig.memory.requests.lock().len(), 20, "the promoted chunk was not asked for twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_ahead_is_verified_when_it_is_read_and_fetched_again_where_it_is_wrong() {
    let rig = rig();
    rig.memory.faults.lock().push(Fault::FlipBits);
    rig.cache.prefetch(&rig.source, &rig.wants[..20], Class::Background);
    until(|| rig.cache.snapshot().source_frames == 20).await;
    assert_eq!(rig.cache.snapshot().verify_failures, 1, "the others wait until they are read");
    let fetched = rig.cache.fetch(&rig.source, &rig.wants[..20], &[], Class::Demand).await;
    assert_eq!(fetched.expect("fetched"), rig.chunks[..20]);
    assert!(rig.cache.snapshot().verify_failures >= 20, "{:?}", rig.cache.snapshot());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_mounts_failing_source_does_not_fail_this_one() {
    let rig = rig_with(0, |_| {});
    rig.memory.faults.lock().push(Fault::Missing);
    let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[3]);
    let first = tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await });
    until(|| rig.memory.begun.load(Ordering::SeqCst) == 1).await;
    let other = Arc::new(MemorySource {
        packs: rig.memory.packs.clone(),
        requests: Mutex::default(),
        faults: Mutex::default(),
        gate: Semaphore::new(OPEN),
        begun: AtomicUsize::new(0),
    });
    let (cache, source) = (rig.cache.clone(), other.clone() as Arc<dyn Source>);
    let second = tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await });
    until(|| rig.cache.snapshot().joined == 1).await;
    rig.memory.gate.add_permits(OPEN);
    assert!(first.await.expect("ended").is_err());
    assert_eq!(second.await.expect("ended").expect("fetched"), [rig.chunks[3].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_a_source_that_is_down_until_it_is_back() {
    let rig = rig();
    rig.memory.faults.lock().extend([Fault::Down; 4]);
    let fetched = rig.cache.fetch(&rig.source, &rig.wants[..1], &[], Class::Demand).await;
    assert_eq!(fetched.expect("it came back"), rig.chunks[..1]);
    let seen = rig.cache.snapshot();
    assert_eq!((seen.source_failures, seen.waiting), (4, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_stays_down_is_an_error_at_the_readers_deadline_and_readahead_does_not_wait() {
    let rig = rig_with(OPEN, |config| config.deadline = Duration::from_millis(200));
    rig.memory.faults.lock().extend([Fault::Down; 1000]);
    let begun = std::time::Instant::now();
    let error = rig.cache.fetch(&rig.source, &rig.wants[..1], &[], Class::Demand).await.expect_err("down");
    assert!(matches!(error, CacheError::Deadline { .. }), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(200));
    let asked = rig.memory.requests.lock().len();
    let ahead = rig.cache.fetch(&rig.source, &rig.wants[1..2], &[], Class::Background).await;
    assert!(matches!(ahead, Err(CacheError::Source { cause: SourceError::Unreachable { .. }, .. })));
    assert_eq!(rig.memory.requests.lock().len(), asked + 1);
    rig.memory.faults.lock().clear();
    rig.cache.fetch(&rig.source, &rig.wants[..1], &[], Class::Demand).await.expect("back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_joins_a_failing_fetch_late_still_has_its_whole_deadline() {
    let rig = rig_with(0, |config| config.deadline = Duration::from_secs(20));
    rig.cache.prefetch(&rig.source, &rig.wants[..1], Class::Background);
    until(|| rig.memory.begun.load(Ordering::SeqCst) == 1).await;
    rig.memory.faults.lock().push(Fault::Down);
    let (cache, source, want) = (rig.cache.clone(), rig.source.clone(), rig.wants[0]);
    let reader = tokio::spawn(async move { cache.fetch(&source, &[want], &[], Class::Demand).await });
    until(|| rig.cache.snapshot().joined == 1).await;
    rig.memory.gate.add_permits(OPEN);
    assert_eq!(reader.await.expect("ended").expect("fetched"), rig.chunks[..1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_answer_that_breaks_off_only_the_rest_is_asked_for_again() {
    let rig = rig();
    rig.memory.faults.lock().push(Fault::BreakOff);
    let fetched = rig.cache.fetch(&rig.source, &rig.wants[..40], &[], Class::Demand).await;
    assert_eq!(fetched.expect("fetched"), rig.chunks[..40]);
    let requests = rig.memory.requests.lock();
    let (first, second) = (&requests[0].0, &requests[1].0);
    assert_eq!(requests.len(), 2);
    assert_eq!(second.end, first.end);
    assert_eq!(second.start, u64::from(rig.wants[20].place.frame.offset));
}
