//! Where an image's packs come from: the mirrors of its registry in the order given, then the registry.
//!
//! A demand read is answered by whoever answers first. The next source is asked when one fails, and also when one takes longer
//! than it usually does, within a budget. When nobody answers, a demand read waits: its deadline is the cache's, which drops the
//! future. Everything else gives up at once, so that it is not in the way when somebody is back.
//!
//! A pack that nobody has may have been repacked: then its frames come from where they are now (`sources/moved.rs`).

mod host;
mod moved;
mod pace;
mod race;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, select_all};
use lamina_cache::{Class, Pieces, Source, SourceError};
use lamina_chunk::{MOVES_MAX, Moved, PackId};
use lamina_image::Digest;
use lamina_wire::{Client, ClientConfig, PartStream, Reference, Scheme, WireError};
use parking_lot::Mutex;
use tokio::time::timeout;

pub(crate) use self::host::{Host, State};
use self::moved::{MovedPacks, Told, spread};
use self::race::{Race, watched};
use crate::NodeError;
use crate::metrics::{FetchSeconds, fetch_seconds};
use crate::spans::Within;

/// A reader asks again after this long, then twice as long each time,
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// up to this long, in case that looking for a host says nothing of it.
const PAUSE_MAX: Duration = Duration::from_secs(4);
/// A host that sent wrong bytes, failed, or was overtaken is asked last for so long.
const DEMOTED: Duration = Duration::from_secs(60);
/// How often what nobody waits for is asked for at most.
const ROUNDS_UNURGENT: u32 = 4;
/// How long the question where a pack went may take: the answer is a small file.
const MOVED_WITHIN: Duration = Duration::from_secs(10);
/// What comes without being asked for begins to, at the latest: behind the names of the largest tree over a slow link.
const TAKEN_WITHIN: Duration = Duration::from_secs(90);
/// Hosts that are remembered though nothing is mounted from them any more.
const HOSTS_MAX: usize = 256;

/// Which other hosts have what a registry has, by its `host[:port]`, in the order in which they are asked.
pub type Mirrors = HashMap<String, Vec<String>>;

/// All hosts that this node has to do with.
#[derive(Debug)]
pub(crate) struct Hosts {
    fetch_seconds: FetchSeconds,
    config: ClientConfig,
    mirrors: Mirrors,
    hosts: Mutex<HashMap<(String, bool), Arc<Host>>>,
}

impl Hosts {
    pub(crate) fn new(config: ClientConfig, mirrors: Mirrors) -> Self {
        Self { fetch_seconds: fetch_seconds(), config, mirrors, hosts: Mutex::default() }
    }

    /// Who has the image `reference`.
    pub(crate) fn sources(&self, reference: &Reference, plain_http: bool) -> Result<Sources, NodeError> {
        let mut hosts = Vec::new();
        for mirror in self.mirrors.get(&reference.host).into_iter().flatten() {
            let (name, plain) = match mirror.strip_prefix("http://") {
                Some(name) => (name, true),
                None => (mirror.trim_start_matches("https://"), false),
            };
            hosts.push(self.host(name, plain)?);
        }
        hosts.push(self.host(&reference.host, plain_http)?);
        let (repository, demoted) = (reference.repository.as_str().into(), Arc::default());
        let (moved, within) = (Arc::default(), Within::default());
        Ok(Sources { hosts: hosts.into(), repository, demoted, moved, within })
    }

    fn host(&self, name: &str, plain_http: bool) -> Result<Arc<Host>, NodeError> {
        let mut hosts = self.hosts.lock();
        if let Some(host) = hosts.get(&(name.to_owned(), plain_http)) {
            return Ok(Arc::clone(host));
        }
        if hosts.len() >= HOSTS_MAX {
            hosts.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let scheme = if plain_http { Scheme::PlainHttp } else { self.config.scheme };
        let config = ClientConfig { scheme, ..self.config.clone() };
        let host = Arc::new(Host::new(name.to_owned(), config, self.fetch_seconds.clone())?);
        hosts.insert((name.to_owned(), plain_http), Arc::clone(&host));
        Ok(host)
    }

    /// How long fetches took.
    pub(crate) fn fetch_seconds(&self) -> &FetchSeconds {
        &self.fetch_seconds
    }

    /// All of them, by URL.
    pub(crate) fn all(&self) -> Vec<(String, Arc<Host>)> {
        let hosts = self.hosts.lock();
        let mut all: Vec<_> =
            hosts.values().map(|host| (host.client().base().to_owned(), host.clone())).collect();
        all.sort_by(|one, other| one.0.cmp(&other.0));
        all
    }
}

/// Who has one image's packs, the registry itself last.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    hosts: Arc<[Arc<Host>]>,
    repository: Arc<str>,
    /// Hosts that are asked last, by position.
    demoted: Arc<Mutex<HashMap<usize, Demoted>>>,
    moved: Arc<MovedPacks>,
    /// What fetches are part of.
    pub(crate) within: Within,
}

/// When a host was last found wanting. Whoever lied comes after whoever was slow, and whoever did it last comes last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Demoted {
    lied: Option<Instant>,
    late: Option<Instant>,
}

impl Demoted {
    fn forget_old(&mut self) {
        for since in [&mut self.lied, &mut self.late] {
            since.take_if(|since| since.elapsed() >= DEMOTED);
        }
    }
}

/// A host that a range is asked of.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) position: usize,
    pub(crate) host: Arc<Host>,
    /// Its last answers were not found to be wrong.
    pub(crate) trusted: bool,
}

impl Sources {
    /// The same, whose fetches are part of something else.
    pub(crate) fn part_of(self, within: &Within) -> Self {
        Self { within: within.clone(), ..self }
    }

    /// The registry that the reference names.
    pub(crate) fn registry(&self) -> Client {
        self.hosts.last().expect("the registry is one").client()
    }

    /// Has a connection to spare for whoever is asked first: a mount soon wants two things at once.
    pub(crate) fn spare(&self) {
        if let Some(first) = self.hosts.iter().find(|host| !host.is_away()) {
            first.spare();
        }
    }

    /// All `len` bytes of a boot pack, which come from the registry though they were not asked for by themselves.
    pub(crate) fn taken(&self, pack: PackId, len: u64, bytes: PartStream) -> Pieces {
        let position = self.hosts.len() - 1;
        let host = &self.hosts[position];
        // others come before it on the same connection
        let pieces = watched(Arc::clone(host), pack, bytes, TAKEN_WITHIN).from(position);
        let fetch = self.within.fetch(pack, len, Class::Boot);
        if fetch.is_unwanted() { pieces } else { fetch.answered(host.name(), pieces) }
    }

    /// Which image they are asked for, by the digest of its manifest: what hangs on it may say where packs went.
    pub(crate) fn are_of(&self, image: Digest) {
        self.moved.are_of(image);
    }

    /// Asks one host after the other, those that are away last, until one answers as hoped, each for its part of `within`.
    /// *Errors*: the registry's own.
    pub(crate) async fn ask<T, F>(&self, within: Duration, ask: impl Fn(Client) -> F) -> Result<T, NodeError>
    where
        F: Future<Output = Result<T, NodeError>>,
    {
        let share = within / u32::try_from(self.hosts.len()).unwrap_or(u32::MAX);
        let (last, mirrors) = self.hosts.split_last().expect("the registry is one");
        let one = async |host: &Arc<Host>| {
            let client = host.client();
            let url = client.base().to_owned();
            let asked = timeout(share, ask(client)).await;
            let result = asked.unwrap_or_else(|_| Err(WireError::Timeout { url, waited: share }.into()));
            if let Err(NodeError::Wire(error @ (WireError::Unreachable { .. } | WireError::Timeout { .. }))) =
                &result
            {
                host.doubt(&error.to_string());
            }
            result
        };
        for host in mirrors.iter().filter(|host| !host.is_away()) {
            match one(host).await {
                Ok(answer) => return Ok(answer),
                Err(error) => tracing::debug!(?host, %error, "asking the next"),
            }
        }
        one(last).await
    }

    /// Hosts in the order in which they are asked; with `all` even those that are away, and also where whoever is here lied.
    fn order(&self, all: bool) -> Vec<Asked> {
        let mut demoted = self.demoted.lock();
        demoted.values_mut().for_each(Demoted::forget_old);
        let of = |position| demoted.get(&position).copied().unwrap_or_default();
        let hosts = self.hosts.iter().cloned().enumerate();
        let mut here = hosts.clone().filter(|(_, host)| !host.is_away()).peekable();
        let all = all || (here.peek().is_some() && here.all(|(position, _)| of(position).lied.is_some()));
        let mut hosts: Vec<_> = hosts
            .filter(|(_, host)| all || !host.is_away())
            .map(|(position, host)| Asked { position, host, trusted: of(position).lied.is_none() })
            .collect();
        hosts.sort_by_key(|asked| of(asked.position));
        hosts
    }

    /// Asks a host last for a while.
    fn demote(&self, position: usize, since: impl Fn(&mut Demoted) -> &mut Option<Instant>, reason: &str) {
        if let Some(host) = self.hosts.get(position).filter(|_| self.hosts.len() > 1)
            && since(self.demoted.lock().entry(position).or_default()).replace(Instant::now()).is_none()
        {
            tracing::warn!(?host, reason, "others are asked first for a while");
        }
    }

    /// Returns when any host is back, or after `pause`.
    async fn back(&self, pause: Duration) {
        let any = select_all(self.hosts.iter().map(|host| host.back().boxed()));
        let _ = timeout(pause, any).await;
    }

    async fn open(&self, pack: PackId, range: Range<u64>, class: Class) -> Result<Pieces, SourceError> {
        let (mut pause, mut round) = (PAUSE_MIN, 0);
        loop {
            let waited_long = pause == PAUSE_MAX;
            let hosts = self.order(waited_long);
            let error = match hosts.is_empty() {
                true => self.nobody(pack),
                false => match Race::new(&self.repository, pack, range.clone(), class).run(hosts).await {
                    Ok((pieces, beaten)) => {
                        if let Some(position) = beaten {
                            self.demote(position, |demoted| &mut demoted.late, "it is slow or fails");
                        }
                        return Ok(pieces);
                    }
                    Err(error) => error,
                },
            };
            round += 1;
            let hopeful = matches!(error, SourceError::Unreachable { .. });
            let patient =
                class == Class::Demand || (round < ROUNDS_UNURGENT && !self.order(false).is_empty());
            if !hopeful || !patient {
                return Err(error);
            }
            self.back(jitter(pause)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// The same, also where the pack was repacked: from the packs where its frames are now.
    async fn open_wherever(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> Result<Pieces, SourceError> {
        let mut tellers = Vec::new();
        let opened = loop {
            let disbelieved = self.moved.disbelieved();
            let opened = self.follow(pack, range.clone(), class, &mut tellers).await;
            if !matches!(opened, Err(SourceError::Missing(_))) {
                return opened;
            }
            // what was said of it may be false, or old: whoever tries again asks again
            self.moved.forget(pack);
            // where it was an artifact that said so, another one may be right; so many are remembered and no more
            if self.moved.disbelieved() == disbelieved {
                break opened;
            }
        };
        let mirrors = self.mirrors_among(tellers);
        if mirrors.is_empty() {
            return opened;
        }
        // and if a mirror said so, the registry may know better
        self.moved.doubt();
        let opened = self.follow(pack, range, class, &mut Vec::new()).await;
        match opened {
            Ok(_) => self.disbelieve(pack, &mirrors),
            Err(_) => drop(self.moved.forget(pack)),
        }
        opened
    }

    /// Mirrors are asked last for a while that had said of a pack that it went somewhere else.
    fn disbelieve(&self, pack: PackId, mirrors: &[usize]) {
        for mirror in mirrors {
            let reason = format!("what it said of where {pack} went was false");
            self.demote(*mirror, |demoted| &mut demoted.lied, &reason);
        }
    }

    fn mirrors_among(&self, mut hosts: Vec<usize>) -> Vec<usize> {
        hosts.retain(|position| position + 1 < self.hosts.len());
        hosts
    }

    /// Whether it is gone by: after an answer that led nowhere or to wrong bytes only the registry's are.
    fn believes(&self, told: &Told) -> bool {
        !self.moved.is_doubted() || told.by + 1 == self.hosts.len()
    }

    /// The same, and who has said where the pack went.
    async fn follow(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
        tellers: &mut Vec<usize>,
    ) -> Result<Pieces, SourceError> {
        let (mut at, mut wanted, mut moves) = (pack, range, Vec::new());
        loop {
            let told = match self.moved.known(at).filter(|told| self.believes(told)) {
                Some(told) => told,
                None => match self.open(at, wanted.clone(), class).await {
                    Ok(pieces) => return Ok(moves.into_iter().rev().fold(pieces, spread)),
                    Err(SourceError::Missing(_)) => match self.ask_moved(at).await {
                        Ok(told) => told,
                        Err(SourceError::Unreachable { .. }) if class == Class::Demand => {
                            self.back(jitter(PAUSE_MIN)).await;
                            continue;
                        }
                        Err(error) => return Err(error),
                    },
                    Err(error) => return Err(error),
                },
            };
            tellers.push(told.by);
            // what is nowhere any more nobody has
            let span = told.moved.span(wanted).filter(|_| moves.len() < MOVES_MAX);
            let span = span.ok_or(SourceError::Missing(pack))?;
            (at, wanted) = (told.moved.pack(), span.range);
            moves.push(span.parts);
        }
    }

    /// Where a pack went that nobody has, by somebody who is believed. *Errors*: that it is missing, unless asking again may help.
    async fn ask_moved(&self, pack: PackId) -> Result<Told, SourceError> {
        loop {
            let told = self.moved.learn(pack, self.told(pack)).await.map_err(|error| match error {
                NodeError::Wire(error) if error.is_passing() => {
                    SourceError::Unreachable { pack, cause: Arc::new(error) }
                }
                error => {
                    tracing::debug!(%pack, %error, "nobody has the pack, and nobody says where it went");
                    SourceError::Missing(pack)
                }
            })?;
            if self.believes(&told) {
                return Ok(told);
            }
            // a mirror was asked before it was doubted; of those there are only so many
            self.moved.forget(pack);
        }
    }

    /// What the first of the hosts says that says anything; once any of it was found wrong, the registry alone.
    async fn told(&self, pack: PackId) -> Result<Told, NodeError> {
        let ask = |client: Client| async move {
            let client = client.with_tries(1);
            let url = client.base().to_owned();
            let bytes = match client.moved(&self.repository, pack).await {
                Err(error) if error.is_unserved() => {
                    let carried = self.moved.carried(&client, &self.repository, pack).await?;
                    let (moved, artifact) = carried.ok_or(error)?;
                    return Ok((Arc::new(moved), Some(artifact), url));
                }
                said => said?,
            };
            let wrong = |error: lamina_chunk::MovedError| {
                let reason = format!("where the frames of {pack} have gone: {error}");
                WireError::Answer { url: url.clone(), reason }
            };
            Ok((Arc::new(Moved::parse(&bytes).map_err(wrong)?), None, url))
        };
        let registry = self.hosts.len() - 1;
        if !self.moved.is_doubted() {
            let (moved, artifact, url) = self.ask(MOVED_WITHIN, ask).await?;
            let by = self.hosts.iter().position(|host| host.client().base() == url);
            return Ok(Told { moved, by: by.unwrap_or(registry), artifact });
        }
        let (client, waited) = (self.registry(), MOVED_WITHIN);
        let url = client.base().to_owned();
        let asked = timeout(waited, ask(client)).await;
        let (moved, artifact, _) =
            asked.unwrap_or_else(|_| Err(WireError::Timeout { url, waited }.into()))?;
        Ok(Told { moved, by: registry, artifact })
    }

    /// Why nobody is asked.
    fn nobody(&self, pack: PackId) -> SourceError {
        let away = self.hosts.iter().rev().find_map(|host| match host.state() {
            State::Away(_, reason) => Some(reason),
            _ => None,
        });
        let reason = away.unwrap_or_default();
        SourceError::Unreachable { pack, cause: Arc::new(std::io::Error::other(reason)) }
    }
}

impl Source for Sources {
    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        let fetch = self.within.fetch(pack, range.end - range.start, class);
        if fetch.is_unwanted() {
            return self.open_wherever(pack, range, class).boxed();
        }
        async move {
            let opened = self.open_wherever(pack, range, class).await;
            let pieces = opened.inspect_err(|error| fetch.failed(error))?;
            Ok(fetch.answered(self.hosts[pieces.origin].name(), pieces))
        }
        .boxed()
    }

    fn distrust(&self, pack: PackId, origin: usize) {
        let tellers = self.moved.forget(pack);
        if !tellers.is_empty() {
            self.moved.doubt();
        }
        // who sent what he was asked for is right, where a mirror has said falsely what that is; if not, he sends it again
        match &self.mirrors_among(tellers)[..] {
            [] => self.demote(origin, |demoted| &mut demoted.lied, &format!("it sent wrong bytes of {pack}")),
            mirrors => self.disbelieve(pack, mirrors),
        }
    }
}

/// `pause` and up to half as much again, so that many who were sent away at once do not come back at once.
fn jitter(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    // keyed by the system's randomness, anew each time
    let chance = RandomState::new().hash_one(0);
    pause + pause.mul_f64((chance % 1000) as f64 / 2000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mirror and a registry, with nothing behind either.
    fn two() -> Sources {
        let mirrors = HashMap::from([("127.0.0.1:1".to_owned(), vec!["http://127.0.0.1:2".to_owned()])]);
        let hosts = Hosts::new(ClientConfig::default(), mirrors);
        hosts.sources(&"127.0.0.1:1/a:t".parse().unwrap(), true).unwrap()
    }

    #[tokio::test]
    async fn where_all_have_failed_whoever_failed_last_is_asked_last() {
        let sources = two();
        let order = || sources.order(true).into_iter().map(|asked| asked.position).collect::<Vec<_>>();
        let lie = |position| sources.demote(position, |demoted| &mut demoted.lied, "it lied");
        assert_eq!(order(), [0, 1]);
        lie(1);
        assert_eq!(order(), [0, 1]);
        lie(0);
        assert_eq!(order(), [1, 0]);
        lie(1);
        assert_eq!(order(), [0, 1]);
    }

    #[tokio::test]
    async fn where_only_a_liar_is_left_those_that_are_away_are_asked_before_it() {
        let sources = two();
        let order = || sources.order(false).into_iter().map(|asked| asked.position).collect::<Vec<_>>();
        sources.hosts[0].doubt("it was cut off");
        let away = async {
            while !sources.hosts[0].is_away() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), away).await.expect("nothing listens there");
        assert_eq!(order(), [1]);
        sources.demote(1, |demoted| &mut demoted.lied, "it lied");
        assert_eq!(order(), [0, 1]);
    }

    #[tokio::test]
    async fn of_wrong_bytes_of_a_moved_pack_the_mirror_is_blamed_that_said_where_they_are() {
        let pack = PackId::from_bytes([1; 32]);
        let frame = lamina_chunk::Frame { offset: 0, sealed_len: 2, plain_len: 2 };
        let moved = Arc::new(Moved::new(PackId::from_bytes([2; 32]), [frame]));
        // who said it, who sent the bytes, and who is asked first then
        for (by, origin, first) in
            [(Some(0), 1, 1), (Some(1), 0, 1), (None, 0, 1), (Some(1), 1, 0), (None, 1, 0)]
        {
            let sources = two();
            if let Some(by) = by {
                let told = Told { moved: Arc::clone(&moved), by, artifact: None };
                sources.moved.learn(pack, async { Ok::<_, ()>(told) }).await.unwrap();
            }
            sources.distrust(pack, origin);
            assert_eq!(sources.order(true)[0].position, first, "{by:?} {origin}");
            assert_eq!(sources.moved.is_doubted(), by.is_some());
        }
    }

    #[tokio::test]
    async fn who_was_slow_since_is_still_asked_before_who_lied() {
        let sources = two();
        sources.demote(0, |demoted| &mut demoted.lied, "it lied");
        sources.demote(1, |demoted| &mut demoted.late, "it is slow");
        let order = sources.order(true);
        assert_eq!(order.iter().map(|asked| asked.position).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(order.iter().map(|asked| asked.trusted).collect::<Vec<_>>(), [true, false]);
    }
}
