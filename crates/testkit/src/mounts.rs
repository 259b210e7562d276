//! Mounts that do not outlive their test.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// Unmounts a directory lazily when dropped, once for each mount that lies on it. No mount there is no error.
///
/// A lazy unmount takes the directory out of the tree at once, even while files on it are open.
#[derive(Debug)]
pub struct MountGuard(PathBuf);

impl MountGuard {
    /// Watches over `dir`, whether something is mounted on it already or not.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        unmount_all(&self.0);
    }
}

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub dir: PathBuf,
    /// The kernel's name of the file system, such as `overlay` or `fuse.lamina`.
    pub kind: String,
}

/// All mounts that this process sees, in the order in which they were made.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// What is mounted exactly on `dir`, the topmost.
///
/// # Errors
/// When `dir` does not exist, or `/proc` is not mounted.
pub fn mounted_on(dir: &Path) -> io::Result<Option<Mount>> {
    let dir = std::path::absolute(dir)?;
    Ok(mounts()?.into_iter().rev().find(|mount| mount.dir == dir))
}

/// Unmounts lazily all that lies on `dir` or below it, the last mount first.
///
/// # Errors
/// When a mount refuses or `/proc` is not mounted.
pub fn unmount_below(dir: &Path) -> io::Result<()> {
    let dir = std::path::absolute(dir)?;
    for mount in mounts()?.into_iter().rev().filter(|mount| mount.dir.starts_with(&dir)) {
        match rustix::mount::unmount(&mount.dir, UnmountFlags::DETACH) {
            // it went together with another
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// An overlayfs on `target`: `lower` with the topmost layer first, and a directory for what is written.
///
/// `upper` gets two directories of its own. They must not lie on an overlayfs.
///
/// # Errors
/// What mount(2) or mkdir(2) says.
pub fn overlay(lower: &[PathBuf], upper: &Path, target: &Path) -> io::Result<MountGuard> {
    let (changes, work) = (upper.join("changes"), upper.join("work"));
    for dir in [&changes, &work] {
        std::fs::create_dir_all(dir)?;
    }
    let mut options = b"lowerdir=".to_vec();
    for (index, dir) in lower.iter().enumerate() {
        if index > 0 {
            options.push(b':');
        }
        options.extend_from_slice(dir.as_os_str().as_bytes());
    }
    for (name, dir) in [(",upperdir=", &changes), (",workdir=", &work)] {
        options.extend_from_slice(name.as_bytes());
        options.extend_from_slice(dir.as_os_str().as_bytes());
    }
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str())?;
    Ok(MountGuard::new(target))
}

fn unmount_all(dir: &Path) {
    while rustix::mount::unmount(dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

/// Fields: id, parent, device, root, mount point, options, optional fields, `-`, kind, source, options.
fn parse(mountinfo: &[u8]) -> Vec<Mount> {
    let line = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let dir = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
        let kind = String::from_utf8_lossy(fields.skip_while(|field| *field != b"-").nth(1)?).into_owned();
        Some(Mount { dir, kind })
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(byte);
            rest = &after[3..];
        } else {
            plain.push(first);
            rest = after;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read_as_it_is() {
        let line = b"36 35 98:0 / /a\\040b\\134 rw,noatime master:1 shared:2 - fuse.x src rw\n";
        assert_eq!(parse(line), [Mount { dir: "/a b\\".into(), kind: "fuse.x".into() }]);
    }

    #[test]
    fn broken_lines_are_no_mounts() {
        for line in ["", "\n\n", "1 2 3", "1 2 3 / /x rw", "1 2 3 / /x rw - "] {
            assert!(parse(line.as_bytes()).iter().all(|mount| mount.kind.is_empty()), "{line}");
        }
    }

    #[test]
    fn a_guard_takes_every_mount_off_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            rustix::mount::mount("none", dir.path(), "tmpfs", MountFlags::empty(), c"size=64k").unwrap();
        }
        let guard = MountGuard::new(dir.path());
        assert_eq!(mounted_on(dir.path()).unwrap().unwrap().kind, "tmpfs");
        drop(guard);
        assert_eq!(mounted_on(dir.path()).unwrap(), None);
    }

    #[test]
    fn everything_below_a_directory_is_unmounted() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        for target in [dir.path(), &inner] {
            std::fs::create_dir_all(target).unwrap();
            rustix::mount::mount("none", target, "tmpfs", MountFlags::empty(), c"size=64k").unwrap();
        }
        unmount_below(dir.path()).unwrap();
        assert!(!mounts().unwrap().iter().any(|mount| mount.dir.starts_with(dir.path())));
    }
}
