//! Everything that is in a store, from one listing. Memory: some 200 bytes an object.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;

use crate::StoreError;
use crate::keys::Named;
use crate::objects::Objects;

/// What a listing says of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its length in bytes.
    pub(crate) bytes: u64,
    /// When it was written, in seconds since 1970, by the object store's clock.
    pub(crate) written: i64,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inventory(pub(crate) BTreeMap<Named, Listed>);

/// The parts of a store that name others. Blobs are the only large one.
const NAMING: [&str; 7] = ["refs", "repos", "jobs", "images", "layers", "links", "moved"];

impl Inventory {
    /// Lists everything.
    pub(crate) async fn read(objects: &Objects) -> Result<Self, StoreError> {
        let mut inventory = Self::read_names(objects).await?;
        for part in ["packs", "arrived", "blobs"] {
            inventory.add(objects, part).await?;
        }
        Ok(inventory)
    }

    /// Lists what names others, without blobs.
    pub(crate) async fn read_names(objects: &Objects) -> Result<Self, StoreError> {
        let mut inventory = Self::default();
        for part in NAMING {
            inventory.add(objects, part).await?;
        }
        Ok(inventory)
    }

    async fn add(&mut self, objects: &Objects, part: &str) -> Result<(), StoreError> {
        let mut listing = objects.list(&part.into());
        while let Some(object) = listing.try_next().await? {
            if let Some(named) = Named::parse(&object.location) {
                let listed = Listed { bytes: object.size, written: object.last_modified.timestamp() };
                self.0.insert(named, listed);
            }
        }
        Ok(())
    }

    pub(crate) fn has(&self, named: &Named) -> bool {
        self.0.contains_key(named)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Named> {
        self.0.keys()
    }
}
