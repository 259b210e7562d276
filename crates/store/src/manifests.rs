//! Manifests: which belong to a repository, and which hang on which.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_image::{Descriptor, Digest, MANIFEST_BYTES_MAX};
use object_store::ObjectMeta;

use crate::objects::Objects;
use crate::record::ManifestLink;
use crate::{Repo, Store, StoreError, keys};

/// Referrers of one manifest in an answer, which is not longer than a manifest may be. The newest tools put a handful
/// there.
const REFERRERS_MAX: usize = 1_000;
/// Records that are read at the same time.
const READS: usize = 16;
/// Referrers that are read at the same time: each may carry annotations of 4 MiB.
const REFERRER_READS: usize = 4;

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
        let link: Option<ManifestLink> = self.objects.json(&keys::manifest(repo, digest)).await?;
        let Some(link) = link else { return Ok(None) };
        let bytes = self.small_blob(digest, MANIFEST_BYTES_MAX as u64).await?;
        Ok(Some((link.media_type, bytes)))
    }

    /// Whether a manifest belongs to a repository, without reading it. No collection takes it out from now on.
    pub async fn manifest_link(
        &self,
        repo: &Repo,
        digest: Digest,
    ) -> Result<Option<ManifestLink>, StoreError> {
        self.objects.take_json(&keys::manifest(repo, digest)).await
    }

    /// Puts a manifest into a repository. Everything that it names must be durable.
    pub async fn put_manifest(&self, repo: &Repo, manifest: ManifestPut) -> Result<(), StoreError> {
        put(&self.objects, repo, manifest).await
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

    /// The repositories that have manifests, sorted by name, after `last`; at most `limit`, and whether there are more.
    ///
    /// Cost: a listing of all names, and one of one manifest for each that is looked at.
    pub async fn repositories(
        &self,
        last: &str,
        limit: usize,
        shown: impl Fn(&Repo) -> bool,
    ) -> Result<(Vec<Repo>, bool), StoreError> {
        let prefixes = self.objects.prefixes(&keys::repositories()).await?;
        let mut names: Vec<Repo> = prefixes.iter().filter_map(keys::parse_repository).collect();
        names.retain(|repo| repo.as_str() > last && shown(repo));
        names.sort_unstable();
        let has = |repo: Repo| async move {
            let has = self.has_repository(&repo).await?;
            Ok::<_, StoreError>(has.then_some(repo))
        };
        let found = stream::iter(names.into_iter().map(has)).buffered(READS);
        let found = found.try_filter_map(|repo| async move { Ok(repo) });
        let mut found: Vec<Repo> = found.take(limit.saturating_add(1)).try_collect().await?;
        let more = found.len() > limit;
        found.truncate(limit);
        Ok((found, more))
    }

    /// What hangs on a manifest, in the order of digests; the first page of it.
    pub async fn referrers(&self, repo: &Repo, subject: Digest) -> Result<Vec<Descriptor>, StoreError> {
        Ok(self.referrers_after(repo, subject, None).await?.0)
    }

    /// What hangs on a manifest after `last`, in the order of digests, as much as fits into one answer; and whether there
    /// is more.
    pub async fn referrers_after(
        &self,
        repo: &Repo,
        subject: Digest,
        last: Option<Digest>,
    ) -> Result<(Vec<Descriptor>, bool), StoreError> {
        let listing = self.objects.list(&keys::referrers(repo, subject));
        let mut listed: Vec<(Digest, ObjectMeta)> = listing
            .try_filter_map(|object| async move {
                Ok(keys::parse_digest(&object.location).map(|digest| (digest, object)))
            })
            .try_collect()
            .await?;
        listed.retain(|(digest, _)| Some(*digest) > last);
        listed.sort_unstable_by_key(|(digest, _)| *digest);
        let read = |(_, object)| async move { self.objects.listed_json(&object).await };
        let mut read = stream::iter(listed.into_iter().map(read)).buffered(REFERRER_READS);
        let (mut found, mut bytes) = (Vec::<Descriptor>::new(), 0);
        while let Some(descriptor) = read.next().await {
            // whoever was deleted meanwhile hangs no more
            let Some(descriptor) = descriptor? else { continue };
            bytes += len_of(&descriptor);
            if !found.is_empty() && (found.len() == REFERRERS_MAX || bytes > MANIFEST_BYTES_MAX) {
                return Ok((found, true));
            }
            found.push(descriptor);
        }
        Ok((found, false))
    }
}

/// Puts a manifest into a repository: its bytes, then itself, and then what hangs it on another one.
pub(crate) async fn put(objects: &Objects, repo: &Repo, manifest: ManifestPut) -> Result<(), StoreError> {
    let ManifestPut { digest, media_type, bytes, referrer } = manifest;
    let link = ManifestLink { media_type, size: bytes.len() as u64 };
    objects.put(&keys::blob(digest), bytes.into()).await?;
    objects.put_json(&keys::manifest(repo, digest), &link).await?;
    if let Some(Referrer { subject, descriptor }) = referrer {
        objects.put_json(&keys::referrer(repo, subject, digest), &descriptor).await?;
    }
    Ok(())
}

/// About how long a descriptor is in JSON, in bytes.
fn len_of(descriptor: &Descriptor) -> usize {
    let notes = descriptor.annotations.iter().map(|(name, value)| name.len() + value.len() + 6);
    512 + notes.sum::<usize>()
}
