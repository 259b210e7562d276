//! What references meant when somebody last asked: one small JSON file each, in a directory that processes may share.
//!
//! Every file can be deleted; it is written again when its reference is asked for the next time.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use lamina_image::Digest;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Such a directory.
#[derive(Clone, Debug)]
pub(crate) struct Remembered {
    directory: PathBuf,
    files_max: usize,
    file_bytes_max: u64,
}

impl Remembered {
    /// The directory, which may be missing, with so many files at most, each of so many bytes at most.
    pub(crate) fn new(directory: PathBuf, files_max: usize, file_bytes_max: u64) -> Self {
        Self { directory, files_max, file_bytes_max }
    }

    /// Where the file of a reference is.
    pub(crate) fn path(&self, reference: &str) -> PathBuf {
        self.directory.join(format!("{}.json", Digest::of(reference.as_bytes()).hex()))
    }

    /// What the file of a reference says; `None` also where it is damaged or too long. Blocks for one small read.
    pub(crate) fn find<T: DeserializeOwned>(&self, reference: &str) -> Option<T> {
        let mut bytes = Vec::new();
        let file = File::open(self.path(reference)).ok()?;
        file.take(self.file_bytes_max).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes the file of a reference. The oldest are forgotten for it.
    pub(crate) fn write<T: Serialize>(&self, reference: &str, entry: &T) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let path = self.path(reference);
        let bytes = serde_json::to_vec(entry)?;
        if bytes.len() as u64 > self.file_bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if !path.exists() {
            self.shrink()?;
        }
        let mut file = tempfile::Builder::new().prefix(".tmp").tempfile_in(&self.directory)?;
        file.write_all(&bytes)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// Forgets the oldest until one more has room.
    fn shrink(&self) -> io::Result<()> {
        let mut aged = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            // what others are writing this moment
            if path.extension().is_none() {
                continue;
            }
            let modified = fs::metadata(&path).and_then(|found| found.modified());
            aged.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), path));
        }
        aged.sort();
        aged.truncate((aged.len() + 1).saturating_sub(self.files_max));
        for (_, path) in aged {
            match fs::remove_file(path) {
                // somebody else was faster
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_never_more_files_and_what_others_write_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let remembered = Remembered::new(directory.path().to_owned(), 3, 100);
        let others = directory.path().join(".tmpOther");
        fs::write(&others, "half").unwrap();
        for n in 0..10 {
            remembered.write(&n.to_string(), &n).unwrap();
            assert_eq!(remembered.find(&n.to_string()), Some(n));
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
        assert!(others.exists());
    }
}
