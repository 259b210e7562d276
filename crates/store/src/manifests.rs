//! Manifests: which belong to a repository, and which hang on which.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_image::{Descriptor, Digest, MANIFEST_BYTES_MAX};

use crate::record::ManifestLink;
use crate::{Repo, Store, StoreError, keys};

/// Referrers of one manifest in an answer. The newest tools put a handful there.
const REFERRERS_MAX: usize = 1_000;
/// Records that are read at the same time.
const READS: usize = 16;

/// That a manifest hangs on another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referrer {
    /// The other one. It need not be there.
    pub subject: Digest,
    /// What a referrers answer says of the manifest.
    pub descriptor: Descriptor,
}

/// A manifest on its way into a repository.
#[derive(Clone, Debug)]
pub struct ManifestPut {
    /// The sha256 of the bytes, which the caller has checked.
    pub digest: Digest,
    /// As it was pushed.
    pub media_type: String,
    /// The document.
    pub bytes: Bytes,
    /// What it hangs on, if anything.
    pub referrer: Option<Referrer>,
}

impl Store {
    /// A repository's manifest: its media type and its bytes.
    pub async fn manifest(&self, repo: &Repo, digest: Digest) -> Result<Option<(String, Bytes)>, StoreError> {
        let Some(link) = self.manifest_link(repo, digest).await? else { return Ok(None) };
        let bytes = self.small_blob(digest, MANIFEST_BYTES_MAX as u64).await?;
        Ok(Some((link.media_type, bytes)))
    }

    /// Whether a manifest belongs to a repository, without reading it.
    pub async fn manifest_link(
        &self,
        repo: &Repo,
        digest: Digest,
    ) -> Result<Option<ManifestLink>, StoreError> {
        self.objects.json(&keys::manifest(repo, digest)).await
    }

    /// Puts a manifest into a repository. Everything that it names must be durable.
    pub async fn put_manifest(&self, repo: &Repo, manifest: ManifestPut) -> Result<(), StoreError> {
        let ManifestPut { digest, media_type, bytes, referrer } = manifest;
        let link = ManifestLink { media_type, size: bytes.len() as u64 };
        self.objects.put(&keys::blob(digest), bytes.into()).await?;
        self.objects.put_json(&keys::manifest(repo, digest), &link).await?;
        if let Some(Referrer { subject, descriptor }) = referrer {
            self.objects.put_json(&keys::referrer(repo, subject, digest), &descriptor).await?;
        }
        Ok(())
    }

    /// Takes a manifest out of a repository: its tags first, then from what it hangs on, then itself. The bytes stay
    /// until they are collected. False where it was not there.
    pub async fn delete_manifest(
        &self,
        repo: &Repo,
        digest: Digest,
        subject: Option<Digest>,
    ) -> Result<bool, StoreError> {
        if self.manifest_link(repo, digest).await?.is_none() {
            return Ok(false);
        }
        for (tag, manifest) in self.tags(repo).await? {
            if manifest == digest {
                self.set_tag(repo, &tag, None).await?;
            }
        }
        if let Some(subject) = subject {
            self.objects.delete(&keys::referrer(repo, subject, digest)).await?;
        }
        self.objects.delete(&keys::manifest(repo, digest)).await?;
        Ok(true)
    }

    /// Whether any manifest belongs to the repository.
    pub async fn has_repository(&self, repo: &Repo) -> Result<bool, StoreError> {
        Ok(self.objects.list(&keys::manifests(repo)).try_next().await?.is_some())
    }

    /// What hangs on a manifest, in the order of digests.
    pub async fn referrers(&self, repo: &Repo, subject: Digest) -> Result<Vec<Descriptor>, StoreError> {
        let listing = self.objects.list(&keys::referrers(repo, subject)).take(REFERRERS_MAX);
        let mut digests: Vec<Digest> = listing
            .try_filter_map(|object| async move { Ok(keys::parse_digest(&object.location)) })
            .try_collect()
            .await?;
        digests.sort_unstable();
        let read = |digest| async move { self.objects.json(&keys::referrer(repo, subject, digest)).await };
        let found = stream::iter(digests.into_iter().map(read)).buffered(READS);
        found.try_filter_map(|descriptor| async move { Ok(descriptor) }).try_collect().await
    }
}
