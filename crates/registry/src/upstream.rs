//! Pull-through: what is asked for and not here comes from another registry, the upstream, and stays.
//!
//! Nothing of it is believed. A manifest or a blob is here once its bytes hash to its digest; what a tag means is the
//! upstream's word, which is asked for again when it is old. While nobody answers, what was said last counts. Many who
//! want the same cause one question. What is kept in memory (when tags were asked for, which images are to come, which
//! were found false) is only there to ask less: whoever restarts asks again.
//!
//! An image that names its tree is served before it was checked, since only what has come can be. One that is found
//! false then is taken out, and not brought again while this process lives.

mod fetch;
mod flights;
mod images;
mod moved;
mod refused;
mod tags;

use std::sync::Arc;
use std::time::Duration;

use lamina_image::{Digest, Document};
use lamina_store::{ManifestPut, Repo, Store, StoreError, Tag};
use lamina_wire::{Client, Fetched, Version, WireError};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::manifests::referrer_of_document;
use crate::metrics::Metrics;
use crate::put::{check_claims, media_type_of};
use crate::route::Target;
use crate::{ApiError, UpstreamConfig};

pub(crate) use self::fetch::Brought;
use self::fetch::Progress;
use self::flights::Flights;
pub(crate) use self::images::Images;
use self::refused::Refused;
use self::tags::Tags;

/// Blobs that come at the same time: each holds up to 16 MiB of memory until it is stored.
const FETCHES_MAX: usize = 32;
/// Manifests that come at the same time: each may be 4 MiB long, and ten times that while it is parsed.
const MANIFESTS_MAX: usize = 16;
/// A tag that is known is not waited for longer than this, whatever the upstream does.
const KNOWN_WAIT: Duration = Duration::from_secs(5);

/// How one question about a manifest ended; `None` before.
type Asked = Option<Result<(), Arc<ApiError>>>;

/// A manifest that came, and its place among those that do.
struct Came<'a> {
    fetched: Fetched,
    _place: SemaphorePermit<'a>,
}

/// What a tag means upstream.
enum Meant<'a> {
    /// A manifest that is here.
    Here(Digest),
    /// This one.
    Came(Came<'a>),
}

/// The upstream, as seen from a registry that passes on what it has.
#[derive(Debug)]
pub(crate) struct Upstream {
    store: Store,
    client: Client,
    config: UpstreamConfig,
    metrics: Metrics,
    tags: Mutex<Tags>,
    refused: Mutex<Refused>,
    asking: Flights<(Repo, Target), Asked>,
    coming: Flights<(Repo, Digest), Progress>,
    manifests: Semaphore,
    fetches: Semaphore,
    pub(crate) images: Images,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Upstream {
    pub(crate) fn new(store: Store, config: UpstreamConfig, metrics: Metrics) -> Arc<Self> {
        let (client, tags) = (config.client.clone(), Mutex::new(Tags::new(config.revalidate)));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let (asking, coming) =
            (Flights::new(tasks.clone(), stop.clone()), Flights::new(tasks.clone(), stop.clone()));
        let [manifests, fetches] = [MANIFESTS_MAX, FETCHES_MAX].map(Semaphore::new);
        let images = Images::default();
        Arc::new(Self {
            store,
            client,
            config,
            metrics,
            tags,
            refused: Mutex::default(),
            asking,
            coming,
            manifests,
            fetches,
            images,
            tasks,
            stop,
        })
    }

    /// Ends what is under way. What had come of blobs is lost.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Sees to it that a manifest is here, and that a tag means what it means upstream.
    ///
    /// # Errors
    /// [`ApiError::ManifestUnknown`] where the upstream does not have it; [`ApiError::ManifestInvalid`] where it was found
    /// false; [`ApiError::Upstream`] where it does not
    /// answer as hoped, and nothing is known from before.
    pub(crate) async fn bring_manifest(
        self: &Arc<Self>,
        repo: &Repo,
        target: &Target,
    ) -> Result<(), ApiError> {
        let (here, now) = (self.here(repo, target).await?.is_some(), Instant::now());
        if here && self.is_fresh(repo, target, now) {
            self.metrics.passed_on("manifest", "hit");
            return Ok(());
        }
        if here && self.tags.lock().is_away(now) {
            self.metrics.passed_on("manifest", "stale");
            return Ok(());
        }
        match self.ask(repo, target).await {
            Ok(()) => Ok(()),
            Err(error) if here && error.is_passing() => {
                tracing::warn!(%repo, %target, %error, "nobody says what the tag means now; what it meant last is served");
                self.tags.lock().note_away(Instant::now());
                self.metrics.passed_on("manifest", "stale");
                Ok(())
            }
            Err(error) => {
                self.metrics.passed_on("manifest", outcome_of(&error));
                Err(error)
            }
        }
    }

    /// Which manifest of this repository the name leads to, unless it was found false.
    async fn here(&self, repo: &Repo, target: &Target) -> Result<Option<Digest>, StoreError> {
        let digest = match target {
            Target::Digest(digest) => Some(*digest),
            Target::Tag(tag) => self.store.reference(repo, tag).await?.manifest,
        };
        let Some(digest) = digest.filter(|digest| !self.refused.lock().has(*digest)) else { return Ok(None) };
        Ok(self.store.manifest_link(repo, digest).await?.map(|_| digest))
    }

    fn is_fresh(&self, repo: &Repo, target: &Target, now: Instant) -> bool {
        match target {
            Target::Digest(_) => true,
            Target::Tag(tag) => self.tags.lock().is_fresh(repo, tag, now),
        }
    }

    /// Asks, or waits for whoever asks already.
    async fn ask(self: &Arc<Self>, repo: &Repo, target: &Target) -> Result<(), ApiError> {
        let (upstream, key) = (Arc::clone(self), (repo.clone(), target.clone()));
        let mut asked = self.asking.join(key, None, |sender| async move {
            let ended = upstream.fetch_manifest(sender.key()).await;
            sender.send_modify(|asked| *asked = Some(ended.map_err(Arc::new)));
        })?;
        let ended = asked.wait_for(Option::is_some).await.map_err(|_| StoreError::Closed)?;
        match ended.as_ref().expect("waited for") {
            Ok(()) => Ok(()),
            Err(error) => Err(ApiError::Shared(Arc::clone(error))),
        }
    }

    async fn fetch_manifest(&self, (repo, target): &(Repo, Target)) -> Result<(), ApiError> {
        let asked = match target {
            Target::Digest(digest) => self.fetch_digest(repo, *digest).await,
            Target::Tag(tag) => self.fetch_tag(repo, tag).await,
        };
        asked.map_err(|error| match error {
            ApiError::Upstream(WireError::NotFound { .. }) => {
                ApiError::ManifestUnknown(format!("{repo} {target}"))
            }
            other => other,
        })
    }

    async fn fetch_digest(&self, repo: &Repo, digest: Digest) -> Result<(), ApiError> {
        if self.refused.lock().has(digest) {
            return Err(refusal(digest));
        }
        let came = self.fetch(repo, &Version::Digest(digest)).await?;
        self.keep(repo, came).await.map(drop)
    }

    async fn fetch_tag(&self, repo: &Repo, tag: &Tag) -> Result<(), ApiError> {
        let known = self.here(repo, &Target::Tag(tag.clone())).await?;
        let asking = self.ask_tag(repo, tag);
        // what has come is kept in any case: half of it would be taken for all of it
        let meant = match known {
            None => asking.await?,
            Some(_) => timeout(KNOWN_WAIT, asking).await.unwrap_or_else(|_| {
                let url = self.client.base().to_owned();
                Err(WireError::Timeout { url, waited: KNOWN_WAIT }.into())
            })?,
        };
        let digest = match meant {
            Meant::Here(digest) => {
                self.metrics.passed_on("manifest", "hit");
                digest
            }
            Meant::Came(came) => self.keep(repo, came).await?,
        };
        if self.store.set_tag(repo, tag, Some(digest)).await? {
            tracing::info!(target: "audit", %repo, %tag, %digest, "the tag is what it is upstream");
        }
        self.tags.lock().note_asked(repo, tag, Instant::now());
        Ok(())
    }

    /// Asks what the tag means, and for the manifest only where that is not here.
    async fn ask_tag(&self, repo: &Repo, tag: &Tag) -> Result<Meant<'_>, ApiError> {
        let version = Version::Tag(tag.to_string());
        let version = match self.client.manifest_digest(repo.as_str(), &version).await {
            // one that knows no HEAD, or no such header, is asked for the document
            Err(error) if error.is_unserved() && !error.is_not_found() => version,
            said => match said? {
                Some(digest) if self.refused.lock().has(digest) => return Err(refusal(digest)),
                Some(digest) if self.store.manifest_link(repo, digest).await?.is_some() => {
                    return Ok(Meant::Here(digest));
                }
                // by the digest that was said, so that nothing else is taken for it
                Some(digest) => Version::Digest(digest),
                None => version,
            },
        };
        self.fetch(repo, &version).await.map(Meant::Came)
    }

    async fn fetch(&self, repo: &Repo, version: &Version) -> Result<Came<'_>, ApiError> {
        let place = self.manifests.acquire().await.expect("never closed");
        let fetched = self.client.manifest(repo.as_str(), version).await?;
        Ok(Came { fetched, _place: place })
    }

    /// Keeps a manifest, where it is one.
    async fn keep(&self, repo: &Repo, came: Came<'_>) -> Result<Digest, ApiError> {
        let Came { fetched: Fetched { media_type, digest, bytes }, _place } = came;
        if self.refused.lock().has(digest) {
            return Err(refusal(digest));
        }
        let nonsense = |reason: String| {
            let url = format!("{}/v2/{repo}/manifests/{digest}", self.client.base());
            ApiError::Upstream(WireError::Answer { url, reason })
        };
        let media_type =
            media_type_of(Some(&media_type), &bytes).map_err(|error| nonsense(error.to_string()))?;
        let document = Document::parse(&media_type, &bytes).map_err(|error| nonsense(error.to_string()))?;
        check_claims(&self.store, repo, digest, &document).await?;
        let referrer = referrer_of_document(&document, &media_type, digest, bytes.len() as u64);
        let len = bytes.len() as u64;
        self.store.put_manifest(repo, ManifestPut { digest, media_type, bytes, referrer }).await?;
        self.images.forget(repo, digest);
        self.metrics.passed_on("manifest", "miss");
        self.metrics.upstream_received.inc_by(len);
        tracing::info!(target: "audit", %repo, %digest, bytes = len, "a manifest came from the upstream");
        Ok(digest)
    }
}

fn refusal(digest: Digest) -> ApiError {
    let text = "is not what it says it is: this registry has checked it, and refuses it; its log says why";
    ApiError::ManifestInvalid(format!("the upstream's image {digest} {text}"))
}

/// What a failure is called where it is counted.
fn outcome_of(error: &ApiError) -> &'static str {
    match error.root() {
        ApiError::ManifestUnknown(_) | ApiError::BlobUnknown(_) => "absent",
        _ => "error",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lamina_store::StoreConfig;
    use lamina_wire::ClientConfig;

    use super::*;

    /// An upstream where nobody answers.
    pub(super) async fn away(directory: &Path) -> Arc<Upstream> {
        let store = StoreConfig::new(directory.join("index"));
        let store = Store::open_directory(directory, store).await.unwrap();
        let client =
            Client::new("127.0.0.1:1", ClientConfig { tries: 1, ..ClientConfig::default() }).unwrap();
        let config = UpstreamConfig { client, revalidate: Duration::ZERO, spool: directory.to_owned() };
        Upstream::new(store, config, Metrics::default())
    }
}
