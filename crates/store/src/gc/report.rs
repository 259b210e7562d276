//! What a collection did, or would do.

use serde::Serialize;

use crate::inventory::{Inventory, Listed};
use crate::keys::Named;
use crate::mark::Marked;

/// How much of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcAmount {
    /// Manifests, in repositories.
    pub manifests: u64,
    /// Blobs, packs among them.
    pub blobs: u64,
    /// Records of images, layers, tags and packs, and what lists referrers.
    pub records: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl GcAmount {
    pub(super) fn add(&mut self, named: &Named, bytes: u64) {
        match named {
            Named::Blob(_) => self.blobs += 1,
            Named::Manifest(..) => self.manifests += 1,
            _ => self.records += 1,
        }
        self.bytes += bytes;
    }
}

/// What became of packs that were mostly dead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcRepacked {
    /// Packs of which what lives is in others now.
    pub packs: u64,
    /// Their bytes. Those of packs that artifacts named until now are freed by a later collection.
    pub bytes: u64,
    /// Bytes of those that took their place.
    pub bytes_left: u64,
}

impl GcRepacked {
    pub(super) fn add(&mut self, more: Self) {
        self.packs += more.packs;
        self.bytes += more.bytes;
        self.bytes_left += more.bytes_left;
    }
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// What is reachable, or too young to be collected.
    pub kept: GcAmount,
    /// Garbage that stays in quarantine, or that somebody holds.
    pub quarantined: GcAmount,
    /// What was deleted, or would be, without packs that were repacked.
    pub freed: GcAmount,
    /// Of the freed: original layers, which are rebuilt from now on.
    pub originals: GcAmount,
    /// Original layers that were due, and that could not be made again. They stay.
    pub unproven: u64,
    /// Packs of which little lived, that were repacked or would be. They count as kept.
    pub repacked: GcRepacked,
    /// Objects that were due, and that some process was just taking in.
    pub held: u64,
    /// Files that a crash had left half written.
    pub leftovers: u64,
}

impl GcReport {
    /// Counts what is garbage.
    pub(super) fn add(&mut self, named: &Named, bytes: u64, is_freed: bool, marked: &Marked) {
        let is_original = matches!(named, Named::Blob(digest) if marked.rebuilt.contains_key(digest));
        if is_freed && is_original {
            self.originals.add(named, bytes);
        }
        let amount = if is_freed { &mut self.freed } else { &mut self.quarantined };
        amount.add(named, bytes);
    }

    /// Counts what stays for now.
    pub(super) fn count(&mut self, inventory: &Inventory, garbage: &[(Named, Listed)]) {
        let mut rest = inventory.0.clone();
        for (named, _) in garbage {
            rest.remove(named);
        }
        for (named, listed) in rest {
            self.kept.add(&named, listed.bytes);
        }
    }
}
