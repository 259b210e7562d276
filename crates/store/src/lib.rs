//! Durable truth: blobs, packs, manifests, tags, and what is known of layers, over any object store.
//!
//! Everything but references is immutable and named by its content; a reference changes by compare-and-swap. The
//! order of writes is the safety argument: packs, then tree, then manifest, then tag. A crash at any write leaves
//! garbage, never a name of something that is not there. The sled index of chunks is a cache of pack footers:
//! deleting it loses time, never data.
//!
//! Nothing here knows HTTP, reads a clock that matters to what is stored, or asks which object store it is on.

mod arrivals;
mod blobs;
mod check;
mod collector;
mod error;
mod frames;
mod fsck;
mod gc;
mod hashing;
mod images;
mod index;
mod inventory;
mod keys;
mod layers;
mod lease;
mod links;
mod listed;
mod local;
mod manifests;
mod mark;
mod moved;
mod name;
mod objects;
mod originals;
mod packs;
mod reader;
mod rebuild;
mod record;
mod refs;
mod storage;
mod store;
mod upload;

pub use blobs::{Blob, BlobPart};
pub use check::Proof;
pub use error::StoreError;
pub use frames::{Content, FileRange};
pub use fsck::{Damage, FsckReport, Wrong};
pub use gc::{GcAmount, GcConfig, GcRepacked, GcReport, Keeper};

pub use manifests::{ManifestPut, Referrer};
pub use name::{ParseNameError, Repo, Tag};
pub use objects::{ByteStream, FRAME_BYTES};
pub use originals::Originals;
pub use packs::StoreSink;
pub use reader::BlobReader;
pub use record::{ImageRecord, ImageState, LayerCounts, LayerRecord, ManifestLink, RefValue};
pub use refs::Reference;
pub use storage::{Bucket, Storage};
pub use store::{Store, StoreConfig};
pub use upload::{Session, UPLOAD_PART_BYTES};
