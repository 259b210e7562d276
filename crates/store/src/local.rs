//! A store in a directory of this machine, or in a bucket.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;

use crate::index::Index;
use crate::storage::{Storage, directory_objects};
use crate::{Store, StoreConfig, StoreError, keys};

impl Store {
    /// Opens the store in a directory or a bucket.
    pub async fn open_storage(storage: &Storage, config: StoreConfig) -> Result<Self, StoreError> {
        match storage {
            Storage::Directory(directory) => Self::open_directory(directory, config).await,
            Storage::Bucket(_) => {
                let index = Index::open_async(config.index.clone(), config.index_open_max).await?;
                Self::with_index(storage.objects().await?, index, config).await
            }
        }
    }

    /// Opens the store that has its objects in `directory/objects`, making it where it is missing. What is written is
    /// on the disk when the write returns.
    ///
    /// One process serves a directory at a time; a second one is told so. [`Keeper`](crate::Keeper)s may be beside it.
    /// Files that a crash left half written under
    /// `uploads` are removed: an object store does not list them, so nothing else would.
    pub async fn open_directory(directory: &Path, config: StoreConfig) -> Result<Self, StoreError> {
        let wrong = |error| StoreError::Directory { path: directory.display().to_string(), error };
        std::fs::create_dir_all(directory).map_err(wrong)?;
        let lock = lock(directory)?;
        let index = Index::open_async(config.index.clone(), config.index_open_max).await?;
        match std::fs::remove_dir_all(directory.join("objects/uploads")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
            _ => {}
        }
        let objects = directory_objects(directory)?;
        // whoever had a lease before is dead
        let leases: Vec<_> = objects.list(&keys::leases()).try_collect().await?;
        for lease in leases {
            objects.delete(&lease.location).await?;
        }
        let store = Self::with_index(objects, index, config).await?;
        Ok(Self { _lock: Some(Arc::new(lock)), ..store })
    }
}

/// Says that this process serves the directory, for as long as the file is open.
fn lock(directory: &Path) -> Result<File, StoreError> {
    let path = directory.join("lock");
    let wrong = |error| StoreError::Directory { path: path.display().to_string(), error };
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(wrong)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(directory.display().to_string())),
        Err(TryLockError::Error(error)) => Err(wrong(error)),
    }
}
