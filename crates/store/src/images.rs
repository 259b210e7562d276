//! What became of images, and which still wait for their tree.

use futures_util::TryStreamExt;
use lamina_image::Digest;

use crate::record::ImageRecord;
use crate::{Repo, Store, StoreError, keys};

/// Jobs in one listing: enough that a worker is never idle, few enough to sort.
const JOBS_MAX: usize = 10_000;

impl Store {
    /// What became of the image with this manifest. No collection removes its tree from now on.
    pub async fn image(&self, manifest: Digest) -> Result<Option<ImageRecord>, StoreError> {
        self.objects.take_json(&keys::image(manifest)).await
    }

    /// Writes down what became of an image. The tree and all it names must be durable.
    pub async fn put_image(&self, manifest: Digest, image: &ImageRecord) -> Result<(), StoreError> {
        self.objects.put_json(&keys::image(manifest), image).await
    }

    /// Asks for the tree of an image on behalf of a repository. Survives a restart.
    pub async fn put_job(&self, manifest: Digest, repo: &Repo) -> Result<(), StoreError> {
        self.objects.put(&keys::job(manifest, repo), "{}".into()).await
    }

    /// The job is done.
    pub async fn delete_job(&self, manifest: Digest, repo: &Repo) -> Result<(), StoreError> {
        self.objects.delete(&keys::job(manifest, repo)).await
    }

    /// The jobs that wait, the oldest first.
    pub async fn jobs(&self) -> Result<Vec<(Digest, Repo)>, StoreError> {
        let mut listing = self.objects.list(&keys::jobs());
        let mut jobs = Vec::new();
        while let Some(object) = listing.try_next().await? {
            if let Some((manifest, repo)) = keys::parse_job(&object.location) {
                jobs.push((object.last_modified, manifest, repo));
            }
            if jobs.len() == JOBS_MAX {
                break;
            }
        }
        jobs.sort();
        Ok(jobs.into_iter().map(|(_, manifest, repo)| (manifest, repo)).collect())
    }
}
