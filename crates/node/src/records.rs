//! What a node remembers of its mounts beyond its own end.
//!
//! Each is a small file of a protobuf message and behind it its BLAKE3 hash. It appears whole, by rename. One that is damaged is
//! removed: then a mount is not made again, but nothing wrong is ever mounted.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lamina_wire::proto::{ImageRecord, MountRecord};
use prost::Message;
use tracing::warn;

use crate::{Found, NodeError};

/// What stands behind a message.
const HASH_BYTES: usize = 32;
/// A longer file is none of ours: requests are at most 64 KiB.
const RECORD_BYTES_MAX: u64 = 256 << 10;

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Records {
    mounts: PathBuf,
    next: AtomicU64,
}

impl Records {
    /// Takes the directory below `directory`, creating it where it is missing. Blocks.
    pub(crate) fn open(directory: &Path) -> Result<Self, NodeError> {
        let mounts = directory.join("mounts");
        let failed = |error| NodeError::File { path: mounts.clone(), error };
        fs::create_dir_all(&mounts).map_err(failed)?;
        for entry in fs::read_dir(&mounts).map_err(failed)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
        let records = Self { mounts, next: AtomicU64::new(1) };
        let last = records.mounts().last().map_or(0, |(number, _)| *number);
        records.take_numbers(last);
        Ok(records)
    }

    /// A number for a mount that no other has.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Numbers up to this one are taken.
    pub(crate) fn take_numbers(&self, last: u64) {
        self.next.fetch_max(last.saturating_add(1), Ordering::Relaxed);
    }

    fn mount_path(&self, number: u64) -> PathBuf {
        self.mounts.join(format!("{number}.mount"))
    }

    /// Remembers a mount. Blocks, but not for the disk.
    pub(crate) fn save_mount(&self, number: u64, record: &MountRecord) -> Result<(), NodeError> {
        let path = self.mount_path(number);
        save(&path, &record.encode_to_vec()).map_err(|error| NodeError::File { path, error })
    }

    /// Has it survive a loss of power as well. Blocks for the disk.
    pub(crate) fn sync_mount(&self, number: u64) {
        let synced = File::open(self.mount_path(number)).and_then(|file| file.sync_all());
        if let Err(error) = synced.and_then(|()| File::open(&self.mounts)?.sync_all())
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, "a mount may be forgotten if power is lost");
        }
    }

    /// Forgets a mount.
    pub(crate) fn forget_mount(&self, number: u64) {
        let _ = fs::remove_file(self.mount_path(number));
    }

    /// All mounts that are remembered. Blocks.
    pub(crate) fn mounts(&self) -> Vec<(u64, MountRecord)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.mounts).into_iter().flatten().flatten() {
            let path = entry.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            if let (Some(number), Some(record)) = (stem, load(&path)) {
                found.push((number, record));
            }
        }
        found.sort_by_key(|(number, _)| *number);
        found
    }
}

/// An image as a record has it.
pub(crate) fn image_record(reference: &str, found: &Found) -> ImageRecord {
    ImageRecord {
        reference: reference.to_owned(),
        manifest: found.manifest.to_string(),
        tree: found.tree.to_string(),
        bound: found.bound,
    }
}

/// A record's image, which took no request.
pub(crate) fn found(record: &ImageRecord) -> Option<Found> {
    let (manifest, tree) = (record.manifest.parse().ok()?, record.tree.parse().ok()?);
    Some(Found { manifest, tree, names: None, bound: record.bound, requests: 0 })
}

fn save(path: &Path, message: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    let mut file = tempfile::Builder::new().prefix(".tmp").tempfile_in(directory)?;
    file.write_all(message)?;
    file.write_all(blake3::hash(message).as_bytes())?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// What a file says, if it is whole; one that is not is removed.
fn load<M: Message + Default>(path: &Path) -> Option<M> {
    let read = || -> io::Result<Option<M>> {
        if fs::metadata(path)?.len() > RECORD_BYTES_MAX {
            return Ok(None);
        }
        let bytes = fs::read(path)?;
        let Some((message, hash)) = bytes.split_last_chunk::<HASH_BYTES>() else { return Ok(None) };
        let sound = blake3::hash(message).as_bytes() == hash;
        Ok(sound.then(|| M::decode(message).ok()).flatten())
    };
    match read() {
        Ok(Some(record)) => Some(record),
        Ok(None) => {
            warn!(path = %path.display(), "a record is damaged and is removed");
            let _ = fs::remove_file(path);
            None
        }
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(path = %path.display(), %error, "a record cannot be read");
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use lamina_image::Digest;
    use lamina_wire::proto::MountRequest;

    use super::*;

    fn image() -> Found {
        Found { manifest: Digest::of(b"m"), tree: Digest::of(b"t"), names: None, bound: true, requests: 2 }
    }

    fn record(directory: &str) -> MountRecord {
        let request = MountRequest { directory: directory.to_owned(), ..MountRequest::default() };
        let image = Some(image_record("r/a:t", &image()));
        MountRecord { request: Some(request), image, mounted: true, ..MountRecord::default() }
    }

    #[test]
    fn what_is_remembered_is_found_by_the_next_node_and_numbers_are_not_used_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let records = Records::open(directory.path()).expect("opened");
        let (one, two) = (records.number(), records.number());
        records.save_mount(one, &record("/one")).expect("saved");
        records.save_mount(two, &record("/two")).expect("saved");
        records.sync_mount(two);
        records.forget_mount(one);
        let records = Records::open(directory.path()).expect("opened");
        assert_eq!(records.mounts(), [(two, record("/two"))]);
        assert!(records.number() > two);
        let known = record("/two").image.and_then(|image| found(&image)).expect("an image");
        assert_eq!((known.manifest, known.tree, known.bound), (Digest::of(b"m"), Digest::of(b"t"), true));
    }

    #[test]
    fn a_record_with_any_byte_changed_is_removed_and_not_believed() {
        let directory = tempfile::tempdir().expect("a directory");
        let records = Records::open(directory.path()).expect("opened");
        let number = records.number();
        records.save_mount(number, &record("/one")).expect("saved");
        let path = records.mount_path(number);
        let good = fs::read(&path).expect("read");
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).expect("written");
            assert!(records.mounts().is_empty(), "byte {at}");
            assert!(!path.exists());
        }
    }
}
