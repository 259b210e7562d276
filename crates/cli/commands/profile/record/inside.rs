//! Runs a program inside a mounted image, writable, with `/proc` and `/dev`.
//!
//! All this is mounted in a mount namespace that only the program and its children live in, so the kernel takes it away with
//! the last of them, however that ends, and nobody else ever sees it. What the program writes goes to memory, and goes too.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

/// Where programs are looked for if the image does not say: as the runtimes of containers have it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program and the image that it is to run in.
pub(super) struct Inside {
    /// A directory to mount things in, absolute; the image is mounted at [`Inside::image`].
    pub(super) directory: PathBuf,
    /// The program and its arguments; never empty.
    pub(super) command: Vec<String>,
    /// `NAME=value` each.
    pub(super) environment: Vec<String>,
    /// Where it starts; the root directory if this is empty.
    pub(super) working_directory: String,
}

impl Inside {
    /// Where the image has to be mounted.
    pub(super) fn image(&self) -> PathBuf {
        self.directory.join("image")
    }
}

/// Starts the program; it is killed when the child is dropped. Its standard streams are ours.
pub(super) async fn start(inside: Inside) -> Result<Child> {
    let runtime = Handle::current();
    // a thread of its own, since its namespace and root directory are of no use to anybody else; the program inherits them
    let (send, started) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("inside".into()).spawn(move || {
        let _runtime = runtime.enter();
        // whoever waits may have gone; then the program is killed at once
        let _ = send.send(enter(&inside).and_then(|()| spawn(&inside)));
    })?;
    started.await.context("the thread that enters the image ended early")?
}

/// Moves the calling thread into the image.
#[expect(unsafe_code, reason = "there is no safe call for namespaces")]
fn enter(inside: &Inside) -> Result<()> {
    // SAFETY: file descriptors stay shared
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
        .context("a mount namespace: are you root?")?;
    // nothing that is mounted here is seen outside, and an unmount outside is seen here
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("mounts of our own")?;
    // relative paths in what follows, so that no character in a directory's name means anything to overlayfs
    std::env::set_current_dir(&inside.directory)?;
    for name in ["changes", "root"] {
        std::fs::create_dir(name)?;
    }
    file_system("tmpfs", "changes", c"mode=755").context("a place for what the command writes")?;
    for name in ["changes/upper", "changes/work"] {
        std::fs::create_dir(name)?;
    }
    file_system("overlay", "root", c"lowerdir=image,upperdir=changes/upper,workdir=changes/work")
        .context("overlayfs over the image")?;
    for name in ["root/proc", "root/dev"] {
        directory(Path::new(name)).with_context(|| format!("a mount point in the image: {name}"))?;
    }
    file_system("proc", "root/proc", c"").context("/proc in the image")?;
    mount_bind_recursive("/dev", "root/dev").context("/dev in the image")?;
    std::os::unix::fs::chroot("root").context("chroot into the image")?;
    let working = Path::new("/").join(&inside.working_directory);
    std::fs::create_dir_all(&working)
        .and_then(|()| std::env::set_current_dir(&working))
        .with_context(|| format!("the image's working directory {}", working.display()))
}

fn file_system(kind: &str, target: &str, options: &CStr) -> rustix::io::Result<()> {
    mount(kind, target, kind, MountFlags::empty(), options)
}

/// Makes a directory if there is none. A link there, which could lead out of the image, is replaced.
fn directory(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    std::fs::create_dir(path)
}

fn spawn(inside: &Inside) -> Result<Child> {
    let (program, arguments) = inside.command.split_first().expect("never empty");
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).env("HOME", "/root");
    command.envs(inside.environment.iter().filter_map(|assignment| assignment.split_once('=')));
    command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit()).kill_on_drop(true);
    command.spawn().with_context(|| format!("{program} cannot be started in the image"))
}
