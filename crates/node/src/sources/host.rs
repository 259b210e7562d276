//! One host that packs come from: its connections, whether it answers, and how it has been doing.
//!
//! A host that did not answer is *doubted*: somebody looks whether it is there, over a connection of its own, until it is. One
//! look in vain and it is *away*: readers wait to be told that it is back instead of asking all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lamina_cache::Class;
use lamina_wire::{Client, ClientConfig, WireError};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::jitter;
use super::pace::{Budget, Latency};
use crate::metrics::{FetchSeconds, fetch_labels};

/// How long a look may take. Two in three are short, so that a host that is back is found within two seconds; the third gives
/// a slow one its chance.
const LOOKS: [Duration; 3] =
    [Duration::from_millis(1200), Duration::from_millis(1200), Duration::from_secs(5)];
/// The pause between two looks: one small request a second to a host that is away.
const LOOK_AGAIN: Duration = Duration::from_millis(400);

/// A spare connection is made no more often: idle ones are kept for longer.
const SPARED: Duration = Duration::from_secs(60);

/// What a host has done, since it was first asked.
#[derive(Debug, Default)]
pub(crate) struct HostCounters {
    /// Ranges asked for.
    pub(crate) requests: AtomicU64,
    /// Of these, again because the first was late.
    pub(crate) hedges: AtomicU64,
    /// Of these, those that answered first.
    pub(crate) hedges_won: AtomicU64,
    /// Requests that failed, and answers that broke off or stalled.
    pub(crate) failures: AtomicU64,
    /// Bytes received.
    pub(crate) bytes: AtomicU64,
    /// How often it went away and came back.
    pub(crate) outages: AtomicU64,
}

impl HostCounters {
    /// Each by name.
    pub(crate) fn named(&self) -> Vec<(&'static str, u64)> {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", now(&self.requests)),
            ("hedges", now(&self.hedges)),
            ("hedges_won", now(&self.hedges_won)),
            ("failures", now(&self.failures)),
            ("received_bytes", now(&self.bytes)),
            ("outages", now(&self.outages)),
        ]
    }
}

/// Whether a host answers.
#[derive(Clone, Debug, Default)]
pub(crate) enum State {
    /// As far as is known.
    #[default]
    Here,
    /// Somebody looks.
    Doubted,
    /// It does not, since then, and why.
    Away(Instant, String),
}

/// A host. All mounts share one, and with it its connections.
pub(crate) struct Host {
    name: String,
    config: ClientConfig,
    client: RwLock<Client>,
    state: watch::Sender<State>,
    pace: Mutex<(Latency, Budget)>,
    fetch_seconds: FetchSeconds,
    /// When a spare connection was last made.
    spared: Mutex<Option<Instant>>,
    pub(crate) counters: HostCounters,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Host({})", self.name)
    }
}

impl Host {
    /// A host that nobody has asked yet.
    pub(crate) fn new(
        name: String,
        config: ClientConfig,
        fetch_seconds: FetchSeconds,
    ) -> Result<Self, WireError> {
        let client = RwLock::new(Client::new(&name, config.clone())?);
        let (state, _) = watch::channel(State::Here);
        let (pace, spared, counters) = (Mutex::default(), Mutex::default(), HostCounters::default());
        Ok(Self { name, config, client, state, pace, fetch_seconds, spared, counters })
    }

    /// `host[:port]`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// How to speak to it now.
    pub(crate) fn client(&self) -> Client {
        self.client.read().clone()
    }

    /// Whether it answers.
    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Whether it is known not to answer.
    pub(crate) fn is_away(&self) -> bool {
        matches!(*self.state.borrow(), State::Away(..))
    }

    /// Returns when it is back from being away; never where it does not go away.
    pub(crate) async fn back(&self) {
        let mut state = self.state.subscribe();
        // the sender lives as long as this does
        let _ = state.wait_for(|state| matches!(state, State::Away(..))).await;
        let _ = state.wait_for(|state| matches!(state, State::Here)).await;
    }

    /// An answer that takes longer than this is unusual.
    pub(crate) fn usual(&self) -> Duration {
        self.pace.lock().0.usual()
    }

    /// Takes note of a request that had to be sent.
    pub(crate) fn asked(&self) {
        self.pace.lock().1.earn();
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a request may be sent that may be in vain.
    pub(crate) fn spend(&self) -> bool {
        self.pace.lock().1.spend()
    }

    /// Takes note of an answer's head.
    pub(crate) fn answered(&self, class: Class, took: Duration) {
        self.pace.lock().0.note(took);
        let labels = fetch_labels(class, &self.name);
        self.fetch_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Makes a connection beside the one that is being used, unless there was one lately. What finds nobody is not looked into. Inside
    /// a tokio runtime.
    pub(crate) fn spare(&self) {
        let mut last = self.spared.lock();
        if last.is_none_or(|last| last.elapsed() >= SPARED) {
            *last = Some(Instant::now());
            let client = self.client();
            tokio::spawn(async move {
                let _ = client.ping().await;
            });
        }
    }

    /// Something went wrong that may be the host's silence: looks whether it is there, unless somebody does already. Inside a
    /// tokio runtime.
    pub(crate) fn doubt(self: &Arc<Self>, reason: &str) {
        let began = self.state.send_if_modified(|state| {
            let here = matches!(state, State::Here);
            if here {
                *state = State::Doubted;
            }
            here
        });
        if began {
            tokio::spawn(look(Arc::downgrade(self), reason.to_owned()));
        }
    }

    /// One look. Gives a client whose connection works.
    async fn look(&self, within: Duration) -> Result<Client, String> {
        let config = ClientConfig { connect: within, answer: within, tries: 1, ..self.config.clone() };
        let client = Client::new(&self.name, config).map_err(|error| error.to_string())?;
        match timeout(within, client.ping()).await {
            // all that is pooled may lead to where nobody is any more, or to where the name pointed before
            Ok(Ok(_)) => Client::new(&self.name, self.config.clone()).map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("{}: no answer within {within:?}", client.base())),
        }
    }
}

/// Looks until the host is there, or nobody needs it any more.
async fn look(host: std::sync::Weak<Host>, mut reason: String) {
    let mut away = false;
    for within in LOOKS.into_iter().cycle() {
        let Some(host) = host.upgrade() else { return };
        match host.look(within).await {
            Ok(client) => {
                *host.client.write() = client;
                if away {
                    host.counters.outages.fetch_add(1, Ordering::Relaxed);
                    info!(host = host.name, "is back");
                }
                host.state.send_replace(State::Here);
                return;
            }
            Err(error) if !away => {
                away = true;
                warn!(host = host.name, reason, error, "does not answer; uncached reads wait for it");
                reason = error;
                host.state.send_replace(State::Away(Instant::now(), reason.clone()));
            }
            Err(_) => {}
        }
        drop(host);
        sleep(jitter(LOOK_AGAIN)).await;
    }
}
