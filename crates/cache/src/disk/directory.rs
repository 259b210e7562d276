//! Whether a directory can be a cache's: before anything in it is touched.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::CacheError;

/// The file that says whose the directory is.
const STAMP_FILE: &str = "version";
/// What it says. Another text is of a version that keeps other things here, and is left alone.
const STAMP: &str = "lamina cache 1\n";
/// A stamp is never longer, in bytes.
const STAMP_BYTES_MAX: u64 = 64;

/// File systems that live on another machine, by `statfs(2)`'s number (linux/magic.h).
const REMOTE: [(i64, &str); 11] = [
    (0x6969, "nfs"),
    (0x517b, "smb"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb2"),
    (0x00c3_6400, "ceph"),
    (0x0102_1997, "9p"),
    (0x5346_414f, "afs"),
    (0x6b41_4653, "afs"),
    (0x0bd0_0bd0, "lustre"),
    // not in Linux itself; coreutils' stat.c knows them
    (0x4750_4653, "gpfs"),
    (0x1983_0326, "beegfs"),
];
/// What `statfs(2)` says of all that is served by a process: only the mount's type, or its source, tells what that is.
const FUSE: i64 = 0x6573_5546;
/// Types of such mounts that live on another machine, or are shared with it, as `mount(8)` or their own pages show them.
/// Others, such as `fuse.mergerfs`, are of local disks.
const REMOTE_FUSE: [&str; 12] = [
    "fuse.lamina",
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.juicefs",
    "fuse.glusterfs",
    "fuse.ceph-fuse",
    // both are MooseFS
    "fuse.mfsmount",
    "fuse.mfs",
    "fuse.seaweedfs",
    "virtiofs",
];
/// Where the type is only `fuse`, the source of one that lives on another machine begins so; davfs2's is a URL.
const REMOTE_SOURCES: [&str; 4] = ["mountpoint-s3", "blobfuse2", "http://", "https://"];

/// Why a directory will not do, and what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unfit {
    /// Another version's. Nothing in it was touched.
    #[error(
        "it was made by another version of lamina (it says {0:?}); use that version, another directory, or remove it"
    )]
    Version(String),
    /// Somebody else could change what is read from it.
    #[error("it belongs to user {owner}, and this process runs as user {user}; chown it or use another one")]
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who asks.
        user: u32,
    },
    /// Two machines could own it at once, and a link that breaks would take running programs with it.
    #[error("it is on {0}, a network file system; use a directory on a local disk")]
    Remote(String),
    /// Nothing could be kept in it, nor the lock be taken that makes it one node's.
    #[error(
        "it is on a file system that is mounted read-only; remount it writable (its disk may have failed), or use another directory"
    )]
    ReadOnly,
}

/// Makes the directory where it is missing, and checks that it can be a cache's. Changes nothing in it.
pub fn prepare(directory: &Path) -> Result<(), CacheError> {
    let failed = |cause| CacheError::Directory { directory: directory.to_owned(), cause: Arc::new(cause) };
    let unfit = |why| CacheError::Unfit { directory: directory.to_owned(), why };
    // what is cached may come from images that are not for everybody
    if !directory.exists() {
        directory.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let (owner, user) = (fs::metadata(directory).map_err(failed)?.uid(), rustix::process::geteuid().as_raw());
    if owner != user {
        return Err(unfit(Unfit::Owner { owner, user }));
    }
    if let Some(name) = remote(directory).map_err(failed)? {
        return Err(unfit(Unfit::Remote(name)));
    }
    if is_read_only(directory) {
        return Err(unfit(Unfit::ReadOnly));
    }
    match File::open(directory.join(STAMP_FILE)) {
        Ok(file) => {
            let mut text = String::new();
            let read = file.take(STAMP_BYTES_MAX).read_to_string(&mut text);
            match read {
                // a disk that was full when it was written
                Ok(_) if text == STAMP || text.is_empty() => Ok(()),
                Ok(_) => Err(unfit(Unfit::Version(text.trim().to_owned()))),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    Err(unfit(Unfit::Version("something unreadable".to_owned())))
                }
                Err(error) => Err(failed(error)),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Whether nothing can be written, found out by a file without a name: `statfs(2)` does not say what ext4 does after an error.
fn is_read_only(directory: &Path) -> bool {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR).err() == Some(Errno::ROFS)
}

/// The network file system that a directory is on, if it is.
fn remote(directory: &Path) -> io::Result<Option<String>> {
    let kind = rustix::fs::statfs(directory)?.f_type;
    if kind != FUSE {
        return Ok(REMOTE.iter().find(|(number, _)| *number == kind).map(|(_, name)| (*name).to_owned()));
    }
    let device = fs::metadata(directory)?.dev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(remote_fuse(&mounts, &device).map(str::to_owned))
}

/// What the mount with this device is called, if it is of another machine.
fn remote_fuse<'a>(mounts: &'a str, device: &str) -> Option<&'a str> {
    let (name, source) = mount_type(mounts, device)?;
    match name {
        "fuse" => REMOTE_SOURCES.iter().any(|begins| source.starts_with(begins)).then_some(source),
        _ => REMOTE_FUSE.contains(&name).then_some(name),
    }
}

/// The type of the mount with this device (`major:minor`) in the text of `/proc/PID/mountinfo`, as proc(5) has it, and its source,
/// which may be empty.
fn mount_type<'a>(mounts: &'a str, device: &str) -> Option<(&'a str, &'a str)> {
    let of_device = mounts.lines().find(|line| line.split(' ').nth(2) == Some(device))?;
    let mut fields = of_device.split_once(" - ")?.1.split(' ');
    Some((fields.next()?, fields.next().unwrap_or_default()))
}

/// Says whose the directory is, once it is locked. A full disk must not keep the cache from opening.
pub(super) fn stamp(directory: &Path) {
    let path = directory.join(STAMP_FILE);
    if !path.exists() {
        let _ = File::create(path).and_then(|mut file| file.write_all(STAMP.as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_another_version_or_user_is_refused_and_left_as_it_is() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("a/cache");
        prepare(&directory).expect("made");
        stamp(&directory);
        prepare(&directory).expect("its own");
        fs::write(directory.join(STAMP_FILE), "lamina cache 2\n").expect("written");
        let error = prepare(&directory).expect_err("another version");
        assert!(error.to_string().contains("lamina cache 2"), "{error}");
        fs::write(directory.join(STAMP_FILE), b"\xff\xfe").expect("written");
        assert!(prepare(&directory).is_err());
        fs::write(directory.join(STAMP_FILE), STAMP).expect("written");
        std::os::unix::fs::chown(&directory, Some(12345), None).expect("these tests need root");
        let error = prepare(&directory).expect_err("another user's");
        assert!(error.to_string().contains("user 12345"), "{error}");
        assert_eq!(fs::read(directory.join(STAMP_FILE)).expect("read"), STAMP.as_bytes());
    }

    #[test]
    fn the_type_of_a_mount_is_found_by_its_device() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      40 22 0:53 / /mnt/a\\040b rw,nosuid master:7 shared:9 - fuse.sshfs host:/x rw,user_id=0\n\
                      41 22 0:5 / /mnt/c rw\n";
        assert_eq!(mount_type(mounts, "254:0"), Some(("ext4", "/dev/vda")));
        assert_eq!(mount_type(mounts, "0:53"), Some(("fuse.sshfs", "host:/x")));
        assert_eq!(mount_type(mounts, "0:5"), None, "a line that is cut off");
        assert_eq!(mount_type(mounts, "0:6"), None);
    }

    #[test]
    fn what_a_process_serves_is_of_another_machine_by_its_type_or_its_source() {
        let said = |mount: &str| {
            let mounts = format!("40 22 0:53 / /mnt rw,nosuid shared:9 - {mount} rw,user_id=0\n");
            remote_fuse(&mounts, "0:53").map(str::to_owned)
        };
        for (mount, name) in [
            ("fuse.sshfs host:/x", "fuse.sshfs"),
            ("fuse.mfs 10.0.0.9:9421", "fuse.mfs"),
            ("fuse.mfsmount mfsmount", "fuse.mfsmount"),
            ("fuse mountpoint-s3", "mountpoint-s3"),
            ("fuse blobfuse2", "blobfuse2"),
            ("fuse https://host/dav", "https://host/dav"),
        ] {
            assert_eq!(said(mount).as_deref(), Some(name));
        }
        for mount in ["fuse.mergerfs a:b", "fuse /dev/fuse", "fuse", "fuseblk /dev/sda1", "ext4 /dev/vda"] {
            assert_eq!(said(mount), None, "{mount}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_of_mounts_has_a_type_or_none(mounts in "([0-9:]{1,3} |- |[a-z]{1,3} |\n){0,40}", device in "[0-9:]{1,3}") {
            let found = mount_type(&mounts, &device);
            proptest::prop_assert!(found.is_none_or(|(name, source)| mounts.contains(name) && mounts.contains(source)));
        }
    }

    #[test]
    fn a_read_only_disk_is_named() {
        let root = tempfile::tempdir().expect("a directory");
        let flags = rustix::mount::MountFlags::RDONLY;
        rustix::mount::mount("tmpfs", root.path(), "tmpfs", flags, c"size=1m").expect("mounting needs root");
        let error = prepare(&root.path().join("cache")).expect_err("read-only");
        rustix::mount::unmount(root.path(), rustix::mount::UnmountFlags::DETACH).expect("unmounted");
        let (said, path) = (error.to_string(), root.path().display().to_string());
        assert!(said.contains(&path) && said.contains("Read-only"), "{said}");
    }
}
