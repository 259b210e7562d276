//! One range, asked of several hosts: whoever answers first.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::{BoxFuture, select_all};
use futures_util::stream::{FuturesUnordered, unfold};
use futures_util::{FutureExt, StreamExt};
use lamina_cache::{Class, Pieces, SourceError};
use lamina_chunk::PackId;
use lamina_wire::{PartStream, WireError};
use tokio::time::{Instant, sleep_until, timeout};

use super::{Asked, Host};

/// A host that is silent for so long is doubted. The first wait for another is what is usual, then it doubles from here.
const SILENT: Duration = Duration::from_secs(2);
/// Requests for one range that are under way at once, at most.
const ASKED_MAX: usize = 4;
/// An answer may go on as long as bytes come; so long without one and the rest is asked for anew. Shorter than what TCP
/// waits after a cut of some seconds, longer than any queue.
const STALL: Duration = Duration::from_secs(3);

type Answer = Result<PartStream, WireError>;

/// A request that has ended.
struct Ended {
    position: usize,
    host: Arc<Host>,
    began: Instant,
    hedge: bool,
    answer: Answer,
}

/// The race for one range.
pub(super) struct Race<'a> {
    repository: &'a str,
    pack: PackId,
    range: Range<u64>,
    class: Class,
    running: FuturesUnordered<BoxFuture<'static, Ended>>,
    worst: Option<SourceError>,
    /// The position of a host that failed, or that another one overtook.
    beaten: Option<usize>,
}

impl<'a> Race<'a> {
    pub(super) fn new(repository: &'a str, pack: PackId, range: Range<u64>, class: Class) -> Self {
        Self { repository, pack, range, class, running: FuturesUnordered::new(), worst: None, beaten: None }
    }

    /// Asks `hosts`, which are not empty, in this order, until one answers. *Errors*: the most hopeful of theirs.
    ///
    /// With the answer comes the position of a host that is better asked later, if there is one.
    pub(super) async fn run(mut self, hosts: Vec<Asked>) -> Result<(Pieces, Option<usize>), SourceError> {
        let first = &hosts[0].host;
        let mut waiting = hosts.iter().peekable();
        self.ask(waiting.next().expect("there is a host"), false);
        let began = Instant::now();
        let mut late = began + first.usual();
        loop {
            let back = select_all(hosts.iter().map(|asked| asked.host.back().map(move |()| asked).boxed()));
            tokio::select! {
                Some(ended) = self.running.next() => {
                    match self.take(ended) {
                        Some(pieces) => {
                            let overtaken = pieces.origin != hosts[0].position && self.worst.is_none();
                            return Ok((pieces, self.beaten.or(overtaken.then_some(hosts[0].position))));
                        }
                        None => if let Some(next) = waiting.next() {
                            self.ask(next, false);
                        } else if self.running.is_empty() {
                            return Err(self.worst.expect("one has failed"));
                        }
                    }
                }
                () = sleep_until(late) => {
                    if began.elapsed() >= SILENT {
                        first.doubt(&format!("no answer within {SILENT:?}"));
                    }
                    late = began + (began.elapsed() * 2).max(SILENT);
                    // somebody may have joined what began as readahead
                    let urgent = self.class == Class::Demand || began.elapsed() >= SILENT;
                    if urgent && self.running.len() < ASKED_MAX && first.spend() {
                        // who lied is asked when the others fail, not when they take long
                        let next = waiting.next_if(|next| next.trusted || !hosts[0].trusted);
                        self.ask(next.unwrap_or(&hosts[0]), true);
                    }
                }
                // what is under way may hang in connections that lead nowhere
                (asked, ..) = back => self.ask(asked, false),
            }
        }
    }

    fn ask(&self, Asked { position, host, .. }: &Asked, hedge: bool) {
        let position = *position;
        host.asked();
        if hedge {
            host.counters.hedges.fetch_add(1, Ordering::Relaxed);
        }
        let (host, client, began) = (Arc::clone(host), host.client().with_tries(1), Instant::now());
        let (repository, pack, range) = (self.repository.to_owned(), self.pack, self.range.clone());
        self.running.push(
            async move {
                let answer = client.blob_range_stream(&repository, pack.into(), range).await;
                Ended { position, host, began, hedge, answer }
            }
            .boxed(),
        );
    }

    /// What came of a request, if it is bytes.
    fn take(&mut self, ended: Ended) -> Option<Pieces> {
        let Ended { position, host, began, hedge, answer } = ended;
        match answer {
            Ok(stream) => {
                host.answered(self.class, began.elapsed());
                if hedge {
                    host.counters.hedges_won.fetch_add(1, Ordering::Relaxed);
                }
                Some(watched(host, self.pack, stream, STALL).from(position))
            }
            Err(error) => {
                failed(&host, &error);
                let error = translated(self.pack, error);
                if matches!(error, SourceError::Unreachable { .. }) {
                    self.beaten = Some(position);
                }
                if self.worst.as_ref().is_none_or(|worst| rank(worst) < rank(&error)) {
                    self.worst = Some(error);
                }
                None
            }
        }
    }
}

fn failed(host: &Arc<Host>, error: &WireError) {
    host.counters.failures.fetch_add(1, Ordering::Relaxed);
    if matches!(error, WireError::Unreachable { .. } | WireError::Timeout { .. }) {
        host.doubt(&error.to_string());
    }
}

/// The pieces of an answer, counted, and an error where the first does not come `within` a time, or they stop coming.
pub(super) fn watched(host: Arc<Host>, pack: PackId, stream: PartStream, within: Duration) -> Pieces {
    let bytes = unfold((Some(stream), host, within), move |(stream, host, waited)| async move {
        let mut stream = stream?;
        match timeout(waited, stream.next()).await {
            Ok(None) => None,
            Ok(Some(Ok(piece))) => {
                host.counters.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Some((Ok(piece), (Some(stream), host, STALL)))
            }
            Ok(Some(Err(error))) => {
                failed(&host, &error);
                Some((Err(translated(pack, error)), (None, host, STALL)))
            }
            Err(_) => {
                let url = host.client().base().to_owned();
                let error = WireError::Timeout { url, waited };
                failed(&host, &error);
                Some((Err(translated(pack, error)), (None, host, STALL)))
            }
        }
    });
    Pieces::new(bytes.boxed())
}

/// How much hope an error leaves.
fn rank(error: &SourceError) -> u8 {
    match error {
        SourceError::Missing(_) => 0,
        SourceError::Refused { .. } => 1,
        SourceError::Unreachable { .. } => 2,
    }
}

/// A registry's answer as a cache understands it.
fn translated(pack: PackId, error: WireError) -> SourceError {
    match error {
        WireError::NotFound { .. } => SourceError::Missing(pack),
        error if error.is_passing() => SourceError::Unreachable { pack, cause: Arc::new(error) },
        error => SourceError::Refused { pack, cause: Arc::new(error) },
    }
}
