//! A mount's life: from an empty directory to one again.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, Session, SessionACL};
use lamina_cache::{Cache, Source};
use lamina_image::{Ino, Tree};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{error, info};

use crate::ahead::Ahead;
use crate::fs::Files;
use crate::fuse::Fuse;
use crate::mountpoint::{Device, MountPoint};
use crate::pages::{self, Pages};
use crate::window::Window;
use crate::{MountConfig, MountError, MountSnapshot};

/// An image, mounted. Dropping it unmounts it, lazily if it is in use: then programs that have files open keep them,
/// and its threads end with the last of these.
pub struct Mount {
    point: MountPoint,
    device: Device,
    ahead: Arc<Ahead>,
    ended: watch::Receiver<bool>,
    threads: Mutex<Option<JoinHandle<()>>>,
}

impl Mount {
    /// Mounts `tree`. When it returns, the mount answers. Waiting reads run on `handle`.
    ///
    /// Blocks for some milliseconds, never for the network. *Errors* leave nothing mounted.
    pub fn start(
        tree: Arc<Tree>,
        cache: Arc<Cache>,
        source: Arc<dyn Source>,
        config: MountConfig,
        handle: Handle,
    ) -> Result<Self, MountError> {
        let point = MountPoint::check(&config.mountpoint)?;
        let damaged = |error| MountError::System {
            action: "read the tree for",
            path: config.mountpoint.clone(),
            cause: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
        };
        let root_mode = tree.inode(Ino::ROOT).map_err(damaged)?.mode;
        let connection = point.mount(&config.name, root_mode)?;
        let mut started = Started { point: Some(point) };
        let failed = |cause| MountError::System { action: "serve", path: config.mountpoint.clone(), cause };
        let ahead = Arc::new(Ahead::new(tree, cache, source, config.clone(), handle.clone()));
        let (pages, runs) = Pages::new(ahead.tree.frames());
        let fuse = Fuse { files: Files { ahead: ahead.clone(), pages: Arc::new(pages) }, handle };
        let mut loops = Config::default();
        loops.n_threads = Some(config.threads.max(1));
        let session = Session::from_fd(fuse, connection, SessionACL::All, loops).map_err(failed)?;
        let (notifier, counters) = (session.notifier(), ahead.counters.clone());
        // ends with the last of the file system that could send it something
        std::thread::Builder::new()
            .name("lamina-pages".to_owned())
            .spawn(move || pages::store(&runs, &notifier, &counters))
            .map_err(failed)?;
        let (ending, ended) = watch::channel(false);
        let threads = std::thread::Builder::new()
            .name("lamina-mount".to_owned())
            .spawn(move || {
                if let Err(error) = session.run() {
                    error!(%error, "serving a mount ended with an error");
                }
                ending.send_replace(true);
            })
            .map_err(failed)?;
        let point = started.point.take().expect("taken once");
        let device = point.device().inspect_err(|_| point.detach())?;
        let (sparse, dense) = (config.read_ahead_kb, config.read_ahead_dense_kb);
        ahead.set_window(Window::new(device.read_ahead_path(), sparse, dense, config.dense_run_bytes));
        info!(mountpoint = %point.path().display(), "mounted");
        Ok(Self { point, device, ahead, ended, threads: Mutex::new(Some(threads)) })
    }

    /// Where it is mounted, as an absolute path.
    pub fn mountpoint(&self) -> &Path {
        self.point.path()
    }

    /// The counters now.
    pub fn snapshot(&self) -> MountSnapshot {
        self.ahead.counters.snapshot()
    }

    /// Unmounts it. *Errors*: [`MountError::InUse`] unless `lazy`; a lazy one takes the mount away at once and leaves
    /// open files to who has them. [`MountError::Gone`] if somebody else unmounted it.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        self.point.unmount(self.device, lazy)
    }

    /// Returns once it is unmounted, by whomever, and no program has a file of it open any more.
    pub async fn wait(&self) {
        let mut ended = self.ended.clone();
        // an error means that the threads are gone as well
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = *self.ended.borrow() || self.unmount(false).is_ok();
        if !unmounted {
            let _ = self.unmount(true);
            return;
        }
        // the kernel has closed the connection, so the threads are on their way out
        if let Some(threads) = self.threads.lock().take() {
            let _ = threads.join();
        }
    }
}

/// Takes the mount away again if starting fails half way.
struct Started {
    point: Option<MountPoint>,
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(point) = &self.point {
            point.detach();
        }
    }
}
