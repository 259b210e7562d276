//! What of other repositories a caller gets to see: through which of them a blob, a chunk or a layer may be used in this one.
//!
//! Without [`Access`] everybody may see everything, and nothing is looked up.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{ChunkId, ChunkPlace, PackId, PackRecord};
use lamina_image::{ChunkSink, Digest, Manifest, RECIPE_ANNOTATION, SinkError};
use lamina_store::{Repo, Store, StoreError, StoreSink};
use tokio::runtime::Handle;

use crate::access::{Action, Caller, DedupScope};
use crate::api::{Api, Head};
use crate::{Absent, ApiError};

/// Repositories of one blob that are looked at: whoever is in more of them than this may see less than there is.
const HOLDERS_MAX: usize = 1_000;
/// Packs that are looked up at the same time.
const LOOKUPS: usize = 16;

impl Api {
    /// A repository through which the caller may use a blob in `repo`: itself, or one that may be read and is near enough.
    pub(crate) async fn holder(
        &self,
        caller: &Caller,
        repo: &Repo,
        blob: Digest,
    ) -> Result<Option<Repo>, ApiError> {
        let Some(access) = &self.access else {
            return Ok(self.store.repositories_of(blob, 1).await?.pop());
        };
        let holders = self.store.repositories_of(blob, HOLDERS_MAX).await?;
        let usable = |other: &Repo| {
            other == repo || (access.dedup.joins(repo, other) && access.may(caller, other, Action::Pull))
        };
        Ok(holders.into_iter().find(usable))
    }

    /// Leaves out the places in packs that the caller may not use.
    pub(crate) async fn visible(
        &self,
        caller: &Caller,
        repo: &Repo,
        places: Vec<Option<ChunkPlace>>,
    ) -> Result<Vec<Option<ChunkPlace>>, ApiError> {
        if self.access.is_none() {
            return Ok(places);
        }
        let packs: HashSet<PackId> = places.iter().flatten().map(|place| place.place.pack).collect();
        let looked = stream::iter(packs.into_iter().map(|pack| async move {
            let seen = self.holder(caller, repo, pack.into()).await?.is_some();
            Ok::<_, ApiError>((pack, seen))
        }));
        let packs: HashMap<PackId, bool> = looked.buffer_unordered(LOOKUPS).try_collect().await?;
        Ok(places.into_iter().map(|place| place.filter(|place| packs[&place.place.pack])).collect())
    }

    /// A manifest with a tree must not bring along what the caller may not see: its tree, its recipes, and the packs that
    /// these lean on. To the caller what may not be seen is not there.
    pub(crate) async fn check_reach(
        &self,
        head: &Head,
        repo: &Repo,
        manifest: &Manifest,
    ) -> Result<(), ApiError> {
        if self.access.is_none() {
            return Ok(());
        }
        let Some(tree) = manifest.bound_tree()? else { return Ok(()) };
        self.must_reach(head, repo, "the tree", tree).await?;
        for layer in &manifest.layers {
            let recipe = layer.annotations.get(RECIPE_ANNOTATION).and_then(|text| text.parse().ok());
            // one without is refused elsewhere, with the reason
            let Some(recipe) = recipe else { continue };
            self.must_reach(head, repo, "the recipe", recipe).await?;
            let parsed = self.store.recipe(recipe).await.map_err(|error| match error {
                StoreError::Missing(_) => absent("the recipe", recipe),
                other => other.into(),
            })?;
            let packs: BTreeSet<Digest> =
                parsed.frames().iter().map(|(_, place)| place.pack.into()).collect();
            for pack in packs {
                self.must_reach(head, repo, "the pack", pack).await?;
            }
        }
        Ok(())
    }

    async fn must_reach(
        &self,
        head: &Head,
        repo: &Repo,
        what: &'static str,
        digest: Digest,
    ) -> Result<(), ApiError> {
        let holder = self.holder(&head.caller, repo, digest).await?;
        holder.map(drop).ok_or_else(|| absent(what, digest))
    }
}

fn absent(what: &'static str, digest: Digest) -> ApiError {
    ApiError::ManifestBlobUnknown(vec![Absent { what, digest }])
}

/// Whether a pack is in a repository that is near enough to `repo`.
pub(crate) async fn is_near(
    store: &Store,
    scope: DedupScope,
    repo: &Repo,
    pack: Digest,
) -> Result<bool, StoreError> {
    let holders = store.repositories_of(pack, HOLDERS_MAX).await?;
    Ok(holders.iter().any(|other| scope.joins(repo, other)))
}

/// A store as the place where the layers of one repository's image are cut into: what is too far away is not known.
pub(crate) struct NearSink {
    pub(crate) inner: StoreSink,
    pub(crate) store: Store,
    pub(crate) scope: DedupScope,
    pub(crate) repo: Repo,
    pub(crate) runtime: Handle,
}

impl ChunkSink for NearSink {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        let mut places = self.inner.known(ids)?;
        if self.scope == DedupScope::All {
            return Ok(places);
        }
        let packs: HashSet<PackId> = places.iter().flatten().map(|place| place.place.pack).collect();
        let mut near = HashSet::new();
        for pack in packs {
            if self.runtime.block_on(is_near(&self.store, self.scope, &self.repo, pack.into()))? {
                near.insert(pack);
            }
        }
        for place in &mut places {
            *place = place.take().filter(|place| near.contains(&place.place.pack));
        }
        Ok(places)
    }

    fn put(&self, pack: PackId, bytes: Bytes, records: &[PackRecord]) -> Result<(), SinkError> {
        self.inner.put(pack, bytes, records)
    }
}
