//! Mounting and unmounting by our own system calls, with an error for each thing that a person can put right.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::MountError;

/// What `/proc/mounts` calls our mounts.
const FILE_SYSTEM: &str = "fuse.lamina";
/// That of a root directory of which nothing more is known: the kernel asks for its attributes before it believes any (`fuse_get_root_inode`
/// in fs/fuse/inode.c).
const ROOT_MODE: u32 = 0o40_755;

/// A directory on which something may be mounted, with its absolute path.
#[derive(Debug)]
pub(crate) struct MountPoint(PathBuf);

/// Which file system it is, as in `st_dev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
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

    /// Where something of ours may be mounted already, as an absolute path.
    pub(crate) fn taken(path: PathBuf) -> Self {
        Self(path)
    }

    /// Whether `ours` is what is mounted here. Asks it, so its threads must be running.
    pub(crate) fn shows(&self, ours: Device) -> bool {
        stat(&self.0).is_ok_and(|here| is_root(&here) && device(&here) == ours)
    }

    /// The absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Mounts a FUSE file system, and gives the connection to the kernel, on which its first request waits.
    pub(crate) fn mount(&self, name: &str) -> Result<OwnedFd, MountError> {
        let device = Path::new("/dev/fuse");
        let opened = File::options().read(true).write(true).open(device);
        let connection = opened.map_err(|cause| match Errno::from_io_error(&cause) {
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => MountError::NoDevice,
            Some(Errno::ACCESS | Errno::PERM) => MountError::Permission("open /dev/fuse"),
            _ => MountError::System { action: "open", path: device.to_owned(), cause },
        })?;
        // device nodes and setuid programs must work as in any image; who may is for the mount namespace to say
        let options = format!(
            "fd={},rootmode={ROOT_MODE:o},user_id=0,group_id=0,allow_other,default_permissions",
            connection.as_raw_fd()
        );
        let options = CString::new(options).expect("digits and names");
        let name: String = name.chars().map(|c| if c == ',' || c.is_control() { '_' } else { c }).collect();
        rustix::mount::mount(name.as_str(), &self.0, FILE_SYSTEM, MountFlags::RDONLY, options.as_c_str())
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
        if !self.shows(ours) {
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

/// Takes away what is left at `path` of the mount with this `device`, or of any of ours, whose connection is closed, so that it
/// answers nothing any more. Whether there was such a thing.
pub(crate) fn clear(path: &Path, device: Option<Device>) -> Result<bool, MountError> {
    let failed = |action, cause| MountError::System { action, path: path.to_owned(), cause };
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").map_err(|cause| failed("list what is at", cause))?;
    let numbers = device.map(|device| format!("{}:{}", device.major, device.minor));
    // the last line is what is seen; see proc(5) for the fields
    let here =
        table.lines().rev().find(|line| line.split(' ').nth(4).is_some_and(|at| unescaped(at) == path));
    let ours = here.is_some_and(|line| {
        let is_it = numbers.as_deref().is_none_or(|numbers| line.split(' ').nth(2) == Some(numbers));
        is_it && line.contains(&format!(" - {FILE_SYSTEM} "))
    });
    // numbers are used again, and a mount that answers is somebody's
    if !ours || !matches!(rustix::fs::statfs(path), Err(Errno::NOTCONN)) {
        return Ok(false);
    }
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(path, flags).map_err(|errno| failed("unmount what is left of", errno.into()))?;
    Ok(true)
}

/// A path of /proc/self/mountinfo, where space, tab, newline and backslash are octal.
fn unescaped(text: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        let octal = (*first == b'\\').then(|| after.get(..3)).flatten();
        let byte = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

impl Device {
    /// Of an `st_dev`.
    pub(crate) fn of(st_dev: u64) -> Self {
        Self { major: rustix::fs::major(st_dev), minor: rustix::fs::minor(st_dev) }
    }

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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn of_a_mount_that_died_before_it_was_served_nothing_is_left_and_one_that_goes_on_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let connection = MountPoint::check(dir.path()).expect("empty").mount("some/image").expect("mounted");
        // whoever asks waits for whoever serves, who has not come yet
        let waiting = std::thread::spawn({
            let path = dir.path().to_owned();
            move || fs::metadata(path)
        });
        drop(connection);
        let error = waiting.join().expect("no panic").expect_err("nobody came");
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NOTCONN));
        let other = Device { major: 0, minor: u32::MAX };
        assert!(!clear(dir.path(), Some(other)).expect("looked at"));
        assert!(clear(dir.path(), None).expect("cleared"));
        assert!(fs::read_dir(dir.path()).expect("there").next().is_none());
        assert!(!clear(dir.path(), None).expect("nothing is there"));
    }

    #[test]
    fn paths_of_the_mount_table_are_read_back() {
        assert_eq!(unescaped("/mnt/a\\040b\\134c"), Path::new("/mnt/a b\\c"));
        assert_eq!(unescaped("/mnt/a\\9"), Path::new("/mnt/a\\9"));
    }
}
