//! What an image is: its documents, its layers' tars, the recipes that rebuild them, the tree that all layers
//! together make, what starts touch of it (profile, boot pack), and the pipeline that cuts layers into chunks.
//!
//! Everything here is a plain function over bytes that somebody else reads and writes: no file system, no clock,
//! no environment, no async. [`ingest`] starts threads, since cutting and sealing is what keeps cores busy, and
//! reaches the world through a [`ChunkSink`].
//!
//! `FORMAT.md` beside this crate fixes the bytes of trees, recipes and boot packs.

mod boot;
mod digest;
mod document;
mod elf;
mod files;
mod ingest;
mod inherit;
mod merge;
mod prelude;
mod profile;
mod recipe;
mod tar;
mod tree;

pub use boot::{
    BOOT_BYTES_MAX, BOOT_FRAME_BYTES, BOOT_HEAD_BYTES, BootError, BootFrame, BootHead, BootPack, BootRecords,
    BootRun, BootTable, BuildError, build_boot,
};
pub use digest::{Algorithm, Digest, Hasher, NoPackError, ParseDigestError};
pub use document::*;
pub use elf::{ELF_SECTION_BYTES, ElfSections, elf_name, is_elf, u16_at, u32_at, u64_at};
pub use ingest::{
    BATCH_CHUNKS, ChunkSink, Compression, IngestError, IngestOptions, LayerInput, Progress, SinkError, ingest,
};
pub use inherit::Inheritance;
pub use merge::{MergeError, derive_tree};
pub use prelude::{PRELUDE_HEAD_BYTES_MAX, PRELUDE_LENGTH_BYTES, PreludeHead};
pub use profile::{
    BootHad, COMMAND_KEY_BYTES_MAX, COMMANDS_MAX, CommandKey, PAGE_BYTES, PROFILE_BYTES_MAX,
    PROFILE_ITEMS_MAX, PROFILE_PAGES_MAX, ParseCommandKeyError, Profile, ProfileError, ProfileRun, Start,
    Starts, Trace, TraceRun,
};
pub use recipe::{Pieces, Recipe, RecipeError, RecipePiece};
pub use tar::{EntryKind, Piece, Segment, TarEntry, TarError, TarSource, path_parts, read_tar};
pub use tree::{
    Entries, Entry, Extent, Extents, FileKind, FlatSink, HOLE, Ino, Inode, NO_XATTRS, TREE_BYTES_MAX, Tree,
    TreeContents, TreeError, TreeNames, TreeUnpacking, Xattr, pack_tree, pack_tree_as_before, unpack_tree,
};
