//! Profiles and boot packs as artifacts: which hang on an image, and how new ones take their place.

use std::collections::BTreeMap;

use bytes::Bytes;
use lamina_image::{BootPack, Descriptor, Digest, PROFILE_ANNOTATION, PROFILE_BYTES_MAX, media_type};
use lamina_store::{Repo, Store, StoreError};

use super::Subject;
use crate::artifact::{Artifact, hang};

/// What was learnt of an image, as a referrers answer lists it: one of each, and more only after a crash.
#[derive(Debug, Default)]
pub(crate) struct Hung {
    pub(super) profiles: Vec<Descriptor>,
    pub(super) boots: Vec<Descriptor>,
}

impl Hung {
    /// Looks what hangs on an image. Cost: a listing, and one small read a referrer.
    pub(crate) async fn find(store: &Store, repo: &Repo, image: Digest) -> Result<Self, StoreError> {
        let mut hung = Self::default();
        for artifact in store.referrers(repo, image).await? {
            match artifact.artifact_type.as_deref() {
                Some(media_type::PROFILE) => hung.profiles.push(artifact),
                Some(media_type::BOOT) => hung.boots.push(artifact),
                _ => {}
            }
        }
        Ok(hung)
    }

    /// The profile's JSON, not parsed. What is lost or far too long is no profile: the next start makes another.
    pub(crate) async fn profile(&self, store: &Store) -> Result<Option<Bytes>, StoreError> {
        let digest = self.profiles.first().and_then(|artifact| artifact.annotations.get(PROFILE_ANNOTATION));
        let Some(digest) = digest.and_then(|digest| digest.parse().ok()) else { return Ok(None) };
        match store.small_blob(digest, PROFILE_BYTES_MAX as u64).await {
            Err(StoreError::Missing(_) | StoreError::TooLarge { .. }) => Ok(None),
            read => read.map(Some),
        }
    }

    /// The boot pack's blob.
    pub(super) fn boot(&self) -> Option<Descriptor> {
        let boot = BootPack::named_by(&self.boots.first()?.annotations)?;
        Some(Descriptor::named(media_type::BOOT, boot.blob, boot.bytes))
    }

    /// Takes everything down. The bytes stay until they are collected.
    pub(super) async fn remove(&self, store: &Store, repo: &Repo, image: Digest) -> Result<(), StoreError> {
        // a boot pack without a profile would never be made anew
        for artifact in self.boots.iter().chain(&self.profiles) {
            store.delete_manifest(repo, artifact.digest, Some(image)).await?;
        }
        Ok(())
    }
}

impl Subject {
    /// Stores a profile, hangs it on the image, and takes the old ones down.
    pub(super) async fn put_profile(
        &self,
        store: &Store,
        json: Bytes,
        hung: &Hung,
    ) -> Result<(), StoreError> {
        let size = json.len() as u64;
        let blob = Descriptor::named(media_type::PROFILE, store.put_blob(json).await?, size);
        let annotations = BTreeMap::from([(PROFILE_ANNOTATION.to_owned(), blob.digest.to_string())]);
        self.replace(store, media_type::PROFILE, Some((blob, annotations)), &hung.profiles).await
    }

    /// The same with a boot pack; where there is none to make, the old ones go.
    pub(super) async fn put_boot(
        &self,
        store: &Store,
        boot: Option<Vec<u8>>,
        hung: &Hung,
    ) -> Result<(), StoreError> {
        let mut new = None;
        if let Some(boot) = boot {
            let size = boot.len() as u64;
            let blob = Descriptor::named(media_type::BOOT, store.put_blob(boot.into()).await?, size);
            let pack = BootPack { blob: blob.digest, bytes: size, tree: self.tree.digest };
            new = Some((blob, pack.annotations()));
        }
        self.replace(store, media_type::BOOT, new, &hung.boots).await
    }

    async fn replace(
        &self,
        store: &Store,
        kind: &'static str,
        new: Option<(Descriptor, BTreeMap<String, String>)>,
        old: &[Descriptor],
    ) -> Result<(), StoreError> {
        let image = self.image.digest;
        let mut kept = None;
        if let Some((blob, annotations)) = new {
            let artifact = Artifact { kind, subject: self.image.clone(), blobs: vec![blob], annotations };
            let artifact = artifact.write(store).await?;
            hang(store, &self.repo, image, &artifact).await?;
            kept = Some(artifact.digest);
        }
        for artifact in old.iter().filter(|artifact| Some(artifact.digest) != kept) {
            store.delete_manifest(&self.repo, artifact.digest, Some(image)).await?;
        }
        Ok(())
    }
}
