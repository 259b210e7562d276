//! Mounting and unmounting by our own system calls, with an error for each thing that a person can put right.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::MountError;

/// A directory on which something may be mounted, with its absolute path.
#[derive(Debug)]
pub(crate) struct MountPoint(PathBuf);

/// Which file system it is, as in `st_dev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    major: u32,
    minor: u32,
}

impl MountPoint {
    /// Checks that `path` is an empty directory with nothing mounted on it.
    pub(crate) fn check(path: &Path) -> Result<Self, MountError> {
        let failed = |cause: io::Error| match Errno::from_io_error(&cause) {
            Some(Errno::NOENT) => MountError::Missing(path.to_owned()),
            Some(Errno::NOTDIR) => MountError::NotDirectory(path.to_owned()),
            // what a FUSE mount says whose process has died
            Some(Errno::NOTCONN) => MountError::Occupied(path.to_owned()),
            _ => MountError::System { action: "use mount point", path: path.to_owned(), cause },
        };
        let absolute = path.canonicalize().map_err(failed)?;
        if !absolute.metadata().map_err(failed)?.is_dir() {
            return Err(MountError::NotDirectory(path.to_owned()));
        }
        if is_root(&stat(&absolute).map_err(failed)?) {
            return Err(MountError::Occupied(path.to_owned()));
        }
        if absolute.read_dir().map_err(failed)?.next().is_some() {
            return Err(MountError::NotEmpty(path.to_owned()));
        }
        Ok(Self(absolute))
    }

    /// The absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Mounts a FUSE file system whose root has `root_mode`, and gives the connection to the kernel, on which its
    /// first request waits.
    pub(crate) fn mount(&self, name: &str, root_mode: u32) -> Result<OwnedFd, MountError> {
        let device = Path::new("/dev/fuse");
        let opened = File::options().read(true).write(true).open(device);
        let connection = opened.map_err(|cause| match Errno::from_io_error(&cause) {
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => MountError::NoDevice,
            Some(Errno::ACCESS | Errno::PERM) => MountError::Permission("open /dev/fuse"),
            _ => MountError::System { action: "open", path: device.to_owned(), cause },
        })?;
        // device nodes and setuid programs must work as in any image; who may is for the mount namespace to say
        let options = format!(
            "fd={},rootmode={root_mode:o},user_id=0,group_id=0,allow_other,default_permissions",
            connection.as_raw_fd()
        );
        let options = CString::new(options).expect("digits and names");
        let name: String = name.chars().map(|c| if c == ',' || c.is_control() { '_' } else { c }).collect();
        rustix::mount::mount(name.as_str(), &self.0, "fuse.lamina", MountFlags::RDONLY, options.as_c_str())
            .map_err(|errno| match errno {
            Errno::PERM | Errno::ACCESS => MountError::Permission("mount"),
            Errno::NODEV => MountError::NoDevice,
            Errno::BUSY => MountError::Occupied(self.0.clone()),
            errno => MountError::System { action: "mount at", path: self.0.clone(), cause: errno.into() },
        })?;
        Ok(connection.into())
    }

    /// Unmounts what is mounted here, without asking what it is.
    pub(crate) fn detach(&self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }

    /// The file system that is mounted here now. Asks it, so its threads must be running.
    pub(crate) fn device(&self) -> Result<Device, MountError> {
        let failed = |cause| MountError::System { action: "look at", path: self.0.clone(), cause };
        Ok(device(&stat(&self.0).map_err(failed)?))
    }

    /// Unmounts `ours`, if it is what is mounted here.
    pub(crate) fn unmount(&self, ours: Device, lazy: bool) -> Result<(), MountError> {
        let here = stat(&self.0).ok().filter(|here| is_root(here) && device(here) == ours);
        if here.is_none() {
            return Err(MountError::Gone(self.0.clone()));
        }
        let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        rustix::mount::unmount(&self.0, flags | UnmountFlags::NOFOLLOW).map_err(|errno| match errno {
            Errno::BUSY => MountError::InUse(self.0.clone()),
            Errno::PERM => MountError::Permission("unmount"),
            Errno::INVAL => MountError::Gone(self.0.clone()),
            errno => MountError::System { action: "unmount", path: self.0.clone(), cause: errno.into() },
        })
    }
}

impl Device {
    /// Where its kernel readahead is set.
    pub(crate) fn read_ahead_path(self) -> PathBuf {
        PathBuf::from(format!("/sys/class/bdi/{}:{}/read_ahead_kb", self.major, self.minor))
    }
}

fn stat(path: &Path) -> io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    Ok(rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS)?)
}

fn device(stat: &Statx) -> Device {
    Device { major: stat.stx_dev_major, minor: stat.stx_dev_minor }
}

fn is_root(stat: &Statx) -> bool {
    stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}
