//! Why a mount does not come about, or does not go away.

use std::io;
use std::path::PathBuf;

/// What the caller has to decide about.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Create it, or name another.
    #[error("mount point {0:?} does not exist")]
    Missing(PathBuf),
    /// Name a directory.
    #[error("mount point {0:?} is not a directory")]
    NotDirectory(PathBuf),
    /// Something is mounted there already; unmount it, or name another.
    #[error("something is mounted at {0:?} already; unmount it first, or choose another directory")]
    Occupied(PathBuf),
    /// What it holds would be hidden.
    #[error("mount point {0:?} is not empty")]
    NotEmpty(PathBuf),
    /// The kernel has no FUSE, or the container does not show the device.
    #[error("/dev/fuse is missing: load the kernel's fuse module, or give this container the device")]
    NoDevice,
    /// Mounting needs root.
    #[error("no permission to {0}: mounting needs CAP_SYS_ADMIN (run as root)")]
    Permission(&'static str),
    /// Programs have files open there, or their working directory. End them, or unmount lazily.
    #[error("{0:?} is in use; end what uses it, or unmount lazily")]
    InUse(PathBuf),
    /// It was unmounted already.
    #[error("nothing of ours is mounted at {0:?} any more")]
    Gone(PathBuf),
    /// The system refuses something else.
    #[error("cannot {action} {path:?}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}
