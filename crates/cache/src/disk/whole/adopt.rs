//! Opening the directory of whole files: what another process has left there.

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use tracing::warn;

use super::{Check, NEW, Whole, remove};
use crate::WholeId;
use crate::disk::Disk;

impl Disk {
    /// Takes in the whole files that are there, as yet unchecked, and removes what is none. What cannot be looked at is left out,
    /// and said: a cache works without.
    pub(in crate::disk) fn adopt_wholes(&self) {
        let mut found: Vec<(SystemTime, WholeId, blake3::Hash, u64)> = Vec::new();
        let listed =
            fs::create_dir_all(&self.wholes.directory).and_then(|()| fs::read_dir(&self.wholes.directory));
        for entry in listed.map_or_else(|error| vec![Err(error)], Iterator::collect) {
            match entry.and_then(|entry| self.look_at(&entry)) {
                Ok(whole) => found.extend(whole),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    warn!(directory = %self.wholes.directory.display(), %error, "whole files are left out");
                }
            }
        }
        found.sort_unstable_by_key(|(modified, ..)| *modified);
        let mut files = self.wholes.files.lock();
        for (_, id, content, len) in found {
            let whole = Whole { content, len, used: self.wholes.next_use(), check: Check::Due };
            self.count_whole(len);
            // two contents for one name: at most one is right, and the check will say whether this is
            if let Some(other) = files.insert(id, whole)
                && let Some(removed) = self.remove_whole(id, other)
            {
                drop(removed);
                self.uncount_whole(other.len);
            }
        }
    }

    /// What a file in the directory is, if it is a whole one. Anything else is removed, or, where that fails, counted.
    fn look_at(&self, entry: &fs::DirEntry) -> io::Result<Option<(SystemTime, WholeId, blake3::Hash, u64)>> {
        let (path, metadata) = (entry.path(), entry.metadata()?);
        let names = path.file_name().and_then(|name| name.to_str()).and_then(parse);
        if let Some((id, content)) = names.filter(|_| metadata.is_file()) {
            return Ok(Some((metadata.modified()?, id, content, metadata.len())));
        }
        let removed = if metadata.is_dir() { fs::remove_dir_all(&path) } else { remove(&path) };
        removed.inspect_err(|_| self.keep_stuck(&path, &metadata))?;
        Ok(None)
    }

    fn keep_stuck(&self, path: &Path, metadata: &Metadata) {
        self.count_whole(metadata.len());
        if path.ends_with(NEW) {
            self.wholes.stuck_bytes.store(metadata.len(), Ordering::Relaxed);
        }
    }
}

/// What a whole file's name says.
fn parse(name: &str) -> Option<(WholeId, blake3::Hash)> {
    let (id, content) = name.split_once('.')?;
    let hash = |hex: &str| blake3::Hash::from_hex(hex).ok().filter(|hash| hash.to_hex().as_str() == hex);
    Some((WholeId::from_hash(hash(id)?), hash(content)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_says_what_was_written_as_such_and_no_other_name_says_anything(
            id: [u8; 32],
            content: [u8; 32],
            other in "[0-9a-fA-F.]{0,140}",
        ) {
            let (id, content) = (WholeId::from_hash(id.into()), blake3::Hash::from(content));
            prop_assert_eq!(parse(&format!("{id}.{content}")), Some((id, content)));
            let again = parse(&other).map(|(id, content)| format!("{id}.{content}"));
            prop_assert!(again.is_none_or(|again| again == other));
        }
    }
}
