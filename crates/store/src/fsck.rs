//! Checks a store: everything is hashed again, every record read, and every name followed.
//!
//! Looking changes nothing and may be done beside registries at work: what they write meanwhile is not looked at. A
//! repair needs the store for itself. It takes what is damaged out of the way, makes again what can be made again, and
//! says of the rest what has to be pushed. Cost: every byte is read once, and once more what the layers are rebuilt from
//! that are not stored. Memory: some 500 bytes an object, the largest recipe, and 80 MiB.

mod follow;
mod repair;
mod report;

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{MOVES_MAX, Moved, PACK_BYTES_MAX, PackId};
use lamina_image::{Descriptor, Digest, Hasher};
use serde::de::DeserializeOwned;

use crate::inventory::Inventory;
use crate::keys::{self, Named};
use crate::moved;
use crate::objects::Objects;
use crate::record::{ImageRecord, LayerRecord, ManifestLink, RefValue};
use crate::{Keeper, Repo, StoreError};

use self::follow::Follow;
pub use self::report::{Damage, FsckReport, Wrong};

/// Objects that are read at the same time; each holds 2 MiB.
const READS: usize = 8;

/// What was found of single objects.
#[derive(Debug, Default)]
struct Found {
    inventory: Inventory,
    /// What is wrong, and in which words.
    wrong: BTreeMap<Named, (Wrong, String)>,
    images: BTreeMap<Digest, ImageRecord>,
    layers: BTreeMap<Digest, LayerRecord>,
    /// What hangs a tree on an image, with the image and the tree, as referrers answers have it.
    hung: BTreeMap<(Repo, Digest), (Digest, Digest)>,
    /// Where packs went, as far as it is known.
    moved: BTreeMap<PackId, Moved>,
    bytes: u64,
}

impl Keeper {
    /// Looks at everything. `done` is told of each blob's length once it was read.
    pub async fn fsck(&self, done: &(dyn Fn(u64) + Sync)) -> Result<FsckReport, StoreError> {
        let found = Found::read(&self.objects, done).await?;
        let follow = Follow::read(&self.objects, found).await?;
        Ok(follow.report())
    }

    /// The bytes of all blobs: what [`fsck`](Self::fsck) reads.
    pub async fn blob_bytes(&self) -> Result<u64, StoreError> {
        let listing = self.objects.list(&"blobs".into());
        listing.try_fold(0, |sum, object| async move { Ok(sum + object.size) }).await
    }
}

impl Found {
    async fn read(objects: &Objects, done: &(dyn Fn(u64) + Sync)) -> Result<Self, StoreError> {
        let mut found = Self { inventory: Inventory::read(objects).await?, ..Self::default() };
        let named: Vec<Named> = found.inventory.keys().cloned().collect();
        let blobs = named.iter().filter_map(|named| match named {
            Named::Blob(digest) => Some(*digest),
            _ => None,
        });
        let checks = stream::iter(blobs.map(|digest| async move {
            let checked = check_blob(objects, digest).await?;
            done(checked.1);
            Ok::<_, StoreError>((digest, checked))
        }));
        let mut checks = checks.buffer_unordered(READS);
        while let Some((digest, (wrong, bytes))) = checks.try_next().await? {
            found.bytes += bytes;
            if let Some(wrong) = wrong {
                found.wrong.insert(Named::Blob(digest), wrong);
            }
        }
        drop(checks);
        found.read_records(objects, &named).await?;
        Ok(found)
    }

    async fn read_records(&mut self, objects: &Objects, named: &[Named]) -> Result<(), StoreError> {
        for named in named {
            let parsed = match named {
                Named::Image(digest) => {
                    let read = record(objects, named).await?;
                    read.map(|record| self.images.extend(record.map(|record| (*digest, record))))
                }
                Named::Layer(digest) => {
                    let read = record(objects, named).await?;
                    read.map(|record| self.layers.extend(record.map(|record| (*digest, record))))
                }
                Named::Moved(pack) => match moved::read(objects, *pack).await {
                    Ok(read) => {
                        self.moved.extend(read.map(|moved| (*pack, moved)));
                        Ok(())
                    }
                    Err(error @ (StoreError::Moved { .. } | StoreError::TooLarge { .. })) => {
                        Err(error.to_string())
                    }
                    Err(error) => return Err(error),
                },
                Named::Manifest(..) => record::<ManifestLink>(objects, named).await?.map(drop),
                Named::Referrer(repo, subject, digest) => {
                    let read = record::<Descriptor>(objects, named).await?;
                    read.map(|record| {
                        let tree = record.as_ref().and_then(Descriptor::hung_tree);
                        self.hung.extend(tree.map(|tree| ((repo.clone(), *digest), (*subject, tree))));
                    })
                }
                Named::TagValue(..) => record::<RefValue>(objects, named).await?.map(drop),
                Named::Blob(_) | Named::Pack(_) | Named::Arrival(_) | Named::Job(..) | Named::Link(..) => {
                    Ok(())
                }
            };
            if let Err(reason) = parsed {
                self.wrong.insert(named.clone(), (Wrong::Record, reason));
            }
        }
        Ok(())
    }

    /// Whether a blob is there and hashes to its name.
    fn is_good(&self, digest: Digest) -> bool {
        let blob = Named::Blob(digest);
        self.inventory.has(&blob) && !self.wrong.contains_key(&blob)
    }

    /// The same of a pack, or of that to which its frames were moved.
    fn is_pack_good(&self, pack: Digest) -> bool {
        if self.inventory.has(&Named::Blob(pack)) {
            return self.is_good(pack);
        }
        let now = self.moved_to(pack);
        let are_good = |pack: &PackId| !self.wrong.contains_key(&Named::Moved(*pack));
        let old =
            std::iter::once(pack).chain(now.iter().copied()).filter_map(|pack| PackId::try_from(pack).ok());
        now.last().is_some_and(|now| self.is_good(*now)) && old.collect::<Vec<_>>().iter().all(are_good)
    }

    /// The packs to which the frames of a pack were moved, one after the other.
    fn moved_to(&self, pack: Digest) -> Vec<Digest> {
        let next = |pack: &Digest| Some(Digest::from(self.moved.get(&PackId::try_from(*pack).ok()?)?.pack()));
        std::iter::successors(next(&pack), next).take(MOVES_MAX).collect()
    }
}

/// Reads a record; the inner error says why it does not parse. `None` where it has gone since the listing.
async fn record<T: DeserializeOwned>(
    objects: &Objects,
    named: &Named,
) -> Result<Result<Option<T>, String>, StoreError> {
    match objects.json(&named.key()).await {
        Ok(record) => Ok(Ok(record)),
        Err(StoreError::Record { error, .. }) => Ok(Err(error.to_string())),
        Err(error @ StoreError::TooLarge { .. }) => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// Hashes a blob. Says what is wrong with it, and how many bytes were read.
async fn check_blob(objects: &Objects, digest: Digest) -> Result<(Option<(Wrong, String)>, u64), StoreError> {
    let key = keys::blob(digest);
    // gone since the listing: collected
    let Some(meta) = objects.head(&key).await? else { return Ok((None, 0)) };
    let Some(mut body) = objects.stream(&key, 0..meta.size).await? else { return Ok((None, 0)) };
    let (mut hasher, mut bytes) = (Hasher::new(digest.algorithm()), 0);
    while let Some(frame) = body.next().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return Ok((Some((Wrong::Bytes, format!("it cannot be read: {error}"))), bytes)),
        };
        bytes += frame.len() as u64;
        let hashed = tokio::task::spawn_blocking(move || {
            hasher.update(&frame);
            hasher
        });
        hasher = hashed.await.expect("hashing does not panic");
    }
    let found = hasher.finish();
    if found == digest {
        return Ok((None, bytes));
    }
    let mut reason = format!("its {bytes} bytes hash to {found}");
    if let Some(frames) = damaged_frames(objects, digest, meta.size).await? {
        reason = format!("{reason}; as a pack, {frames}");
    }
    Ok((Some((Wrong::Bytes, reason)), bytes))
}

/// Where a damaged blob still has the index of a pack: which frames are damaged.
async fn damaged_frames(objects: &Objects, digest: Digest, bytes: u64) -> Result<Option<String>, StoreError> {
    if bytes > PACK_BYTES_MAX as u64 {
        return Ok(None);
    }
    let Some(pack) = objects.read(&keys::blob(digest), PACK_BYTES_MAX as u64).await? else { return Ok(None) };
    let counted = tokio::task::spawn_blocking(move || {
        let records = lamina_chunk::pack_records(&pack).ok()?;
        let bad = records.iter().filter(|record| record.verify(&pack).is_err()).count();
        Some(format!("{bad} of its {} frames are damaged", records.len()))
    });
    Ok(counted.await.expect("opening does not panic"))
}
