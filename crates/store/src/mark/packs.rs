//! From recipes and trees to packs, and on to where those went. A pack that was moved may come again, and then be needed once more.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use lamina_chunk::{MOVES_MAX, Moved, PackId, Place};
use lamina_image::{Digest, Recipe, TREE_BYTES_MAX, Tree, unpack_tree};

use super::live::{Counted, Span, all_in_new};
use super::{Document, Marked, Marker, Roots};
use crate::inventory::Inventory;
use crate::keys::Named;
use crate::moved;
use crate::objects::Objects;
use crate::packs::pack_footer;
use crate::{StoreError, keys};

/// Recipes over 512 MiB are refused when they come.
const RECIPE_BYTES_MAX: u64 = 512 << 20;

impl Marker {
    /// How many bytes of a pack are in frames. Of one that is damaged it is not known, and none are counted.
    pub(crate) async fn frame_bytes(&mut self, pack: PackId) -> Result<u64, StoreError> {
        if let Some(bytes) = self.frame_bytes.get(&pack) {
            return Ok(*bytes);
        }
        let bytes = match pack_footer(&self.objects, pack).await {
            Ok(footer) => footer.index_range().start,
            Err(StoreError::Pack { .. } | StoreError::Missing(_)) => 0,
            Err(error) => return Err(error),
        };
        self.frame_bytes.insert(pack, bytes);
        Ok(bytes)
    }

    /// The packs to which the frames of a pack were moved, one after the other, as far as records were read.
    pub(crate) fn moved_to(&self, pack: PackId) -> Vec<PackId> {
        let next = |pack: &PackId| Some(self.moved.get(pack)?.pack());
        std::iter::successors(next(&pack), next).take(MOVES_MAX).collect()
    }

    /// How often frames in this pack were moved, as far as records were read.
    pub(crate) fn moves(&self, pack: PackId) -> usize {
        let mut moves = 0;
        let mut here = BTreeSet::from([pack]);
        while moves <= MOVES_MAX {
            here = self.moved_into(&here);
            if here.is_empty() {
                break;
            }
            moves += 1;
        }
        moves
    }

    /// The packs of which frames went to one of these, in one move.
    fn moved_into(&self, packs: &BTreeSet<PackId>) -> BTreeSet<PackId> {
        let from = self.moved.iter().filter(|(_, moved)| packs.contains(&moved.pack()));
        from.map(|(pack, _)| *pack).collect()
    }

    /// Takes in the frames that marked trees name in these packs, also where they were before. Recipes name the same ones where
    /// the registry has made the tree or checked it; here nobody needs to know whether it has. False where a tree cannot be
    /// read: then it is not known what it names. Cost: each tree is read once.
    pub(crate) async fn read_trees(
        &mut self,
        inventory: &Inventory,
        marked: &Marked,
        packs: &BTreeSet<PackId>,
    ) -> Result<bool, StoreError> {
        let mut packs = packs.clone();
        for _ in 0..MOVES_MAX {
            packs.extend(self.moved_into(&packs));
        }
        let recorded = self.images.values().filter_map(|image| Some(image.tree.as_ref()?.digest));
        let named = self.documents.values().flat_map(Document::trees).chain(recorded);
        let is_here = |digest: &Digest| marked.blobs.contains(digest) && inventory.has(&Named::Blob(*digest));
        let trees: BTreeSet<Digest> =
            named.filter(|digest| is_here(digest) && !self.trees.contains(digest)).collect();
        for digest in trees {
            let read = self.objects.read(&keys::blob(digest), TREE_BYTES_MAX).await;
            let bytes = match read {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(StoreError::TooLarge { .. }) => return Ok(false),
                Err(error) => return Err(error),
            };
            let packs = packs.clone();
            let named = tokio::task::spawn_blocking(move || tree_frames(&bytes, &packs)).await;
            let Some(named) = named.expect("reading a tree does not panic") else {
                tracing::warn!(tree = %digest, "a tree does not parse, so no pack is repacked; see lamina fsck");
                return Ok(false);
            };
            self.add(inventory, named);
            self.trees.insert(digest);
        }
        let packs = packs.into_iter().map(Digest::from).collect();
        self.follow_moved(inventory, packs, &mut Marked::default()).await?;
        Ok(true)
    }

    fn add(&mut self, inventory: &Inventory, named: BTreeMap<PackId, Vec<Span>>) {
        for (pack, spans) in named {
            self.live.add(pack, counted(inventory, pack), spans);
        }
    }

    /// Follows recipes to packs, and packs to where they went.
    pub(super) async fn packs(
        &mut self,
        inventory: &Inventory,
        roots: Roots,
        marked: &mut Marked,
    ) -> Result<(), StoreError> {
        let named = self.documents.iter().filter(|(digest, _)| marked.blobs.contains(digest));
        let mut recipes: BTreeSet<Digest> = named.flat_map(|(_, document)| document.recipes()).collect();
        recipes.extend(self.ours.iter().filter(|digest| marked.blobs.contains(digest)));
        let objects = self.objects.clone();
        let read = |(digest, ours): (Digest, bool)| {
            let objects = objects.clone();
            async move { Ok::<_, StoreError>((digest, recipe_frames(&objects, digest, ours).await?)) }
        };
        // what was not there or names nothing may be there now
        let unread = recipes.iter().filter(|digest| self.recipes.get(digest).is_none_or(BTreeSet::is_empty));
        let unread: Vec<(Digest, bool)> =
            unread.map(|digest| (*digest, self.ours.contains(digest))).collect();
        let mut found = stream::iter(unread.into_iter().map(read)).buffer_unordered(2);
        while let Some((digest, frames)) = found.try_next().await? {
            self.recipes.insert(digest, frames.keys().map(|pack| Digest::from(*pack)).collect());
            self.add(inventory, frames);
        }
        let mut packs: BTreeSet<Digest> =
            recipes.iter().filter_map(|recipe| self.recipes.get(recipe)).flatten().copied().collect();
        if roots == Roots::All {
            packs.extend(inventory.keys().filter_map(|named| match named {
                Named::Link(digest, _) => moved_pack(inventory, *digest).map(Digest::from),
                _ => None,
            }));
        }
        self.follow_moved(inventory, packs, marked).await
    }

    /// Marks packs, or where they went.
    async fn follow_moved(
        &mut self,
        inventory: &Inventory,
        mut packs: BTreeSet<Digest>,
        marked: &mut Marked,
    ) -> Result<(), StoreError> {
        // a frame is moved once in a round, so all have come where they are after as many rounds as there are moves
        for _ in 0..=MOVES_MAX {
            let mut grew = false;
            for old in packs.clone().into_iter().filter_map(|digest| moved_pack(inventory, digest)) {
                if !self.moved.contains_key(&old) {
                    let Some(record) = read_moved(&self.objects, old).await? else { continue };
                    self.moved.insert(old, record);
                }
                let record = &self.moved[&old];
                let (new, spans) = (record.pack(), self.live.in_new(old, record));
                grew |= packs.insert(new.into());
                grew |= self.live.add(new, counted(inventory, new), spans);
            }
            if !grew {
                break;
            }
        }
        for digest in packs {
            let moved = moved_pack(inventory, digest);
            marked.names.extend(moved.map(Named::Moved));
            if moved.is_none_or(|pack| self.gone_to(inventory, pack).is_none()) {
                marked.need([digest]);
            }
        }
        Ok(())
    }

    /// Where the named frames of a pack that was moved are now, in their order; `None` where one of them is in no other pack that
    /// is there, so that the pack is needed itself. A record says nothing of later moves, in which frames that nothing named then
    /// were left out; so they are followed to where they end.
    pub(crate) fn gone_to(&self, inventory: &Inventory, pack: PackId) -> Option<(PackId, Vec<Span>)> {
        let (mut at, mut spans) = (pack, self.live.of(pack)?.to_vec());
        for _ in 0..=MOVES_MAX {
            let record = self.moved.get(&at).filter(|_| inventory.has(&Named::Moved(at)));
            let next = record.and_then(|record| Some((record.pack(), all_in_new(&spans, record)?)));
            match next {
                Some(next) => (at, spans) = next,
                // it has frames that are nowhere else, so it is needed itself
                None => {
                    let is_there = at != pack && inventory.has(&Named::Blob(at.into()));
                    return is_there.then_some((at, spans));
                }
            }
        }
        None
    }
}

/// The pack with this name, where there is a record of where it went.
pub(super) fn moved_pack(inventory: &Inventory, digest: Digest) -> Option<PackId> {
    PackId::try_from(digest).ok().filter(|pack| inventory.has(&Named::Moved(*pack)))
}

/// A record; nothing is collected where it is damaged.
async fn read_moved(objects: &Objects, pack: PackId) -> Result<Option<Moved>, StoreError> {
    moved::read(objects, pack).await.map_err(|error| match error {
        StoreError::Moved { pack, error } => StoreError::Unmarkable {
            what: "the record of moved pack",
            digest: pack.into(),
            reason: error.to_string(),
        },
        other => other,
    })
}

fn counted(inventory: &Inventory, pack: PackId) -> Counted {
    let bytes = inventory.0.get(&Named::Blob(pack.into())).map(|listed| listed.bytes);
    Counted { bytes, moved: inventory.has(&Named::Moved(pack)) }
}

/// The frames that a recipe names, by pack. Whatever others call a recipe and is none names nothing; one of `ours` must be good.
async fn recipe_frames(
    objects: &Objects,
    digest: Digest,
    ours: bool,
) -> Result<BTreeMap<PackId, Vec<Span>>, StoreError> {
    // not there: a push that was given up, or what a third party's annotation says
    let Some(bytes) = objects.read(&keys::blob(digest), RECIPE_BYTES_MAX).await? else {
        return Ok(BTreeMap::new());
    };
    let parsed = tokio::task::spawn_blocking(move || match Recipe::parse(bytes.clone()) {
        Ok(recipe) => Ok(by_pack(recipe.frames().iter().map(|(_, place)| *place))),
        Err(_) if !ours && digest.names(&bytes) => Ok(BTreeMap::new()),
        Err(error) => Err(error.to_string()),
    });
    let parsed = parsed.await.expect("parsing does not panic");
    parsed.map_err(|reason| StoreError::Unmarkable { what: "recipe", digest, reason })
}

/// The frames that a tree names in these packs; `None` where it is no tree.
fn tree_frames(blob: &[u8], packs: &BTreeSet<PackId>) -> Option<BTreeMap<PackId, Vec<Span>>> {
    let tree = Tree::open(unpack_tree(blob).ok()?.into()).ok()?;
    let places = (0..tree.frames()).map(|number| tree.frame(number).ok().map(|(_, place)| place));
    let places: Vec<Place> = places.collect::<Option<_>>()?;
    Some(by_pack(places.into_iter().filter(|place| packs.contains(&place.pack))))
}

fn by_pack(places: impl Iterator<Item = Place>) -> BTreeMap<PackId, Vec<Span>> {
    let mut found = BTreeMap::<PackId, Vec<Span>>::new();
    for Place { pack, frame } in places {
        found.entry(pack).or_default().push((frame.offset, frame.sealed_len));
    }
    found
}
