//! Why the daemon could not do what it was asked.

use std::io;
use std::path::PathBuf;

use lamina_cache::CacheError;
use lamina_image::{DocumentError, ParseCommandKeyError, TreeError};
use lamina_mount::MountError;
use lamina_wire::{ParseReferenceError, WireError};

/// What went wrong. Every message names the image, directory or URL.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The reference does not parse.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// The key of the command does not parse.
    #[error(transparent)]
    Command(#[from] ParseCommandKeyError),
    /// The registry did not answer as hoped.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A document of the image cannot be used.
    #[error("{reference}: {error}")]
    Document {
        /// The image.
        reference: String,
        /// What is wrong with it.
        #[source]
        error: DocumentError,
    },
    /// The image is not for this machine.
    #[error("{reference} has no image for {platform}")]
    Platform {
        /// The image.
        reference: String,
        /// This machine, as `os/architecture`.
        platform: String,
    },
    /// The image has no tree. Its registry is not Lamina's, or has not converted it.
    #[error("{reference} cannot be mounted lazily: no tree hangs on it{why}")]
    NoTree {
        /// The image.
        reference: String,
        /// What the registry says of it, beginning with a colon; empty where it says nothing.
        why: String,
    },
    /// The caller wants a chain of hashes from the manifest to every byte, and this image has none.
    #[error(
        "{0} does not name its tree in its manifest, and --require-bound is set; push it with `lamina push`"
    )]
    NotBound(String),
    /// The tree that came is damaged.
    #[error("the tree of {reference} cannot be used: {error}")]
    Tree {
        /// The image.
        reference: String,
        /// What is wrong with it.
        #[source]
        error: TreeError,
    },
    /// A file of the daemon's own could not be read or written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// A mount is wanted for a process that is not there.
    #[error("process {pid}, which is to own the mount, cannot be watched: {error}")]
    Owner {
        /// Its number.
        pid: u32,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The cache cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The mount did not come about, or did not go away.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The image is larger than what it may take of the cache.
    #[error(
        "{reference} has {} MiB of frames, and may take {} MiB of the cache; give it more with --cache-mib",
        .bytes >> 20,
        .bytes_max >> 20
    )]
    TooLarge {
        /// The image.
        reference: String,
        /// What it has, with what is pinned already where it is to be pinned.
        bytes: u64,
        /// What it may take.
        bytes_max: u64,
    },
    /// The request asks for what there is not.
    #[error("{0}")]
    Request(String),
    /// Nothing of this daemon is mounted there.
    #[error("{0}: nothing of this cache's daemon is mounted there; was it mounted with another --cache?")]
    NotMounted(PathBuf),
    /// The daemon has as many mounts as it takes.
    #[error("there are {0} mounts already, as many as one daemon takes")]
    TooManyMounts(usize),
    /// Another program cannot take this one's place.
    #[error("the node cannot be upgraded to {program}: {reason}")]
    Upgrade {
        /// Which.
        program: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
}
