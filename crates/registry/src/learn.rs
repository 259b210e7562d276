//! Learning from starts: one worker that turns traces into profiles, and profiles into boot packs.
//!
//! What waits is in memory only: a restart loses it, and the next start of the image tells it again. What was learnt is
//! in the store: a profile and a boot pack hang on the image as artifacts. New ones are there before old ones go, so
//! whoever looks in between finds one or both of them, and both are good. Whatever fails is logged and changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lamina_image::{Descriptor, Digest, Profile, ProfileError, Tree, TreeError, media_type};
use lamina_store::{Repo, Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::queue::{Job, Pushed, Queue, Work};

mod hung;
mod predecessor;
mod revise;

pub(crate) use hung::Hung;
use revise::{Revised, Source};

/// Why nothing was learnt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LearnError {
    /// The store is at fault, or a pack in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tree is damaged.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// What came, or what another image has, is no profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// More than a profile or a boot pack holds.
    #[error("too much for a profile or a boot pack")]
    TooLarge,
    /// The registry is going down.
    #[error("stopped")]
    Stopped,
}

/// The worker and what waits for it.
#[derive(Debug)]
pub(crate) struct Learner {
    store: Store,
    trace_every: Duration,
    queue: Mutex<Queue>,
    wake: Notify,
    stopped: Arc<AtomicBool>,
}

/// An image that has a tree.
struct Subject {
    repo: Repo,
    /// Its manifest.
    image: Descriptor,
    tree: Descriptor,
}

impl Learner {
    pub(crate) fn new(store: Store, trace_every: Duration) -> Self {
        let (queue, wake, stopped) = (Mutex::default(), Notify::new(), Arc::default());
        Self { store, trace_every, queue, wake, stopped }
    }

    /// Makes the worker end. What waits is lost.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// Whether a trace of this image would be dropped now.
    pub(crate) fn was_traced(&self, repo: &Repo, image: Digest) -> bool {
        self.queue.lock().was_traced(repo, image, Instant::now(), self.trace_every)
    }

    /// Leaves something to do.
    pub(crate) fn push(&self, repo: Repo, image: Digest, work: Work) -> Pushed {
        let pushed = self.queue.lock().push(Job { repo, image, work }, Instant::now(), self.trace_every);
        tracing::debug!(%image, ?pushed, "something to learn");
        self.wake.notify_one();
        pushed
    }

    /// Sees to it that the image takes over its predecessor's profile, where it has none. Where there is no room in the
    /// queue, its first start teaches the same.
    pub(crate) fn inherit(&self, repo: &Repo, image: Digest) {
        self.push(repo.clone(), image, Work::Inherit);
    }

    /// Works until it is stopped.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.stopped.load(Ordering::Acquire) {
            let job = self.queue.lock().pop();
            let Some(Job { repo, image, work }) = job else {
                self.wake.notified().await;
                continue;
            };
            match self.work(&repo, image, work).await {
                Ok(()) | Err(LearnError::Stopped) => {}
                Err(error) => tracing::warn!(%repo, %image, %error, "nothing was learnt"),
            }
        }
    }

    async fn work(&self, repo: &Repo, image: Digest, work: Work) -> Result<(), LearnError> {
        let hung = Hung::find(&self.store, repo, image).await?;
        let source = match work {
            Work::Forget => return Ok(hung.remove(&self.store, repo, image).await?),
            Work::Inherit if !hung.profiles.is_empty() => return Ok(()),
            Work::Inherit => match self.predecessor(repo, image).await? {
                Some(json) => Source::Predecessor(json),
                None => return Ok(()),
            },
            Work::Trace(message) => Source::Trace(message),
            Work::Replace(json) => Source::Profile(json),
        };
        let Some(subject) = self.subject(repo, image).await? else { return Ok(()) };
        let tree = self.tree(&subject).await?;
        let stored = hung.profile(&self.store).await?;
        let revising = tree.clone();
        let revised =
            tokio::task::spawn_blocking(move || revise::revise(&revising, stored.as_deref(), source));
        let Some(Revised { profile, json, pages_changed, steady }) =
            revised.await.expect("merging does not panic")?
        else {
            return Ok(());
        };
        let builds = pages_changed || hung.boots.is_empty();
        if steady && !builds {
            return Ok(());
        }
        let (starts, pages) = (profile.starts, profile.pages());
        // the profile comes last: where the boot pack fails, the next start tries again
        if builds {
            self.put_boot(&subject, tree, profile, &hung).await?;
        }
        subject.put_profile(&self.store, json, &hung).await?;
        tracing::info!(%repo, %image, starts, pages, pages_changed, "a profile was learnt");
        Ok(())
    }

    /// The image, if it is still in the repository and has its tree.
    async fn subject(&self, repo: &Repo, image: Digest) -> Result<Option<Subject>, StoreError> {
        let Some(link) = self.store.manifest_link(repo, image).await? else { return Ok(None) };
        let record = self.store.image(image).await?;
        let Some(tree) = record.and_then(|record| record.tree) else { return Ok(None) };
        let image = Descriptor::named(&link.media_type, image, link.size);
        Ok(Some(Subject { repo: repo.clone(), image, tree }))
    }

    async fn tree(&self, subject: &Subject) -> Result<Tree, LearnError> {
        let blob = self.store.small_blob(subject.tree.digest, lamina_image::TREE_BYTES_MAX).await?;
        let opened = tokio::task::spawn_blocking(move || {
            let flat = lamina_image::unpack_tree(&blob)?;
            Tree::open(flat.into())
        });
        Ok(opened.await.expect("opening does not panic")?)
    }

    /// Builds the boot pack of a profile and hangs it on the image.
    async fn put_boot(
        &self,
        subject: &Subject,
        tree: Tree,
        profile: Profile,
        hung: &Hung,
    ) -> Result<(), LearnError> {
        let begun = Instant::now();
        let (store, stopped) = (self.store.clone(), Arc::clone(&self.stopped));
        let (runtime, digest) = (tokio::runtime::Handle::current(), subject.tree.digest);
        let built = tokio::task::spawn_blocking(move || {
            revise::build(&tree, digest, profile, |id, place| {
                if stopped.load(Ordering::Acquire) {
                    return Err(LearnError::Stopped);
                }
                let opened = runtime.block_on(store.sealed(place))?.open(id);
                opened.map_err(|error| StoreError::Frame { pack: place.pack, error }.into())
            })
        });
        let boot = built.await.expect("building does not panic")?;
        let bytes = boot.as_ref().map_or(0, Vec::len);
        let (repo, image, elapsed) = (&subject.repo, subject.image.digest, begun.elapsed());
        tracing::info!(%repo, %image, bytes, ?elapsed, "a boot pack was built");
        Ok(subject.put_boot(&self.store, boot, hung).await?)
    }
}

/// The profile and the boot pack of an image, as its status shows them.
pub(crate) async fn status(
    store: &Store,
    repo: &Repo,
    image: Digest,
) -> Result<serde_json::Map<String, serde_json::Value>, StoreError> {
    let hung = Hung::find(store, repo, image).await?;
    let mut status = serde_json::Map::new();
    let json = hung.profile(store).await?;
    let parsed = tokio::task::spawn_blocking(move || json.and_then(|json| Profile::parse(&json).ok())).await;
    if let Some(profile) = parsed.expect("parsing does not panic") {
        let (starts, pages, inherited) = (profile.starts, profile.pages(), profile.inherited);
        let shown = serde_json::json!({ "starts": starts, "pages": pages, "inherited": inherited });
        status.insert("profile".to_owned(), shown);
    }
    if let Some(boot) = hung.boot() {
        let shown =
            serde_json::json!({ "mediaType": media_type::BOOT, "digest": boot.digest, "size": boot.size });
        status.insert("boot".to_owned(), shown);
    }
    Ok(status)
}
