//! What can go wrong in a store, by what the caller can do about it.

use lamina_chunk::{ChunkError, FrameId, MovedError, PackError, PackId};
use lamina_image::{Digest, RecipeError};
use uuid::Uuid;

use crate::Tag;

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such blob, nor a recipe to rebuild it from. Retrying will not help.
    #[error("there is no blob {0}")]
    Missing(Digest),
    /// The object store failed. Retrying may help.
    #[error("the object store failed: {0}")]
    Object(#[from] object_store::Error),
    /// A record in the store does not parse. Somebody must look at it.
    #[error("the record {key} is damaged: {error}")]
    Record {
        /// The record's object key.
        key: String,
        /// What the parser says.
        #[source]
        error: serde_json::Error,
    },
    /// The bytes that came are not those that were named.
    #[error("the bytes hash to {found}, not to {expected}")]
    Digest {
        /// As named.
        expected: Digest,
        /// As they are.
        found: Digest,
    },
    /// The upload has ended, expired, or never began. Begin another one.
    #[error("there is no upload {0}: it has ended, expired, or never began")]
    UploadUnknown(Uuid),
    /// Another request is writing to this upload.
    #[error("upload {0} is in use by another request")]
    UploadBusy(Uuid),
    /// What an upload had written was gone when it ended. Begin another one.
    #[error("the bytes of the upload are gone; begin it again")]
    Staged,
    /// Too many uploads are open. Retrying later will help.
    #[error("{0} uploads are open already")]
    UploadsFull(usize),
    /// More bytes than can be held or should be taken.
    #[error("{what} of {len} bytes is over the limit of {limit}")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How long it is, in bytes.
        len: u64,
        /// How long it may be, in bytes.
        limit: u64,
    },
    /// The tag is not at the value that the caller expected, or kept changing under several tries.
    #[error("tag {0} was changed by somebody else")]
    Contended(Tag),
    /// The blob is not a pack, or is a damaged one.
    #[error("blob {pack} is not a pack: {error}")]
    Pack {
        /// The blob.
        pack: PackId,
        /// Why not.
        #[source]
        error: PackError,
    },
    /// A pack holds a frame that does not open.
    #[error("pack {pack} is damaged: {error}")]
    Frame {
        /// The pack.
        pack: PackId,
        /// What is wrong.
        #[source]
        error: ChunkError,
    },
    /// What says where a pack's frames have gone is damaged. Somebody must look at it.
    #[error("the record of where the frames of pack {pack} have gone is damaged: {error}; see `lamina fsck`")]
    Moved {
        /// The pack.
        pack: PackId,
        /// What is wrong.
        #[source]
        error: MovedError,
    },
    /// A recipe names a place at which its frame does not lie.
    #[error("frame {frame} does not lie where the recipe says it does, in pack {pack}")]
    Place {
        /// The frame.
        frame: FrameId,
        /// The pack.
        pack: PackId,
    },
    /// A recipe is damaged.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A blob ended before its length. Retrying may help where the store is remote.
    #[error("blob {0} ended too early")]
    Truncated(Digest),
    /// Another process serves the directory.
    #[error("{0} is in use: another registry serves it")]
    InUse(String),
    /// The index directory cannot be used at all.
    #[error("the index at {path} cannot be opened: {reason}; is another registry using this storage?")]
    Index {
        /// The directory.
        path: String,
        /// What the index or the file system says.
        reason: String,
    },
    /// The storage is none, or cannot be reached.
    #[error("the storage {storage} cannot be used: {reason}")]
    Storage {
        /// The directory or URL.
        storage: String,
        /// Why not.
        reason: String,
    },
    /// The bucket writes where it was told not to: two registries would overwrite each other's tags.
    #[error(
        "{0} does not honour If-None-Match on writes, so tags would get lost in it; use a store with conditional writes"
    )]
    Unconditional(String),
    /// A collection is deleting this just now, and takes long. Retrying will help.
    #[error("{0} is just being removed by a garbage collection; try again in a minute")]
    Collecting(String),
    /// The store was closed.
    #[error("the store was closed")]
    Closed,
    /// Somebody else is collecting.
    #[error("another garbage collection is under way in this storage; try again when it has ended")]
    Collected,
    /// What is collected cannot be known while this is damaged.
    #[error(
        "nothing is collected while {what} {digest} is damaged, since what it names is unknown: {reason}; see `lamina fsck`"
    )]
    Unmarkable {
        /// What it is.
        what: &'static str,
        /// Its blob.
        digest: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// An object was removed by somebody else in the middle of its use.
    #[error("the object {0} is gone")]
    Vanished(String),
    /// The storage directory cannot be used.
    #[error("the storage at {path} cannot be opened: {error}")]
    Directory {
        /// The directory.
        path: String,
        /// What the file system says.
        #[source]
        error: std::io::Error,
    },
}
