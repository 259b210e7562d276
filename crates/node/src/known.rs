//! Images that this node has found before: what each reference meant when a registry last said so.
//!
//! One small JSON file a reference. A digest never means anything else, so an image named by digest is found here without asking
//! anybody; what is named by tag only where nobody answers. Every file can be deleted; it is written again at the next mount.

use std::fs;
use std::io;
use std::path::PathBuf;

use lamina_wire::{Reference, Version};
use serde::{Deserialize, Serialize};

use crate::Found;
use crate::remembered::Remembered;

/// References that are remembered, half a kilobyte each; the oldest are forgotten.
const KNOWN_MAX: usize = 4096;
/// A file is never longer.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// The directory of known images.
#[derive(Clone, Debug)]
pub(crate) struct Known(Remembered);

/// What a file says.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    reference: String,
    manifest: String,
    tree: String,
    bound: bool,
}

impl Known {
    /// Takes the directory, creating it where it is missing.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self(Remembered::new(directory, KNOWN_MAX, FILE_BYTES_MAX)))
    }

    /// What `reference` meant when it was last found. Blocks for one small read.
    pub(crate) fn find(&self, reference: &Reference) -> Option<Found> {
        let reference = reference.to_string();
        let entry: Entry = self.0.find(&reference)?;
        if entry.reference != reference {
            return None;
        }
        let (manifest, tree) = (entry.manifest.parse().ok()?, entry.tree.parse().ok()?);
        Some(Found { manifest, tree, names: None, bound: entry.bound, requests: 0 })
    }

    /// Remembers what `reference` means, under its digest as well. Blocks; a failure costs a request later, and nothing else.
    pub(crate) fn remember(&self, reference: &Reference, found: &Found) {
        let pinned = Reference { version: Version::Digest(found.manifest), ..reference.clone() };
        for reference in [reference, &pinned] {
            if let Err(error) = self.write(&reference.to_string(), found) {
                tracing::debug!(%reference, %error, "cannot be remembered");
            }
        }
    }

    fn write(&self, reference: &str, found: &Found) -> io::Result<()> {
        let (manifest, tree) = (found.manifest.to_string(), found.tree.to_string());
        let entry = Entry { reference: reference.to_owned(), manifest, tree, bound: found.bound };
        self.0.write(reference, &entry)
    }
}

#[cfg(test)]
mod tests {
    use lamina_image::Digest;

    use super::*;

    fn known() -> (tempfile::TempDir, Known) {
        let directory = tempfile::tempdir().expect("a directory");
        let known = Known::open(directory.path().join("images")).expect("opened");
        (directory, known)
    }

    #[test]
    fn an_image_is_found_again_by_its_tag_and_by_its_digest() {
        let (_directory, known) = known();
        let (manifest, tree) = (Digest::of(b"manifest"), Digest::of(b"tree"));
        let found = Found { manifest, tree, names: None, bound: true, requests: 2 };
        let tag: Reference = "localhost:5000/a:t".parse().expect("a reference");
        let digest: Reference = format!("localhost:5000/a@{manifest}").parse().expect("a reference");
        known.remember(&tag, &found);
        for reference in [tag, digest] {
            let again = known.find(&reference).expect("known");
            assert_eq!((again.manifest, again.tree, again.bound, again.requests), (manifest, tree, true, 0));
        }
        assert!(known.find(&"localhost:5000/b:t".parse().expect("a reference")).is_none());
    }

    #[test]
    fn a_damaged_file_is_an_unknown_image() {
        let (_directory, known) = known();
        let found = Found {
            manifest: Digest::of(b"m"),
            tree: Digest::of(b"t"),
            names: None,
            bound: false,
            requests: 1,
        };
        let tag: Reference = "localhost:5000/a:t".parse().expect("a reference");
        known.remember(&tag, &found);
        for damage in [&b""[..], b"{}", b"\xff\xfe", b"{\"reference\":\"localhost:5000/a:t\"}"] {
            fs::write(known.0.path(&tag.to_string()), damage).expect("written");
            assert!(known.find(&tag).is_none());
        }
    }
}
