//! Trees for images that came without: one worker, whose queue is the jobs in the store.
//!
//! A job is written before the tag that its image appears under, so a crash at any moment leaves either no tag or a
//! job. Several repositories with one image have one tree; each gets a referrer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lamina_image::{Digest, Document, IngestError, Manifest, Progress};
use lamina_store::{ImageRecord, ImageState, LayerCounts, Repo, Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::Instrument;
use tracing::field::Empty;

use crate::RegistryConfig;
use crate::ingest::{Converted, converts, counts_of};
use crate::learn::Learner;
use crate::metrics::Metrics;
use crate::observe::failed;

/// How often jobs are looked for when nobody calls: another replica may have left one.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Tries of a job of which the store failed, and the pause between them.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);

/// Why an image has no tree.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConvertError {
    /// The image is at fault. Another try will not help.
    #[error("{0}")]
    Image(String),
    /// The store is at fault. Another try may help.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry is going down. The job stays.
    #[error("stopped")]
    Stopped,
}

impl From<IngestError> for ConvertError {
    fn from(error: IngestError) -> Self {
        match error {
            IngestError::Stopped => Self::Stopped,
            IngestError::Sink(error) => match error.downcast::<StoreError>() {
                Ok(error) => Self::Store(*error),
                Err(error) => Self::Image(error.to_string()),
            },
            other => Self::Image(other.to_string()),
        }
    }
}

/// The worker and what it is doing.
#[derive(Debug)]
pub(crate) struct Converter {
    pub(crate) store: Store,
    pub(crate) config: RegistryConfig,
    learner: Arc<Learner>,
    metrics: Metrics,
    wake: Notify,
    stopped: AtomicBool,
    current: Mutex<Option<(Digest, Arc<Progress>)>>,
}

impl Converter {
    pub(crate) fn new(store: Store, config: RegistryConfig, learner: Arc<Learner>, metrics: Metrics) -> Self {
        let (wake, stopped, current) = (Notify::new(), AtomicBool::new(false), Mutex::new(None));
        Self { store, config, learner, metrics, wake, stopped, current }
    }

    /// Makes the worker end; a layer that it reads is left in the middle.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        if let Some((_, progress)) = &*self.current.lock() {
            progress.stop.store(true, Ordering::Relaxed);
        }
        self.wake.notify_one();
    }

    /// What is counted so far, where this image is at work.
    pub(crate) fn counts(&self, image: Digest) -> Option<LayerCounts> {
        let current = self.current.lock();
        let (digest, progress) = current.as_ref()?;
        (*digest == image).then(|| counts_of(progress))
    }

    /// Sees to it that an image gets its tree in this repository: at once where it has one, else by a job. Anything
    /// else than an image of file systems gets none.
    pub(crate) async fn want(
        &self,
        repo: &Repo,
        digest: Digest,
        document: &Document,
    ) -> Result<(), StoreError> {
        match document {
            Document::Manifest(manifest) if converts(manifest) => {}
            _ => return Ok(()),
        }
        match self.store.image(digest).await? {
            Some(image) if image.state == ImageState::Done => {
                if self.is_image_near(repo, &image).await? {
                    return self.attach(repo, digest, &image).await;
                }
            }
            Some(image) if image.state == ImageState::Converting => {}
            // what has failed gets another chance
            _ => self.store.put_image(digest, &ImageRecord::queued(self.config.now())).await?,
        }
        self.store.put_job(digest, repo).await?;
        self.wake.notify_one();
        Ok(())
    }

    /// Works until it is stopped.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.stopped.load(Ordering::Acquire) {
            let jobs = self.store.jobs().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "the jobs cannot be listed");
                Vec::new()
            });
            let Some((digest, repo)) = jobs.into_iter().next() else {
                // either somebody calls, or it is time to look anyway
                let _ = timeout(LOOK_EVERY, self.wake.notified()).await;
                continue;
            };
            if let Err(error) = self.work(digest, &repo).await {
                tracing::warn!(image = %digest, %repo, %error, "a job was left for later");
                let _ = timeout(PAUSE, self.wake.notified()).await;
            }
        }
    }

    /// Does one job. An error leaves it.
    async fn work(&self, digest: Digest, repo: &Repo) -> Result<(), StoreError> {
        let Some((media_type, bytes)) = self.store.manifest(repo, digest).await? else {
            // taken out of the repository meanwhile
            return self.store.delete_job(digest, repo).await;
        };
        match self.store.image(digest).await? {
            Some(image) if image.state == ImageState::Done && self.is_image_near(repo, &image).await? => {
                self.attach(repo, digest, &image).await?;
            }
            known => {
                // what was made for a repository that is too far away stays on record, and this one gets its own
                let elsewhere = known.as_ref().is_some_and(|image| image.state == ImageState::Done);
                let queued = known.unwrap_or_else(|| ImageRecord::queued(self.config.now()));
                let span =
                    tracing::info_span!("convert", %repo, image = %digest, otel.status_description = Empty);
                let converted = match Document::parse(&media_type, &bytes) {
                    Ok(Document::Manifest(manifest)) => {
                        self.convert(repo, digest, &manifest, &bytes).instrument(span.clone()).await
                    }
                    Ok(Document::Index(_)) => Err(ConvertError::Image("it is an index".to_owned())),
                    Err(error) => Err(ConvertError::Image(error.to_string())),
                };
                if let Err(error) = &converted {
                    failed(&span, error);
                }
                drop(span);
                let Some(image) = self.conclude(digest, queued, converted) else { return Ok(()) };
                // whoever hears that it is done finds the tree
                self.attach(repo, digest, &image).await?;
                if !elsewhere {
                    self.store.put_image(digest, &image).await?;
                }
            }
        }
        self.learner.inherit(repo, digest);
        self.store.delete_job(digest, repo).await
    }

    /// The record of what came out; `None` where the job has to stay.
    fn conclude(
        &self,
        digest: Digest,
        queued: ImageRecord,
        converted: Result<Converted, ConvertError>,
    ) -> Option<ImageRecord> {
        let finished_at = Some(self.config.now());
        match converted {
            Ok(Converted { tree, artifact, counts }) => {
                tracing::info!(image = %digest, tree = %tree.digest, ?counts, "an image has its tree");
                self.metrics.converted("done");
                let (tree, artifact) = (Some(tree), Some(artifact));
                Some(ImageRecord { state: ImageState::Done, tree, artifact, counts, finished_at, ..queued })
            }
            Err(ConvertError::Stopped) => None,
            Err(error) => {
                tracing::warn!(image = %digest, %error, "an image gets no tree");
                self.metrics.converted("failed");
                let reason = Some(error.to_string());
                Some(ImageRecord { state: ImageState::Failed, reason, finished_at, ..queued })
            }
        }
    }

    /// Converts an image, again where the store failed.
    async fn convert(
        &self,
        repo: &Repo,
        digest: Digest,
        manifest: &Manifest,
        bytes: &[u8],
    ) -> Result<Converted, ConvertError> {
        let mut tries = 1;
        loop {
            let progress = Arc::new(Progress::default());
            *self.current.lock() = Some((digest, Arc::clone(&progress)));
            // where the stop came before there was anything to stop
            progress.stop.store(self.stopped.load(Ordering::Acquire), Ordering::Relaxed);
            let converted = self.convert_once(repo, (digest, manifest, bytes), &progress).await;
            *self.current.lock() = None;
            match converted {
                Err(ConvertError::Store(_)) if self.stopped.load(Ordering::Acquire) => {
                    return Err(ConvertError::Stopped);
                }
                Err(ConvertError::Store(error)) if tries < TRIES => {
                    tracing::warn!(image = %digest, %error, tries, "the store failed in a conversion; trying again");
                    tries += 1;
                    let _ = timeout(PAUSE, self.wake.notified()).await;
                }
                other => return other,
            }
        }
    }
}
