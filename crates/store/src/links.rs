//! Which blobs belong to which repositories.
//!
//! A blob's bytes are stored once, however many repositories have it. Whoever asks for it names a repository, and gets
//! it only if it belongs there: because it was uploaded or mounted into it, or because an image there is made of it.

use std::ops::Range;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_image::Digest;

use crate::{Blob, BlobPart, Repo, Store, StoreError, keys};

/// Links that are written at the same time: an image of a hundred packs needs no more than a few round trips.
const WRITES: usize = 16;

impl Store {
    /// Makes blobs belong to a repository. They must be durable. What belongs to it already stays so.
    pub async fn link_blobs(
        &self,
        repo: &Repo,
        digests: impl IntoIterator<Item = Digest>,
    ) -> Result<(), StoreError> {
        let links: Vec<_> = digests.into_iter().map(|digest| keys::link(digest, repo)).collect();
        let write = |link| async move {
            match self.objects.take(&link).await? {
                Some(_) => Ok(()),
                None => self.objects.put(&link, "{}".into()).await,
            }
        };
        stream::iter(links.into_iter().map(write)).buffer_unordered(WRITES).try_collect().await
    }

    /// Takes a blob out of a repository. The bytes stay until they are collected. False where it was not in it.
    pub async fn unlink_blob(&self, repo: &Repo, digest: Digest) -> Result<bool, StoreError> {
        let link = keys::link(digest, repo);
        let linked = self.objects.exists(&link).await?;
        self.objects.delete(&link).await?;
        Ok(linked)
    }

    /// How to read a blob of a repository; `None` where it is not known or does not belong to it.
    pub async fn blob_in(&self, repo: &Repo, digest: Digest) -> Result<Option<Blob>, StoreError> {
        let link = keys::link(digest, repo);
        let (linked, blob) = tokio::try_join!(self.objects.exists(&link), self.blob(digest))?;
        Ok(blob.filter(|_| linked))
    }

    /// A part of a blob of a repository that is stored as such, with the blob's length in bytes; what lies beyond its end is left
    /// out. `None` where there is no such blob or part: [`blob_in`](Self::blob_in) knows more. As many round trips to the
    /// storage as one.
    pub async fn part_in(
        &self,
        repo: &Repo,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<Option<BlobPart>, StoreError> {
        let (link, blob) = (keys::link(digest, repo), keys::blob(digest));
        let (linked, part) = tokio::try_join!(self.objects.exists(&link), self.objects.part(&blob, range))?;
        Ok(part.filter(|_| linked).map(|(bytes, range, size)| BlobPart { size, range, bytes }))
    }

    /// The same for whoever tells others that the blob is there, or builds on it: no collection removes it from now on,
    /// for as long as a push may take.
    pub async fn take_blob_in(&self, repo: &Repo, digest: Digest) -> Result<Option<Blob>, StoreError> {
        let link = keys::link(digest, repo);
        let (linked, blob) = tokio::try_join!(self.objects.take(&link), self.take_blob(digest))?;
        Ok(blob.filter(|_| linked.is_some()))
    }

    /// The repositories that a blob belongs to, at most `limit` of them.
    pub async fn repositories_of(&self, digest: Digest, limit: usize) -> Result<Vec<Repo>, StoreError> {
        let listing = self.objects.list(&keys::links(digest));
        let repos = listing.try_filter_map(|object| async move { Ok(keys::parse_link(&object.location)) });
        repos.map_ok(|(_, repo)| repo).take(limit).try_collect().await
    }
}
