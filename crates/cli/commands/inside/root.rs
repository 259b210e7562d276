//! The root directory of a program: the image, writable by an overlayfs, with what programs expect of the machine in it.
//!
//! Whatever lies outside is opened before the image becomes the root directory, and put in place after. So no link in the image
//! leads out of it. What has to be made there is made in the image and in volumes only, whatever links lead to, never in what
//! is the machine's: an image whose /etc is a link to /dev would have files made there.

use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::path::Arg;
use rustix::process::pivot_root;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{Changes, Plan, Volume};

/// What programs get of the machine where there is such a thing, and whether they only may look at it: what they wrote into its
/// files would stay.
const MACHINE: [(&str, bool); 4] =
    [("/dev", false), ("/sys", true), ("/etc/resolv.conf", true), ("/etc/hosts", true)];

/// Where shm_open(3) makes files.
const SHARED_MEMORY: &str = "/dev/shm";

/// Moves this process, which must have one thread, into the image. Where things may be made from then on.
#[expect(unsafe_code, reason = "there is no safe call for namespaces")]
pub(super) fn enter(plan: &Plan) -> Result<Ours> {
    // SAFETY: file descriptors stay as they are
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("a mount namespace: are you root?")?;
    // nothing that is mounted here is seen outside
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("mounts of our own")?;
    let machine = MACHINE.into_iter().filter(|(path, _)| Path::new(path).exists());
    let machine =
        machine.map(|(path, read_only)| Volume { host: path.into(), inside: path.into(), read_only });
    let machine = machine.map(|volume| Opened::open(&volume)).collect::<Result<Vec<_>>>()?;
    let mut volumes: Vec<_> = plan.volumes.iter().collect();
    // one that lies in another comes behind it
    volumes.sort_by_key(|volume| volume.inside.components().count());
    let volumes = volumes.into_iter().map(Opened::open).collect::<Result<Vec<_>>>()?;
    // relative paths in what follows, so that no character in a directory's name means anything to overlayfs
    std::env::set_current_dir(&plan.directory)?;
    fs::create_dir("root")?;
    let writable = plan.changes != Changes::Refused;
    match plan.changes {
        Changes::Refused => mount_bind("image", "root").context("the image as a root directory")?,
        Changes::Memory => {
            fs::create_dir("changes")?;
            file_system("tmpfs", "changes", c"mode=755").context("a place for what the command writes")?;
            overlay()?;
        }
        Changes::Disk => {
            fs::create_dir("changes")?;
            let disk = plan.directory.display();
            overlay().with_context(|| {
                format!("on the disk of {disk}, where --in-memory or another --cache may do")
            })?;
        }
    }
    std::env::set_current_dir("root")?;
    // pivot_root(2): the old root directory comes to lie on the new one
    pivot_root(".", ".").context("the image as the root directory")?;
    unmount(".", UnmountFlags::DETACH).context("the machine's root directory cannot be left")?;
    std::env::set_current_dir("/")?;
    let mut ours = Ours(vec![mount_id(CWD, "/")?]);
    if ours.mount_point(Path::new("/proc"), true, writable)? {
        file_system("proc", "/proc", c"").context("/proc in the image")?;
    }
    for opened in &machine {
        if ours.mount_point(&opened.inside, opened.is_directory, writable)? {
            opened.put()?;
        }
    }
    // as machines have it, but its own: what is left there would stay, and programs name what they make there by their process ids,
    // which begin anew in each run
    if Path::new(SHARED_MEMORY).is_dir() {
        file_system("tmpfs", SHARED_MEMORY, c"mode=1777").context("shared memory in the image")?;
        ours.0.push(mount_id(CWD, SHARED_MEMORY)?);
    }
    for opened in &volumes {
        if !ours.mount_point(&opened.inside, opened.is_directory, writable)? {
            bail!("the image has no {} for a volume, and --read-only is set", opened.inside.display());
        }
        opened.put()?;
        ours.0.push(mount_id(&opened.tree, "")?);
    }
    Ok(ours)
}

/// An overlayfs over the image at `root`, whose changes go to `changes`.
fn overlay() -> Result<()> {
    for name in ["changes/upper", "changes/work"] {
        fs::create_dir(name)?;
    }
    // the root directory looks as its upper one does
    let found = fs::metadata("image").context("the image's root directory")?;
    std::os::unix::fs::chown("changes/upper", Some(found.uid()), Some(found.gid()))?;
    fs::set_permissions("changes/upper", Permissions::from_mode(found.mode() & 0o7777))?;
    file_system("overlay", "root", c"lowerdir=image,upperdir=changes/upper,workdir=changes/work")
        .context("overlayfs over the image")
}

fn file_system(kind: &str, target: &str, options: &CStr) -> rustix::io::Result<()> {
    mount(kind, target, kind, MountFlags::empty(), options)
}

/// The mounts, by their ids, in which something may be made: the root directory and the volumes.
pub(super) struct Ours(Vec<u64>);

impl Ours {
    /// Goes to a directory in the image, which is made if need be.
    pub(super) fn go_to(&self, directory: &str) -> Result<()> {
        let working = Path::new("/").join(directory);
        let there = if working.is_dir() { Ok(()) } else { self.make(&working, true) };
        there
            .and_then(|()| Ok(std::env::set_current_dir(&working)?))
            .with_context(|| format!("the working directory {}", working.display()))
    }

    /// Makes what something can be mounted on, if there is none. Whether there is one now: nothing is made in an image that is
    /// not writable. A link that leads nowhere is replaced.
    fn mount_point(&self, path: &Path, is_directory: bool, writable: bool) -> Result<bool> {
        if let Ok(found) = path.metadata() {
            if found.is_dir() != is_directory {
                bail!("{} in the image and on this machine are a directory and a file", path.display());
            }
            return Ok(true);
        }
        if !writable {
            return Ok(false);
        }
        self.make(path, is_directory)
            .with_context(|| format!("a mount point in the image: {}", path.display()))?;
        Ok(true)
    }

    /// Makes a directory or an empty file, and what leads there. *Errors*: also where that would be in a mount of the machine.
    /// Nobody else changes what is there meanwhile, as no program runs yet.
    fn make(&self, path: &Path, is_directory: bool) -> Result<()> {
        let parent = path.parent().context("nothing can be made in its place")?;
        let there = parent.ancestors().find(|there| there.exists()).context("the root directory")?;
        ensure!(self.0.contains(&mount_id(CWD, there)?), "{} is no part of the image", there.display());
        if path.is_symlink() {
            fs::remove_file(path)?;
        }
        // neither follows a link that leads nowhere
        if is_directory {
            return Ok(fs::create_dir_all(path)?);
        }
        fs::create_dir_all(parent)?;
        File::create_new(path)?;
        Ok(())
    }
}

/// The id of the mount in which a file lies, that of the directory itself where the path is empty.
fn mount_id(directory: impl AsFd, path: impl Arg) -> Result<u64> {
    let found = statx(directory, path, AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(found.stx_mnt_id)
}

/// A volume, opened where it lies and not yet mounted anywhere.
struct Opened {
    tree: OwnedFd,
    inside: PathBuf,
    is_directory: bool,
}

impl Opened {
    fn open(volume: &Volume) -> Result<Self> {
        let Volume { host, inside, read_only } = volume;
        let named = || format!("{} of this machine", host.display());
        let is_directory = host.metadata().with_context(named)?.is_dir();
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, host, flags).with_context(named)?;
        if *read_only {
            make_read_only(&tree).with_context(named)?;
        }
        Ok(Self { tree, inside: inside.clone(), is_directory })
    }

    fn put(&self) -> Result<()> {
        move_mount(&self.tree, "", CWD, &self.inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .with_context(|| format!("{} in the image", self.inside.display()))
    }
}

/// Makes a tree of mounts read-only, with all that is mounted in it.
#[expect(unsafe_code, reason = "rustix has no mount_setattr(2)")]
fn make_read_only(tree: &OwnedFd) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path and the attributes outlive the call, and the size is theirs
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
