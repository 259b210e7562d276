//! Learning from starts: one worker that turns traces into profiles, and profiles into boot packs.
//!
//! An image has a general profile, of all its starts, and one for each command that starts say they are of, up to a bound.
//!
//! What waits is in memory only: a restart loses it, and the next start of the image tells it again. What was learnt is
//! in the store: a profile and a boot pack hang on the image as artifacts. New ones are there before old ones go, so
//! whoever looks in between finds one or both of them, and both are good. Whatever fails is logged and changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lamina_chunk::{Chunk, FrameId, Place};
use lamina_image::{
    CommandKey, Descriptor, Digest, Inheritance, Profile, ProfileError, Tree, TreeError, media_type,
};
use lamina_store::{Repo, Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::Instrument;
use tracing::field::Empty;

use crate::observe::failed;
use crate::queue::{Job, Of, Pushed, Queue, Work};

mod hung;
mod predecessor;
mod revise;

pub(crate) use hung::Hung;
use hung::Slot;
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
    /// What time it is.
    clock: fn() -> SystemTime,
    queue: Mutex<Queue>,
    wake: Notify,
    stopped: Arc<AtomicBool>,
}

/// An image that has a tree, and what is known of it.
struct Known {
    subject: Subject,
    tree: Tree,
    hung: Hung,
}

/// An image that has a tree.
struct Subject {
    repo: Repo,
    /// Its manifest.
    image: Descriptor,
    tree: Descriptor,
}

impl Learner {
    pub(crate) fn new(store: Store, trace_every: Duration, clock: fn() -> SystemTime) -> Self {
        let (queue, wake, stopped) = (Mutex::default(), Notify::new(), Arc::default());
        Self { store, trace_every, clock, queue, wake, stopped }
    }

    /// Makes the worker end. What waits is lost.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// Whether a trace of this image and command would be dropped now.
    pub(crate) fn was_traced(&self, of: &Of) -> bool {
        self.queue.lock().was_traced(of, Instant::now(), self.trace_every)
    }

    /// Leaves something to do.
    pub(crate) fn push(&self, of: Of, work: Work) -> Pushed {
        let image = of.image;
        let pushed = self.queue.lock().push(Job { of, work }, Instant::now(), self.trace_every);
        tracing::debug!(%image, ?pushed, "something to learn");
        self.wake.notify_one();
        pushed
    }

    /// Sees to it that the image takes over its predecessor's profile, where it has none. Where there is no room in the
    /// queue, its first start teaches the same.
    pub(crate) fn inherit(&self, repo: &Repo, image: Digest) {
        self.push(Of { repo: repo.clone(), image, command: None }, Work::Inherit);
    }

    /// Works until it is stopped.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.stopped.load(Ordering::Acquire) {
            let job = self.queue.lock().pop();
            let Some(job) = job else {
                self.wake.notified().await;
                continue;
            };
            let (repo, image) = (job.of.repo.clone(), job.of.image);
            let span = tracing::info_span!("learn", %repo, %image, otel.status_description = Empty);
            match self.work(job).instrument(span.clone()).await {
                Ok(()) | Err(LearnError::Stopped) => {}
                Err(error) => {
                    failed(&span, &error);
                    tracing::warn!(%repo, %image, %error, "nothing was learnt");
                }
            }
        }
    }

    async fn work(&self, job: Job) -> Result<(), LearnError> {
        let Job { of: Of { repo, image, command }, work } = job;
        let hung = Hung::find(&self.store, &repo, image).await?;
        let command = command.as_ref();
        match work {
            Work::Forget => {
                let forgotten = if command.is_some() { hung.of(command) } else { hung };
                Ok(forgotten.remove(&self.store, &repo, image).await?)
            }
            Work::Inherit if !hung.of(None).profiles.is_empty() => Ok(()),
            Work::Inherit => self.take_over(&repo, image, hung).await,
            Work::Trace(message) => match self.known(&repo, image, hung).await? {
                Some(known) => self.hear(&known, command, message).await,
                None => Ok(()),
            },
            Work::Replace(json) => match self.known(&repo, image, hung).await? {
                Some(known) => self.revise(&known, command, Source::Profile(json)).await,
                None => Ok(()),
            },
        }
    }

    /// Takes over what was learnt of the image before. The general profile comes last: without it, all is tried again.
    async fn take_over(&self, repo: &Repo, image: Digest, hung: Hung) -> Result<(), LearnError> {
        let Some((old, before)) = self.predecessor(repo, image).await? else { return Ok(()) };
        let Some(known) = self.known(repo, image, hung).await? else { return Ok(()) };
        let old = self.tree_of(repo, old).await.unwrap_or_else(|error| {
            tracing::warn!(%repo, %image, %old, %error, "libraries are not looked at");
            None
        });
        let mut inheritance = Inheritance::new(old.as_ref(), &known.tree);
        for command in before.commands().iter().map(Some).chain([None]) {
            if !known.hung.of(command).profiles.is_empty() {
                continue;
            }
            if let Some(json) = before.of(command).profile(&self.store).await? {
                let inherited;
                (inheritance, inherited) = self.inherited(inheritance, json).await?;
                self.revise(&known, command, Source::Predecessor(inherited)).await?;
            }
        }
        Ok(())
    }

    /// What follows from a profile of the image before, which is JSON.
    async fn inherited(
        &self,
        mut inheritance: Inheritance,
        json: Bytes,
    ) -> Result<(Inheritance, Profile), LearnError> {
        let mut open = self.frames();
        let inherited = tokio::task::spawn_blocking(move || {
            let profile = Profile::parse(&json)?;
            let inherited = inheritance.of(&profile, |id, place| {
                open(id, place).inspect_err(|error| tracing::warn!(%error, "libraries are not looked at"))
            })?;
            Ok((inheritance, inherited))
        });
        inherited.await.expect("taking over does not panic")
    }

    /// Opens frames of any image, on a thread that may wait.
    fn frames(&self) -> impl FnMut(FrameId, Place) -> Result<Chunk, LearnError> + Send + 'static {
        let (store, stopped) = (self.store.clone(), Arc::clone(&self.stopped));
        let runtime = tokio::runtime::Handle::current();
        move |id, place| {
            if stopped.load(Ordering::Acquire) {
                return Err(LearnError::Stopped);
            }
            let opened = runtime.block_on(store.sealed(place))?.open(id);
            opened.map_err(|error| StoreError::Frame { pack: place.pack, error }.into())
        }
    }

    /// Learns from a start: of its command, and of the image in general.
    async fn hear(
        &self,
        known: &Known,
        command: Option<&CommandKey>,
        message: Bytes,
    ) -> Result<(), LearnError> {
        let general = known.hung.of(None).profile(&self.store).await?;
        let own = match command {
            Some(command) => known.hung.of(Some(command)).profile(&self.store).await?,
            None => None,
        };
        let tree = known.tree.clone();
        let starts = tokio::task::spawn_blocking(move || {
            let (own, general) = (revise::stored(own), revise::stored(general));
            revise::starts(&tree, message, own.as_ref(), general.as_ref())
        });
        let Some(starts) = starts.await.expect("merging does not panic")? else { return Ok(()) };
        if let (Some(command), Some(start)) = (command, starts.own) {
            self.revise(known, Some(command), Source::Start(start)).await?;
        }
        match starts.general {
            Some(start) => self.revise(known, None, Source::Start(start)).await,
            None => Ok(()),
        }
    }

    /// Revises the profile of a command, or the general one, and builds the boot pack that follows from it.
    async fn revise(
        &self,
        known: &Known,
        command: Option<&CommandKey>,
        source: Source,
    ) -> Result<(), LearnError> {
        let hung = known.hung.of(command);
        let json = hung.profile(&self.store).await?;
        let revised =
            tokio::task::spawn_blocking(move || revise::revise(revise::stored(json).as_ref(), source));
        let Some(revised) = revised.await.expect("merging does not panic")? else { return Ok(()) };
        let Revised { profile, json, pages_changed, steady } = revised;
        let builds = pages_changed || hung.boots.is_empty();
        if steady && !builds {
            return Ok(());
        }
        let (starts, pages, slot) = (profile.starts, profile.pages(), Slot { command, now: self.now() });
        // the profile comes last: where the boot pack fails, the next start tries again
        if builds {
            self.put_boot(known, slot, profile, &hung).await?;
        }
        known.subject.put_profile(&self.store, slot, json, &hung).await?;
        let (repo, image) = (&known.subject.repo, known.subject.image.digest);
        let command = command.map_or("", CommandKey::as_str);
        tracing::info!(%repo, %image, command, starts, pages, pages_changed, "a profile was learnt");
        match slot.command {
            Some(command) => self.make_room(&known.subject, command).await,
            None => Ok(()),
        }
    }

    /// Takes down what is known of the commands that are too many beside `new`.
    async fn make_room(&self, subject: &Subject, new: &CommandKey) -> Result<(), LearnError> {
        let (repo, image) = (&subject.repo, subject.image.digest);
        let hung = Hung::find(&self.store, repo, image).await?;
        for command in hung.surplus(new) {
            tracing::info!(%repo, %image, %command, "a profile was dropped: others of its image are newer");
            hung.of(Some(&command)).remove(&self.store, repo, image).await?;
        }
        Ok(())
    }

    /// Seconds since 1970.
    fn now(&self) -> u64 {
        (self.clock)().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }

    /// The image and its tree, beside what hangs on it.
    async fn known(&self, repo: &Repo, image: Digest, hung: Hung) -> Result<Option<Known>, LearnError> {
        let Some(subject) = self.subject(repo, image).await? else { return Ok(None) };
        Ok(Some(Known { tree: self.tree(&subject).await?, subject, hung }))
    }

    /// The image, if it is still in the repository and has its tree.
    async fn subject(&self, repo: &Repo, image: Digest) -> Result<Option<Subject>, StoreError> {
        let Some(link) = self.store.manifest_link(repo, image).await? else { return Ok(None) };
        let record = self.store.image(image).await?;
        let Some(tree) = record.and_then(|record| record.tree) else { return Ok(None) };
        let image = Descriptor::named(&link.media_type, image, link.size);
        Ok(Some(Subject { repo: repo.clone(), image, tree }))
    }

    async fn tree_of(&self, repo: &Repo, image: Digest) -> Result<Option<Tree>, LearnError> {
        match self.subject(repo, image).await? {
            Some(subject) => Ok(Some(self.tree(&subject).await?)),
            None => Ok(None),
        }
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
        known: &Known,
        slot: Slot<'_>,
        profile: Profile,
        hung: &Hung,
    ) -> Result<(), LearnError> {
        let begun = Instant::now();
        let (subject, tree) = (&known.subject, known.tree.clone());
        let (open, digest) = (self.frames(), subject.tree.digest);
        let built = tokio::task::spawn_blocking(move || revise::build(&tree, digest, profile, open));
        let boot = built.await.expect("building does not panic")?;
        let bytes = boot.as_ref().map_or(0, Vec::len);
        let (repo, image, elapsed) = (&subject.repo, subject.image.digest, begun.elapsed());
        tracing::info!(%repo, %image, bytes, ?elapsed, "a boot pack was built");
        Ok(subject.put_boot(&self.store, slot, boot, hung).await?)
    }
}

/// The profile and the boot pack of an image, as its status shows them.
pub(crate) async fn status(
    store: &Store,
    repo: &Repo,
    image: Digest,
) -> Result<serde_json::Map<String, serde_json::Value>, StoreError> {
    let all = Hung::find(store, repo, image).await?;
    let hung = all.of(None);
    let mut status = serde_json::Map::new();
    let json = hung.profile(store).await?;
    let parsed = tokio::task::spawn_blocking(move || json.and_then(|json| Profile::parse(&json).ok())).await;
    if let Some(profile) = parsed.expect("parsing does not panic") {
        let (starts, pages, inherited) = (profile.starts, profile.pages(), profile.inherited);
        let shown = serde_json::json!({ "starts": starts, "pages": pages, "inherited": inherited });
        status.insert("profile".to_owned(), shown);
    }
    if let Some(boot) = hung.boot() {
        status.insert("boot".to_owned(), boot_status(&boot));
    }
    let boots = all.commands().into_iter().map(|command| {
        let boot = all.of(Some(&command)).boot();
        (command.to_string(), serde_json::json!({ "boot": boot.as_ref().map(boot_status) }))
    });
    let commands: serde_json::Map<_, _> = boots.collect();
    if !commands.is_empty() {
        status.insert("commands".to_owned(), commands.into());
    }
    Ok(status)
}

fn boot_status(boot: &Descriptor) -> serde_json::Value {
    serde_json::json!({ "mediaType": media_type::BOOT, "digest": boot.digest, "size": boot.size })
}
