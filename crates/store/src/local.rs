//! A store in a directory of this machine.

use std::path::Path;
use std::sync::Arc;

use object_store::local::LocalFileSystem;

use crate::index::Index;
use crate::{Store, StoreConfig, StoreError};

impl Store {
    /// Opens the store that has its objects in `directory/objects`, making it where it is missing. What is written is
    /// on the disk when the write returns.
    ///
    /// One process uses a directory at a time; a second one is told so. Files that a crash left half written under
    /// `uploads` are removed: an object store does not list them, so nothing else would.
    pub async fn open_directory(directory: &Path, config: StoreConfig) -> Result<Self, StoreError> {
        let wrong = |error| StoreError::Directory { path: directory.display().to_string(), error };
        let objects = directory.join("objects");
        std::fs::create_dir_all(&objects).map_err(wrong)?;
        // the index's lock comes first: it says that these uploads are nobody else's
        let index = Index::open_async(config.index.clone(), config.index_open_max).await?;
        match std::fs::remove_dir_all(objects.join("uploads")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
            _ => {}
        }
        let objects = LocalFileSystem::new_with_prefix(objects)?.with_fsync(true);
        Self::with_index(Arc::new(objects), index, config).await
    }
}
