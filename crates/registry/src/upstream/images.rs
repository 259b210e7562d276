//! Images that somebody wants, of which everything is to come here: a bounded queue, and what became of each.
//!
//! An image whose parts are here is converted, or where it names its tree itself, checked, as if it had been pushed. One
//! that is found false is taken out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::PackId;
use lamina_image::{Digest, Document, Manifest, RECIPE_ANNOTATION};
use lamina_store::{ImageRecord, ImageState, Repo, StoreError};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;
use tracing::field::Empty;

use super::Upstream;
use crate::ApiError;
use crate::api::Api;
use crate::ingest::converts;
use crate::observe::failed;
use crate::put::blobs_of;
use crate::route::Target;

/// Images that wait: whoever asks for one more asks again.
const WAITING_MAX: usize = 256;
/// Images of which it is known what became of them.
const KNOWN_MAX: usize = 4096;
/// Images that come at the same time: a small one does not wait for one of 20 GB.
const IMAGES_AT_ONCE: usize = 2;
/// Blobs of one of them that do: enough to fill a link, and most of [`FETCHES_MAX`](super::FETCHES_MAX) is left to clients.
const BLOBS_AT_ONCE: usize = 3;
/// An image that did not come is not tried again before.
const PAUSE: Duration = Duration::from_secs(30);
/// One that came and was queued for conversion is not looked at again before: to convert costs more than to ask.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Debug)]
pub(crate) struct Images {
    known: Mutex<HashMap<(Repo, Digest), State>>,
    sender: mpsc::Sender<(Repo, Digest)>,
    /// Whoever works takes it.
    receiver: Mutex<Option<mpsc::Receiver<(Repo, Digest)>>>,
}

#[derive(Debug)]
enum State {
    Coming,
    /// Everything is here since then, or was when somebody looked what became of it.
    Whole {
        at: Instant,
    },
    Failed {
        reason: String,
        at: Instant,
    },
}

impl Default for Images {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        Self { known: Mutex::default(), sender, receiver: Mutex::new(Some(receiver)) }
    }
}

impl Images {
    /// Somebody has asked for this image.
    fn want(&self, repo: &Repo, image: Digest) {
        let key = (repo.clone(), image);
        let mut known = self.known.lock();
        match known.get(&key) {
            Some(State::Coming | State::Whole { .. }) => return,
            Some(State::Failed { at, .. }) if at.elapsed() < PAUSE => return,
            _ => {}
        }
        if known.len() >= KNOWN_MAX {
            known.retain(|_, state| matches!(state, State::Coming));
        }
        match self.sender.try_send(key.clone()) {
            Ok(()) => drop(known.insert(key, State::Coming)),
            Err(_) => {
                tracing::warn!(%repo, %image, "too many images are to come; this one waits to be asked for again")
            }
        }
    }

    /// Whether it is time to look what became of an image that came. Who hears so looks, and nobody else for a while.
    fn is_due(&self, repo: &Repo, image: Digest) -> bool {
        match self.known.lock().get_mut(&(repo.clone(), image)) {
            Some(State::Whole { at }) if at.elapsed() >= LOOK_AGAIN => {
                *at = Instant::now();
                true
            }
            _ => false,
        }
    }

    /// The image is new here: what became of it before, if it was here, does not count.
    pub(super) fn forget(&self, repo: &Repo, image: Digest) {
        let (key, mut known) = ((repo.clone(), image), self.known.lock());
        if !matches!(known.get(&key), Some(State::Coming)) {
            known.remove(&key);
        }
    }

    /// What there is to say of an image that the store has no record of.
    pub(crate) fn record(&self, repo: &Repo, image: Digest, now: u64) -> Option<ImageRecord> {
        match self.known.lock().get(&(repo.clone(), image))? {
            State::Coming => Some(ImageRecord::queued(now)),
            State::Whole { .. } => None,
            State::Failed { reason, .. } => {
                let reason = Some(format!("it did not come from the upstream: {reason}"));
                Some(ImageRecord { state: ImageState::Failed, reason, ..ImageRecord::queued(now) })
            }
        }
    }

    fn conclude(&self, key: (Repo, Digest), ended: Result<(), ApiError>) {
        let state = match ended {
            Ok(()) => State::Whole { at: Instant::now() },
            Err(error) => {
                tracing::warn!(repo = %key.0, image = %key.1, %error, "an image did not come whole");
                State::Failed { reason: error.reason(), at: Instant::now() }
            }
        };
        self.known.lock().insert(key, state);
    }
}

impl Api {
    /// Brings what is wanted, as long as it is polled. Returns at once where there is no upstream.
    pub(crate) async fn bring_images(self: Arc<Self>) {
        let Some(upstream) = &self.upstream else { return };
        let mut wanted = upstream.images.receiver.lock().take().expect("one worker takes it");
        let wanted = stream::poll_fn(move |context| wanted.poll_recv(context));
        let api = &self;
        let bring = |(repo, image)| async move {
            let span = tracing::info_span!("bring", %repo, %image, otel.status_description = Empty);
            let ended = api.bring_image(upstream, &repo, image).instrument(span.clone()).await;
            if let Err(error) = &ended {
                failed(&span, error);
            }
            drop(span);
            if ended.as_ref().is_err_and(is_false) {
                api.refuse(upstream, &repo, image).await;
            }
            upstream.images.conclude((repo, image), ended);
        };
        wanted.for_each_concurrent(IMAGES_AT_ONCE, bring).await;
    }

    async fn bring_image(
        &self,
        upstream: &Arc<Upstream>,
        repo: &Repo,
        image: Digest,
    ) -> Result<(), ApiError> {
        let Some((media_type, bytes)) = self.store.manifest(repo, image).await? else { return Ok(()) };
        let document = Document::parse(&media_type, &bytes)?;
        let manifest = match &document {
            Document::Manifest(manifest) if converts(manifest) => manifest,
            _ => return Ok(()),
        };
        let Some(tree) = manifest.bound_tree()? else {
            upstream.bring_blobs(repo, blobs_of(&document)).await?;
            return Ok(self.converter.want(repo, image, &document).await?);
        };
        self.bring_bound(upstream, repo, (image, manifest, tree)).await
    }

    /// An image that was found false is not served any more, under no name.
    async fn refuse(&self, upstream: &Upstream, repo: &Repo, image: Digest) {
        // first, so that nobody brings it again meanwhile
        upstream.refused.lock().note(image);
        match self.delete_manifest(repo, Target::Digest(image)).await {
            Ok(_) => tracing::info!(target: "audit", %repo, %image, "a false image was taken out"),
            Err(error) => tracing::error!(%repo, %image, %error, "a false image cannot be taken out"),
        }
    }

    /// Its layers are not fetched: recipes and packs make them.
    async fn bring_bound(
        &self,
        upstream: &Arc<Upstream>,
        repo: &Repo,
        (image, manifest, tree): (Digest, &Manifest, Digest),
    ) -> Result<(), ApiError> {
        let recipes = manifest.layers.iter().filter_map(|layer| layer.annotations.get(RECIPE_ANNOTATION));
        let recipes: BTreeSet<Digest> = recipes.filter_map(|recipe| recipe.parse().ok()).collect();
        let small = recipes.iter().copied().chain([manifest.config.digest, tree]);
        upstream.bring_blobs(repo, small).await?;
        let mut packs = BTreeMap::<PackId, Vec<_>>::new();
        for recipe in recipes {
            let recipe = self.store.recipe(recipe).await?;
            for (id, place) in recipe.frames() {
                packs.entry(place.pack).or_default().push((*id, place.frame));
            }
        }
        let bring = packs.into_iter().map(|(pack, frames)| upstream.bring_pack(repo, pack, frames));
        stream::iter(bring).buffer_unordered(BLOBS_AT_ONCE).try_collect::<()>().await?;
        if let Some(record) = self.admit(repo, image, manifest).await? {
            self.store.put_image(image, &record).await?;
        }
        self.learner.inherit(repo, image);
        Ok(())
    }
}

/// Whether an image is not what it says, which no other try makes it.
fn is_false(error: &ApiError) -> bool {
    matches!(error.root(), ApiError::ManifestInvalid(_) | ApiError::Store(StoreError::Recipe(_)))
}

impl Upstream {
    /// Somebody has asked for this image: it is to come, once more where it came and its conversion has failed.
    pub(crate) async fn want_image(&self, repo: &Repo, image: Digest) -> Result<(), StoreError> {
        if self.images.is_due(repo, image) {
            let known = self.store.image(image).await?;
            if known.is_some_and(|known| known.state == ImageState::Failed) {
                self.images.forget(repo, image);
            }
        }
        self.images.want(repo, image);
        Ok(())
    }

    async fn bring_blobs(
        self: &Arc<Self>,
        repo: &Repo,
        digests: impl IntoIterator<Item = Digest>,
    ) -> Result<(), ApiError> {
        let digests: BTreeSet<Digest> = digests.into_iter().collect();
        let bring = digests.into_iter().map(|digest| self.bring_blob(repo, digest));
        stream::iter(bring).buffer_unordered(BLOBS_AT_ONCE).try_collect().await
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::away;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_image_that_came_is_wanted_again_after_a_while_where_its_conversion_has_failed() {
        let directory = tempfile::tempdir().unwrap();
        let (upstream, repo): (_, Repo) = (away(directory.path()).await, "app".parse().unwrap());
        for (state, again) in [(ImageState::Failed, true), (ImageState::Converting, false)] {
            let image = Digest::of(format!("{state:?}").as_bytes());
            let record = ImageRecord { state, ..ImageRecord::queued(0) };
            upstream.store.put_image(image, &record).await.unwrap();
            upstream.images.conclude((repo.clone(), image), Ok(()));
            upstream.want_image(&repo, image).await.unwrap();
            assert!(upstream.images.record(&repo, image, 0).is_none(), "it is too early");
            tokio::time::advance(LOOK_AGAIN).await;
            upstream.want_image(&repo, image).await.unwrap();
            assert_eq!(upstream.images.record(&repo, image, 0).is_some(), again, "{state:?}");
        }
    }
}
